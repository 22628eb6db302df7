"""The properties of the Triton kernels, under the interpreter on a CPU, and what they compile to.

On a CUDA device the same tests run on the device itself, in bf16 as well.

`pytest tests/test_triton.py --kernels FILE` judges another file's operations by the tests that have
the mark `judges`. `judged` is the module of that file, by default the project's `kernels`. The
formulas and the dropout masks are always the project's.
"""

import functools
import itertools
import json
import os

import pytest
import torch
from conftest import command, kernels_under_test
from hypothesis import example, given, settings
from hypothesis import strategies as st

import data
import kernels
import train
from starencoder import StarEncoderConfig, StarEncoderForPreTraining

if not kernels.HAS_TRITON:
    pytest.skip("there is no Triton here", allow_module_level=True)

from quick_interpreter import hurry

judged = kernels_under_test()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
on_a_gpu_only = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")]
DTYPES = [torch.float32, torch.float16]
if DEVICE == "cuda":  # the interpreter's bf16 products are garbage
    DTYPES.append(torch.bfloat16)


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Makes the interpreter faster for this file; `undo` makes it Triton's again."""
    with pytest.MonkeyPatch.context() as patch:
        if kernels.INTERPRETED:
            hurry(patch)
        yield patch


# More than a row of any tensor in these tests: a kernel that strays by a row writes into a guard.
GUARD = 4096
guards = []  # what lies in front of each output, and behind it


def poisoned(tensor):
    """An uninitialized tensor, filled with NaN, and with a guard of NaN on either side."""
    if not tensor.is_floating_point():
        return tensor
    size = tensor.numel()
    memory = torch.full(
        (GUARD + size + GUARD,), float("nan"), dtype=tensor.dtype, device=tensor.device
    )
    guards.append(memory[:GUARD])
    guards.append(memory[GUARD + size :])
    return tensor.set_(memory.untyped_storage(), GUARD, tensor.shape, tensor.stride())


def assert_nothing_is_written_outside():
    while guards:
        assert guards.pop().isnan().all(), "a kernel wrote outside of its output"


@pytest.fixture(autouse=True)
def triton_with_poisoned_outputs(monkeypatch):
    """What a kernel fails to write is NaN, and what it writes outside of an output is seen."""
    monkeypatch.setenv("STARENCODER_KERNELS", "triton")
    poison_outputs(monkeypatch)
    yield
    assert_nothing_is_written_outside()


def poison_outputs(monkeypatch):
    """From here on, what is allocated for an output is poisoned."""
    guards.clear()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        allocate = getattr(owner, name)

        def allocate_poisoned(*arguments, allocate=allocate, **keywords):
            return poisoned(allocate(*arguments, **keywords))

        monkeypatch.setattr(owner, name, allocate_poisoned)


