"""Where the time of a training step goes, beside the least that each part could take.

Time is taken by PyTorch's profiler, operator by operator, and summed over the parts of `PARTS`. The
least time follows from what this device does in the same run: FLOPs by the rate of a large matmul,
bytes that must move by the rate of a large copy.
"""

import re

import torch

from bench.kernel_speed import measure_ceilings
from bench.measure import medians, report
from bench.model_speed import CONTENDERS, DEVICE, random_batch
from starencoder import StarEncoderConfig
from training.plan import MASKED, count_parameters, model_flops

# The parts of a step by the names of the operators that belong to them; the first that fits counts.
# An operator on a tensor with an axis of the size of the vocabulary belongs to the head as well.
HEAD = "head and embeddings"
PARTS = {
    "optimizer": "_fused_adamw|_foreach_|vector_norm",
    HEAD: "cross_?entropy",
    "attention": "attention|bmm|softmax|scaled_dot_product",
    "LayerNorm and dropout": "layer_?norm|dropout",
    "matmul": r"::(mm|addmm|matmul|linear)$",
    "GELU, casts and the rest": "",  # fits everything
}


def part_of(event, vocab_size):
    """The part of a step that an operator belongs to."""
    shapes = [shape for shape in event.input_shapes or [] if isinstance(shape, list)]
    sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
    padded = vocab_size + -vocab_size % 64  # the head pads its matrix on a GPU
    of_vocabulary = not sizes.isdisjoint((vocab_size, padded))
    for part, words in PARTS.items():
        if re.search(words, event.key, re.IGNORECASE) or (part == HEAD and of_vocabulary):
            return part


def time_by_part(step, vocab_size, repetitions):
    """{part: seconds of a step} by PyTorch's profiler."""
    with torch.profiler.profile(record_shapes=True) as profile:  # shapes tell the head apart
        for _ in range(repetitions):
            step()
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profile.key_averages(group_by_input_shape=True):
        # An operator runs on the CPU and brings with it the time of the kernels that it launched.
        if event.device_type == torch.autograd.DeviceType.CPU:
            on_gpu = event.self_device_time_total
            microseconds = on_gpu if DEVICE == "cuda" else event.self_cpu_time_total
            seconds[part_of(event, vocab_size)] += microseconds / 1e6 / repetitions
    return seconds


def least_times(config, sequences, ceilings):
    """{part: seconds} that a step on full sequences must take at the rates of `ceilings`."""
    L = config.max_position_embeddings
    H = config.hidden_size
    layers = config.num_hidden_layers
    T = sequences * L
    masked = round(MASKED * T)

    # FLOPs forward and backward, as in training/plan.py; what is neither attention nor head is
    # the matrices of the layers.
    flops = model_flops(config, [L] * sequences, masked)
    attention = 12 * layers * H * T * L
    head = 6 * (H * config.vocab_size + H * H) * masked  # on the masked positions only
    matmul = flops - attention - head

    # bf16 numbers a token: LayerNorm moves three rows forward and five backward, twice a layer;
    # GELU two forward and three backward. AdamW reads gradient, weight and moments in fp32 and
    # writes the last three.
    norm_bytes = 2 * layers * (3 + 5) * 2 * T * H
    gelu_bytes = layers * (2 + 3) * 2 * T * config.intermediate_size
    adamw_bytes = 4 * (4 + 3) * count_parameters(config)
    return {
        "matmul": matmul / ceilings["matmul"],
        "attention": attention / ceilings["matmul"],
        HEAD: head / ceilings["matmul"],
        "LayerNorm and dropout": norm_bytes / ceilings["copy"],
        "optimizer": adamw_bytes / ceilings["copy"],
        "GELU, casts and the rest": gelu_bytes / ceilings["copy"],
    }


def bench_profile(path=None, config=None, sequences=None, ceilings=None, repetitions=5):
    """Where the time of a training step goes on full sequences, beside the least it could take.

    ceilings: rates as by `measure_ceilings`, which is called if they are not given. Gaps are the
    time in which a GPU waits. Without Triton "the rest" makes the dropout masks, too.
    """
    config = config or StarEncoderConfig()
    sequences = sequences or (64 if DEVICE == "cuda" else 2)
    ceilings = ceilings or measure_ceilings(DEVICE)  # FLOP/s and bytes/s
    L = config.max_position_embeddings
    T = sequences * L
    batch = random_batch([L] * sequences, config)
    step = CONTENDERS["StarEncoder"].training_step(config, batch)
    for _ in range(2):  # the first one makes the optimizer's moments
        step()
    whole = T / medians({"step": step}, repetitions)["step"]  # seconds, without the profiler

    # Under the profiler a step may take longer than by itself, so that gaps cannot be negative and
    # shares are of the sum of the parts.
    spent = time_by_part(step, config.vocab_size, repetitions)
    spent = dict(sorted(spent.items(), key=lambda item: -item[1]))
    spent["gaps"] = max(0.0, whole - sum(spent.values()))
    total = sum(spent.values())
    least = least_times(config, sequences, ceilings) | {"gaps": 0.0}
    spent["step, by itself"] = whole
    least["step, by itself"] = sum(least.values())

    rows = [
        {
            "part": part,
            "ms": f"{1e3 * seconds:,.1f}",
            "least (ms)": f"{1e3 * least[part]:,.1f}",
            "share": f"{seconds / total:.1%}",
        }
        for part, seconds in spent.items()
    ]
    facts = dict(sequences=sequences, max_length=L, ceilings=ceilings)
    report(path, "profile", rows, **facts, tokens_per_second=round(T / whole, 1))
