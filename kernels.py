"""The operations of the encoder that are worth a kernel of their own.

    attention     O = dropout(softmax(Q K^T / sqrt(D))) V          in each sequence, both directions
    layer_norm    y = LN(dropout(x) + residual),  LN(h) = (h - mean) / sqrt(var + eps) weight + bias
    dropout       y = dropout(x)                                 where no LayerNorm follows
    CrossEntropy  the sum of log(sum e^logits) - logit[label]    over the rows of a large vocabulary

Sequences are packed: the tokens of a micro-batch are laid end to end in one axis of length T, and
`cu_seqlens` (B+1,) int32 says where each sequence starts. No padding token is ever computed.
Letters: B sequences, T tokens, N heads, D head size, L length of a sequence, H = N*D hidden, M rows
of logits, V columns of them.

The first three have a naive twin (`..._reference`) that computes the formula as it is written and
the same dropout mask; the tests hold the kernels to it. On CUDA devices the Triton kernels run;
elsewhere PyTorch does. `STARENCODER_KERNELS=torch|triton` overrides (triton on a CPU is its
interpreter). CrossEntropy is for Triton alone: the model asks `backend`.

**Dropout by counter.** A mask is never stored and never drawn from a global generator. Whether an
element is kept is a pure function of (seed, coordinates of the element), by the counter-based
generator Philox 2x32-7: philox(key, (c0, c1)) mixes a key and a counter, all 32-bit words, into two
random words. The backward pass makes the same bits again from the seed alone, and a run needs no
generator state to resume exactly.

    key, offset = philox(head, (lower, upper word of the seed))        once for each head
    word_0, word_1 = philox(key, (c0, c1 + offset))                    once for every four elements

Two words are four 16-bit halves, the lower half first, numbered 0 to 3, and serve four elements:

    layer_norm, dropout   x[row, column]: head = 0, c0 = row, c1 = column // 4, half column % 4
    attention             P[query, key], positions in the sequence that starts at row `start`:
                          c0 = start, c1 = pair(query) * 2^16 + pair(key),
                          half 2 * (query // 8 % 2) + key // 8 % 2; pair(i) = i // 16 * 8 + i % 8

An element is kept if its half, read as a signed number, is at least p * 2^16 - 2^15, and is then
scaled by 1 / (1 - p).

Why attention groups {q, q + 8} x {k, k + 8}: on a tensor core one thread holds just these four
elements of a tile of scores, and of its transpose, so the mask never travels between threads.

References: Vaswani et al., Attention Is All You Need, 2017, section 3.2; Ba et al., Layer
Normalization, 2016; Milakov and Gimelshein, Online normalizer calculation for softmax, 2018; Dao,
FlashAttention-2, 2023; Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC 2011 (Philox:
7 rounds are the fewest that pass all of TestU01's BigCrush, table 2 there).

Left out: causal masks, cross attention, grouped-query attention, second derivatives, D above 128.
"""

import contextlib
import os
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F

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


def backend(tensor):
    """Which implementation serves `tensor`: "triton" on CUDA devices, "torch" elsewhere.

    `STARENCODER_KERNELS` overrides. Raises ValueError if it asks for what is not available.
    """
    asked = os.environ.get("STARENCODER_KERNELS")
    if not asked:
        return "triton" if tensor.is_cuda and HAS_TRITON else "torch"
    if asked not in ("torch", "triton"):
        raise ValueError(f"STARENCODER_KERNELS={asked}: it must be torch or triton")
    if asked == "triton" and not (HAS_TRITON and (tensor.is_cuda or INTERPRETED)):
        needed = "Triton, and a CUDA device or, set from the start, TRITON_INTERPRET=1"
        raise ValueError(f"STARENCODER_KERNELS=triton: needs {needed}")
    return asked


def lengths_visible(cu_seqlens):
    """True if cu_seqlens can be read without a GPU sync or a graph break."""
    return cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()


# ---- checks of arguments: each raises ValueError -------------------------------------------------

LENGTH_LIMIT = 2**17  # of a sequence: a pair of positions has 16 bits in the counter of its mask
GRID_LIMIT = 65535  # CUDA's, in the second and third dimension of a grid
WIDTH_LIMIT = 65536  # of a row: LayerNorm's kernels hold it in registers, in four chunks


def shown(tensor):
    """Shape and dtype, for a message."""
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def check_dropout(dropout_p, seed):
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if isinstance(seed, torch.Tensor):
        if seed.shape != () or seed.dtype != torch.int64:
            raise ValueError(f"seed must be an int or a 0-d int64 tensor, got {shown(seed)}")
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")


def check_device(name, tensor, other_name, other):
    if tensor.device != other.device:
        devices = f"{other.device}, got {tensor.device}"
        raise ValueError(f"{name} must lie on the device of {other_name}, {devices}")


def check_triton_dtype(name, x):
    allowed = [torch.float16, torch.bfloat16, torch.float32]
    if INTERPRETED:
        allowed.remove(torch.bfloat16)  # the interpreter's tl.dot of bf16 gives garbage
    if x.dtype not in allowed:
        names = " or ".join(map(str, allowed))
        raise ValueError(f"{name} must be {names} for the Triton kernels, got {x.dtype}")


def check_attention(qkv, cu_seqlens, max_seqlen):
    if qkv.dim() != 4 or qkv.shape[1] != 3 or not qkv.is_floating_point():
        raise ValueError(f"qkv must be (T, 3, N, D) floating point, got {shown(qkv)}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be (B+1,) int32, got {shown(cu_seqlens)}")
    check_device("cu_seqlens", cu_seqlens, "qkv", qkv)
    if isinstance(max_seqlen, torch.Tensor) or not 0 <= max_seqlen <= LENGTH_LIMIT:
        raise ValueError(f"max_seqlen must be an int from 0 to {LENGTH_LIMIT}, got {max_seqlen!r}")
    if lengths_visible(cu_seqlens):
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(qkv) or (lengths < 0).any():
            found = f"{cu_seqlens.tolist()[:8]} ... {int(cu_seqlens[-1])}"
            raise ValueError(f"cu_seqlens must rise from 0 to T = {len(qkv)}, got {found}")
        if len(lengths) and lengths.max() > max_seqlen:
            longest = int(lengths.max())
            raise ValueError(f"max_seqlen = {max_seqlen} is below the longest sequence, {longest}")


def check_triton_attention(qkv, cu_seqlens, max_seqlen):
    check_triton_dtype("qkv", qkv)
    if not 1 <= qkv.shape[3] <= 128 or qkv.stride(3) != 1:
        found = f"shape {tuple(qkv.shape)} and strides {qkv.stride()}"
        raise ValueError(f"qkv must have 1 <= D <= 128 with stride 1, got {found}")
    if (
        max(max_seqlen * qkv.stride(0), 2 * qkv.stride(1)) >= 2**31
    ):  # places in a sequence are int32
        raise ValueError(
            f"qkv: a sequence of {max_seqlen:,} tokens must span less than 2**31 elements for the "
            f"Triton kernels, got strides {qkv.stride()}"
        )
    sequences = len(cu_seqlens) - 1
    heads = qkv.shape[2]
    if max(sequences, heads) > GRID_LIMIT:
        found = f"{sequences:,} and {heads:,}"
        raise ValueError(f"there may be {GRID_LIMIT:,} sequences and heads at most, got {found}")


def check_matrix(x):
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be (T, H) floating point, got {shown(x)}")


def check_layer_norm(x, weight, bias, residual):
    check_matrix(x)
    shapes = {"weight": (weight, x.shape[1:]), "bias": (bias, x.shape[1:])}
    if residual is not None:
        shapes["residual"] = (residual, x.shape)
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {tuple(shape)}, got {tuple(tensor.shape)}")
        check_device(name, tensor, "x", x)


