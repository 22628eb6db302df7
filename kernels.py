"""The operations of the encoder that deserve a kernel: in Triton, and as plain PyTorch.

    attention      O = dropout(softmax(Q K^T / sqrt(D))) V     within each sequence, not causal
    layer_norm     y = LN(dropout(x) + residual)               between two blocks of the encoder,
                   LN(h) = (h - mean) / sqrt(var + eps) weight + bias
    dropout        y = dropout(x)                              where no LayerNorm follows
    cross_entropy  sum of log(sum e^logits) - logit[label]     over the rows of a large vocabulary

Each operation is one section, in this order: the public function, its naive twin (`..._reference`),
its kernels, the functions that launch them, and the autograd function. Read the twins first: the
tests hold the kernels to them. Tensors on a CUDA device are served by Triton, others by PyTorch;
`STARENCODER_KERNELS=torch|triton` overrides (triton on a CPU is Triton's interpreter).

Sequences are packed: the tokens of a micro-batch lie end to end in one axis of length T, and
`cu_seqlens` (B+1,) int32 says where each sequence starts. There are no padding tokens.
Letters in shapes: B sequences, T tokens, N heads, D head size, L length of one sequence, H hidden,
M rows of logits, V vocabulary. In formulas, p is the probability of dropout.

**Counter-based dropout.** No generator has a state, and the kernels store no mask. Whether an
element is kept is a pure function of the seed and of the element's position, computed by the
generator Philox 2x32-7: philox(key, (c0, c1)) mixes a key and a counter, all 32-bit words, into two
random words. The backward pass computes the same bits again, and a resumed run needs only the seed.
**Each call needs a seed of its own**: two calls with one seed drop the same elements.

    rng_key, rng_offset = philox(head, (lower, upper word of the seed))    once for each head
    word_0, word_1 = philox(rng_key, (c0, c1 + rng_offset))                once for four elements

Two words are four 16-bit halves, numbered 0 to 3, the lower half first. They decide on four
elements:

    layer_norm, dropout   x[row, column]: head = 0, c0 = row, c1 = column // 4, half column % 4
    attention             P[query, key], positions within the sequence that starts at token `start`:
                          c0 = start, c1 = pair(query) * 2^16 + pair(key),
                          half 2 * (query // 8 % 2) + key // 8 % 2

Here pair(i) = i // 16 * 8 + i % 8 gives i and i + 8 in the same block of 16 one number: pair(3) =
pair(11) = 3, pair(16) = pair(24) = 8. So one counter serves {q, q + 8} x {k, k + 8}. In a tile of
scores, these four elements belong to one thread of a tensor core, also when the tile is transposed:
the mask never travels between threads.

An element is kept if its half, read as a signed number, is at least round(p * 2^16) - 2^15 (or
2^15 - 1, if that is less). What is kept is scaled by 1 / (1 - p).

References: Vaswani et al., Attention Is All You Need, 2017, section 3.2; Ba et al., Layer
Normalization, 2016; Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao,
FlashAttention-2, 2023; Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011 (Philox:
7 rounds are the fewest that pass all of TestU01's BigCrush, table 2 there).

Left out: causal masks, cross attention, grouped-query attention, second derivatives. Under
torch.compile these operations break the graph. Limits of the kernels: D up to 128, sequences of up
to 2^17 tokens, 65,535 sequences and heads, and fp16, bf16 or fp32.
"""

import contextlib
import functools
import math
import os
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

if os.environ.get("STARENCODER_KERNELS") == "triton" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # Triton reads it when a kernel is defined
try:  # there is no Triton for macOS and Windows
    import triton
    import triton.language as tl

    HAS_TRITON = True
    INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
except ImportError:
    HAS_TRITON = False
    INTERPRETED = False


def outside_compile(function):
    """`torch.compiler.disable`, but only when something is compiled: it imports much.

    A compiled model breaks its graph here and computes the same.
    """

    @functools.wraps(function)
    def call(*arguments, **keywords):
        if torch.compiler.is_compiling():
            return torch.compiler.disable(function)(*arguments, **keywords)
        return function(*arguments, **keywords)

    return call


def backend(tensor):
    """Which implementation serves `tensor`: "triton" on CUDA devices, "torch" elsewhere.

    `STARENCODER_KERNELS` overrides. Raises ValueError if it asks for what is not available.
    """
    on_gpu = tensor.is_cuda or Launcher.current.compiles_on_cpu
    asked = os.environ.get("STARENCODER_KERNELS")
    if not asked:
        return "triton" if HAS_TRITON and on_gpu else "torch"
    if asked not in ("torch", "triton"):
        raise ValueError(f"STARENCODER_KERNELS={asked}: it must be torch or triton")
    if asked == "triton" and not (HAS_TRITON and (on_gpu or INTERPRETED)):
        needed = "Triton, and a CUDA device or, set from the start, TRITON_INTERPRET=1"
        raise ValueError(f"STARENCODER_KERNELS=triton: needs {needed}")
    return asked


def lengths_visible(cu_seqlens):
    """True if the numbers in cu_seqlens can be read without waiting for a GPU."""
    return cu_seqlens.device.type == "cpu" and not Launcher.current.dry


# ---- dropout by counter --------------------------------------------------------------------------

PHILOX_MULTIPLIER = 0xD256D193
PHILOX_KEY_STEP = 0x9E3779B9
PHILOX_ROUNDS = 7
LOWER_32 = 0xFFFFFFFF  # selects the lower 32 bits
COUNTERS_IN_CACHE = 2**16  # a mask in PyTorch is computed in pieces that fit a CPU's cache


def philox(key, c0, c1, rounds=PHILOX_ROUNDS):
    """Philox 2x32 (Salmon et al., section 3.3): two random 32-bit words for the counter (c0, c1).

    key, c0, c1: ints or int64 tensors that broadcast, with values below 2**32. Returns two of the
    same kind. PyTorch has no uint32 arithmetic, so words live in int64, where a product wraps
    modulo 2**64 just as the hardware's does, and `& LOWER_32` keeps 32 bits.

    >>> [hex(word) for word in philox(0, 0, 0)]  # the known answer of Random123
    ['0x257a3673', '0xcd26be2a']
    """
    for _ in range(rounds):
        product = c0 * PHILOX_MULTIPLIER
        c0 = ((product >> 32) ^ key ^ c1) & LOWER_32
        c1 = product & LOWER_32
        key = (key + PHILOX_KEY_STEP) & LOWER_32
    return c0, c1


def dropout_threshold(dropout_p):
    """The least half that is kept. At most 2^15 - 1, the largest half: it is always kept."""
    return min(round(dropout_p * 2**16), 2**16 - 1) - 2**15


def dropout_halves(seed, head, c0, c1, dropout_p):
    """Which of the four elements of each counter (c0, c1) are kept: bool (..., 4)."""
    rng_key, rng_offset = philox(head, seed & LOWER_32, (seed >> 32) & LOWER_32)
    words = philox(rng_key, c0, (c1 + rng_offset) & LOWER_32)
    words = torch.stack([word.to(torch.int32) for word in words], dim=-1)  # (..., 2)
    # On a little-endian machine the lower half of a word comes first.
    return words.view(torch.int16) >= dropout_threshold(dropout_p)


