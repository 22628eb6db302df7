"""The kernels' compiled code, run in bf16 and fp16 for chips that are not here; and the machine
that runs it, against NumPy, matrix products and PTX written by hand.

`pytest tests/test_ptx.py --kernels FILE` judges the compiled code of another file's operations.
"""

import contextlib
import functools
import itertools

import numpy as np
import pytest
import torch
from conftest import assert_refused, kernels_under_test, program
from hypothesis import example, given, settings
from hypothesis import strategies as st

import kernels
import ptx
from ptx.compiler import start_compiling
from ptx.launch import CHIPS

if not kernels.HAS_TRITON:
    pytest.skip("there is no Triton here", allow_module_level=True)

import ptx_kernels
import test_triton as properties
from test_triton import with_gradients

judged = kernels_under_test()
BOTH_CHIPS = ["sm_80", "sm_90"]
HALVES = [torch.bfloat16, torch.float16]
DROPOUTS = [0.0, 0.1]
# In this order the kernels are compiled ahead.
ATTENTION_CASES = list(itertools.product(BOTH_CHIPS, HALVES, DROPOUTS, [64, 128]))
NORM_CASES = list(itertools.product(BOTH_CHIPS, HALVES, DROPOUTS, [768, 100]))
LENGTHS = {64: [133, 0, 1, 40], 128: [70, 0, 1, 20]}  # whole blocks and partial ones


def name_of(case):
    return "-".join(str(part).removeprefix("torch.") for part in case)


@pytest.fixture(autouse=True)
def no_backend_is_forced(monkeypatch):
    """PyTorch serves the CPU, but within `emulated`."""
    monkeypatch.delenv("STARENCODER_KERNELS", raising=False)


# ---- the kernels ---------------------------------------------------------------------------------


def attention_inputs(dtype, D, lengths=None):
    """qkv, cu_seqlens, an upstream gradient."""
    torch.manual_seed(D)
    lengths = lengths or LENGTHS[D]
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    qkv = torch.randn(sum(lengths), 3, 1, D).to(dtype)
    return qkv, cu_seqlens, torch.randn(sum(lengths), 1, D).to(dtype)


def attention_results(function, qkv, cu_seqlens, upstream, p, dtype=None):
    """The output and the gradients of Q, K and V."""
    longest = max(cu_seqlens.diff().tolist())
    call = functools.partial(
        function, cu_seqlens=cu_seqlens, max_seqlen=longest, dropout_p=p, seed=2**40 + 7
    )
    out, gradient = with_gradients(call, [qkv], upstream, dtype)
    return [out, *gradient.unbind(1)]


def norm_inputs(dtype, H, rows=13):
    """x, weight, bias, residual, an upstream gradient."""
    torch.manual_seed(H)
    vectors = [torch.randn(H), torch.randn(H)]
    x, residual, upstream = (torch.randn(rows, H).to(dtype) for _ in range(3))
    return [x, *vectors, residual], upstream


def norm_results(function, inputs, upstream, p, dtype=None):
    """The output and the gradients of x, weight, bias and residual."""

    def call(x, weight, bias, residual):
        return function(x, weight, bias, 1e-12, residual=residual, dropout_p=p, seed=3)

    return with_gradients(call, inputs, upstream, dtype)


@contextlib.contextmanager
def on_chip(chip):
    """`ptx.emulated`, also for a judged file that is a changed copy of kernels.py."""
    with ptx.emulated(chip) as gpu, contextlib.ExitStack() as stack:
        if hasattr(judged, "Launcher"):
            stack.enter_context(judged.Launcher.replaced(gpu))
        yield gpu


def assert_sound(gpu):
    """Kernels ran, and nothing was found."""
    if judged is not kernels and not gpu.counts:
        pytest.skip("nothing was judged: the file launches no Triton kernel")
    assert gpu.counts
    assert not gpu.findings, gpu.findings[0]


class Ahead(ptx.Emulator):
    """Only begins to compile what would be launched."""

    def launch(self, kernel, grid, arguments, constants):
        major, minor = CHIPS[self.chip]
        start_compiling(kernel, 10 * major + minor, arguments, constants)


@pytest.fixture(scope="module")
def ahead():
    """All kernels of the cases below, compiled by other processes while the first ones run."""
    if judged is not kernels:  # it may launch its kernels in a way of its own
        return
    for chip, dtype, p, D in ATTENTION_CASES:
        with kernels.Launcher.replaced(Ahead(chip)):
            attention_results(kernels.attention, *attention_inputs(dtype, D), p)
    for chip, dtype, p, H in NORM_CASES:
        with kernels.Launcher.replaced(Ahead(chip)):
            norm_results(kernels.layer_norm, *norm_inputs(dtype, H), p)


@pytest.fixture(autouse=True)
def poisoned_outputs(monkeypatch):
    """What a kernel fails to write is NaN, and what it writes outside of an output is seen."""
    properties.poison_outputs(monkeypatch)
    yield
    properties.assert_nothing_is_written_outside()


@pytest.mark.slow
@pytest.mark.judges("attention")
@pytest.mark.parametrize("case", ATTENTION_CASES, ids=name_of)
def test_compiled_attention(case, ahead):
    """As good as PyTorch's formula in the same dtype; sequences do not touch each other; the same
    bits twice; no findings.

    In the second run one sequence is NaN: the others keep their bits.
    """
    chip, dtype, p, D = case
    qkv, cu_seqlens, upstream = attention_inputs(dtype, D)
    other = qkv.clone()
    start, end = cu_seqlens[-2:].tolist()
    other[start:end] = float("nan")
    with on_chip(chip) as gpu:
        ours = attention_results(judged.attention, qkv, cu_seqlens, upstream, p)
        again = attention_results(judged.attention, other, cu_seqlens, upstream, p)
    assert_sound(gpu)
    same = attention_results(kernels.attention_reference, qkv, cu_seqlens, upstream, p)
    exact = attention_results(
        kernels.attention_reference, qkv, cu_seqlens, upstream, p, torch.float64
    )
    rounding = properties.rounding_of_attention(qkv, cu_seqlens, p, upstream)
    properties.assert_as_good_as_pytorch(ours, same, exact, rounding)
    for first, second in zip(ours, again, strict=True):
        assert torch.equal(first[:start], second[:start])
        assert second[start:end].isnan().all()


@pytest.mark.slow
@pytest.mark.judges("layer_norm")
@pytest.mark.parametrize("case", NORM_CASES, ids=name_of)
def test_compiled_layer_norm(case, ahead):
    """As good as PyTorch's formula; a row of NaN touches no other; same bits twice; no findings."""
    chip, dtype, p, H = case
    inputs, upstream = norm_inputs(dtype, H)
    spoiled = [x.clone() for x in inputs]
    spoiled[0][-1] = float("nan")
    with on_chip(chip) as gpu:
        ours = norm_results(judged.layer_norm, inputs, upstream, p)
        again = norm_results(judged.layer_norm, spoiled, upstream, p)
    assert_sound(gpu)
    same = norm_results(kernels.layer_norm_reference, inputs, upstream, p)
    exact = norm_results(kernels.layer_norm_reference, inputs, upstream, p, torch.float64)
    rounding = properties.rounding_of_layer_norm(*inputs, p, 3, 1e-12, upstream)
    # (x, weight, bias, residual): the order of the function's arguments.
    properties.assert_as_good_as_pytorch(ours, same, exact, rounding)
    for k in (0, 1, 4):  # y and the gradients of x and residual are per row
        assert torch.equal(ours[k][:-1], again[k][:-1])