def check_triton_rows(x):
    check_triton_dtype("x", x)
    if x.shape[1] > WIDTH_LIMIT:
        raise ValueError(f"x must be at most {WIDTH_LIMIT:,} wide, got {x.shape[1]:,}")


# ---- dropout by counter --------------------------------------------------------------------------

PHILOX_MULTIPLIER = 0xD256D193
PHILOX_KEY_STEP = 0x9E3779B9
PHILOX_ROUNDS = 7
LOW = 0xFFFFFFFF


def philox(key, c0, c1, rounds=PHILOX_ROUNDS):
    """Philox 2x32 (Salmon et al., section 3.3): two random 32-bit words for the counter (c0, c1).

    key, c0, c1: ints or int64 tensors that broadcast, with values below 2**32. Returns two of the
    same kind. PyTorch has no uint32 arithmetic, so words live in int64, where a product wraps
    modulo 2**64 just as the hardware's does, and `& LOW` keeps 32 bits.

    >>> [hex(word) for word in philox(0, 0, 0)]  # the known answer of Random123
    ['0x257a3673', '0xcd26be2a']
    """
    for _ in range(rounds):
        product = c0 * PHILOX_MULTIPLIER
        c0 = ((product >> 32) ^ key ^ c1) & LOW
        c1 = product & LOW
        key = (key + PHILOX_KEY_STEP) & LOW
    return c0, c1


def dropout_threshold(dropout_p):
    """The least half that is kept; at most the largest that there is, 2^15 - 1."""
    return min(round(dropout_p * 2**16), 2**16 - 1) - 2**15


def dropout_halves(seed, head, c0, c1, threshold):
    """Which of the four elements of each counter (c0, c1) are kept: bool (..., 4)."""
    key, offset = philox(head, seed & LOW, (seed >> 32) & LOW)
    words = philox(key, c0, (c1 + offset) & LOW)
    words = torch.stack([word.to(torch.int32) for word in words], dim=-1)  # (..., 2)
    return words.view(torch.int16) >= threshold  # little-endian: the lower half comes first


