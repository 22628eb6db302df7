"""TODO."""

import functools
import math
import time

import torch

from training.run_directory import arguments_of


@functools.cache
def multiplies_bfloat16():
    """Whether this CPU multiplies bfloat16 in at most 3/4 of float32's time: by trial, as its flags do not say what oneDNN makes of them.

    Where oneDNN may not use a CPU's bf16 instructions it multiplies all the same, up to a hundred times slower.
    """
    best = {torch.float32: math.inf, torch.bfloat16: math.inf}  # seconds
    matrices = {dtype: torch.ones(512, 512, dtype=dtype) for dtype in best}
    begin, turns = time.perf_counter(), 0
    while turns < 4 or time.perf_counter() - begin < 0.3:  # the first warms up
        for dtype, matrix in matrices.items():
            start = (
                time.thread_time()
            )  # not the clock's: on a busy machine that counts what others compute
            matrix @ matrix
            best[dtype] = min(best[dtype], time.thread_time() - start)
        turns += 1
    return best[torch.bfloat16] < 0.75 * best[torch.float32]


def dtype_of(config, device):
    """The dtype of the computation, "bfloat16" or "float32": where it was left open, the former if the device multiplies it fast."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if device.type == "cuda" or multiplies_bfloat16() else "float32"


def dtype_of_run(config, ranks):
    """`dtype_of` on the first rank, for all ranks; where `config` leaves it open and continues a run, that of the run, on any CPU."""
    chosen = None
    with ranks.together():
        if ranks.rank == 0:
            begun = arguments_of(config.out).get("dtype") if config.dtype == "auto" else None
            chosen = begun or dtype_of(config, ranks.device)
    bfloat16 = any(ranks.sum([chosen == "bfloat16"]))
    return "bfloat16" if bfloat16 else "float32"


def make_optimizer(model, config):
    """AdamW with decay on matrices only: biases and LayerNorms have one axis, and a decay would pull the latter away from 1."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=0.0,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
