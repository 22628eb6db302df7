"""Fine-tuning: one loop for every kind of task.

As in train.py: the loss is a mean over the *global* batch, a run that was stopped goes on from its
last checkpoint (on a CPU with the same bits), and torchrun starts it on several GPUs. The run
directory's model is the one that did best on the validation so far.

What it asks of a task stands in task.py.
"""

import functools
import json
import math
import os
import sys
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from common.arguments import check_fields, option
from common.command_line import first_line
from common.ranges import permute, share
from common.signals import noting_signals
from common.weights import local_directory
from corpus.tokenizer import Tokenizer
from finetune.classes import ManyClasses, Number, OneClass
from finetune.export import framed
from finetune.records import read_data
from finetune.search import Search
from finetune.task import Task
from finetune.tokens import Fragments
from starencoder import StarEncoderConfig
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

DEFAULT_ENCODER = "runs/tiny"


@dataclass
class FinetuneConfig:
    """All arguments of a fine-tuning."""

    train: str = option("train.jsonl", "examples, as JSON lines; see finetune/README.md")
    validation: str = option("", "examples to measure on; if none, a tenth of TRAIN.jsonl")
    encoder: str = option(
        DEFAULT_ENCODER, "the pretrained model: a run, any Bert directory, or a name on the hub"
    )
    out: str = option("runs/finetuned", "run directory; an unfinished run there is continued")
    random_weights: bool = option(False, "begin without the encoder's weights, for comparison")
    steps: int = option(1000, "optimizer steps at most")
    batch_size: int = option(64, "examples in a step, over all ranks and micro-batches")
    micro_batch_size: int = option(64, "examples that a rank computes at once, at most")
    learning_rate: float = option(
        0.0, "peak learning rate; 0: 5e-5 for a hidden size of 768, more for a smaller one"
    )
    warmup_steps: int = option(100, "steps of linear warm-up; then a cosine to 0", least=0)
    adam_beta1: float = option(0.9, "AdamW: decay of the first moment")
    adam_beta2: float = option(0.999, "AdamW: decay of the second moment")
    adam_epsilon: float = option(1e-8, "AdamW: added to the denominator")
    weight_decay: float = option(0.01, "AdamW: on matrices, not on biases and LayerNorms")
    max_grad_norm: float = option(1.0, "larger gradients are scaled down to it", least=1e-30)
    temperature: float = option(0.05, "search: by which cosines are divided", least=1e-3)
    eval_every: int = option(200, "steps between evaluations and checkpoints")
    seed: int = option(0, "fixes the new weights, the order of examples and dropout", least=0)
    device: str = option("auto", "auto: cuda if available", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "compute dtype; auto: bfloat16 if the device is fast at it",
        choices=("auto", "bfloat16", "float32"),
    )
    keep_checkpoints: int = option(1, "how many of the newest checkpoints to keep")
    timeout: int = option(600, "seconds before an unresponsive rank ends the run")
    log_every: int = option(10, "steps between writes to metrics.jsonl (one line per step)")
    keep_every = 2**62  # no checkpoint is kept for good; without a type, this is no field

    def __post_init__(self):
        check_fields(self)


# The data may move: it is known by its content.
MACHINE_FIELDS = set(
    "train validation out micro_batch_size device log_every keep_checkpoints timeout".split()
)
TASKS = {
    "label": OneClass,
    "labels": ManyClasses,
    "score": Number,
    "fragments": Fragments,
    "code": Search,
}
LEAST_POSITIONS = 8


def learning_rate(config, step):
    """Linear warm-up, then half a cosine to 0: the rate of step `step` (the first is 0)."""
    rise = (step + 1) / max(config.warmup_steps, 1)
    decay_steps = max(config.steps - config.warmup_steps, 1)
    decayed = min(1.0, max(0.0, (step - config.warmup_steps) / decay_steps))
    return config.learning_rate * min(rise, (1 + math.cos(math.pi * decayed)) / 2)


def usual_learning_rate(hidden_size):
    """5e-5 for the published model, as is usual for BERT; 1.6e-3 for the tiny one, 192 wide.

    The power of 2.5 is the one that joins these two.
    """
    return 5e-5 * (768 / hidden_size) ** 2.5


# ---- setting up ----------------------------------------------------------------------------------


class Setup(NamedTuple):
    """What the loop needs."""

    task: Task
    tokenizer: Tokenizer
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    autocast: object  # makes the context of a forward pass
    sha256: dict  # of the data, see `records.Data`


