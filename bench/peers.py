"""Kernels of others, compiled as ours are, so that their figures stand beside ours.

    tutorial   the forward attention of Triton's tutorial "Fused Attention" (FlashAttention-2)
    Liger      LayerNorm forward and backward, if liger-kernel is installed
    fla        softmax attention of flash-linear-attention, forward and backward, if it is installed

No peer has dropout, and none but fla's takes packed sequences. fla's attention is causal: its loop
over whole blocks does the same work as ours.
"""

import contextlib
import importlib
import warnings
from collections.abc import Callable
from importlib.metadata import version
from typing import NamedTuple

import torch

import kernels
from ptx.launch import every_launch

if kernels.HAS_TRITON:
    import triton
    import triton.language as tl

TOKENS = 1024  # a multiple of every block, which suits all of them
HEADS = 12
HEAD_SIZE = 64
HIDDEN = HEADS * HEAD_SIZE


class Peer(NamedTuple):
    """Operations of others."""

    name: str
    package: str | None  # to install, or None if they are in this file
    module: str | None  # of the package
    width: int  # D or H
    work: Callable  # calls them; takes the module, a chip such as 90, and a dtype


# ---- Triton's tutorial ---------------------------------------------------------------------------


if kernels.HAS_TRITON:

    @triton.jit
    def _attention_forward(
        q_ptr, k_ptr, v_ptr,  # (N, L, D), contiguous
        out_ptr,  # (N, L, D), written
        lse_ptr,  # (N, L) fp32, written
        L, scale,  # scale = log2(e) / sqrt(D); L is a multiple of both blocks
        D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    ):  # fmt: skip
        """One program: BLOCK_Q queries of one head, all keys in blocks of BLOCK_K.

        The tutorial's algorithm in our own words, without a causal mask: what
        `kernels._attention_forward` does without dropout, partial blocks and packed sequences.
        """
        head = tl.program_id(1).to(tl.int64)
        query = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        key = tl.arange(0, BLOCK_K)
        d = tl.arange(0, D)
        q_offset = (head * L + query)[:, None] * D + d[None, :]
        k_offset = (head * L + key)[:, None] * D + d[None, :]

        q = tl.load(q_ptr + q_offset)  # (BLOCK_Q, D)
        m = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_Q], tl.float32)
        o = tl.zeros([BLOCK_Q, D], tl.float32)
        for first_key in range(0, L, BLOCK_K):
            k = tl.load(k_ptr + k_offset + first_key * D)  # (BLOCK_K, D)
            s = tl.dot(q, tl.trans(k))  # (BLOCK_Q, BLOCK_K)
            m_new = tl.maximum(m, tl.max(s, 1) * scale)
            e = tl.exp2(s * scale - m_new[:, None])
            shrink = tl.exp2(m - m_new)
            l = l * shrink + tl.sum(e, 1)
            o = o * shrink[:, None]
            v = tl.load(v_ptr + k_offset + first_key * D)  # (BLOCK_K, D)
            o = tl.dot(e.to(v.dtype), v, o)
            m = m_new

        tl.store(out_ptr + q_offset, o / l[:, None])
        tl.store(lse_ptr + head * L + query, m + tl.log2(l))


def tutorial_attention(module, chip, dtype):
    """The forward pass, with one of the settings that the tutorial tries."""
    q = torch.empty(HEADS, TOKENS, HEAD_SIZE, dtype=dtype)
    lse = torch.empty(HEADS, TOKENS)
    scale = HEAD_SIZE**-0.5 * kernels.LOG2_E.value
    constants = dict(D=HEAD_SIZE, BLOCK_Q=128, BLOCK_K=64, num_warps=4, num_stages=3)
    grid = (TOKENS // constants["BLOCK_Q"], HEADS)
    _attention_forward[grid](q, q, q, q, lse, TOKENS, scale, **constants)


# ---- libraries -----------------------------------------------------------------------------------


def liger_layer_norm(module, chip, dtype):
    """Liger's LayerNorm, forward and backward."""
    x = torch.empty(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)  # (T, H)
    weight = torch.ones(HIDDEN, dtype=dtype, requires_grad=True)
    module.LigerLayerNormFunction.apply(x, weight, weight, 1e-12).sum().backward()


def fla_attention(module, chip, dtype):
    """fla's softmax attention, forward and backward."""
    shape = (1, TOKENS, HEADS, HEAD_SIZE)
    q, k, v = (torch.empty(shape, dtype=dtype, requires_grad=True) for _ in range(3))

    # It chooses its tiles by the shared memory of the device, which is not here.
    def has_shared_memory_of(name, device=0):
        return chip >= {"ampere": 80, "hopper": 90}[name]

    with replaced(module, "check_shared_mem", has_shared_memory_of):
        module.parallel_attn(q, k, v).sum().backward()


PEERS = (
    Peer("tutorial", None, None, HEAD_SIZE, tutorial_attention),
    Peer("Liger", "liger-kernel", "liger_kernel.ops.layer_norm", HIDDEN, liger_layer_norm),
    Peer("fla", "fla-core", "fla.ops.attn.parallel", HEAD_SIZE, fla_attention),
)


# ---- compiling them ------------------------------------------------------------------------------


def installed_peers():
    """[(peer, its module), ...]. Prints which are not installed.

    Call it before a `Chip` takes the place of the driver: fla looks for a device when imported.
    """
    installed = []
    for peer in PEERS:
        try:
            with warnings.catch_warnings(action="ignore"):  # fla's, that there is no GPU
                module = importlib.import_module(peer.module) if peer.module else None
            installed.append((peer, module))
        except Exception as error:
            print(not_available(peer.name, error))
    return installed


def versions(installed):
    """{package: version} of the installed peers."""
    packages = [peer.package for peer, _ in installed if peer.package]
    return {package: version(package) for package in packages}


def compile_peer(peer, module, chip, dtype, compiler):
    """Hands the kernels that a peer launches to the compiler, a `kernels.Launcher`.

    Prints a line, and goes on, if the peer's code does not work here.
    """
    try:
        with every_launch(compiler):
            peer.work(module, chip, dtype)
    except Exception as error:
        print(not_available(f"{peer.name}, sm_{chip}", error))


@contextlib.contextmanager
def replaced(owner, name, value):
    """Within this `with` block, `owner` has another value under this name."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def not_available(name, error):
    """A line that says why."""
    reason = str(error).strip().split("\n")[0][:120]
    return f"{name}: not available here ({reason})"
