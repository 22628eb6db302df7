"""TODO."""

import re

import numpy as np
import torch

from starencoder import StarEncoderForPreTraining

# By words of the device's name, the first that fit: dense bf16 FLOP/s, bytes of memory, and bytes/s that a GPU can send to the others of
# its machine (PCIe cards: without a bridge), from the vendors' data sheets.
GPUS = {
    "GB200": (2500e12, 186e9, 900e9),
    "B200": (2250e12, 180e9, 900e9),
    "GH200": (989e12, 96e9, 450e9),
    "H200 NVL": (835e12, 141e9, 64e9),
    "H200": (989e12, 141e9, 450e9),
    "H100 NVL": (835e12, 94e9, 64e9),
    "H100 PCIe": (756e12, 80e9, 64e9),
    "H100": (989e12, 80e9, 450e9),
    "A100-SXM4-40GB": (312e12, 40e9, 300e9),
    "A100-PCIE-40GB": (312e12, 40e9, 32e9),
    "A100 80GB PCIe": (312e12, 80e9, 32e9),
    "A100": (312e12, 80e9, 300e9),
    "L40S": (362e12, 48e9, 32e9),
    "RTX 4090": (165e12, 24e9, 32e9),
}


NETWORK = 25e9  # bytes/s of each GPU to other machines: 200 Gbit/s InfiniBand, as in the published run's kind of cluster


GPUS_PER_MACHINE = 8


MASKED = 0.15  # share of the tokens that are predicted


def gpu_facts(name):
    """(peak bf16 FLOP/s, bytes of memory, bytes/s to its neighbours) of a GPU by its name, or None where it is not known."""
    if "Laptop" in name:  # the same number, another chip
        return None
    return next((facts for words, facts in GPUS.items() if re.search(rf"\b{words}\b", name)), None)


def peak_flops(device):
    """Peak bf16 FLOP/s of a torch device, or None where it is not known (no MFU is then shown, rather than a wrong one)."""
    facts = gpu_facts(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return facts and facts[0]


def model_flops(config, lengths, masked):
    """FLOPs that forward and backward need for sequences of these lengths (an int array) with `masked` tokens to predict.

    As they are computed here: the head on the masked positions only, and in the last layer nothing but the attention on others than
    those and the sequences' first. Elementwise work and recomputation are not counted.
    """
    H, layers, lengths = (
        config.hidden_size,
        config.num_hidden_layers,
        np.asarray(lengths, np.float64),
    )
    tokens, rows = lengths.sum(), masked + len(lengths)
    after_attention = H * H + 2 * H * config.intermediate_size  # weights of a layer
    linear = 6 * (layers * 3 * H * H * tokens + after_attention * ((layers - 1) * tokens + rows))
    attention = 12 * layers * H * (lengths**2).sum()
    heads = 6 * (H * config.vocab_size + H * H) * masked + 6 * (H * H + 2 * H) * len(lengths)
    return linear + attention + heads


def count_parameters(config):
    """Parameters of `StarEncoderForPreTraining`, tied weights once."""
    with torch.device("meta"):
        return sum(p.numel() for p in StarEncoderForPreTraining(config).parameters())


def step_memory(config, tokens, sequences, masked):
    """Bytes that a GPU holds at the peak of a step, in bf16 with the Triton kernels, as a dict by what they are for.

    tokens, sequences, masked: of a micro-batch. What the libraries keep for themselves (about 1 GB on a GPU) comes on top.
    """
    H, layers, parameters = config.hidden_size, config.num_hidden_layers, count_parameters(config)
    rows = masked + sequences
    # Kept for the backward pass of a layer, in bf16 numbers of each token: its input, q, k, v and the attention's output; then the output
    # of the attention's last matrix and the LayerNorm of that, the input and output of GELU, the output of the feed-forward layer.
    attention, after = 5 * H, 3 * H + 2 * config.intermediate_size
    kept = 2 * (attention * layers * tokens + after * ((layers - 1) * tokens + rows) + 2 * H * rows)
    kept += (
        4 * (config.num_attention_heads + 2) * layers * tokens
    )  # log-sum-exp; mean and 1 / deviation
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters,
        "AdamW": 8 * parameters,
        "bf16 copies": 2 * parameters,
        "activations": kept + 4 * 2 * H * tokens,  # the embeddings are fp32
        "MLM head": 2 * masked * (config.vocab_size + 4 * H),
    }


def checkpoint_bytes(config):
    """Bytes of a checkpoint: fp32 weights and both moments of AdamW."""
    return 12 * count_parameters(config)


def describe(config, gpus, name, steps, batch_size, micro_batch_size, max_length, mfu):
    """The plan of a run as text.

    config: a `StarEncoderConfig`. gpus: their number. name: one of `GPUS`. steps, batch_size (pairs, over all GPUs), micro_batch_size
    (pairs of a GPU at once), max_length: as in train.py; all pairs are taken as full. mfu: the share of the peak that is reached.
    Raises ValueError for a GPU that is not known, or more GPUs than pairs.
    """
    facts = gpu_facts(name)
    if facts is None:
        raise ValueError(f"no facts about a GPU named {name}; known: {', '.join(GPUS)}")
    if not 1 <= gpus <= batch_size:
        raise ValueError(f"batch_size {batch_size} leaves some of {gpus} GPUs without a pair")
    peak, memory, link = facts
    pairs = -(-batch_size // gpus)  # of a GPU and step
    micro_batch = min(micro_batch_size, pairs)
    tokens, parameters = batch_size * max_length, count_parameters(config)
    parts = step_memory(
        config, micro_batch * max_length, micro_batch, round(MASKED * micro_batch * max_length)
    )
    flops = model_flops(config, np.full(batch_size, max_length), MASKED * tokens)
    seconds = flops / gpus / peak / mfu
    bandwidth = link if gpus <= GPUS_PER_MACHINE else NETWORK
    traffic = 2 * (gpus - 1) / gpus * 4 * parameters
    days = steps * seconds / 86400
    return "\n".join(
        [
            f"{gpus} x {name}, {parameters / 1e6:.2f} M parameters, vocabulary {config.vocab_size:,}",
            f"  micro-batch     {micro_batch} pairs of {max_length:,} tokens, {-(-pairs // micro_batch)} to a step on each GPU",
            f"  memory a GPU    {sum(parts.values()) / 1e9:.1f} GB of {memory / 1e9:.0f}: "
            + ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items()),
            f"  FLOPs           {flops / tokens / 1e6:,.1f} M a token, {flops:.3g} a step",
            f"  all-reduce      {traffic / 1e9:.2f} GB a GPU and step, {traffic / bandwidth * 1e3:.0f} ms at {bandwidth / 1e9:.0f} GB/s "
            f"({traffic / bandwidth / seconds:.0%} of the step's computation, with which it overlaps)",
            f"  checkpoint      {checkpoint_bytes(config) / 1e9:.2f} GB",
            f"  speed           {tokens / seconds / gpus:,.0f} tokens/s a GPU, {tokens / seconds:,.0f} in all, {seconds:.2f} s a step "
            f"(at an MFU of {mfu:.0%}, assumed)",
            f"  the whole run   {days:.2f} days, {days * gpus:,.0f} GPU days, {steps * tokens / 1e9:,.1f} B tokens",
        ]
    )