# The corners of tiles (blocks are of 32 and 64), of nothing and of much.
corner = st.sampled_from([0, 1, 2, 3, 31, 32, 33, 63, 64, 65, 127, 128, 129])
lengths_strategy = st.one_of(
    st.lists(corner, min_size=1, max_size=3), st.lists(st.integers(0, 9), min_size=8, max_size=16)
)
# The interpreter takes a second for what a chip does in microseconds.
few = settings(max_examples=max(8, settings().max_examples // 4))
heads = st.integers(1, 3)
sizes = st.sampled_from([16, 24, 32, 64, 128])
seeds = st.integers(0, 2**62)
dropouts = st.sampled_from([0.0, 0.1, 0.5])
dtypes = st.sampled_from(DTYPES)


def packed(lengths, N, D, seed, dtype=torch.float32):
    """Random qkv of sequences of these lengths, cu_seqlens, and the greatest length."""
    torch.manual_seed(seed)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    qkv = torch.randn(sum(lengths), 3, N, D, device=DEVICE).to(dtype)
    return qkv, cu_seqlens.to(DEVICE), max(max(lengths), 1)


def attention_of(cu_seqlens, longest, dropout_p=0.0, seed=0):
    """`judged.attention` as a function of qkv alone."""
    return functools.partial(
        judged.attention, cu_seqlens=cu_seqlens, max_seqlen=longest, dropout_p=dropout_p, seed=seed
    )


def with_gradients(function, inputs, upstream, dtype=None):
    """The output of function(*inputs) and the gradients of the inputs that are not None, computed
    in `dtype`."""
    inputs = [
        None if x is None else x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs
    ]
    out = function(*inputs)
    leaves = [x for x in inputs if x is not None]
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    assert_nothing_is_written_outside()
    return [out.detach(), *gradients]


def assert_as_good_as_pytorch(ours, same_dtype, exact, rounding):
    """The error is at most 2x (forward) or 3x (gradients) that of PyTorch's formula in the same
    dtype, plus what rounding costs.

    rounding: what it costs each number of each tensor.
    """
    for k, (a, b, c) in enumerate(zip(ours, same_dtype, exact, strict=True)):
        if not c.numel():
            continue
        assert a.isfinite().all() and a.shape == c.shape and a.dtype == b.dtype
        factor = 2 if k == 0 else 3
        allowed = factor * (b.double() - c).abs().max().item() + rounding[k].max().item()
        assert (a.double() - c).abs().max().item() <= allowed, k


def rounding_of_attention(qkv, cu_seqlens, dropout_p, upstream):
    """What rounding costs each number of the output and of the gradients of Q, K and V, each
    (T, N, D).

    It follows from what is added up, not from the sums, since these may cancel. In
    dS = P (dP - delta), both dP = dO V^T and delta = rowsum(O dO) are sums of D products. For a
    sequence of one token both are equal, and dS is exactly 0.
    A sum of n products is of the size of the root of their sum of squares. Its n roundings in fp32
    are independent, and add up to sqrt(n) eps of that size. Its factors were rounded to the dtype
    of qkv, which costs another eps of that. Let e be both together:

        S = Q K^T / sqrt(D)     off by e sqrt((Q^2) (K^2)^T / D); P = exp(S - lse) by that part of
                                itself
        dP = dO V^T             off by e sqrt((dO^2) (V^2)^T) =: e A; delta by at most e rowsum(P A)
        O = P V, dV = P^T dO    off by (error of P) |V|, (error of P)^T |dO|
        dQ = dS K / sqrt(D)     off by (error of dS) |K| / sqrt(D), where that of dS is
                                (error of P) (A + rowsum(P A)); dK likewise
    """
    parts = []
    lengths = cu_seqlens.diff().tolist()
    for tokens, dout in zip(qkv.double().split(lengths), upstream.double().split(lengths)):
        q, k, v = tokens.permute(1, 2, 0, 3)  # each (N, L, D)
        dout = dout.transpose(0, 1)  # (N, L, D)
        _, L, D = q.shape
        e = torch.finfo(qkv.dtype).eps + max(L, D) ** 0.5 * torch.finfo(torch.float32).eps
        weights = (q @ k.mT / D**0.5).softmax(-1) / (1 - dropout_p)  # (N, L, L)
        weights_off = e * weights * (1 + (q.square() @ k.square().mT / D).sqrt())
        size = (dout.square() @ v.square().mT).sqrt()
        ds_off = weights_off * (size + (weights * size).sum(-1, keepdim=True)) / D**0.5
        off = [
            weights_off @ v.abs(),  # of the output
            ds_off @ k.abs(),  # of dQ
            ds_off.mT @ q.abs(),  # of dK
            weights_off.mT @ dout.abs(),  # of dV
        ]
        parts.append([x.transpose(0, 1) for x in off])
    return [torch.cat(part) for part in zip(*parts)]


def attention_runs(qkv, upstream, dtype, rest):
    """The output and the gradients of Q, K and V: by the kernels and by the formula in dtype, and
    by the formula in fp64."""
    runs = []
    for function, computed_in in (
        (judged.attention, dtype),
        (kernels.attention_reference, dtype),
        (kernels.attention_reference, torch.float64),
    ):
        call = functools.partial(function, **rest)
        out, gradient = with_gradients(call, [qkv], upstream, computed_in)
        runs.append([out, *gradient.unbind(1)])
    return runs


def check_attention(lengths, N, D, seed, p, dtype):
    qkv, cu_seqlens, longest = packed(lengths, N, D, seed, dtype)
    upstream = torch.randn(sum(lengths), N, D, device=DEVICE).to(dtype)
    rest = dict(cu_seqlens=cu_seqlens, max_seqlen=longest, dropout_p=p, seed=seed)
    runs = attention_runs(qkv, upstream, dtype, rest)
    assert_as_good_as_pytorch(*runs, rounding_of_attention(qkv, cu_seqlens, p, upstream))


# Whole blocks and partial ones, of heads that are narrower than a tile.
@pytest.mark.judges("attention")
@example(lengths=[129, 64], N=2, D=24, seed=0, p=0.1, dtype=torch.float32)
@settings(max_examples=settings().max_examples // 2)
@given(lengths=lengths_strategy, N=heads, D=sizes, seed=seeds, p=dropouts, dtype=dtypes)
def test_attention_is_as_good_as_pytorch(lengths, N, D, seed, p, dtype):
    check_attention(lengths, N, D, seed, p, dtype)


@pytest.mark.judges("attention")
@given(
    lengths=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3),
    D=sizes,
    seed=seeds,
    p=dropouts,
    dtype=dtypes,
)
def test_attention_is_as_good_where_its_gradient_cancels(lengths, D, seed, p, dtype):
    """In a sequence of one token, Q and K have no gradient: what a kernel computes is rounding."""
    check_attention(lengths, 1, D, seed, p, dtype)


@pytest.mark.judges("attention")
@few
@given(
    lengths=st.lists(corner, min_size=1, max_size=3),
    D=st.sampled_from([16, 64]),
    seed=seeds,
    p=dropouts,
)
def test_a_saturated_softmax_is_as_good_in_fp32(lengths, D, seed, p):
    """Inputs x 100 give scores of 10,000. Beside them the log of a row's sum is rounded away.

    Q and K are whole numbers, D is a power of 4, and all products fit in 24 bits: the scores are
    exact, in any order of summation. Keys come in threes, so that a third is a weight. What
    rounding costs follows as in `rounding_of_attention`, but with dP - delta as it is and not by
    its bound, since it is 0 in most rows:

        P = 2^(S - max S)                off by eps (4 + 2 |max S|) of itself; 4 eps where S = max S
        dS = P (dP - delta)              off by (error of P) |dP - delta| + e P (A + rowsum(P A))
    """
    qkv, cu_seqlens, longest = packed(lengths, 1, D, seed)
    qkv *= 100
    qkv[:, :2] = qkv[:, :2].round().clamp(-500, 500)
    qkv[:, 1] = qkv[torch.arange(len(qkv), device=DEVICE) // 3 * 3, 1]
    upstream = torch.randn(sum(lengths), 1, D, device=DEVICE)
    rest = dict(cu_seqlens=cu_seqlens, max_seqlen=longest, dropout_p=p, seed=seed)
    runs = attention_runs(qkv, upstream, torch.float32, rest)

    parts = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist()):
        q, k, v = qkv[start:end, :, 0].double().unbind(1)  # each (L, D)
        dout = upstream[start:end, 0].double()
        L = end - start
        if L == 0:
            continue
        eps = torch.finfo(torch.float32).eps
        e = max(L, D) ** 0.5 * eps
        scores = q @ k.T / D**0.5  # (L, L)
        largest = scores.amax(1, keepdim=True)
        weights = scores.softmax(1)
        weights_off = eps * weights * (4 + 2 * largest.abs() * (scores < largest)) / (1 - p)
        keep = torch.ones_like(weights)
        if p:
            head, row = torch.tensor([0, start], device=DEVICE)
            keep = kernels.attention_keep(seed, p, head, row, L, torch.float64)
        dp = keep * (dout @ v.T) / (1 - p)
        delta = (weights * dp).sum(1, keepdim=True)
        size = (dout.square() @ v.square().T).sqrt() / (1 - p)
        difference_off = e * (size + (weights * size).sum(1, keepdim=True))
        ds_off = weights_off * (dp - delta).abs() + weights * difference_off
        ds_off = ds_off / D**0.5
        off = [
            weights_off @ v.abs() + e * weights @ v.abs() / (1 - p),
            ds_off @ k.abs(),
            ds_off.T @ q.abs(),
            weights_off.T @ dout.abs() + e * weights.T @ dout.abs() / (1 - p),
        ]
        parts.append([x[:, None] for x in off])
    rounding = [torch.cat([qkv[:0, 0].double(), *part]) for part in zip(*parts)]
    assert_as_good_as_pytorch(*runs, rounding)


@pytest.mark.judges("attention")
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[1023], [5, 1024, 1]])
def test_attention_at_full_length(lengths, dtype):
    check_attention(lengths, 1, 64, 3, 0.1, dtype)


@pytest.mark.judges("attention")
@few
@given(lengths=lengths_strategy, seed=seeds)
def test_weights_sum_to_one(lengths, seed):
    qkv, cu_seqlens, longest = packed(lengths, 2, 16, seed)
    qkv[:, 2] = 1
    torch.testing.assert_close(
        judged.attention(qkv, cu_seqlens, longest), torch.ones_like(qkv[:, 0])
    )


