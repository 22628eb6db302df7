"""The two operations of the encoder that are worth a kernel of their own: attention and fused dropout + residual + LayerNorm.

    attention   O = dropout(softmax(Q K^T / sqrt(D))) V         within each sequence, in both directions, no mask
    layer_norm  y = LN(dropout(x) + residual),  LN(h) = (h - mean) / sqrt(var + eps) * weight + bias

Sequences are packed: the tokens of a micro-batch stand end to end in one axis of length T, and `cu_seqlens` (B+1,) int32 says where
each begins, so no padding token is ever computed. Letters: B sequences, T tokens, N heads, D head size, H = N*D hidden.

**Dropout by counter.** A mask is never stored and never drawn from a global generator: whether an element is kept is a pure function of
(seed, coordinates of the element), by the counter-based generator Philox 4x32-7. A backward pass, a second machine or a GPU kernel
makes the same bits again from the seed alone, and training needs no generator state to resume exactly.
One Philox call gives four 32-bit words, and their halves serve eight neighbouring elements:

    half(seed, c0, c1, c2)[lane]   key = the 64 bits of seed, counter = (c0, c1, c2, 0); the low half of a word comes first
    layer_norm, dropout            x[row, column]:                    c0 = column // 8, c1 = row,   c2 = 0,    lane = column % 8
    attention                      P[head, query, key] of a sequence: c0 = key // 8,    c1 = query, c2 = head, lane = key % 8
                                   (query: its row in the packed batch; key: its position in its sequence)
    kept if half >= p * 2**16 - 2**15, as signed 16-bit numbers, and then scaled by 1 / (1 - p)

References: Vaswani et al., Attention Is All You Need, 2017, section 3.2; Ba et al., Layer Normalization, 2016; Salmon et al., Parallel
Random Numbers: As Easy as 1, 2, 3, SC 2011 (Philox; the same words as `tl.philox` of Triton and `Philox4x32` of Random123; 7 rounds are the
fewest that pass all of TestU01's BigCrush, table 2 there).

Two implementations of one signature each: Triton on CUDA devices, and the formulas in PyTorch below them, which serve everywhere else and
are what the tests hold the kernels to (`..._reference`). `STARENCODER_KERNELS=torch|triton` overrides; triton on a CPU is its interpreter.

Left out: causal masks, cross attention, more query heads than key heads, derivatives of second order, head sizes above 128.
"""

import os
from itertools import groupby

import torch
import torch.nn.functional as F

if os.environ.get("STARENCODER_KERNELS") == "triton" and not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined
try:  # there is no Triton for macOS and Windows
    import triton
    import triton.language as tl

    HAS_TRITON, INTERPRETED = True, os.environ.get("TRITON_INTERPRET") == "1"
except ImportError:
    HAS_TRITON, INTERPRETED = False, False

LOG2_E = 1.4426950408889634


def backend(tensor):
    """Which implementation serves `tensor`: "triton" on CUDA devices, "torch" elsewhere.

    `STARENCODER_KERNELS` overrides; raises ValueError where it asks for what cannot be had.
    """
    asked = os.environ.get("STARENCODER_KERNELS") or ("triton" if tensor.is_cuda and HAS_TRITON else "torch")
    if asked not in ("torch", "triton"):
        raise ValueError(f"STARENCODER_KERNELS={asked}: it must be torch or triton")
    if asked == "triton" and not (HAS_TRITON and (tensor.is_cuda or INTERPRETED)):
        raise ValueError("STARENCODER_KERNELS=triton: needs Triton, and a CUDA device or, set from the start, TRITON_INTERPRET=1")
    return asked


# ---- dropout by counter ----------------------------------------------------------------------------------------------------------

PHILOX_ROUND_A, PHILOX_ROUND_B = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_A, PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF


PHILOX_ROUNDS = 7


def philox(seed, c0, c1, c2, rounds=PHILOX_ROUNDS):
    """Philox 4x32 of Salmon et al., section 3.3: four random 32-bit words for each counter (c0, c1, c2, 0) under the key `seed`.

    seed: int or 0-d int64 tensor. c0, c1, c2: int64 tensors with values below 2**32 that broadcast together to a shape S.
    Returns four int64 tensors that broadcast to S, with values in [0, 2**32). PyTorch has no uint32 arithmetic: words live in int64,
    where a product wraps modulo 2**64 just as the hardware's does, and `& LOW` keeps 32 bits.
    """
    c3, k0, k1 = torch.zeros_like(c0), seed & LOW, (seed >> 32) & LOW
    for _ in range(rounds):  # in the first two, few words depend on all of the counter yet, and broadcasting saves their work
        product_a, product_b = c0 * PHILOX_ROUND_A, c2 * PHILOX_ROUND_B
        c0, c1, c2, c3 = ((product_b >> 32) ^ c1 ^ k0) & LOW, product_b & LOW, ((product_a >> 32) ^ c3 ^ k1) & LOW, product_a & LOW
        k0, k1 = (k0 + PHILOX_KEY_A) & LOW, (k1 + PHILOX_KEY_B) & LOW
    return c0, c1, c2, c3


def _threshold(dropout_p):
    return min(round(dropout_p * 2**16), 2**16 - 1) - 2**15


