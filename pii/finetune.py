"""Fine-tuning an encoder as a detector of personal data: a linear layer on each token.

As in train.py: the loss is the mean over the labelled tokens of the *global* batch, a run that was
stopped goes on from its last checkpoint with the same bits, and torchrun starts it on several GPUs.
The run directory's model is the one with the best F1 on the validation documents so far.

References: Li et al., StarCoder, 2023, section 4. Hyperparameters: the model card of StarPII.
"""

import json
import math
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import torch
from tqdm import tqdm

import train as pretraining
from common.arguments import check_fields, option
from common.ranges import permute, share
from common.signals import noting_signals
from corpus.tokenizer import Tokenizer
from pii.detector import Detector
from pii.labels import LABELS, LabelledWindows, pack, read_labelled
from pii.scores import evaluate_detector
from pii.synthesize import synthesize
from starencoder import StarEncoderConfig, StarEncoderForTokenClassification
from training import plan
from training.curves import draw_curves, draw_fine_tuning
from training.metrics import Metrics
from training.ranks import Ranks
from training.run_directory import RunDirectory
from training.step import (
    autocast_to,
    dtype_of_run,
    make_optimizer,
    micro_batch_seed,
    optimizer_step,
    sync_gradients,
    wrap_ddp,
)

DEFAULT_ENCODER = "runs/tiny"  # pretrained if it is missing
DEFAULT_DATA = "corpora/pii"  # synthesized if it is missing


@dataclass
class PIIConfig:
    """All arguments of a fine-tuning. The defaults are the published StarPII's."""

    encoder: str = option(
        "bigcode/starencoder", "the pretrained model: a run, or any Bert directory of transformers"
    )
    data: str = option(
        DEFAULT_DATA, "directory with train.jsonl and validation.jsonl; the default is made"
    )
    out: str = option("runs/starpii", "run directory; an unfinished run there is continued")
    random_weights: bool = option(False, "begin without the encoder's weights, for comparison")
    steps: int = option(10_000, "optimizer steps at most")
    batch_size: int = option(64, "windows in a step, over all ranks and micro-batches")
    micro_batch_size: int = option(64, "windows that a rank computes at once, at most")
    learning_rate: float = option(2e-5, "peak learning rate")
    warmup_steps: int = option(100, "steps of linear warm-up; then a cosine to 0", least=0)
    adam_beta1: float = option(0.9, "AdamW: decay of the first moment")
    adam_beta2: float = option(0.999, "AdamW: decay of the second moment")
    adam_epsilon: float = option(1e-8, "AdamW: added to the denominator")
    weight_decay: float = option(0.01, "AdamW: on matrices, not on biases and LayerNorms")
    max_grad_norm: float = option(1.0, "larger gradients are scaled down to it", least=1e-30)
    eval_every: int = option(200, "steps between evaluations and checkpoints")
    patience: int = option(10, "evaluations without a better F1 after which the run ends")
    seed: int = option(0, "fixes the new weights, the order of windows and dropout", least=0)
    device: str = option("auto", "auto: cuda if available", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "compute dtype; auto: bfloat16 if the device is fast at it",
        choices=("auto", "bfloat16", "float32"),
    )
    keep_checkpoints: int = option(1, "how many of the newest checkpoints to keep")
    timeout: int = option(600, "seconds before an unresponsive rank ends the run")
    log_every: int = option(10, "steps between writes to metrics.jsonl (one line per step)")
    keep_every = 2**62  # no field: no checkpoint is kept for good

    def __post_init__(self):
        check_fields(self)


PII_PRESETS = {
    # The tiny encoder, minutes on a CPU: narrower, so with a higher rate.
    "tiny": dict(
        encoder=DEFAULT_ENCODER, out="runs/pii", steps=900, learning_rate=2e-3, eval_every=450
    ),
    "starpii": dict(),
}
MACHINE_FIELDS = {"out", "micro_batch_size", "device", "log_every", "keep_checkpoints", "timeout"}


def learning_rate(config, step):
    """Linear warm-up, then half a cosine to 0: the rate of step `step` (the first is 0)."""
    rise = (step + 1) / max(config.warmup_steps, 1)
    decay_steps = max(config.steps - config.warmup_steps, 1)
    decayed = min(1.0, max(0.0, (step - config.warmup_steps) / decay_steps))
    return config.learning_rate * min(rise, (1 + math.cos(math.pi * decayed)) / 2)


def train(config):
    """Runs, or continues, the fine-tuning that `config` describes.

    Returns the best F1 on the validation documents, or None if a signal stopped it. Raises
    ValueError for arguments, data, an encoder or a run directory that do not fit together.
    """
    ranks = Ranks.start(config.device, config.timeout)
    with ranks.watched():
        if not make_defaults(config, ranks):
            return None
        dtype = dtype_of_run(config, ranks)
        with ranks.together():
            setup = set_up(config, ranks, dtype)
        resolved = asdict(config) | {"dtype": dtype}
        with RunDirectory(config, ranks, resolved, MACHINE_FIELDS) as run:
            return training_loop(config, ranks, setup, run)