@pytest.mark.judges("attention")
@few
@given(length=st.integers(2, 130), seed=seeds)
def test_the_order_of_the_keys_does_not_matter(length, seed):
    qkv, cu_seqlens, longest = packed([length], 2, 16, seed)
    other = qkv.clone()
    other[:, 1:] = qkv[torch.randperm(length, device=DEVICE), 1:]
    torch.testing.assert_close(
        judged.attention(qkv, cu_seqlens, longest),
        judged.attention(other, cu_seqlens, longest),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.judges("attention")
@pytest.mark.slow
@few
@given(
    lengths=st.lists(corner, min_size=2, max_size=3),
    seed=seeds,
    p=dropouts,
    which=st.integers(0, 3),
)
def test_sequences_do_not_touch_each_other(lengths, seed, p, which):
    """NaN in one sequence changes no bit of the others' output and gradients."""
    qkv, cu_seqlens, longest = packed(lengths, 2, 16, seed)
    upstream = torch.randn(sum(lengths), 2, 16, device=DEVICE)
    start, end = cu_seqlens.tolist()[which % len(lengths) :][:2]
    changed = qkv.clone()
    changed[start:end] = float("nan")
    outside = torch.ones(sum(lengths), dtype=torch.bool, device=DEVICE)
    outside[start:end] = False
    function = attention_of(cu_seqlens, longest, p, seed)
    before = with_gradients(function, [qkv], upstream)
    after = with_gradients(function, [changed], upstream)
    for a, b in zip(before, after):
        assert torch.equal(a[outside], b[outside]) and a.isfinite().all()


@pytest.mark.judges("attention")
@few
@given(lengths=st.lists(corner, min_size=2, max_size=3), seed=seeds)
def test_the_order_of_sequences_only_permutes(lengths, seed):
    qkv, cu_seqlens, longest = packed(lengths, 2, 16, seed)
    parts = list(qkv.split(lengths))[::-1]
    backwards = torch.tensor([0, *itertools.accumulate(lengths[::-1])], dtype=torch.int32)
    out = judged.attention(qkv, cu_seqlens, longest).split(lengths)
    other = judged.attention(torch.cat(parts), backwards.to(DEVICE), longest)
    assert torch.equal(torch.cat(out[::-1]), other)


@pytest.mark.judges("attention")
@few
@given(lengths=lengths_strategy, seed=seeds, dtype=dtypes)
def test_huge_scores_stay_finite(lengths, seed, dtype):
    qkv, cu_seqlens, longest = packed(lengths, 2, 16, seed, dtype)
    qkv[:, 0] *= 1e4
    upstream = torch.randn(sum(lengths), 2, 16, device=DEVICE).to(dtype)
    for value in with_gradients(attention_of(cu_seqlens, longest), [qkv], upstream):
        assert not value.isnan().any()


@pytest.mark.judges("attention")
@few
@given(lengths=st.lists(corner, min_size=1, max_size=3), seed=seeds, p=dropouts)
def test_gradient_is_the_slope(lengths, seed, p):
    """<gradient, direction> is the central difference along the direction, of the kernel itself."""
    qkv, cu_seqlens, longest = packed(lengths, 2, 16, seed)
    upstream = torch.randn(sum(lengths), 2, 16, device=DEVICE)
    direction = torch.randn_like(qkv)
    function = attention_of(cu_seqlens, longest, p, seed)
    _, gradient = with_gradients(function, [qkv], upstream)
    step = 1e-2
    ahead = function(qkv + step * direction).double()
    behind = function(qkv - step * direction).double()
    slope = ((ahead - behind) * upstream).sum() / (2 * step)
    scale = gradient.double().norm() * direction.norm() + 1e-6
    assert abs(slope - (gradient.double() * direction).sum()) <= 2e-3 * scale


@pytest.mark.judges("attention")
@given(length=st.sampled_from([1, 3, 16, 33, 64]), seed=seeds, p=st.sampled_from([0.1, 0.5]))
def test_forward_and_backward_drop_the_same_weights(length, seed, p):
    """With V = 1 the output shows the forward mask, and with dO = 1 dV shows the backward mask.

    Both are `attention_keep`.
    """
    qkv, cu_seqlens, longest = packed([7, length], 1, 64, seed)
    qkv[:, :2] = 0  # uniform weights, 1 / length
    qkv[7:, 2, 0] = torch.eye(length, 64, device=DEVICE)
    upstream = torch.zeros(7 + length, 1, 64, device=DEVICE)
    upstream[7:, 0] = torch.eye(length, 64, device=DEVICE)
    out, gradient = with_gradients(attention_of(cu_seqlens, longest, p, seed), [qkv], upstream)
    head, start = torch.tensor([0, 7], device=DEVICE)
    keep = kernels.attention_keep(seed, p, head, start, length)
    expected = keep / (1 - p) / length
    torch.testing.assert_close(out[7:, 0, :length], expected.float())
    torch.testing.assert_close(gradient[7:, 2, 0, :length], expected.T.float())


@functools.cache
def at_the_threshold(number):
    """A seed and a probability by which a half equals the threshold, so that it is just kept.

    It is half `number` of the first counter, (0, 0). What a kernel may compare with it, the other
    half of its word, is 0.
    """
    seeds = torch.arange(2**19)
    rng_key, rng_offset = kernels.philox(0, seeds, 0)
    word = kernels.philox(rng_key, 0, rng_offset)[number // 2]
    upper = word >> 16
    lower = word & 0xFFFF
    half, other = (upper, lower) if number % 2 else (lower, upper)
    half = (half + 2**15) % 2**16  # 0 for the least number that a half can be
    found = (other == 0) & (half > 2**12) & (half < 2**15)
    seed = found.nonzero()[0].item()
    return seed, half[seed].item() / 2**16


@pytest.mark.judges("attention")
@pytest.mark.parametrize("number", range(4))
def test_a_weight_at_the_threshold_is_kept(number):
    """With V = 1 the output is the weights. The counter (0, 0) serves {0, 8} x {0, 8}."""
    seed, p = at_the_threshold(number)
    qkv, cu_seqlens, longest = packed([16], 1, 16, 0)
    qkv[:, :2] = 0
    qkv[:, 2, 0] = torch.eye(16, device=DEVICE)
    out = judged.attention(qkv, cu_seqlens, longest, dropout_p=p, seed=seed)
    assert out[number // 2 * 8, 0, number % 2 * 8] > 0


@pytest.mark.judges("layer_norm")
@pytest.mark.parametrize("number", range(4))
def test_an_element_of_layer_norm_at_the_threshold_is_kept(number):
    """Of a row of zeros and one other number, LayerNorm makes zeros if that number is dropped."""
    seed, p = at_the_threshold(number)
    x = torch.zeros(1, 8, device=DEVICE)
    x[0, number] = 1
    one = torch.ones(8, device=DEVICE)
    y = judged.layer_norm(x, one, torch.zeros_like(one), 1e-6, dropout_p=p, seed=seed)
    assert y[0, number] > 1


def rounding_of_layer_norm(x, weight, bias, residual, dropout_p, seed, eps, upstream):
    """What rounding costs each number of y and of the gradients of x, weight, bias and residual.

    It follows from what is added up: in a row of one column g = mean(g), and g - mean(g) is exactly
    0, but a rounding of g is multiplied by rstd = 1 / sqrt(eps). Let e be the eps of fp32, in which
    all is computed, and d that of the dtype in which it is written. A sum of n numbers costs
    sqrt(n) e.

        n = (h - mean) rstd       off by e (1 + sqrt(H)) (|h| + |mean|) rstd =: N
        y = n w + b               off by N |w| + (d + e) (|n w| + |b|)
        dh = (g - mean(g) - n mean(g n)) rstd
                                  each of its three terms is off by e (1 + sqrt(H)) of its size, and
                                  the last by N as well
        dw = sum dy n             off by sum |dy| (N + sqrt(T) e |n|)
        db = sum dy               off by sqrt(T) e sum |dy|
    """
    rows, H = x.shape
    e = torch.finfo(torch.float32).eps * 4
    d = torch.finfo(x.dtype).eps
    summed = e * (1 + H**0.5)
    h = kernels.dropout_reference(x.double(), dropout_p, seed) if dropout_p else x.double()
    factor = 1 / (1 - dropout_p)
    if residual is not None:
        h = h + residual.double()
    mean = h.mean(1, keepdim=True)
    rstd = 1 / ((h - mean).square().mean(1, keepdim=True) + eps).sqrt()
    n = (h - mean) * rstd
    g = upstream.double() * weight.double()
    n_off = summed * (h.abs() + mean.abs()) * rstd
    y_off = n_off * weight.abs() + (d + e) * ((n * weight).abs() + bias.abs())
    size = g.abs() + g.abs().mean(1, keepdim=True) + n.abs() * (g * n).abs().mean(1, keepdim=True)
    n_twice = n_off * (g * n).mean(1, keepdim=True).abs()
    n_twice += n.abs() * (g.abs() * n_off).mean(1, keepdim=True)
    dh_off = (summed * size + n_twice) * rstd + d * size * rstd
    dy = upstream.double().abs()
    dw_off = (dy * (n_off + rows**0.5 * e * n.abs())).sum(0)
    db_off = rows**0.5 * e * dy.sum(0)
    return [y_off, factor * dh_off, dw_off, db_off] + ([] if residual is None else [dh_off])


def check_layer_norm(rows, H, seed, p, dtype, plus, eps):
    torch.manual_seed(seed)
    x = torch.randn(rows, H, device=DEVICE).to(dtype)
    weight = torch.randn(H, device=DEVICE)
    bias = torch.randn(H, device=DEVICE)
    residual = torch.randn(rows, H, device=DEVICE).to(dtype) if plus else None
    upstream = torch.randn(rows, H, device=DEVICE).to(dtype)
    inputs = [x, weight, bias, residual]
    runs = []
    for function in (judged.layer_norm, kernels.layer_norm_reference):

        def call(x, weight, bias, residual, function=function):
            return function(x, weight, bias, eps, residual=residual, dropout_p=p, seed=seed)

        runs.append(with_gradients(call, inputs, upstream))
    exact = with_gradients(call, inputs, upstream, torch.float64)
    rounding = rounding_of_layer_norm(x, weight, bias, residual, p, seed, eps, upstream)
    assert_as_good_as_pytorch(*runs, exact, rounding)


@pytest.mark.judges("layer_norm")  # of one column, a row is constant, dropped or not
@example(rows=33, H=1, seed=30080, p=0.1, dtype=torch.float32, plus=True, eps=1e-12)
@given(
    rows=st.sampled_from([0, 1, 2, 5, 33]),
    H=st.sampled_from([1, 5, 48, 64, 192, 768, 1024]),
    seed=seeds,
    p=dropouts,
    dtype=dtypes,
    plus=st.booleans(),
    eps=st.sampled_from([1e-12, 1e-6, 0.1]),
)
def test_layer_norm_is_as_good_as_pytorch(rows, H, seed, p, dtype, plus, eps):
    check_layer_norm(rows, H, seed, p, dtype, plus, eps)


@pytest.mark.judges("layer_norm")
@few
@given(H=st.sampled_from([64, 192, 768]), seed=seeds, offset=st.sampled_from([0.0, 1.0, 1e4]))
def test_layer_norm_of_shifted_and_constant_rows(H, seed, offset):
    """At an offset of 1e4 the mean itself is rounded to 1e-3, and no sum in fp32 can do better."""
    torch.manual_seed(seed)
    x = torch.randn(6, H, device=DEVICE)
    one = torch.ones(H, device=DEVICE)
    zero = torch.zeros(H, device=DEVICE)
    x[3] = 0
    x = (x + offset - offset).requires_grad_()  # so that adding the offset again is exact
    shifted = judged.layer_norm(x + offset, one, zero, 1e-6)
    tolerance = 5e-3 if offset > 10 else 1e-4
    expected = judged.layer_norm(x, one, zero, 1e-6)
    torch.testing.assert_close(shifted, expected, rtol=tolerance, atol=tolerance)
    assert shifted[3].abs().max() < 1e-2  # a constant row
    (gradient,) = torch.autograd.grad(shifted, x, torch.randn_like(x))
    # A shift of the row changes nothing.
    assert (gradient.sum(1).abs() <= tolerance * gradient.abs().sum(1) + 1e-6).all()


widths = st.sampled_from([5, 64, 768])


@pytest.mark.judges("dropout")
@given(seed=seeds, p=st.sampled_from([0.1, 0.5]), H=widths, dtype=dtypes)
def test_dropout_keeps_what_dropout_keep_says(seed, p, H, dtype):
    torch.manual_seed(seed)
    x = torch.randn(9, H, device=DEVICE).to(dtype).requires_grad_()
    y = judged.dropout(x, p, seed)
    assert torch.equal(y, kernels.dropout_reference(x.float(), p, seed).to(dtype))
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(x))
    assert torch.equal(gradient != 0, y != 0) or (x == 0).any()


@pytest.mark.judges("layer_norm")
@few
@given(seed=seeds, p=st.sampled_from([0.1, 0.5]), H=widths, dtype=dtypes)
def test_layer_norm_keeps_what_dropout_keep_says(seed, p, H, dtype):
    """Of a row of ones, LayerNorm makes a positive number of what is kept, and a negative one of
    the rest. In the backward pass, x has the gradient of the residual, scaled up, where it is
    kept, and 0 elsewhere."""
    x = torch.ones(9, H, device=DEVICE, dtype=dtype)
    weight = torch.ones(H, device=DEVICE)
    bias = torch.zeros(H, device=DEVICE)
    upstream = torch.randn(9, H, device=DEVICE).to(dtype)

    def norm(x, residual):
        return judged.layer_norm(x, weight, bias, 1e-6, residual=residual, dropout_p=p, seed=seed)

    y, dx, dresidual = with_gradients(norm, [x, torch.zeros_like(x)], upstream)
    keep = kernels.dropout_keep(seed, p, 9, H, DEVICE)
    mixed = keep.any(1) & ~keep.all(1)  # any other row is constant, and becomes 0
    assert torch.equal((y > 0)[mixed], keep[mixed])
    assert (dx[~keep] == 0).all()
    assert (dx[keep & (dresidual != 0)] != 0).all()  # (the smallest may be 0 in dresidual alone)


@pytest.mark.judges("layer_norm")
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_rows_of_layer_norm_do_not_touch_each_other(p):
    """NaN in one row changes no bit of the other rows' output and gradients."""
    torch.manual_seed(0)
    x = torch.randn(9, 48, device=DEVICE)
    vector = torch.randn(48, device=DEVICE)
    upstream = torch.randn(9, 48, device=DEVICE)
    changed = x.clone()
    changed[3] = float("nan")
    others = torch.arange(9, device=DEVICE) != 3

    def norm(x):
        return judged.layer_norm(x, vector, vector, 1e-6, residual=x, dropout_p=p, seed=1)

    before = with_gradients(norm, [x], upstream)
    after = with_gradients(norm, [changed], upstream)
    for a, b in zip(before, after):
        assert torch.equal(a[others], b[others]) and a.isfinite().all()


@pytest.mark.judges("layer_norm")
@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("H", [5, 100, 768])
def test_layer_norm_of_a_constant_row_is_zero(H, plus):
    """At the model's own eps the rounding of a mean would be divided by 1e-6."""
    torch.manual_seed(H)
    x = torch.randn(16, 1, device=DEVICE).expand(16, H)
    residual = torch.randn(16, 1, device=DEVICE).expand(16, H) if plus else None
    weight = torch.randn(H, device=DEVICE)
    for dtype in DTYPES:
        inputs = (x.to(dtype), weight, torch.zeros_like(weight), 1e-12)
        y = judged.layer_norm(*inputs, residual=residual.to(dtype) if plus else None)
        assert (y == 0).all()


class FewPrograms(kernels.Launcher):
    """Two programs in the backward pass of LayerNorm."""

    def tiles(self, x):
        norm_backward = kernels.NormTile(rows=4, warps=4, programs=2)
        return super().tiles(x)._replace(norm_backward=norm_backward)


@pytest.mark.parametrize("plus, p", [(False, 0.0), (True, 0.1)])
def test_layer_norm_sums_over_all_blocks_of_rows(plus, p):
    """Two programs take 33 rows, so each goes through several blocks of them."""
    with kernels.Launcher.replaced(FewPrograms()):
        check_layer_norm(33, 48, 3, p, torch.float32, plus, 1e-6)


@pytest.mark.judges("cross_entropy")
@example(M=2, V=5000, seed=0, dtype=torch.float32, size=1.0, form="begins with -inf")
@example(M=2, V=5000, seed=0, dtype=torch.float32, size=1.0, form="ascending")
@given(
    M=st.sampled_from([0, 1, 2, 7]),
    V=st.sampled_from([1, 5, 100, 4096, 5000]),
    seed=seeds,
    dtype=dtypes,
    size=st.sampled_from([1.0, 100.0]),
    form=st.sampled_from(["any", "some -inf", "begins with -inf", "ascending"]),
)
def test_cross_entropy_is_that_of_pytorch(M, V, seed, dtype, size, form):
    """The sum of the losses and its gradient, with an upstream factor, beside PyTorch in fp64.

    Let x be the largest number of a row. lse is off by some eps (1 + x), since the exponents are
    rounded by eps x, and a weight e^(logit - lse) by that part of itself. Then it is rounded to the
    dtype.
    """
    torch.manual_seed(seed)
    logits = (size * torch.randn(M, V, device=DEVICE)).to(dtype)
    labels = torch.randint(V, (M,), device=DEVICE)
    if form == "ascending":  # each block of columns has a new maximum
        logits = logits.sort(1).values
    if form == "some -inf":
        logits[torch.rand(M, V, device=DEVICE) < 0.3] = float("-inf")
    if form == "begins with -inf":
        logits[:, : min(4096, V - 1)] = float("-inf")
        labels[:] = V - 1
    logits.scatter_(1, labels[:, None], 1.0)  # the label's own is finite
    labels[1:][torch.rand(max(M - 1, 0), device=DEVICE) < 0.3] = -100

    def summed(logits, labels, function):
        logits = logits.detach().clone().requires_grad_()
        total = function(logits.clone(), labels)  # the clone's memory becomes the gradient
        return total.detach(), torch.autograd.grad(3.7 * total, logits)[0]

    loss, gradient = summed(logits, labels, judged.cross_entropy)
    exact, exact_gradient = summed(logits.double(), labels, kernels.cross_entropy_reference)

    numbers = torch.where(logits.isfinite(), logits, 0).double().abs()
    rounding = 32 * torch.finfo(torch.float32).eps * (1 + numbers.amax(1, keepdim=True))  # (M, 1)
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert abs(loss - exact) <= rounding.sum()
    weights = 3.7 * logits.double().softmax(1) * (labels >= 0)[:, None]
    info = torch.finfo(dtype)
    allowed = weights * rounding + info.eps * exact_gradient.abs()
    allowed += 4 * torch.finfo(torch.float32).smallest_normal  # below it e^x may be 0
    allowed += info.smallest_normal * info.eps  # the least step of the dtype
    assert ((gradient.double() - exact_gradient).abs() <= allowed).all()


@pytest.mark.parametrize("label", [-1, -7, 7, 10**6, 2**62])
def test_cross_entropy_reads_no_label_that_is_no_column(label):
    """Its loss and the gradient of its row are NaN. A label that counts, and one that does not,
    keep their gradients."""
    logits = torch.randn(3, 7, device=DEVICE, requires_grad=True)
    labels = torch.tensor([1, label, -100], device=DEVICE)
    total = kernels.cross_entropy(logits.clone(), labels)
    assert total.isnan()
    (gradient,) = torch.autograd.grad(total, logits)
    expected = logits[0].softmax(0) - torch.eye(7, device=DEVICE)[1]
    torch.testing.assert_close(gradient[0], expected)
    assert gradient[1].isnan().all()
    assert (gradient[2] == 0).all()


@pytest.mark.judges("cross_entropy")
def test_cross_entropy_refuses():
    logits = torch.zeros(3, 7, device=DEVICE)
    labels = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    for words, arguments in (
        ("logits must be (M, V) floating point", (logits[0], labels)),
        ("logits must be (M, V) floating point", (logits.long(), labels)),
        ("labels must be (3,) int64", (logits, labels[:2])),
        ("labels must be (3,) int64", (logits, labels.int())),
        ("labels must lie on the device of logits", (logits, labels.to("meta"))),
    ):
        assert_refused(words, judged.cross_entropy, *arguments)


def test_cross_entropy_has_one_backward_pass():
    """The logits are overwritten, so a second pass would return a wrong gradient."""
    logits = torch.randn(3, 7, device=DEVICE, requires_grad=True)
    total = kernels.cross_entropy(logits.clone(), torch.tensor([1, 2, 3], device=DEVICE))
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        total.backward()


@pytest.mark.judges("attention")
@pytest.mark.slow
@few
@given(lengths=lengths_strategy, seed=seeds)
def test_two_runs_of_attention_have_the_same_bits(lengths, seed):
    """The seed is an int in the first run, and a tensor in the second."""
    qkv, cu_seqlens, longest = packed(lengths, 2, 32, seed)
    upstream = torch.randn(sum(lengths), 2, 32, device=DEVICE)
    first, second = (
        with_gradients(attention_of(cu_seqlens, longest, 0.1, one_seed), [qkv], upstream)
        for one_seed in (seed, torch.tensor(seed, device=DEVICE))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.judges("layer_norm")
@few
@given(rows=st.integers(1, 40), H=widths, seed=seeds)
def test_two_runs_of_layer_norm_have_the_same_bits(rows, H, seed):
    """The seed is an int in the first run, and a tensor in the second."""
    torch.manual_seed(seed)
    inputs = [torch.randn(shape, device=DEVICE) for shape in ((rows, H), H, H, (rows, H))]
    upstream = torch.randn(rows, H, device=DEVICE)
    runs = []
    for one_seed in (seed, torch.tensor(seed, device=DEVICE)):

        def norm(x, weight, bias, residual, one_seed=one_seed):
            return judged.layer_norm(
                x, weight, bias, 1e-6, residual=residual, dropout_p=0.1, seed=one_seed
            )

        runs.append(with_gradients(norm, inputs, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.judges("attention")
def test_attention_reads_strided_inputs_where_they_lie():
    qkv, cu_seqlens, longest = packed([5, 40], 4, 16, 0)
    wide = torch.randn(45, 3, 4, 32, device=DEVICE)
    wide[..., :16] = qkv
    cu_wide = torch.stack([cu_seqlens, cu_seqlens + 7], dim=1)[:, 0]
    upstream = torch.randn(4, 45, 16, device=DEVICE).transpose(0, 1)

    def first_16(x):
        return judged.attention(x[..., :16], cu_wide, longest)

    a = with_gradients(first_16, [wide], upstream)
    b = with_gradients(attention_of(cu_seqlens, longest), [qkv], upstream)
    assert torch.equal(a[0], b[0]) and torch.equal(a[1][..., :16], b[1])


@pytest.mark.judges("layer_norm")
def test_layer_norm_reads_strided_inputs_where_they_lie():
    def norm(x, weight, bias):
        return judged.layer_norm(x, weight, bias, 1e-6, residual=x, dropout_p=0.1, seed=1)

    x = torch.randn(16, 9, device=DEVICE).T
    vectors = torch.randn(16, 2, device=DEVICE)
    inputs = [x, vectors[:, 0], vectors[:, 1]]
    a = with_gradients(norm, inputs, x)
    b = with_gradients(norm, [tensor.contiguous() for tensor in inputs], x)
    assert all(torch.equal(i, j) for i, j in zip(a, b, strict=True))


def assert_refused(words, function, *arguments, **keywords):
    """Asserts a ValueError, of the project's operations in these words."""
    with pytest.raises(ValueError) as error:
        function(*arguments, **keywords)
    assert judged is not kernels or words in str(error.value)


def assert_attention_refuses(change, words):
    """Asserts a ValueError from `attention` if one of its arguments is changed."""
    arguments = dict(
        qkv=torch.zeros(5, 3, 2, 16),
        cu_seqlens=torch.tensor([0, 5], dtype=torch.int32),
        max_seqlen=5,
    )
    arguments |= change
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor) and not value.is_meta:
            arguments[name] = value.to(DEVICE)
    assert_refused(words, judged.attention, **arguments)


@pytest.mark.judges("attention")
@pytest.mark.parametrize(
    "change, words",
    [
        (dict(qkv=torch.zeros(5, 2, 2, 16)), "qkv must be (T, 3, N, D)"),
        (dict(qkv=torch.zeros(5, 3, 2, 16, dtype=torch.int64)), "floating point"),
        (dict(cu_seqlens=torch.tensor([0, 5])), "int32"),
        (
            dict(cu_seqlens=torch.zeros(2, dtype=torch.int32, device="meta")),
            "cu_seqlens must lie on the device of qkv",
        ),
        (dict(dropout_p=1.0), "dropout_p"),
        (dict(dropout_p=-0.1), "dropout_p"),
    ],
)
def test_attention_refuses_what_does_not_fit(change, words):
    assert_attention_refuses(change, words)


@pytest.mark.judges("attention")
@pytest.mark.skipif(DEVICE == "cuda", reason="reading cu_seqlens would make a step wait")
@pytest.mark.parametrize(
    "change, words",
    [
        (dict(cu_seqlens=torch.tensor([0, 4], dtype=torch.int32)), "T = 5"),
        (dict(cu_seqlens=torch.tensor([1, 5], dtype=torch.int32)), "T = 5"),
        (dict(cu_seqlens=torch.tensor([0, 4, 3, 5], dtype=torch.int32)), "non-decreasing"),
        (dict(max_seqlen=4), "max_seqlen = 4"),
    ],
)
def test_attention_refuses_lengths_that_do_not_fit(change, words):
    assert_attention_refuses(change, words)


NONE = torch.zeros(0)
EMPTY = torch.zeros(2, dtype=torch.int32)  # cu_seqlens of one sequence without tokens
MANY = torch.zeros(65_537, dtype=torch.int32)  # of 65,536 such sequences


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(qkv=torch.zeros(5, 2, 3, 16).transpose(1, 2).transpose(2, 3)), "qkv must have"),
        (dict(qkv=torch.zeros(5, 3, 1, 129)), "1 <= D <= 128"),
        (dict(qkv=torch.zeros(5, 3, 1, 0)), "1 <= D <= 128"),
        (dict(qkv=torch.zeros(5, 3, 1, 16, dtype=torch.float64)), "qkv must be torch.float16"),
        (
            dict(qkv=NONE.as_strided((0, 3, 1, 16), (2**29, 16, 16, 1)), cu_seqlens=EMPTY),
            "2**31 elements",
        ),
        (
            dict(qkv=NONE.as_strided((0, 3, 1, 16), (16, 2**30, 16, 1)), cu_seqlens=EMPTY),
            "2**31 elements",
        ),
        (
            dict(qkv=NONE.as_strided((0, 3, 2, 16), (16, 16, 2**30, 1)), cu_seqlens=EMPTY),
            "2**31 elements",
        ),
        (dict(qkv=torch.zeros(5, 3, 65_536, 1)), "at most 65,535 sequences and as many heads"),
        (
            dict(qkv=torch.zeros(0, 3, 1, 16), cu_seqlens=MANY),
            "at most 65,535 sequences and as many heads",
        ),
        (dict(max_seqlen=torch.tensor(5)), "max_seqlen must be an int"),
        (dict(max_seqlen=5.0), "max_seqlen must be an int"),
        (dict(seed=1.0), "seed must be an int"),
        (dict(seed=2**63), "seed must fit in 64 bits"),
        (dict(seed=torch.tensor([5])), "seed must be an int or a 0-d int64"),
        (dict(seed=torch.tensor(5, dtype=torch.int32)), "seed must be an int or a 0-d int64"),
    ],
)
def test_attention_refuses_what_its_kernels_cannot_take(change, words):
    assert_attention_refuses(change, words)


def test_what_the_interpreter_gets_wrong_is_refused():
    """Its products of bf16 are garbage (a chip's are not)."""
    qkv, cu_seqlens, longest = packed([5], 1, 16, 0, torch.bfloat16)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="must be torch.float16"):
            kernels.attention(qkv, cu_seqlens, longest)
    else:
        kernels.attention(qkv, cu_seqlens, longest)


