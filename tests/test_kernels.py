"""The two operations: their formulas, their dropout masks, what they refuse."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import kernels

lengths_strategy = st.lists(st.integers(0, 40), min_size=1, max_size=6)


def packed_qkv(lengths, heads, size, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor(np.concatenate([[0], np.cumsum(lengths)]), dtype=torch.int32)
    return torch.randn(sum(lengths), 3, heads, size, generator=generator, dtype=torch.float64).to(dtype), cu_seqlens


def test_philox_gives_the_published_words():
    """The known answers of Random123 (kat_vectors), for the zero counter and key."""
    zero = torch.zeros(1, dtype=torch.int64)
    words = lambda rounds: [hex(word.item()) for word in kernels.philox(0, zero, zero, zero, rounds)]
    assert words(10) == ["0x6627e8d5", "0xe169c58d", "0xbc57ac4c", "0x9b00dbd8"]
    assert words(7) == ["0x5f6fb709", "0xd893f64", "0x4f121f81", "0x4f730a48"]


def test_philox_gives_the_words_of_triton():
    """`tl.philox`, under Triton's interpreter, on the same counters, so that a kernel can make the same masks."""
    triton = pytest.importorskip("triton")
    import triton.language as tl

    @triton.jit
    def words(out_ptr, counters_ptr, seed, SIZE: tl.constexpr):
        i = tl.arange(0, SIZE)
        c0, c1, c2 = tl.load(counters_ptr + i), tl.load(counters_ptr + SIZE + i), tl.load(counters_ptr + 2 * SIZE + i)
        r0, r1, r2, r3 = tl.philox(seed, c0, c1, c2, c2 * 0, n_rounds=7)
        tl.store(out_ptr + i, r0)
        tl.store(out_ptr + SIZE + i, r1)
        tl.store(out_ptr + 2 * SIZE + i, r2)
        tl.store(out_ptr + 3 * SIZE + i, r3)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    counters = torch.randint(0, 2**31, (3, 64), generator=torch.Generator().manual_seed(0)).to(device)
    for seed in (0, 1, 2**31, 2**32 + 5, 2**62 - 1):
        out = torch.empty(4, 64, dtype=torch.int32, device=device)
        words[(1,)](out, counters.int(), seed, SIZE=64)
        assert torch.equal(out.long() & 0xFFFFFFFF, torch.stack(kernels.philox(seed, *counters)))


@given(seed=st.integers(0, 2**62), p=st.sampled_from([0.0, 0.1, 0.5, 0.9]), columns=st.integers(1, 70))
def test_dropout_is_a_function_of_seed_and_element(seed, p, columns):
    x = torch.ones(300, columns, dtype=torch.float64)
    y = kernels.dropout(x, p, seed)
    assert torch.equal(y, kernels.dropout(x, p, torch.tensor(seed)))  # an int or a tensor
    assert torch.equal(y[:, : columns // 2], kernels.dropout(x[:, : columns // 2], p, seed))  # whatever else stands there
    assert set(y.unique().tolist()) <= {0.0, 1 / (1 - p)}
    kept, n = (y != 0).sum().item(), y.numel()
    assert abs(kept - n * (1 - p)) <= 6 * (n * p * (1 - p)) ** 0.5 + 1e-9
    if p and n > 1000:
        assert not torch.equal(y, kernels.dropout(x, p, seed + 1))


@given(lengths=lengths_strategy, heads=st.integers(1, 3), size=st.sampled_from([2, 5, 16]), seed=st.integers(0, 2**31))
def test_attention_is_that_of_pytorch(lengths, heads, size, seed):
    qkv, cu_seqlens = packed_qkv(lengths, heads, size, seed)
    out = kernels.attention(qkv.requires_grad_(), cu_seqlens, 40)
    parts = [F.scaled_dot_product_attention(*part.permute(1, 2, 0, 3)).transpose(0, 1) for part in qkv.split(lengths) if len(part)]
    expected = torch.cat([qkv[:0, 0], *parts])
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(out)
    for ours, theirs in zip(torch.autograd.grad(out, qkv, upstream), torch.autograd.grad(expected, qkv, upstream)):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@given(lengths=lengths_strategy, seed=st.integers(0, 2**62), p=st.sampled_from([0.1, 0.5]))
def test_attention_dropout_multiplies_the_weights(lengths, seed, p):
    """With V the identity the output is the weights: each is 0 or what it is without dropout, scaled."""
    qkv, cu_seqlens = packed_qkv(lengths, 2, 40, seed % 1000)
    qkv[:, 2] = torch.cat([qkv.new_zeros(0, 40), *[torch.eye(n, 40) for n in lengths]])[:, None]
    weights = kernels.attention(qkv, cu_seqlens, 40)
    dropped = kernels.attention(qkv, cu_seqlens, 40, dropout_p=p, seed=seed)
    assert torch.equal(dropped, kernels.attention_reference(qkv, cu_seqlens, 40, dropout_p=p, seed=seed))
    torch.testing.assert_close(dropped, torch.where(dropped != 0, weights / (1 - p), 0.0))
    n = (weights > 0).sum().item()
    assert abs((dropped > 0).sum().item() - n * (1 - p)) <= 6 * (n * p * (1 - p)) ** 0.5 + 1e-9


@given(rows=st.integers(0, 20), columns=st.integers(1, 100), seed=st.integers(0, 2**31), p=st.sampled_from([0.0, 0.3]))
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
    assert out.dtype == dtype and (out.double() - expected).abs().max() < 2 ** (-7 if dtype is torch.bfloat16 else -9)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(qkv=torch.zeros(5, 2, 2, 4)), "qkv must be (T, 3, N, D)"),
        (dict(qkv=torch.zeros(5, 3, 2, 4, dtype=torch.int64)), "floating point"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "int32"),
        (dict(cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)), "T = 5"),
        (dict(cu_seqlens=torch.tensor([1, 5], dtype=torch.int32)), "T = 5"),
        (dict(cu_seqlens=torch.tensor([0, 4, 3, 5], dtype=torch.int32)), "rise"),
        (dict(max_seqlen=4), "max_seqlen = 4"),
        (dict(dropout_p=1.0), "dropout_p"),
        (dict(dropout_p=-0.1), "dropout_p"),
    ],
)
def test_attention_refuses(change, words):
    arguments = dict(qkv=torch.zeros(5, 3, 2, 4), cu_seqlens=torch.tensor([0, 5], dtype=torch.int32), max_seqlen=5) | change
    with pytest.raises(ValueError) as error:
        kernels.attention(**arguments)
    assert words in str(error.value)


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