@torch.compiler.disable  # its loop depends on the number of rows
def dropout_keep(seed, dropout_p, columns, row, head, dtype=torch.bool):
    """Which elements dropout keeps, each with probability 1 - dropout_p: 1 or 0 of `dtype`, `columns` wide.

    row, head: int64 tensors that broadcast to the shape of a column, with a last axis of 1.
    """
    group = torch.arange((columns + 7) // 8, device=row.device)  # one counter serves eight neighbouring columns
    shape = torch.broadcast_shapes(row.shape, head.shape)[:-1]
    row, head = (x.expand(*shape, 1).reshape(-1, 1) for x in (row, head))
    keep = torch.empty(len(row), columns, dtype=dtype, device=row.device)
    some = max(1, 2**16 // max(1, len(group)))  # rows at once: as many as stay in a CPU's cache
    for rows, heads, part in zip(row.split(some), head.split(some), keep.split(some)):
        words = torch.empty(len(rows), len(group), 4, dtype=torch.int32, device=row.device)
        for i, word in enumerate(philox(seed, group, rows, heads)):
            words[..., i] = word
        part.copy_(words.view(torch.int16).flatten(1)[:, :columns] >= _threshold(dropout_p))
    return keep.view(*shape, columns)


def lengths_visible(cu_seqlens):
    """Whether to look at the values of cu_seqlens costs nothing: no GPU has to be waited for, and no traced graph breaks."""
    return cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_dropout(dropout_p, seed):
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")
    if isinstance(seed, torch.Tensor):
        if seed.shape != () or seed.dtype != torch.int64:
            raise ValueError(f"seed must be an int or a 0-d int64 tensor, got {tuple(seed.shape)} {seed.dtype}")
    elif not -(2**63) <= seed < 2**63:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")


def _check_device(name, tensor, other_name, other):
    if tensor.device != other.device:
        raise ValueError(f"{name} must lie on the device of {other_name}, {other.device}, got {tensor.device}")


def _check_matrix(x):
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be (T, H) floating point, got {tuple(x.shape)} {x.dtype}")


def dropout(x, dropout_p, seed):
    """Dropout alone, where no LayerNorm follows (the embeddings, a classifier). x (T, H) -> (T, H) of the same dtype.

    Raises ValueError where x is not (T, H) floating point or dropout_p or seed out of range.
    """
    _check_matrix(x)
    _check_dropout(dropout_p, seed)
    if dropout_p == 0.0:
        return x
    if backend(x) == "triton":
        _check_triton("x", x, x.shape[1])
        return _dropout_op(x, dropout_p, _seed_tensor(seed, x.device))
    return dropout_reference(x, dropout_p, seed)


def dropout_reference(x, dropout_p, seed):
    """The naive twin of `dropout`, in any float dtype."""
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    keep = dropout_keep(seed, dropout_p, x.shape[1], row, torch.zeros_like(row), x.dtype)
    return x * keep * (1 / (1 - dropout_p))


# ---- attention -------------------------------------------------------------------------------------------------------------------


def attention(qkv, cu_seqlens, max_seqlen, *, dropout_p=0.0, seed=0):
    """Bidirectional multi-head attention of each packed sequence to itself (Vaswani et al., 2017, section 3.2).

    qkv: (T, 3, N, D), queries, keys and values of all heads. cu_seqlens: (B+1,) int32, from 0 to T, not decreasing.
    max_seqlen: int, no sequence is longer. dropout_p: probability that an attention weight is dropped. seed: int or 0-d int64 tensor.
    Returns (T, N, D) in the dtype of qkv. Raises ValueError for arguments that do not fit together; lengths are looked at only where
    that does not make a GPU wait, on a CPU.
    """
    if qkv.dim() != 4 or qkv.shape[1] != 3:
        raise ValueError(f"qkv must be (T, 3, N, D), got {tuple(qkv.shape)}")
    if not qkv.is_floating_point():
        raise ValueError(f"qkv must be floating point, got {qkv.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype != torch.int32 or len(cu_seqlens) < 1:
        raise ValueError(f"cu_seqlens must be (B+1,) int32, got {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}")
    _check_device("cu_seqlens", cu_seqlens, "qkv", qkv)
    if isinstance(max_seqlen, torch.Tensor) or max_seqlen < 0:
        raise ValueError(f"max_seqlen must be an int, at least 0, got {max_seqlen!r}")
    if lengths_visible(cu_seqlens):
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(qkv) or (lengths < 0).any():
            raise ValueError(f"cu_seqlens must rise from 0 to T = {len(qkv)}, got {cu_seqlens.tolist()[:8]} ... {int(cu_seqlens[-1])}")
        if len(lengths) and lengths.max() > max_seqlen:
            raise ValueError(f"max_seqlen = {max_seqlen} is below the longest sequence, {int(lengths.max())}")
    _check_dropout(dropout_p, seed)
    if backend(qkv) == "triton":
        _check_triton("qkv", qkv)
        if not 1 <= qkv.shape[3] <= 128 or qkv.stride(3) != 1:
            raise ValueError(f"qkv must have 1 <= D <= 128 with stride 1, got shape {tuple(qkv.shape)} and strides {qkv.stride()}")
        if max(len(cu_seqlens) - 1, qkv.shape[2]) > GRID_LIMIT:
            raise ValueError(f"cu_seqlens and qkv: at most {GRID_LIMIT:,} sequences and heads, got {len(cu_seqlens) - 1}, {qkv.shape[2]}")
        return _attention_op(qkv, cu_seqlens, max_seqlen, dropout_p, _seed_tensor(seed, qkv.device))[0]
    return attention_reference(qkv, cu_seqlens, max_seqlen, dropout_p=dropout_p, seed=seed)


def attention_reference(qkv, cu_seqlens, max_seqlen, *, dropout_p=0.0, seed=0):
    """The naive twin of `attention`: the formula as it is written, any float dtype, memory quadratic in the length.

    Neighbouring sequences of equal length L are computed as one batch, since most windows of a corpus are full.
    """
    (_, _, N, D), outputs, start = qkv.shape, [qkv[:0, 0]], 0
    for L, run in groupby(cu_seqlens.diff().tolist()):
        run, some = len(list(run)), max(1, 2**23 // max(1, N * L * L))  # sequences at once: more would not stay in a CPU's cache
        for B in [min(some, run - i) for i in range(0, run, some)]:
            q, k, v = qkv[start : start + B * L].reshape(B, L, 3, N, D).permute(2, 0, 3, 1, 4)  # each (B, N, L, D)
            scores = (q * D**-0.5) @ k.transpose(-1, -2)  # (B, N, L, L)
            weights = scores.softmax(-1)  # PyTorch accumulates in fp32 at least
            if dropout_p > 0.0:
                query = torch.arange(start, start + B * L, device=qkv.device).view(B, 1, L, 1)
                head = torch.arange(N, device=qkv.device).view(1, N, 1, 1)
                weights = weights * dropout_keep(seed, dropout_p, L, query, head, qkv.dtype)
                v = v * (1 / (1 - dropout_p))
            outputs.append((weights @ v).transpose(1, 2).reshape(B * L, N, D))
            start += B * L
    return torch.cat(outputs)


# ---- dropout + residual + LayerNorm ----------------------------------------------------------------------------------------------


def layer_norm(x, weight, bias, eps, *, residual=None, dropout_p=0.0, seed=0):
    """LN(dropout(x) + residual), the seam between two blocks of a post-LayerNorm transformer (Ba et al., 2016).

    x: (T, H). weight, bias: (H,), of any float dtype. eps: float, added to the variance. residual: like x, or None.
    dropout_p, seed: as in `attention`. Returns (T, H) in the dtype of x; the statistics are of fp32 at least.
    Raises ValueError for shapes that do not fit together.
    """
    _check_matrix(x)
    if weight.shape != x.shape[1:] or bias.shape != x.shape[1:]:
        raise ValueError(f"weight and bias must be ({x.shape[1]},), got {tuple(weight.shape)} and {tuple(bias.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be like x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", x if residual is None else residual)):
        _check_device(name, tensor, "x", x)
    _check_dropout(dropout_p, seed)
    if backend(x) == "triton":
        _check_triton("x", x, x.shape[1])
        return _layer_norm_op(x, residual, weight, bias, eps, dropout_p, _seed_tensor(seed, x.device))[0]
    return layer_norm_reference(x, weight, bias, eps, residual=residual, dropout_p=dropout_p, seed=seed)


def layer_norm_reference(x, weight, bias, eps, *, residual=None, dropout_p=0.0, seed=0):
    """The naive twin of `layer_norm`, in any float dtype; what is below fp32 is computed in fp32 and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = dropout_reference(x.to(wide), dropout_p, seed) if dropout_p > 0.0 else x.to(wide)
    if residual is not None:
        h = h + residual.to(wide)
    return F.layer_norm(h, h.shape[1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)


# ---- Triton ----------------------------------------------------------------------------------------------------------------------
# Each kernel's header says what one program computes, what is kept for the backward pass, and why what is loaded outside of a sequence
# does no harm. Products of tl.dot accumulate in fp32; what goes into them is of the input's dtype, as tensor cores take it.

if HAS_TRITON:
    LN_2, ROUNDS = tl.constexpr(1 / LOG2_E), tl.constexpr(PHILOX_ROUNDS)

    @triton.jit
    def _keep_tile(seed, threshold, group, row, head):
        """dropout_keep for a tile: group, row (int32) broadcast to (R, G) -> bool (R, G, 2, 2, 2), whose last three axes are the lane."""
        zero = group * 0 + row * 0
        w0, w1, w2, w3 = tl.philox(seed, group + zero, row + zero, head + zero, zero, n_rounds=ROUNDS)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3)).to(tl.int32, bitcast=True)  # (R, G, 2, 2): word 2 i + j at [i, j]
        return tl.join((words << 16) >> 16 >= threshold, words >> 16 >= threshold)  # both halves as signed numbers

    @triton.jit
    def _attention_forward(
        qkv_ptr,  # (T, 3, N, D)
        out_ptr,  # (T, N, D), contiguous
        lse_ptr,  # (N, T) fp32
        cu_seqlens_ptr,  # (B+1,) int32
        seed_ptr,  # () int64
        stride_t, stride_3, stride_n,  # of qkv, in elements; its last axis is contiguous
        T, N, scale, threshold, keep_scale,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_M queries of one head of one sequence. grid = (ceil(max_seqlen / BLOCK_M), N, B).

            S = scale Q K^T;  m = max S;  P = 2^(S - m);  l = sum P;  O = keep P V / (l (1 - p))       scale = log2(e) / sqrt(D)

        Keys come in blocks of BLOCK_N; m and l are brought up to date with each, and what was summed before shrinks by 2^(m_old - m_new)
        (online softmax: Milakov and Gimelshein, 2018; Dao, FlashAttention-2, 2023). Kept for the backward pass: lse = m + log2(l).
        """
        head = tl.program_id(1)
        start = tl.load(cu_seqlens_ptr + tl.program_id(2))
        length = tl.load(cu_seqlens_ptr + tl.program_id(2) + 1) - start
        first = tl.program_id(0) * BLOCK_M
        if first >= length:  # the grid is made for the longest sequence
            return
        seed = tl.load(seed_ptr)
        query, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        query_in, d_in = query < length, d < D
        base_ptr = qkv_ptr + start.to(tl.int64) * stride_t + head * stride_n
        # Queries outside: zeros, whose softmax is uniform and finite; they are not stored.
        q = tl.load(base_ptr + query[:, None] * stride_t + d[None, :], mask=query_in[:, None] & d_in[None, :], other=0.0)
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
        o = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first_key in range(0, length, BLOCK_N):
            key = first_key + tl.arange(0, BLOCK_N)
            key_in = key < length
            kv_ptr = base_ptr + key[:, None] * stride_t + d[None, :]
            k = tl.load(kv_ptr + stride_3, mask=key_in[:, None] & d_in[None, :], other=0.0)
            v = tl.load(kv_ptr + 2 * stride_3, mask=key_in[:, None] & d_in[None, :], other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            s = tl.where(key_in[None, :], s, float("-inf"))  # keys outside: weight 2^-inf = 0
            m_new = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - m_new[:, None])
            shrink = tl.exp2(m - m_new)
            l = l * shrink + tl.sum(p, 1)  # before dropout: the softmax is normalized, then dropped
            if DROPOUT:
                group = first_key // 8 + tl.arange(0, BLOCK_N // 8)
                keep = _keep_tile(seed, threshold, group[None, :], (start + query)[:, None], head)
                p = tl.where(tl.reshape(keep, [BLOCK_M, BLOCK_N]), p, 0.0)
            o = o * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
            m = m_new
        row = (start + query).to(tl.int64)
        o = o * (keep_scale / l)[:, None]
        tl.store(out_ptr + (row[:, None] * N + head) * D + d[None, :], o, mask=query_in[:, None] & d_in[None, :])
        tl.store(lse_ptr + head.to(tl.int64) * T + row, m + tl.log2(l), mask=query_in)

    @triton.jit
    def _attention_backward_delta(
        out_ptr, dout_ptr,  # (T, N, D), contiguous
        delta_ptr,  # (N, T) fp32
        T, N,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_M rows of one head. delta = rowsum(O dO) = rowsum(P dP), the part of dS that softmax subtracts."""
        head = tl.program_id(1)
        row, d = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        place, inside = (row[:, None] * N + head) * D + d[None, :], (row < T)[:, None] & (d < D)[None, :]
        o = tl.load(out_ptr + place, mask=inside, other=0.0).to(tl.float32)
        do = tl.load(dout_ptr + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(delta_ptr + head.to(tl.int64) * T + row, tl.sum(o * do, 1), mask=row < T)

    @triton.jit
    def _attention_backward_dk_dv(
        qkv_ptr,  # (T, 3, N, D)
        dout_ptr,  # (T, N, D), contiguous
        lse_ptr, delta_ptr,  # (N, T) fp32
        dqkv_ptr,  # (T, 3, N, D), contiguous
        cu_seqlens_ptr, seed_ptr,
        stride_t, stride_3, stride_n,  # of qkv
        T, N, scale, threshold, keep_scale,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_N keys of one head of one sequence, all its queries in blocks of BLOCK_M. Tiles are transposed (keys x
        queries), so that P^T and dS^T go into the next product as they are. No two programs write to one place: no atomics, the same
        bits every time.

            P = 2^(S - lse);  dV = (keep P / (1 - p))^T dO;  dP = keep (dO V^T) / (1 - p);  dS = P (dP - delta);  dK = dS^T Q / sqrt(D)
        """
        head = tl.program_id(1)
        start = tl.load(cu_seqlens_ptr + tl.program_id(2))
        length = tl.load(cu_seqlens_ptr + tl.program_id(2) + 1) - start
        first_key = tl.program_id(0) * BLOCK_N
        if first_key >= length:
            return
        seed = tl.load(seed_ptr)
        key, d = first_key + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        inside, d_in = (key < length)[:, None] & (d < D)[None, :], d < D
        base_ptr = qkv_ptr + start.to(tl.int64) * stride_t + head * stride_n
        kv_ptr = base_ptr + key[:, None] * stride_t + d[None, :]
        k = tl.load(kv_ptr + stride_3, mask=inside, other=0.0)  # keys outside: rows of dK and dV that are not stored
        v = tl.load(kv_ptr + 2 * stride_3, mask=inside, other=0.0)
        dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for first in range(0, length, BLOCK_M):
            query = first + tl.arange(0, BLOCK_M)
            query_in = query < length
            row = (start + query).to(tl.int64)
            mask = query_in[:, None] & d_in[None, :]
            q = tl.load(base_ptr + query[:, None] * stride_t + d[None, :], mask=mask, other=0.0)
            do = tl.load(dout_ptr + (row[:, None] * N + head) * D + d[None, :], mask=mask, other=0.0)
            # Queries outside: q = dO = delta = 0 and lse = 0, so P is 1, finite, and both it and dS = 1 (0 - 0) add nothing.
            lse = tl.load(lse_ptr + head.to(tl.int64) * T + row, mask=query_in, other=0.0)
            delta = tl.load(delta_ptr + head.to(tl.int64) * T + row, mask=query_in, other=0.0)
            p = tl.exp2(tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :])  # (BLOCK_N, BLOCK_M)
            dp = tl.dot(v, tl.trans(do), input_precision="ieee")
            dropped = p
            if DROPOUT:
                group = first_key // 8 + tl.arange(0, BLOCK_N // 8)
                keep = _keep_tile(seed, threshold, group[:, None], (start + query)[None, :], head)  # (BLOCK_N / 8, BLOCK_M, 2, 2, 2)
                keep = tl.reshape(tl.permute(keep, (0, 2, 3, 4, 1)), [BLOCK_N, BLOCK_M])
                dropped = tl.where(keep, p * keep_scale, 0.0)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            dv += tl.dot(dropped.to(do.dtype), do, input_precision="ieee")
            dk += tl.dot((p * (dp - delta[None, :])).to(q.dtype), q, input_precision="ieee")
        dk *= scale * LN_2
        place = ((start + key).to(tl.int64)[:, None] * 3 * N + head) * D + d[None, :]
        tl.store(dqkv_ptr + place + N * D, dk, mask=inside)
        tl.store(dqkv_ptr + place + 2 * N * D, dv, mask=inside)

    @triton.jit
    def _attention_backward_dq(
        qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, cu_seqlens_ptr, seed_ptr,  # as above
        stride_t, stride_3, stride_n,
        T, N, scale, threshold, keep_scale,
        D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_M queries of one head of one sequence, all its keys in blocks of BLOCK_N. dQ = dS K / sqrt(D)."""
        head = tl.program_id(1)
        start = tl.load(cu_seqlens_ptr + tl.program_id(2))
        length = tl.load(cu_seqlens_ptr + tl.program_id(2) + 1) - start
        first = tl.program_id(0) * BLOCK_M
        if first >= length:
            return
        seed = tl.load(seed_ptr)
        query, d = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        query_in, d_in = query < length, d < D
        row, inside = (start + query).to(tl.int64), query_in[:, None] & d_in[None, :]
        base_ptr = qkv_ptr + start.to(tl.int64) * stride_t + head * stride_n
        q = tl.load(base_ptr + query[:, None] * stride_t + d[None, :], mask=inside, other=0.0)  # queries outside are not stored
        do = tl.load(dout_ptr + (row[:, None] * N + head) * D + d[None, :], mask=inside, other=0.0)
        lse = tl.load(lse_ptr + head.to(tl.int64) * T + row, mask=query_in, other=0.0)
        delta = tl.load(delta_ptr + head.to(tl.int64) * T + row, mask=query_in, other=0.0)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for first_key in range(0, length, BLOCK_N):
            key = first_key + tl.arange(0, BLOCK_N)
            key_in = key < length
            kv_ptr = base_ptr + key[:, None] * stride_t + d[None, :]
            k = tl.load(kv_ptr + stride_3, mask=key_in[:, None] & d_in[None, :], other=0.0)
            v = tl.load(kv_ptr + 2 * stride_3, mask=key_in[:, None] & d_in[None, :], other=0.0)
            s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            # Of a key outside, 2^(0 - lse) may be inf, and inf * 0 is NaN: its weight is made 2^-inf = 0.
            p = tl.exp2(tl.where(key_in[None, :], s - lse[:, None], float("-inf")))
            dp = tl.dot(do, tl.trans(v), input_precision="ieee")
            if DROPOUT:
                group = first_key // 8 + tl.arange(0, BLOCK_N // 8)
                keep = _keep_tile(seed, threshold, group[None, :], (start + query)[:, None], head)
                dp = tl.where(tl.reshape(keep, [BLOCK_M, BLOCK_N]), dp * keep_scale, 0.0)
            dq += tl.dot((p * (dp - delta[:, None])).to(k.dtype), k, input_precision="ieee")
        dq *= scale * LN_2
        tl.store(dqkv_ptr + (row[:, None] * 3 * N + head) * D + d[None, :], dq, mask=inside)

    @triton.jit
    def _load_sum(
        x_ptr, residual_ptr, seed, threshold, keep_scale, row, column, inside, H,
        BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """h = dropout(x) + residual (BLOCK_R, BLOCK_H) fp32, 0 outside, and the mask (1 without dropout)."""
        place = row.to(tl.int64)[:, None] * H + column[None, :]
        h = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        factor = tl.full([BLOCK_R, BLOCK_H], 1.0, tl.float32)
        if DROPOUT:
            keep = _keep_tile(seed, threshold, tl.arange(0, BLOCK_H // 8)[None, :], row[:, None], 0)
            factor = tl.where(tl.reshape(keep, [BLOCK_R, BLOCK_H]), keep_scale, 0.0)
            h = h * factor
        if RESIDUAL:
            h += tl.load(residual_ptr + place, mask=inside, other=0.0).to(tl.float32)
        return h, factor

    @triton.jit
    def _layer_norm_forward(
        x_ptr, residual_ptr,  # (T, H), contiguous
        weight_ptr, bias_ptr,  # (H,)
        y_ptr,  # (T, H), contiguous
        mean_ptr, rstd_ptr,  # (T,) fp32
        seed_ptr,  # () int64
        T, H, eps, threshold, keep_scale,
        BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_R rows, whole. y = (h - mean) rstd weight + bias. Kept for the backward pass: mean, rstd, and the inputs."""
        row, column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_H)
        inside = (row < T)[:, None] & (column < H)[None, :]
        seed = tl.load(seed_ptr)
        h, _ = _load_sum(x_ptr, residual_ptr, seed, threshold, keep_scale, row, column, inside, H, BLOCK_R, BLOCK_H, RESIDUAL, DROPOUT)
        mean = tl.sum(h, 1) / H  # columns outside add 0 here,
        centered = tl.where((column < H)[None, :], h - mean[:, None], 0.0)  # and must be 0 again once the mean is off
        rstd = 1 / tl.sqrt(tl.sum(centered * centered, 1) / H + eps)
        weight = tl.load(weight_ptr + column, mask=column < H, other=0.0).to(tl.float32)
        bias = tl.load(bias_ptr + column, mask=column < H, other=0.0).to(tl.float32)
        y = centered * rstd[:, None] * weight[None, :] + bias[None, :]
        tl.store(y_ptr + row.to(tl.int64)[:, None] * H + column[None, :], y, mask=inside)
        tl.store(mean_ptr + row, mean, mask=row < T)
        tl.store(rstd_ptr + row, rstd, mask=row < T)

    @triton.jit
    def _layer_norm_backward(
        dy_ptr, x_ptr, residual_ptr,  # (T, H), contiguous
        weight_ptr,  # (H,)
        mean_ptr, rstd_ptr,  # (T,) fp32
        dx_ptr, dresidual_ptr,  # (T, H), contiguous
        dweight_ptr, dbias_ptr,  # (programs, H) fp32: each program's sums over its rows
        seed_ptr,
        T, H, threshold, keep_scale,
        BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr, RESIDUAL: tl.constexpr, DROPOUT: tl.constexpr,
    ):  # fmt: skip
        """One program: every programs-th block of BLOCK_R rows. With n = (h - mean) rstd and g = dy weight:

        dh = (g - mean(g) - n mean(g n)) rstd;  dresidual = dh;  dx = keep dh / (1 - p);  dweight = sum dy n;  dbias = sum dy
        """
        column = tl.arange(0, BLOCK_H)
        column_in = column < H
        weight = tl.load(weight_ptr + column, mask=column_in, other=0.0).to(tl.float32)
        dweight = tl.zeros([BLOCK_H], tl.float32)
        dbias = tl.zeros([BLOCK_H], tl.float32)
        seed = tl.load(seed_ptr)
        for first in range(tl.program_id(0) * BLOCK_R, T, tl.num_programs(0) * BLOCK_R):
            row = first + tl.arange(0, BLOCK_R)
            inside = (row < T)[:, None] & column_in[None, :]
            place = row.to(tl.int64)[:, None] * H + column[None, :]
            h, factor = _load_sum(
                x_ptr, residual_ptr, seed, threshold, keep_scale, row, column, inside, H, BLOCK_R, BLOCK_H, RESIDUAL, DROPOUT
            )
            dy = tl.load(dy_ptr + place, mask=inside, other=0.0).to(tl.float32)  # rows outside: dy = 0 adds nothing to the sums
            mean = tl.load(mean_ptr + row, mask=row < T, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=row < T, other=0.0)
            n = tl.where(column_in[None, :], (h - mean[:, None]) * rstd[:, None], 0.0)
            g = dy * weight[None, :]
            dh = (g - (tl.sum(g, 1) / H)[:, None] - n * (tl.sum(g * n, 1) / H)[:, None]) * rstd[:, None]
            if RESIDUAL and DROPOUT:  # without dropout the two gradients are the same
                tl.store(dresidual_ptr + place, dh, mask=inside)
            tl.store(dx_ptr + place, dh * factor, mask=inside)
            dweight += tl.sum(dy * n, 0)
            dbias += tl.sum(dy, 0)
        tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * H + column, dweight, mask=column_in)
        tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * H + column, dbias, mask=column_in)

    @triton.jit
    def _dropout_kernel(
        x_ptr, y_ptr,  # (T, H), contiguous
        seed_ptr,  # () int64
        T, H, threshold, keep_scale,
        BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_R rows. y = keep x / (1 - p); its own backward pass, since the mask is made again."""
        row, column = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_H)
        inside = (row < T)[:, None] & (column < H)[None, :]
        y, _ = _load_sum(x_ptr, x_ptr, tl.load(seed_ptr), threshold, keep_scale, row, column, inside, H, BLOCK_R, BLOCK_H, False, True)
        tl.store(y_ptr + row.to(tl.int64)[:, None] * H + column[None, :], y, mask=inside)


# ---- from kernels to operators ---------------------------------------------------------------------------------------------------
# torch.library makes each launch an operator that autograd and torch.compile know: a function, the shapes of what it returns, and its
# backward pass, which is an operator as well.

# Launch settings by compute capability. Attention: queries, keys, warps, stages. LayerNorm: elements of a tile, warps, and programs of the
# backward pass, each of which has its own partial sums. Fixed, so that results do not depend on what a tuner saw, and such that nothing
# spills (`python bench.py kernels --resources`; `--tune` measures others and prints a new entry).
NORM = {"norm": (4096, 4, 0), "norm_backward": (2048, 4, 512)}
TILES = {
    "default": {"forward": (64, 32, 4, 2), "dk_dv": (32, 64, 4, 2), "dk_dv, D > 64": (32, 32, 4, 2), "dq": (64, 32, 4, 2)} | NORM,
    (8, 0): {"forward": (128, 32, 8, 3), "dk_dv": (32, 128, 8, 2), "dk_dv, D > 64": (64, 64, 8, 2), "dq": (128, 32, 8, 2)} | NORM,
    (9, 0): {"forward": (128, 64, 8, 3), "dk_dv": (64, 64, 8, 2), "dq": (128, 32, 8, 2)} | NORM,
}
TILES[torch.float32] = {kernel: (32, 32, 4, 1) for kernel in ("forward", "dk_dv", "dq")} | NORM  # on every GPU: no tensor core does it
TILES[torch.float32] |= {f"{kernel}, D > 64": (16, 16, 4, 1) for kernel in ("forward", "dk_dv", "dq")}
GRID_LIMIT = 65535  # of CUDA, in the second and third dimension of a grid
WIDTH_LIMIT = 65536  # of a row, which is one tile


def _tile(kernel, x, D=0):
    """The entry of TILES for a kernel, and head size D, on the device of x."""
    capability = _capability(x)
    table = TILES.get(x.dtype if capability and x.dtype == torch.float32 else capability, TILES["default"])
    return (D > 64 and table.get(f"{kernel}, D > 64")) or table[kernel]


def _check_triton(name, x, width=0):
    allowed = (torch.float16, torch.float32) if INTERPRETED else (torch.float16, torch.bfloat16, torch.float32)
    if x.dtype not in allowed:  # the interpreter's tl.dot of bf16 gives garbage
        raise ValueError(f"{name} must be {' or '.join(str(d) for d in allowed)} for the Triton kernels, got {x.dtype}")
    if width > WIDTH_LIMIT:
        raise ValueError(f"{name} must be at most {WIDTH_LIMIT:,} wide for the Triton kernels, got {width}")


def _launch(kernel, grid, *arguments, **constants):
    """Triton launches on the current device, which need not be that of the arguments."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


def _seed_tensor(seed, device):
    """A 0-d int64 tensor on the device, from which the kernels read the seed; filling it waits for nothing."""
    return seed.to(device) if isinstance(seed, torch.Tensor) else torch.full((), seed, dtype=torch.int64, device=device)


def _capability(x):
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else None


def _attention_arguments(qkv, dropout_p):
    T, _, N, D = qkv.shape
    shapes = dict(D=D, BLOCK_D=max(16, 1 << (D - 1).bit_length()), DROPOUT=dropout_p > 0)  # tl.dot wants 16 columns, tiles powers of two
    return (*qkv.stride()[:3], T, N, D**-0.5 * LOG2_E, _threshold(dropout_p), 1 / (1 - dropout_p)), shapes


@torch.library.custom_op("starencoder::attention", mutates_args=())
def _attention_op(
    qkv: torch.Tensor, cu_seqlens: torch.Tensor, max_seqlen: int, dropout_p: float, seed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    T, _, N, D = qkv.shape
    out, lse = qkv.new_empty(T, N, D), qkv.new_empty(N, T, dtype=torch.float32)
    scalars, shapes = _attention_arguments(qkv, dropout_p)
    block_m, block_n, warps, stages = _tile("forward", qkv, D)
    grid = (-(-max_seqlen // block_m), N, len(cu_seqlens) - 1)
    if T:
        tiles = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages)
        _launch(_attention_forward, grid, qkv, out, lse, cu_seqlens.contiguous(), seed, *scalars, **shapes, **tiles)
    return out, lse


@_attention_op.register_fake
def _(qkv, cu_seqlens, max_seqlen, dropout_p, seed):
    T, _, N, D = qkv.shape
    return qkv.new_empty(T, N, D), qkv.new_empty(N, T, dtype=torch.float32)


@torch.library.custom_op("starencoder::attention_backward", mutates_args=())
def _attention_backward_op(
    dout: torch.Tensor, qkv: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    cu_seqlens: torch.Tensor, max_seqlen: int, dropout_p: float, seed: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    T, _, N, D = qkv.shape
    dout, dqkv, delta, cu_seqlens = dout.contiguous(), qkv.new_empty(T, 3, N, D), torch.empty_like(lse), cu_seqlens.contiguous()
    scalars, shapes = _attention_arguments(qkv, dropout_p)
    if T:
        _launch(_attention_backward_delta, (-(-T // 64), N), out, dout, delta, T, N, D=D, BLOCK_D=shapes["BLOCK_D"], BLOCK_M=64)
        for kernel, name in ((_attention_backward_dk_dv, "dk_dv"), (_attention_backward_dq, "dq")):
            block_m, block_n, warps, stages = _tile(name, qkv, D)
            grid = (-(-max_seqlen // (block_m if name == "dq" else block_n)), N, len(cu_seqlens) - 1)
            tiles = dict(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages)
            _launch(kernel, grid, qkv, dout, lse, delta, dqkv, cu_seqlens, seed, *scalars, **shapes, **tiles)
    return dqkv


@_attention_backward_op.register_fake
def _(dout, qkv, out, lse, cu_seqlens, max_seqlen, dropout_p, seed):
    return qkv.new_empty(qkv.shape)


def _attention_context(ctx, inputs, output):
    qkv, cu_seqlens, ctx.max_seqlen, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(qkv, *output, cu_seqlens, seed)


def _attention_gradient(ctx, dout, dlse):
    *tensors, seed = ctx.saved_tensors
    return _attention_backward_op(dout, *tensors, ctx.max_seqlen, ctx.dropout_p, seed), None, None, None, None


_attention_op.register_autograd(_attention_gradient, setup_context=_attention_context)


def _rows(kernel, x):
    """The tile of a LayerNorm kernel, with its warps, and its programs: whole rows, several at once where they are short."""
    elements, warps, programs = _tile(kernel, x)
    block_h = max(8, 1 << (x.shape[1] - 1).bit_length())
    return dict(BLOCK_R=max(1, elements // block_h), BLOCK_H=block_h, num_warps=warps if block_h <= 2048 else 8), programs


@torch.library.custom_op("starencoder::layer_norm", mutates_args=())
def _layer_norm_op(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor,
    eps: float, dropout_p: float, seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    (T, H), x = x.shape, x.contiguous()
    y, mean, rstd = torch.empty_like(x), x.new_empty(T, dtype=torch.float32), x.new_empty(T, dtype=torch.float32)
    flags = dict(RESIDUAL=residual is not None, DROPOUT=dropout_p > 0)
    residual = x if residual is None else residual.contiguous()
    shapes, _ = _rows("norm", x)
    if T:
        pointers = (x, residual, weight.contiguous(), bias.contiguous(), y, mean, rstd, seed)
        scalars = (T, H, eps, _threshold(dropout_p), 1 / (1 - dropout_p))
        _launch(_layer_norm_forward, (-(-T // shapes["BLOCK_R"]),), *pointers, *scalars, **shapes, **flags)
    return y, mean, rstd


@_layer_norm_op.register_fake
def _(x, residual, weight, bias, eps, dropout_p, seed):
    statistics = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), statistics, torch.empty_like(statistics)


@torch.library.custom_op("starencoder::layer_norm_backward", mutates_args=())
def _layer_norm_backward_op(
    dy: torch.Tensor, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, mean: torch.Tensor, rstd: torch.Tensor,
    dropout_p: float, seed: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    (T, H), (shapes, programs) = x.shape, _rows("norm_backward", x)
    x, dy = x.contiguous(), dy.contiguous()
    flags = dict(RESIDUAL=residual is not None, DROPOUT=dropout_p > 0)
    residual = x if residual is None else residual.contiguous()
    dx, dresidual = torch.empty_like(x), torch.empty_like(residual) if all(flags.values()) else residual.new_empty(0)
    programs = min(-(-T // shapes["BLOCK_R"]), programs)
    dweight, dbias = (x.new_empty(programs, H, dtype=torch.float32) for _ in range(2))
    if T:
        pointers = (dy, x, residual, weight.contiguous(), mean, rstd, dx, dresidual, dweight, dbias, seed)
        scalars = (T, H, _threshold(dropout_p), 1 / (1 - dropout_p))
        _launch(_layer_norm_backward, (programs,), *pointers, *scalars, **shapes, **flags)
    return dx, dresidual, dweight.sum(0), dbias.sum(0)


@_layer_norm_backward_op.register_fake
def _(dy, x, residual, weight, mean, rstd, dropout_p, seed):
    dresidual = residual.new_empty(residual.shape) if residual is not None and dropout_p > 0 else x.new_empty(0)
    return x.new_empty(x.shape), dresidual, mean.new_empty(x.shape[1]), mean.new_empty(x.shape[1])


def _layer_norm_context(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.dropout_p, seed = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(x, residual, weight, *output[1:], seed)


def _layer_norm_gradient(ctx, dy, dmean, drstd):
    x, residual, weight, mean, rstd, seed = ctx.saved_tensors
    dx, dresidual, dweight, dbias = _layer_norm_backward_op(dy, x, residual, weight, mean, rstd, ctx.dropout_p, seed)
    if residual is None:
        dresidual = None
    elif ctx.dropout_p == 0.0:
        dresidual = dx.to(residual.dtype)
    return dx, dresidual, dweight.to(weight.dtype), dbias.to(ctx.bias_dtype), None, None, None


_layer_norm_op.register_autograd(_layer_norm_gradient, setup_context=_layer_norm_context)


@torch.library.custom_op("starencoder::dropout", mutates_args=())
def _dropout_op(x: torch.Tensor, dropout_p: float, seed: torch.Tensor) -> torch.Tensor:
    (T, H), x, (shapes, _) = x.shape, x.contiguous(), _rows("norm", x)
    y = torch.empty_like(x)
    if T:
        scalars = (T, H, _threshold(dropout_p), 1 / (1 - dropout_p))
        _launch(_dropout_kernel, (-(-T // shapes["BLOCK_R"]),), x, y, seed, *scalars, **shapes)
    return y


@_dropout_op.register_fake
def _(x, dropout_p, seed):
    return x.new_empty(x.shape)


def _dropout_context(ctx, inputs, output):
    _, ctx.dropout_p, seed = inputs
    ctx.save_for_backward(seed)


def _dropout_gradient(ctx, dy):
    return _dropout_op(dy, ctx.dropout_p, *ctx.saved_tensors), None, None


_dropout_op.register_autograd(_dropout_gradient, setup_context=_dropout_context)