@pytest.mark.judges("layer_norm")
def test_layer_norm_refuses_what_does_not_fit():
    x = torch.zeros(2, 8, device=DEVICE)
    w = torch.ones(8, device=DEVICE)
    norm = judged.layer_norm
    assert_refused("floating point", norm, x.long(), w, w, 1e-6)
    for name, arguments in (
        ("x must be (T, H)", (x[0], w, w, 1e-6)),
        ("weight must be (8,)", (x, w[:7], w, 1e-6)),
        ("bias must be (8,)", (x, w, w[:7], 1e-6)),
        ("weight must lie on the device of x", (x, w.to("meta"), w, 1e-6)),
        ("bias must lie on the device of x", (x, w, w.to("meta"), 1e-6)),
    ):
        assert_refused(name, norm, *arguments)
    assert_refused("residual must be (2, 8)", norm, x, w, w, 1e-6, residual=x[:1])
    words = "residual must lie on the device of x"
    assert_refused(words, norm, x, w, w, 1e-6, residual=x.to("meta"))
    for p in (-0.1, 1.0):
        assert_refused("dropout_p", norm, x, w, w, 1e-6, dropout_p=p)


@pytest.mark.judges("dropout")
def test_dropout_refuses_what_does_not_fit():
    x = torch.zeros(2, 8, device=DEVICE)
    assert_refused("floating point", judged.dropout, x.long(), 0.1, 0)
    assert_refused("x must be (T, H)", judged.dropout, x[0], 0.1, 0)
    assert_refused("dropout_p", judged.dropout, x, 1.0, 0)