@pytest.mark.slow
@pytest.mark.judges("attention")
@pytest.mark.parametrize("chip", BOTH_CHIPS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compiled_attention_drops_by_the_rule(chip, dtype):
    """`attention_keep`, in the forward and in the backward pass."""
    length, D, p = 64, 64, 0.5
    qkv, cu_seqlens, _ = attention_inputs(dtype, D, [7, length])
    qkv[:, :2] = 0  # uniform weights, 1 / length
    qkv[7:, 2, 0] = torch.eye(length)
    upstream = torch.zeros(7 + length, 1, D, dtype=dtype)
    upstream[7:, 0] = torch.eye(length)
    with on_chip(chip) as gpu:
        out, _, _, dv = attention_results(judged.attention, qkv, cu_seqlens, upstream, p)
    assert_sound(gpu)
    keep = kernels.attention_keep(2**40 + 7, p, torch.tensor(0), torch.tensor(7), length)
    assert torch.equal(out[7:, 0] != 0, keep)
    assert torch.equal(dv[7:, 0] != 0, keep.T)


@pytest.mark.slow
@pytest.mark.judges("dropout")
@pytest.mark.parametrize("chip", BOTH_CHIPS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compiled_dropout_drops_by_the_rule(chip, dtype):
    x = torch.randn(9, 100).to(dtype)
    with on_chip(chip) as gpu:
        dropped = judged.dropout(x, 0.5, 5)
    assert_sound(gpu)
    assert torch.equal(dropped, kernels.dropout_reference(x.float(), 0.5, 5).to(dtype))


@pytest.mark.slow
@pytest.mark.judges("cross_entropy")
@pytest.mark.parametrize("chip", BOTH_CHIPS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_compiled_cross_entropy(chip, dtype):
    torch.manual_seed(0)
    logits = torch.randn(5, 300).to(dtype)
    labels = torch.tensor([0, 299, 17, -100, 5])

    def gradient(function, logits):
        leaf = logits.clone().requires_grad_()
        total = function(leaf * 1, labels)
        return total.detach(), torch.autograd.grad(total, leaf)[0]

    with on_chip(chip) as gpu:
        ours = gradient(judged.cross_entropy, logits)
    assert_sound(gpu)
    exact = gradient(kernels.cross_entropy_reference, logits.double())
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-5, atol=1e-5)
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=tolerance, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("D", [24, 128])
def test_compiled_in_fp32_and_for_sm_89(D):
    qkv, cu_seqlens, upstream = attention_inputs(torch.float32, D, [9, 1])
    with ptx.emulated("sm_89") as gpu:
        ours = attention_results(kernels.attention, qkv, cu_seqlens, upstream, 0.1)
    assert not gpu.findings, gpu.findings[0]
    inputs = (qkv, cu_seqlens, upstream, 0.1)
    same = attention_results(kernels.attention_reference, *inputs)
    exact = attention_results(kernels.attention_reference, *inputs, torch.float64)
    rounding = properties.rounding_of_attention(qkv, cu_seqlens, 0.1, upstream)
    properties.assert_as_good_as_pytorch(ours, same, exact, rounding)


@pytest.mark.slow
@pytest.mark.parametrize("chip", BOTH_CHIPS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "M, N, K, turned_a, turned_b, twice",
    [
        (64, 64, 64, False, False, False),
        (64, 64, 64, True, True, False),
        (64, 32, 16, False, True, False),
        (64, 16, 32, True, False, False),
        (128, 128, 64, False, False, True),
        (64, 256, 32, False, True, False),
        (64, 8, 128, False, False, False),
    ],
)
def test_products_of_matrices(chip, dtype, M, N, K, turned_a, turned_b, twice):
    """Triton's own layouts, of every width of a swizzle, give a matrix product."""
    torch.manual_seed(M + N + K)
    a, b = torch.randn(M, K).to(dtype), torch.randn(K, N).to(dtype)
    expected = a.double() @ b.double()
    if twice:
        expected = expected.to(dtype).double() @ b.double().T
    c = torch.full(expected.shape, float("nan"))
    arguments = (a.T.contiguous() if turned_a else a, b.T.contiguous() if turned_b else b, c)
    constants = dict(M=M, N=N, K=K, A_TURNED=turned_a, B_TURNED=turned_b, TWICE=twice)
    with ptx.emulated(chip) as gpu:
        ptx_kernels.product[(1,)](*arguments, **constants, num_warps=4)
    assert not gpu.findings, gpu.findings[0]
    assert gpu.counts["product"].flops == 2 * M * N * K * (1 + twice)
    # The sum is rounded to fp32 after each 16 products.
    eps = torch.finfo(torch.float32).eps
    sizes = a.double().abs() @ b.double().abs()
    allowed = K / 16 * eps * sizes
    if twice:  # each number of A B may also have been rounded to halves the other way
        allowed = (N / 16 * eps + torch.finfo(dtype).eps) * (sizes @ b.double().abs().T)
    assert ((c.double() - expected).abs() <= allowed).all()


@pytest.mark.slow
def test_any_triton_kernel_is_compiled_for_its_arguments():
    """1, 1.0 and True are three kernels; a default counts; what cannot be compiled is said."""
    x, out = torch.tensor([2.5]), torch.zeros(1)
    with ptx.emulated("sm_80") as gpu:
        for n in (3, 3.0, 1, 1.0, True):
            ptx_kernels.scaled[(1,)](x, out, n)
            assert out.item() == 2.5 * n
        ptx_kernels.scaled[(1,)](x, out, 3, ADDED=2)
        assert out.item() == 9.5
        with pytest.raises(ptx.PtxError, match="does_not_compile does not compile"):
            ptx_kernels.does_not_compile[(1,)](x)
        if kernels.INTERPRETED:  # then another process compiles
            with pytest.raises(ptx.PtxError, match="scaled is not defined at the top"):
                ptx_kernels.within_a_function()[(1,)](x, out, 3)
            with pytest.raises(ptx.PtxError, match="cannot be pickled"):
                ptx_kernels.scaled[(1,)](x, out, 3, ADDED=lambda: 0)
    assert not gpu.findings


# ---- PTX written by hand -------------------------------------------------------------------------

HEAD = """
.version 8.7
.target {target}
.address_size 64
.visible .entry {name}({parameters})
.reqntid {threads}
{{
    .reg .pred %p<20>;
    .reg .b16 %h<40>;
    .reg .b32 %r<200>;
    .reg .b64 %d<40>;
    {body}
    ret;
}}
"""


def text_of(body, pointers, threads=32, name="by_hand", target="sm_90a"):
    """The PTX of a kernel with so many pointers as parameters, loaded into %d0, %d1, ..."""
    parameters = ", ".join(f".param .u64 .ptr .global p{i}" for i in range(pointers))
    loads = "\n".join(f"    ld.param.u64 %d{i}, [p{i}];" for i in range(pointers))
    return HEAD.format(
        target=target, name=name, parameters=parameters, threads=threads, body=loads + "\n" + body
    )


def run_text(text, *tensors, grid=(1,), **rest):
    """Runs a PTX text. Returns the emulator."""
    gpu = ptx.Emulator("sm_90")
    gpu.run(text, grid, tensors, **rest)
    return gpu


ADD = """
    mov.u32 %r0, %ctaid.x;
    mov.u32 %r1, %ntid.x;
    mov.u32 %r2, %tid.x;
    mad.lo.s32 %r3, %r0, %r1, %r2;
    setp.ge.s32 %p0, %r3, {n};
    @%p0 bra DONE;
    mul.wide.s32 %d3, %r3, 4;
    add.s64 %d0, %d0, %d3;
    add.s64 %d1, %d1, %d3;
    add.s64 %d2, %d2, %d3;
    ld.global.f32 %r4, [%d0];
    ld.global.f32 %r5, [%d1];
    add.f32 %r6, %r4, %r5;
    st.global.f32 [%d2], %r6;
DONE:
"""


def test_a_vector_add_by_hand():
    x, y = torch.randn(100), torch.randn(100)
    out = torch.full((100,), float("nan"))
    gpu = run_text(text_of(ADD.format(n=100), 3), x, y, out, grid=(4,))
    assert torch.equal(out, x + y) and not gpu.findings
    assert gpu.counts["by_hand"]["float"] == 4 and gpu.counts["by_hand"]["global"] == 12


def test_a_bound_off_by_one_is_found():
    x, y, out = torch.randn(100), torch.randn(100), torch.empty(100)
    gpu = run_text(text_of(ADD.format(n=101), 3), x, y, out, grid=(4,))
    finding = gpu.findings[0]
    assert finding.kind == "bounds" and "4 bytes 0 bytes behind p0" in finding.message
    assert finding.program == (3, 0, 0) and finding.threads == (4,)
    assert finding.text == "ld.global.f32 %r4, [%d0]"
    assert text_of(ADD, 3).split("\n")[finding.line - 1].strip() == finding.text + ";"
    assert len(gpu.findings) == 3  # x, y and out


def test_tensors_side_by_side_are_told_apart():
    """Views of one storage, with no multiple of 16 bytes between them."""
    storage = torch.randn(300)
    x, y, out = storage[3:103], storage[103:203], torch.zeros(100)
    gpu = run_text(text_of(ADD.format(n=100), 3), x, y, out, grid=(4,))
    assert torch.equal(out, x + y) and not gpu.findings
    gpu = run_text(text_of(ADD.format(n=101), 3), x, y, out, grid=(4,))
    assert "4 bytes 0 bytes behind p0" in gpu.findings[0].message


# The sum of 64 numbers, from two warps.
REDUCTION = """
    .shared .align 4 .b8 numbers[256];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d2, %r0, 4;
    add.s64 %d0, %d0, %d2;
    ld.global.f32 %r1, [%d0];
    shl.b32 %r2, %r0, 2;
    mov.u32 %r3, numbers;
    add.s32 %r3, %r3, %r2;
    st.shared.f32 [%r3], %r1;
    bar.sync 0;
    setp.ge.s32 %p0, %r0, 32;
    @%p0 bra DONE;
    ld.shared.f32 %r4, [%r3+128];
    add.f32 %r1, %r1, %r4;
    shfl.sync.bfly.b32 %r5, %r1, 16, 31, -1;
    add.f32 %r1, %r1, %r5;
    shfl.sync.bfly.b32 %r5, %r1, 8, 31, -1;
    add.f32 %r1, %r1, %r5;
    shfl.sync.bfly.b32 %r5, %r1, 4, 31, -1;
    add.f32 %r1, %r1, %r5;
    shfl.sync.bfly.b32 %r5, %r1, 2, 31, -1;
    add.f32 %r1, %r1, %r5;
    shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;
    add.f32 %r1, %r1, %r5;
    setp.ne.s32 %p1, %r0, 0;
    @!%p1 st.global.f32 [%d1], %r1;
DONE:
"""


def test_a_reduction_by_hand():
    x = torch.arange(64.0)
    out = torch.zeros(1)
    gpu = run_text(text_of(REDUCTION, 2, threads=64), x, out)
    assert out.item() == 2016 and not gpu.findings


def test_a_missing_barrier_is_a_race_though_the_sum_is_right():
    x = torch.arange(64.0)
    out = torch.zeros(1)
    text = text_of(REDUCTION.replace("bar.sync 0;", ""), 2, threads=64)
    gpu = run_text(text, x, out)
    assert out.item() == 2016
    (finding,) = gpu.findings
    assert finding.kind == "race" and finding.text.startswith("ld.shared")
    assert "another warp wrote since the last barrier" in finding.message
    quiet = ptx.Emulator("sm_90", watch=False)
    quiet.run(text, (1,), [x, out])
    assert not quiet.findings


STORE = """
    mov.u32 %r0, %tid.x;
    mov.u32 %r9, %ctaid.x;
    .shared .align 16 .b8 buffer[256];
    mov.u32 %r1, buffer;
    shl.b32 %r2, %r0, 2;
    add.s32 %r3, %r1, %r2;
"""
ONE_FINDING = {
    "a read of what nobody wrote": ("ld.shared.u32 %r4, [%r3];", "uninitialized", "nobody wrote"),
    "a write behind shared memory": (
        "st.shared.u32 [%r3+132], %r0;",
        "bounds",
        "4 bytes 0 bytes behind shared memory",
    ),
    "a write before shared memory": (
        "st.shared.u32 [%r3+-4], %r0;",
        "bounds",
        "4 bytes before shared memory",
    ),
    "across the end of shared memory": (
        "st.shared.v2.u32 [%r1+252], {%r0, %r0};",
        "bounds",
        "8 bytes across the end of shared memory",
    ),
    "no multiple of the size": (
        "setp.lt.u32 %p0, %r0, 32; @%p0 st.shared.v2.u32 [%r3], {%r0, %r0};",
        "alignment",
        "multiple of 8",
    ),
    "no tensor": (
        "mov.u64 %d1, 64; st.global.u32 [%d1], %r0;",
        "bounds",
        "where there is no tensor",
    ),
    "two threads, one place": ("st.shared.u32 [%r1], %r0;", "race", "two threads store different"),
    "two warps write, and one of them again": (
        "st.shared.u32 [%r1], 5; and.b32 %r5, %r0, 32; setp.ne.s32 %p0, %r5, 0;"
        "@%p0 st.shared.u32 [%r1], 6;",
        "race",
        "another warp wrote",
    ),
    "a third warp reads what two wrote alike": (
        "setp.lt.u32 %p0, %r0, 64; @%p0 st.shared.u32 [%r1], 5; ld.shared.u32 %r4, [%r1];",
        "race",
        "another warp wrote",
        96,  # threads
    ),
    "a write after a read": (
        "st.shared.u32 [%r3], %r0; bar.sync 0; ld.shared.u32 %r4, [%r1];"
        "setp.eq.s32 %p0, %r0, 40; @%p0 st.shared.u32 [%r1], 9;",
        "race",
        "another warp read",
    ),
    "programs write one place": (
        "st.global.u32 [%d0], 1;",
        "race between programs",
        "writes p0 where another program",
    ),
    "a program reads what another writes": (
        "setp.eq.s32 %p0, %r9, 0; @%p0 st.global.u32 [%d0], 1; @!%p0 ld.global.u32 %r4, [%d0];",
        "race between programs",
        "reads p0 where another program writes",
    ),
    "a program writes what another read": (
        "setp.eq.s32 %p0, %r9, 0; @%p0 ld.global.u32 %r4, [%d0]; @!%p0 st.global.u32 [%d0], 1;",
        "race between programs",
        "writes p0 where another program",
    ),
    "half of the threads at a barrier": (
        "setp.lt.s32 %p0, %r0, 32; @%p0 bra SKIP; bar.sync 0; SKIP:",
        "barrier",
        "32 threads end without reaching this barrier",
    ),
    "half of a warp at a shuffle": (
        "setp.lt.s32 %p0, %r0, 16; @%p0 shfl.sync.bfly.b32 %r4, %r0, 1, 31, -1;",
        "divergence",
        "not all threads of a warp",
    ),
    "a copy that nobody waits for": (
        "cp.async.ca.shared.global [%r3], [%d0], 4; cp.async.commit_group;"
        "ld.shared.u32 %r4, [%r3]; cp.async.wait_group 0;",
        "uninitialized",
        "nobody wrote",
    ),
    "a copy to where others read": (
        "st.shared.u32 [%r3], %r0; bar.sync 0; ld.shared.u32 %r4, [%r1]; xor.b32 %r5, %r3, 128;"
        "cp.async.ca.shared.global [%r5], [%d0], 4; cp.async.wait_all;",
        "race",
        "copies to shared memory that another warp read",
    ),
}


@pytest.mark.parametrize("name", ONE_FINDING)
def test_what_the_watch_finds(name):
    body, kind, words, *threads = ONE_FINDING[name]
    (threads,) = threads or [64]
    gpu = run_text(text_of(STORE + body, 1, threads), torch.zeros(96), grid=(2,))
    assert gpu.findings
    finding = gpu.findings[0]
    assert finding.kind == kind and words in finding.message, finding
    assert finding.text in str(finding)


NO_FINDING = {
    "the same value from two warps": "st.shared.u32 [%r1], 5;",
    "a barrier between": "st.shared.u32 [%r3], %r0; bar.sync 0; ld.shared.u32 %r4, [%r1];",
    "what all wrote alike": "st.shared.u32 [%r1], 5; ld.shared.u32 %r4, [%r1];",
    "a tensor is read by a warp that another writes": (
        "mul.wide.u32 %d1, %r9, 4; add.s64 %d1, %d0, %d1; ld.global.u32 %r4, [%d1];"
        "add.s32 %r4, %r4, 1; setp.eq.u32 %p0, %r0, 0; @%p0 st.global.u32 [%d1], %r4;"
    ),
    "one's own": "st.shared.u32 [%r3], %r0; ld.shared.u32 %r4, [%r3];",
    "a copy that is waited for": (
        "cp.async.ca.shared.global [%r3], [%d0], 4; cp.async.commit_group;"
        "cp.async.wait_group 0; ld.shared.u32 %r4, [%r3];"
    ),
    "a copy of nothing": (
        "mov.u64 %d1, 64; mov.u32 %r5, 0;"
        "cp.async.ca.shared.global [%r3], [%d1], 4, %r5; cp.async.wait_all;"
    ),
}


@pytest.mark.parametrize("name", NO_FINDING)
def test_what_the_watch_does_not_find(name):
    gpu = run_text(text_of(STORE + NO_FINDING[name], 1, threads=64), torch.zeros(64), grid=(2,))
    assert not gpu.findings, gpu.findings[0]


def test_a_copy_lands_at_its_wait_and_not_before():
    """Of two groups, `wait_group 1` waits for the first."""
    body = STORE + (
        "st.shared.u32 [%r3], 7; st.shared.u32 [%r3+128], 7; mul.wide.u32 %d2, %r0, 4;"
        "add.s64 %d0, %d0, %d2; add.s64 %d1, %d1, %d2;"
        "cp.async.ca.shared.global [%r3], [%d0], 4; cp.async.commit_group;"
        "cp.async.ca.shared.global [%r3+128], [%d0], 4; cp.async.commit_group;"
        "cp.async.wait_group 1; ld.shared.u32 %r5, [%r3]; ld.shared.u32 %r6, [%r3+128];"
        "st.global.u32 [%d1], %r5; st.global.u32 [%d1+128], %r6; cp.async.wait_group 0;"
    )
    out = torch.zeros(64, dtype=torch.int32)
    gpu = run_text(text_of(body, 2), torch.arange(32, dtype=torch.int32), out)
    assert out.tolist() == [*range(32), *[7] * 32]
    assert "before the wait for the cp.async" in gpu.findings[0].message


def test_threads_that_part_meet_again():
    """A loop of another number of rounds in each thread, and a branch in it."""
    body = """
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d1, %r0, 4;
    add.s64 %d0, %d0, %d1;
    mov.u32 %r1, 0;
    mov.u32 %r2, 0;
LOOP:
    setp.ge.u32 %p0, %r2, %r0;
    @%p0 bra DONE;
    and.b32 %r3, %r2, 1;
    setp.eq.u32 %p1, %r3, 0;
    @%p1 bra EVEN;
    add.s32 %r1, %r1, 100;
EVEN:
    add.s32 %r1, %r1, 1;
    add.s32 %r2, %r2, 1;
    bra LOOP;
DONE:
    shfl.sync.idx.b32 %r4, %r1, 31, 31, -1;
    st.global.u32 [%d0], %r1;
    """
    out = torch.zeros(32, dtype=torch.int32)
    gpu = run_text(text_of(body, 1), out)
    assert out.tolist() == [n + 100 * (n // 2) for n in range(32)] and not gpu.findings
    (loop,) = gpu.counts["by_hand"].loops
    assert loop.iterations == 32  # the header runs once more than the last thread's 31 rounds


def test_a_warp_on_a_detour_is_waited_for():
    """The detour stands behind the barrier in the text."""
    body = (
        STORE
        + """
    setp.ge.u32 %p0, %r0, 32;
    @%p0 bra DETOUR;
BACK:
    st.shared.u32 [%r3], %r0;
    bar.sync 0;
    xor.b32 %r4, %r3, 128;
    ld.shared.u32 %r5, [%r4];
    mul.wide.u32 %d2, %r0, 4;
    add.s64 %d0, %d0, %d2;
    st.global.u32 [%d0], %r5;
    ret;
DETOUR:
    mov.u32 %r6, 0;
    bra BACK;
    """
    )
    out = torch.zeros(64, dtype=torch.int32)
    gpu = run_text(text_of(body, 1, threads=64), out)
    assert out.tolist() == [*range(32, 64), *range(32)] and not gpu.findings


def test_ptx_as_nvcc_writes_it():
    """Named registers, generic addresses, shared memory of floats."""
    body = """
    .shared .align 4 .f32 numbers[32];
    .reg .f32 %f1, %f2;
    .reg .u64 %ptr;
    cvta.to.global.u64 %ptr, %d0;
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %d1, %r0, 4;
    add.s64 %ptr, %ptr, %d1;
    ld.global.nc.f32 %f1, [%ptr];
    mul.f32 %f2, %f1, 0f40000000;  // 2.0
    st.global.f32 [%ptr], %f2;
    """
    x = torch.randn(32)
    doubled = 2 * x
    gpu = run_text(text_of(body, 1), x)
    assert torch.equal(x, doubled) and not gpu.findings


@pytest.mark.parametrize(
    "body, words",
    [
        ("mbarrier.init.shared.b64 [%r0], 1;", "mbarrier"),
        ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r0], 32;", "tcgen05"),
        ("cp.async.bulk.commit_group;", "cp.async.bulk"),
        ("atom.global.add.u32 %r0, [%d0], 1;", "the instruction atom"),
        ("add.sat.s32 %r0, %r1, %r2;", ".sat"),
        ("add.rz.f32 %r0, %r1, %r2;", ".rz"),
        ("fma.rn.bf16x2 %r0, %r1, %r2, %r3;", "the type bf16x2"),
        ("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r0}, {%r1}, {%r2}, {%r3};", "mma"),
        ("ld.global.acquire.gpu.u32 %r0, [%d0];", "acquire"),
        ("add.s32 %q0, %r1, %r2;", "%q0"),
        ("{ .reg .b32 %x; }", "scope in braces"),
        ("ld.global.u32 %r0, [p0];", "a parameter as an address"),
        ("mov.u32 %r0, %tid;", "%tid is not declared"),
        ("add.f32 %r0, %r1, %r2, %r3;", "another number of operands"),
        ("bra NOWHERE;", "NOWHERE is not declared"),
        ("bar.sync 1;", "bar.sync 0"),
        ("fma.rn.f64 %d1, %d0, %d0, %d0;", "fma of f64"),
        ("mul.s32 %r0, %r1, %r2;", "this form"),
        ("and.f32 %r0, %r1, %r2;", "and of f32"),
        ("ex2.approx.s32 %r0, %r1;", "ex2"),
        ("add.ftz.f16 %h0, %h1, %h2;", "add of f16"),
        ("mul.lo.bf16 %h0, %h1, %h2;", "the type bf16"),
        ("shfl.sync.bfly.b32 %r0, %r1, 1, 31, 0xffff;", "a part of a warp"),
        ("cp.async.cg.shared.global [%r0], [%d0], 4;", "this form"),
        ("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r0, %r1}, [%r2];", "number of registers"),
        ("mov.b32 {%h0, %h1, %h2}, %r0;", "this form"),
        ("mov.b32 %r0, 010x;", "010x"),
        ("ld.param.u32 %r0, [p0+4];", "a part of a parameter"),
        ("bra 5;", "bra 5"),
        (".shared .align 4 .b8 b[4][8];", "the directive"),
        ("fence.proxy.async.global;", "fence.proxy.async.global"),
        ("ld.param.u64 %d1, [q];", "q is not declared"),
        ("add.s32 %r0;", "add.s32 %r0"),
        ("cvta.shared.u64 %d1, %d0;", "cvta.shared"),
        (".local .align 4 .b8 stack[8];", "the directive"),
    ],
)
def test_what_is_not_known_is_refused_by_name(body, words):
    with pytest.raises(ptx.PtxError) as error:
        run_text(text_of("\n" + body, 1), torch.zeros(1))
    assert words in str(error.value)


def test_arguments_that_do_not_fit_are_refused():
    text = text_of(ADD.format(n=100), 3)
    x = torch.zeros(100)
    for words, tensors in (
        ("by_hand takes 3 arguments, got 2", [x, x]),
        ("by_hand: p1 must lie on the CPU, not meta", [x, x.to("meta"), x]),
    ):
        with pytest.raises(ptx.PtxError, match=words):
            run_text(text, *tensors)
    for words, run in (
        ("at most 1,024 threads", lambda: run_text(text_of("", 0, threads=2048))),
        ("more than", lambda: run_text(text_of("", 0), grid=(1, 65_536))),
        ("needs 300,000 bytes", lambda: run_text(text_of(".shared .align 16 .b8 b[300000];", 0))),
    ):
        with pytest.raises(ptx.PtxError, match=words):
            run()
    with pytest.raises(ptx.PtxError, match="its PTX is for sm_90a, not for sm_80"):
        ptx.Emulator("sm_80").run(text, (1,), [x, x, x])


def test_other_chips_are_refused():
    with pytest.raises(ptx.PtxError, match="sm_100 is not supported: the machine knows sm_80"):
        ptx.Emulator("sm_100")
    with pytest.raises(ptx.PtxError, match="sm_100 is not supported"), ptx.emulated("sm_100"):
        pass


# ---- each instruction against NumPy --------------------------------------------------------------

NUMPY = {"s32": np.int32, "u32": np.uint32, "f32": np.float32, "s64": np.int64, "u64": np.uint64}
NUMPY |= {"b32": np.uint32, "b64": np.uint64, "f16": np.float16, "u16": np.uint16, "s16": np.int16}
NUMPY |= {"b16": np.uint16, "bf16": np.uint16}
PREFIX = {2: "%h", 4: "%r", 8: "%d"}


def bf16(x):
    """Nearest bf16, as bits, by PyTorch."""
    return torch.from_numpy(x).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def divided(a, b):
    """Towards 0, with Python's integers; what division by 0 gives is not compared."""
    return [
        abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1) for x, y in zip(a.tolist(), b.tolist())
    ]


def flush(x):
    return np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, 0 * x, x)


def wide_product(a, b):
    return a.astype(object) * b.astype(object)  # Python's integers


def towards_0(x, least, most):
    """A float as the nearest of these integers, without what is behind the point."""
    if np.isnan(x):
        return 0
    return most if x >= most else least if x <= least else int(x)


def permuted(a, b, selectors):
    """Byte by byte: bits 0 to 2 of a nibble choose a byte, bit 3 asks for its sign."""
    results = []
    for x, y, selector in zip(a.tolist(), b.tolist(), selectors.tolist()):
        choices = [*x.to_bytes(4, "little"), *y.to_bytes(4, "little")]
        chosen = []
        for nibble in (selector >> shift & 15 for shift in (0, 4, 8, 12)):
            byte = choices[nibble & 7]
            chosen.append((255 if byte > 127 else 0) if nibble & 8 else byte)
        results.append(int.from_bytes(bytes(chosen), "little"))
    return results


# {instruction: (type of the result, types of the operands, what NumPy makes of them)}
INSTRUCTIONS = {
    "add.s32": ("s32", ["s32", "s32"], lambda a, b: a + b),
    "sub.s32": ("s32", ["s32", "s32"], lambda a, b: a - b),
    "add.s64": ("s64", ["s64", "s64"], lambda a, b: a + b),
    "mul.lo.s32": ("s32", ["s32", "s32"], lambda a, b: a * b),
    "mul.lo.s64": ("s64", ["s64", "s64"], lambda a, b: a * b),
    "mul.hi.u32": ("u32", ["u32", "u32"], lambda a, b: wide_product(a, b) >> 32),
    "mul.hi.s32": ("s32", ["s32", "s32"], lambda a, b: wide_product(a, b) >> 32),
    "mul.wide.s32": ("s64", ["s32", "s32"], wide_product),
    "mul.wide.u32": ("u64", ["u32", "u32"], wide_product),
    "mad.lo.s32": ("s32", ["s32", "s32", "s32"], lambda a, b, c: a * b + c),
    "mad.wide.u32": ("u64", ["u32", "u32", "u64"], lambda a, b, c: a.astype(np.uint64) * b + c),
    "div.s32": ("s32", ["s32", "s32"], divided),
    "div.u64": ("u64", ["u64", "u64"], divided),
    "div.s64": ("s64", ["s64", "s64"], divided),
    "neg.s32": ("s32", ["s32"], lambda a: -a),
    "min.s32": ("s32", ["s32", "s32"], np.minimum),
    "max.u32": ("u32", ["u32", "u32"], np.maximum),
    "and.b32": ("b32", ["b32", "b32"], np.bitwise_and),
    "or.b64": ("b64", ["b64", "b64"], np.bitwise_or),
    "xor.b32": ("b32", ["b32", "b32"], np.bitwise_xor),
    "not.b32": ("b32", ["b32"], np.bitwise_not),
    "prmt.b32": ("b32", ["b32", "b32", "b32"], permuted),
    "cvt.u64.u32": ("u64", ["u32"], lambda a: a.astype(np.uint64)),
    "cvt.s64.s32": ("s64", ["s32"], lambda a: a.astype(np.int64)),
    "cvt.u32.u64": ("u32", ["u64"], lambda a: a.astype(np.uint32)),
    "cvt.u32.u16": ("u32", ["u16"], lambda a: a.astype(np.uint32)),
    "cvt.s32.s16": ("s32", ["s16"], lambda a: a.astype(np.int32)),
    "cvt.rn.f32.s32": ("f32", ["s32"], lambda a: a.astype(np.float32)),
    "cvt.rzi.s32.f32": (
        "s32",
        ["f32"],
        lambda a: np.where(np.isnan(a), 0, np.trunc(a.astype(np.float64))).clip(
            -(2**31), 2**31 - 1
        ),
    ),
    "cvt.rzi.s64.f32": (
        "s64",
        ["f32"],
        lambda a: np.array([towards_0(x, -(2**63), 2**63 - 1) for x in a], object),
    ),
    "cvt.rzi.u64.f32": (
        "u64",
        ["f32"],
        lambda a: np.array([towards_0(x, 0, 2**64 - 1) for x in a], object),
    ),
    "cvt.rn.f16.f32": ("f16", ["f32"], lambda a: a.astype(np.float16)),
    "cvt.f32.f16": ("f32", ["f16"], lambda a: a.astype(np.float32)),
    "cvt.rn.bf16.f32": ("bf16", ["f32"], bf16),
    "cvt.f32.bf16": ("f32", ["bf16"], lambda a: (a.astype(np.uint32) << 16).view(np.float32)),
    "add.f32": ("f32", ["f32", "f32"], np.add),
    "sub.f32": ("f32", ["f32", "f32"], np.subtract),
    "mul.f32": ("f32", ["f32", "f32"], np.multiply),
    "mul.ftz.f32": ("f32", ["f32", "f32"], lambda a, b: flush(flush(a) * flush(b))),
    "fma.rn.f32": ("f32", ["f32", "f32", "f32"], lambda a, b, c: np.float64(a) * b + c),
    "neg.f32": ("f32", ["f32"], np.negative),
    "abs.f32": ("f32", ["f32"], np.abs),
    "max.f32": ("f32", ["f32", "f32"], np.fmax),
    "min.f32": ("f32", ["f32", "f32"], np.fmin),
    "div.full.f32": ("f32", ["f32", "f32"], np.divide),
    "rcp.approx.f32": ("f32", ["f32"], lambda a: np.float32(1) / a),
    "ex2.approx.ftz.f32": ("f32", ["f32"], lambda a: flush(np.exp2(flush(a)))),
    "lg2.approx.f32": ("f32", ["f32"], np.log2),
    "sqrt.approx.ftz.f32": ("f32", ["f32"], lambda a: np.sqrt(flush(a))),
}


def random_operand(type, random, count):
    """Random bits, or numbers that make sense and some that do not (NaN, infinities, 0)."""
    dtype = np.dtype(NUMPY[type])
    if dtype.kind != "f" and type != "bf16":
        return random.integers(0, 256, count * dtype.itemsize, np.uint8).view(dtype)
    numbers = random.normal(size=count) * 10.0 ** random.integers(-6, 7, count)
    special = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-40, -1e-40, 1.0]
    numbers[: len(special)] = random.permutation(special)
    if type == "bf16":
        return bf16(numbers.astype(np.float32))
    with np.errstate(over="ignore"):
        return numbers.astype(dtype)


