"""TODO."""

import contextlib
import functools
import json
import math
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import train as pretraining
from common.arguments import option
from common.signals import until_signal
from corpus.tokenizer import Tokenizer
from data import permute, share
from pii.detector import Detector
from pii.labels import LABELS, LabelledWindows, pack, read_labelled
from pii.scores import evaluate_detector
from pii.synthesize import synthesize
from starencoder import StarEncoderConfig, StarEncoderForTokenClassification
from training.curves import draw_curves, draw_fine_tuning
from training.metrics import Metrics
from training.plan import model_flops, peak_flops
from training.ranks import Ranks
from training.run_directory import (
    load_checkpoint,
    newest_sound_checkpoint,
    open_run,
    save_checkpoint,
    step_of,
)
from training.step import dtype_of_run, make_optimizer

DEFAULT_ENCODER, DEFAULT_DATA = "runs/tiny", "corpora/pii"  # made where they are missing


@dataclass
class PIIConfig:
    """All arguments of a fine-tuning; the defaults are the published StarPII's."""

    encoder: str = option(
        "bigcode/starencoder",
        "the pretrained model: a run directory, or any Bert directory of transformers",
    )
    data: str = option(
        DEFAULT_DATA,
        "directory with train.jsonl and validation.jsonl; the default is synthesized where it is missing",
    )
    out: str = option("runs/starpii", "run directory; an unfinished run there is continued")
    random_weights: bool = option(
        False, "begin from the encoder's shape without its weights: what pretraining is worth"
    )
    steps: int = option(10_000, "optimizer steps at most")
    batch_size: int = option(64, "windows in a step, over all ranks and micro-batches")
    micro_batch_size: int = option(64, "windows that a rank computes at once, at most")
    learning_rate: float = option(2e-5, "at its peak")
    warmup_steps: int = option(100, "of linear rise; then a cosine to 0 at the last step")
    adam_beta1: float = option(0.9, "AdamW")
    adam_beta2: float = option(0.999, "AdamW")
    adam_epsilon: float = option(1e-8, "AdamW")
    weight_decay: float = option(0.01, "AdamW; not on biases and LayerNorms")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm")
    eval_every: int = option(200, "steps between evaluations and checkpoints")
    patience: int = option(10, "evaluations without a better F1 after which the run ends")
    seed: int = option(0, "fixes the new weights, the order of the windows and dropout")
    device: str = option("auto", "cpu or cuda; auto: cuda where there is one")
    dtype: str = option(
        "auto",
        "of the computation: bfloat16, float32, or auto: bfloat16 where the device multiplies it fast",
    )
    keep_checkpoints: int = option(1, "the newest to keep")
    timeout: int = option(600, "seconds after which a rank that does not answer is given up")
    log_every: int = option(10, "steps between lines written to metrics.jsonl")
    keep_every = 2**62  # none for good

    def __post_init__(self):
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name in ("warmup_steps", "seed") else 1
            if f.type is int and not least <= value < 2**62:
                raise ValueError(f"{f.name} must be at least {least}, got {value}")
            if (
                f.type is float
                and not 0 <= value < math.inf
                or f.name == "max_grad_norm"
                and value == 0
            ):
                raise ValueError(f"{f.name} must be a number from 0 up, got {value}")
        if self.device not in ("auto", "cpu", "cuda") or self.dtype not in (
            "auto",
            "bfloat16",
            "float32",
        ):
            raise ValueError(
                f"device must be auto, cpu or cuda and dtype auto, bfloat16 or float32, got {self.device} and {self.dtype}"
            )


PII_PRESETS = {
    # The tiny encoder on a CPU, minutes: narrower, so with a higher rate.
    "tiny": dict(
        encoder=DEFAULT_ENCODER, out="runs/pii", steps=900, learning_rate=2e-3, eval_every=450
    ),
    "starpii": dict(),
}


MACHINE_FIELDS = set("out micro_batch_size device log_every keep_checkpoints timeout".split())


def learning_rate(config, step):
    """Linear warm-up, then half a cosine to 0: the rate of step `step` (the first is 0)."""
    rise = (step + 1) / max(config.warmup_steps, 1)
    rest = min(
        1.0, max(0.0, (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1))
    )
    return config.learning_rate * min(rise, (1 + math.cos(math.pi * rest)) / 2)