def set_up(config, ranks, dtype, tasks):
    """Data, model and optimizer. Raises ValueError if they do not fit together."""
    if config.encoder == DEFAULT_ENCODER and not os.path.isdir(DEFAULT_ENCODER):
        raise ValueError(f"{DEFAULT_ENCODER}: no such run; `python train.py` makes it in minutes")
    encoder = local_directory(config.encoder)
    shape = StarEncoderConfig.load(encoder)
    positions = shape.max_position_embeddings
    tokenizer = framed(Tokenizer.from_pretrained(encoder), positions)
    check_encoder(config.encoder, shape, tokenizer)
    if config.batch_size < ranks.world_size:
        raise ValueError(
            f"batch_size {config.batch_size} leaves some of {ranks.world_size} ranks without an "
            "example"
        )

    data = read_data(config.train, config.validation, ranks.say)
    try:
        if data.kind.target not in tasks:
            names = ", ".join(f'"{name}"' for name in tasks)
            raise ValueError(f"lines of {data.kind}, not with {names}")
        make_task = tasks[data.kind.target]
        task = make_task(data, tokenizer, positions, replace(config, dtype=dtype))
    except ValueError as error:
        raise ValueError(f"{config.train}: {error}") from None

    torch.manual_seed(config.seed)  # for the new weights
    if config.random_weights:
        model = task.model_class(replace(shape, **task.overrides))
    else:
        model = task.model_class.from_pretrained(encoder, **task.overrides)
    task.prepare(model.to(ranks.device).train())
    optimizer = make_optimizer(model, config)
    return Setup(task, tokenizer, model, optimizer, autocast_to(dtype, ranks.device), data.sha256)


def check_encoder(name, shape, tokenizer):
    """Raises ValueError for an encoder that cannot be fine-tuned."""
    if tokenizer.vocab_size > shape.vocab_size:
        raise ValueError(f"{name}: its tokenizer has more tokens than its model")
    if shape.max_position_embeddings < LEAST_POSITIONS:
        raise ValueError(
            f"{name}: {shape.max_position_embeddings} positions are too few, {LEAST_POSITIONS} is "
            "the least"
        )


def train(config):
    """Runs, or continues, the fine-tuning that `config` describes.

    Returns the best figure on the validation, or None if a signal stopped it. Raises ValueError for
    arguments, data, an encoder or a run directory that do not fit together.
    """
    ranks = Ranks.start(config.device, config.timeout)
    with ranks.watched():
        return fine_tune(config, ranks)


def fine_tune(config, ranks, tasks=TASKS):
    """The body of `train`, once the ranks have joined.

    tasks: {target of a `records.Kind`: a subclass of `Task`}.
    """
    dtype = dtype_of_run(config, ranks)
    with ranks.together():  # an error on one rank is an error on all
        setup = set_up(config, ranks, dtype, tasks)
    if not config.learning_rate:
        rate = usual_learning_rate(setup.model.config.hidden_size)
        config = replace(config, learning_rate=rate)
    # The encoder's directory may hold another model by now: its weights are in the checkpoint, its
    # tokenizer is not.
    known = setup.sha256 | {"tokenizer_sha256": setup.tokenizer.sha256}
    resolved = asdict(config) | {"dtype": dtype} | known
    with RunDirectory(config, ranks, resolved, MACHINE_FIELDS) as run:
        return training_loop(config, ranks, setup, run)


# ---- the loop ------------------------------------------------------------------------------------


def examples_of(config, count, step):
    """The numbers of the examples of a step, (batch_size,), below `count`.

    Each epoch has them in another order.
    """
    numbers = []
    for i in range(step * config.batch_size, (step + 1) * config.batch_size):
        epoch, place = divmod(i, count)
        numbers.append(permute(place, count, config.seed + epoch))
    return np.array(numbers)


