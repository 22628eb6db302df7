"""The two operations of the encoder that are worth a kernel of their own: attention and fused dropout + residual + LayerNorm.

    attention   O = dropout(softmax(Q K^T / sqrt(D))) V         within each sequence, in both directions, no mask
    layer_norm  y = LN(dropout(x) + residual),  LN(h) = (h - mean) / sqrt(var + eps) * weight + bias

Sequences are packed: the tokens of a micro-batch stand end to end in one axis of length T, and `cu_seqlens` (B+1,) int32 says where
each begins, so no padding token is ever computed. Letters: B sequences, T tokens, N heads, D head size, H = N*D hidden.

**Dropout by counter.** A mask is never stored and never drawn from a global generator: whether an element is kept is a pure function of
(seed, coordinates of the element), by the counter-based generator Philox 4x32-10. A backward pass, a second machine or a GPU kernel
makes the same bits again from the seed alone, and training needs no generator state to resume exactly.
One Philox call gives four 32-bit words, and they serve four neighbouring elements:

    word(seed, c0, c1, c2)[lane]   key = the 64 bits of seed, counter = (c0, c1, c2, 0)
    layer_norm, dropout            x[row, column]:                    c0 = column // 4, c1 = row,   c2 = 0,    lane = column % 4
    attention                      P[head, query, key] of a sequence: c0 = key // 4,    c1 = query, c2 = head, lane = key % 4
                                   (query: its row in the packed batch; key: its position in its sequence)
    kept if word >= p * 2**32, and then scaled by 1 / (1 - p)

References: Vaswani et al., Attention Is All You Need, 2017, section 3.2; Ba et al., Layer Normalization, 2016; Salmon et al., Parallel
Random Numbers: As Easy as 1, 2, 3, SC 2011 (Philox; the same words as `tl.philox` of Triton and `Philox4x32-10` of Random123).

Left out: causal masks, cross attention, more query heads than key heads, derivatives of second order.
"""

import os
from itertools import groupby

import torch
import torch.nn.functional as F


def backend(tensor):
    """Which implementation serves `tensor`: "torch", the plain formulas below, on every device.

    `STARENCODER_KERNELS` may say so explicitly; raises ValueError where it asks for anything else.
    """
    asked = os.environ.get("STARENCODER_KERNELS", "torch")
    if asked != "torch":
        raise ValueError(f"STARENCODER_KERNELS={asked}: this version has the kernels in PyTorch only; unset it or set it to torch")
    return "torch"


# ---- dropout by counter ----------------------------------------------------------------------------------------------------------

PHILOX_ROUND_A, PHILOX_ROUND_B = 0xD2511F53, 0xCD9E8D57
PHILOX_KEY_A, PHILOX_KEY_B = 0x9E3779B9, 0xBB67AE85
LOW = 0xFFFFFFFF


def philox(seed, c0, c1, c2):
    """Philox 4x32-10 of Salmon et al., section 3.3: four random 32-bit words for each counter (c0, c1, c2, 0) under the key `seed`.

    seed: int or 0-d int64 tensor. c0, c1, c2: int64 tensors with values below 2**32 that broadcast together to a shape S.
    Returns int64 (*S, 4) with values in [0, 2**32). PyTorch has no uint32 arithmetic: words live in int64, where a product wraps
    modulo 2**64 just as the hardware's does, and `& LOW` after each step keeps 32 bits.
    """
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    k0, k1 = seed & LOW, (seed >> 32) & LOW
    for _ in range(10):
        product_a, product_b = c0 * PHILOX_ROUND_A, c2 * PHILOX_ROUND_B
        c0, c1, c2, c3 = ((product_b >> 32) & LOW) ^ c1 ^ k0, product_b & LOW, ((product_a >> 32) & LOW) ^ c3 ^ k1, product_a & LOW
        k0, k1 = (k0 + PHILOX_KEY_A) & LOW, (k1 + PHILOX_KEY_B) & LOW
    return torch.stack([c0, c1, c2, c3], dim=-1)


