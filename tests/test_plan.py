"""What a run costs: the formulas beside what PyTorch counts."""

import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused, program
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

import kernels
import train
from starencoder import StarEncoderConfig, StarEncoderForPreTraining
from training import plan, run_directory

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = dict(vocab_size=600, max_position_embeddings=48, pad_token_id=596)
SHAPES = st.sampled_from([(32, 1, 4, 64), (32, 2, 4, 64), (48, 3, 2, 80)])


def config_of(shape):
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    return StarEncoderConfig(**SMALL, **dict(zip(names, shape)))


@given(
    shape=SHAPES,
    lengths=st.lists(st.integers(1, 48), min_size=1, max_size=5),
    share=st.floats(0, 1),
)
def test_flops_are_those_that_pytorch_counts(shape, lengths, share):
    config = config_of(shape)
    model = StarEncoderForPreTraining(config).eval()
    masked = max(1, int(share * sum(lengths)))
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    ids = torch.randint(600, (sum(lengths),))
    neighbours = torch.ones(len(lengths), dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(ids, cu_seqlens, ids[:masked], neighbours, torch.arange(masked)).loss.backward()
    assert counter.get_total_flops() == plan.model_flops(config, lengths, masked)


def test_published_arithmetic():
    """657.4 M FLOPs a token at length 1,024, the head on 15 %, less the last layer's savings."""
    per_token = plan.model_flops(StarEncoderConfig(), [1024], 0.15 * 1024) / 1024
    spared = 6 * (768 * 768 + 2 * 768 * 3072) * (1 - 0.15 - 1 / 1024)
    assert abs((per_token + spared) / 657.4e6 - 1) < 1e-3
    assert round(plan.count_parameters(StarEncoderConfig()) / 1e6, 2) == 124.83


class LaunchesNothing(kernels.Launcher):
    """For counting memory: the kernels' outputs are made, and stay as they are."""

    def launch(self, kernel, grid, arguments, constants):
        pass


def measured_memory(config, sequences, length, masked, loss_of):
    """Bytes at the peak of the second of two steps with the Triton kernels, tensor by tensor.

    fp16 takes the same bytes as bf16, and the kernels' interpreter accepts it.
    loss_of(model, input_ids, cu_seqlens, masked_positions): runs the model.
    """
    T = sequences * length
    input_ids = torch.zeros(T, dtype=torch.int64, device=DEVICE)
    cu_seqlens = torch.arange(0, T + 1, length, dtype=torch.int32, device=DEVICE)
    masked_positions = torch.arange(masked, device=DEVICE)
    model = StarEncoderForPreTraining(config).to(DEVICE).train()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker, kernels.Launcher.replaced(LaunchesNothing()):
        for _ in range(2):  # the first step makes the optimizer's moments
            with torch.autocast(DEVICE, torch.float16):
                loss = loss_of(model, input_ids, cu_seqlens, masked_positions)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            tracker.reset_mod_stats()
    peaks = tracker.get_tracker_snapshot("peak")
    return sum(peak["Total"] for device, peak in peaks.items() if device.type == DEVICE)


def as_trained(model, input_ids, cu_seqlens, masked_positions):
    """The loss as train.py asks for it."""
    labels = input_ids[masked_positions]
    neighbours = torch.ones(len(cu_seqlens) - 1, dtype=torch.int64, device=DEVICE)
    return model(input_ids, cu_seqlens, labels, neighbours, masked_positions, seed=0).loss


def with_fp32_logits(model, input_ids, cu_seqlens, masked_positions):
    """The MLM loss by PyTorch's cross-entropy, on an fp32 copy of the logits."""
    out = model(input_ids, cu_seqlens, masked_positions=masked_positions, seed=0)
    return F.cross_entropy(out.mlm_logits.float(), input_ids[masked_positions])


def with_all_logits(model, input_ids, cu_seqlens, masked_positions):
    """The same loss with the head on every token, as most implementations compute it."""
    out = model(input_ids, cu_seqlens, seed=0)
    labels = torch.full_like(input_ids, -100)
    labels[masked_positions] = input_ids[masked_positions]
    return F.cross_entropy(out.mlm_logits.float(), labels)


# Large enough that what the formula leaves out, such as seeds and positions, does not count.
MEDIUM = StarEncoderConfig(
    vocab_size=4096, hidden_size=256, num_hidden_layers=4, num_attention_heads=4,
    intermediate_size=1024, max_position_embeddings=256,
)  # fmt: skip


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="there is no Triton here")
@pytest.mark.parametrize("sequences", [8, 16])
def test_memory_is_within_15_percent(monkeypatch, sequences):
    monkeypatch.setenv("STARENCODER_KERNELS", "triton")
    tokens = sequences * 256
    masked = round(0.15 * tokens)
    measured = measured_memory(MEDIUM, sequences, 256, masked, as_trained)
    planned = sum(plan.step_memory(MEDIUM, tokens, sequences, masked).values())
    print(f"{sequences} x 256: planned {planned / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert abs(planned / measured - 1) < 0.15


def test_the_published_micro_batch_fits_80_gb():
    memory = plan.step_memory(StarEncoderConfig(), 64 * 1024, 64, round(0.15 * 64 * 1024))
    assert sum(memory.values()) < 80e9 / 1.15


@pytest.mark.slow
@pytest.mark.skipif(not kernels.HAS_TRITON, reason="there is no Triton here")
def test_what_the_savings_are_worth_in_memory(monkeypatch):
    """The head on the masked rows only, and a cross-entropy without fp32 copies of its logits."""
    monkeypatch.setenv("STARENCODER_KERNELS", "triton")
    tokens = 16 * 256
    masked = round(0.15 * tokens)
    step, copies, everywhere = (
        measured_memory(MEDIUM, 16, 256, masked, loss_of)
        for loss_of in (as_trained, with_fp32_logits, with_all_logits)
    )
    print(f"{step / 1e6:.0f} MB; with fp32 logits {copies / 1e6:.0f} MB; of every token", end=" ")
    print(f"{everywhere / 1e6:.0f} MB")
    # One copy of the logits, and its gradient.
    assert copies - step > 2 * 4 * masked * MEDIUM.vocab_size
    assert everywhere - copies > 2 * 4 * (tokens - masked) * MEDIUM.vocab_size


def test_checkpoint_bytes_are_those_of_the_file(small_corpus, tmp_path):
    config = train.TrainConfig(
        data=small_corpus, out=str(tmp_path / "run"), max_length=48, steps=1, batch_size=2,
        eval_examples=2, workers=0, device="cpu", hidden_size=64, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=256,
    )  # fmt: skip
    train.train(config)
    planned = plan.checkpoint_bytes(StarEncoderConfig(**train.model_shape(config, 600)))
    written = os.path.getsize(run_directory.checkpoints(config)[-1])
    assert 0 <= written - planned < 64e3  # names and shapes come on top


def test_gpus_by_the_names_that_drivers_give():
    peaks = {
        "NVIDIA H200": 989e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA GB200": 2500e12,
        "NVIDIA B200": 2250e12,
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA GeForce RTX 4090": 165e12,
    }
    assert {name: plan.gpu_facts(name).peak for name in peaks} == peaks
    assert plan.gpu_facts("NVIDIA A100-SXM4-40GB").memory == 40e9
    for unknown in ("NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA H2000"):
        assert plan.gpu_facts(unknown) is None


def test_a_plan_is_printed(small_corpus):
    result = program("train", "--preset", "starencoder", "--plan", "64xA100")
    assert result.returncode == 0, result.stderr
    for words in (
        "124.83 M parameters",
        "64 pairs of 1,024 tokens, 1 to a step",
        "of 80:",
        "419.4 B tokens",
    ):
        assert words in result.stdout
    result = program("train", "--plan", "1xH200", "--data", small_corpus)
    assert "vocabulary 600" in result.stdout


def test_plans_that_make_no_sense_are_refused():
    for flags, words in (
        (["--plan", "64"], "as in 64xA100"),
        (["--plan", "2xAbacus"], "no facts about a GPU named Abacus"),
        (["--plan", "64xA100"], "leaves some of 64 GPUs without a pair"),  # the tiny preset has 32
        (["--plan", "1xA100", "--plan-mfu", "2"], "between 0 and 1"),
        (["--plan", "1xA100", "--data", "nowhere"], "nowhere"),
    ):
        assert_refused(program("train", *flags), words)
