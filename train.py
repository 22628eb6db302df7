"""Pretraining: one loop, from a CPU in minutes to 64 GPUs for a day.

    python train.py                     the tiny preset, on the standard library of this Python
    torchrun --nproc_per_node 8 train.py --preset starencoder --data DIR --out RUN

Each step takes `batch_size` pairs, wherever they are computed: the ranks hold equal shares, in
micro-batches. The loss is the mean over the *global* batch: the MLM losses of all ranks and
micro-batches are added up and divided by the count of all their masked tokens; NSP likewise, over
pairs. So without dropout any split into ranks and micro-batches gives the same gradient. The masks
of dropout belong to a rank and a micro-batch, so with dropout another split is another draw.

Everything random is a function of (seed, step): examples and masks by their number, dropout by
counter. A run that was stopped at any moment, and started again by the same command, goes on from
its last checkpoint and ends with the same bits as one that was never stopped (on a CPU).

A run directory is a Hugging Face model directory with train.json (the resolved arguments),
metrics.jsonl, curves.png and checkpoints/ beside the model: see training/run_directory.py.
"""

import contextlib
import os
import sys
from dataclasses import asdict, dataclass, fields
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import corpus
from common.arguments import add_flags, check_fields, option
from common.command_line import CommandLine, run_command
from common.ranges import share
from common.signals import until_signal
from corpus.report import summary
from corpus.store import read_meta
from data import PairDataset, Tokenizer, batches, collate
from starencoder import StarEncoderConfig, StarEncoderForPreTraining
from training import plan
from training.curves import draw_curves, draw_pretraining
from training.metrics import Metrics
from training.progress import announce, describe, last_words, progress
from training.ranks import Ranks
from training.run_directory import RunDirectory
from training.step import (
    accumulating,
    autocast_to,
    distribute,
    dtype_of_run,
    make_optimizer,
    micro_batch_seed,
    update,
)

DEFAULT_DATA = "corpora/python"  # made from the standard library if it is missing
DEFAULT_VOCAB_SIZE = 4096  # small: the softmax over it is most of the tiny model's work

# ---- arguments -----------------------------------------------------------------------------------


@dataclass
class TrainConfig:
    """All arguments of a run. The defaults are the published StarEncoder's."""

    data: str = option(DEFAULT_DATA, "corpus directory; the default is made if it is missing")
    out: str = option("runs/starencoder", "run directory; an unfinished run there is continued")
    # The model, by the names of BertConfig.
    vocab_size: int | None = option(None, "must be the corpus's, if given")
    hidden_size: int = option(768, "H")
    num_hidden_layers: int = option(12, "encoder layers")
    num_attention_heads: int = option(12, "N; hidden_size / N is the size of a head")
    intermediate_size: int = option(3072, "width of the feed-forward layers")
    hidden_dropout_prob: float = option(0.1, "dropout on embeddings and before each LayerNorm")
    attention_probs_dropout_prob: float = option(0.1, "dropout on the attention weights")
    initializer_range: float = option(0.02, "standard deviation of the initial weights")
    max_length: int = option(1024, "tokens of the longest sequence, <cls> and <sep>s included")
    # The schedule.
    steps: int = option(100_000, "optimizer steps")
    batch_size: int = option(4096, "pairs in a step, over all ranks and micro-batches")
    micro_batch_size: int = option(64, "pairs that a rank computes at once, at most")
    learning_rate: float = option(6e-4, "at its peak")
    warmup_steps: int = option(24_000, "of linear rise, then linear decay to 0", least=0)
    adam_beta1: float = option(0.9, "AdamW")
    adam_beta2: float = option(0.98, "AdamW")
    adam_epsilon: float = option(1e-6, "AdamW")
    weight_decay: float = option(0.01, "AdamW; not on biases and LayerNorms")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm", least=1e-30)
    seed: int = option(0, "fixes initial weights, examples, masks and dropout", least=0)
    # The machine, and what is written when.
    device: str = option("auto", "auto: cuda if there is one", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "of the computation; auto: bfloat16 if the device is fast at it",
        choices=("auto", "bfloat16", "float32"),
    )
    workers: int = option(1, "processes that make batches, for each rank; 0: none", least=0)
    eval_every: int = option(1000, "steps between evaluations")
    eval_examples: int = option(4096, "held-out pairs of an evaluation, always the same")
    save_every: int = option(1000, "steps between checkpoints")
    keep_checkpoints: int = option(2, "checkpoints to keep, the newest")
    keep_every: int = option(10_000, "keep checkpoints of multiples of this step for good")
    timeout: int = option(600, "seconds after which a rank that does not answer is given up")
    log_every: int = option(10, "steps between writes to metrics.jsonl; each step has a line there")

    def __post_init__(self):
        check_fields(self)


