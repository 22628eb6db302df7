"""The operations: their formulas, their dropout masks, what they refuse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels

lengths_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=6)


def packed_qkv(lengths, heads, size, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    qkv = torch.randn(sum(lengths), 3, heads, size, generator=generator, dtype=torch.float64)
    return qkv.to(dtype), cu_seqlens


@pytest.mark.parametrize(
    "rounds, key, counter, words",
    [
        (7, 0, (0, 0), (0x257A3673, 0xCD26BE2A)),
        (7, 0xFFFFFFFF, (0xFFFFFFFF, 0xFFFFFFFF), (0xAB302C4D, 0x3DC9D239)),
        (7, 0x13198A2E, (0x243F6A88, 0x85A308D3), (0xBEDBBE6B, 0xE4C770B3)),
        (10, 0, (0, 0), (0xFF1DAE59, 0x6CD10DF2)),
    ],
)
def test_philox_gives_the_published_words(rounds, key, counter, words):
    """The known answers of Random123 (kat_vectors), with ints and with tensors."""
    assert kernels.philox(key, *counter, rounds) == words
    key, c0, c1 = (torch.tensor([value]) for value in (key, *counter))
    assert tuple(word.item() for word in kernels.philox(key, c0, c1, rounds)) == words


def compared(seed, p):
    """{what: two masks of which each element of one should know nothing of that of the other}."""
    head = torch.arange(4)[:, None]
    start = torch.tensor([0, 1, 512])[None, :]
    keep = kernels.attention_keep(seed, p, head, start, 512)  # (4, 3, L, L)
    other_seed = kernels.attention_keep(seed + 2**32, p, head, start, 512)
    rows = kernels.dropout_keep(seed, p, 3000, 768)
    pairs = {
        "seeds": (keep, other_seed),
        "heads": (keep[1:], keep[:-1]),
        "sequences": (keep[:, 1:], keep[:, :-1]),
    }
    for distance in (1, 2, 4, 8, 16):
        ahead = slice(distance, None)
        behind = slice(None, -distance)
        pairs[f"queries, {distance} apart"] = (keep[..., ahead, :], keep[..., behind, :])
        pairs[f"keys, {distance} apart"] = (keep[..., ahead], keep[..., behind])
        pairs[f"both, {distance} apart"] = (keep[..., ahead, ahead], keep[..., behind, behind])
        pairs[f"rows, {distance} apart"] = (rows[ahead], rows[behind])
        pairs[f"columns, {distance} apart"] = (rows[:, ahead], rows[:, behind])
    upper = torch.ones(512, 512).triu(1).bool()
    pairs["transposed"] = (keep[..., upper], keep.transpose(-1, -2)[..., upper])
    return {"rate": (keep, None), "rate of rows": (rows, None)} | pairs


@pytest.mark.slow
def test_masks_are_independent_of_their_neighbours():
    """Keep rate; correlations of neighbours in both axes, at the 8 of a shared counter, and across
    heads, sequences and seeds: each within 4 standard deviations.

    With HYPOTHESIS_PROFILE=thorough the masks have 10^8 elements.
    """
    p = 0.25
    thorough = settings().max_examples > 100
    totals = {}  # {what: (sum, number of elements)}
    for seed in range(32 if thorough else 1):
        for what, (a, b) in compared(seed, p).items():
            # (kept - rate) of one element, or the product of two, has the mean 0.
            centered = a.float() - (1 - p)
            if b is not None:
                centered = centered * (b.float() - (1 - p))
            total, n = totals.get(what, (0.0, 0))
            totals[what] = (total + centered.sum(dtype=torch.float64).item(), n + a.numel())
    for what, (total, n) in totals.items():
        variance = p * (1 - p) if "rate" in what else (p * (1 - p)) ** 2
        deviations = total / (n * variance) ** 0.5
        print(f"{what:20} {n:12,} elements, {deviations:5.2f} standard deviations")
        assert abs(deviations) <= 4, what


@given(
    seed=st.integers(0, 2**62), p=st.sampled_from([0.0, 0.1, 0.5, 0.9]), columns=st.integers(1, 70)
)
def test_dropout_is_a_function_of_seed_and_element(seed, p, columns):
    x = torch.ones(300, columns, dtype=torch.float64)
    y = kernels.dropout(x, p, seed)
    assert torch.equal(y, kernels.dropout(x, p, torch.tensor(seed)))  # an int or a tensor
    # The other columns do not matter.
    some = columns // 2
    assert torch.equal(y[:, :some], kernels.dropout(x[:, :some], p, seed))
    assert set(y.unique().tolist()) <= {0.0, 1 / (1 - p)}
    kept = (y != 0).sum().item()
    n = y.numel()
    assert abs(kept - n * (1 - p)) <= 6 * (n * p * (1 - p)) ** 0.5 + 1e-9
    if p and n > 1000:
        assert not torch.equal(y, kernels.dropout(x, p, seed + 1))


@given(
    lengths=lengths_strategy,
    heads=st.integers(1, 3),
    size=st.sampled_from([2, 5, 16]),
    seed=st.integers(0, 2**31),
)
def test_attention_is_that_of_pytorch(lengths, heads, size, seed):
    qkv, cu_seqlens = packed_qkv(lengths, heads, size, seed)
    out = kernels.attention(qkv.requires_grad_(), cu_seqlens, 40)
    parts = [qkv[:0, 0]]
    for part in qkv.split(lengths):
        if len(part):
            q, k, v = part.permute(1, 2, 0, 3)  # each (N, L, D)
            parts.append(F.scaled_dot_product_attention(q, k, v).transpose(0, 1))
    expected = torch.cat(parts)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    (ours,) = torch.autograd.grad(out, qkv, upstream)
    (theirs,) = torch.autograd.grad(expected, qkv, upstream)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@given(lengths=lengths_strategy, heads=st.integers(1, 3), seed=st.integers(0, 2**31))
def test_attention_is_the_same_where_nothing_is_trained(lengths, heads, seed):
    """Then it is another path."""
    qkv, cu_seqlens = packed_qkv(lengths, heads, 16, seed)
    expected = kernels.attention_reference(qkv, cu_seqlens, 40)
    out = kernels.attention(qkv, cu_seqlens, 40)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)


@given(lengths=lengths_strategy, seed=st.integers(0, 2**62), p=st.sampled_from([0.1, 0.5]))
def test_attention_dropout_multiplies_the_weights(lengths, seed, p):
    """With V = 1 the output is the weights: each is 0, or scaled by 1 / (1 - p)."""
    qkv, cu_seqlens = packed_qkv(lengths, 2, 40, seed % 1000)
    qkv[:, 2] = torch.cat([torch.eye(n, 40) for n in lengths])[:, None]
    weights = kernels.attention(qkv, cu_seqlens, 40)
    dropped = kernels.attention(qkv, cu_seqlens, 40, dropout_p=p, seed=seed)
    naive = kernels.attention_reference(qkv, cu_seqlens, 40, dropout_p=p, seed=seed)
    torch.testing.assert_close(dropped, naive, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dropped, torch.where(dropped != 0, weights / (1 - p), 0.0))
    n = (weights > 0).sum().item()
    assert abs((dropped > 0).sum().item() - n * (1 - p)) <= 6 * (n * p * (1 - p)) ** 0.5 + 1e-9


@given(
    rows=st.integers(0, 20),
    columns=st.integers(1, 100),
    seed=st.integers(0, 2**31),
    p=st.sampled_from([0.0, 0.3]),
)
def test_layer_norm_is_its_formula(rows, columns, seed, p):
    torch.manual_seed(seed)
    x, residual = torch.randn(2, rows, columns, dtype=torch.float64) * 5 + 100
    weight, bias = torch.randn(2, columns, dtype=torch.float64)
    h = kernels.dropout(x, p, seed) + residual
    mean = h.mean(1, keepdim=True)
    var = (h - mean).square().mean(1, keepdim=True)
    expected = (h - mean) / (var + 1e-6).sqrt() * weight + bias
    out = kernels.layer_norm(x, weight, bias, 1e-6, residual=residual, dropout_p=p, seed=seed)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_layer_norm_statistics_are_wide(dtype):
    """Small differences on a large offset survive in half precision: the sums are taken in fp32."""
    x = (1000 + torch.arange(64.0)).repeat(3, 1).to(dtype)
    out = kernels.layer_norm(x, torch.ones(64), torch.zeros(64), 1e-12)
    expected = F.layer_norm(x.double(), (64,), eps=1e-12)
    tolerance = 2**-7 if dtype is torch.bfloat16 else 2**-9
    assert out.dtype == dtype
    assert (out.double() - expected).abs().max() < tolerance


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(qkv=torch.zeros(5, 2, 2, 4)), "qkv must be (T, 3, N, D)"),
        (dict(qkv=torch.zeros(5, 3, 2, 4, dtype=torch.int64)), "floating point"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "int32"),
        (dict(cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)), "T = 5"),
        (dict(cu_seqlens=torch.tensor([1, 5], dtype=torch.int32)), "T = 5"),
        (dict(cu_seqlens=torch.tensor([0, 4, 3, 5], dtype=torch.int32)), "non-decreasing"),
        (dict(max_seqlen=4), "max_seqlen = 4"),
        (dict(dropout_p=1.0), "dropout_p"),
        (dict(dropout_p=-0.1), "dropout_p"),
    ],
)
def test_attention_refuses(change, words):
    cu_seqlens = torch.tensor([0, 5], dtype=torch.int32)
    sound = dict(qkv=torch.zeros(5, 3, 2, 4), cu_seqlens=cu_seqlens, max_seqlen=5)
    with pytest.raises(ValueError) as error:
        kernels.attention(**sound | change)
    assert words in str(error.value)


@pytest.mark.parametrize("residual_dtype", [None, torch.bfloat16, torch.float32])
def test_layer_norm_in_bfloat16_where_nothing_is_trained(residual_dtype):
    """Then it is another path: beside the reference the sum with the residual is rounded, too."""
    generator = torch.Generator().manual_seed(0)
    x, residual = torch.randn(2, 50, 64, generator=generator)
    weight, bias = torch.randn(2, 64, generator=generator)
    x = x.bfloat16()
    residual = None if residual_dtype is None else residual.to(residual_dtype)
    expected = kernels.layer_norm_reference(x, weight, bias, 1e-12, residual=residual)
    with torch.no_grad():
        out = kernels.layer_norm(x, weight, bias, 1e-12, residual=residual)
    assert out.dtype == expected.dtype == torch.bfloat16
    # A rounding moves a number by 2^-9 of itself at most: that of the sum (up to 6 here, times a
    # weight of up to 3.5), and that of the output.
    torch.testing.assert_close(out, expected, rtol=2**-7, atol=6 * 3.5 * 2**-9)


def test_layer_norm_refuses():
    x, w = torch.zeros(3, 8), torch.zeros(8)
    for arguments in ((x[0], w, w), (x, w[:7], w), (x, w, w[:7])):
        with pytest.raises(ValueError):
            kernels.layer_norm(*arguments, 1e-6)
    with pytest.raises(ValueError, match="residual"):
        kernels.layer_norm(x, w, w, 1e-6, residual=x[:2])


def test_backend(monkeypatch):
    assert kernels.backend(torch.zeros(1)) == "torch"
    monkeypatch.setenv("STARENCODER_KERNELS", "tritton")
    with pytest.raises(ValueError, match="tritton"):
        kernels.backend(torch.zeros(1))
