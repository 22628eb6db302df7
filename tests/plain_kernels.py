"""`attention` and `layer_norm` in a few lines of PyTorch: a file that the judge must pass.

    pytest tests/test_triton.py --kernels tests/plain_kernels.py

The contract of both is in kernels.py. Everything is computed in fp64 and rounded once, at the end.
The project's checks of arguments and its dropout masks are used as they are.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

import kernels


def attention(qkv, cu_seqlens, max_seqlen, *, dropout_p=0.0, seed=0):
    """All sequences at once, padded with zeros to the longest one, L tokens."""
    kernels.check_attention(qkv, cu_seqlens, max_seqlen)
    kernels.check_dropout(dropout_p, seed)
    T, _, N, D = qkv.shape
    lengths = cu_seqlens.diff()  # (B,)
    sequences = qkv.double().split(lengths.tolist())
    q, k, v = pad_sequence(sequences, batch_first=True).permute(2, 0, 3, 1, 4)  # (B, N, L, D)
    L = q.shape[2]
    inside = torch.arange(L, device=qkv.device) < lengths[:, None]  # (B, L)

    scores = q @ k.mT / D**0.5  # (B, N, L, L)
    scores = scores.masked_fill(~inside[:, None, None, :], float("-inf"))
    weights = scores.softmax(-1)
    if dropout_p > 0.0:
        head = torch.arange(N, device=qkv.device)  # (N,)
        start = cu_seqlens[:-1, None].long()  # (B, 1)
        keep = kernels.attention_keep(seed, dropout_p, head, start, L)
        weights = weights * keep / (1 - dropout_p)
    out = (weights @ v).transpose(1, 2)  # (B, L, N, D)
    return out[inside].to(qkv.dtype)  # (T, N, D)


def layer_norm(x, weight, bias, eps, *, residual=None, dropout_p=0.0, seed=0):
    kernels.check_layer_norm(x, weight, bias, residual)
    kernels.check_dropout(dropout_p, seed)
    h = x.double()
    if dropout_p > 0.0:
        keep = kernels.dropout_keep(seed, dropout_p, *x.shape, x.device)
        h = h * keep / (1 - dropout_p)
    if residual is not None:
        h = h + residual.double()
    return Norm.apply(h, weight.double(), bias.double(), eps).to(x.dtype)


class Norm(torch.autograd.Function):
    """y = n weight + bias, where n = (h - mean) rstd, and its derivative by hand."""

    @staticmethod
    def forward(ctx, h, weight, bias, eps):
        h = h - h[:, :1]  # so that the mean of a constant row is exactly 0
        centered = h - h.mean(1, keepdim=True)
        rstd = 1 / (centered.square().mean(1, keepdim=True) + eps).sqrt()
        n = centered * rstd
        ctx.save_for_backward(n, rstd, weight)
        return n * weight + bias

    @staticmethod
    def backward(ctx, dy):
        n, rstd, weight = ctx.saved_tensors
        g = dy * weight
        mean_g = g.mean(1, keepdim=True)
        mean_gn = (g * n).mean(1, keepdim=True)
        dh = (g - mean_g - n * mean_gn) * rstd
        return dh, (dy * n).sum(0), dy.sum(0), None