def dropout_keep(seed, dropout_p, rows, columns, device=None, dtype=torch.bool):
    """Which elements of a (rows, columns) matrix dropout keeps: 1 or 0 of `dtype`."""
    keep = torch.empty(rows, columns, dtype=dtype, device=device)
    row = torch.arange(rows, device=device)[:, None]
    groups = (columns + 3) // 4  # one counter serves four neighbouring columns
    group = torch.arange(groups, device=device)[None, :]

    rows_at_once = max(1, COUNTERS_IN_CACHE // max(1, groups))
    for row_part, keep_part in zip(row.split(rows_at_once), keep.split(rows_at_once)):
        halves = dropout_halves(seed, 0, row_part, group, dropout_p)  # (rows, groups, 4)
        keep_part.copy_(halves.flatten(1)[:, :columns])
    return keep


def attention_keep(seed, dropout_p, head, start, length, dtype=torch.bool):
    """Which attention weights dropout keeps: (..., length, length), queries by keys, of `dtype`.

    head, start: int64 tensors that broadcast to (...): the head, and the token of the packed batch
    at which the sequence starts.
    """
    head, start = torch.broadcast_tensors(head, start)
    keep = torch.empty(*head.shape, length, length, dtype=dtype, device=start.device)
    blocks = (length + 15) // 16
    pair = torch.arange(8 * blocks, device=start.device)
    c1 = (pair[:, None] << 16) | pair[None, :]  # (8 blocks, 8 blocks)

    # One matrix for each (head, start), n matrices at a time.
    at_once = max(1, COUNTERS_IN_CACHE // max(1, c1.numel()))
    heads_and_starts = torch.stack([head, start]).view(2, -1, 1, 1).split(at_once, dim=1)
    matrices = keep.view(head.numel(), length, length).split(at_once)
    for (heads, starts), matrix in zip(heads_and_starts, matrices):
        halves = dropout_halves(seed, heads, starts, c1, dropout_p)  # (n, 8 blocks, 8 blocks, 4)
        # The axes: n, query block, query % 8, key block, key % 8, query // 8 % 2, key // 8 % 2.
        # The last two each go between the block and the remainder of their own position.
        n = len(halves)
        halves = halves.view(n, blocks, 8, blocks, 8, 2, 2).permute(0, 1, 5, 2, 3, 6, 4)
        matrix.copy_(halves.reshape(n, 16 * blocks, 16 * blocks)[:, :length, :length])
    return keep


if HAS_TRITON:
    MULTIPLIER = tl.constexpr(PHILOX_MULTIPLIER)
    KEY_STEP = tl.constexpr(PHILOX_KEY_STEP)
    ROUNDS = tl.constexpr(PHILOX_ROUNDS)
    LOG2_E = tl.constexpr(math.log2(math.e))
    # Triton compiles another variant of a kernel for an integer that is 1 or divisible by 16, and
    # for an aligned pointer. These arguments vary from batch to batch and must not compile anew.
    VARYING = dict(
        do_not_specialize=["T", "threshold"],
        do_not_specialize_on_alignment=["seed_ptr"],
    )

    @triton.jit
    def _philox(key, c0, c1):
        """`philox`, on uint32 tensors."""
        for _ in tl.static_range(ROUNDS):
            product = c0.to(tl.uint64) * MULTIPLIER
            c0 = (product >> 32).to(tl.uint32) ^ key ^ c1
            c1 = product.to(tl.uint32)
            key = key + KEY_STEP
        return c0, c1

    @triton.jit
    def _head_rng(seed_ptr, head):
        """The rng_key and the rng_offset of a head."""
        seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
        return _philox(head.to(tl.uint32), seed.to(tl.uint32), (seed >> 32).to(tl.uint32))

    @triton.jit
    def _halves(rng_key, c0, c1, threshold):
        """`dropout_halves`, where rng_offset is in c1: four bool tensors, one for each half."""
        word_0, word_1 = _philox(rng_key, c0, c1)
        word_0 = word_0.to(tl.int32, bitcast=True)
        word_1 = word_1.to(tl.int32, bitcast=True)
        # A half in the upper 16 bits of a word compares as the half itself, whatever is below it.
        least = threshold << 16
        return word_0 << 16 >= least, word_0 >= least, word_1 << 16 >= least, word_1 >= least

    @triton.jit
    def _attention_keep(
        attention_rng,  # the head's rng_key and rng_offset, the sequence's start, the threshold
        first_query, first_key,  # of the tile, multiples of 16
        QUERIES: tl.constexpr, KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
    ):  # fmt: skip
        """`attention_keep` for a tile: bool (QUERIES, KEYS), or (KEYS, QUERIES) if TRANSPOSED."""
        rng_key, rng_offset, start, threshold = attention_rng
        # pair(i) = i // 2 if i is a multiple of 16.
        query_pair = first_query // 2 + tl.arange(0, QUERIES // 2)
        key_pair = first_key // 2 + tl.arange(0, KEYS // 2)
        if TRANSPOSED:
            c1 = (query_pair << 16)[None, :] | key_pair[:, None]
        else:
            c1 = (query_pair << 16)[:, None] | key_pair[None, :]
        c1 = c1.to(tl.uint32) + rng_offset
        # keep_ij: i = query // 8 % 2, j = key // 8 % 2. The number of its half is 2 i + j.
        keep_00, keep_01, keep_10, keep_11 = _halves(rng_key, start.to(tl.uint32), c1, threshold)

        # Joining adds axis 4 (j), then axis 5 (i). Each goes between its position's block of 16 and
        # its position % 8.
        keep = tl.join(tl.join(keep_00, keep_01), tl.join(keep_10, keep_11))
        if TRANSPOSED:
            keep = tl.reshape(keep, [KEYS // 16, 8, QUERIES // 16, 8, 2, 2])
            return tl.reshape(tl.permute(keep, (0, 4, 1, 2, 5, 3)), [KEYS, QUERIES])
        else:
            keep = tl.reshape(keep, [QUERIES // 16, 8, KEYS // 16, 8, 2, 2])
            return tl.reshape(tl.permute(keep, (0, 5, 1, 2, 4, 3)), [QUERIES, KEYS])


# ---- attention -----------------------------------------------------------------------------------


@outside_compile
def attention(qkv, cu_seqlens, max_seqlen, *, dropout_p=0.0, seed=0):
    """Bidirectional multi-head attention within each sequence (Vaswani et al., section 3.2).

    qkv: (T, 3, N, D): queries, keys and values. cu_seqlens: (B+1,) int32, non-decreasing from 0 to
    T. max_seqlen: int, at least the length of the longest sequence, at most 2**17. dropout_p: the
    probability that an attention weight is dropped. seed: int or 0-d int64 tensor, another for each
    call. Returns (T, N, D) in the dtype of qkv.

    The kernels take fp16, bf16 or fp32, D up to 128, and a qkv whose last stride is 1. Raises
    ValueError for arguments that do not fit together. The numbers in cu_seqlens are checked on a
    CPU only, since reading them from a GPU would make the step wait.
    """
    check_attention(qkv, cu_seqlens, max_seqlen)
    check_dropout(dropout_p, seed)
    if backend(qkv) == "torch":
        return attention_torch(qkv, cu_seqlens, dropout_p, seed)
    check_triton_attention(qkv, cu_seqlens, max_seqlen)
    return Attention.apply(qkv, cu_seqlens, max_seqlen, dropout_p, seed_tensor(seed, qkv.device))


def attention_reference(qkv, cu_seqlens, max_seqlen, *, dropout_p=0.0, seed=0):
    """The naive twin of `attention`: one sequence and one head after the other, any float dtype."""
    T, _, N, D = qkv.shape
    out = qkv.new_zeros(T, N, D)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        for n in range(N):
            q, k, v = qkv[start:end, :, n].unbind(1)  # each (L, D)
            weights = ((q * D**-0.5) @ k.T).softmax(-1)  # (L, L)
            if dropout_p > 0.0:
                head, row = torch.tensor([n, start], device=qkv.device)
                keep = attention_keep(seed, dropout_p, head, row, end - start, qkv.dtype)
                weights = weights * keep / (1 - dropout_p)
            out[start:end, n] = weights @ v
    return out


def attention_torch(qkv, cu_seqlens, dropout_p, seed):
    """`attention` in PyTorch: neighbouring sequences of equal length L make one batch."""
    # Runs of neighbours of one length, as (length, tokens in the run).
    runs = [(L, L * len(list(run))) for L, run in groupby(cu_seqlens.diff().tolist())]
    if not runs:  # no sequence at all
        return qkv[:, 0]
    # PyTorch's own attention would draw another mask, and on a CPU its backward pass in bf16 takes
    # six times as long at L = 64.
    fused = dropout_p == 0.0 and not qkv.requires_grad
    outputs = []
    start = 0
    for (L, tokens), packed in zip(runs, qkv.split([tokens for _, tokens in runs])):
        sequences = packed.unflatten(0, (-1, L)) if L else packed[None]  # (B, L, 3, N, D)
        if fused:
            q, k, v = sequences.permute(2, 0, 3, 1, 4)  # each (B, N, L, D)
            o = F.scaled_dot_product_attention(q, k, v)  # (B, N, L, D)
            outputs.append(o.transpose(1, 2).flatten(0, 1))  # (B L, N, D)
        else:
            outputs += attention_step_by_step(sequences, start, dropout_p, seed)
        start += tokens
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def attention_step_by_step(sequences, start, dropout_p, seed):
    """`attention_torch` for sequences (B, L, 3, N, D) of one length, from token `start` on.

    Returns a list of (tokens, N, D).
    """
    B, L, _, N, D = sequences.shape
    device = sequences.device
    head = torch.arange(N, device=device)  # (N,)
    starts = start + L * torch.arange(B, device=device)[:, None]  # (B, 1)
    # The scores of more sequences would not stay in a CPU's cache.
    at_once = max(1, 2**23 // max(1, N * L * L))
    outputs = []
    for some, some_starts in zip(sequences.split(at_once), starts.split(at_once)):
        q, k, v = some.permute(2, 0, 3, 1, 4)  # each (B, N, L, D)
        weights = ((q * D**-0.5) @ k.transpose(-1, -2)).softmax(-1)  # (B, N, L, L)
        if dropout_p > 0.0:
            keep = attention_keep(seed, dropout_p, head, some_starts, L, sequences.dtype)
            weights = weights * keep
            v = v * (1 / (1 - dropout_p))  # v, since it is smaller than the weights
        outputs.append((weights @ v).transpose(1, 2).flatten(0, 1))  # (B L, N, D)
    return outputs


if HAS_TRITON:

    @triton.jit
    def _bounds(cu_seqlens_ptr, sequence):
        """Where a sequence starts in the packed batch, and its length."""
        start = tl.load(cu_seqlens_ptr + sequence)
        return start, tl.load(cu_seqlens_ptr + sequence + 1) - start

    @triton.jit
    def _load_rows(
        base_ptr, stride,  # of a (length, D) matrix, with `stride` elements from row to row
        row, length, D: tl.constexpr, BLOCK_D: tl.constexpr,
        MASKED: tl.constexpr,  # False: every row is below length, so no comparison is needed
    ):  # fmt: skip
        """The rows of a matrix, with zeros beyond length and D: (rows, BLOCK_D)."""
        d = tl.arange(0, BLOCK_D)
        offset = row[:, None] * stride + d[None, :]
        if MASKED:
            mask = (row < length)[:, None] & (d < D)[None, :]
            return tl.load(base_ptr + offset, mask=mask, other=0.0)
        if D < BLOCK_D:
            return tl.load(base_ptr + offset, mask=(d < D)[None, :], other=0.0)
        return tl.load(base_ptr + offset)

    # Names in the three kernels:
    #
    #   s        a tile of Q K^T, not scaled
    #   S        s * scale, where scale = log2(e) / sqrt(D): the hardware has 2^x and not e^x
    #   e        a tile of E = 2^(S - m), where m is the greatest S of a query
    #   p        a tile of P = softmax = E / l, before dropout, where l is the sum of a query's E
    #   keep     the dropout mask of a tile; keep_scale is 1 / (1 - dropout_p)
    #   shift    (N, T) and norm (N, T) are kept for the backward pass: P = norm 2^(S - shift).
    #            Half precision: shift = m + log2(l), and norm = 1 is not stored. Beside a large m,
    #            log2(l) would be rounded away, which shows in fp32: there shift = m, norm = 1 / l.
    #
    # Each loop over blocks is unrolled into two: one over whole blocks, which need no masks, and
    # one over the partial block at the end, if there is one. PARTIAL is 0 in the first and 1 in the
    # second. A single block needs no pipeline, so num_stages = 1 there.

    @triton.jit(**VARYING)
    def _attention_forward(
        qkv_ptr,  # (T, 3, N, D)
        out_ptr,  # (T, N, D), contiguous, written
        shift_ptr,  # (N, T) fp32, written
        norm_ptr,  # (N, T) fp32, written if FP32
        cu_seqlens_ptr,  # (B+1,) int32
        seed_ptr,  # () int64
        stride_t, stride_3, stride_n,  # of qkv, in elements; its last axis is contiguous
        T, N, scale, threshold, keep_scale,
        D: tl.constexpr, BLOCK_D: tl.constexpr,  # BLOCK_D: D, rounded up to a power of two
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
        FP32: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_Q queries of one head of one sequence, all keys in blocks of BLOCK_K.

            S = scale Q K^T;  m = max S;  E = 2^(S - m);  l = sum E;  O = keep_scale (keep E) V / l

        grid = (ceil(max_seqlen / BLOCK_Q), N, B). Each block of keys updates m and l; what was
        summed earlier shrinks by 2^(m_old - m_new).
        """
        head = tl.program_id(1)
        start, length = _bounds(cu_seqlens_ptr, tl.program_id(2))
        first_query = tl.program_id(0) * BLOCK_Q
        if first_query >= length:  # the grid covers the longest sequence; this one is shorter
            return
        rng_key, rng_offset = _head_rng(seed_ptr, head)
        attention_rng = (rng_key, rng_offset, start, threshold)

        # Queries beyond the end are zeros. Their softmax is uniform and finite, and is not stored.
        query_pos = first_query + tl.arange(0, BLOCK_Q)  # within the sequence
        q_ptr = qkv_ptr + start.to(tl.int64) * stride_t + head * stride_n
        q = _load_rows(q_ptr, stride_t, query_pos, length, D, BLOCK_D, True)  # (BLOCK_Q, BLOCK_D)
        m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_Q], tl.float32)
        o = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

        whole = length // BLOCK_K * BLOCK_K
        for PARTIAL in tl.static_range(2):
            begin = whole if PARTIAL else 0
            end = length if PARTIAL else whole
            for first_key in tl.range(begin, end, BLOCK_K, num_stages=1 if PARTIAL else None):
                # Load k and v: (BLOCK_K, BLOCK_D).
                key_pos = first_key + tl.arange(0, BLOCK_K)  # within the sequence
                k = _load_rows(q_ptr + stride_3, stride_t, key_pos, length, D, BLOCK_D, PARTIAL)
                v = _load_rows(q_ptr + 2 * stride_3, stride_t, key_pos, length, D, BLOCK_D, PARTIAL)

                # Score. Keys beyond the end weigh 2^-inf = 0.
                s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_Q, BLOCK_K)
                if PARTIAL:
                    s = tl.where((key_pos < length)[None, :], s, float("-inf"))

                # Weigh. l is summed before dropout, which acts on the normalized softmax.
                m_new = tl.maximum(m, tl.max(s, 1) * scale)  # (BLOCK_Q,)
                e = tl.exp2(s * scale - m_new[:, None])  # (BLOCK_Q, BLOCK_K)
                shrink = tl.exp2(m - m_new)  # 0 in the first block, where m is -inf
                m = m_new
                l = l * shrink + tl.sum(e, 1)
                if DROPOUT:
                    keep = _attention_keep(
                        attention_rng, first_query, first_key, BLOCK_Q, BLOCK_K, TRANSPOSED=False
                    )
                    # A literal 0.0 instead of scale * 0.0 lets the compiler move the select behind
                    # the cast to bf16, which is three times slower.
                    e = tl.where(keep, e, scale * 0.0)

                # Accumulate.
                o = o * shrink[:, None]
                o = tl.dot(e.to(v.dtype), v, o, input_precision="ieee")

        # Store.
        d = tl.arange(0, BLOCK_D)
        row = (start + query_pos).to(tl.int64)  # of the packed batch
        out_offset = (row[:, None] * N + head) * D + d[None, :]
        o = o * (keep_scale / l)[:, None]
        mask = (query_pos < length)[:, None] & (d < D)[None, :]
        tl.store(out_ptr + out_offset, o, mask=mask)
        stat_offset = head.to(tl.int64) * T + row  # in (N, T)
        if FP32:
            tl.store(shift_ptr + stat_offset, m, mask=query_pos < length)
            tl.store(norm_ptr + stat_offset, 1 / l, mask=query_pos < length)
        else:
            tl.store(shift_ptr + stat_offset, m + tl.log2(l), mask=query_pos < length)

    @triton.jit(**VARYING)
    def _attention_backward_dq(
        qkv_ptr,  # (T, 3, N, D)
        out_ptr, dout_ptr,  # (T, N, D), contiguous
        shift_ptr,  # (N, T) fp32
        norm_ptr,  # (N, T) fp32, read if FP32
        delta_ptr,  # (N, T) fp32, written
        dqkv_ptr,  # (T, 3, N, D), contiguous; dQ is written
        cu_seqlens_ptr,  # (B+1,) int32
        seed_ptr,  # () int64
        stride_t, stride_3, stride_n,  # of qkv
        T, N, scale, threshold, keep_scale,
        D: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
        FP32: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_Q queries of one head of one sequence, all keys in blocks of BLOCK_K.

            dP = keep_scale keep (dO V^T);  dS = P (dP - rowsum(P dP));  dQ = dS K / sqrt(D)

        rowsum(P dP) = rowsum(O dO) is what the derivative of softmax subtracts. In the loop `dp` is
        dP / keep_scale, delta is rowsum(P dP) / keep_scale, and `e` is P / norm, which in half
        precision is P itself. Both factors come at the end. `_attention_backward_dk_dv` reads
        delta again.
        """
        head = tl.program_id(1)
        start, length = _bounds(cu_seqlens_ptr, tl.program_id(2))
        first_query = tl.program_id(0) * BLOCK_Q
        if first_query >= length:
            return
        rng_key, rng_offset = _head_rng(seed_ptr, head)
        attention_rng = (rng_key, rng_offset, start, threshold)

        # Queries beyond the end are zeros, and not stored.
        query_pos = first_query + tl.arange(0, BLOCK_Q)
        row = (start + query_pos).to(tl.int64)
        q_ptr = qkv_ptr + start.to(tl.int64) * stride_t + head * stride_n
        out_offset = (start.to(tl.int64) * N + head) * D  # where the sequence starts in out, dout
        q = _load_rows(q_ptr, stride_t, query_pos, length, D, BLOCK_D, True)  # (BLOCK_Q, BLOCK_D)
        do = _load_rows(dout_ptr + out_offset, N * D, query_pos, length, D, BLOCK_D, True)
        if not FP32:
            out = _load_rows(out_ptr + out_offset, N * D, query_pos, length, D, BLOCK_D, True)
        stat_offset = head.to(tl.int64) * T + row  # in (N, T)
        shift = tl.load(shift_ptr + stat_offset, mask=query_pos < length, other=0.0)
        if FP32:  # pass 0 computes delta
            norm = tl.load(norm_ptr + stat_offset, mask=query_pos < length, other=0.0)
            delta = tl.zeros([BLOCK_Q], tl.float32)
        else:
            delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1) / keep_scale
        dq = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)

        # Pass 1 takes the whole blocks, pass 2 the partial one. FP32 only: pass 0 goes through all
        # keys first and computes delta as sum(P dP), from the same dP that delta is subtracted
        # from, so that the two cancel exactly in saturated rows; rowsum(O dO) differs by rounding.
        # Write `PASS == 2` out each time: stored in a variable, Triton would compare at run time.
        whole = length // BLOCK_K * BLOCK_K
        for PASS in tl.static_range(0 if FP32 else 1, 3):
            if PASS == 1:
                tl.store(delta_ptr + stat_offset, delta, mask=query_pos < length)
            begin = whole if PASS == 2 else 0
            end = whole if PASS == 1 else length
            for first_key in tl.range(begin, end, BLOCK_K, num_stages=1 if PASS == 2 else None):
                # Load k and v: (BLOCK_K, BLOCK_D).
                key_pos = first_key + tl.arange(0, BLOCK_K)
                k = _load_rows(q_ptr + stride_3, stride_t, key_pos, length, D, BLOCK_D, PASS != 1)
                v = _load_rows(
                    q_ptr + 2 * stride_3, stride_t, key_pos, length, D, BLOCK_D, PASS != 1
                )

                # Score.
                s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_Q, BLOCK_K)
                dp = tl.dot(do, tl.trans(v), input_precision="ieee")  # (BLOCK_Q, BLOCK_K)

                # Weigh. For keys beyond the end, 2^(0 - shift) may be inf, and inf * 0 is NaN.
                e = tl.exp2(s * scale - shift[:, None])
                if PASS == 2:
                    e = tl.where((key_pos < length)[None, :], e, 0.0)
                if DROPOUT:
                    keep = _attention_keep(
                        attention_rng, first_query, first_key, BLOCK_Q, BLOCK_K, TRANSPOSED=False
                    )
                    dp = tl.where(keep, dp, 0.0)

                # Accumulate.
                if PASS == 0:
                    # The select also keeps the compiler from fusing the product into the sum, whose
                    # bits would then differ between threads that hold the same delta.
                    p_dp = e * norm[:, None] * dp
                    delta += tl.sum(tl.where((key_pos < length)[None, :], p_dp, 0.0), 1)
                else:
                    ds = e * (dp - delta[:, None])  # (BLOCK_Q, BLOCK_K)
                    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

        # Store.
        dq *= scale / LOG2_E * keep_scale  # scale / LOG2_E = 1 / sqrt(D)
        if FP32:
            dq *= norm[:, None]
        d = tl.arange(0, BLOCK_D)
        dq_offset = (row[:, None] * 3 * N + head) * D + d[None, :]
        mask = (query_pos < length)[:, None] & (d < D)[None, :]
        tl.store(dqkv_ptr + dq_offset, dq, mask=mask)

    @triton.jit(**VARYING)
    def _attention_backward_dk_dv(
        qkv_ptr,  # (T, 3, N, D)
        dout_ptr,  # (T, N, D), contiguous
        shift_ptr,  # (N, T) fp32
        norm_ptr,  # (N, T) fp32, read if FP32
        delta_ptr,  # (N, T) fp32, from `_attention_backward_dq`
        dqkv_ptr,  # (T, 3, N, D), contiguous; dK and dV are written
        cu_seqlens_ptr,  # (B+1,) int32
        seed_ptr,  # () int64
        stride_t, stride_3, stride_n,  # of qkv
        T, N, scale, threshold, keep_scale,
        D: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
        FP32: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_K keys of one head of one sequence, all queries in blocks of BLOCK_Q.

            dV = keep_scale (keep P)^T dO;  dK = dS^T Q / sqrt(D)           dS: as above

        grid = (ceil(max_seqlen / BLOCK_K), N, B). Each program owns its output rows: no atomics,
        deterministic. Tiles are transposed, keys by queries: P^T and dS^T go into the next product
        as they are. `dp` and delta lack the factor keep_scale, as above; it comes at the end.
        """
        head = tl.program_id(1)
        start, length = _bounds(cu_seqlens_ptr, tl.program_id(2))
        first_key = tl.program_id(0) * BLOCK_K
        if first_key >= length:
            return
        rng_key, rng_offset = _head_rng(seed_ptr, head)
        attention_rng = (rng_key, rng_offset, start, threshold)

        # Keys beyond the end are zeros; their rows of dK and dV are not stored.
        key_pos = first_key + tl.arange(0, BLOCK_K)
        q_ptr = qkv_ptr + start.to(tl.int64) * stride_t + head * stride_n
        k = _load_rows(q_ptr + stride_3, stride_t, key_pos, length, D, BLOCK_D, True)
        v = _load_rows(q_ptr + 2 * stride_3, stride_t, key_pos, length, D, BLOCK_D, True)
        dout_ptr += (start.to(tl.int64) * N + head) * D
        stat_offset = head.to(tl.int64) * T + start  # where the sequence starts in (N, T)
        shift_ptr += stat_offset
        norm_ptr += stat_offset
        delta_ptr += stat_offset
        dk = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)

        whole = length // BLOCK_Q * BLOCK_Q
        for PARTIAL in tl.static_range(2):
            begin = whole if PARTIAL else 0
            end = length if PARTIAL else whole
            for first_query in tl.range(begin, end, BLOCK_Q, num_stages=1 if PARTIAL else None):
                # Load. Beyond the end, q = dO = delta = shift = 0: a weight of 1 adds nothing.
                query_pos = first_query + tl.arange(0, BLOCK_Q)
                q = _load_rows(q_ptr, stride_t, query_pos, length, D, BLOCK_D, PARTIAL)
                do = _load_rows(dout_ptr, N * D, query_pos, length, D, BLOCK_D, PARTIAL)
                if PARTIAL:
                    shift = tl.load(shift_ptr + query_pos, mask=query_pos < length, other=0.0)
                    delta = tl.load(delta_ptr + query_pos, mask=query_pos < length, other=0.0)
                else:
                    shift = tl.load(shift_ptr + query_pos)
                    delta = tl.load(delta_ptr + query_pos)

                # Score.
                s = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_K, BLOCK_Q)
                dp = tl.dot(v, tl.trans(do), input_precision="ieee")  # (BLOCK_K, BLOCK_Q)

                # Weigh.
                p = tl.exp2(s * scale - shift[None, :])
                if FP32:
                    norm = tl.load(norm_ptr + query_pos, mask=query_pos < length, other=0.0)
                    p *= norm[None, :]
                p_kept = p
                if DROPOUT:
                    keep = _attention_keep(
                        attention_rng, first_query, first_key, BLOCK_Q, BLOCK_K, TRANSPOSED=True
                    )
                    p_kept = tl.where(keep, p, scale * 0.0)  # not 0.0: see the forward pass
                    dp = tl.where(keep, dp, 0.0)

                # Accumulate.
                dv = tl.dot(p_kept.to(do.dtype), do, dv, input_precision="ieee")
                ds = p * (dp - delta[None, :])  # (BLOCK_K, BLOCK_Q)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")

        # Store.
        dk *= scale / LOG2_E * keep_scale
        dv *= keep_scale
        d = tl.arange(0, BLOCK_D)
        mask = (key_pos < length)[:, None] & (d < D)[None, :]
        row = (start + key_pos).to(tl.int64)
        dq_offset = (row[:, None] * 3 * N + head) * D + d[None, :]  # dK: N D further
        tl.store(dqkv_ptr + dq_offset + N * D, dk, mask=mask)
        tl.store(dqkv_ptr + dq_offset + 2 * N * D, dv, mask=mask)


def attention_forward(qkv, cu_seqlens, max_seqlen, dropout_p, seed):
    """Launches the forward kernel: out (T, N, D), and shift and norm (N, T) for the backward.

    norm is empty in half precision.
    """
    T, _, N, D = qkv.shape
    out = qkv.new_empty(T, N, D)
    shift = qkv.new_empty(N, T, dtype=torch.float32)
    norm = torch.empty_like(shift if qkv.dtype == torch.float32 else shift[:0])
    tile = Launcher.current.tiles(qkv).forward
    pointers = (qkv, out, shift, norm)  # in the order of the kernel's parameters
    inputs = (qkv, cu_seqlens, max_seqlen, dropout_p, seed)
    launch_attention(_attention_forward, tile, tile.queries, pointers, *inputs)
    return out, shift, norm


def attention_backward(dout, qkv, out, shift, norm, cu_seqlens, max_seqlen, dropout_p, seed):
    """Launches the two backward kernels: dqkv (T, 3, N, D)."""
    dout = dout.contiguous()
    dqkv = qkv.new_empty(qkv.shape)
    delta = torch.empty_like(shift)  # (N, T), written by the first kernel and read by the second
    inputs = (qkv, cu_seqlens, max_seqlen, dropout_p, seed)

    tile = Launcher.current.tiles(qkv).dq
    pointers = (qkv, out, dout, shift, norm, delta, dqkv)
    launch_attention(_attention_backward_dq, tile, tile.queries, pointers, *inputs)

    tile = Launcher.current.tiles(qkv).dk_dv
    pointers = (qkv, dout, shift, norm, delta, dqkv)
    launch_attention(_attention_backward_dk_dv, tile, tile.keys, pointers, *inputs)
    return dqkv


def launch_attention(kernel, tile, block, pointers, qkv, cu_seqlens, max_seqlen, dropout_p, seed):
    """Launches an attention kernel. pointers: its own parameters, before those that all share.

    block: how many positions one program owns, tile.queries or tile.keys.
    """
    T, _, N, D = qkv.shape
    grid = (triton.cdiv(max_seqlen, block), N, len(cu_seqlens) - 1)
    scale = D**-0.5 * LOG2_E.value
    arguments = (
        *pointers,
        cu_seqlens.contiguous(), seed,
        *qkv.stride()[:3],
        T, N, scale, *dropout_scalars(dropout_p),  # threshold, keep_scale
    )  # fmt: skip
    constants = dict(
        D=D,
        BLOCK_D=max(16, triton.next_power_of_2(D)),  # tl.dot needs at least 16 columns
        BLOCK_Q=tile.queries,
        BLOCK_K=tile.keys,
        FP32=qkv.dtype == torch.float32,
        DROPOUT=dropout_p > 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.registers and dropout_p > 0:
        constants["maxnreg"] = tile.registers
    launch(kernel, grid, arguments, constants)


class Attention(torch.autograd.Function):
    """Autograd's view of the attention kernels."""

    @staticmethod
    def forward(ctx, qkv, cu_seqlens, max_seqlen, dropout_p, seed):
        out, shift, norm = attention_forward(qkv, cu_seqlens, max_seqlen, dropout_p, seed)
        ctx.save_for_backward(qkv, out, shift, norm, cu_seqlens, seed)
        ctx.max_seqlen = max_seqlen
        ctx.dropout_p = dropout_p
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        *tensors, seed = ctx.saved_tensors
        dqkv = attention_backward(dout, *tensors, ctx.max_seqlen, ctx.dropout_p, seed)
        return dqkv, None, None, None, None  # the other inputs have no gradient


# ---- dropout + residual + LayerNorm, and dropout alone -------------------------------------------


@outside_compile
def layer_norm(x, weight, bias, eps, *, residual=None, dropout_p=0.0, seed=0):
    """LN(dropout(x) + residual), between two blocks of a post-LayerNorm transformer (Ba et al.).

    x: (T, H). weight, bias: (H,), of any float dtype. eps: float, added to the variance. residual:
    like x, or None. dropout_p, seed: as in `attention`. Returns (T, H) in the dtype of x; the
    statistics are at least fp32. The kernels take fp16, bf16 or fp32. Raises ValueError for
    arguments that do not fit together.
    """
    check_layer_norm(x, weight, bias, residual)
    check_dropout(dropout_p, seed)
    if backend(x) == "torch":
        return layer_norm_torch(x, weight, bias, eps, residual, dropout_p, seed)
    check_triton_dtype("x", x)
    seed = seed_tensor(seed, x.device)
    return LayerNorm.apply(x, residual, weight, bias, eps, dropout_p, seed)


def layer_norm_reference(x, weight, bias, eps, *, residual=None, dropout_p=0.0, seed=0):
    """The naive twin of `layer_norm`. Computes in at least fp32 and rounds once, at the end."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    if dropout_p > 0.0:
        h = dropout_reference(h, dropout_p, seed)
    if residual is not None:
        h = h + residual.to(wide)
    return F.layer_norm(h, h.shape[1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)


def layer_norm_torch(x, weight, bias, eps, residual, dropout_p, seed):
    """`layer_norm` in PyTorch: the naive twin, except in bf16 on a CPU where nothing is trained.

    There fp32 copies would take half the time. PyTorch computes in fp32 without them, but the sum
    x + residual is rounded to bf16.
    """
    copies_needed = dropout_p > 0.0 or torch.is_grad_enabled() or x.device.type != "cpu"
    if copies_needed or x.dtype != torch.bfloat16 or weight.dtype != torch.float32:
        return layer_norm_reference(
            x, weight, bias, eps, residual=residual, dropout_p=dropout_p, seed=seed
        )
    h = x if residual is None else x + residual  # fp32 if the residual is, as in the first layer
    return F.layer_norm(h, h.shape[1:], weight, bias, eps).to(x.dtype)


@outside_compile
def dropout(x, dropout_p, seed):
    """Dropout alone, where no LayerNorm follows. x: (T, H). Returns (T, H) of the same dtype.

    Raises ValueError if x is not (T, H) floating point, or if dropout_p or seed is out of range.
    """
    check_matrix(x)
    check_dropout(dropout_p, seed)
    if dropout_p == 0.0:
        return x
    if backend(x) == "torch":
        return dropout_reference(x, dropout_p, seed)
    check_triton_dtype("x", x)
    return Dropout.apply(x, dropout_p, seed_tensor(seed, x.device))


def dropout_reference(x, dropout_p, seed):
    """The naive twin of `dropout`, any float dtype."""
    keep = dropout_keep(seed, dropout_p, *x.shape, x.device, x.dtype)
    return x * keep * (1 / (1 - dropout_p))


if HAS_TRITON:

    @triton.jit
    def _load_dropout_add(
        x_ptr, residual_ptr,  # (T, H), contiguous
        row_rng,  # rng_key and rng_offset of head 0, threshold, keep_scale
        row, T, first,  # the rows, how many there are, and the first of BLOCK_H columns
        H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
        RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """h = dropout(x) + residual, fp32, zeros beyond T and H: (BLOCK_R, BLOCK_H).

        Returns h, what dropout multiplied x by, the offsets of the elements, and their mask.
        """
        column = first + tl.arange(0, BLOCK_H)
        offset = row.to(tl.int64)[:, None] * H + column[None, :]
        mask = (row < T)[:, None] & (column < H)[None, :]
        h = tl.load(x_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        factor = tl.full([BLOCK_R, BLOCK_H], 1.0, tl.float32)
        if DROPOUT:
            rng_key, rng_offset, threshold, keep_scale = row_rng
            group = first // 4 + tl.arange(0, BLOCK_H // 4)
            c1 = group.to(tl.uint32)[None, :] + rng_offset
            c0 = row.to(tl.uint32)[:, None]
            keep_0, keep_1, keep_2, keep_3 = _halves(rng_key, c0, c1, threshold)  # of 4 columns
            # Joining adds two axes of 2: keep_{2 i + j} is at [i, j].
            keep = tl.join(tl.join(keep_0, keep_2), tl.join(keep_1, keep_3))
            factor = tl.where(tl.reshape(keep, [BLOCK_R, BLOCK_H]), keep_scale, 0.0)
            h = h * factor
        if RESIDUAL:
            h += tl.load(residual_ptr + offset, mask=mask, other=0.0).to(tl.float32)
        return h, factor, offset, mask

    @triton.jit(**VARYING)
    def _layer_norm_forward(
        x_ptr, residual_ptr,  # (T, H), contiguous
        weight_ptr, bias_ptr,  # (H,)
        y_ptr,  # (T, H), contiguous, written
        mean_ptr, rstd_ptr,  # (T,) fp32, written
        seed_ptr,  # () int64
        T, eps, threshold, keep_scale,
        H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
        RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_R whole rows, in chunks of BLOCK_H columns that stay in registers.

            y = (h - mean) rstd weight + bias;  rstd = 1 / sqrt(var + eps)

        grid = (ceil(T / BLOCK_R),). Kept for the backward pass: mean, rstd. The first element of a
        row of h, the pivot, is subtracted before the mean is taken, so that a constant row gives
        exactly 0. Otherwise the rounding error of its mean would be divided by sqrt(eps).
        """
        row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        rng_key, rng_offset = _head_rng(seed_ptr, tl.full([], 0, tl.int32))
        row_rng = (rng_key, rng_offset, threshold, keep_scale)
        row_offset = row.to(tl.int64) * H
        pivot = tl.load(x_ptr + row_offset, mask=row < T, other=0.0).to(tl.float32)  # (BLOCK_R,)
        if DROPOUT:
            keep, _, _, _ = _halves(rng_key, row.to(tl.uint32), rng_offset, threshold)  # column 0
            pivot *= tl.where(keep, keep_scale, 0.0)
        if RESIDUAL:
            pivot += tl.load(residual_ptr + row_offset, mask=row < T, other=0.0).to(tl.float32)

        # First pass: h - pivot, and its sum. static_range unrolls the loop, so a tuple can grow by
        # a chunk each time: Triton has no lists, and the chunks stay in registers.
        chunks = ()  # (BLOCK_R, BLOCK_H) each
        total = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        for first in tl.static_range(0, H, BLOCK_H):
            h, _, _, mask = _load_dropout_add(
                x_ptr, residual_ptr, row_rng, row, T, first, H, BLOCK_R, BLOCK_H, RESIDUAL, DROPOUT
            )
            h = tl.where(mask, h - pivot[:, None], 0.0)
            chunks = chunks + (h,)
            total += h
        mean = tl.sum(total, 1) / H  # (BLOCK_R,), without the pivot

        # Second pass, from registers: the variance.
        square = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        for i in tl.static_range(len(chunks)):
            column = i * BLOCK_H + tl.arange(0, BLOCK_H)
            centered = tl.where((column < H)[None, :], chunks[i] - mean[:, None], 0.0)
            square += centered * centered
        rstd = 1 / tl.sqrt(tl.sum(square, 1) / H + eps)  # (BLOCK_R,)

        # Third pass, from registers: the output.
        for i in tl.static_range(len(chunks)):
            column = i * BLOCK_H + tl.arange(0, BLOCK_H)
            weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
            bias = tl.load(bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)
            y = (chunks[i] - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
            mask = (row < T)[:, None] & (column < H)[None, :]
            tl.store(y_ptr + row_offset[:, None] + column[None, :], y, mask=mask)
        tl.store(mean_ptr + row, mean + pivot, mask=row < T)
        tl.store(rstd_ptr + row, rstd, mask=row < T)

    @triton.jit(**VARYING)
    def _layer_norm_backward(
        dy_ptr, x_ptr, residual_ptr,  # (T, H), contiguous
        weight_ptr,  # (H,)
        mean_ptr, rstd_ptr,  # (T,) fp32
        dx_ptr, dresidual_ptr,  # (T, H), contiguous, written
        dweight_ptr, dbias_ptr,  # (programs, H) fp32, written: each program's sums over its rows
        seed_ptr,  # () int64
        T, threshold, keep_scale,
        H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
        RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """Persistent: program i takes the blocks i, i + programs, ... of BLOCK_R rows.

            n = (h - mean) rstd;  g = dy weight;  dh = (g - mean(g) - n mean(g n)) rstd
            dresidual = dh;  dx = keep dh / (1 - p);  dweight = sum dy n;  dbias = sum dy

        grid = (programs,). A row is read in chunks as in the forward pass; each tuple has one entry
        for each chunk. dweight and dbias keep a row of sums for each row of a block until the end,
        since a sum over rows makes threads wait for each other.
        """
        rng_key, rng_offset = _head_rng(seed_ptr, tl.full([], 0, tl.int32))
        row_rng = (rng_key, rng_offset, threshold, keep_scale)
        CHUNKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
        weights = ()  # (BLOCK_H,) each
        dweights = ()  # (BLOCK_R, BLOCK_H) each
        dbiases = ()  # likewise
        for i in tl.static_range(CHUNKS):
            column = i * BLOCK_H + tl.arange(0, BLOCK_H)
            weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
            weights = weights + (weight,)
            dweights = dweights + (tl.zeros([BLOCK_R, BLOCK_H], tl.float32),)
            dbiases = dbiases + (tl.zeros([BLOCK_R, BLOCK_H], tl.float32),)

        for block in range(tl.program_id(0), tl.cdiv(T, BLOCK_R), tl.num_programs(0)):
            row = block * BLOCK_R + tl.arange(0, BLOCK_R)
            mean = tl.load(mean_ptr + row, mask=row < T, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)

            # First pass: n and g of each chunk, and the two means. Beyond T and H, dy = 0 adds
            # nothing.
            n_chunks = ()
            g_chunks = ()
            factors = ()  # of dropout
            sum_g = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
            sum_gn = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
            new_dweights = ()  # an entry of a tuple cannot be assigned: the new sums are new tuples
            new_dbiases = ()
            for i in tl.static_range(CHUNKS):
                h, factor, offset, mask = _load_dropout_add(
                    x_ptr, residual_ptr, row_rng, row, T, i * BLOCK_H,
                    H, BLOCK_R, BLOCK_H, RESIDUAL, DROPOUT,
                )  # fmt: skip
                dy = tl.load(dy_ptr + offset, mask=mask, other=0.0).to(tl.float32)
                n = (h - mean[:, None]) * rstd[:, None]
                g = dy * weights[i][None, :]
                n_chunks = n_chunks + (n,)
                g_chunks = g_chunks + (g,)
                factors = factors + (factor,)
                sum_g += g
                sum_gn += g * n
                new_dweights = new_dweights + (dweights[i] + dy * n,)
                new_dbiases = new_dbiases + (dbiases[i] + dy,)
            dweights = new_dweights
            dbiases = new_dbiases
            mean_g = tl.sum(sum_g, 1) / H  # (BLOCK_R,)
            mean_gn = tl.sum(sum_gn, 1) / H  # (BLOCK_R,)

            # Second pass, from registers: the gradients.
            for i in tl.static_range(CHUNKS):
                column = i * BLOCK_H + tl.arange(0, BLOCK_H)
                offset = row.to(tl.int64)[:, None] * H + column[None, :]
                mask = (row < T)[:, None] & (column < H)[None, :]
                dh = g_chunks[i] - mean_g[:, None] - n_chunks[i] * mean_gn[:, None]
                dh *= rstd[:, None]
                if RESIDUAL and DROPOUT:  # without dropout dresidual is dx
                    tl.store(dresidual_ptr + offset, dh, mask=mask)
                tl.store(dx_ptr + offset, dh * factors[i], mask=mask)

        # Each program stores its own sums; the launcher adds up those of all programs.
        for i in tl.static_range(CHUNKS):
            column = i * BLOCK_H + tl.arange(0, BLOCK_H)
            sum_offset = tl.program_id(0).to(tl.int64) * H + column
            tl.store(dweight_ptr + sum_offset, tl.sum(dweights[i], 0), mask=column < H)
            tl.store(dbias_ptr + sum_offset, tl.sum(dbiases[i], 0), mask=column < H)

    @triton.jit(**VARYING)
    def _dropout_kernel(
        x_ptr, y_ptr,  # (T, H), contiguous
        seed_ptr,  # () int64
        T, threshold, keep_scale,
        H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_R rows. y = keep x / (1 - p)."""
        row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        rng_key, rng_offset = _head_rng(seed_ptr, tl.full([], 0, tl.int32))
        row_rng = (rng_key, rng_offset, threshold, keep_scale)
        for first in range(0, H, BLOCK_H):
            y, _, offset, mask = _load_dropout_add(
                x_ptr, x_ptr, row_rng, row, T, first, H, BLOCK_R, BLOCK_H, False, True
            )
            tl.store(y_ptr + offset, y, mask=mask)


def layer_norm_forward(x, residual, weight, bias, eps, dropout_p, seed):
    """Launches the forward kernel: y (T, H), and mean and rstd (T,) for the backward pass."""
    x = x.contiguous()
    y = torch.empty_like(x)
    mean = x.new_empty(len(x), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    constants, programs = norm_settings(Launcher.current.tiles(x).norm, x)
    constants |= dict(RESIDUAL=residual is not None, DROPOUT=dropout_p > 0)
    residual = x if residual is None else residual.contiguous()  # not read if RESIDUAL is False
    arguments = (
        x, residual, weight.contiguous(), bias.contiguous(), y, mean, rstd, seed,
        len(x), eps, *dropout_scalars(dropout_p),  # threshold, keep_scale
    )  # fmt: skip
    launch(_layer_norm_forward, (programs,), arguments, constants)
    return y, mean, rstd


def layer_norm_backward(dy, x, residual, weight, mean, rstd, dropout_p, seed):
    """Launches the backward kernel: dx and dresidual (T, H), dweight and dbias (H,) fp32.

    Without dropout, or without a residual, dresidual is dx.
    """
    x = x.contiguous()
    constants, programs = norm_settings(Launcher.current.tiles(x).norm_backward, x)
    constants |= dict(RESIDUAL=residual is not None, DROPOUT=dropout_p > 0)
    residual = x if residual is None else residual.contiguous()  # not read if RESIDUAL is False
    dx = torch.empty_like(x)
    two_gradients = constants["RESIDUAL"] and constants["DROPOUT"]
    dresidual = torch.empty_like(residual) if two_gradients else dx
    dweight = x.new_empty(programs, x.shape[1], dtype=torch.float32)
    dbias = torch.empty_like(dweight)
    arguments = (
        dy.contiguous(), x, residual, weight.contiguous(), mean, rstd,
        dx, dresidual, dweight, dbias, seed,
        len(x), *dropout_scalars(dropout_p),  # threshold, keep_scale
    )  # fmt: skip
    launch(_layer_norm_backward, (programs,), arguments, constants)
    return dx, dresidual, dweight.sum(0), dbias.sum(0)  # over the programs


def launch_dropout(x, dropout_p, seed):
    """Launches the kernel of dropout alone, which is also its backward pass: (T, H)."""
    x = x.contiguous()
    y = torch.empty_like(x)
    constants, programs = norm_settings(Launcher.current.tiles(x).norm, x)
    arguments = (x, y, seed, len(x), *dropout_scalars(dropout_p))
    launch(_dropout_kernel, (programs,), arguments, constants)
    return y


def norm_settings(tile, x):
    """The constants of a LayerNorm kernel for x (T, H), and its number of programs.

    A chunk is a power of two of columns, at least the four that share a counter of dropout:

        H <= 256     the whole row
        H <= 1,024   256 columns, which a warp reads at once
        wider        a quarter of the row, and one row at a time: registers hold no more
    """
    T, H = x.shape
    wide = H > 1024
    rows = 1 if wide else tile.rows
    columns = H if H <= 256 else max(256, triton.cdiv(H, 4))
    constants = dict(
        H=H,
        BLOCK_R=rows,
        BLOCK_H=max(4, triton.next_power_of_2(columns)),
        num_warps=8 if wide else tile.warps,
    )
    blocks = triton.cdiv(T, rows)
    return constants, min(blocks, tile.programs or blocks)


class LayerNorm(torch.autograd.Function):
    """Autograd's view of the LayerNorm kernels."""

    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, dropout_p, seed):
        y, mean, rstd = layer_norm_forward(x, residual, weight, bias, eps, dropout_p, seed)
        ctx.save_for_backward(x, residual, weight, mean, rstd, seed)
        ctx.bias_dtype = bias.dtype
        ctx.dropout_p = dropout_p
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, residual, weight, mean, rstd, seed = ctx.saved_tensors
        dx, dresidual, dweight, dbias = layer_norm_backward(
            dy, x, residual, weight, mean, rstd, ctx.dropout_p, seed
        )
        dresidual = None if residual is None else dresidual.to(residual.dtype)
        # eps, dropout_p and seed have no gradient.
        return dx, dresidual, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None, None


class Dropout(torch.autograd.Function):
    """Autograd's view of the dropout kernel."""

    @staticmethod
    def forward(ctx, x, dropout_p, seed):
        ctx.save_for_backward(seed)
        ctx.dropout_p = dropout_p
        return launch_dropout(x, dropout_p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        return launch_dropout(dy, ctx.dropout_p, *ctx.saved_tensors), None, None


# ---- cross-entropy of a large vocabulary ---------------------------------------------------------


@outside_compile
def cross_entropy(logits, labels):
    """Sum of the cross-entropies of logits (M, V) at labels (M,) int64: (), at least fp32.

    A label of -100 does not count. Any other that is no column makes the sum NaN on Triton, and the
    gradient of its row; PyTorch raises. With Triton, the backward pass overwrites the logits with
    their gradient, since with 49,152 columns they are the largest tensor of a step. So there is one
    backward pass, and the logits must not be read after it.

    Raises ValueError for arguments that do not fit together.
    """
    check_cross_entropy(logits, labels)
    if backend(logits) == "torch":
        return cross_entropy_reference(logits, labels)
    if logits.dtype == torch.float64:
        raise ValueError("logits must be of half precision or fp32 for the Triton kernels")
    return CrossEntropy.apply(logits, labels)


def cross_entropy_reference(logits, labels):
    """The naive twin of `cross_entropy`, in at least fp32. It leaves the logits alone."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return F.cross_entropy(logits.to(wide), labels, reduction="sum")


if HAS_TRITON:

    @triton.jit
    def _cross_entropy_forward(
        logits_ptr,  # (M, V), contiguous
        labels_ptr,  # (M,) int64
        losses_ptr,  # (M,) fp32, written
        lse_ptr,  # (M,) fp32, written, kept for the backward pass
        V: tl.constexpr, BLOCK_V: tl.constexpr,
    ):  # fmt: skip
        """One program: one row, read once. loss = lse - logit[label];  lse = log sum e^logit."""
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * V
        # Not -inf: after a block of logits that are all -inf, m - m_new would be inf - inf, NaN.
        m = tl.full([], -3.0e38, tl.float32)  # the running maximum
        l = tl.zeros([BLOCK_V], tl.float32)  # the running sum of e^(x - m), lane by lane
        for first in range(0, V, BLOCK_V):
            column = first + tl.arange(0, BLOCK_V)
            x = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m, tl.max(x, 0))
            l = l * tl.exp(m - m_new) + tl.exp(x - m_new)
            m = m_new
        lse = m + tl.log(tl.sum(l, 0))

        # A label that is no column would read from another row, or from beyond the tensor: the
        # loss is NaN instead.
        label = tl.load(labels_ptr + row)
        is_column = (label >= 0) & (label < V)
        chosen = tl.load(logits_ptr + label, mask=is_column, other=float("nan")).to(tl.float32)
        tl.store(losses_ptr + row, tl.where(label == -100, 0.0, lse - chosen))
        tl.store(lse_ptr + row, lse)

    @triton.jit
    def _cross_entropy_backward(
        logits_ptr,  # (M, V), contiguous, overwritten by the gradient
        labels_ptr,  # (M,) int64
        lse_ptr,  # (M,) fp32
        upstream_ptr,  # () fp32
        V: tl.constexpr, BLOCK_V: tl.constexpr,
    ):  # fmt: skip
        """One program: one row. dlogit = upstream (e^(logit - lse) - [column = label])."""
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * V
        label = tl.load(labels_ptr + row)
        lse = tl.load(lse_ptr + row)
        is_column = (label >= 0) & (label < V)
        factor = tl.where(is_column, tl.load(upstream_ptr), float("nan"))
        factor = tl.where(label == -100, 0.0, factor)
        for first in range(0, V, BLOCK_V):
            column = first + tl.arange(0, BLOCK_V)
            x = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
            gradient = (tl.exp(x - lse) - tl.where(column == label, 1.0, 0.0)) * factor
            tl.store(logits_ptr + column, gradient, mask=column < V)


def cross_entropy_forward(logits, labels):
    """Launches the forward kernel: losses and lse, both (M,) fp32."""
    losses = logits.new_empty(len(logits), dtype=torch.float32)
    lse = torch.empty_like(losses)
    launch_cross_entropy(_cross_entropy_forward, logits, labels, losses, lse)
    return losses, lse


def cross_entropy_backward(logits, labels, lse, upstream):
    """Launches the backward kernel, which overwrites the logits with their gradient."""
    launch_cross_entropy(_cross_entropy_backward, logits, labels, lse, upstream)


def launch_cross_entropy(kernel, logits, *other_pointers):
    """Launches a cross-entropy kernel: one program a row, in blocks of up to 4,096 columns."""
    M, V = logits.shape
    constants = dict(V=V, BLOCK_V=min(4096, triton.next_power_of_2(V)), num_warps=8)
    launch(kernel, (M,), (logits, *other_pointers), constants)


class CrossEntropy(torch.autograd.Function):
    """`cross_entropy` by Triton, without the checks."""

    @staticmethod
    def forward(ctx, logits, labels):
        logits = logits.contiguous()
        labels = labels.contiguous()
        losses, lse = cross_entropy_forward(logits, labels)
        ctx.save_for_backward(logits, labels, lse)
        return losses.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream):
        logits, labels, lse = ctx.saved_tensors
        gradient = logits.detach()
        cross_entropy_backward(gradient, labels, lse, upstream)
        # Autograd now sees that the logits changed, and raises an error in a second backward pass.
        torch.autograd.graph.increment_version(gradient)
        return gradient, None


# ---- launching -----------------------------------------------------------------------------------


class Tile(NamedTuple):
    """How an attention kernel is launched."""

    queries: int  # BLOCK_Q
    keys: int  # BLOCK_K
    warps: int
    stages: int  # blocks in flight from device memory
    registers: int = 0  # the most that a thread may use, with dropout; 0: the compiler decides


class NormTile(NamedTuple):
    """How a LayerNorm kernel is launched."""

    rows: int  # BLOCK_R
    warps: int
    programs: int = 0  # upper limit, as each writes partial sums; 0: one for each block of rows


class Tiles(NamedTuple):
    """How every kernel is launched on a chip."""

    forward: Tile
    dq: Tile
    dk_dv: Tile
    norm: NormTile = NormTile(4, 4)  # LayerNorm forward, and dropout alone
    norm_backward: NormTile = NormTile(4, 4, 528)


# By compute capability and width: 64 serves a last axis (D or H) up to 64, and 128 any other.
# "default" serves all other chips. fp32 has an entry of its own on every GPU, since tensor cores do
# not compute it. The tiles are fixed rather than tuned at run time, so that results do not depend
# on timings, and chosen so that no register spills. `python -m bench kernels --tune` measures
# others and prints entries.
TILES = {
    ("default", 64): Tiles(Tile(64, 32, 4, 2), Tile(64, 32, 8, 2), Tile(32, 64, 4, 2)),
    ("default", 128): Tiles(Tile(64, 32, 4, 2), Tile(64, 16, 4, 2), Tile(32, 64, 8, 2)),
    ("fp32", 64): Tiles(Tile(32, 32, 4, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)),
    ("fp32", 128): Tiles(Tile(16, 16, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 4, 1)),
    ((8, 0), 64): Tiles(Tile(128, 32, 4, 3), Tile(128, 32, 8, 2), Tile(32, 128, 8, 2)),
    ((8, 0), 128): Tiles(Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(64, 64, 8, 2)),
    ((9, 0), 64): Tiles(Tile(64, 64, 4, 3, 168), Tile(64, 64, 4, 3, 168), Tile(32, 64, 4, 3)),
    ((9, 0), 128): Tiles(Tile(64, 64, 4, 3), Tile(128, 64, 8, 3), Tile(32, 128, 8, 2)),
}


class Launcher:
    """Launches kernels on the device of their tensors.

    A subclass can do something else instead: only compile them (bench/), or run the compiled code
    without a GPU (ptx/). compiles_on_cpu: True for these, which take a tensor on a CPU as one on a
    GPU. dry: launch nothing. Then tensors need no values (FakeTensorMode).
    """

    current = None  # the launcher in use

    def __init__(self, dry=False, compiles_on_cpu=False):
        self.dry = dry
        self.compiles_on_cpu = compiles_on_cpu or dry

    def capability(self, x):
        """Compute capability, such as (9, 0), of the device of x; None for a CPU."""
        return torch.cuda.get_device_capability(x.device) if x.is_cuda else None

    def tiles(self, x):
        """The tiles for the device, the dtype and the width of x, (T, 3, N, D) or (T, H)."""
        chip = self.capability(x)
        if chip and x.dtype == torch.float32:
            chip = "fp32"
        width = 64 if x.shape[-1] <= 64 else 128
        return TILES.get((chip, width), TILES["default", width])

    def launch(self, kernel, grid, arguments, constants):
        """Runs a kernel on the device of its first argument, which need not be the current one.

        arguments: pointers, strides and sizes, in the order of the kernel's parameters. constants:
        its constexprs by name, num_warps and the like.
        """
        if not self.dry:
            with torch.cuda.device_of(arguments[0]):
                kernel[grid](*arguments, **constants)

    @staticmethod
    @contextlib.contextmanager
    def replaced(other):
        """Within this `with` block, `other` launches every kernel."""
        before = Launcher.current
        Launcher.current = other
        try:
            yield other
        finally:
            Launcher.current = before


Launcher.current = Launcher()


def launch(kernel, grid, arguments, constants):
    """Hands a kernel to the current launcher, unless its first argument is empty."""
    if arguments[0].numel():  # a grid must not be empty
        Launcher.current.launch(kernel, grid, arguments, constants)


def seed_tensor(seed, device):
    """A 0-d int64 tensor on the device, which the kernels read. Filling it does not sync."""
    if isinstance(seed, torch.Tensor):
        return seed.to(device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def dropout_scalars(dropout_p):
    """The last two scalars of most kernels: threshold, and keep_scale = 1 / (1 - p)."""
    return dropout_threshold(dropout_p), 1 / (1 - dropout_p)


# ---- checks of arguments: each raises ValueError -------------------------------------------------

LENGTH_LIMIT = 2**17  # of a sequence: a pair of positions has 16 bits in the counter of its mask
GRID_LIMIT = 65_535  # of the second and the third axis of a CUDA grid: heads and sequences


def describe(tensor):
    """Shape and dtype, for a message."""
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def check_dropout(dropout_p, seed):
    """p in [0, 1), and a seed that fits."""
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if isinstance(seed, torch.Tensor):
        if seed.shape != () or seed.dtype != torch.int64:
            raise ValueError(f"seed must be an int or a 0-d int64 tensor, got {describe(seed)}")
    elif not isinstance(seed, int):
        raise ValueError(f"seed must be an int or a 0-d int64 tensor, got {seed!r}")
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")


def check_device(name, tensor, other_name, other):
    """Both on one device."""
    if tensor.device != other.device:
        devices = f"{other.device}, got {tensor.device}"
        raise ValueError(f"{name} must lie on the device of {other_name}, {devices}")


def check_triton_dtype(name, x):
    """A dtype that the kernels compute in."""
    allowed = [torch.float16, torch.bfloat16, torch.float32]
    if INTERPRETED and not Launcher.current.compiles_on_cpu:
        allowed.remove(torch.bfloat16)  # the interpreter's tl.dot of bf16 gives garbage
    if x.dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must be {names} for the Triton kernels, got {x.dtype}")


def check_attention(qkv, cu_seqlens, max_seqlen):
    """Shapes, dtypes and, on a CPU, the values of cu_seqlens."""
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be (T, 3, N, D) floating point, got {describe(qkv)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be (B+1,) int32, got {describe(cu_seqlens)}")
    check_device("cu_seqlens", cu_seqlens, "qkv", qkv)
    if not isinstance(max_seqlen, int) or not 0 <= max_seqlen <= LENGTH_LIMIT:
        raise ValueError(f"max_seqlen must be an int from 0 to {LENGTH_LIMIT}, got {max_seqlen!r}")
    if lengths_visible(cu_seqlens):
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(qkv) or (lengths < 0).any():
            wanted = f"non-decreasing from 0 to T = {len(qkv)}"
            found = f"{cu_seqlens.tolist()[:8]} ... {int(cu_seqlens[-1])}"
            raise ValueError(f"cu_seqlens must be {wanted}, got {found}")
        if len(lengths) and lengths.max() > max_seqlen:
            longest = int(lengths.max())
            raise ValueError(f"max_seqlen = {max_seqlen} is below the longest sequence, {longest}")


def check_triton_attention(qkv, cu_seqlens, max_seqlen):
    """What the attention kernels need beyond that."""
    check_triton_dtype("qkv", qkv)
    _, _, N, D = qkv.shape
    B = len(cu_seqlens) - 1
    if not 1 <= D <= 128 or qkv.stride(3) != 1:
        found = f"shape {tuple(qkv.shape)} and strides {qkv.stride()}"
        raise ValueError(f"qkv must have 1 <= D <= 128 with stride 1, got {found}")
    if max(B, N) > GRID_LIMIT:
        raise ValueError(
            f"qkv: the Triton kernels take at most {GRID_LIMIT:,} sequences and as many heads, "
            f"got {B:,} sequences and {N:,} heads"
        )
    # Within a sequence, the kernels compute offsets in int32.
    stride_t, stride_3, stride_n, _ = qkv.stride()
    if max(max_seqlen * stride_t, 2 * stride_3, N * stride_n) >= 2**31:
        raise ValueError(
            f"qkv: a sequence of {max_seqlen:,} tokens must span less than 2**31 elements for the "
            f"Triton kernels, got strides {qkv.stride()}"
        )


def check_matrix(x):
    """A matrix of floating-point numbers."""
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be (T, H) floating point, got {describe(x)}")


def check_layer_norm(x, weight, bias, residual):
    """Shapes and devices."""
    check_matrix(x)
    shapes = {"weight": (weight, x.shape[1:]), "bias": (bias, x.shape[1:])}
    if residual is not None:
        shapes["residual"] = (residual, x.shape)
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
        check_device(name, tensor, "x", x)


def check_cross_entropy(logits, labels):
    """Shapes, dtypes and devices."""
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(f"logits must be (M, V) floating point, got {describe(logits)}")
    if labels.shape != logits.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(f"labels must be ({len(logits)},) int64, got {describe(labels)}")
    check_device("labels", labels, "logits", logits)
