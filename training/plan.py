"""What a run costs before it is started: FLOPs, memory, traffic and time.

FLOPs of a step, forward and backward, for sequences of lengths n_1 ... n_B with M masked tokens:

    6 * weights * rows                 for every matrix: 2 FLOPs a weight forward, 4 backward
    12 * layers * H * sum of n_i^2     for attention: QK^T and PV, forward and twice backward

`rows` is T tokens for q, k and v and for all layers but the last. The last layer's output serves
M + B rows only, the MLM head M, the NSP head B. Elementwise work and what is computed twice do not
count, so MFU is the share of a GPU's peak that goes into the model itself (Chowdhery et al. 2022,
PaLM, appendix B).

Memory is counted tensor by tensor in bf16 autocast with the Triton kernels. What PyTorch and CUDA
keep for themselves, about 1 GB, comes on top. `python train.py --plan 64xA100` prints all of it.
"""

import math
import re
from typing import NamedTuple

import numpy as np
import torch

from starencoder import StarEncoderForPreTraining


class GPU(NamedTuple):
    """What a vendor's data sheet says of a GPU."""

    peak: float  # dense bf16 FLOP/s
    memory: float  # bytes
    link: float  # bytes/s to the GPUs of the same machine; for PCIe cards, without a bridge


# Keys are words of the device's name as the driver gives it. The first that fits counts, so that a
# longer name stands above a shorter one.
GPUS = {
    "GB200": GPU(2500e12, 186e9, 900e9),
    "B200": GPU(2250e12, 180e9, 900e9),
    "GH200": GPU(989e12, 96e9, 450e9),
    "H200 NVL": GPU(835e12, 141e9, 64e9),
    "H200": GPU(989e12, 141e9, 450e9),
    "H100 NVL": GPU(835e12, 94e9, 64e9),
    "H100 PCIe": GPU(756e12, 80e9, 64e9),
    "H100": GPU(989e12, 80e9, 450e9),
    "A100-SXM4-40GB": GPU(312e12, 40e9, 300e9),
    "A100-PCIE-40GB": GPU(312e12, 40e9, 32e9),
    "A100 80GB PCIe": GPU(312e12, 80e9, 32e9),
    "A100": GPU(312e12, 80e9, 300e9),
    "L40S": GPU(362e12, 48e9, 32e9),
    "RTX 4090": GPU(165e12, 24e9, 32e9),
}

# Bytes/s from each GPU to other machines: 200 Gbit/s InfiniBand, as in the published run's cluster.
NETWORK = 25e9
GPUS_PER_MACHINE = 8
MASKED = 0.15  # share of the tokens that are predicted, in the published run


def gpu_facts(name):
    """The `GPU` of this name, or None if it is not known."""
    if "Laptop" in name:
        return None  # the same number as the desktop card, but another chip
    for words, gpu in GPUS.items():
        if re.search(rf"\b{words}\b", name):
            return gpu
    return None


def peak_flops(device):
    """Peak bf16 FLOP/s of a torch device, or None if it is not known: no MFU beats a wrong one."""
    if device.type != "cuda":
        return None
    gpu = gpu_facts(torch.cuda.get_device_name(device))
    return gpu.peak if gpu else None


def count_parameters(config):
    """Parameters of `StarEncoderForPreTraining`; tied weights count once."""
    with torch.device("meta"):  # shapes without memory
        return sum(p.numel() for p in StarEncoderForPreTraining(config).parameters())


def model_flops(config, lengths, masked):
    """FLOPs of forward and backward: lengths (B,) of the sequences, `masked` tokens to predict."""
    H = config.hidden_size
    layers = config.num_hidden_layers
    lengths = np.asarray(lengths, np.float64)
    tokens = lengths.sum()
    sequences = len(lengths)

    # Weights of a layer: q, k and v; then the attention's output matrix and the two of the MLP.
    qkv = 3 * H * H
    after_attention = H * H + 2 * H * config.intermediate_size

    # After the attention of the last layer only <cls> and the masked tokens are used.
    last_rows = masked + sequences
    rows = (layers - 1) * tokens + last_rows  # summed over the layers
    linear = 6 * (layers * qkv * tokens + after_attention * rows)

    # QK^T and PV take 4 n^2 H FLOPs of a sequence of n tokens; the backward pass takes twice that.
    attention = 12 * layers * H * (lengths**2).sum()

    mlm_head = 6 * (H * config.vocab_size + H * H) * masked
    nsp_head = 6 * (H * H + 2 * H) * sequences  # the pooler, and two classes
    return linear + attention + (mlm_head + nsp_head)


