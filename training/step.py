"""One optimizer step over micro-batches and ranks, and the dtype it is computed in.

    ddp_model = wrap_ddp(model, ...)
    for each micro-batch:
        with sync_gradients(ddp_model, now=it is the last):
            (loss * world_size).backward()
    optimizer_step(...)                     clip, skip what is not finite, step

The gradient of a step is that of the mean over the *global* batch. Every micro-batch's loss is a
sum divided by the count of the whole batch, so the micro-batches of all ranks add up to it.
DistributedDataParallel takes the mean over the ranks instead of the sum: hence `world_size`.
"""

import contextlib
import functools

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from common.dtypes import multiplies_bfloat16
from training.muon import Muon
from training.run_directory import arguments_of


def make_optimizer(model, config, muon_learning_rate=0.0, dtype="float32"):
    """AdamW with weight decay on matrices only; Muon for the layers' matrices if it has a rate.

    Biases and LayerNorms have one axis. Decay would pull the LayerNorms' weights away from 1.

    muon_learning_rate: the peak rate of Muon, whose steps have another size; 0: AdamW alone. dtype:
    in which Muon multiplies.
    """
    by_muon = hidden_matrices(model) if muon_learning_rate else []
    taken = set(map(id, by_muon))
    by_adamw = [p for p in model.parameters() if id(p) not in taken]
    decayed = [p for p in by_adamw if p.ndim > 1]
    others = [p for p in by_adamw if p.ndim == 1]
    adamw = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=0.0,  # set in every step
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )
    if not by_muon:
        return adamw
    scale = muon_learning_rate / config.learning_rate
    return MuonAndAdamW(Muon(by_muon, config.weight_decay, scale, getattr(torch, dtype)), adamw)


def hidden_matrices(model):
    """The matrices between embeddings and outputs, which turn hidden states into hidden states."""
    outputs = ("mlm_decoder", "nsp", "classifier")
    linear = [
        module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name not in outputs
    ]
    return [module.weight for module in linear]


class MuonAndAdamW:
    """Two optimizers that take their steps together, see muon.py; to be used as one."""

    def __init__(self, muon, adamw):
        self.muon = muon
        self.adamw = adamw
        self.found_inf = False  # as fused AdamW has it: a step with it changes nothing

    @property
    def param_groups(self):
        """Of both."""
        return self.muon.param_groups + self.adamw.param_groups

    def step(self):
        """One step of each. Muon cannot skip one by itself, so here the GPU is waited for."""
        if not self.found_inf:
            self.muon.step()
            self.adamw.step()

    def state_dict(self):
        """Of both, for a checkpoint."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state):
        """The reverse. Raises KeyError or ValueError for another optimizer's state."""
        self.muon.load_state_dict(state["muon"])
        self.adamw.load_state_dict(state["adamw"])


def wrap_ddp(model, ranks, example_loss):
    """The model in DistributedDataParallel; the model itself if there is one rank.

    example_loss: a function of the wrapped model that returns the loss of any one example.
    """
    if ranks.world_size == 1:
        return model
    device_ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    ddp_model = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)
    # After its first backward pass DDP sorts its buckets by when the gradients came, and from three
    # ranks up gloo then sums in another order. Have that pass here and drop its gradient: no step
    # then depends on being the first after a start. (find_unused_parameters=True would keep the
    # first buckets, at the price of a walk through the graph in every step.)
    example_loss(ddp_model).backward()
    model.zero_grad(set_to_none=True)
    return ddp_model


def sync_gradients(ddp_model, now):
    """A context for one micro-batch, in which the ranks exchange gradients only if `now`."""
    if now or not isinstance(ddp_model, DistributedDataParallel):
        return contextlib.nullcontext()
    return ddp_model.no_sync()


def micro_batch_seed(seed, step, rank, micro_batch, device):
    """The seed of a micro-batch's dropout masks: a 0-d int64 tensor, no two alike in a run."""
    sequence = np.random.SeedSequence((seed, step, rank, micro_batch))
    value = int(sequence.generate_state(1, np.uint64)[0] >> 2)
    return torch.full((), value, dtype=torch.int64, device=device)


def optimizer_step(model, optimizer, max_grad_norm, learning_rate):
    """Clips the gradient, takes the step, clears the gradient. Returns the norm before clipping.

    A gradient that is not finite changes nothing.
    """
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    # Fused AdamW skips the step where found_inf is 1; no sync.
    optimizer.found_inf = (~norm.isfinite()).float()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("scale", 1.0)  # Muon's has one
    optimizer.step()
    model.zero_grad(set_to_none=True)
    return norm


# ---- the dtype -----------------------------------------------------------------------------------


def dtype_of(config, device):
    """The dtype to compute in, "bfloat16" or "float32"; for "auto", whichever is faster."""
    if config.dtype != "auto":
        return config.dtype
    return "bfloat16" if device.type == "cuda" or multiplies_bfloat16() else "float32"


def dtype_of_run(config, ranks):
    """`dtype_of` on the first rank, for all ranks. A run that goes on keeps its own, on any CPU."""
    chosen = None
    with ranks.together():
        if ranks.lead:
            before = None
            if config.dtype == "auto":
                before = arguments_of(config.out).get("dtype")
            chosen = before or dtype_of(config, ranks.device)
    any_bfloat16 = any(ranks.sum([chosen == "bfloat16"]))  # only the first rank has chosen
    return "bfloat16" if any_bfloat16 else "float32"


def autocast_to(dtype, device):
    """A function that makes the context in which a forward pass computes in `dtype`."""
    enabled = dtype == "bfloat16"
    return functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=enabled)