@settings(max_examples=8)
@given(seed=st.integers(0, 2**32 - 1))
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_an_instruction_is_what_numpy_computes(name, seed):
    result_type, types, function = INSTRUCTIONS[name]
    random = np.random.default_rng(seed)
    operands = [random_operand(type, random, 64) for type in types]
    with np.errstate(all="ignore"):
        expected = np.asarray(function(*operands))
        expected = expected.astype(np.dtype(NUMPY[result_type]), casting="unsafe")
    body = "mov.u32 %r199, %tid.x;"
    names = []
    for i, type in enumerate(types):
        size = np.dtype(NUMPY[type]).itemsize
        names.append(f"{PREFIX[size]}{30 + i}")
        body += f"mul.wide.u32 %d20, %r199, {size}; add.s64 %d21, %d{i}, %d20;"
        body += f"ld.global.b{8 * size} {names[-1]}, [%d21];"
    size = np.dtype(NUMPY[result_type]).itemsize
    target = f"{PREFIX[size]}39"
    body += f"{name} {target}, {', '.join(names)}; mul.wide.u32 %d20, %r199, {size};"
    body += f"add.s64 %d21, %d{len(types)}, %d20; st.global.b{8 * size} [%d21], {target};"
    out = np.zeros(64, expected.dtype)
    tensors = [torch.from_numpy(x.view(np.uint8)) for x in [*operands, out]]
    gpu = run_text(text_of(body, len(tensors), threads=64), *tensors)
    assert not gpu.findings
    nan = np.isnan(expected) if expected.dtype.kind == "f" else np.zeros(64, bool)
    if result_type == "bf16":
        nan = (expected & 0x7FFF) > 0x7F80  # the bits of a NaN may be others
    assert (out[~nan].view(np.uint8) == expected[~nan].view(np.uint8)).all()
    assert result_type == "bf16" or np.isnan(out[nan]).all()


