"""The loop: one gradient however a batch is split, one end however often a run is stopped."""

import errno
import glob
import json
import math
import multiprocessing
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from dataclasses import replace

import drills
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from conftest import ROOT, assert_refused, command, program
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.parallel import DistributedDataParallel

import corpus
import data
import train
from common import files
from starencoder import StarEncoderConfig, StarEncoderForPreTraining, embed, fill_mask
from training import curves, metrics, ranks, run_directory, step
from training.metrics import Metrics

TORCHRUN = [
    "-m",
    "torch.distributed.run",
    "--rdzv_backend",
    "c10d",
    "--rdzv_endpoint",
    "localhost:0",
    "--nproc_per_node",
]
MODEL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def tiny(small_corpus, out, **overrides):
    """A run of seconds, with dropout, and with all that the tiny preset has to learn faster."""
    fields = dict(
        head_start="frequencies+positions+neighbours",
        masked=0.3,
        muon_learning_rate=0.02,
        max_length=48,
        steps=6,
        batch_size=8,
        micro_batch_size=3,
        learning_rate=1e-2,
        warmup_steps=2,
        device="cpu",
    )
    fields |= dict(
        dtype="float32", workers=0, eval_every=4, eval_examples=16, save_every=2, log_every=3
    )
    return train.TrainConfig(data=small_corpus, out=str(out), **(MODEL | fields | overrides))