def train_detector(config):
    """Runs, or continues, the fine-tuning that `config` describes; returns the best validation scores, or None where a signal stopped it.

    Raises ValueError for arguments, data, an encoder or a run directory that do not fit together.
    """
    ranks = Ranks.start(config.device, config.timeout)
    with ranks.watched(), contextlib.ExitStack() as held:
        return fine_tune(config, ranks, held)


def fine_tune(config, ranks, held):
    lead, device = ranks.rank == 0, ranks.device
    say = print if lead else lambda *_: None
    if config.encoder == DEFAULT_ENCODER and not os.path.exists(
        os.path.join(DEFAULT_ENCODER, "model.safetensors")
    ):
        say(f"No encoder at {DEFAULT_ENCODER} yet: pretraining it first.")
        if (
            pretraining._train(pretraining.TrainConfig(**pretraining.PRESETS["tiny"]), ranks, held)
            is None
        ):
            return None
    with ranks.together():
        tokenizer, skipped = Tokenizer.from_pretrained(config.encoder), Counter()
    with ranks.together():
        if (
            lead
            and config.data == DEFAULT_DATA
            and not os.path.exists(os.path.join(DEFAULT_DATA, "train.jsonl"))
        ):
            say(
                f"No data at {DEFAULT_DATA} yet: synthesizing it from the standard library of this Python."
            )
            synthesize([], DEFAULT_DATA)
    with ranks.together():
        labelled = {
            split: read_labelled(os.path.join(config.data, f"{split}.jsonl"), skipped)
            for split in ("train", "validation")
        }
        for reason, n in skipped.items():
            say(f"left out: {n:,} {reason}")
        torch.manual_seed(config.seed)  # for the new weights
        id2label = dict(enumerate(LABELS))
        if config.random_weights:
            shape = StarEncoderConfig.load(config.encoder)
            model = StarEncoderForTokenClassification(
                StarEncoderConfig(**asdict(shape) | {"id2label": id2label})
            )
        else:
            model = StarEncoderForTokenClassification.from_pretrained(
                config.encoder, id2label=id2label
            )
        model.to(device).train()
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{config.encoder}: its tokenizer has more tokens than its model")
        train_set = LabelledWindows(
            labelled["train"], tokenizer, model.config.max_position_embeddings
        )
        if not len(train_set):
            raise ValueError(f"{config.data}: no text in its train.jsonl")
        if config.batch_size < ranks.world_size:
            raise ValueError(
                f"batch_size {config.batch_size} leaves some of {ranks.world_size} ranks without a window"
            )
        optimizer = make_optimizer(model, config)
    dtype = dtype_of_run(config, ranks)
    with ranks.together():
        if lead:
            held.enter_context(open_run(config, asdict(config) | {"dtype": dtype}, MACHINE_FIELDS))
    with ranks.together():
        path = newest_sound_checkpoint(config) if lead else None
    first = int(ranks.sum([step_of(path) if path else 0])[0])
    with ranks.together():
        if first:
            path = os.path.join(config.out, "checkpoints", f"{first:08d}.pt")
            load_checkpoint(path, model, optimizer, device)
    metrics = Metrics(
        os.path.join(config.out, "metrics.jsonl"), first, ranks, peak_flops(device), terms=("loss",)
    )
    best, since = best_so_far(metrics.path, ranks)
    ddp = model
    if ranks.world_size > 1:
        ddp = DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        (ids, cu_seqlens), (labels, _) = [pack([array], device) for array in train_set[0]]
        ddp(
            ids, cu_seqlens, labels, seed=0
        ).loss.backward()  # DDP sorts its buckets after this one: see train.py
        optimizer.zero_grad(set_to_none=True)
    parameters = sum(p.numel() for p in model.parameters())
    say(
        f"{parameters / 1e6:.2f} M parameters; {len(labelled['train']):,} documents, {len(train_set):,} windows; {config.steps:,} steps of"
    )
    say(
        f"{config.batch_size} windows of up to {model.config.max_position_embeddings} tokens on {device}, {dtype}"
    )
    if first:
        say(f"Continuing {config.out} after step {first}.")

    autocast = functools.partial(
        torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bfloat16"
    )
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=not lead, desc="fine-tuning")
    done, stop, ended = first, [], since >= config.patience
    for step in until_signal(range(config.steps if ended else first, config.steps), stop):
        parts = []
        for part in share(
            step * config.batch_size,
            config.batch_size,
            ranks.rank,
            ranks.world_size,
            config.micro_batch_size,
        ):
            drawn = [
                train_set[
                    permute(i % len(train_set), len(train_set), config.seed + i // len(train_set))
                ]
                for i in part
            ]
            parts.append([pack(arrays, device) for arrays in zip(*drawn)])
        labelled_tokens = [int((labels >= 0).sum()) for _, (labels, _) in parts]
        total, stopping = ranks.sum([sum(labelled_tokens), len(stop)])
        loss_sum = torch.zeros(1, device=device)
        for j, ((ids, cu_seqlens), (labels, _)) in enumerate(parts):
            metrics.tokens += len(ids)
            metrics.flops += model_flops(model.config, cu_seqlens.diff().cpu().numpy(), 0)
            key = np.random.SeedSequence((config.seed, step, ranks.rank, j)).generate_state(
                1, np.uint64
            )[0]
            alone = ranks.world_size == 1 or j == len(parts) - 1
            with contextlib.nullcontext() if alone else ddp.no_sync():
                with autocast():
                    out = ddp(
                        ids,
                        cu_seqlens,
                        labels,
                        seed=torch.full((), int(key >> 2), dtype=torch.int64, device=device),
                    )
                    loss = out.loss * (
                        labelled_tokens[j] / max(total, 1)
                    )  # the mean over the labelled tokens of the global batch
                (loss * ranks.world_size).backward()
            loss_sum += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.found_inf = (~norm.isfinite()).float()
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        metrics.add(done, *loss_sum, norm, rate)
        bar.update()
        evaluating = done == config.steps or done % config.eval_every == 0
        if evaluating or stopping or done % config.log_every == 0:
            line = metrics.flush()
            so_far = f", best F1 {best:.3f}" if best >= 0 else ""
            bar.set_postfix_str(
                f"loss {line.get('loss', math.nan):.4f}, {line['tokens_per_second']:,.0f} tokens/s{so_far}"
            )
        if evaluating:
            model.eval()
            figures = evaluate_detector(
                Detector(model, tokenizer, threshold=0.0).find, labelled["validation"], ranks
            )
            model.train()
            f1 = figures.get("macro", {}).get("f1", 0.0)
            by_category = {
                f"f1/{name}": row["f1"] for name, row in figures.items() if name != "macro"
            }
            better, since = f1 > best, 0 if f1 > best else since + 1
            best = max(best, f1)
            metrics.write({"step": done, "f1": f1} | by_category)
            if lead:
                words = ", ".join(
                    f"{name.partition('/')[2]} {value:.3f}" for name, value in by_category.items()
                )
                bar.write(f"step {done:6}: F1 {f1:.3f} ({words})", file=sys.stderr)
                draw_curves(config.out, draw_fine_tuning)
                if better:
                    model.save_pretrained(config.out)
        if lead and (evaluating or stopping):
            save_checkpoint(config, model, optimizer, tokenizer, done, publish=False)
        if evaluating or stopping:
            metrics.start_clock()
        ended = evaluating and since >= config.patience
        if stopping or ended:
            break
    bar.close()
    if done < config.steps and not ended:
        say(f"Stopped after step {done} of {config.steps}; the same command goes on from there.")
        return None
    say(
        f"Best F1 {best:.3f} on {config.data}/validation.jsonl. The detector is in {config.out} (a Hugging Face directory),"
    )
    say(f"its curves in {config.out}/curves.png.")
    return best


def best_so_far(path, ranks):
    """(the best F1 in a metrics.jsonl, evaluations since then), as the first rank reads it."""
    best, since = -1.0, 0
    if ranks.rank == 0:
        with open(path) as f:
            for f1 in (line["f1"] for line in map(json.loads, f) if "f1" in line):
                best, since = (f1, 0) if f1 > best else (best, since + 1)
    best, since = ranks.sum([best, since] if ranks.rank == 0 else [0.0, 0])
    return best, int(since)