def training_loop(config, ranks, setup, run):
    """Trains from the newest checkpoint to the end; returns as `train` does."""
    task = setup.task
    model = setup.model
    autocast = setup.autocast
    device = ranks.device
    announce(config, ranks, setup)
    baselines = task.baselines(model, autocast, ranks)  # of the encoder as it came
    first = run.resume(model, setup.optimizer)
    path = os.path.join(config.out, "metrics.jsonl")
    metrics = Metrics(path, first, ranks, plan.peak_flops(device), terms=("loss",))
    best = best_before(path, task.measure, ranks)

    def example_loss(ddp_model):
        batch = task.batch([0], device)
        aims = task.compare(model, [batch], [0], [0], 0, autocast, ranks)
        return task.loss(ddp_model, batch, batch.count, 0, aims[0])[0]

    ddp_model = wrap_ddp(model, ranks, example_loss)

    bar = tqdm(
        total=config.steps, initial=first, unit="step", desc="fine-tuning", disable=not ranks.lead
    )
    done = first
    signals = []
    for step in noting_signals(range(first, config.steps), signals):
        # This rank's micro-batches. The sum over the ranks gives the count of the global batch, and
        # carries the stop flag.
        examples = examples_of(config, len(task), step)
        parts = share(0, len(examples), ranks.rank, ranks.world_size, config.micro_batch_size)
        batches = [task.batch(examples[part], device) for part in parts]
        total, stopping = ranks.sum([sum(batch.count for batch in batches), len(signals)])
        seeds = [
            micro_batch_seed(config.seed, step, ranks.rank, i, device) for i in range(len(parts))
        ]

        # Forward and backward.
        aims = task.compare(model, batches, seeds, examples, parts[0].start, autocast, ranks)
        losses = torch.zeros(1, device=device)
        for i, (batch, seed, aim) in enumerate(zip(batches, seeds, aims)):
            metrics.count(len(batch.input_ids), plan.model_flops(model.config, batch.lengths, 0))
            with sync_gradients(ddp_model, now=i == len(batches) - 1):
                with autocast():
                    loss, value = task.loss(ddp_model, batch, total, seed, aim)
                (loss * ranks.world_size).backward()
            losses += value

        # The step.
        rate = learning_rate(config, step)
        grad_norm = optimizer_step(model, setup.optimizer, config.max_grad_norm, rate)
        done = step + 1
        metrics.add(done, losses, grad_norm, rate)
        bar.update()

        # Report, evaluate and save.
        evaluating = done == config.steps or done % config.eval_every == 0
        if evaluating or stopping or done % config.log_every == 0:
            bar.set_postfix_str(progress(metrics.flush(), task.measure, best))
        if evaluating:
            best = evaluate(config, ranks, setup, metrics, done, baselines, best)
        if evaluating or stopping:
            run.save(
                done,
                model,
                setup.optimizer,
                setup.tokenizer,
                metrics,
                must_succeed=stopping or done == config.steps,
                publish=False,
            )
            metrics.start_clock()
        if stopping:
            break
    bar.close()

    if done < config.steps:
        ranks.say(
            f"Stopped after step {done} of {config.steps}; the same command goes on from there."
        )
        return None
    say_result(config, ranks, task.measure, best, baselines)
    return best


def evaluate(config, ranks, setup, metrics, step, baselines, best):
    """Measures, reports, and publishes a model better than `best`. Returns the best figure."""
    task = setup.task
    figures = task.evaluate(setup.model, setup.autocast, ranks)
    metrics.write({"step": step} | figures | baselines)
    if ranks.lead:
        tqdm.write(f"step {step:6}: {described(figures)}", file=sys.stderr)
        draw = functools.partial(draw_fine_tuning, figures, baselines, task.measure)
        draw_curves(config.out, draw)
        if figures[task.measure] > best:
            publish(task, setup.model, config.out)
    return max(best, figures[task.measure])


def publish(task, model, out):
    """Writes the best model so far. Raises OSError, which says what to do, on a full disk."""
    try:
        task.publish(model, out)
    except OSError as error:
        words = f"{out}: the model cannot be written ({first_line(error)}); make room"
        raise OSError(f"{words}, and the same command goes on") from None


def best_before(path, measure, ranks):
    """The best figure of the evaluations in a metrics.jsonl, on all ranks; -inf without one."""
    best = -math.inf
    with ranks.together():
        if ranks.lead:
            with open(path) as f:
                lines = [json.loads(line) for line in f]
            best = max((line[measure] for line in lines if measure in line), default=best)
    return ranks.sum([best if ranks.lead else 0.0])[0]


def announce(config, ranks, setup):
    """Prints what is about to be computed."""
    parameters = sum(p.numel() for p in setup.model.parameters())
    longest = setup.model.config.max_position_embeddings
    ranks.say(
        f"{parameters / 1e6:.2f} M parameters; {len(setup.task):,} examples; {config.steps:,} "
        f"steps of\n{config.batch_size} examples of up to {longest} tokens on {ranks.device}"
    )


def progress(line, measure, best):
    """A line of the metrics for the progress bar."""
    text = f"loss {line.get('loss', math.nan):.4f}, {line['tokens_per_second']:,.0f} tokens/s"
    return text if best == -math.inf else f"{text}, best {described({measure: best})}"


def described(figures):
    """Figures in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in figures.items())


def say_result(config, ranks, measure, best, baselines):
    """Prints how a run ended."""
    measured_on = config.validation or f"a tenth of {config.train}"
    beside = f" (baselines: {described(baselines)})" if baselines else ""
    ranks.say(
        f"Best {described({measure: best})} on {measured_on}{beside}.\n"
        f"The model is in {config.out} (a Hugging Face directory), its curves in "
        f"{config.out}/curves.png."
    )
