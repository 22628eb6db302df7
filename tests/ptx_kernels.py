"""Triton kernels that only the tests of ptx/ compile."""

import triton
import triton.language as tl


@triton.jit
def product(
    a_ptr,  # (M, K), or (K, M) if A_TURNED
    b_ptr,  # (K, N), or (N, K) if B_TURNED
    c_ptr,  # (M, N) fp32, written
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    A_TURNED: tl.constexpr, B_TURNED: tl.constexpr, TWICE: tl.constexpr,
):  # fmt: skip
    """C = A B, one program. TWICE: C = (A B) B^T, rounding A B: (M, K)."""
    m = tl.arange(0, M)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    if A_TURNED:
        a = tl.trans(tl.load(a_ptr + k[:, None] * M + m[None, :]))
    else:
        a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    if B_TURNED:
        b = tl.trans(tl.load(b_ptr + n[:, None] * K + k[None, :]))
    else:
        b = tl.load(b_ptr + k[:, None] * N + n[None, :])
    c = tl.dot(a, b)
    if TWICE:  # the left factor of the second product comes from registers
        c = tl.dot(c.to(a.dtype), tl.trans(b), out_dtype=tl.float32)
        tl.store(c_ptr + m[:, None] * K + k[None, :], c)
    else:
        tl.store(c_ptr + m[:, None] * N + n[None, :], c)


@triton.jit
def scaled(x_ptr, out_ptr, n, ADDED: tl.constexpr = 0):
    """out[0] = n x[0] + ADDED."""
    tl.store(out_ptr, tl.load(x_ptr) * n + ADDED)


def within_a_function():
    """A kernel with the name of another, and not at the top of the file."""

    @triton.jit
    def scaled(x_ptr, out_ptr, n):
        tl.store(out_ptr, 42.0)

    return scaled


@triton.jit
def does_not_compile(x_ptr):
    tl.store(x_ptr, tl.arange(0, 3))  # no power of two