def on_ranks(count, config):
    """Runs train.py on so many ranks, as a user would."""
    flags = [
        f"--{k.replace('_', '-')}={v}"
        for k, v in vars(config).items()
        if v is not None and not isinstance(v, bool)
    ]
    return command(
        *TORCHRUN, str(count), "train.py", *flags, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


# ---- one gradient, however it is computed ----


def _gradient(rank, world_size, micro_batch_size, directory, out):
    """The gradient of step 1 as the loop computes it, in fp64 without dropout; rank 0 saves it."""
    torch.set_num_threads(1)
    if world_size == 1:
        return _save_gradient(ranks.Ranks(), micro_batch_size, directory, out)
    dist.init_process_group(
        "gloo", init_method=f"file://{out}.init", rank=rank, world_size=world_size
    )
    _save_gradient(
        ranks.Ranks(rank, world_size, control=dist.group.WORLD), micro_batch_size, directory, out
    )
    # DDP is gone by now. Otherwise gloo's thread and Python's lock could wait for each other.
    dist.destroy_process_group()
    # One time in ten, PyTorch's threads abort a spawned process as it ends in the usual way
    # ("terminate called without an active exception"). The gradient has been saved.
    os._exit(0)


def _save_gradient(ranks, micro_batch_size, directory, out):
    rank, world_size = ranks.rank, ranks.world_size
    torch.manual_seed(0)
    shape = StarEncoderConfig(
        vocab_size=600, max_position_embeddings=48, pad_token_id=596, initializer_range=0.2, **MODEL
    )
    model = StarEncoderForPreTraining(shape).double().eval()
    ddp = DistributedDataParallel(model) if world_size > 1 else model
    (micro_batches,) = data.batches(
        data.PairDataset(directory, "train", 48, 0),
        range(1, 2),
        26,
        micro_batch_size,
        rank,
        world_size,
        workers=0,
    )
    masked, pairs = ranks.sum(
        [
            sum(len(b.labels) for b in micro_batches),
            sum(len(b.next_sentence_label) for b in micro_batches),
        ]
    )
    loss_sum = 0.0
    for j, batch in enumerate(micro_batches):
        with (
            ddp.no_sync()
            if world_size > 1 and j < len(micro_batches) - 1
            else train.contextlib.nullcontext()
        ):
            loss, *_ = train.loss_on(ddp, batch, masked, pairs)
            (loss * world_size).backward()
        loss_sum += loss.item()
    (loss_sum,) = ranks.sum([loss_sum])
    if rank == 0:
        counts = [len(b.input_ids) for b in micro_batches]
        torch.save(
            {
                "loss": loss_sum,
                "counts": counts,
                "grads": {n: p.grad for n, p in model.named_parameters()},
            },
            out,
        )


@pytest.mark.slow
def test_same_gradient_whole_in_micro_batches_and_on_ranks(small_corpus, tmp_path):
    """Whole, in 4 micro-batches of unequal token counts, on 2 and 4 ranks: 1e-6 in fp64."""
    results = {}
    for name, world_size, micro in (
        ("whole", 1, 26),
        ("micro", 1, 7),
        ("2 ranks", 2, 13),
        ("4 ranks", 4, 2),
    ):
        out = str(tmp_path / name.replace(" ", "_"))
        if world_size == 1:
            _gradient(0, 1, micro, small_corpus, out)
        else:
            mp.spawn(_gradient, (world_size, micro, small_corpus, out), nprocs=world_size)
        results[name] = torch.load(out, weights_only=True)
    assert len(results["micro"]["counts"]) == 4 and len(set(results["micro"]["counts"])) > 1
    whole = results.pop("whole")
    for name, result in results.items():
        assert abs(result["loss"] - whole["loss"]) < 1e-6 * whole["loss"]
        for key, gradient in whole["grads"].items():
            assert gradient.norm() > 0 or key.endswith("mlm_bias")
            assert (result["grads"][key] - gradient).norm() <= 1e-6 * gradient.norm(), (name, key)


# ---- the dtype of a run ----


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variable is for x86")
def test_bfloat16_is_chosen_only_where_it_is_fast():
    """With AVX2 alone a CPU multiplies bf16 a hundred times slower than fp32."""
    code = """if True:
        import argparse, torch
        from training import step
        print(step.dtype_of(argparse.Namespace(dtype="auto"), torch.device("cpu")))
    """
    result = command("-c", code, env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"})
    assert result.stdout.strip() == "float32", result


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("begun, chosen", [(True, "bfloat16"), (False, "float32")])
def test_a_run_keeps_its_dtype_on_another_cpu(small_corpus, tmp_path, monkeypatch, begun, chosen):
    config = tiny(small_corpus, tmp_path / "run", dtype="auto", steps=2)
    monkeypatch.setattr(step, "multiplies_bfloat16", lambda: begun)
    train.train(config)
    monkeypatch.setattr(step, "multiplies_bfloat16", lambda: not begun)
    os.remove(tmp_path / "run" / "checkpoints" / "00000002.pt")
    train.train(config)
    assert json.loads((tmp_path / "run" / "train.json").read_text())["dtype"] == chosen
    other = {"bfloat16": "float32", "float32": "bfloat16"}[chosen]
    with pytest.raises(ValueError, match=f"holds a run with dtype {chosen}, not {other}"):
        train.train(replace(config, dtype=other))


def _note_dtype(rank, config, directory):
    dist.init_process_group("gloo", init_method=f"file://{directory}/init", rank=rank, world_size=2)
    step.multiplies_bfloat16 = lambda: rank == 0
    dtype = step.dtype_of_run(config, ranks.Ranks(rank, 2, control=dist.group.WORLD))
    with open(os.path.join(directory, str(rank)), "w") as f:
        f.write(dtype)
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_take_the_first_ranks_dtype(small_corpus, tmp_path):
    mp.spawn(
        _note_dtype, (tiny(small_corpus, tmp_path / "run", dtype="auto"), str(tmp_path)), nprocs=2
    )
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["bfloat16", "bfloat16"]


# ---- a run that is stopped ends with the same bits ----


class Crash(Exception):
    """What a power cut is to a process."""


def finished(config):
    checkpoint = torch.load(run_directory.newest_sound_checkpoint(config.out), weights_only=True)
    with open(os.path.join(config.out, "metrics.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    for line in lines:
        line.pop("tokens_per_second", None)  # the one thing in it that is a matter of luck
    weights = open(os.path.join(config.out, "model.safetensors"), "rb").read()
    return checkpoint, lines, weights


def assert_same(a, b):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, list):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


@pytest.fixture
def no_curves(monkeypatch):
    """Runs draw no curves, which takes longer than all of their steps."""
    monkeypatch.setattr(train, "draw_curves", lambda *_: None)


@pytest.fixture(scope="module")
def undisturbed(small_corpus, tmp_path_factory):
    config = tiny(small_corpus, tmp_path_factory.mktemp("runs") / "whole")
    train.train(config)
    return config


def test_a_run_is_what_it_says(undisturbed, tokenizer, capsys):
    checkpoint, lines, _ = finished(undisturbed)
    steps = [m for m in lines if "loss" in m]
    evaluations = [m for m in lines if "mlm_accuracy" in m]
    assert [m["step"] for m in steps] == list(range(1, 7)) and [m["step"] for m in evaluations] == [
        4,
        6,
    ]
    assert [m["learning_rate"] for m in steps] == [5e-3, 1e-2, 1e-2, 7.5e-3, 5e-3, 2.5e-3]
    assert all(
        abs(m["loss"] - m["mlm_loss"] - m["nsp_loss"]) < 1e-6 and m["grad_norm"] > 0 for m in steps
    )
    assert sorted(os.listdir(os.path.join(undisturbed.out, "checkpoints"))) == [
        "00000004.pt",
        "00000006.pt",
    ]
    assert not [name for _, _, names in os.walk(undisturbed.out) for name in names if "tmp" in name]
    # It is a Hugging Face directory, and the model in it is the checkpoint's.
    bert, info = transformers.BertForPreTraining.from_pretrained(
        undisturbed.out, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    model = StarEncoderForPreTraining.from_pretrained(undisturbed.out).eval()
    assert_same(dict(model.state_dict()), checkpoint["model"])
    ids = tokenizer.encode("def f(x):\n    return x")
    expected = bert.eval()(torch.tensor([ids])).prediction_logits[0]
    logits = model(torch.tensor(ids), torch.tensor([0, len(ids)], dtype=torch.int32)).mlm_logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    auto = transformers.AutoTokenizer.from_pretrained(undisturbed.out)
    assert auto("def f(x):\n    return x")["input_ids"] == ids
    assert os.path.getsize(os.path.join(undisturbed.out, "curves.png")) > 10_000
    # Started again, it has nothing left to do and says so by its figures.
    before = finished(undisturbed)
    figures = train.train(undisturbed)
    assert_same(list(finished(undisturbed)), list(before))
    assert {"step": 6} | figures == evaluations[-1]
    held_out = data.PairDataset(undisturbed.data, "validation", undisturbed.max_length, 0)
    assert figures == train.evaluate(
        model, held_out, undisturbed.eval_examples, undisturbed.micro_batch_size, ranks.Ranks()
    )
    assert "held-out code" in capsys.readouterr().out


def test_curves_are_drawn_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 1, "f1": 0.5}\n')

    def draw(figure, steps, lines):
        assert (len(steps), len(lines)) == (1, 2)
        figure.subplots().plot([m["loss"] for m in steps], "o")

    curves.draw_curves(tmp_path, draw)
    whole = (tmp_path / "curves.png").read_bytes()
    assert whole.startswith(b"\x89PNG") and sorted(os.listdir(tmp_path)) == [
        "curves.png",
        "metrics.jsonl",
    ]

    def full(self, path, **_):
        (tmp_path / os.path.basename(path)).write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    curves.draw_curves(tmp_path, draw)
    assert sorted(os.listdir(tmp_path)) == ["curves.png", "metrics.jsonl"]
    assert (tmp_path / "curves.png").read_bytes() == whole
    assert "cannot be drawn ([Errno 28] No space left on device)" in capsys.readouterr().err


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize("how", ["crash", "stop"])
@pytest.mark.parametrize("step", range(6))
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(
    small_corpus, undisturbed, tmp_path, monkeypatch, step, how
):
    """Weights, optimizer and metrics, with dropout; stopped within a step, or by a signal."""
    config, real = tiny(small_corpus, tmp_path / "run [1]"), train.learning_rate

    def interrupted(config, at):
        if at == step:
            if how == "crash":
                raise Crash
            os.kill(os.getpid(), signal.SIGTERM)
        return real(config, at)

    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupted)
        if how == "crash":
            with pytest.raises(Crash):
                train.train(config)
        else:
            assert (train.train(config) is None) == (step < 4)  # one step later at most
    # What concerns the machine alone may differ from start to start (but not the micro-batch size,
    # which fixes the order of the sums).
    train.train(replace(config, workers=1, log_every=1, keep_checkpoints=5))
    assert_same(list(finished(config)), list(finished(undisturbed)))


@pytest.mark.slow
def test_a_killed_process_goes_on(small_corpus, tmp_path):
    """SIGTERM to the process, or SIGUSR1 to its group with the loader's workers, saves and ends
    with status 0; SIGKILL loses what came after the last checkpoint. The end is the same.
    """
    flags = (
        "--device cpu --dtype float32 --hidden-size 32 --num-hidden-layers 2 "
        "--num-attention-heads 4 --intermediate-size 64 --max-length 48 --steps 120 "
        "--batch-size 8 --eval-every 1000 --eval-examples 16 --save-every 20 --log-every 1 "
        "--workers 1 --hidden-dropout-prob 0.1 --warmup-steps 10"
    )
    arguments = [sys.executable, "train.py", "--data", small_corpus, *flags.split()]

    def steps_written(out):
        path = os.path.join(out, "metrics.jsonl")
        return len(open(path).readlines()) if os.path.exists(path) else 0

    outs = [str(tmp_path / name) for name in ("whole", "stopped")]
    assert (
        subprocess.run([*arguments, "--out", outs[0]], cwd=ROOT, capture_output=True).returncode
        == 0
    )
    for number, kill, after in (
        (signal.SIGTERM, os.kill, 5),
        (signal.SIGUSR1, os.killpg, 30),
        (signal.SIGKILL, os.kill, 60),
    ):
        pipes = dict(
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        process = subprocess.Popen([*arguments, "--out", outs[1]], cwd=ROOT, **pipes)
        while steps_written(outs[1]) < after and process.poll() is None:
            time.sleep(0.005)
        kill(process.pid, number)
        said, errors = process.communicate()
        assert process.returncode == (-number if number == signal.SIGKILL else 0), errors
        assert "Traceback" not in errors
        if number != signal.SIGKILL:
            assert "the same command goes on from there" in said
    done = subprocess.run([*arguments, "--out", outs[1]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Continuing" in done.stdout
    a, b = (finished(train.TrainConfig(out=out)) for out in outs)
    assert_same(list(a), list(b))


@pytest.mark.slow
def test_three_ranks_that_go_on_end_with_the_same_bits(small_corpus, tmp_path):
    """Three numbers add up differently in another order; DDP and gloo must keep to one."""
    config = tiny(small_corpus, tmp_path / "run", batch_size=9)
    result = on_ranks(3, config)
    assert result.returncode == 0, result.stderr
    whole = finished(config)
    os.remove(run_directory.newest_sound_checkpoint(config.out))
    result = on_ranks(3, config)
    assert result.returncode == 0 and "after step 4." in result.stdout, result.stderr
    assert_same(list(finished(config)), list(whole))


# ---- figures ----


def test_evaluation_is_the_mean_over_its_pairs(small_corpus):
    """However it is split; and the baseline is the share of the most frequent masked token."""
    torch.manual_seed(0)
    model = StarEncoderForPreTraining(
        StarEncoderConfig(vocab_size=600, max_position_embeddings=48, pad_token_id=596, **MODEL)
    )
    dataset = data.PairDataset(small_corpus, "validation", 48, 0)
    figures = [train.evaluate(model, dataset, 21, micro, ranks.Ranks()) for micro in (21, 4)]
    batch = data.collate([dataset[i] for i in range(21)])
    out = model.eval()(*batch)
    rounding = (
        len(batch.labels) * torch.finfo(torch.float32).eps
    )  # of a sum of so many losses, as a part of it
    assert abs(figures[0]["mlm_loss"] / out.mlm_loss.item() - 1) < rounding
    counts = np.bincount(batch.labels)
    assert figures[0]["majority_accuracy"] == counts.max() / counts.sum()
    for key, value in figures[0].items():
        assert abs(value - figures[1][key]) <= rounding * value, key


def test_published_arithmetic():
    """The schedule's corners."""
    config = train.parse_arguments(["--preset", "starencoder"])
    assert (config.steps, config.batch_size, config.max_length, config.micro_batch_size) == (
        100_000,
        4096,
        1024,
        64,
    )
    corners = {0: 6e-4 / 24_000, 23_999: 6e-4, 24_000: 6e-4, 62_000: 3e-4, 99_999: 6e-4 / 76_000}
    assert {step: train.learning_rate(config, step) for step in corners} == pytest.approx(corners)


@pytest.mark.usefixtures("no_curves")
def test_no_two_dropout_masks_of_a_run_are_alike(small_corpus, tmp_path, monkeypatch):
    seeds, real = [], train.loss_on
    monkeypatch.setattr(
        train, "loss_on", lambda *a, seed: seeds.append(seed.item()) or real(*a, seed=seed)
    )
    train.train(tiny(small_corpus, tmp_path / "run"))
    assert len(seeds) == len(set(seeds)) == 6 * 3  # 3 micro-batches in each of 6 steps


@pytest.mark.usefixtures("no_curves")
def test_the_gradient_is_clipped(small_corpus, tmp_path):
    """A norm of 1e-12, far below Adam's epsilon, moves nothing; the norm before is reported."""
    # Not with Muon, to which the length of a gradient is all one.
    adamw = dict(muon_learning_rate=0.0, head_start="none")
    config = tiny(
        small_corpus, tmp_path / "run", steps=2, max_grad_norm=1e-12, weight_decay=0.0, **adamw
    )
    train.train(config)
    torch.manual_seed(config.seed)
    start = StarEncoderForPreTraining(
        StarEncoderConfig(vocab_size=600, max_position_embeddings=48, pad_token_id=596, **MODEL)
    )
    end = StarEncoderForPreTraining.from_pretrained(config.out)
    assert all((a - b).abs().max() < 1e-7 for a, b in zip(start.parameters(), end.parameters()))
    assert all(line["grad_norm"] > 0.1 for line in finished(config)[1] if "loss" in line)


def test_no_decay_on_biases_and_layer_norms():
    model = StarEncoderForPreTraining(
        StarEncoderConfig(vocab_size=600, max_position_embeddings=48, **MODEL)
    )
    decayed, plain = step.make_optimizer(model, train.TrainConfig()).param_groups
    names = {p: n for n, p in model.named_parameters()}
    assert all(names[p].endswith(".weight") and "norm" not in names[p] for p in decayed["params"])
    assert all(names[p].endswith("bias") or "norm" in names[p] for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0


def test_muon_takes_the_matrices_that_turn_states_into_states():
    shape = StarEncoderConfig(vocab_size=600, max_position_embeddings=48, **MODEL)
    for tied in (True, False):
        model = StarEncoderForPreTraining(replace(shape, tie_word_embeddings=tied))
        optimizer = step.make_optimizer(model, train.TrainConfig(), muon_learning_rate=0.03)
        names = {p: n for n, p in model.named_parameters()}
        (group,) = optimizer.muon.param_groups
        taken = {names[p] for p in group["params"]}
        of_layers = ("qkv", "attention_output", "feed_forward_up", "feed_forward_down")
        expected = {f"bert.layers.{i}.{name}.weight" for i in range(2) for name in of_layers}
        assert taken == expected | {"bert.pooler.weight", "mlm_transform.weight"}
        others = {names[p] for g in optimizer.adamw.param_groups for p in g["params"]}
        assert not taken & others and taken | others == set(names.values())

        for p in model.parameters():
            p.grad = torch.full_like(p, 0.01)
        step.optimizer_step(model, optimizer, 1.0, 6e-4 / 2)  # half the peak of both
        assert [g["lr"] for g in optimizer.muon.param_groups] == [pytest.approx(0.015)]
        assert {g["lr"] for g in optimizer.adamw.param_groups} == {6e-4 / 2}


@pytest.mark.parametrize("muon", [0.0, 0.03])
def test_a_gradient_that_is_not_finite_changes_nothing(muon):
    shape = StarEncoderConfig(vocab_size=600, max_position_embeddings=48, **MODEL)
    model = StarEncoderForPreTraining(shape)
    optimizer = step.make_optimizer(model, train.TrainConfig(), muon)

    def take(value):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.01)
        model.nsp.weight.grad[0, 0] = value
        norm = step.optimizer_step(model, optimizer, 1.0, 1e-3)
        assert all(p.grad is None for p in model.parameters())
        return norm.isfinite().item(), [p.detach().clone() for p in model.parameters()]

    finite, first = take(0.5)
    assert finite
    moments = json.dumps(optimizer.state_dict(), default=lambda tensor: tensor.tolist())
    for value in (math.nan, math.inf):
        finite, after = take(value)
        assert not finite
        assert all(torch.equal(a, b) for a, b in zip(first, after))
        assert moments == json.dumps(optimizer.state_dict(), default=lambda tensor: tensor.tolist())
    _, moved = take(0.5)
    assert not any(torch.equal(a, b) for a, b in zip(first, moved))


# ---- use of a run ----


def test_fill_mask_and_embed(undisturbed, tokenizer):
    model = StarEncoderForPreTraining.from_pretrained(undisturbed.out)
    (first, second) = fill_mask(model, tokenizer, "def <mask>(a):\n    return <mask>", top_k=3)
    assert len(first) == len(second) == 3
    assert all(1 > a["score"] >= b["score"] > 0 for a, b in zip(first, first[1:]))
    assert all(tokenizer.decode([c["token"]]) == c["token_str"] for c in first)
    assert not model.training  # as it was, and as transformers hands models out
    texts = ["def f():\n    pass\n", "", "x = 1\n" * 200]
    vectors = embed(model, tokenizer, texts, dtype="float32")
    assert vectors.shape == (3, 32) and torch.allclose(vectors.norm(dim=1), torch.ones(3))
    alone = embed(model.bert, tokenizer, texts[:1], dtype="float32")
    torch.testing.assert_close(vectors[:1], alone, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="no <mask>"):
        fill_mask(model, tokenizer, "nothing to fill")
    with pytest.raises(ValueError, match="longer than the model"):
        fill_mask(model, tokenizer, "x = 1\n" * 200 + "<mask>")


def test_command_lines(undisturbed, tmp_path):
    result = program(
        "starencoder",
        "fill-mask",
        undisturbed.out,
        "def add(a, b): return a <mask> b",
        "--top-k",
        "4",
    )
    assert result.returncode == 0 and result.stdout.count("%") == 4
    (tmp_path / "a.py").write_text("print(1)\n")
    result = program("starencoder", "embed", undisturbed.out, str(tmp_path / "a.py"))
    assert len(json.loads(result.stdout)["embedding"]) == 32
    assert_refused(program("starencoder", "fill-mask", undisturbed.out, "no mask"), "no <mask>")
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    assert_refused(
        command("starencoder.py", "fill-mask", str(tmp_path / "none"), "a <mask>", env=offline),
        "no such directory",
    )


# ---- bad input ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hidden-size", "30", "--num-attention-heads", "4"], "must be divisible"),
        (["--steps", "-3"], "steps must be at least 1, got -3"),
        (["--learning-rate", "nan"], "learning_rate"),
        (["--data", "/nowhere"], "no corpus here"),
        (["--vocab-size", "77"], "vocabulary of 600, not 77"),
        (["--max-length", "4"], "max_length"),
        (["--out", "/proc/none"], "No such file"),
        (["--batch-size", "0"], "batch_size"),
        (["--max-grad-norm", "0"], "max_grad_norm"),
        (["--seed", str(2**70)], "seed"),
        (["--dtype", "float8"], "dtype"),
    ],
)
def test_refuses_bad_arguments(small_corpus, tmp_path, flags, words):
    flags = ["--data", small_corpus, "--out", str(tmp_path / "run"), "--device", "cpu", *flags]
    with pytest.raises((ValueError, OSError), match=words):
        train.train(train.parse_arguments(flags))
    assert not os.path.exists(tmp_path / "run")


def test_refuses_a_run_that_does_not_fit(small_corpus, undisturbed, tmp_path):
    before = finished(undisturbed)
    with pytest.raises(ValueError, match="holds a run with batch_size 8, not 9"):
        train.train(replace(undisturbed, batch_size=9))
    (tmp_path / "file").write_text("precious")
    with pytest.raises(ValueError, match="holds no run"):
        train.train(replace(undisturbed, out=str(tmp_path)))
    assert os.listdir(tmp_path) == ["file"]
    assert_same(list(finished(undisturbed)), list(before))


@pytest.mark.usefixtures("no_curves")
@pytest.mark.parametrize(
    "damage",
    ["cut", "emptied", "a bit flipped", "another file", "no pickle", "no model", "another step"],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(
    undisturbed, tmp_path, capsys, damage
):
    before, torn = finished(undisturbed), shutil.copytree(undisturbed.out, tmp_path / "torn")
    newest, config = torn / "checkpoints" / "00000006.pt", replace(undisturbed, out=str(torn))
    content = bytearray(newest.read_bytes())
    place = len(content) * 2 // 3
    content[place] ^= 1
    if damage in ("no model", "another step"):
        checkpoint = torch.load(newest, weights_only=True)
        torch.save(
            {"step": 6, "optimizer": {}} if damage == "no model" else checkpoint | {"step": 7},
            newest,
        )
    elif damage == "no pickle":
        write_zip(
            newest,
            {
                "archive/data.pkl": b"no pickle",
                "archive/version": b"3\n",
                "archive/byteorder": b"little",
            },
        )
    else:
        parts = {
            "cut": content[:place],
            "emptied": b"",
            "a bit flipped": content,
            "another file": b"precious" * 1000,
        }
        newest.write_bytes(parts[damage])
    train.train(config)
    output = capsys.readouterr()
    assert (
        "00000006.pt: damaged" in output.err
        and "after step 4." in output.out
        and os.path.exists(f"{newest}.damaged")
    )
    assert_same(list(finished(config)), list(before))
    for path in run_directory.checkpoints(config.out):
        os.truncate(path, 10)
    for _ in range(2):  # nor does a second start begin anew
        with pytest.raises(ValueError, match="all of its checkpoints are damaged"):
            train.train(config)


def write_zip(path, files):
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


@given(st.lists(st.integers(0, 2**32), min_size=1, max_size=2))
def test_a_checkpoint_with_a_flipped_bit_is_set_aside_or_is_the_same(tmp_path_factory, places):
    """Also in what the archive says of its files: it is as long as they are here."""
    config = train.TrainConfig(out=str(tmp_path_factory.mktemp("flipped")))
    folder = os.path.join(config.out, "checkpoints")
    os.mkdir(folder)
    states = {
        step: {"step": step, "model": {"w": torch.ones(3)}, "optimizer": {"m": torch.ones(2)}}
        for step in (1, 2)
    }
    for at, state in states.items():
        torch.save(state, os.path.join(folder, f"{at:08d}.pt"))
    newest = os.path.join(folder, "00000002.pt")
    with open(newest, "r+b") as f:
        content = bytearray(f.read())
        for place in places:
            content[place // 8 % len(content)] ^= 1 << place % 8
        f.seek(0)
        f.write(content)
    path = run_directory.newest_sound_checkpoint(config.out)
    step = run_directory.step_of(path)
    assert os.path.exists(f"{newest}.damaged") == (step == 1)
    assert_same(torch.load(path, weights_only=True), states[step])


def test_a_checkpoint_of_another_model_is_refused_and_kept(undisturbed, tmp_path):
    """It is no damage: somebody has changed the model's code."""
    torn = shutil.copytree(undisturbed.out, tmp_path / "run")
    newest = torn / "checkpoints" / "00000006.pt"
    checkpoint = torch.load(newest, weights_only=True)
    checkpoint["model"]["nsp.weight"] = torch.ones(3, 32)
    torch.save(checkpoint, newest)
    with pytest.raises(ValueError, match="00000006.pt: does not fit this model .*nsp.weight"):
        train.train(replace(undisturbed, out=str(torn)))
    assert len(run_directory.checkpoints(str(torn))) == 2


# ---- one run in a directory ----


def _hold(directory, name, held):
    """Holds a lock until it is killed; so does its child, if it inherits the lock."""
    with files.lock_directory(directory, name):
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
        child.start()
        held.send(child.pid)
        time.sleep(600)


@pytest.fixture
def held_by_another():
    """A function that has another process hold the lock of a directory; returns the process."""
    processes, children = [], []

    def hold(directory, name=".lock"):
        here, there = multiprocessing.Pipe()
        processes.append(
            multiprocessing.get_context("fork").Process(
                target=_hold, args=(str(directory), name, there)
            )
        )
        processes[-1].start()
        children.append(here.recv())
        return processes[-1]

    yield hold
    for process in processes:
        process.kill()
        process.join()
    for child in children:
        os.kill(child, signal.SIGKILL)


def test_a_lock_dies_with_its_process(held_by_another, tmp_path):
    """With that process alone: not only when its children are gone, too."""
    process = held_by_another(tmp_path)
    with pytest.raises(
        ValueError, match=rf"process {process.pid} on .* is writing there; wait for its end"
    ):
        files.lock_directory(tmp_path)
    process.kill()
    process.join()
    assert os.listdir(tmp_path) == [".lock"]
    files.lock_directory(tmp_path).close()
    assert os.listdir(tmp_path) == []


def test_a_lock_that_waited_for_a_file_that_is_gone(tmp_path, monkeypatch):
    """Whoever opens the file before it is removed, and locks it then, holds nothing."""
    real, opened = files.fcntl.lockf, []

    def slow(f, how):
        if not opened:
            os.remove(tmp_path / ".lock")
        opened.append(f)
        return real(f, how)

    monkeypatch.setattr(files.fcntl, "lockf", slow)
    lock = files.lock_directory(tmp_path)
    assert len(opened) == 2 and os.path.samestat(
        os.fstat(opened[1].fileno()), os.stat(tmp_path / ".lock")
    )
    lock.close()


def test_a_file_system_without_locks_costs_a_warning(tmp_path, monkeypatch, capsys):
    def none(f, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "lockf", none)
    files.lock_directory(tmp_path).close()
    assert "cannot be locked ([Errno 37] No locks available)" in capsys.readouterr().err


def test_a_second_run_in_one_directory_is_refused(undisturbed, held_by_another, tmp_path):
    run = shutil.copytree(undisturbed.out, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    held_by_another(run)
    with pytest.raises(ValueError, match="is writing there"):
        train.train(replace(undisturbed, out=str(run)))
    after = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and path.name != ".lock"
    }
    assert after == before


def test_a_second_corpus_in_one_directory_is_refused(
    small_corpus, sources, held_by_another, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    held_by_another(out)
    with pytest.raises(ValueError, match="is writing there"):
        corpus.prepare([sources], str(out), tokenizer=small_corpus, workers=1)
    assert os.listdir(out) == [".lock"]


@pytest.mark.slow
def test_all_ranks_of_a_second_run_end_together(small_corpus, held_by_another, tmp_path):
    (tmp_path / "run").mkdir()
    held_by_another(tmp_path / "run")
    results = drills.finish(drills.start(small_corpus, str(tmp_path / "run"), world_size=3))
    assert [status for status, *_ in results] == [2, 2, 2]
    words = "".join(words for *_, words in results)
    assert (
        words.count("error:") == 1 and "is writing there" in words and "Traceback" not in words
    ), words


# ---- files that are damaged or full ----


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs Linux")
def test_a_checkpoint_that_cannot_be_read_now_is_not_set_aside(tmp_path):
    """Where memory is short, torch's RuntimeError says nothing of the file."""
    path = tmp_path / "checkpoints" / "00000001.pt"
    path.parent.mkdir()
    torch.save(
        {"step": 1, "model": {"a": torch.zeros(50_000_000)}, "optimizer": {}}, path
    )  # 200 MB
    program = f"""if True:
        import resource
        from training import run_directory
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 10**8,) * 2)
        try:
            run_directory.newest_sound_checkpoint({str(tmp_path)!r})
        except OSError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "00000001.pt cannot be read now" in done.stdout, done.stderr
    assert os.listdir(path.parent) == ["00000001.pt"]


@pytest.mark.parametrize("content", ["[]", "3", "null", '"steps"', "{", "[" * 100_000])
def test_a_train_json_that_is_none(undisturbed, tmp_path, content):
    run = shutil.copytree(undisturbed.out, tmp_path / "run")
    (run / "train.json").write_text(content)
    with pytest.raises(ValueError, match="train.json: damaged"):
        train.train(replace(undisturbed, out=str(run)))
    assert (run / "train.json").read_text() == content


@pytest.mark.usefixtures("no_curves")
def test_a_line_of_metrics_without_its_end(undisturbed, tmp_path):
    """The disk was full at the newline; the checkpoint of this line's step exists all the same."""
    before, run = finished(undisturbed), shutil.copytree(undisturbed.out, tmp_path / "run")
    os.remove(run / "checkpoints" / "00000006.pt")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    last = max(i for i, line in enumerate(lines) if json.loads(line)["step"] == 4)
    (run / "metrics.jsonl").write_text("\n".join(lines[: last + 1]))
    train.train(replace(undisturbed, out=str(run)))
    assert_same(list(finished(replace(undisturbed, out=str(run)))), list(before))


def test_metrics_are_strict_json(tmp_path):
    """NaN and infinity are null, also in lines of an earlier start; curves leave them out."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\n')
    Metrics(str(path), 1, ranks.Ranks(), None).write(
        {"step": 2, "loss": math.inf, "mlm_loss": -math.inf, "f1": 0.5}
    )
    with open(path) as f:
        lines = [json.loads(line, parse_constant=pytest.fail) for line in f]
    assert lines == [
        {"step": 1, "loss": None},
        {"step": 2, "loss": None, "mlm_loss": None, "f1": 0.5},
    ]

    def draw(figure, steps, lines):
        assert [math.isnan(line["loss"]) for line in steps] == [True, True]
        figure.subplots().plot([line["loss"] for line in steps], "o")

    curves.draw_curves(tmp_path, draw)
    assert (tmp_path / "curves.png").exists()


@pytest.mark.usefixtures("no_curves")
def test_checkpoints_that_are_kept(small_corpus, undisturbed, tmp_path):
    """The newest k, and every n-th for good."""
    names = lambda config: [
        os.path.basename(path) for path in run_directory.checkpoints(config.out)
    ]
    assert names(undisturbed) == ["00000004.pt", "00000006.pt"]
    config = tiny(
        small_corpus, tmp_path / "run", save_every=1, keep_checkpoints=1, keep_every=3, eval_every=6
    )
    train.train(config)
    assert names(config) == ["00000003.pt", "00000006.pt"]
    config = tiny(
        small_corpus,
        tmp_path / "other",
        save_every=1,
        keep_checkpoints=2,
        keep_every=2,
        eval_every=6,
    )
    train.train(config)
    assert names(config) == ["00000002.pt", "00000004.pt", "00000005.pt", "00000006.pt"]


@pytest.mark.usefixtures("no_curves")
def test_a_full_disk_costs_a_warning(small_corpus, undisturbed, tmp_path, monkeypatch, capsys):
    """Nothing else: lines that could not be written come later, each once and in order."""
    config, real_save, real_open, failures = (
        tiny(small_corpus, tmp_path / "run"),
        torch.save,
        open,
        [],
    )

    def full_save(state, f):
        if state["step"] == 4:
            f.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(state, f)

    def full_open(path, mode="r", *a, **k):
        if str(path).endswith("metrics.jsonl") and mode == "a" and not failures:
            failures.append(path)
            with real_open(path, "a") as f:
                f.write('{"step": 1, "lo')
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_open(path, mode, *a, **k)

    monkeypatch.setattr(torch, "save", full_save)
    monkeypatch.setattr(metrics, "open", full_open, raising=False)
    train.train(config)
    warnings = capsys.readouterr().err
    assert (
        "metrics.jsonl cannot be written" in warnings
        and "00000004.pt cannot be written" in warnings
    )
    assert [run_directory.step_of(path) for path in run_directory.checkpoints(config.out)] == [
        6
    ]  # at step 2 the lines were still waiting
    assert os.listdir(os.path.join(config.out, "checkpoints")) == ["00000006.pt"]
    assert_same(list(finished(config)), list(finished(undisturbed)))


def test_a_gradient_that_is_not_finite_moves_nothing(small_corpus, tmp_path, monkeypatch, capsys):
    config, real, weights = (
        tiny(small_corpus, tmp_path / "run", save_every=1, keep_checkpoints=9),
        train.loss_on,
        {},
    )

    def planted(model, batch, masked, pairs, seed):
        loss, *parts = real(model, batch, masked, pairs, seed=seed)
        weights.setdefault(len(weights), model.nsp.weight.detach().clone())
        return (
            loss * float("nan") if len(weights) == 5 else loss
        ), *parts  # in the second micro-batch of the second step

    monkeypatch.setattr(train, "loss_on", planted)
    train.train(config)
    assert "1 of 6 steps were skipped" in capsys.readouterr().out
    saved = [torch.load(path, weights_only=True) for path in run_directory.checkpoints(config.out)]
    for name in saved[0]["model"]:
        assert (
            torch.equal(saved[0]["model"][name], saved[1]["model"][name])
            and saved[2]["model"][name].isfinite().all()
        )
    before, after = saved[0]["optimizer"], saved[1]["optimizer"]
    for name in ("muon", "adamw"):
        assert_same(before[name]["state"], after[name]["state"])
    assert not torch.equal(saved[1]["model"]["nsp.weight"], saved[2]["model"]["nsp.weight"])
    with open(os.path.join(config.out, "metrics.jsonl")) as f:
        lines = [json.loads(line, parse_constant=pytest.fail) for line in f]
    assert [line["step"] for line in lines if "skipped" in line] == [2] and len(
        [line for line in lines if "loss" in line]
    ) == 5


def test_ten_gradients_in_a_row_that_are_not_finite_end_the_run(
    small_corpus, tmp_path, monkeypatch
):
    """Also where a restart lies between them."""
    config, real = (
        tiny(small_corpus, tmp_path / "run", steps=20, log_every=1, save_every=1),
        train.loss_on,
    )
    bad = lambda *a, seed: [part * float("nan") for part in real(*a, seed=seed)]
    rate = train.learning_rate
    stop = lambda config, step: (
        (os.kill(os.getpid(), signal.SIGTERM) if step == 2 else None) or rate(config, step)
    )
    monkeypatch.setattr(train, "learning_rate", stop)
    monkeypatch.setattr(train, "loss_on", bad)
    assert train.train(config) is None  # stopped, and four steps were skipped
    monkeypatch.setattr(train, "learning_rate", rate)
    with pytest.raises(ValueError, match="10 steps in a row, up to step 10"):
        train.train(config)
    assert run_directory.step_of(run_directory.checkpoints(config.out)[-1]) == 9


def _with_nan_on_one_rank(rank, corpus_directory, out):
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": out[-5:],
    }
    torch.set_num_threads(1)
    real, calls = train.loss_on, []

    def planted(*a, **options):
        calls.append(options)
        loss, *parts = real(*a, **options)
        return (
            loss * float("nan") if rank == 1 and len(calls) == 6 else loss
        ), *parts  # two micro-batches a step: in the third step

    train.loss_on = planted
    train.train(tiny(corpus_directory, out, steps=6, save_every=1, keep_checkpoints=9))
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_nan_on_one_rank_is_skipped_by_all(small_corpus, tmp_path):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        out = str(tmp_path / f"run{s.getsockname()[1]:05d}")
    mp.spawn(_with_nan_on_one_rank, (small_corpus, out), nprocs=2)
    saved = [
        torch.load(path, weights_only=True)["model"]
        for path in sorted(glob.glob(f"{out}/checkpoints/*.pt"))
    ]
    same = [all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(saved, saved[1:])]
    assert same == [False, True, False, False, False] and all(
        t.isfinite().all() for t in saved[-1].values()
    )
    with open(f"{out}/metrics.jsonl") as f:
        assert [line["step"] for line in map(json.loads, f) if "skipped" in line] == [3]


def test_programs_end_with_one_line(small_corpus, undisturbed, tmp_path):
    torn = shutil.copytree(undisturbed.out, tmp_path / "torn")
    for path in (torn / "checkpoints").iterdir():
        os.truncate(path, 0)
    # the arguments of the run, from its own file
    with open(torn / "train.json") as f:
        fields = [
            (k, v)
            for k, v in json.load(f).items()
            if k not in ("tokenizer_sha256", "train_tokens") and not isinstance(v, bool)
        ]
    arguments = [x for k, v in fields for x in ("--" + k.replace("_", "-"), str(v))]
    assert_refused(
        program("train", *arguments, "--out", str(torn)), "all of its checkpoints are damaged"
    )
    assert_refused(program("train", "--colour"), "--colour")
    assert_refused(program("train", "--preset", "huge"), "huge")
    assert_refused(program("train", "--steps", "many"), "many")
    assert_refused(
        program("train", "--data", small_corpus, "--out", str(tmp_path / "new"), "--steps", "-1"),
        "steps",
    )


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_that_of_the_cpu(small_corpus):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    model = StarEncoderForPreTraining(
        StarEncoderConfig(vocab_size=600, max_position_embeddings=48, pad_token_id=596, **MODEL)
    )
    dataset = data.PairDataset(small_corpus, "train", 48, 0)
    batch = data.collate([dataset[i] for i in range(9)])
    expected = train.loss_on(model, batch, len(batch.labels), 9, seed=5)[0]
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.cuda()
    loss = train.loss_on(
        model, data.Batch(*(t.cuda() for t in batch)), len(batch.labels), 9, seed=5
    )[0]
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-4  # dropout too is the same, element for element
    for p, gradient in zip(model.parameters(), gradients):
        assert (p.grad.cpu() - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6


@pytest.mark.slow
def test_a_refusal_on_one_rank_ends_all_with_one_line(small_corpus, undisturbed):
    result = command(
        *TORCHRUN,
        "2",
        "train.py",
        "--data",
        small_corpus,
        "--out",
        undisturbed.out,
        "--device",
        "cpu",
    )
    assert result.returncode != 0
    assert result.stderr.count("train.py: error: ") == 1 and "holds a run with" in result.stderr
    assert "RuntimeError" not in result.stderr


@pytest.mark.usefixtures("no_curves")
def test_a_full_disk_is_one_line_and_loses_nothing(undisturbed, monkeypatch, tmp_path):
    run = shutil.copytree(undisturbed.out, tmp_path / "run")

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    os.remove(run / "checkpoints" / "00000006.pt")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot be written.*make room"):
        train.train(replace(undisturbed, out=str(run)))
    assert os.listdir(run / "checkpoints") == ["00000004.pt"]


def test_what_a_killed_start_left_half_written_goes(undisturbed, tmp_path):
    """Half a checkpoint may be a gigabyte. Nothing else with such an end is ours."""
    run = shutil.copytree(undisturbed.out, tmp_path / "run")
    half = [
        run / "model.safetensors.0a1b2c3d.tmp",
        run / "checkpoints" / "00000007.pt.0a1b2c3d.tmp",
    ]
    theirs = run / "notes.tmp"
    for path in (*half, theirs):
        path.write_text("half")
    train.train(replace(undisturbed, out=str(run)))
    assert [path.exists() for path in (*half, theirs)] == [False, False, True]
