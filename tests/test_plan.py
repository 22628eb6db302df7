"""What a run costs: the formulas beside what PyTorch counts."""

import os
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused, program
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

import kernels
import train
from data import PairDataset
from starencoder import StarEncoderConfig, StarEncoderForPreTraining
from training import plan, run_directory

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


def measured_memory(sequences, masked, loss_of):
    """Bytes at the peak of the second of two steps of the full model on sequences of 1,024 tokens.

    They are counted tensor by tensor, with the Triton kernels; no tensor has any memory.
    loss_of(model, input_ids, cu_seqlens, masked_positions): runs the model.
    """
    with FakeTensorMode(), kernels.Launcher.replaced(kernels.Launcher(dry=True)):
        input_ids = torch.zeros(sequences * 1024, dtype=torch.int64)
        cu_seqlens = torch.zeros(sequences + 1, dtype=torch.int32)
        masked_positions = torch.zeros(masked, dtype=torch.int64)
        model = StarEncoderForPreTraining(StarEncoderConfig()).train()
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        tracker = MemTracker()
        tracker.track_external(model, optimizer)
        with tracker:
            for _ in range(2):  # the first step makes the optimizer's moments
                with torch.autocast("cpu", torch.bfloat16):
                    loss = loss_of(model, input_ids, cu_seqlens, masked_positions)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                tracker.reset_mod_stats()
        return tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]


def as_trained(model, input_ids, cu_seqlens, masked_positions):
    """The loss as train.py asks for it."""
    labels = input_ids[masked_positions]
    neighbours = torch.ones(len(cu_seqlens) - 1, dtype=torch.int64)
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


@pytest.mark.skipif(not kernels.HAS_TRITON, reason="there is no Triton here")
@pytest.mark.parametrize("sequences", [8, 64])
def test_memory_is_within_15_percent_and_the_published_micro_batch_fits_80_gb(sequences):
    tokens = sequences * 1024
    masked = round(0.15 * tokens)
    measured = measured_memory(sequences, masked, as_trained)
    planned = sum(plan.step_memory(StarEncoderConfig(), tokens, sequences, masked).values())
    print(f"{sequences} x 1,024: planned {planned / 1e9:.2f} GB, measured {measured / 1e9:.2f} GB")
    assert abs(planned / measured - 1) < 0.15 and measured < 80e9


@pytest.mark.slow
@pytest.mark.skipif(not kernels.HAS_TRITON, reason="there is no Triton here")
def test_what_the_savings_are_worth_in_memory():
    """The head on the masked rows only, and a cross-entropy without fp32 copies of its logits."""
    tokens = 64 * 1024
    masked = round(0.15 * tokens)
    step, copies, everywhere = (
        measured_memory(64, masked, loss_of)
        for loss_of in (as_trained, with_fp32_logits, with_all_logits)
    )
    print(f"64 x 1,024: {step / 1e9:.1f} GB; with fp32 logits {copies / 1e9:.1f} GB", end="; ")
    print(f"of every token {everywhere / 1e9:.1f} GB")
    # One copy of the logits, and its gradient.
    vocab_size = StarEncoderConfig.vocab_size
    assert copies - step > 2 * 4 * masked * vocab_size
    assert everywhere - copies > 2 * 4 * (tokens - masked) * vocab_size


def test_checkpoint_bytes_are_those_of_the_file(small_corpus, tmp_path):
    config = train.TrainConfig(
        data=small_corpus, out=str(tmp_path / "run"), max_length=48, steps=1, batch_size=2,
        eval_examples=2, workers=0, device="cpu", hidden_size=64, num_hidden_layers=2,
        num_attention_heads=2, intermediate_size=256,
    )  # fmt: skip
    train.train(config)
    planned = plan.checkpoint_bytes(train.model_config(config, 600))
    written = os.path.getsize(run_directory.checkpoints(config.out)[-1])
    assert 0 <= written - planned < 64e3  # names and shapes come on top
    model = os.path.getsize(os.path.join(config.out, "model.safetensors"))
    assert 0 <= model - planned / 3 < 64e3  # the weights without both moments


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
        (["--plan", "80xA100"], "leaves some of 80 GPUs without a pair"),  # the tiny preset has 64
        (["--plan", "1xA100", "--plan-mfu", "2"], "between 0 and 1"),
        (["--plan", "1xA100", "--data", "nowhere"], "nowhere"),
        (["--plan", "1xA100", "--plan-mtbf", "0"], "a number of hours above 0"),
        (["--plan", "1xA100", "--plan-mtbf", "nan"], "a number of hours above 0"),
    ):
        assert_refused(program("train", *flags), words)