@given(a=st.integers(0, 2**32 - 1), b=st.integers(0, 70), length=st.integers(1, 32))
@example(a=2**31, b=32, length=1)
def test_shifts_and_bit_fields(a, b, length):
    """A shift by the width or more gives 0, or the sign."""
    start = min(b, 32 - length)
    body = (
        "mov.u32 %r0, %tid.x; setp.ne.s32 %p0, %r0, 0; @%p0 bra DONE;"
        f"mov.b32 %r1, {a}; mov.b32 %r2, {b};"
        "shl.b32 %r3, %r1, %r2; shr.u32 %r4, %r1, %r2; shr.s32 %r5, %r1, %r2;"
        f"bfe.u32 %r6, %r1, {start}, {length}; bfe.s32 %r7, %r1, {start}, {length};"
        "st.global.v4.b32 [%d0], {%r3, %r4, %r5, %r6}; st.global.b32 [%d0+16], %r7; DONE:"
    )
    out = torch.zeros(8, dtype=torch.int32)
    run_text(text_of(body, 1), out)
    signed = a - 2**32 if a >= 2**31 else a
    field = a >> start & (2**length - 1)
    signed_field = field - 2**length if field >> (length - 1) else field
    expected = [(a << b), a >> b, signed >> b, field, signed_field]
    assert [x % 2**32 for x in out[:5].tolist()] == [x % 2**32 for x in expected]


