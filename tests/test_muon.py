"""Muon: nearly orthogonal steps, those of PyTorch's own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from training import muon


@given(rows=st.integers(1, 40), columns=st.integers(1, 40), seed=st.integers(0, 2**32))
def test_singular_values_come_near_1(rows, columns, seed):
    """All but those that are small beside the largest, which four iterations do not lift so far."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    result = muon.orthogonal(matrix, torch.float64)
    before = torch.linalg.svd(matrix)
    # The singular vectors are the same: in them the result is diagonal.
    inside = before.U.T @ result @ before.Vh.T  # (rows, columns)
    n = min(rows, columns)
    values = inside.diagonal()
    assert (inside[:n, :n] - values.diag()).abs().max() < 1e-9 and inside[n:].abs().sum() < 1e-9
    large = before.S > 0.1 * before.S.norm()
    assert (values[large] > 0.5).all() and (values < 1.3).all() and (values > 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(48, 16), (16, 48), (24, 24)])
def test_a_step_is_that_of_pytorch(dtype, shape):
    """torch.optim.Muon multiplies in bfloat16, whatever the weights are."""
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizer = muon.Muon([ours], weight_decay=0.1, scale=1.0, dtype=dtype)
    peer = torch.optim.Muon([theirs], weight_decay=0.1, ns_steps=muon.ITERATIONS)
    for step in range(5):
        for group in (*optimizer.param_groups, *peer.param_groups):
            group["lr"] = 0.02 / (step + 1)
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        peer.step()
    # In bfloat16 the operations are the same. In float32 ours keeps the 2^-8 of an entry (at most
    # 1.2) that PyTorch's loses in several products; rates add up to 0.046, times 1.8 if it is tall.
    tolerance = 1e-6 if dtype == torch.bfloat16 else 5e-3
    assert (ours - theirs).abs().max() < tolerance