@torch.compiler.disable  # its loop depends on the number of rows
def dropout_keep(seed, dropout_p, rows, columns, device=None, dtype=torch.bool):
    """Which elements of a (rows, columns) matrix dropout keeps: 1 or 0 of `dtype`."""
    groups = (columns + 3) // 4  # one counter serves four neighbouring columns
    keep = torch.empty(rows, columns, dtype=dtype, device=device)
    group = torch.arange(groups, device=device)[None, :]
    at_once = max(1, 2**16 // max(1, groups))  # rows whose words stay in a CPU's cache
    for first in range(0, rows, at_once):
        row = torch.arange(first, min(first + at_once, rows), device=device)[:, None]
        halves = dropout_halves(seed, 0, row, group, dropout_threshold(dropout_p))
        keep[first : first + at_once] = halves.flatten(1)[:, :columns]
    return keep


@torch.compiler.disable
def attention_keep(seed, dropout_p, head, start, length, dtype=torch.bool):
    """Which attention weights dropout keeps: (..., length, length), queries by keys.

    head, start: int64 tensors that broadcast to (...): the head, and the row of the packed batch at
    which the sequence starts.
    """
    blocks = (length + 15) // 16
    pair = torch.arange(8 * blocks, device=start.device)
    c1 = (pair[:, None] << 16) | pair[None, :]  # (8 blocks, 8 blocks)
    shape = torch.broadcast_shapes(head.shape, start.shape)
    head = head.expand(shape).reshape(-1, 1, 1)
    start = start.expand(shape).reshape(-1, 1, 1)
    keep = torch.empty(len(head), length, length, dtype=dtype, device=start.device)
    at_once = max(1, 2**16 // max(1, c1.numel()))  # matrices whose words stay in a CPU's cache
    for first in range(0, len(head), at_once):
        part = slice(first, first + at_once)
        halves = dropout_halves(seed, head[part], start[part], c1, dropout_threshold(dropout_p))
        # From (query block, query % 8, key block, key % 8, query // 8 % 2, key // 8 % 2).
        n = len(halves)
        halves = halves.view(n, blocks, 8, blocks, 8, 2, 2).permute(0, 1, 5, 2, 3, 6, 4)
        halves = halves.reshape(n, 16 * blocks, 16 * blocks)
        keep[part] = halves[:, :length, :length]
    return keep.view(*shape, length, length)


if HAS_TRITON:
    MULTIPLIER = tl.constexpr(PHILOX_MULTIPLIER)
    KEY_STEP = tl.constexpr(PHILOX_KEY_STEP)
    ROUNDS = tl.constexpr(PHILOX_ROUNDS)

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
    def _dropout_stream(seed_ptr, head):
        """The key and the offset of a head."""
        seed = tl.load(seed_ptr).to(tl.uint64, bitcast=True)
        return _philox(head.to(tl.uint32), seed.to(tl.uint32), (seed >> 32).to(tl.uint32))

    @triton.jit
    def _halves(key, c0, c1, threshold):
        """`dropout_halves`: four bool tensors, in the order of the halves."""
        word_0, word_1 = _philox(key, c0, c1)
        word_0 = word_0.to(tl.int32, bitcast=True)
        word_1 = word_1.to(tl.int32, bitcast=True)
        # A half in the upper 16 bits of a word compares as the half itself, whatever stands below.
        least = threshold << 16
        return word_0 << 16 >= least, word_0 >= least, word_1 << 16 >= least, word_1 >= least

    @triton.jit
    def _attention_keep(
        key, offset, start, threshold, query, key_position,
        QUERIES: tl.constexpr, KEYS: tl.constexpr, TRANSPOSED: tl.constexpr,
    ):  # fmt: skip
        """`attention_keep` for a tile whose first query and key, multiples of 16, are given.

        Returns bool (QUERIES, KEYS), or (KEYS, QUERIES) if TRANSPOSED.
        """
        query_pair = query // 2 + tl.arange(0, QUERIES // 2)  # pair(i) = i // 2 at multiples of 16
        key_pair = key_position // 2 + tl.arange(0, KEYS // 2)
        if TRANSPOSED:
            c1 = (query_pair << 16)[None, :] | key_pair[:, None]
        else:
            c1 = (query_pair << 16)[:, None] | key_pair[None, :]
        near, key_8, query_8, both_8 = _halves(
            key, start.to(tl.uint32), c1.to(tl.uint32) + offset, threshold
        )
        # The two axes of c1, then key // 8 % 2, then query // 8 % 2: each of the last two goes
        # between the block of 16 and the position within 8 of its own.
        halves = tl.join(tl.join(near, key_8), tl.join(query_8, both_8))
        if TRANSPOSED:
            halves = tl.reshape(halves, [KEYS // 16, 8, QUERIES // 16, 8, 2, 2])
            return tl.reshape(tl.permute(halves, (0, 4, 1, 2, 5, 3)), [KEYS, QUERIES])
        else:
            halves = tl.reshape(halves, [QUERIES // 16, 8, KEYS // 16, 8, 2, 2])
            return tl.reshape(tl.permute(halves, (0, 5, 1, 2, 4, 3)), [QUERIES, KEYS])


# ---- launch settings -----------------------------------------------------------------------------


class AttentionTile(NamedTuple):
    """How an attention kernel is launched."""

    queries: int  # BLOCK_M
    keys: int  # BLOCK_N
    warps: int
    stages: int  # blocks in flight from device memory
    registers: int = 0  # of a thread, at most, with dropout; 0: as many as the compiler likes


class NormTile(NamedTuple):
    """How a LayerNorm kernel is launched."""

    rows: int  # BLOCK_R
    warps: int
    programs: int = 0  # at most, each with partial sums of its own; 0: one for every block of rows


# By compute capability, and where there is no entry "default"; fp32 inputs have one on every GPU,
# since no tensor core computes them. Fixed, so that results do not depend on what a tuner saw, and
# such that nothing spills. `bench.py kernels --tune` measures others and prints an entry, which
# then has its own "norm" and "norm_backward".
NORM = {"norm": NormTile(4, 4), "norm_backward": NormTile(4, 4, 528)}
TILES = {
    "default": {
        "forward": AttentionTile(64, 32, 4, 2),
        "dq": AttentionTile(64, 32, 8, 2),
        "dk_dv": AttentionTile(32, 64, 4, 2),
        "dk_dv, D > 64": AttentionTile(32, 64, 8, 2),
    },
    "fp32": {
        "forward": AttentionTile(32, 32, 4, 1),
        "forward, D > 64": AttentionTile(16, 16, 4, 1),
        "dq": AttentionTile(32, 32, 8, 1),
        "dq, D > 64": AttentionTile(16, 16, 8, 1),
        "dk_dv": AttentionTile(32, 32, 8, 1),
        "dk_dv, D > 64": AttentionTile(16, 16, 4, 1),
    },
    (8, 0): {
        "forward": AttentionTile(128, 32, 4, 3),
        "forward, D > 64": AttentionTile(128, 32, 8, 3),
        "dq": AttentionTile(128, 32, 8, 2),
        "dk_dv": AttentionTile(32, 128, 8, 2),
        "dk_dv, D > 64": AttentionTile(64, 64, 8, 2),
    },
    (9, 0): {
        "forward": AttentionTile(64, 64, 4, 3, 168),
        "forward, D > 64": AttentionTile(64, 64, 4, 3),
        "dq": AttentionTile(64, 64, 4, 3, 168),
        "dq, D > 64": AttentionTile(128, 64, 8, 3),
        "dk_dv": AttentionTile(32, 64, 4, 3),
        "dk_dv, D > 64": AttentionTile(32, 128, 8, 2),
    },
}


class Launcher:
    """Launches kernels on the device of their tensors. `replaced` puts another in its place."""

    current = None

    def capability(self, x):
        """Compute capability, such as (9, 0), of the device of x; None for a CPU."""
        return torch.cuda.get_device_capability(x.device) if x.is_cuda else None

    def launch(self, kernel, grid, arguments, constants):
        """Runs a kernel. Triton takes the current device, which need not be that of the tensors."""
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **constants)

    @classmethod
    @contextlib.contextmanager
    def replaced(cls, other):
        """Meanwhile every kernel is launched by `other`, such as one that only compiles."""
        before, cls.current = cls.current, other
        try:
            yield other
        finally:
            cls.current = before


Launcher.current = Launcher()


def launch(kernel, grid, arguments, constants):
    """Hands a kernel to the current launcher, unless its first argument has no element."""
    if arguments[0].numel():
        Launcher.current.launch(kernel, grid, arguments, constants)


def tile_of(kernel, x, D=0):
    """The entry of TILES for a kernel on the device of x, with head size D."""
    capability = Launcher.current.capability(x)
    chip = "fp32" if capability and x.dtype == torch.float32 else capability
    table = NORM | TILES.get(chip, TILES["default"])
    wide = f"{kernel}, D > 64"
    return table[wide] if D > 64 and wide in table else table[kernel]


def seed_tensor(seed, device):
    """A 0-d int64 tensor on the device, which the kernels read. Filling it does not sync."""
    if isinstance(seed, torch.Tensor):
        return seed.to(device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def dropout_scalars(dropout_p):
    """The last two scalars of most kernels: threshold, and keep_scale = 1 / (1 - p)."""
    return dropout_threshold(dropout_p), 1 / (1 - dropout_p)


# ---- attention -----------------------------------------------------------------------------------


def attention(qkv, cu_seqlens, max_seqlen, *, dropout_p=0.0, seed=0):
    """Bidirectional multi-head attention of each sequence to itself (Vaswani et al., section 3.2).

    qkv: (T, 3, N, D), queries, keys and values. cu_seqlens: (B+1,) int32, from 0 to T, not
    decreasing. max_seqlen: int, no sequence is longer. dropout_p: probability that an attention
    weight is dropped. seed: int or 0-d int64 tensor. Returns (T, N, D) in the dtype of qkv.
    Raises ValueError for arguments that do not fit together.
    """
    check_attention(qkv, cu_seqlens, max_seqlen)
    check_dropout(dropout_p, seed)
    if backend(qkv) == "torch":
        return attention_torch(qkv, cu_seqlens, dropout_p, seed)
    check_triton_attention(qkv, cu_seqlens, max_seqlen)
    seed = seed_tensor(seed, qkv.device)
    return attention_op(qkv, cu_seqlens, max_seqlen, dropout_p, seed)[0]


def attention_reference(qkv, cu_seqlens, max_seqlen, *, dropout_p=0.0, seed=0):
    """The naive twin of `attention`: one sequence and one head after the other, any float dtype."""
    T, _, N, D = qkv.shape
    outputs = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        heads = []
        for n in range(N):
            q, k, v = qkv[start:end, :, n].unbind(1)  # each (L, D)
            weights = ((q * D**-0.5) @ k.T).softmax(-1)  # (L, L)
            if dropout_p > 0.0:
                at = torch.tensor([n, start], device=qkv.device)
                keep = attention_keep(seed, dropout_p, at[0], at[1], end - start, qkv.dtype)
                weights = weights * keep / (1 - dropout_p)
            heads.append(weights @ v)  # (L, D)
        outputs.append(torch.stack(heads, dim=1))  # (L, N, D)
    return torch.cat([qkv[:0, 0], *outputs])


def attention_torch(qkv, cu_seqlens, dropout_p, seed):
    """`attention` in PyTorch: neighbouring sequences of equal length L make one batch."""
    T, _, N, D = qkv.shape
    outputs = [qkv[:0, 0]]
    start = 0
    for L, run in groupby(cu_seqlens.diff().tolist()):
        sequences = len(list(run))
        at_once = max(1, 2**23 // max(1, N * L * L))  # more would not stay in a CPU's cache
        for first in range(0, sequences, at_once):
            B = min(at_once, sequences - first)
            rows = qkv[start : start + B * L].reshape(B, L, 3, N, D)
            q, k, v = rows.permute(2, 0, 3, 1, 4)  # each (B, N, L, D)
            weights = ((q * D**-0.5) @ k.transpose(-1, -2)).softmax(-1)  # (B, N, L, L)
            if dropout_p > 0.0:
                starts = start + L * torch.arange(B, device=qkv.device)[:, None]
                head = torch.arange(N, device=qkv.device)[None, :]
                weights = weights * attention_keep(seed, dropout_p, head, starts, L, qkv.dtype)
                v = v * (1 / (1 - dropout_p))  # of v, since it is smaller than weights
            outputs.append((weights @ v).transpose(1, 2).reshape(B * L, N, D))
            start += B * L
    return torch.cat(outputs)


if HAS_TRITON:
    LOG2_E = tl.constexpr(1.4426950408889634)
    # Triton compiles a variant of a kernel for arguments that are 1 or divisible by 16, but these
    # change from batch to batch and must not compile anew.
    generic = dict(
        do_not_specialize=["T", "threshold"], do_not_specialize_on_alignment=["seed_ptr"]
    )

    @triton.jit
    def _bounds(cu_seqlens_ptr, sequence):
        """Where a sequence starts in the packed batch, and its length."""
        start = tl.load(cu_seqlens_ptr + sequence)
        return start, tl.load(cu_seqlens_ptr + sequence + 1) - start

    @triton.jit
    def _load_rows(
        base_ptr, stride, first, length,
        ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr,
    ):  # fmt: skip
        """Rows first .. first + ROWS of a (length, D) matrix, zeros outside: (ROWS, BLOCK_D).

        WHOLE: all of the rows are inside, so nothing is compared.
        """
        row = first + tl.arange(0, ROWS)
        d = tl.arange(0, BLOCK_D)
        place = row[:, None] * stride + d[None, :]
        if not WHOLE:
            inside = (row < length)[:, None] & (d < D)[None, :]
            return tl.load(base_ptr + place, mask=inside, other=0.0)
        if D < BLOCK_D:
            return tl.load(base_ptr + place, mask=(d < D)[None, :], other=0.0)
        return tl.load(base_ptr + place)

    # The loops of the three kernels. Each goes through all whole blocks without a comparison, and
    # then through the block that is left, if there is one, with masks. What does not change from
    # block to block goes as `*rest`; `stream` is what `_attention_keep` takes first.

    @triton.jit
    def _forward_block(
        q, m, l, o, first_key, first, base_ptr, stride_t, stride_3, length, scale, stream,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
    ):  # fmt: skip
        """One block of keys: m, l and o brought up to date (online softmax)."""
        k_ptr = base_ptr + stride_3
        k = _load_rows(k_ptr, stride_t, first_key, length, BLOCK_N, D, BLOCK_D, WHOLE)
        v_ptr = base_ptr + 2 * stride_3
        v = _load_rows(v_ptr, stride_t, first_key, length, BLOCK_N, D, BLOCK_D, WHOLE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        if not WHOLE:  # keys outside: weight 2^-inf = 0
            s = tl.where((first_key + tl.arange(0, BLOCK_N) < length)[None, :], s, float("-inf"))

        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.exp2(s * scale - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        l = l * shrink + tl.sum(p, 1)  # before dropout: the softmax is normalized, then dropped
        if DROPOUT:
            keep = _attention_keep(*stream, first, first_key, BLOCK_M, BLOCK_N, False)
            # scale * 0.0 and not 0.0: with a constant the compiler would select after the rounding
            # to bf16, at thrice the cost.
            p = tl.where(keep, p, scale * 0.0)
        o = o * shrink[:, None]
        o = tl.dot(p.to(v.dtype), v, o, input_precision="ieee")
        return m_new, l, o

    @triton.jit(**generic)
    def _attention_forward(
        qkv_ptr,  # (T, 3, N, D)
        out_ptr,  # (T, N, D), contiguous
        shift_ptr,  # (N, T) fp32
        norm_ptr,  # (N, T) fp32, of fp32 inputs only
        cu_seqlens_ptr,  # (B+1,) int32
        seed_ptr,  # () int64
        stride_t, stride_3, stride_n,  # of qkv, in elements; its last axis is contiguous
        T, N, scale, threshold, keep_scale,
        D: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_M queries of one head of one sequence, all keys in blocks of BLOCK_N.

            S = scale Q K^T;  m = max S;  P = 2^(S - m);  l = sum P;  O = keep P V / (l (1 - p))
            scale = log2(e) / sqrt(D), since the hardware has 2^x and not e^x

        grid = (ceil(max_seqlen / BLOCK_M), N, B). With each block of keys m and l are brought up to
        date, and what was summed before shrinks by 2^(m_old - m_new).

        Kept for the backward pass, so that P / l = norm 2^(S - shift): shift = m + log2(l) and
        norm = 1, which is not stored. Beside a large m, log2(l) would be rounded away, and with
        fp32 inputs that shows: for these, shift = m and norm = 1 / l.
        """
        head = tl.program_id(1)
        start, length = _bounds(cu_seqlens_ptr, tl.program_id(2))
        first = tl.program_id(0) * BLOCK_M
        if first >= length:  # the grid is made for the longest sequence
            return
        key, offset = _dropout_stream(seed_ptr, head)

        # Queries outside: zeros, whose softmax is uniform and finite; they are not stored.
        base_ptr = qkv_ptr + start.to(tl.int64) * stride_t + head * stride_n
        q = _load_rows(base_ptr, stride_t, first, length, BLOCK_M, D, BLOCK_D, False)
        stream = (key, offset, start, threshold)
        rest = (first, base_ptr, stride_t, stride_3, length, scale, stream)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

        whole = length // BLOCK_N * BLOCK_N
        for first_key in range(0, whole, BLOCK_N):
            m, l, o = _forward_block(
                q, m, l, o, first_key, *rest, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, True
            )
        for first_key in tl.range(whole, length, BLOCK_N, num_stages=1):  # once, or not at all
            m, l, o = _forward_block(
                q, m, l, o, first_key, *rest, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, False
            )

        query = first + tl.arange(0, BLOCK_M)
        d = tl.arange(0, BLOCK_D)
        row = (start + query).to(tl.int64)
        o = o * (keep_scale / l)[:, None]
        inside = (query < length)[:, None] & (d < D)[None, :]
        tl.store(out_ptr + (row[:, None] * N + head) * D + d[None, :], o, mask=inside)
        place = head.to(tl.int64) * T + row
        if q.dtype == tl.float32:
            tl.store(shift_ptr + place, m, mask=query < length)
            tl.store(norm_ptr + place, 1 / l, mask=query < length)
        else:
            tl.store(shift_ptr + place, m + tl.log2(l), mask=query < length)

    @triton.jit
    def _weights_block(
        first_key, first, base_ptr, stride_t, stride_3, length, scale, stream, queries,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
    ):  # fmt: skip
        """A block of keys, and P and dP (BLOCK_M, BLOCK_N) of it, without their factors."""
        q, do, shift = queries
        k_ptr = base_ptr + stride_3
        k = _load_rows(k_ptr, stride_t, first_key, length, BLOCK_N, D, BLOCK_D, WHOLE)
        v_ptr = base_ptr + 2 * stride_3
        v = _load_rows(v_ptr, stride_t, first_key, length, BLOCK_N, D, BLOCK_D, WHOLE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")  # (BLOCK_M, BLOCK_N)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        p = tl.exp2(s * scale - shift[:, None])
        if not WHOLE:  # of a key outside, 2^(0 - shift) may be inf, and inf * 0 would be NaN
            p = tl.where((first_key + tl.arange(0, BLOCK_N) < length)[None, :], p, 0.0)
        if DROPOUT:
            keep = _attention_keep(*stream, first, first_key, BLOCK_M, BLOCK_N, False)
            dp = tl.where(keep, dp, 0.0)
        return k, p, dp

    @triton.jit
    def _dq_block(
        dq, delta, first_key, rest,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
    ):  # fmt: skip
        """What one block of keys adds to dQ, without its factors."""
        k, p, dp = _weights_block(first_key, *rest, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, WHOLE)
        ds = p * (dp - delta[:, None])
        return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")

    @triton.jit(**generic)
    def _attention_backward_dq(
        qkv_ptr,  # (T, 3, N, D)
        out_ptr, dout_ptr,  # (T, N, D), contiguous
        shift_ptr, norm_ptr, delta_ptr,  # (N, T) fp32
        dqkv_ptr,  # (T, 3, N, D), contiguous
        cu_seqlens_ptr, seed_ptr,
        stride_t, stride_3, stride_n,  # of qkv
        T, N, scale, threshold, keep_scale,
        D: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_M queries of one head of one sequence, all keys in blocks of BLOCK_N.

            dP = keep (dO V^T) / (1 - p);  dS = P (dP - rowsum(O dO));  dQ = dS K / sqrt(D)

        Here P is the normalized softmax. rowsum(O dO) = rowsum(P dP) is what softmax subtracts.
        The loop leaves the factors norm and 1 / (1 - p) to the end, and so subtracts
        delta = rowsum(O dO) (1 - p), which is kept for `_attention_backward_dk_dv`.
        """
        head = tl.program_id(1)
        start, length = _bounds(cu_seqlens_ptr, tl.program_id(2))
        first = tl.program_id(0) * BLOCK_M
        if first >= length:
            return
        key, offset = _dropout_stream(seed_ptr, head)

        # Queries outside are zeros, and not stored.
        query = first + tl.arange(0, BLOCK_M)
        row = (start + query).to(tl.int64)
        base_ptr = qkv_ptr + start.to(tl.int64) * stride_t + head * stride_n
        rows_before = (start.to(tl.int64) * N + head) * D
        q = _load_rows(base_ptr, stride_t, first, length, BLOCK_M, D, BLOCK_D, False)
        do = _load_rows(dout_ptr + rows_before, N * D, first, length, BLOCK_M, D, BLOCK_D, False)
        out = _load_rows(out_ptr + rows_before, N * D, first, length, BLOCK_M, D, BLOCK_D, False)
        place = head.to(tl.int64) * T + row
        shift = tl.load(shift_ptr + place, mask=query < length, other=0.0)
        delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), 1) / keep_scale

        stream = (key, offset, start, threshold)
        queries = (q, do, shift)
        rest = (first, base_ptr, stride_t, stride_3, length, scale, stream, queries)
        if q.dtype == tl.float32:
            # Of a saturated row, dP - delta is 0 but for rounding, which in fp32 is seen: delta is
            # summed up from the very numbers that it is subtracted from, as PyTorch does.
            norm = tl.load(norm_ptr + place, mask=query < length, other=0.0)
            delta = tl.zeros([BLOCK_M], tl.float32)
            for first_key in range(0, length, BLOCK_N):
                _, p, dp = _weights_block(
                    first_key, *rest, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, False
                )  # fmt: skip
                delta += tl.sum(p * norm[:, None] * dp, 1)
        tl.store(delta_ptr + place, delta, mask=query < length)

        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        whole = length // BLOCK_N * BLOCK_N
        for first_key in range(0, whole, BLOCK_N):
            dq = _dq_block(dq, delta, first_key, rest, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, True)
        for first_key in tl.range(whole, length, BLOCK_N, num_stages=1):
            dq = _dq_block(dq, delta, first_key, rest, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, False)

        dq *= scale / LOG2_E * keep_scale  # scale / LOG2_E = 1 / sqrt(D)
        if q.dtype == tl.float32:
            dq *= norm[:, None]
        d = tl.arange(0, BLOCK_D)
        inside = (query < length)[:, None] & (d < D)[None, :]
        tl.store(dqkv_ptr + (row[:, None] * 3 * N + head) * D + d[None, :], dq, mask=inside)

    @triton.jit
    def _dk_dv_block(
        k, v, dk, dv, first, first_key, base_ptr, stride_t, dout_ptr, statistics, length, scale,
        stream, stride_do,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
        DROPOUT: tl.constexpr, WHOLE: tl.constexpr,
    ):  # fmt: skip
        """What one block of queries adds to dK and dV, without their factors.

        Tiles are transposed, keys by queries, so that P^T and dS^T go into the next product as
        they are.
        """
        q = _load_rows(base_ptr, stride_t, first, length, BLOCK_M, D, BLOCK_D, WHOLE)
        do = _load_rows(dout_ptr, stride_do, first, length, BLOCK_M, D, BLOCK_D, WHOLE)
        # Queries outside: q = dO = delta = shift = 0, so P is 1, finite, and adds nothing.
        query = first + tl.arange(0, BLOCK_M)
        shift_ptr, norm_ptr, delta_ptr = statistics
        if WHOLE:
            shift = tl.load(shift_ptr + query)
            delta = tl.load(delta_ptr + query)
        else:
            shift = tl.load(shift_ptr + query, mask=query < length, other=0.0)
            delta = tl.load(delta_ptr + query, mask=query < length, other=0.0)

        s = tl.dot(k, tl.trans(q), input_precision="ieee")  # (BLOCK_N, BLOCK_M)
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        p = tl.exp2(s * scale - shift[None, :])
        if q.dtype == tl.float32:
            p *= tl.load(norm_ptr + query, mask=query < length, other=0.0)[None, :]
        dropped = p
        if DROPOUT:
            keep = _attention_keep(*stream, first, first_key, BLOCK_M, BLOCK_N, True)
            dropped = tl.where(keep, p, scale * 0.0)  # as in the forward pass
            dp = tl.where(keep, dp, 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
        return dk, dv

    @triton.jit(**generic)
    def _attention_backward_dk_dv(
        qkv_ptr, dout_ptr, shift_ptr, norm_ptr, delta_ptr, dqkv_ptr, cu_seqlens_ptr, seed_ptr,
        stride_t, stride_3, stride_n,
        T, N, scale, threshold, keep_scale,
        D: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_N keys of one head of one sequence, all queries in blocks of BLOCK_M.

            dV = (keep P / (1 - p))^T dO;  dK = dS^T Q / sqrt(D)          P, dS, arguments: as above

        Launched after `_attention_backward_dq`, which writes delta. No two programs write to one
        place: no atomics, and the same bits in every run.
        """
        head = tl.program_id(1)
        start, length = _bounds(cu_seqlens_ptr, tl.program_id(2))
        first_key = tl.program_id(0) * BLOCK_N
        if first_key >= length:
            return
        key, offset = _dropout_stream(seed_ptr, head)

        base_ptr = qkv_ptr + start.to(tl.int64) * stride_t + head * stride_n
        # Keys outside: zeros; their rows of dK and dV are not stored.
        k_ptr = base_ptr + stride_3
        k = _load_rows(k_ptr, stride_t, first_key, length, BLOCK_N, D, BLOCK_D, False)
        v_ptr = base_ptr + 2 * stride_3
        v = _load_rows(v_ptr, stride_t, first_key, length, BLOCK_N, D, BLOCK_D, False)
        dout_ptr += (start.to(tl.int64) * N + head) * D
        before = head.to(tl.int64) * T + start
        statistics = (shift_ptr + before, norm_ptr + before, delta_ptr + before)
        stream = (key, offset, start, threshold)
        rest = (first_key, base_ptr, stride_t, dout_ptr, statistics, length, scale, stream)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

        whole = length // BLOCK_M * BLOCK_M
        for first in range(0, whole, BLOCK_M):
            dk, dv = _dk_dv_block(
                k, v, dk, dv, first, *rest, N * D, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, True
            )
        for first in tl.range(whole, length, BLOCK_M, num_stages=1):
            dk, dv = _dk_dv_block(
                k, v, dk, dv, first, *rest, N * D, D, BLOCK_D, BLOCK_M, BLOCK_N, DROPOUT, False
            )

        dk *= scale / LOG2_E * keep_scale
        dv *= keep_scale
        key_position = first_key + tl.arange(0, BLOCK_N)
        d = tl.arange(0, BLOCK_D)
        inside = (key_position < length)[:, None] & (d < D)[None, :]
        row = (start + key_position).to(tl.int64)
        place = (row[:, None] * 3 * N + head) * D + d[None, :]
        tl.store(dqkv_ptr + place + N * D, dk, mask=inside)
        tl.store(dqkv_ptr + place + 2 * N * D, dv, mask=inside)


def attention_launch(name, kernel, pointers, qkv, cu_seqlens, max_seqlen, dropout_p, seed):
    """Launches an attention kernel with its tile: `pointers`, then what all of them take."""
    T, _, N, D = qkv.shape
    tile = tile_of(name, qkv, D)
    rows = tile.keys if name == "dk_dv" else tile.queries
    grid = (-(-max_seqlen // rows), N, len(cu_seqlens) - 1)
    scale = D**-0.5 * 1.4426950408889634
    scalars = (T, N, scale, *dropout_scalars(dropout_p))
    constants = dict(
        D=D,
        BLOCK_D=max(16, 1 << (D - 1).bit_length()),  # tl.dot wants 16 columns, tiles powers of two
        BLOCK_M=tile.queries,
        BLOCK_N=tile.keys,
        DROPOUT=dropout_p > 0,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    if tile.registers and dropout_p > 0:
        constants["maxnreg"] = tile.registers
    arguments = (*pointers, cu_seqlens.contiguous(), seed, *qkv.stride()[:3], *scalars)
    launch(kernel, grid, arguments, constants)


# torch.library makes a launch an operator that autograd and torch.compile know: a function, empty
# tensors of the shapes that it returns (`register_fake`), and its backward pass, an operator too.


def attention_outputs(qkv):
    """Empty tensors for what the forward kernel writes: out, shift and norm."""
    T, _, N, D = qkv.shape
    out = qkv.new_empty(T, N, D)
    shift = qkv.new_empty(N, T, dtype=torch.float32)
    norm = torch.empty_like(shift if qkv.dtype == torch.float32 else shift[:0, :0])
    return out, shift, norm


@torch.library.custom_op("starencoder::attention", mutates_args=())
def attention_op(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int,
    dropout_p: float, seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The forward kernel: out (T, N, D), and shift and norm (N, T) for the backward pass."""
    outputs = attention_outputs(qkv)
    rest = (qkv, cu_seqlens, max_seqlen, dropout_p, seed)
    attention_launch("forward", _attention_forward, (qkv, *outputs), *rest)
    return outputs


attention_op.register_fake(lambda qkv, *rest: attention_outputs(qkv))


@torch.library.custom_op("starencoder::attention_backward", mutates_args=())
def attention_backward_op(
    dout: torch.Tensor, qkv: torch.Tensor,
    out: torch.Tensor, shift: torch.Tensor, norm: torch.Tensor,
    cu_seqlens: torch.Tensor, max_seqlen: int, dropout_p: float, seed: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The two backward kernels: dqkv (T, 3, N, D)."""
    dout = dout.contiguous()
    dqkv = qkv.new_empty(qkv.shape)
    delta = torch.empty_like(shift)
    rest = (qkv, cu_seqlens, max_seqlen, dropout_p, seed)
    pointers = (qkv, out, dout, shift, norm, delta, dqkv)
    attention_launch("dq", _attention_backward_dq, pointers, *rest)  # first, as it writes delta
    pointers = (qkv, dout, shift, norm, delta, dqkv)
    attention_launch("dk_dv", _attention_backward_dk_dv, pointers, *rest)
    return dqkv


attention_backward_op.register_fake(lambda dout, qkv, *rest: qkv.new_empty(qkv.shape))


def _attention_context(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens, seed)


def _attention_gradient(ctx, dout, dshift, dnorm):
    *tensors, seed = ctx.saved_tensors
    dqkv = attention_backward_op(dout, *tensors, ctx.max_seqlen, ctx.dropout_p, seed)
    return dqkv, None, None, None, None


attention_op.register_autograd(_attention_gradient, setup_context=_attention_context)


# ---- dropout + residual + LayerNorm --------------------------------------------------------------


def layer_norm(x, weight, bias, eps, *, residual=None, dropout_p=0.0, seed=0):
    """LN(dropout(x) + residual), between two blocks of a post-LayerNorm transformer (Ba et al.).

    x: (T, H). weight, bias: (H,), of any float dtype. eps: float, added to the variance. residual:
    like x, or None. dropout_p, seed: as in `attention`. Returns (T, H) in the dtype of x; the
    statistics are fp32 at least. Raises ValueError for shapes that do not fit together.
    """
    check_layer_norm(x, weight, bias, residual)
    check_dropout(dropout_p, seed)
    if backend(x) == "torch":
        return layer_norm_reference(
            x, weight, bias, eps, residual=residual, dropout_p=dropout_p, seed=seed
        )
    check_triton_rows(x)
    seed = seed_tensor(seed, x.device)
    return layer_norm_op(x, residual, weight, bias, eps, dropout_p, seed)[0]


def layer_norm_reference(x, weight, bias, eps, *, residual=None, dropout_p=0.0, seed=0):
    """The naive twin of `layer_norm`, any float dtype; in fp32 at least, and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide)
    if dropout_p > 0.0:
        h = dropout_reference(h, dropout_p, seed)
    if residual is not None:
        h = h + residual.to(wide)
    return F.layer_norm(h, h.shape[1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)


def dropout(x, dropout_p, seed):
    """Dropout alone, where no LayerNorm follows. x: (T, H). Returns (T, H) of the same dtype.

    Raises ValueError if x is not (T, H) floating point, or dropout_p or seed is out of range.
    """
    check_matrix(x)
    check_dropout(dropout_p, seed)
    if dropout_p == 0.0:
        return x
    if backend(x) == "torch":
        return dropout_reference(x, dropout_p, seed)
    check_triton_rows(x)
    return dropout_op(x, dropout_p, seed_tensor(seed, x.device))


def dropout_reference(x, dropout_p, seed):
    """The naive twin of `dropout`, any float dtype."""
    keep = dropout_keep(seed, dropout_p, *x.shape, x.device, x.dtype)
    return x * keep * (1 / (1 - dropout_p))


if HAS_TRITON:

    @triton.jit
    def _load_sum(
        x_ptr, residual_ptr, stream, row, T, first,
        H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
        RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """h = dropout(x) + residual in columns first .. first + BLOCK_H, fp32, zeros outside.

        stream: key, offset, threshold, keep_scale. Returns h, the factor of dropout, where the
        columns are, and which are inside.
        """
        column = first + tl.arange(0, BLOCK_H)
        place = row.to(tl.int64)[:, None] * H + column[None, :]
        inside = (row < T)[:, None] & (column < H)[None, :]
        h = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        factor = tl.full([BLOCK_R, BLOCK_H], 1.0, tl.float32)
        if DROPOUT:
            key, offset, threshold, keep_scale = stream
            group = first // 4 + tl.arange(0, BLOCK_H // 4)
            c1 = group.to(tl.uint32)[None, :] + offset
            half_0, half_1, half_2, half_3 = _halves(key, row.to(tl.uint32)[:, None], c1, threshold)
            # The two axes that this adds are 2 and 2: half number 2 i + j is at [i, j].
            keep = tl.join(tl.join(half_0, half_2), tl.join(half_1, half_3))
            factor = tl.where(tl.reshape(keep, [BLOCK_R, BLOCK_H]), keep_scale, 0.0)
            h = h * factor
        if RESIDUAL:
            h += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        return h, factor, place, inside

    @triton.jit(**generic)
    def _layer_norm_forward(
        x_ptr, residual_ptr,  # (T, H), contiguous
        weight_ptr, bias_ptr,  # (H,)
        y_ptr,  # (T, H), contiguous
        mean_ptr, rstd_ptr,  # (T,) fp32
        seed_ptr,  # () int64
        T, eps, threshold, keep_scale,
        H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
        RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_R whole rows, in chunks of BLOCK_H columns that stay in registers.

            y = (h - mean) rstd weight + bias;  rstd = 1 / sqrt(var + eps)

        Kept for the backward pass: mean, rstd. A row's first element, the pivot, is subtracted
        before the mean is taken, so that a constant row gives exactly 0: the rounding of a mean
        would be divided by sqrt(eps) there.
        """
        row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        key, offset = _dropout_stream(seed_ptr, tl.full([], 0, tl.int32))
        stream = (key, offset, threshold, keep_scale)
        place = row.to(tl.int64) * H
        pivot = tl.load(x_ptr + place, mask=row < T, other=0.0).to(tl.float32)
        if DROPOUT:
            kept, _, _, _ = _halves(key, row.to(tl.uint32), offset, threshold)  # of column 0
            pivot *= tl.where(kept, keep_scale, 0.0)
        if RESIDUAL:
            pivot += tl.load(residual_ptr + place, mask=row < T, other=0.0).to(tl.float32)

        # First pass: h - pivot, and its sum.
        chunks = ()
        total = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        for first in tl.static_range(0, H, BLOCK_H):
            h, _, _, inside = _load_sum(
                x_ptr, residual_ptr, stream, row, T, first, H, BLOCK_R, BLOCK_H, RESIDUAL, DROPOUT
            )
            h = tl.where(inside, h - pivot[:, None], 0.0)
            chunks = chunks + (h,)
            total += h
        mean = tl.sum(total, 1) / H

        # Second pass, over registers: the variance.
        square = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        for i in tl.static_range(len(chunks)):
            column = i * BLOCK_H + tl.arange(0, BLOCK_H)
            centered = tl.where((column < H)[None, :], chunks[i] - mean[:, None], 0.0)
            square += centered * centered
        rstd = 1 / tl.sqrt(tl.sum(square, 1) / H + eps)

        # Third pass: what is written.
        for i in tl.static_range(len(chunks)):
            column = i * BLOCK_H + tl.arange(0, BLOCK_H)
            weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
            bias = tl.load(bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)
            y = (chunks[i] - mean[:, None]) * rstd[:, None] * weight[None, :] + bias[None, :]
            inside = (row < T)[:, None] & (column < H)[None, :]
            tl.store(y_ptr + place[:, None] + column[None, :], y, mask=inside)
        tl.store(mean_ptr + row, mean + pivot, mask=row < T)
        tl.store(rstd_ptr + row, rstd, mask=row < T)

    @triton.jit(**generic)
    def _layer_norm_backward(
        dy_ptr, x_ptr, residual_ptr,  # (T, H), contiguous
        weight_ptr,  # (H,)
        mean_ptr, rstd_ptr,  # (T,) fp32
        dx_ptr, dresidual_ptr,  # (T, H), contiguous
        dweight_ptr, dbias_ptr,  # (programs, H) fp32: each program's sums over its rows
        seed_ptr,
        T, threshold, keep_scale,
        H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
        RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: every programs-th block of BLOCK_R rows, chunks as above.

            n = (h - mean) rstd;  g = dy weight;  dh = (g - mean(g) - n mean(g n)) rstd
            dresidual = dh;  dx = keep dh / (1 - p);  dweight = sum dy n;  dbias = sum dy

        The last two are summed over the rows of a block only at the end: until then, no thread has
        to wait for another. Tuples have an entry for each chunk. Triton cannot assign to an entry,
        so the new sums make new tuples.
        """
        key, offset = _dropout_stream(seed_ptr, tl.full([], 0, tl.int32))
        stream = (key, offset, threshold, keep_scale)
        CHUNKS: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
        weights = ()
        dweights = ()
        dbiases = ()
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

            # First pass: n and g of each chunk, and the two means. Outside, dy = 0 adds nothing.
            ns = ()
            gs = ()
            factors = ()
            sum_g = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
            sum_gn = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
            new_dweights = ()
            new_dbiases = ()
            for i in tl.static_range(CHUNKS):
                h, factor, place, inside = _load_sum(
                    x_ptr, residual_ptr, stream, row, T, i * BLOCK_H,
                    H, BLOCK_R, BLOCK_H, RESIDUAL, DROPOUT,
                )  # fmt: skip
                dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)
                n = (h - mean[:, None]) * rstd[:, None]
                g = dy * weights[i][None, :]
                ns = ns + (n,)
                gs = gs + (g,)
                factors = factors + (factor,)
                sum_g += g
                sum_gn += g * n
                new_dweights = new_dweights + (dweights[i] + dy * n,)
                new_dbiases = new_dbiases + (dbiases[i] + dy,)
            dweights = new_dweights
            dbiases = new_dbiases
            mean_g = tl.sum(sum_g, 1) / H
            mean_gn = tl.sum(sum_gn, 1) / H

            # Second pass, over registers: the gradients.
            for i in tl.static_range(CHUNKS):
                column = i * BLOCK_H + tl.arange(0, BLOCK_H)
                place = row.to(tl.int64)[:, None] * H + column[None, :]
                inside = (row < T)[:, None] & (column < H)[None, :]
                dh = (gs[i] - mean_g[:, None] - ns[i] * mean_gn[:, None]) * rstd[:, None]
                if RESIDUAL and DROPOUT:  # without dropout dresidual is dx
                    tl.store(dresidual_ptr + place, dh, mask=inside)
                tl.store(dx_ptr + place, dh * factors[i], mask=inside)

        for i in tl.static_range(CHUNKS):
            column = i * BLOCK_H + tl.arange(0, BLOCK_H)
            place = tl.program_id(0).to(tl.int64) * H + column
            tl.store(dweight_ptr + place, tl.sum(dweights[i], 0), mask=column < H)
            tl.store(dbias_ptr + place, tl.sum(dbiases[i], 0), mask=column < H)

    @triton.jit(**generic)
    def _dropout_kernel(
        x_ptr, y_ptr,  # (T, H), contiguous
        seed_ptr,  # () int64
        T, threshold, keep_scale,
        H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_R rows. y = keep x / (1 - p); its own backward pass."""
        row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
        key, offset = _dropout_stream(seed_ptr, tl.full([], 0, tl.int32))
        stream = (key, offset, threshold, keep_scale)
        for first in range(0, H, BLOCK_H):
            y, _, place, inside = _load_sum(
                x_ptr, x_ptr, stream, row, T, first, H, BLOCK_R, BLOCK_H, False, True
            )
            tl.store(y_ptr + place, y, mask=inside)


def norm_tile(name, x):
    """The constants of a LayerNorm kernel for x, and its number of programs.

    A chunk is a power of two: a whole row of up to 256 columns; 256 columns, which a warp reads at
    once, of a row up to 1,024; a quarter of a wider one, of which registers hold no second.
    """
    T, H = x.shape
    tile = tile_of(name, x)
    rows = 1 if H > 1024 else tile.rows
    columns = H if H <= 256 else max(256, -(-H // 4))
    constants = dict(
        H=H,
        BLOCK_R=rows,
        BLOCK_H=max(8, triton.next_power_of_2(columns)),
        num_warps=8 if H > 1024 else tile.warps,
    )
    blocks = -(-T // rows)
    return constants, min(blocks, tile.programs or blocks)


def row_statistics(x):
    """Two empty fp32 vectors with a number for each row of x: (T,)."""
    first = x.new_empty(len(x), dtype=torch.float32)
    return first, torch.empty_like(first)


@torch.library.custom_op("starencoder::layer_norm", mutates_args=())
def layer_norm_op(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor,
    eps: float, dropout_p: float, seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The forward kernel: y (T, H), and mean and rstd (T,) for the backward pass."""
    x = x.contiguous()
    y = torch.empty_like(x)
    mean, rstd = row_statistics(x)
    constants, programs = norm_tile("norm", x)
    flags = dict(RESIDUAL=residual is not None, DROPOUT=dropout_p > 0)
    residual = x if residual is None else residual.contiguous()
    pointers = (x, residual, weight.contiguous(), bias.contiguous(), y, mean, rstd, seed)
    arguments = (*pointers, len(x), eps, *dropout_scalars(dropout_p))
    launch(_layer_norm_forward, (programs,), arguments, constants | flags)
    return y, mean, rstd


layer_norm_op.register_fake(lambda x, *rest: (x.new_empty(x.shape), *row_statistics(x)))


@torch.library.custom_op("starencoder::layer_norm_backward", mutates_args=())
def layer_norm_backward_op(
    dy: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor,
    mean: torch.Tensor, rstd: torch.Tensor, dropout_p: float, seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The backward kernel: dx, dresidual (empty if it is dx), dweight and dbias (H,) fp32."""
    x = x.contiguous()
    constants, programs = norm_tile("norm_backward", x)
    flags = dict(RESIDUAL=residual is not None, DROPOUT=dropout_p > 0)
    residual = x if residual is None else residual.contiguous()
    dx = torch.empty_like(x)
    own_gradient = all(flags.values())  # or else it is dx
    dresidual = torch.empty_like(residual) if own_gradient else residual.new_empty(0)
    dweight = x.new_empty(programs, x.shape[1], dtype=torch.float32)
    dbias = torch.empty_like(dweight)
    inputs = (dy.contiguous(), x, residual, weight.contiguous(), mean, rstd)
    outputs = (dx, dresidual, dweight, dbias)
    arguments = (*inputs, *outputs, seed, len(x), *dropout_scalars(dropout_p))
    launch(_layer_norm_backward, (programs,), arguments, constants | flags)
    return dx, dresidual, dweight.sum(0), dbias.sum(0)


@layer_norm_backward_op.register_fake
def _(dy, x, residual, weight, mean, rstd, dropout_p, seed):
    own_gradient = residual is not None and dropout_p > 0
    dresidual = residual.new_empty(residual.shape) if own_gradient else x.new_empty(0)
    dweight = mean.new_empty(x.shape[1])
    return x.new_empty(x.shape), dresidual, dweight, torch.empty_like(dweight)


def _layer_norm_context(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.dropout_p, seed = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, residual, weight, *output[1:], seed)


def _layer_norm_gradient(ctx, dy, dmean, drstd):
    x, residual, weight, mean, rstd, seed = ctx.saved_tensors
    dx, dresidual, dweight, dbias = layer_norm_backward_op(
        dy, x, residual, weight, mean, rstd, ctx.dropout_p, seed
    )
    if residual is None:
        dresidual = None
    elif ctx.dropout_p == 0.0:
        dresidual = dx.to(residual.dtype)
    return dx, dresidual, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None, None


layer_norm_op.register_autograd(_layer_norm_gradient, setup_context=_layer_norm_context)


@torch.library.custom_op("starencoder::dropout", mutates_args=())
def dropout_op(x: torch.Tensor, dropout_p: float, seed: torch.Tensor) -> torch.Tensor:
    """The kernel of dropout alone, which is its backward pass too."""
    x = x.contiguous()
    y = torch.empty_like(x)
    constants, programs = norm_tile("norm", x)
    arguments = (x, y, seed, len(x), *dropout_scalars(dropout_p))
    launch(_dropout_kernel, (programs,), arguments, constants)
    return y


dropout_op.register_fake(lambda x, *rest: x.new_empty(x.shape))


def _dropout_context(ctx, inputs, output):
    _, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(seed)


def _dropout_gradient(ctx, dy):
    return dropout_op(dy, ctx.dropout_p, *ctx.saved_tensors), None, None


dropout_op.register_autograd(_dropout_gradient, setup_context=_dropout_context)


# ---- cross-entropy of a large vocabulary ---------------------------------------------------------


class CrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of logits (M, V) at labels (M,) int64, in fp32, by Triton.

    A label of -100 does not count; one that is no column makes the sum NaN. Logits are read once in
    the forward pass; in the backward pass their gradient takes their place, since of 49,156 columns
    they are the largest tensor of a step.
    So there is one backward pass, and nobody may read the logits after it.
    """

    @staticmethod
    def forward(ctx, logits, labels):
        logits = logits.contiguous()
        losses, lse = cross_entropy_op(logits, labels)
        ctx.save_for_backward(logits, labels, lse)
        return losses.sum()

    @staticmethod
    def backward(ctx, upstream):
        logits, labels, lse = ctx.saved_tensors
        gradient = logits.detach()
        cross_entropy_backward_op(gradient, labels, lse, upstream)
        return gradient, None


if HAS_TRITON:

    @triton.jit
    def _cross_entropy_forward(
        logits_ptr,  # (M, V), contiguous
        labels_ptr,  # (M,) int64
        losses_ptr, lse_ptr,  # (M,) fp32
        V: tl.constexpr, BLOCK_V: tl.constexpr,
    ):  # fmt: skip
        """One program: one row. loss = lse - logit[label];  lse = log sum e^logit, kept."""
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * V
        # Not -inf: after a block of logits that are all -inf, m - m_new would be inf - inf, NaN.
        m = tl.full([], -3.0e38, tl.float32)
        l = tl.zeros([BLOCK_V], tl.float32)  # summed over its lanes at the end
        for first in range(0, V, BLOCK_V):
            column = first + tl.arange(0, BLOCK_V)
            x = tl.load(logits_ptr + column, mask=column < V, other=float("-inf")).to(tl.float32)
            m_new = tl.maximum(m, tl.max(x, 0))
            l = l * tl.exp(m - m_new) + tl.exp(x - m_new)
            m = m_new
        lse = m + tl.log(tl.sum(l, 0))
        label = tl.load(labels_ptr + row)
        counted = label != -100
        # A label that is no column makes the loss NaN: its place belongs to another row, or to nobody.
        is_column = (label >= 0) & (label < V)
        chosen = tl.load(logits_ptr + label, mask=is_column, other=float("nan")).to(tl.float32)
        tl.store(losses_ptr + row, tl.where(counted, lse - chosen, 0.0))
        tl.store(lse_ptr + row, lse)

    @triton.jit
    def _cross_entropy_backward(
        logits_ptr, labels_ptr, lse_ptr,  # as above; the gradient takes the place of the logits
        upstream_ptr,  # () fp32
        V: tl.constexpr, BLOCK_V: tl.constexpr,
    ):  # fmt: skip
        """One program: one row. dlogit = upstream (e^(logit - lse) - [column = label])."""
        row = tl.program_id(0).to(tl.int64)
        logits_ptr += row * V
        label = tl.load(labels_ptr + row)
        lse = tl.load(lse_ptr + row)
        factor = tl.where(label >= 0, tl.load(upstream_ptr), 0.0)
        for first in range(0, V, BLOCK_V):
            column = first + tl.arange(0, BLOCK_V)
            x = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
            gradient = (tl.exp(x - lse) - tl.where(column == label, 1.0, 0.0)) * factor
            tl.store(logits_ptr + column, gradient, mask=column < V)


def cross_entropy_launch(kernel, logits, *rest):
    """Launches a kernel with one program a row, in blocks of up to 4,096 columns."""
    M, V = logits.shape
    block_v = min(4096, triton.next_power_of_2(V))
    launch(kernel, (M,), (logits, *rest), dict(V=V, BLOCK_V=block_v, num_warps=8))


@torch.library.custom_op("starencoder::cross_entropy", mutates_args=())
def cross_entropy_op(
    logits: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The forward kernel: losses and lse, both (M,) fp32."""
    losses, lse = row_statistics(logits)
    cross_entropy_launch(_cross_entropy_forward, logits, labels.contiguous(), losses, lse)
    return losses, lse


cross_entropy_op.register_fake(lambda logits, labels: row_statistics(logits))


@torch.library.custom_op("starencoder::cross_entropy_backward", mutates_args=("logits",))
def cross_entropy_backward_op(
    logits: torch.Tensor, labels: torch.Tensor, lse: torch.Tensor, upstream: torch.Tensor
) -> None:
    """The backward kernel: the gradient of the logits takes their place."""
    cross_entropy_launch(_cross_entropy_backward, logits, labels.contiguous(), lse, upstream)


cross_entropy_backward_op.register_fake(lambda *_: None)