@pytest.mark.parametrize("type", ["f32", "bf16"])
@given(a=st.floats(width=32), b=st.floats(width=32))
@example(a=float("nan"), b=1.0)
@example(a=-0.0, b=0.0)
@example(a=-1.0, b=1.0)
def test_comparisons_of_floats(type, a, b):
    """A comparison with NaN is false; with a u in its name it is true."""
    if type == "bf16":
        halves_of = torch.tensor([a, b]).bfloat16()
        a, b = halves_of.tolist()
        bits = halves_of.view(torch.int16).tolist()
        body = "".join(f"mov.b16 %h{i}, {word};" for i, word in enumerate(bits))
    else:
        bits = [np.float32(x).view(np.uint32) for x in (a, b)]
        body = "".join(f"mov.b32 %r{i}, 0f{word:08X};" for i, word in enumerate(bits))
    register = "%h" if type == "bf16" else "%r"
    names = ["eq", "ne", "lt", "le", "gt", "ge"]
    for i, name in enumerate([*names, *(f"{name}u" for name in names), "num", "nan"]):
        body += f"setp.{name}.{type} %p{i}, {register}0, {register}1;"
        body += f"selp.b32 %r{10 + i}, 1, 0, %p{i};"
        body += f"st.global.b32 [%d0+{4 * i}], %r{10 + i};"
    out = torch.zeros(14, dtype=torch.int32)
    run_text(text_of(body, 1), out)
    ordered = [a == b, a != b, a < b, a <= b, a > b, a >= b]
    nan = a != a or b != b
    expected = [not nan and x for x in ordered] + [nan or x for x in ordered] + [not nan, nan]
    assert out.tolist() == expected