def make_defaults(config, ranks):
    """Makes the default encoder and data if they are missing. False if a signal stopped it."""
    has_encoder = os.path.exists(os.path.join(DEFAULT_ENCODER, "model.safetensors"))
    if config.encoder == DEFAULT_ENCODER and not has_encoder:
        ranks.say(f"No encoder at {DEFAULT_ENCODER} yet: pretraining it first.")
        tiny = pretraining.TrainConfig(**pretraining.PRESETS["tiny"])
        if pretraining.pretrain(tiny, ranks) is None:
            return False
    with ranks.together():
        has_data = os.path.exists(os.path.join(DEFAULT_DATA, "train.jsonl"))
        if ranks.lead and config.data == DEFAULT_DATA and not has_data:
            print(f"No data at {DEFAULT_DATA} yet: making it from Python's standard library.")
            synthesize([], DEFAULT_DATA)
    return True


class Setup(NamedTuple):
    """What the loop needs."""

    windows: LabelledWindows  # for training
    documents: int  # that they are of
    validation: list  # labelled documents
    tokenizer: Tokenizer
    model: StarEncoderForTokenClassification
    optimizer: torch.optim.Optimizer
    autocast: object  # makes the context of a forward pass


def set_up(config, ranks, dtype):
    """Data, model and optimizer. Raises ValueError if they do not fit together."""
    tokenizer = Tokenizer.from_pretrained(config.encoder)
    skipped = Counter()
    documents = read_labelled(os.path.join(config.data, "train.jsonl"), skipped)
    validation = read_labelled(os.path.join(config.data, "validation.jsonl"), skipped)
    for reason, count in skipped.items():
        ranks.say(f"left out: {count:,} {reason}")

    torch.manual_seed(config.seed)  # for the new weights
    id2label = dict(enumerate(LABELS))
    if config.random_weights:
        shape = replace(StarEncoderConfig.load(config.encoder), id2label=id2label)
        model = StarEncoderForTokenClassification(shape)
    else:
        model = StarEncoderForTokenClassification.from_pretrained(config.encoder, id2label=id2label)
    model.to(ranks.device).train()

    windows = LabelledWindows(documents, tokenizer, model.config.max_position_embeddings)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(f"{config.encoder}: its tokenizer has more tokens than its model")
    if not len(windows):
        raise ValueError(f"{config.data}: no text in its train.jsonl")
    if config.batch_size < ranks.world_size:
        raise ValueError(
            f"batch_size {config.batch_size} leaves some of {ranks.world_size} ranks without a "
            "window"
        )
    optimizer = make_optimizer(model, config)
    autocast = autocast_to(dtype, ranks.device)
    return Setup(windows, len(documents), validation, tokenizer, model, optimizer, autocast)


class WindowBatch(NamedTuple):
    """Windows end to end: B sequences, T tokens."""

    input_ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (B+1,) int32
    labels: torch.Tensor  # (T,) int64, -100 where a token does not count
    labelled: int  # tokens that count


def micro_batches_of(config, ranks, windows, step):
    """This rank's micro-batches of a step. Each epoch has the windows in another order."""
    first = step * config.batch_size
    batches = []
    parts = share(first, config.batch_size, ranks.rank, ranks.world_size, config.micro_batch_size)
    for part in parts:
        drawn = []
        for i in part:
            epoch, place = divmod(i, len(windows))
            drawn.append(windows[permute(place, len(windows), config.seed + epoch)])
        batches.append(window_batch(drawn, ranks.device))
    return batches


def window_batch(drawn, device):
    """A `WindowBatch` of [(ids, labels), ...]."""
    ids, labels = zip(*drawn)
    input_ids, cu_seqlens = pack(ids, device)
    labels, _ = pack(labels, device)
    return WindowBatch(input_ids, cu_seqlens, labels, int((labels >= 0).sum()))


