"""What a run costs before it is started: FLOPs, memory, traffic and time.

FLOPs of a step, forward and backward, for sequences of lengths n_1 ... n_B with M masked tokens:

    6 * weights * rows                 for every matrix: 2 FLOPs a weight forward, 4 backward
    12 * layers * H * sum of n_i^2     for attention: QK^T and PV, forward and twice backward

`rows` is T tokens for q, k and v and for all layers but the last. The last layer's output serves
M + B rows only, the MLM head M, the NSP head B. Elementwise work and what is computed twice do not
count, so MFU is the share of a GPU's peak that goes into the model itself (Chowdhery et al. 2022,
PaLM, appendix B).

Memory is counted tensor by tensor in bf16 autocast with the Triton kernels. What PyTorch and CUDA
keep for themselves, about 1 GB, comes on top. What failures cost, and how often to save, is by the
formula of simulate.py. `python train.py --plan 64xA100` prints all of it.
"""

import math
import re
from typing import NamedTuple

import numpy as np
import torch

from starencoder import StarEncoderForPreTraining
from training.simulate import GPUS_PER_MACHINE, MACHINE_MTBF, youngs_cost, youngs_interval


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
MASKED = 0.15  # share of the tokens that are predicted, in the published run

# Assumptions about failures. Bytes/s at which one process writes to a file system that machines
# share. (To a local disk, `RunDirectory.save` wrote 0.25 to 0.4 GB/s on 2 busy cores of a Xeon.)
SAVE_BANDWIDTH = 1e9
# Seconds from a failure to the next step. After so many, train.py's --timeout, a rank that hangs is
# given up. Llama 3 (see simulate.py) trained in over 90% of its 54 days in spite of 466
# interruptions. So each of those cost less than 17 minutes, lost work included.
RESTART = 600

# Bytes of text that `python -m corpus` turns into tokens in a second on one core, without near
# duplicates: 22.0 MB/s on 2 cores of an AMD EPYC, from 2 GB (results/corpus-cpu.json).
PREPARE_SPEED = 11e6
# Bytes of memory that a document takes while duplicates are looked for.
EXACT_MEMORY = 70  # an entry of a set
NEAR_MEMORY = 1700  # 25 numbers of its MinHash
PAGE = 4096  # bytes that a file system reads at least


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


# ---- the plan ------------------------------------------------------------------------------------


class Corpus(NamedTuple):
    """What a plan needs to know of a corpus."""

    documents: int
    tokens: int
    text: int  # bytes
    disk: int  # bytes of its token files and their indexes
    token_bytes: int  # bytes of a token on disk
    pairs: int  # of an epoch


class Run(NamedTuple):
    """A run that is planned, as train.py names its arguments."""

    gpus: int  # their number
    steps: int
    batch_size: int  # pairs in a step, over all GPUs
    max_length: int  # tokens of a pair; every pair counts as full
    seconds: float  # of a step

    @property
    def tokens(self):
        """Tokens of a step."""
        return self.batch_size * self.max_length


def describe(
    config,
    gpus,
    name,
    steps,
    batch_size,
    micro_batch_size,
    max_length,
    mfu,
    masked=MASKED,
    save_every=1000,
    mtbf=MACHINE_MTBF,
    corpus=None,
):
    """The plan of a run as text.

    config: a `StarEncoderConfig`. gpus: their number. name: one of `GPUS`. steps, batch_size (pairs
    over all GPUs), micro_batch_size (pairs of a GPU at once), max_length and save_every (steps): as
    in train.py; every pair counts as full. mfu: the share of the peak that is reached. masked: the
    share of the tokens that are predicted. mtbf: mean hours between failures of one machine.
    corpus: a `Corpus`, or None.
    Raises ValueError for a GPU that is not known, or for more GPUs than pairs.
    """
    gpu = gpu_facts(name)
    if gpu is None:
        raise ValueError(f"no facts about a GPU named {name}; known: {', '.join(GPUS)}")
    if not 1 <= gpus <= batch_size:
        raise ValueError(f"batch_size {batch_size} leaves some of {gpus} GPUs without a pair")

    # Time of a step: FLOPs alone, as the all-reduce of the gradients overlaps with them.
    tokens = batch_size * max_length
    flops = model_flops(config, np.full(batch_size, max_length), masked * tokens)
    run = Run(gpus, steps, batch_size, max_length, flops / gpus / gpu.peak / mfu)
    days = steps * run.seconds / 86400

    parameters = count_parameters(config)
    lines = [
        f"{gpus} x {name}, {parameters / 1e6:.2f} M parameters, vocabulary {config.vocab_size:,}",
        *_memory_lines(config, run, gpu, micro_batch_size, masked),
        f"FLOPs           {flops / tokens / 1e6:,.1f} M a token, {flops:.3g} a step",
        _all_reduce_line(parameters, run, gpu),
        f"speed           {tokens / run.seconds / gpus:,.0f} tokens/s a GPU, "
        f"{tokens / run.seconds:,.0f} in all, {run.seconds:.2f} s a step "
        f"(at an MFU of {mfu:.0%}, assumed)",
        f"the whole run   {days:.2f} days, {days * gpus:,.0f} GPU days, "
        f"{steps * tokens / 1e9:,.1f} B tokens",
        *_failure_lines(config, parameters, run, save_every, mtbf),
    ]
    if corpus:
        lines += _corpus_lines(corpus, run)
    return "\n  ".join(lines)