# ---- fragments, by the formulas of the PTX ISA ---------------------------------------------------


def run_fragments(instruction, inputs, outputs, threads, shared=None, before=""):
    """Runs one instruction on given registers.

    inputs: [(first register, (registers, threads) uint32), ...]. outputs: (first register, count).
    shared: bytes to put into shared memory, before it. Returns (registers, threads) uint32.
    """
    body = "mov.u32 %r199, %tid.x; mul.wide.u32 %d20, %r199, 4;\n"
    tensors = []
    for first, numbers in inputs:
        body += f"add.s64 %d21, %d{len(tensors)}, %d20;\n"
        for i in range(len(numbers)):
            body += f"ld.global.b32 %r{first + i}, [%d21+{4 * threads * i}];\n"
        tensors.append(torch.from_numpy(np.ascontiguousarray(numbers).view(np.int32)))
    if shared is not None:
        body = f".shared .align 16 .b8 memory[{len(shared)}];\n" + body
        body += f"mov.u32 %r198, memory; shl.b32 %r197, %r199, 2; add.s64 %d21, %d{len(tensors)},"
        body += " %d20; add.s32 %r197, %r198, %r197;\n"
        for i in range(len(shared) // (4 * threads)):
            body += f"ld.global.b32 %r196, [%d21+{4 * threads * i}];"
            body += f"st.shared.b32 [%r197+{4 * threads * i}], %r196;\n"
        body += "bar.sync 0; fence.proxy.async.shared::cta;\n"
        tensors.append(torch.from_numpy(shared.view(np.int32)))
    first, count = outputs
    out = torch.zeros(count, threads, dtype=torch.int32)
    body += before + instruction + f"add.s64 %d21, %d{len(tensors)}, %d20;\n"
    for i in range(count):
        body += f"st.global.b32 [%d21+{4 * threads * i}], %r{first + i};\n"
    gpu = run_text(text_of(body, len(tensors) + 1, threads=threads), *tensors, out)
    assert not gpu.findings, gpu.findings[0]
    return out.numpy().view(np.uint32)


def halves(x, dtype):
    """Numbers as the bits of a half-precision type: uint16."""
    return torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)


