"""Muon, an optimizer for matrices (Jordan et al., Muon: An optimizer for hidden layers, 2024).

It replaces the momentum of a matrix by an almost orthogonal one. All directions in which the matrix
can change then change about equally fast, where AdamW mostly follows the few that have the largest
gradients. That makes sense for a matrix that maps vectors to vectors. Embeddings are a table, and
biases vectors: they keep AdamW.

    momentum = lerp(momentum, gradient, 0.05)
    step     = orthogonal(lerp(gradient, momentum, 0.95))          Nesterov's look ahead
    weight   = (1 - rate * decay) weight - rate * sqrt(max(1, rows / columns)) step

These are the steps of torch.optim.Muon. That one always multiplies in bfloat16, which is up to
sixty times slower than float32 on a CPU that has no instructions for it. This one is told the
dtype.
"""

import math

import torch

MOMENTUM = 0.95
# Jordan's: they let small singular values grow fast, and leave all of them between 0.7 and 1.2.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# Usual are 5. The fifth gained nothing in 300 steps of the tiny preset, and is 4 % of its step.
ITERATIONS = 4


class Muon(torch.optim.Optimizer):
    """Muon on matrices of any sizes.

    weight_decay: as AdamW's. scale: its learning rate as a multiple of that of the AdamW beside it;
    `training.step` sets both. dtype: in which matrices are multiplied.
    """

    def __init__(self, params, weight_decay, scale, dtype):
        # lr is set in each step.
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "scale": scale})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        """One step, by the gradients that the matrices have."""
        for group in self.param_groups:
            rate = group["lr"]
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["momentum"] = torch.zeros_like(p)
                momentum = state["momentum"].lerp_(p.grad, 1 - MOMENTUM)
                step = orthogonal(p.grad.lerp(momentum, MOMENTUM), self.dtype)
                rows, columns = p.shape
                p.mul_(1 - rate * group["weight_decay"])
                p.add_(step, alpha=-rate * math.sqrt(max(1, rows / columns)))


def orthogonal(matrix, dtype):
    """A matrix with the same singular vectors, and singular values near 1, by Newton and Schulz.

    Each iteration applies the polynomial a x + b x^3 + c x^5 to all singular values x.
    """
    a, b, c = COEFFICIENTS
    x = matrix.to(dtype, copy=True)
    tall = x.shape[0] > x.shape[1]
    if tall:  # the product below is then the smaller one
        x = x.T
    x.div_(x.norm().clamp(min=1e-7))  # no singular value above 1
    for _ in range(ITERATIONS):
        square = x @ x.T
        factor = torch.addmm(square, square, square, beta=b, alpha=c)
        x = torch.addmm(x, factor, x, beta=a)
    return x.T if tall else x