# What may differ between the starts of one run: it changes where and how fast a run is computed.
MACHINE_FIELDS = {
    "data", "out", "micro_batch_size", "device", "workers", "timeout",
    "log_every", "save_every", "keep_checkpoints", "keep_every",
}  # fmt: skip

PRESETS = {
    # Minutes on a CPU.
    "tiny": dict(
        out="runs/tiny",
        hidden_size=192,  # 2.2 M parameters with a vocabulary of 4,096
        num_hidden_layers=3,
        num_attention_heads=6,  # of size 32
        intermediate_size=768,  # 4 H, as in the original
        hidden_dropout_prob=0.0,  # hardly an example comes twice: nothing to overfit
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,  # wider than the original's 0.02, since the model is narrower
        # A position that is seen more often is learned sooner: at length 128, all else equal, the
        # model finds context only after twice the time.
        max_length=64,
        steps=2600,  # 5 minutes on 2 cores
        batch_size=32,
        micro_batch_size=32,
        learning_rate=1.5e-3,  # narrow models bear a higher rate
        warmup_steps=200,
        eval_every=650,
        eval_examples=2048,
        save_every=650,
        workers=0,  # the cores are busy enough
    ),
    # Minutes on one GPU.
    "small": dict(
        out="runs/small",
        hidden_size=512,  # 50 M parameters with the original's vocabulary
        num_hidden_layers=8,
        num_attention_heads=8,  # of size 64, as in the original
        intermediate_size=2048,
        max_length=512,
        steps=4000,
        batch_size=256,
        micro_batch_size=256,  # 131,072 tokens at once
        warmup_steps=400,
        eval_every=500,
        save_every=1000,
        workers=2,
    ),
    # The published run: 400 B tokens, the defaults.
    "starencoder": dict(),
}