def step_memory(config, tokens, sequences, masked):
    """Bytes that a GPU holds at the peak of a step, as a dict by what they are for.

    tokens, sequences, masked: of a micro-batch.
    """
    H = config.hidden_size
    layers = config.num_hidden_layers
    parameters = count_parameters(config)
    last_rows = masked + sequences  # tokens that are used after the last layer's attention

    # What a layer keeps for its backward pass, in bf16 numbers a token. First its input, q, k, v
    # and the attention's output. Then the output of the attention's last matrix and the LayerNorm
    # of that, the input and output of GELU, and the output of the MLP.
    attention = 5 * H
    after_attention = 3 * H + 2 * config.intermediate_size
    bf16 = attention * layers * tokens
    bf16 += after_attention * ((layers - 1) * tokens + last_rows)
    bf16 += 2 * H * last_rows  # the rows that are picked out in the last layer

    # fp32: log-sum-exp of each head; mean and 1 / deviation of two LayerNorms. The embeddings, too.
    statistics = (config.num_attention_heads + 2) * layers * tokens
    embeddings = 2 * H * tokens
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "AdamW": 8 * parameters,
        "bf16 copies": 2 * parameters,
        "activations": 2 * bf16 + 4 * (statistics + embeddings),
        "MLM head": 2 * masked * (config.vocab_size + 4 * H),
    }


def checkpoint_bytes(config):
    """Bytes of a checkpoint: fp32 weights and both moments of AdamW."""
    return 12 * count_parameters(config)


def describe(
    config, gpus, name, steps, batch_size, micro_batch_size, max_length, mfu, masked=MASKED
):
    """The plan of a run as text.

    config: a `StarEncoderConfig`. gpus: their number. name: one of `GPUS`. steps, batch_size (pairs
    over all GPUs), micro_batch_size (pairs of a GPU at once) and max_length: as in train.py; every
    pair counts as full. mfu: the share of the peak that is reached. masked: the share of the tokens
    that are predicted.
    Raises ValueError for a GPU that is not known, or for more GPUs than pairs.
    """
    gpu = gpu_facts(name)
    if gpu is None:
        raise ValueError(f"no facts about a GPU named {name}; known: {', '.join(GPUS)}")
    if not 1 <= gpus <= batch_size:
        raise ValueError(f"batch_size {batch_size} leaves some of {gpus} GPUs without a pair")

    # The work of one GPU in one step: its share of the pairs, in micro-batches.
    pairs = math.ceil(batch_size / gpus)
    micro_batch = min(micro_batch_size, pairs)
    micro_tokens = micro_batch * max_length
    memory = step_memory(config, micro_tokens, micro_batch, round(masked * micro_tokens))

    # Time of a step: FLOPs alone, as the all-reduce of the gradients overlaps with them.
    parameters = count_parameters(config)
    tokens = batch_size * max_length
    flops = model_flops(config, np.full(batch_size, max_length), masked * tokens)
    seconds = flops / gpus / gpu.peak / mfu
    days = steps * seconds / 86400

    # A ring all-reduce of fp32 gradients sends each byte twice, less a GPU's own share.
    traffic = 2 * (gpus - 1) / gpus * 4 * parameters
    bandwidth = gpu.link if gpus <= GPUS_PER_MACHINE else NETWORK
    waiting = traffic / bandwidth

    # A GPU's memory by its parts, then everything in one text.
    parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in memory.items())
    return f"""\
{gpus} x {name}, {parameters / 1e6:.2f} M parameters, vocabulary {config.vocab_size:,}
  micro-batch     {micro_batch} pairs of {max_length:,} tokens, \
{math.ceil(pairs / micro_batch)} to a step on each GPU
  memory a GPU    {sum(memory.values()) / 1e9:.1f} GB of {gpu.memory / 1e9:.0f}: {parts}
  FLOPs           {flops / tokens / 1e6:,.1f} M a token, {flops:.3g} a step
  all-reduce      {traffic / 1e9:.2f} GB a GPU and step, \
{waiting * 1e3:.0f} ms at {bandwidth / 1e9:.0f} GB/s \
({waiting / seconds:.0%} of the step's computation, with which it overlaps)
  checkpoint      {checkpoint_bytes(config) / 1e9:.2f} GB
  speed           {tokens / seconds / gpus:,.0f} tokens/s a GPU, \
{tokens / seconds:,.0f} in all, {seconds:.2f} s a step (at an MFU of {mfu:.0%}, assumed)
  the whole run   {days:.2f} days, {days * gpus:,.0f} GPU days, \
{steps * tokens / 1e9:,.1f} B tokens"""