def test_layer_norm_refuses_what_its_kernels_cannot_take():
    x = torch.zeros(2, 8, device=DEVICE, dtype=torch.float64)
    w = torch.ones(8, device=DEVICE)
    assert_refused("x must be torch.float16", kernels.layer_norm, x, w, w, 1e-6)


def model_and_batch():
    torch.manual_seed(0)
    shape = dict(
        vocab_size=100,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.2,
    )
    config = StarEncoderConfig(**shape, max_position_embeddings=32, pad_token_id=0)
    model = StarEncoderForPreTraining(config).to(DEVICE)
    return model, random_batch(100, [0, 20, 33], [1, 5, 30])


def random_batch(vocab_size, bounds, masked):
    """A batch of pretraining: random tokens, of which those at `masked` are to be predicted."""
    ids = torch.randint(vocab_size, (bounds[-1],))
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    next_sentence = torch.arange(len(bounds) - 1) % 2
    masked = torch.tensor(masked)
    batch = data.Batch(ids, cu_seqlens, ids[masked], next_sentence, masked)
    return data.Batch(*(t.to(DEVICE) for t in batch))


def loss_and_gradients(model, batch, seed):
    model.zero_grad()
    loss, *_ = train.loss_on(model, batch, 3, 2, seed=seed)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def test_a_model_with_triton_is_the_model_with_pytorch(monkeypatch):
    """Loss and gradients, with all dropouts on."""
    model, batch = model_and_batch()
    ours = loss_and_gradients(model, batch, 5)
    monkeypatch.setenv("STARENCODER_KERNELS", "torch")
    for a, b in zip(ours, loss_and_gradients(model, batch, 5)):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_compiled_is_eager(monkeypatch):
    """torch.compile breaks the graph at each kernel; another seed does not compile again."""
    monkeypatch.undo()
    monkeypatch.setenv("STARENCODER_KERNELS", "triton")
    model, batch = model_and_batch()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="inductor" if DEVICE == "cuda" else "aot_eager")
    for seed in (5, 6, 2**40):
        seed = torch.tensor(seed, device=DEVICE)
        with torch._dynamo.config.patch(error_on_recompile=seed > 5):
            results = loss_and_gradients(compiled, batch, seed)
        for a, b in zip(loss_and_gradients(model, batch, seed), results):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_training_run_with_triton(small_corpus, tmp_path, monkeypatch):
    """A few steps of the loop: the losses of the PyTorch backend to 1e-3."""
    monkeypatch.undo()
    lines = []
    for backend in ("torch", "triton"):
        flags = f"--data {small_corpus} --out {tmp_path / backend} --dtype float32"
        flags += " --hidden-size 64 --num-hidden-layers 2 --num-attention-heads 2"
        flags += " --steps 2 --batch-size 4"
        flags += " --hidden-dropout-prob 0.1 --attention-probs-dropout-prob 0.1"
        flags += " --eval-examples 4 --log-every 1"
        environment = os.environ | {"STARENCODER_KERNELS": backend}
        result = command("train.py", *flags.split(), env=environment)
        assert result.returncode == 0 and f"kernels: {backend}" in result.stdout, result.stderr
        with open(tmp_path / backend / "metrics.jsonl") as f:
            lines.append([json.loads(line) for line in f])
    for a, b in zip(*lines, strict=True):
        for key in a.keys() & {"loss", "mlm_loss", "nsp_loss", "grad_norm"}:
            assert abs(a[key] - b[key]) < 1e-3 * max(1, abs(b[key])), key


