"""The loop: the same gradient however a batch is split, the same bits however often a run is stopped, and what it refuses."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from conftest import ROOT, assert_refused, command
from torch.nn.parallel import DistributedDataParallel

import data
import train
from starencoder import StarEncoderConfig, StarEncoderForPreTraining, embed, fill_mask

MODEL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)


def tiny(small_corpus, out, **overrides):
    """A run of seconds, with dropout."""
    fields = dict(max_length=48, steps=6, batch_size=8, micro_batch_size=3, learning_rate=1e-2, warmup_steps=2, device="cpu")
    fields |= dict(dtype="float32", workers=0, eval_every=4, eval_examples=16, save_every=2, log_every=3)
    return train.TrainConfig(data=small_corpus, out=str(out), **(MODEL | fields | overrides))


# ---- one gradient, however it is computed ----


def _gradient(rank, world_size, micro_batch_size, directory, out):
    """The gradient of step 1 as the loop computes it, in fp64 without dropout; rank 0 saves it."""
    torch.set_num_threads(1)
    if world_size > 1:
        dist.init_process_group("gloo", init_method=f"file://{out}.init", rank=rank, world_size=world_size)
        ranks = train.Ranks(rank, world_size, control=dist.group.WORLD)
    else:
        ranks = train.Ranks()
    torch.manual_seed(0)
    shape = StarEncoderConfig(vocab_size=600, max_position_embeddings=48, pad_token_id=596, initializer_range=0.2, **MODEL)
    model = StarEncoderForPreTraining(shape).double().eval()
    ddp = DistributedDataParallel(model) if world_size > 1 else model
    (micro_batches,) = data.batches(
        data.PairDataset(directory, "train", 48, 0), range(1, 2), 26, micro_batch_size, rank, world_size, workers=0
    )
    masked, pairs = ranks.sum([sum(len(b.labels) for b in micro_batches), sum(len(b.next_sentence_label) for b in micro_batches)])
    loss_sum = 0.0
    for j, batch in enumerate(micro_batches):
        with ddp.no_sync() if world_size > 1 and j < len(micro_batches) - 1 else train.contextlib.nullcontext():
            loss, *_ = train.loss_on(ddp, batch, masked, pairs)
            (loss * world_size).backward()
        loss_sum += loss.item()
    (loss_sum,) = ranks.sum([loss_sum])
    if rank == 0:
        counts = [len(b.input_ids) for b in micro_batches]
        torch.save({"loss": loss_sum, "counts": counts, "grads": {n: p.grad for n, p in model.named_parameters()}}, out)
    if world_size > 1:
        dist.destroy_process_group()


@pytest.mark.slow
def test_same_gradient_whole_in_micro_batches_and_on_ranks(small_corpus, tmp_path):
    """Whole, in 4 micro-batches of unequal token counts, on 2 and 4 ranks: 1e-6 relative in fp64 (it is far below)."""
    results = {}
    for name, world_size, micro in (("whole", 1, 26), ("micro", 1, 7), ("2 ranks", 2, 13), ("4 ranks", 4, 2)):
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


# ---- a run that is stopped ends with the same bits ----


class Crash(Exception):
    """What a power cut is to a process."""


def finished(config):
    checkpoint = train.load_checkpoint(config, "cpu")
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


@pytest.fixture(scope="module")
def undisturbed(small_corpus, tmp_path_factory):
    config = tiny(small_corpus, tmp_path_factory.mktemp("runs") / "whole")
    train.train(config)
    return config


def test_a_run_is_what_it_says(undisturbed, tokenizer, capsys):
    checkpoint, lines, _ = finished(undisturbed)
    steps = [m for m in lines if "loss" in m]
    evaluations = [m for m in lines if "mlm_accuracy" in m]
    assert [m["step"] for m in steps] == list(range(1, 7)) and [m["step"] for m in evaluations] == [4, 6]
    assert [m["learning_rate"] for m in steps] == [5e-3, 1e-2, 1e-2, 7.5e-3, 5e-3, 2.5e-3]
    assert all(abs(m["loss"] - m["mlm_loss"] - m["nsp_loss"]) < 1e-6 and m["grad_norm"] > 0 for m in steps)
    assert sorted(os.listdir(os.path.join(undisturbed.out, "checkpoints"))) == ["00000004.pt", "00000006.pt"]
    assert not [name for _, _, names in os.walk(undisturbed.out) for name in names if "tmp" in name]
    # It is a Hugging Face directory, and the model in it is the checkpoint's.
    bert, info = transformers.BertForPreTraining.from_pretrained(undisturbed.out, output_loading_info=True)
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
    assert figures == train.evaluate(model, held_out, undisturbed.eval_examples, undisturbed.micro_batch_size, train.Ranks())
    assert "held-out code" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["crash", "stop"])
@pytest.mark.parametrize("step", range(6))
def test_a_run_stopped_after_any_step_ends_with_the_same_bits(small_corpus, undisturbed, tmp_path, monkeypatch, step, how):
    """Weights, optimizer and metrics, with dropout on; stopped in the middle of a step (crash) or by a signal's request."""
    config, real = tiny(small_corpus, tmp_path / "run [1]"), train.learning_rate

    def interrupted(config, at):
        if at == step:
            if how == "crash":
                raise Crash
            os.kill(os.getpid(), signal.SIGTERM)
        return real(config, at)

    monkeypatch.setattr(train, "draw_curves", lambda run: None)  # it takes longer than the run
    with monkeypatch.context() as patch:
        patch.setattr(train, "learning_rate", interrupted)
        if how == "crash":
            with pytest.raises(Crash):
                train.train(config)
        else:
            assert (train.train(config) is None) == (step < 4)  # one step later at most
    # What concerns the machine alone may differ from start to start (but the micro-batch size, which fixes the order of the sums).
    train.train(replace(config, workers=1, log_every=1, keep_checkpoints=5))
    assert_same(list(finished(config)), list(finished(undisturbed)))