def test_a_plan_counts_the_tokens_that_are_masked():
    flops = []
    for masked in ("0.15", "0.3"):
        flags = ["--preset", "small", "--plan", "1xA100", "--masked", masked]
        text = program("train", *flags).stdout
        flops.append(float(re.search(r"FLOPs +([\d.]+) M a token", text)[1]))
    # The head on 15 % more of the tokens: 6 (H V + H^2) FLOPs each, H = 512 and V = 49,156. And the
    # second half of the last layer: 6 (H^2 + 2 H I).
    more = 0.15 * 6 * (512 * 49_156 + 512**2 + 512**2 + 2 * 512 * 2048) / 1e6
    assert abs(flops[1] - flops[0] - more) < 0.2


@pytest.mark.slow
def test_a_plan_says_how_often_to_save():
    """2 GB a save at 1 GB/s; any of 8 machines may fail."""
    flags = ["--preset", "starencoder", "--plan", "64xA100", "--plan-mtbf", "1000"]
    text = program("train", *flags).stdout
    save = 16 * plan.count_parameters(StarEncoderConfig()) / plan.SAVE_BANDWIDTH
    seconds = 4096 * 1024 / float(re.search(r"([\d,]+) in all", text)[1].replace(",", ""))
    best = np.sqrt(2 * save * 1000 * 3600 / 8)
    printed = int(re.search(r"with save_every ([\d,]+)", text)[1].replace(",", ""))
    assert abs(printed - best / seconds) < 1
    assert f"{save / (1000 * seconds):.2%} of the time to saves" in text
    # A tiny run is over long before: then it is saved once, at its end.
    text = program("train", "--plan", "64xA100").stdout
    assert "with save_every 1,500" in text


def test_a_plan_counts_what_is_in_a_corpus(small_corpus):
    config = train.TrainConfig(data=small_corpus, max_length=64)
    meta = train.read_meta(small_corpus)
    found = train.planned_corpus(config, meta)
    dataset = PairDataset(small_corpus, "train", 64, seed=0)
    held_out = PairDataset(small_corpus, "validation", 64, seed=0)
    assert found.documents == dataset.documents() + held_out.documents()
    assert found.pairs == len(dataset)
    files = [name for name in os.listdir(small_corpus) if name.endswith((".bin", ".npy"))]
    size = sum(os.path.getsize(os.path.join(small_corpus, name)) for name in files)
    assert 0 <= size - found.disk < 200 * len(files)  # the headers of the indexes come on top

    result = program("train", "--plan", "1xA100", "--data", small_corpus, "--max-length", "64")
    assert f"{found.documents:,} documents" in result.stdout
    assert f"{1500 * 64 / found.pairs:,.1f} epochs of {found.pairs:,} pairs" in result.stdout


def test_pages_that_a_pair_reads_are_those_in_which_its_tokens_lie(small_corpus):
    """On average over 2,000 pairs, none of which is much shorter than it may be.

    Each lies in 1 to 4 pages, so that their mean has an error of under 0.03.
    """
    dataset = PairDataset(small_corpus, "train", 512, seed=0)
    starts = np.concatenate([part.offsets[:-1] for part in dataset.parts])  # of the only part
    pages = []
    lengths = []
    for i in range(2000):
        a, b, follows = dataset.draw(i, dataset.random_stream(i))
        touched = set()
        for window in (a, b):
            first = 2 * (starts[window.document] + window.start)
            end = 2 * (starts[window.document] + window.end)
            touched |= {*range(first // plan.PAGE, (end - 1) // plan.PAGE + 1)}
        pages.append(len(touched))
        lengths.append(a.length + b.length + 3)
    expected = plan.pages_read(np.mean(lengths), token_bytes=2) / plan.PAGE
    assert abs(np.mean(pages) - expected) < 0.1


def test_a_corpus_that_is_named_must_be_whole(small_corpus, tmp_path):
    broken = str(tmp_path / "broken")
    shutil.copytree(small_corpus, broken)
    os.truncate(os.path.join(broken, "00000.train.bin"), 100)
    assert_refused(program("train", "--plan", "1xA100", "--data", broken), "00000.train.bin")
    os.remove(os.path.join(broken, "meta.json"))
    assert_refused(program("train", "--plan", "1xA100", "--data", broken), "no corpus here")