def parse_arguments(argv=None):
    """The command line as a `TrainConfig`: the preset, and over it each flag that was given."""
    parser = CommandLine(
        prog="train.py",
        description="Pretrain a StarEncoder. In brackets: the values of the starencoder preset; "
        "tiny and small change some of them.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="default: tiny")
    parser.add_argument(
        "--plan",
        metavar="NxGPU",
        nargs="?",
        const="",
        help="print what the run would cost on such GPUs (64xA100; those of this machine if no "
        "value is given), and end",
    )
    parser.add_argument(
        "--plan-mfu",
        metavar="FLOAT",
        type=float,
        default=0.4,
        help="share of the peak that the plan assumes (default: 0.4)",
    )
    add_flags(parser, TrainConfig, "starencoder")

    # What was given on the command line wins over the preset.
    given = vars(parser.parse_args(argv))
    preset = PRESETS[given.pop("preset")]
    gpus = given.pop("plan")
    mfu = given.pop("plan_mfu")
    config = TrainConfig(**(preset | given))
    if gpus is not None:
        print(plan_of(config, gpus, mfu))
        raise SystemExit(0)
    return config


def plan_of(config, gpus, mfu):
    """The text of `--plan`. gpus: "64xA100", or "" for this machine's. Raises ValueError."""
    # Which GPUs, and how many?
    if not gpus and torch.cuda.is_available():
        gpus = f"{torch.cuda.device_count()}x{torch.cuda.get_device_name()}"
    number, _, name = gpus.partition("x")
    if not number.isdecimal() or not name or not 0 < mfu <= 1:
        raise ValueError(
            "--plan: name the GPUs, as in 64xA100 (there is none here); "
            "--plan-mfu lies between 0 and 1"
        )

    # The vocabulary: as asked for, as the corpus has it, or the original's.
    vocab_size = config.vocab_size or StarEncoderConfig.vocab_size
    if config.vocab_size is None and config.data != DEFAULT_DATA:
        vocab_size = read_meta(config.data)["vocab_size"]
    shape = model_config(config, vocab_size)
    schedule = (config.steps, config.batch_size, config.micro_batch_size, config.max_length)
    return plan.describe(shape, int(number), name, *schedule, mfu)


def model_config(config, vocab_size, **more):
    """The `StarEncoderConfig` that the arguments of a run describe."""
    shared = {f.name for f in fields(StarEncoderConfig)} & {f.name for f in fields(TrainConfig)}
    # The two classes have these fields in common, by name.
    shape = {name: getattr(config, name) for name in shared}
    shape["vocab_size"] = vocab_size
    shape["max_position_embeddings"] = config.max_length
    return StarEncoderConfig(**shape, **more)


# ---- loss and schedule ---------------------------------------------------------------------------


def loss_on(model, batch, masked, pairs, seed=None):
    """A micro-batch's part of the loss of a global batch with `masked` masked tokens and `pairs`.

    The model's losses are means over the micro-batch. Weighted by its share of the counts, those of
    all micro-batches add up to the mean over the global batch. Returns the loss, and its two terms
    without gradient.
    """
    out = model(*batch, seed=seed)  # labels (M,) and (B,), so two losses ()
    mlm = out.mlm_loss * (len(batch.labels) / max(masked, 1))
    nsp = out.nsp_loss * (len(batch.next_sentence_label) / pairs)
    return mlm + nsp, mlm.detach(), nsp.detach()


def learning_rate(config, step):
    """Linear warm-up, then linear decay to 0: the rate of step `step` (the first is 0)."""
    rise = (step + 1) / max(config.warmup_steps, 1)  # not 0 in the first step
    fall = (config.steps - step) / max(config.steps - config.warmup_steps, 1)  # not 0 in the last
    return config.learning_rate * min(rise, fall, 1.0)


# ---- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, dataset, examples, micro_batch_size, ranks, autocast=contextlib.nullcontext):
    """Held-out figures on the first `examples` pairs of `dataset`, whose masks never change.

    Returns a dict: mlm_loss (nats per masked token), mlm_accuracy, nsp_accuracy; and two baselines:
    majority_accuracy, of always answering the token that is masked most often, and coin_flip, 0.5.
    If the corpus has several languages, also mlm_accuracy/LANGUAGE, over the masked tokens in
    documents of that language. The pairs are shared out over the ranks.
    """
    model.eval()  # without dropout
    V = model.config.vocab_size
    languages = sorted(dataset.languages)

    # Sums over all pairs. In fp64, so that they do not depend on how the pairs are split.
    totals = torch.zeros(5, dtype=torch.float64)  # loss, MLM hits, masked, NSP hits, pairs
    label_counts = torch.zeros(V, dtype=torch.float64)
    masked_in = torch.zeros(len(languages), dtype=torch.float64)  # each language
    hits_in = torch.zeros(len(languages), dtype=torch.float64)

    # This rank's share, in micro-batches.
    count = min(examples, len(dataset))  # pairs
    parts = share(0, count, ranks.rank, ranks.world_size, micro_batch_size)
    for part in tqdm(parts, desc="evaluating", leave=False, disable=not ranks.lead):
        drawn = [dataset[i] for i in part]
        batch = collate(drawn).to(ranks.device)
        with autocast():
            out = model(
                batch.input_ids, batch.cu_seqlens, masked_positions=batch.masked_positions
            )  # (M, V) and (B, 2) logits

        # In fp32: a sum of bf16 losses would be rounded away.
        loss = F.cross_entropy(out.mlm_logits.float(), batch.labels, reduction="sum")
        hits = out.mlm_logits.argmax(-1) == batch.labels  # (M,)
        nsp_hits = out.nsp_logits.argmax(-1) == batch.next_sentence_label  # (B,)
        sums = [loss.item(), hits.sum().item(), len(hits), nsp_hits.sum().item(), len(nsp_hits)]
        totals += torch.tensor(sums, dtype=torch.float64)

        # How often each token was masked, for the majority baseline.
        label_counts += batch.labels.cpu().bincount(minlength=V)

        # The language of the document that each masked token is from.
        if len(languages) > 1:
            names = [name for i, e in zip(part, drawn) for name in dataset.languages_of_masks(i, e)]
            language = torch.tensor([languages.index(name) for name in names], dtype=torch.int64)
            masked_in += language.bincount(minlength=len(languages))
            hits_in += language.bincount(hits.double().cpu(), minlength=len(languages))
    model.train()

    # A corpus of tiny documents may have no masked token: 0 then, not 0 / 0.
    loss, mlm_hits, masked, nsp_hits, pairs = ranks.sum(totals)
    figures = {
        "mlm_loss": loss / max(masked, 1),
        "mlm_accuracy": mlm_hits / max(masked, 1),
        "majority_accuracy": max(ranks.sum(label_counts)) / max(masked, 1),
        "nsp_accuracy": nsp_hits / pairs,
        "coin_flip": 0.5,
    }
    for name, masked, hits in zip(languages, ranks.sum(masked_in), ranks.sum(hits_in)):
        if masked:  # it came up
            figures[f"mlm_accuracy/{name}"] = hits / masked
    return figures


# ---- training ------------------------------------------------------------------------------------


def train(config):
    """Runs, or continues, the training that `config` describes.

    Returns the last held-out figures, or None if a signal stopped it. Raises ValueError for
    arguments, a corpus or a run directory that do not fit together, and if another process writes
    into the run directory.
    """
    ranks = Ranks.start(config.device, config.timeout)
    with ranks.watched():
        return pretrain(config, ranks)


def pretrain(config, ranks):
    """`train`, by ranks that have met already."""
    # Set up.
    make_default_corpus(config, ranks)
    dtype = dtype_of_run(config, ranks)
    with ranks.together():
        setup = set_up(config, ranks, dtype)

    # The directory is locked from here on: nobody else may write there.
    with RunDirectory(config, ranks, setup.resolved, MACHINE_FIELDS) as run:
        done, figures = training_loop(config, ranks, setup, run)

        # The last words.
        if done < config.steps:
            ranks.say(
                f"Stopped after step {done} of {config.steps}; the same command goes on from there."
            )
            return None
        if ranks.lead:
            last_words(config, setup.model, setup.tokenizer, setup.held_out, figures)
    return figures


def make_default_corpus(config, ranks):
    """Makes the default corpus on the first rank, if it is asked for and missing."""
    with ranks.together():
        missing = not os.path.exists(os.path.join(DEFAULT_DATA, "meta.json"))
        if ranks.lead and config.data == DEFAULT_DATA and missing:
            print(f"No corpus at {DEFAULT_DATA} yet: making it of this Python's standard library.")
            vocab_size = config.vocab_size or DEFAULT_VOCAB_SIZE
            print(summary(corpus.prepare(None, DEFAULT_DATA, vocab_size=vocab_size)))


class Setup(NamedTuple):
    """What the loop needs."""

    train_set: PairDataset
    held_out: PairDataset
    tokenizer: Tokenizer
    model: StarEncoderForPreTraining
    optimizer: torch.optim.Optimizer
    autocast: object  # makes the context of a forward pass
    resolved: dict  # all arguments, and what they became


def set_up(config, ranks, dtype):
    """Data, model and optimizer. Raises ValueError if they do not fit together."""
    # Do the arguments fit the corpus and the ranks?
    meta = read_meta(config.data)
    vocab_size = meta["vocab_size"]
    if config.vocab_size not in (None, vocab_size):
        raise ValueError(
            f"{config.data} has a vocabulary of {vocab_size}, not {config.vocab_size}; "
            "drop --vocab-size"
        )
    if config.batch_size < ranks.world_size:
        raise ValueError(
            f"batch_size {config.batch_size} leaves some of {ranks.world_size} ranks without a pair"
        )

    train_set = PairDataset(config.data, "train", config.max_length, config.seed)
    held_out = PairDataset(config.data, "validation", config.max_length, seed=0)  # for all runs
    tokenizer = Tokenizer.from_pretrained(config.data)

    # For the initial weights. Nothing after this draws from torch's generators.
    torch.manual_seed(config.seed)
    shape = model_config(config, vocab_size, pad_token_id=tokenizer.pad_id)
    model = StarEncoderForPreTraining(shape).to(ranks.device)
    optimizer = make_optimizer(model, config)

    # A run goes on only with the corpus that it began with.
    resolved = asdict(config) | {
        "vocab_size": vocab_size,
        "dtype": dtype,
        "tokenizer_sha256": meta["tokenizer_sha256"],
        "train_tokens": meta["splits"]["train"]["tokens"],
    }
    autocast = autocast_to(dtype, ranks.device)
    return Setup(train_set, held_out, tokenizer, model, optimizer, autocast, resolved)


def training_loop(config, ranks, setup, run):
    """Trains from the newest checkpoint to the end, or until a signal.

    Returns the number of steps done, and the last held-out figures. Long, since a reader should
    follow a whole run without leaving it.
    """
    model = setup.model
    device = ranks.device
    first = run.resume(model, setup.optimizer)  # the step that was done last, or 0
    peak = plan.peak_flops(device)  # None if unknown: better no MFU than a wrong one
    metrics = Metrics(os.path.join(config.out, "metrics.jsonl"), first, ranks, peak)

    def example_loss(wrapped):
        with setup.autocast():
            return loss_on(wrapped, collate([setup.train_set[0]]).to(device), 1, 1, seed=0)[0]

    # `wrapped` adds up the gradients of all ranks; `model` is this rank's.
    wrapped = distribute(model, ranks, example_loss)
    epoch = len(setup.train_set) / config.batch_size  # steps
    announce(config, ranks, model, epoch, setup.resolved["dtype"], peak)

    def held_out_figures():
        size = config.micro_batch_size
        return evaluate(model, setup.held_out, config.eval_examples, size, ranks, setup.autocast)

    # This rank's micro-batches of each step, made ahead of time by background processes.
    steps = range(first, config.steps)
    source = batches(
        setup.train_set, steps, config.batch_size, config.micro_batch_size,
        ranks.rank, ranks.world_size, config.workers, pin_memory=device.type == "cuda",
    )  # fmt: skip
    bar = tqdm(
        total=config.steps, initial=first, unit="step", desc="training", disable=not ranks.lead
    )
    model.train()
    done = first
    figures = None  # of the last evaluation
    stop = []  # the signal that asked this rank to stop
    for step, micro_batches in until_signal(zip(steps, source), stop):
        # What the whole global batch has to predict: every micro-batch's loss is divided by it.
        # The same all-reduce carries the stop flag, so that all ranks stop after this same step.
        masked = sum(len(batch.labels) for batch in micro_batches)
        pairs = sum(len(batch.next_sentence_label) for batch in micro_batches)
        masked, pairs, stopping = ranks.sum([masked, pairs, len(stop)])

        # Forward and backward.
        losses = torch.zeros(2, device=device)  # MLM and NSP
        for i, batch in enumerate(micro_batches):
            lengths = batch.cu_seqlens.diff().numpy()  # (B,), still on the CPU
            flops = plan.model_flops(model.config, lengths, len(batch.labels))
            metrics.count(len(batch.input_ids), flops)
            batch = batch.to(device)  # without waiting
            seed = micro_batch_seed(config.seed, step, ranks.rank, i, device)
            with accumulating(wrapped, last=i == len(micro_batches) - 1):
                with setup.autocast():
                    loss, mlm_loss, nsp_loss = loss_on(wrapped, batch, masked, pairs, seed=seed)
                # DDP takes the mean over the ranks; the loss is a sum over them.
                (loss * ranks.world_size).backward()
            losses += torch.stack([mlm_loss, nsp_loss])  # for the metrics; read later

        # The step.
        rate = learning_rate(config, step)
        grad_norm = update(model, setup.optimizer, config.max_grad_norm, rate)
        done = step + 1
        metrics.add(done, losses, grad_norm, rate)
        bar.update()

        # What is said, measured and saved.
        # Reading the figures waits for the GPU, so it is not done in every step.
        ending = stopping or done == config.steps
        evaluating = done == config.steps or done % config.eval_every == 0
        saving = ending or done % config.save_every == 0
        if evaluating or saving or done % config.log_every == 0:
            bar.set_postfix_str(progress(metrics.flush()))  # on all ranks: it adds up theirs
        if evaluating:
            figures = held_out_figures()
            metrics.write({"step": done} | figures)
            if ranks.lead:
                bar.write(f"step {done:6}: held-out {describe(figures)}", file=sys.stderr)
                draw_curves(config.out, draw_pretraining)
        if saving:
            run.save(done, model, setup.optimizer, setup.tokenizer, metrics, final=ending)
        if evaluating or saving:
            metrics.start_clock()  # their time is not the training's
        if stopping:
            break
    bar.close()
    if metrics.skipped:
        ranks.say(f"{metrics.skipped} of {done} steps were skipped: their gradient was not finite.")
    if figures is None and done == config.steps:  # the run had ended before
        figures = held_out_figures()
    return done, figures


def main():
    """The command line."""
    try:
        train(parse_arguments())
    finally:
        # Or PyTorch complains at the exit.
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