@pytest.mark.slow
def test_compiled_for_chips_that_are_not_here(tmp_path):
    """Every kernel with its own launch settings: nothing spills, shared memory fits, and attention
    on Hopper uses wgmma, waits for whole products, and moves no mask through shared memory.

    `python -m bench kernels --resources` does it for two more chips, in twice the time."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    environment.pop("STARENCODER_KERNELS", None)
    path = str(tmp_path / "resources.json")
    program = "from bench.resources import bench_resources\n"
    program += f"bench_resources({path!r}, chips=(80, 90))"
    result = command("-c", program, env=environment)
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "resources.json").read_text())["rows"]
    rows = [row for row in rows if row["by"] == "kernels"]  # peers may be installed, or not
    keys = ("chip", "kernel", "dtype", "width", "dropout")
    assert len({tuple(row[key] for key in keys) for row in rows}) == len(rows) >= 100
    for row in rows:
        assert row["spills (bytes)"] == 0 and row["registers"] <= 255, row
        assert row["shared (KB)"] <= {"sm_80": 163, "sm_90": 227}[row["chip"]], row
        attention = row["kernel"].startswith("attention")
        if row["chip"] == "sm_90" and row["dtype"] != "float32":
            assert row["wgmma"] == attention and row["warnings"] == "", row
        if row["chip"] == "sm_90" and row["dtype"] == "bfloat16" and attention:
            # Serialized, there would be as many waits as HGMMAs.
            assert row["counted in"] == "loop" and row["HGMMA"] >= 8 and row["waits"] <= 2, row
            assert row["STS"] == 0, row
        if row["predicted"]:  # of what was run by the machine of ptx/
            assert not attention or row["work"] == 1, row  # no product is computed twice
    assert sum(row["predicted"] is not None for row in rows) >= 30


def every_kernel(lengths, N, D, dtype, p):
    """Outputs and gradients of attention, LayerNorm and dropout on the same packed batch."""
    qkv, cu_seqlens, longest = packed(lengths, N, D, 1, dtype)
    x = qkv[:, 0].flatten(1)
    vector = torch.randn(N * D, device=DEVICE)
    upstream = torch.randn(len(qkv), N, D, device=DEVICE).to(dtype)
    flat = upstream.flatten(1)

    def norm(x, weight, bias, residual):
        return kernels.layer_norm(x, weight, bias, 1e-6, residual=residual, dropout_p=p, seed=4)

    def drop(x):
        return kernels.dropout(x, p, 5)

    results = with_gradients(attention_of(cu_seqlens, longest, p, 3), [qkv], upstream)
    results += with_gradients(norm, [x, vector, vector, x], flat)
    results += with_gradients(drop, [x], flat)
    return results


@pytest.mark.skipif(not kernels.INTERPRETED, reason="nothing is interpreted here")
def test_the_quick_interpreter_is_tritons(quick):
    """The same bits with Triton's interpreter as it is."""
    case = ([33, 0, 5], 2, 24, torch.float16, 0.1)
    results = every_kernel(*case)
    quick.undo()
    try:
        expected = every_kernel(*case)
    finally:
        hurry(quick)
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