@pytest.mark.slow
def test_a_killed_process_goes_on(small_corpus, tmp_path):
    """SIGTERM, to the process or to its group with the loader's workers, saves and ends with status 0; SIGKILL loses what came after the
    last checkpoint; the end is the same."""
    flags = "--device cpu --dtype float32 --hidden-size 32 --num-hidden-layers 2 --num-attention-heads 4 --intermediate-size 64 "
    flags += "--max-length 48 --steps 120 --batch-size 8 --eval-every 1000 --eval-examples 16 --save-every 20 --log-every 1 --workers 1 "
    flags += "--hidden-dropout-prob 0.1 --warmup-steps 10"
    arguments = [sys.executable, "train.py", "--data", small_corpus, *flags.split()]

    def steps_written(out):
        path = os.path.join(out, "metrics.jsonl")
        return len(open(path).readlines()) if os.path.exists(path) else 0

    outs = [str(tmp_path / name) for name in ("whole", "stopped")]
    assert subprocess.run([*arguments, "--out", outs[0]], cwd=ROOT, capture_output=True).returncode == 0
    for number, kill, after in ((signal.SIGTERM, os.kill, 5), (signal.SIGTERM, os.killpg, 30), (signal.SIGKILL, os.kill, 60)):
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
        process = subprocess.Popen([*arguments, "--out", outs[1]], cwd=ROOT, **pipes)
        while steps_written(outs[1]) < after and process.poll() is None:
            time.sleep(0.005)
        kill(process.pid, number)
        said, errors = process.communicate()
        assert process.returncode == (0 if number == signal.SIGTERM else -signal.SIGKILL), errors
        assert "Traceback" not in errors
        if number == signal.SIGTERM:
            assert "the same command goes on from there" in said
    done = subprocess.run([*arguments, "--out", outs[1]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Continuing" in done.stdout
    a, b = (finished(train.TrainConfig(out=out)) for out in outs)
    assert_same(list(a), list(b))


@pytest.mark.slow
def test_two_ranks_train_as_one(small_corpus, tmp_path):
    """torchrun with 2 processes: the losses of 1 process to 1e-5, without dropout; figures are those of the whole batch."""
    arguments = ["--data", small_corpus, "--device", "cpu", "--dtype", "float32", "--hidden-size", "32", "--num-hidden-layers", "2"]
    arguments += ["--num-attention-heads", "4", "--intermediate-size", "64", "--max-length", "48", "--steps", "20", "--batch-size", "10"]
    arguments += ["--micro-batch-size", "3", "--eval-every", "10", "--eval-examples", "33", "--hidden-dropout-prob", "0"]
    lines = []
    for world_size in (1, 2):
        out = str(tmp_path / str(world_size))
        launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
        result = command(*(launch if world_size == 2 else []), "train.py", *arguments, "--out", out)
        assert result.returncode == 0, result.stderr
        lines.append([json.loads(line) for line in open(os.path.join(out, "metrics.jsonl"))])
    for a, b in zip(*lines, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"tokens_per_second"}:
            assert abs(a[key] - b[key]) <= 1e-5 * max(1, abs(a[key])), key


# ---- figures ----


def test_evaluation_is_the_mean_over_its_pairs(small_corpus):
    """However it is split; and the baseline is the share of the most frequent masked token."""
    torch.manual_seed(0)
    model = StarEncoderForPreTraining(StarEncoderConfig(vocab_size=600, max_position_embeddings=48, pad_token_id=596, **MODEL))
    dataset = data.PairDataset(small_corpus, "validation", 48, 0)
    figures = [train.evaluate(model, dataset, 21, micro, train.Ranks()) for micro in (21, 4)]
    batch = data.collate([dataset[i] for i in range(21)])
    out = model.eval()(*batch)
    assert abs(figures[0]["mlm_loss"] - out.mlm_loss.item()) < 1e-5
    counts = np.bincount(batch.labels)
    assert figures[0]["majority_accuracy"] == counts.max() / counts.sum()
    for key, value in figures[0].items():
        assert abs(value - figures[1][key]) < 1e-6


def test_flops_are_those_that_pytorch_counts():
    from torch.utils.flop_counter import FlopCounterMode

    config = StarEncoderConfig(vocab_size=600, max_position_embeddings=48, pad_token_id=596, **MODEL)
    model = StarEncoderForPreTraining(config).eval()
    lengths, masked = [48, 7, 30], 11
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    ids = torch.randint(600, (sum(lengths),))
    with FlopCounterMode(display=False) as counter:
        model(ids, cu_seqlens, ids[:masked], torch.ones(3, dtype=torch.int64), torch.arange(masked)).loss.backward()
    assert counter.get_total_flops() == train.model_flops(config, lengths, masked)


def test_published_arithmetic():
    """657.4 M FLOPs per token at length 1,024, with the head on 15 % of the tokens; the schedule's corners."""
    per_token = train.model_flops(StarEncoderConfig(), [1024], 0.15 * 1024) / 1024
    assert abs(per_token / 657.4e6 - 1) < 1e-3
    config = train.parse_arguments(["--preset", "starencoder"])
    assert (config.steps, config.batch_size, config.max_length, config.micro_batch_size) == (100_000, 4096, 1024, 64)
    corners = {0: 6e-4 / 24_000, 23_999: 6e-4, 24_000: 6e-4, 62_000: 3e-4, 99_999: 6e-4 / 76_000}
    assert {step: train.learning_rate(config, step) for step in corners} == pytest.approx(corners)


def test_no_two_dropout_masks_of_a_run_are_alike(small_corpus, tmp_path, monkeypatch):
    seeds, real = [], train.loss_on
    monkeypatch.setattr(train, "loss_on", lambda *a, seed: seeds.append(seed) or real(*a, seed=seed))
    train.train(tiny(small_corpus, tmp_path / "run"))
    assert len(seeds) == len(set(seeds)) == 6 * 3  # 3 micro-batches in each of 6 steps


def test_the_gradient_is_clipped(small_corpus, tmp_path):
    """A gradient of norm 1e-12, far below Adam's epsilon, moves nothing; the norm before clipping is what is reported."""
    config = tiny(small_corpus, tmp_path / "run", steps=2, max_grad_norm=1e-12, weight_decay=0.0)
    train.train(config)
    torch.manual_seed(config.seed)
    start = StarEncoderForPreTraining(StarEncoderConfig(vocab_size=600, max_position_embeddings=48, pad_token_id=596, **MODEL))
    end = StarEncoderForPreTraining.from_pretrained(config.out)
    assert all((a - b).abs().max() < 1e-7 for a, b in zip(start.parameters(), end.parameters()))
    assert all(line["grad_norm"] > 0.1 for line in finished(config)[1] if "loss" in line)


def test_no_decay_on_biases_and_layer_norms():
    model = StarEncoderForPreTraining(StarEncoderConfig(vocab_size=600, max_position_embeddings=48, **MODEL))
    decayed, plain = train.make_optimizer(model, train.TrainConfig()).param_groups
    names = {p: n for n, p in model.named_parameters()}
    assert all(names[p].endswith(".weight") and "norm" not in names[p] for p in decayed["params"])
    assert all(names[p].endswith("bias") or "norm" in names[p] for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(names)
    assert decayed["weight_decay"] == 0.01 and plain["weight_decay"] == 0


# ---- use of a run ----


def test_fill_mask_and_embed(undisturbed, tokenizer):
    model = StarEncoderForPreTraining.from_pretrained(undisturbed.out)
    (first, second) = fill_mask(model, tokenizer, "def <mask>(a):\n    return <mask>", top_k=3)
    assert len(first) == len(second) == 3
    assert all(1 > a["score"] >= b["score"] > 0 for a, b in zip(first, first[1:]))
    assert all(tokenizer.decode([c["token"]]) == c["token_str"] for c in first)
    assert not model.training  # as it was, and as transformers hands models out
    texts = ["def f():\n    pass\n", "", "x = 1\n" * 200]
    vectors = embed(model, tokenizer, texts)
    assert vectors.shape == (3, 32) and torch.allclose(vectors.norm(dim=1), torch.ones(3))
    assert torch.equal(vectors[:1], embed(model.bert, tokenizer, texts[:1]))
    with pytest.raises(ValueError, match="no <mask>"):
        fill_mask(model, tokenizer, "nothing to fill")
    with pytest.raises(ValueError, match="longer than the model"):
        fill_mask(model, tokenizer, "x = 1\n" * 200 + "<mask>")


def test_command_lines(undisturbed, tmp_path):
    result = command("starencoder.py", "fill-mask", undisturbed.out, "def add(a, b): return a <mask> b", "--top-k", "4")
    assert result.returncode == 0 and result.stdout.count("%") == 4
    (tmp_path / "a.py").write_text("print(1)\n")
    result = command("starencoder.py", "embed", undisturbed.out, str(tmp_path / "a.py"))
    assert len(json.loads(result.stdout)["embedding"]) == 32
    assert_refused(command("starencoder.py", "fill-mask", undisturbed.out, "no mask"), "no <mask>")
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    assert_refused(command("starencoder.py", "fill-mask", str(tmp_path / "none"), "a <mask>", env=offline), "no such directory")


# ---- bad input ----


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--hidden-size", "30", "--num-attention-heads", "4"], "not divisible"),
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
    torn = shutil.copytree(undisturbed.out, tmp_path / "torn")
    newest = torn / "checkpoints" / "00000006.pt"
    os.truncate(newest, os.path.getsize(newest) * 2 // 3)
    with pytest.raises(ValueError, match="00000006.pt: damaged.*remove it to go on from step 4"):
        train.train(replace(undisturbed, out=str(torn)))
    os.remove(newest)
    train.train(replace(undisturbed, out=str(torn)))
    assert_same(list(finished(replace(undisturbed, out=str(torn)))), list(before))


def test_programs_end_with_one_line(small_corpus, undisturbed, tmp_path):
    torn = shutil.copytree(undisturbed.out, tmp_path / "torn")
    newest = torn / "checkpoints" / "00000006.pt"
    os.truncate(newest, 0)
    # the arguments of the run, from its own file
    with open(torn / "train.json") as f:
        fields = [(k, v) for k, v in json.load(f).items() if k not in ("tokenizer_sha256", "train_tokens")]
    arguments = [x for k, v in fields for x in ("--" + k.replace("_", "-"), str(v))]
    assert_refused(command("train.py", *arguments, "--out", str(torn)), "00000006.pt", "damaged", "remove it")
    assert_refused(command("train.py", "--colour"), "--colour")
    assert_refused(command("train.py", "--preset", "huge"), "huge")
    assert_refused(command("train.py", "--steps", "many"), "many")
    assert_refused(command("train.py", "--data", small_corpus, "--out", str(tmp_path / "new"), "--steps", "-1"), "steps")


@pytest.mark.gpu
def test_a_step_on_a_gpu_is_that_of_the_cpu(small_corpus):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    torch.manual_seed(0)
    model = StarEncoderForPreTraining(StarEncoderConfig(vocab_size=600, max_position_embeddings=48, pad_token_id=596, **MODEL))
    dataset = data.PairDataset(small_corpus, "train", 48, 0)
    batch = data.collate([dataset[i] for i in range(9)])
    expected = train.loss_on(model, batch, len(batch.labels), 9, seed=5)[0]
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.cuda()
    loss = train.loss_on(model, data.Batch(*(t.cuda() for t in batch)), len(batch.labels), 9, seed=5)[0]
    loss.backward()
    assert abs(loss.item() - expected.item()) < 1e-4  # dropout too is the same, element for element
    for p, gradient in zip(model.parameters(), gradients):
        assert (p.grad.cpu() - gradient).norm() <= 1e-3 * gradient.norm() + 1e-6


@pytest.mark.slow
def test_a_refusal_on_one_rank_ends_all_with_one_line(small_corpus, undisturbed):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0"]
    result = command(*launch, "train.py", "--data", small_corpus, "--out", undisturbed.out, "--device", "cpu")
    assert result.returncode != 0
    assert result.stderr.count("train.py: error: ") == 1 and "holds a run with" in result.stderr
    assert "RuntimeError" not in result.stderr


def test_a_full_disk_is_one_line_and_loses_nothing(undisturbed, monkeypatch, tmp_path):
    run = shutil.copytree(undisturbed.out, tmp_path / "run")

    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0")

    os.remove(run / "checkpoints" / "00000006.pt")
    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="cannot be written.*make room"):
        train.train(replace(undisturbed, out=str(run)))
    assert os.listdir(run / "checkpoints") == ["00000004.pt"]