def training_loop(config, ranks, setup, run):
    """Trains from the newest checkpoint to the end; returns as `train` does."""
    model = setup.model
    device = ranks.device
    first = run.resume(model, setup.optimizer)
    path = os.path.join(config.out, "metrics.jsonl")
    metrics = Metrics(path, first, ranks, plan.peak_flops(device), terms=("loss",))
    best = Best(path, ranks)

    def example_loss(ddp_model):
        batch = window_batch([setup.windows[0]], device)
        return ddp_model(batch.input_ids, batch.cu_seqlens, batch.labels, seed=0).loss

    ddp_model = wrap_ddp(model, ranks, example_loss)
    announce(config, ranks, setup)

    # A run that had ended before has no step to do.
    ended = best.evaluations_since >= config.patience
    steps = range(config.steps if ended else first, config.steps)
    bar = tqdm(
        total=config.steps, initial=first, unit="step", desc="fine-tuning", disable=not ranks.lead
    )
    done = first
    signals = []
    for step in noting_signals(steps, signals):
        # As in pretraining: the count of the global batch, and whether to stop.
        micro_batches = micro_batches_of(config, ranks, setup.windows, step)
        labelled = sum(batch.labelled for batch in micro_batches)
        labelled, stopping = ranks.sum([labelled, len(signals)])

        # Forward and backward.
        losses = torch.zeros(1, device=device)
        for i, batch in enumerate(micro_batches):
            lengths = batch.cu_seqlens.diff().cpu().numpy()
            metrics.count(len(batch.input_ids), plan.model_flops(model.config, lengths, 0))
            seed = micro_batch_seed(config.seed, step, ranks.rank, i, device)
            with sync_gradients(ddp_model, now=i == len(micro_batches) - 1):
                with setup.autocast():
                    out = ddp_model(batch.input_ids, batch.cu_seqlens, batch.labels, seed=seed)
                    loss = out.loss * (batch.labelled / max(labelled, 1))
                (loss * ranks.world_size).backward()
            losses += loss.detach()

        # The step.
        rate = learning_rate(config, step)
        grad_norm = optimizer_step(model, setup.optimizer, config.max_grad_norm, rate)
        done = step + 1
        metrics.add(done, losses, grad_norm, rate)
        bar.update()

        # What is said, measured and saved.
        evaluating = done == config.steps or done % config.eval_every == 0
        if evaluating or stopping or done % config.log_every == 0:
            bar.set_postfix_str(progress(metrics.flush(), best.f1))
        if evaluating:
            f1 = evaluate(setup, ranks)
            better = best.update(f1["f1"])
            metrics.write({"step": done} | f1)
            if ranks.lead:
                bar.write(describe(done, f1), file=sys.stderr)
                draw_curves(config.out, draw_fine_tuning)
                if better:
                    model.save_pretrained(config.out)
            ended = best.evaluations_since >= config.patience
        ending = stopping or ended or done == config.steps
        if evaluating or stopping:
            run.save(
                done,
                model,
                setup.optimizer,
                setup.tokenizer,
                metrics,
                must_succeed=ending,
                publish=False,
            )
            metrics.start_clock()
        if stopping or ended:
            break
    bar.close()

    if done < config.steps and not ended:
        ranks.say(
            f"Stopped after step {done} of {config.steps}; the same command goes on from there."
        )
        return None
    ranks.say(
        f"Best F1 {best.f1:.3f} on {config.data}/validation.jsonl. The detector is in {config.out} "
        f"(a Hugging Face directory),\nits curves in {config.out}/curves.png."
    )
    return best.f1


class Best:
    """The best F1 of a run, and the evaluations since then, read from its metrics.jsonl."""

    def __init__(self, path, ranks):
        self.f1 = -1.0
        self.evaluations_since = 0
        if ranks.lead:
            with open(path) as f:
                for line in map(json.loads, f):
                    if "f1" in line:
                        self.update(line["f1"])
        figures = [self.f1, self.evaluations_since] if ranks.lead else [0.0, 0.0]
        self.f1, since = ranks.sum(figures)  # the first rank's
        self.evaluations_since = int(since)

    def update(self, f1):
        """Takes an evaluation's F1; returns True if it is the best so far."""
        better = f1 > self.f1
        self.evaluations_since = 0 if better else self.evaluations_since + 1
        self.f1 = max(self.f1, f1)
        return better


def evaluate(setup, ranks):
    """F1 on the validation documents: a dict with "f1", the macro mean, and "f1/CATEGORY"."""
    setup.model.eval()
    detector = Detector(setup.model, setup.tokenizer, threshold=0.0)
    scores = evaluate_detector(detector.find, setup.validation, ranks)
    setup.model.train()
    f1 = {"f1": scores.get("macro", {}).get("f1", 0.0)}
    for category, row in scores.items():
        if category != "macro":
            f1[f"f1/{category}"] = row["f1"]
    return f1


def announce(config, ranks, setup):
    """Prints what is about to be computed."""
    parameters = sum(p.numel() for p in setup.model.parameters())
    longest = setup.model.config.max_position_embeddings
    ranks.say(
        f"{parameters / 1e6:.2f} M parameters; {setup.documents:,} documents, "
        f"{len(setup.windows):,} windows; {config.steps:,} steps of\n"
        f"{config.batch_size} windows of up to {longest} tokens on {ranks.device}"
    )


def progress(line, best):
    """A line of the metrics for the progress bar."""
    text = f"loss {line.get('loss', math.nan):.4f}, {line['tokens_per_second']:,.0f} tokens/s"
    return text if best < 0 else f"{text}, best F1 {best:.3f}"


def describe(step, f1):
    """One line of held-out figures."""
    categories = ", ".join(
        f"{name.removeprefix('f1/')} {value:.3f}" for name, value in f1.items() if name != "f1"
    )
    return f"step {step:6}: F1 {f1['f1']:.3f} ({categories})"