# ---- what only a GPU can show --------------------------------------------------------------------


class TestOnAGpu:
    pytestmark = on_a_gpu_only

    def test_small_case_of_every_kernel(self):
        """Small enough for `compute-sanitizer python -m pytest -m gpu -k small_case`."""
        for D in (24, 64):
            results = every_kernel([33, 0, 70], 2, D, torch.bfloat16, 0.1)
            assert all(tensor.isfinite().all() for tensor in results)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
    def test_a_thousand_runs_have_the_same_bits(self, dtype):
        case = ([1, 1024, 0, 77, 500], 12, 64, dtype, 0.1)
        first = every_kernel(*case)
        different = torch.zeros((), dtype=torch.bool, device=DEVICE)
        for _ in range(1000):
            for a, b in zip(first, every_kernel(*case), strict=True):
                different |= (a != b).any()
        assert not different

    @pytest.mark.parametrize("compiled", [False, True])
    def test_a_step_of_the_full_model_is_as_good_as_pytorch(self, monkeypatch, compiled):
        """The gradient of 125 M parameters in bf16, with all dropouts on, is at most 1.5x as far
        from the fp32 gradient as PyTorch's."""
        monkeypatch.undo()
        torch.manual_seed(0)
        torch._dynamo.reset()
        model = StarEncoderForPreTraining(StarEncoderConfig()).to(DEVICE)
        batch = random_batch(49000, [0, 1, 1025, 1325, 1402], range(3, 1400, 7))

        def step(backend, dtype, model=model):
            monkeypatch.setenv("STARENCODER_KERNELS", backend)
            with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
                loss, *gradients = loss_and_gradients(model, batch, torch.tensor(7, device=DEVICE))
            return loss.item(), torch.cat([g.flatten() for g in gradients])

        loss, exact = step("torch", torch.float32)
        pytorch_loss, pytorch = step("torch", torch.bfloat16)
        model_or_compiled = torch.compile(model) if compiled else model
        ours_loss, ours = step("triton", torch.bfloat16, model_or_compiled)
        assert abs(ours_loss - loss) < 1e-2 * loss and abs(pytorch_loss - loss) < 1e-2 * loss
        assert (ours - exact).norm() <= 1.5 * (pytorch - exact).norm() < 0.2 * exact.norm()
        loss_fp32, ours_fp32 = step("triton", torch.float32)
        assert abs(loss_fp32 - loss) < 1e-5 * loss
        assert (ours_fp32 - exact).norm() < 1e-4 * exact.norm()