def _memory_lines(config, run, gpu, micro_batch_size, masked):
    """What one GPU does in a step, its share of the pairs in micro-batches, and holds meanwhile."""
    pairs = math.ceil(run.batch_size / run.gpus)
    micro_batch = min(micro_batch_size, pairs)
    micro_tokens = micro_batch * run.max_length
    memory = step_memory(config, micro_tokens, micro_batch, round(masked * micro_tokens))
    parts = ", ".join(f"{part} {size / 1e9:.2f}" for part, size in memory.items())
    return [
        f"micro-batch     {micro_batch} pairs of {run.max_length:,} tokens, "
        f"{math.ceil(pairs / micro_batch)} to a step on each GPU",
        f"memory a GPU    {sum(memory.values()) / 1e9:.1f} GB of {gpu.memory / 1e9:.0f}: {parts}",
    ]


def _all_reduce_line(parameters, run, gpu):
    """What summing the gradients takes."""
    # A ring all-reduce of fp32 gradients sends each byte twice, less a GPU's own share.
    traffic = 2 * (run.gpus - 1) / run.gpus * 4 * parameters
    bandwidth = gpu.link if run.gpus <= GPUS_PER_MACHINE else NETWORK
    waiting = traffic / bandwidth
    return (
        f"all-reduce      {traffic / 1e9:.2f} GB a GPU and step, "
        f"{waiting * 1e3:.0f} ms at {bandwidth / 1e9:.0f} GB/s "
        f"({waiting / run.seconds:.0%} of the step's computation, with which it overlaps)"
    )


def _failure_lines(config, parameters, run, save_every, mtbf):
    """What checkpoints and failures cost, and which interval between saves costs least."""
    # A save also writes the weights as the directory's model, in fp32.
    checkpoint = checkpoint_bytes(config)
    model = 4 * parameters
    save = (checkpoint + model) / SAVE_BANDWIDTH  # seconds
    interval = save_every * run.seconds
    a_day = 86400 / (interval + save) * (checkpoint + model)

    # Any machine's failure ends all ranks.
    machines = math.ceil(run.gpus / GPUS_PER_MACHINE)
    between = mtbf * 3600 / machines  # seconds
    failures = run.steps * run.seconds / between
    best = min(youngs_interval(save, between), run.steps * run.seconds)
    return [
        f"checkpoint      {checkpoint / 1e9:.2f} GB, and {model / 1e9:.2f} of the model: the first "
        f"rank writes them, all wait {save:.1f} s (at {SAVE_BANDWIDTH / 1e9:.0f} GB/s, assumed)",
        f"save_every      {save_every:,} steps, {interval / 60:,.1f} minutes: "
        f"{a_day / 1e9:,.0f} GB a day",
        f"failures        {failures:,.3f} in the run, at one in {mtbf:,.0f} hours for each of "
        f"{machines} machines; a restart takes {RESTART / 60:.0f} minutes (assumed)",
        f"lost            {_lost(interval, save, between)}",
        f"by Young        {_lost(best, save, between)} with save_every {best / run.seconds:,.0f}, "
        f"{best / 60:,.0f} minutes",
    ]


def _lost(interval, save, mtbf):
    """What saves and failures cost, in words. All arguments in seconds."""
    saves = save / interval
    failures = youngs_cost(interval, save, mtbf, RESTART) - saves
    return f"{saves:.2%} of the time to saves and {failures:.2%} to failures"


def pages_read(max_length, token_bytes):
    """Bytes of the pages in which a pair's tokens lie, on average: what a cold file system reads.

    Half of the pairs are one stretch of max_length - 3 tokens, half are two in different documents.
    A stretch of n bytes lies in 1 + n / PAGE pages. (The readahead of Linux ends after a hundred
    misses, so that of a large file no more is read.)
    """
    return (1.5 + (max_length - 3) * token_bytes / PAGE) * PAGE


def _corpus_lines(corpus, run):
    """What the corpus costs, and how fast all loaders together read it."""
    hours = corpus.text / PREPARE_SPEED / 3600
    pairs_a_second = run.batch_size / run.seconds
    tokens = pairs_a_second * (run.max_length - 3) * corpus.token_bytes
    pages = pairs_a_second * pages_read(run.max_length, corpus.token_bytes)
    epochs = run.steps * run.batch_size / corpus.pairs
    return [
        f"corpus          {corpus.documents:,} documents, {corpus.tokens / 1e9:,.3f} B tokens; "
        f"{corpus.text / 1e9:,.3f} GB of text, {corpus.disk / 1e9:,.3f} on disk",
        f"preparing it    {hours:,.3f} CPU hours at {PREPARE_SPEED / 1e6:.0f} MB/s a core; memory "
        f"for duplicates {corpus.documents * EXACT_MEMORY / 1e9:,.3f} GB, near ones "
        f"{corpus.documents * NEAR_MEMORY / 1e9:,.3f} more",
        f"reading it      {epochs:,.1f} epochs of {corpus.pairs:,} pairs; all loaders read "
        f"{tokens / 1e6:,.1f} MB/s of tokens, {pages / 1e6:,.1f} in pages of 4 KB, until memory "
        "holds the corpus",
    ]