def dropout_keep(seed, dropout_p, columns, row, head):
    """Which elements dropout keeps: bool, `columns` wide. row, head: int64 tensors that broadcast to the shape of a column, with a
    last axis of 1; an element is kept with probability 1 - dropout_p."""
    group = torch.arange((columns + 3) // 4, device=row.device)  # one counter serves four neighbouring columns
    words = philox(seed, group, row, head)  # (..., columns / 4, 4)
    return words.flatten(-2)[..., :columns] >= round(dropout_p * 2**32)


def _check_dropout(dropout_p):
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must lie in [0, 1), got {dropout_p}")


def dropout(x, dropout_p, seed):
    """Dropout alone, where no LayerNorm follows (the embeddings, a classifier). x (T, H) -> (T, H) of the same dtype."""
    _check_dropout(dropout_p)
    if dropout_p == 0.0:
        return x
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    keep = dropout_keep(seed, dropout_p, x.shape[1], row, torch.zeros_like(row))
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
    if cu_seqlens.device != qkv.device:
        raise ValueError(f"cu_seqlens must lie on the device of qkv, {qkv.device}, got {cu_seqlens.device}")
    if cu_seqlens.device.type == "cpu":
        lengths = cu_seqlens.diff()
        if cu_seqlens[0] != 0 or cu_seqlens[-1] != len(qkv) or (lengths < 0).any():
            raise ValueError(f"cu_seqlens must rise from 0 to T = {len(qkv)}, got {cu_seqlens.tolist()[:8]} ... {int(cu_seqlens[-1])}")
        if len(lengths) and lengths.max() > max_seqlen:
            raise ValueError(f"max_seqlen = {max_seqlen} is below the longest sequence, {int(lengths.max())}")
    _check_dropout(dropout_p)
    backend(qkv)
    return attention_reference(qkv, cu_seqlens, max_seqlen, dropout_p=dropout_p, seed=seed)


def attention_reference(qkv, cu_seqlens, max_seqlen, *, dropout_p=0.0, seed=0):
    """The naive twin of `attention`: the formula as it is written, any float dtype, memory quadratic in the length.

    Neighbouring sequences of equal length L are computed as one batch, since most windows of a corpus are full.
    """
    (_, _, N, D), outputs, start = qkv.shape, [qkv[:0, 0]], 0
    for L, run in groupby(cu_seqlens.diff().tolist()):
        B = len(list(run))
        q, k, v = qkv[start : start + B * L].reshape(B, L, 3, N, D).permute(2, 0, 3, 1, 4)  # each (B, N, L, D)
        scores = (q * D**-0.5) @ k.transpose(-1, -2)  # (B, N, L, L)
        weights = scores.softmax(-1)  # PyTorch accumulates in fp32 at least
        if dropout_p > 0.0:
            query = torch.arange(start, start + B * L, device=qkv.device).view(B, 1, L, 1)
            keep = dropout_keep(seed, dropout_p, L, query, torch.arange(N, device=qkv.device).view(1, N, 1, 1))
            weights = weights * keep * (1 / (1 - dropout_p))
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
    if x.dim() != 2 or not x.is_floating_point():
        raise ValueError(f"x must be (T, H) floating point, got {tuple(x.shape)} {x.dtype}")
    if weight.shape != x.shape[1:] or bias.shape != x.shape[1:]:
        raise ValueError(f"weight and bias must be ({x.shape[1]},), got {tuple(weight.shape)} and {tuple(bias.shape)}")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be like x, {tuple(x.shape)}, got {tuple(residual.shape)}")
    _check_dropout(dropout_p)
    backend(x)
    return layer_norm_reference(x, weight, bias, eps, residual=residual, dropout_p=dropout_p, seed=seed)


def layer_norm_reference(x, weight, bias, eps, *, residual=None, dropout_p=0.0, seed=0):
    """The naive twin of `layer_norm`, in any float dtype; what is below fp32 is computed in fp32 and rounded once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    h = dropout(x.to(wide), dropout_p, seed)
    if residual is not None:
        h = h + residual.to(wide)
    return F.layer_norm(h, h.shape[1:], weight.to(wide), bias.to(wide), eps).to(x.dtype)