def registers(names):
    return "{" + ", ".join(f"%r{i}" for i in names) + "}"


NAME = {torch.bfloat16: "bf16", torch.float16: "f16"}


def assert_rounded_once(number, exact):
    """Half a step of fp32 away at most, beside what fp64 loses of numbers of size 1 to 10."""
    half_a_step = np.finfo(np.float32).eps / 2
    assert abs(number - exact) <= half_a_step * abs(exact) + 1e-12


def a_fragment(a, thread, register, half):
    """The element of A (16 x 16) that a thread holds (figures of section 9.7.14.5.8)."""
    row = thread % 32 // 4 + 8 * (register % 2)
    column = thread % 4 * 2 + half + 8 * (register // 2)
    return a[thread // 32 * 16 + row, column]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_mma_is_a_matrix_product(dtype):
    """Two warps, each with matrices of its own."""
    random = np.random.default_rng(0)
    a, b, c = random.normal(size=(32, 16)), random.normal(size=(32, 8)), random.normal(size=(32, 8))
    a16, b16 = halves(a, dtype), halves(b, dtype)
    left = np.zeros((4, 64, 2), np.uint16)
    right = np.zeros((2, 64, 2), np.uint16)
    start = np.zeros((4, 64), np.float32)
    for thread in range(64):
        warp = thread // 32 * 16
        group, t = thread % 32 // 4, thread % 4
        for register, half in itertools.product(range(4), range(2)):
            left[register, thread, half] = a_fragment(a16, thread, register, half)
        for register, half in itertools.product(range(2), range(2)):
            right[register, thread, half] = b16[warp + 2 * t + half + 8 * register, group]
        for register in range(4):
            start[register, thread] = c[warp + group + 8 * (register // 2), 2 * t + register % 2]
    inputs = [(0, left.view(np.uint32)[..., 0]), (4, right.view(np.uint32)[..., 0])]
    inputs.append((8, start.view(np.uint32)))
    name = f"mma.sync.aligned.m16n8k16.row.col.f32.{NAME[dtype]}.{NAME[dtype]}.f32"
    operands = [registers(range(12, 16)), registers(range(4)), registers((4, 5))]
    text = f"{name} {', '.join(operands)}, {registers(range(8, 12))};\n"
    out = run_fragments(text, inputs, (12, 4), 64).view(np.float32)
    exact_a, exact_b = (torch.from_numpy(x).to(dtype).double().numpy() for x in (a, b))
    for warp in (0, 1):
        rows = slice(16 * warp, 16 * warp + 16)
        exact = exact_a[rows] @ exact_b[rows] + c[rows].astype(np.float32)
        for thread, register in itertools.product(range(32), range(4)):
            row, column = thread // 4 + 8 * (register // 2), thread % 4 * 2 + register % 2
            assert_rounded_once(out[register, 32 * warp + thread], exact[row, column])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_ldmatrix_and_stmatrix(count, transposed):
    """Thread 4 g + t has the elements 2 t and 2 t + 1 of row g, or of column g if transposed."""
    random = np.random.default_rng(count)
    matrices = random.integers(0, 2**16, (count, 8, 8), np.uint16)
    address = "and.b32 %r190, %r199, 31; shl.b32 %r190, %r190, 4;"
    address += f"and.b32 %r190, %r190, {128 * count - 1}; add.s32 %r190, %r198, %r190;\n"
    trans = ".trans" * transposed
    text = f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {registers(range(count))}, "
    out = run_fragments(
        text + "[%r190];\n", [], (0, count), 32, np.tile(matrices, (4, 1, 1)).ravel(), address
    )
    halves_of = np.ascontiguousarray(out).view(np.uint16).reshape(count, 32, 2)
    for matrix, thread, half in itertools.product(range(count), range(32), range(2)):
        place = (thread // 4, thread % 4 * 2 + half)
        element = matrices[matrix][place[::-1] if transposed else place]
        assert halves_of[matrix, thread, half] == element

    # stmatrix puts them back where ldmatrix took them from.
    store = f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r190], "
    store += f"{registers(range(count))}; bar.sync 0; ld.shared.b32 %r100, [%r197];\n"
    for i in range(1, count):
        store += f"ld.shared.b32 %r{100 + i}, [%r197+{128 * i}];\n"
    blank = np.zeros(512 * count, np.uint8)
    back = run_fragments(store, [(0, out)], (100, count), 32, blank, address)
    assert (np.ascontiguousarray(back).view(np.uint16).ravel() == matrices.ravel()).all()


def lay_out(matrix, width, k_major):
    """A factor (rows, 16) in shared memory: its bytes, and the offsets `leading` and `stride`.

    Naive: element by element, as the canonical layouts of section 9.7.15.5.1 have it. An atom is 8
    lines of `width` bytes; the 16-byte pieces of line i of a 128-byte swizzle stand at piece XOR i.
    """
    rows, columns = matrix.shape
    lines, length = (rows, columns) if k_major else (columns, rows)
    per_line = width // 2  # elements
    atoms_along = -(-length // per_line)
    memory = np.zeros(atoms_along * -(-lines // 8) * 8 * width // 2, np.uint16)
    atom = 8 * width
    for row, column in itertools.product(range(rows), range(columns)):
        line, place = (row, column) if k_major else (column, row)
        along, within = divmod(place, per_line)
        # Atoms of one group of 8 lines stand side by side.
        offset = (line // 8 * atoms_along + along) * atom + line % 8 * width
        piece, rest = divmod(2 * within, 16)
        # The XOR takes address bits 7 to 9; a line of 64 bytes fills only half of bit 7.
        address = offset + 16 * piece + rest
        swizzled = address ^ ((address >> 7 & 7) & (width // 16 - 1)) << 4
        memory[swizzled // 2] = matrix[row, column]
    between_groups = atoms_along * atom
    return memory, atom, between_groups


# (columns of B, bytes of a line, whether K lies along the lines).
DESCRIBED = [
    (columns, width, k_major)
    for columns in (8, 32, 64, 128)
    for width in (32, 64, 128)
    for k_major in (True, False)
    if k_major or columns >= width // 2
]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("columns, width, k_major", DESCRIBED)
@pytest.mark.parametrize("a_in_registers", [True, False])
def test_wgmma_is_a_matrix_product(dtype, columns, width, k_major, a_in_registers):
    random = np.random.default_rng(columns)
    a, b = random.normal(size=(64, 16)), random.normal(size=(columns, 16))  # B transposed
    start = random.normal(size=(columns // 2, 128)).astype(np.float32)
    a16, b16 = halves(a, dtype), halves(b, dtype)
    memory, atom, between = lay_out(b16, width, k_major)
    code = {128: 1, 64: 2, 32: 3}[width]
    b_place = 0
    memories = [memory]
    leading, stride = (16, between) if k_major else (atom, between)
    inputs = [(64, start.view(np.uint32))]
    a_text = registers(range(4))
    before = ""
    if a_in_registers:
        left = np.zeros((4, 128, 2), np.uint16)
        for thread, register, half in itertools.product(range(128), range(4), range(2)):
            left[register, thread, half] = a_fragment(a16, thread, register, half)
        inputs.append((0, left.view(np.uint32)[..., 0]))
        settings_text = "1, 1, 1, {}"
    else:
        a_memory, _, a_between = lay_out(a16, 32, True)
        memories.insert(0, a_memory)
        b_place = len(a_memory) * 2
        before += descriptor("%d30", 0, 16, a_between, 3)
        a_text = "%d30"
        settings_text = "1, 1, 1, 0, {}"
    before += descriptor("%d31", b_place, leading, stride, code)
    whole = np.concatenate(memories).view(np.uint8)
    whole = np.concatenate([whole, np.zeros(-len(whole) % 512, np.uint8)])
    shape = f"m64n{columns}k16.f32.{NAME[dtype]}.{NAME[dtype]}"
    accumulators = registers(range(64, 64 + columns // 2))
    text = f"wgmma.fence.sync.aligned; wgmma.mma_async.sync.aligned.{shape} {accumulators}, "
    text += f"{a_text}, %d31, {settings_text.format(int(not k_major))};\n"
    text += "wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n"
    out = run_fragments(text, inputs, (64, columns // 2), 128, whole, before).view(np.float32)
    exact_a, exact_b = (torch.from_numpy(x).to(dtype).double().numpy() for x in (a, b))
    product = exact_a @ exact_b.T
    for register, thread in itertools.product(range(columns // 2), range(128)):
        row = thread // 32 * 16 + thread % 32 // 4 + 8 * (register // 2 % 2)
        column = register // 4 * 8 + thread % 4 * 2 + register % 2
        exact = product[row, column] + start[register, thread]
        assert_rounded_once(out[register, thread], exact)


def descriptor(register, place, leading, stride, code):
    """PTX that makes a descriptor of shared memory, from the offset `place` on."""
    rest = leading >> 4 << 16 | stride >> 4 << 32 | code << 62
    return (
        f"add.s32 %r195, %r198, {place}; bfe.u32 %r195, %r195, 4, 14; cvt.u64.u32 {register}, "
        f"%r195; or.b64 {register}, {register}, {rest};\n"
    )


WGMMA = """
    .shared .align 16 .b8 memory[4096];
    mov.u32 %r199, %tid.x;
    mov.u32 %r198, memory;
    shl.b32 %r190, %r199, 4;
    add.s32 %r190, %r198, %r190;
    st.shared.v4.b32 [%r190], {%r0, %r0, %r0, %r0};
    st.shared.v4.b32 [%r190+2048], {%r0, %r0, %r0, %r0};
    bar.sync 0;
    fence.proxy.async.shared::cta;
    bfe.u32 %r195, %r198, 4, 14;
    cvt.u64.u32 %d30, %r195;
    or.b64 %d30, %d30, 13835058124187041808;
    wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16
        {%r4, %r5, %r6, %r7}, {%r8, %r9, %r10, %r11}, %d30, 0, 1, 1, 0;
    wgmma.commit_group.sync.aligned;
    wgmma.wait_group.sync.aligned 0;
    add.f32 %r20, %r4, %r5;
    bar.sync 0;
    st.shared.b32 [%r190], %r20;
"""
FORGOTTEN = {
    "bar.sync 0;\n    fence": ("fence", "race", "a wgmma reads shared memory that was written"),
    "fence.proxy.async.shared::cta;": ("", "wgmma", "no fence.proxy.async between"),
    "wgmma.fence.sync.aligned;": ("", "wgmma", "no wgmma.fence before the first wgmma"),
    "wgmma.commit_group.sync.aligned;": ("", "wgmma", "uses the accumulator of a wgmma before"),
    "wgmma.wait_group.sync.aligned 0;": ("", "wgmma", "uses the accumulator of a wgmma before"),
    "add.f32 %r20, %r4, %r5;\n    bar.sync 0;": (
        "add.f32 %r20, %r4, %r5;",
        "race",
        "another warp read since the last barrier",
    ),
    "wgmma.mma_async.": (
        "mov.b32 %r4, 0; wgmma.mma_async.",
        "wgmma",
        "no wgmma.fence behind the instruction that used a register",
    ),
    "wgmma.mma_async": (
        "mov.b32 %r8, 0; wgmma.mma_async",
        "wgmma",
        "no wgmma.fence behind the instruction that used a register",
    ),
    "or.b64 %d30": (
        "cvt.u64.u32 %d29, %r199; or.b64 %d30, %d30, %d29; or.b64 %d30",
        "wgmma",
        "have different descriptors",
    ),
    "mov.u32 %r198": (
        "setp.lt.u32 %p0, %r199, 32; @%p0 wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 "
        "{%r4, %r5, %r6, %r7}, {%r8, %r9, %r10, %r11}, %d30, 0, 1, 1, 0; mov.u32 %r198",
        "divergence",
        "not all threads take part in a wgmma",
    ),
    "wgmma.commit": ("mov.b32 %r8, 0; wgmma.commit", "wgmma", "overwrites an operand of a wgmma"),
    "wgmma.wait_group": (
        "st.shared.b32 [%r190], %r20; wgmma.wait_group",
        "race",
        "before the wait for the wgmma that reads it",
    ),
    "{%r0, %r0, %r0, %r0};\n    bar.sync": (
        "{%r0, %r0, %r0, %r0}; ld.shared.b32 %r20, [%r190+16]; bar.sync",
        "race",
        "reads shared memory that another warp wrote",
    ),
}


def test_a_wgmma_by_hand_has_no_findings():
    gpu = run_text(text_of(WGMMA, 0, threads=128))
    assert not gpu.findings, gpu.findings[0]


def test_a_kernel_does_not_end_before_its_wgmma():
    begin, _, _ = WGMMA.partition("wgmma.wait_group")
    gpu = run_text(text_of(begin, 0, threads=128))
    assert gpu.findings[0].message == "the kernel ends before its wgmma"


@pytest.mark.parametrize("place", FORGOTTEN)
def test_what_the_watch_finds_around_a_wgmma(place):
    instead, kind, words = FORGOTTEN[place]
    assert WGMMA.count(place) == 1
    gpu = run_text(text_of(WGMMA.replace(place, instead), 0, threads=128))
    assert gpu.findings
    assert gpu.findings[0].kind == kind and words in gpu.findings[0].message, gpu.findings[0]


# ---- the command ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_kernel_beside_its_source():
    done = program("ptx", "layer_norm_forward", "--tokens", "3", "--width", "32")
    assert done.returncode == 0, done.stderr
    assert "tl.program_id(0) * BLOCK_R" in done.stdout and "No findings." in done.stdout
    traced = program("ptx", "dropout", "--tokens", "3", "--dropout", "0.5", "--trace", "7")
    assert "mov.u32" in traced.stdout and "= 0x7" in traced.stdout


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["relu"], ["invalid choice"]),
        (["dropout", "--tokens", "3"], ["dropout does not run with --dropout 0.0"]),
        (["dropout", "--tokens", "0"], ["--tokens must be 1 to 10,000"]),
        (["dropout", "--tokens", "99999999999999999999"], ["--tokens must be 1 to 10,000"]),
        (["attention_forward", "--width", "300"], ["1 <= D <= 128"]),
        (["attention_forward", "--dropout", "2"], ["--dropout must lie in [0, 1)"]),
        (["cross_entropy_forward", "--dropout", "nan"], ["--dropout must lie in [0, 1)"]),
    ],
)
def test_the_command_refuses(arguments, words):
    assert_refused(program("ptx", *arguments), *words)
