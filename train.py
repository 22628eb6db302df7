"""Pretraining: one loop, from a CPU in minutes to 64 GPUs for a day.

    python train.py              the tiny preset, on the source of this Python's standard library
    torchrun --nproc_per_node 8 train.py --preset starencoder --data DIR --out RUN

Every step trains on `batch_size` pairs, split evenly (to within one) over the ranks; each rank
works through its share in micro-batches. The loss is the mean over this *global* batch: MLM losses
are summed over all ranks and micro-batches and divided by the global count of masked tokens, NSP
losses by the count of pairs. So any split gives the same gradient, up to rounding. Dropout is the
exception: it is seeded per rank and micro-batch, so a different split draws different masks.

No random state is saved. Examples and their masks are seeded by (seed, example number), dropout by
(seed, step, rank, micro-batch). Rerun the same command to resume from the last checkpoint: on a CPU
the result is bit-identical to that of an uninterrupted run.

A run directory is a Hugging Face model directory with train.json (the resolved arguments),
metrics.jsonl, curves.png and checkpoints/ beside the model: see training/run_directory.py.
"""

import contextlib
import math
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from tqdm import tqdm

import corpus
from common.arguments import add_flags, check_fields, option
from common.command_line import CommandLine, run_command
from common.ranges import share
from common.signals import noting_signals
from corpus.report import summary
from corpus.store import INDEX, read_meta
from data import PairDataset, Tokenizer, batches, collate
from starencoder import StarEncoderConfig, StarEncoderForPreTraining
from training import plan, report
from training.curves import draw_curves, draw_pretraining
from training.head_start import give_head_start, words_of
from training.metrics import Metrics
from training.ranks import Ranks
from training.run_directory import RunDirectory
from training.simulate import MACHINE_MTBF
from training.step import (
    MuonAndAdamW,
    autocast_to,
    dtype_of_run,
    make_optimizer,
    micro_batch_seed,
    optimizer_step,
    sync_gradients,
    wrap_ddp,
)

DEFAULT_DATA = "corpora/python"  # made from the standard library if it is missing
DEFAULT_VOCAB_SIZE = 4096  # small, because the softmax dominates the tiny model's cost

# ---- arguments -----------------------------------------------------------------------------------


@dataclass
class TrainConfig:
    """All arguments of a run. Model and schedule default to the published StarEncoder's."""

    data: str = option(DEFAULT_DATA, "corpus directory; the default is made if it is missing")
    out: str = option("runs/starencoder", "run directory; an unfinished run there is continued")
    # The model, by the names of BertConfig.
    vocab_size: int | None = option(None, "the corpus has it; checked if given")
    hidden_size: int = option(768, "width of the hidden states")
    num_hidden_layers: int = option(12, "encoder layers")
    num_attention_heads: int = option(12, "attention heads in each layer")
    intermediate_size: int = option(3072, "width of the feed-forward layers")
    hidden_dropout_prob: float = option(0.1, "dropout on embeddings and before each LayerNorm")
    attention_probs_dropout_prob: float = option(0.1, "dropout on the attention weights")
    initializer_range: float = option(0.02, "standard deviation of the initial weights")
    head_start: str = option(
        "none", "what initial weights know: frequencies+positions+neighbours, a part of it, or none"
    )
    max_length: int = option(1024, "longest sequence in tokens, <cls> and <sep>s included")
    # The schedule.
    steps: int = option(100_000, "optimizer steps")
    batch_size: int = option(4096, "pairs in a step, over all ranks and micro-batches")
    micro_batch_size: int = option(64, "pairs that a rank computes at once, at most")
    masked: float = option(0.15, "share of tokens to predict in training; held out it is 0.15")
    learning_rate: float = option(6e-4, "peak learning rate of AdamW")
    muon_learning_rate: float = option(
        0.0, "peak rate of Muon, which then trains the layers' matrices; 0: AdamW trains all"
    )
    warmup_steps: int = option(24_000, "steps of linear warm-up; then linear decay", least=0)
    adam_beta1: float = option(0.9, "AdamW: decay of the first moment")
    adam_beta2: float = option(0.98, "AdamW: decay of the second moment")
    adam_epsilon: float = option(1e-6, "AdamW: added to the denominator")
    weight_decay: float = option(0.01, "on matrices, not on biases and LayerNorms")
    max_grad_norm: float = option(1.0, "larger gradients are scaled down to it", least=1e-30)
    seed: int = option(0, "fixes initial weights, examples, masks and dropout", least=0)
    # The machine, and what is written when.
    device: str = option("auto", "auto: cuda if available", choices=("auto", "cpu", "cuda"))
    dtype: str = option(
        "auto",
        "compute dtype; auto: bfloat16 if the device is fast at it",
        choices=("auto", "bfloat16", "float32"),
    )
    workers: int = option(1, "batch-making processes per rank (0: none)", least=0)
    eval_every: int = option(1000, "steps between evaluations")
    eval_examples: int = option(4096, "held-out pairs of an evaluation, always the same")
    save_every: int = option(1000, "steps between checkpoints")
    keep_checkpoints: int = option(2, "how many of the newest checkpoints to keep")
    keep_every: int = option(10_000, "never delete checkpoints of multiples of this step")
    timeout: int = option(600, "seconds before an unresponsive rank ends the run")
    log_every: int = option(10, "steps between writes to metrics.jsonl (one line per step)")

    def __post_init__(self):
        check_fields(self)
        words_of(self.head_start)
        if not 0 < self.masked < 1:
            raise ValueError(f"masked must lie between 0 and 1, got {self.masked}")
        if self.muon_learning_rate and not self.learning_rate:
            raise ValueError(
                "muon_learning_rate rises and falls in proportion to learning_rate, which is 0"
            )


# Fields that may change when a run is resumed. They do not affect its result, except that with
# dropout another micro_batch_size draws other masks.
MACHINE_FIELDS = set(
    "data out micro_batch_size device workers timeout "
    "log_every save_every keep_checkpoints keep_every".split()
)

PRESETS = {
    # Minutes on a CPU. What each part of the recipe is worth stands in results/speedrun.md.
    "tiny": dict(
        out="runs/tiny",
        hidden_size=192,  # 2.2 M parameters with a vocabulary of 4,096
        num_hidden_layers=3,
        num_attention_heads=6,  # of size 32
        intermediate_size=768,  # 4 x hidden_size, as in the original
        hidden_dropout_prob=0.0,  # almost no example is seen twice: nothing to overfit
        attention_probs_dropout_prob=0.0,
        head_start="frequencies+positions+neighbours",  # see training/head_start.py
        max_length=64,
        steps=1500,  # 4 minutes on 2 cores with AMX
        batch_size=64,  # a step of 32 would take two thirds of its time
        micro_batch_size=64,
        # Twice as many tokens to learn from in every text. Each has fewer neighbours left, which
        # costs less than it gains.
        masked=0.3,
        learning_rate=3e-3,  # narrow models tolerate a higher rate
        muon_learning_rate=0.01,
        warmup_steps=200,
        eval_every=500,
        eval_examples=2048,
        save_every=500,
        workers=0,  # training already uses all cores
    ),
    # Minutes on one GPU.
    "small": dict(
        out="runs/small",
        hidden_size=512,  # 50 M parameters with the original's vocabulary
        num_hidden_layers=8,
        num_attention_heads=8,  # of size 64, as in the original
        intermediate_size=2048,
        # What makes the tiny model learn fast.
        head_start="frequencies+positions+neighbours",
        masked=0.3,
        learning_rate=1.5e-3,
        muon_learning_rate=0.01,
        max_length=512,
        steps=4000,
        batch_size=128,
        micro_batch_size=128,  # 65,536 tokens at once
        warmup_steps=300,
        eval_every=500,
        save_every=1000,
        workers=4,
    ),
    # The published run (400 B tokens): just the defaults.
    "starencoder": dict(),
}


def parse_arguments(argv=None):
    """The command line as a `TrainConfig`: the preset, overridden by the flags that are given.

    `--plan`, like `--help`, prints something and ends the program.
    """
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
        help="estimate the run's cost on these GPUs (64xA100; default: this machine's) and exit; "
        "with the original's vocabulary unless --data or --vocab-size is given",
    )
    parser.add_argument(
        "--plan-mfu",
        metavar="FLOAT",
        type=float,
        default=0.4,
        help="share of the peak that the plan assumes (default: 0.4)",
    )
    parser.add_argument(
        "--plan-mtbf",
        metavar="HOURS",
        type=float,
        default=MACHINE_MTBF,
        help="mean time between failures of one machine of 8 GPUs that the plan assumes (default: "
        f"{MACHINE_MTBF:,.0f}, from Llama 3, 2024, section 3.3.4)",
    )
    add_flags(parser, TrainConfig, "starencoder")

    # add_flags sets no defaults: of the fields, `given` holds only those that were typed.
    given = vars(parser.parse_args(argv))
    preset = PRESETS[given.pop("preset")]  # what is left in `given` are fields of TrainConfig
    gpus = given.pop("plan")
    mfu = given.pop("plan_mfu")
    mtbf = given.pop("plan_mtbf")
    config = TrainConfig(**(preset | given))
    if gpus is not None:
        print(plan_of(config, gpus, mfu, mtbf, with_corpus="data" in given))
        raise SystemExit(0)
    return config


def plan_of(config, gpus, mfu, mtbf, with_corpus):
    """The text of `--plan`.

    gpus: "64xA100", or "" for this machine's. mfu, mtbf: as for `plan.describe`. with_corpus: read
    config.data as well. Raises ValueError, or OSError if there is no corpus.
    """
    if not gpus:
        if not torch.cuda.is_available():
            raise ValueError("--plan: there is no GPU here; name some, as in 64xA100")
        gpus = f"{torch.cuda.device_count()}x{torch.cuda.get_device_name()}"
    number, _, name = gpus.partition("x")  # 64 and A100
    if not number.isdecimal() or int(number) < 1 or not name:
        raise ValueError(f"--plan: {gpus} names no GPUs; write it as in 64xA100")
    if not 0 < mfu <= 1:
        raise ValueError(f"--plan-mfu must lie between 0 and 1, got {mfu}")

    if not 0 < mtbf < math.inf:
        raise ValueError(f"--plan-mtbf must be a number of hours above 0, got {mtbf}")

    vocab_size = StarEncoderConfig.vocab_size
    planned = None
    if with_corpus:
        meta = read_meta(config.data)
        vocab_size = meta["vocab_size"]
        planned = planned_corpus(config, meta)
    if config.vocab_size is not None:
        vocab_size = config.vocab_size
    return plan.describe(
        model_config(config, vocab_size),
        int(number),
        name,
        config.steps,
        config.batch_size,
        config.micro_batch_size,
        config.max_length,
        mfu,
        config.masked,
        config.save_every,
        mtbf,
        planned,
    )


def planned_corpus(config, meta):
    """The `plan.Corpus` of config.data, whose meta.json is `meta`. Raises ValueError if damaged."""
    train_set = PairDataset(config.data, "train", config.max_length, config.seed)
    splits = meta["splits"].values()
    documents = sum(counts["documents"] for counts in splits)
    tokens = sum(counts["tokens"] for counts in splits)
    token_bytes = np.dtype(meta["dtype"]).itemsize
    return plan.Corpus(
        documents=documents,
        tokens=tokens,
        text=sum(counts["bytes"] for counts in meta["languages"].values()),
        disk=tokens * token_bytes + documents * INDEX.itemsize,
        token_bytes=token_bytes,
        pairs=len(train_set),
    )


def model_config(config, vocab_size, pad_token_id=None):
    """The `StarEncoderConfig` that the arguments of a run describe."""
    return StarEncoderConfig(
        vocab_size=vocab_size,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        max_position_embeddings=config.max_length,
        initializer_range=config.initializer_range,
        pad_token_id=pad_token_id,
    )


# ---- loss and schedule ---------------------------------------------------------------------------


def loss_on(model, batch, total_masked, total_pairs, seed=None):
    """This micro-batch's contribution to the loss of a global batch.

    batch: a `data.Batch`. total_masked, total_pairs: counts of the global batch. The model returns
    means over the micro-batch. Scaling each by (local count / global count) makes the contributions
    of all micro-batches add up to the global mean. Returns the scalar loss, with gradient, and its
    MLM and NSP terms, detached.
    """
    masked_positions, labels = rounded_up(batch)
    out = model(
        batch.input_ids,
        batch.cu_seqlens,
        labels=labels,  # (M,), at the masked positions
        next_sentence_label=batch.next_sentence_label,  # (B,)
        masked_positions=masked_positions,  # (M,)
        seed=seed,
    )
    # A batch of very short sequences may have no masked token at all: then 0, not 0 / 0.
    mlm = out.mlm_loss * (len(batch.labels) / max(total_masked, 1))
    nsp = out.nsp_loss * (len(batch.next_sentence_label) / total_pairs)
    return mlm + nsp, mlm.detach(), nsp.detach()


def rounded_up(batch):
    """The masked positions of a batch and their labels; on a CPU, rounded up to a multiple of 64.

    oneDNN compiles a matrix product for each new shape, and M is another in every batch: that took
    a quarter of the tiny preset's time. The added labels are -100, which the loss leaves out.
    """
    added = -len(batch.labels) % 64
    if batch.labels.is_cuda or added == 0:
        return batch.masked_positions, batch.labels
    positions = F.pad(batch.masked_positions, (0, added))  # token 0, in vain
    return positions, F.pad(batch.labels, (0, added), value=-100)


def learning_rate(config, step):
    """The rate of a step, counted from 0: linear warm-up to the peak, then linear decay."""
    rise = (step + 1) / max(config.warmup_steps, 1)  # the first step is not lost
    fall = (config.steps - step) / max(config.steps - config.warmup_steps, 1)  # nor the last
    return config.learning_rate * min(rise, fall)


# ---- evaluation ----------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, dataset, examples, micro_batch_size, ranks, autocast=contextlib.nullcontext):
    """Scores on the first `examples` pairs of a held-out `dataset`, shared out over the ranks.

    The pairs and their masks are always the same. Returns a dict:

        mlm_loss                nats per masked token
        mlm_accuracy            share of the masked tokens that are predicted right
        majority_accuracy       the same, for always answering the most frequent masked token
        nsp_accuracy            share of the pairs that are classified right
        coin_flip               0.5, its baseline
        mlm_accuracy/LANGUAGE   of masked tokens in documents of each language, if there are several
    """
    model.eval()
    languages = sorted(dataset.languages)
    loss_sum = 0.0  # nats
    mlm_hits = 0  # masked tokens that are predicted right
    masked = 0  # masked tokens
    nsp_hits = 0  # pairs that are classified right
    pairs = 0
    label_counts = torch.zeros(model.config.vocab_size, dtype=torch.float64)  # (V,)
    masked_per_language = torch.zeros(len(languages), dtype=torch.float64)  # (languages,)
    hits_per_language = torch.zeros_like(masked_per_language)

    # This rank's pairs, in micro-batches.
    count = min(examples, len(dataset))
    parts = share(0, count, ranks.rank, ranks.world_size, micro_batch_size)
    for part in tqdm(parts, desc="evaluating", leave=False, disable=not ranks.lead):
        drawn = [dataset[i] for i in part]
        batch = collate(drawn).to(ranks.device)
        with autocast():
            out = model(
                batch.input_ids, batch.cu_seqlens, masked_positions=batch.masked_positions
            )  # logits (M, V) and (B, 2)
        # fp32, since bf16 is too coarse to sum losses in.
        loss = F.cross_entropy(out.mlm_logits.float(), batch.labels, reduction="sum")
        mlm_hit = out.mlm_logits.argmax(-1) == batch.labels  # (M,)
        nsp_hit = out.nsp_logits.argmax(-1) == batch.next_sentence_label  # (B,)

        loss_sum += loss.item()
        mlm_hits += mlm_hit.sum().item()
        masked += len(mlm_hit)
        nsp_hits += nsp_hit.sum().item()
        pairs += len(nsp_hit)
        label_counts += batch.labels.cpu().bincount(minlength=len(label_counts))  # for majority

        # By language: a model may be good at one only.
        if len(languages) > 1:
            ids = []  # the language of each masked token's document
            for i, example in zip(part, drawn):
                names = dataset.languages_of_masks(i, example)
                ids += [languages.index(name) for name in names]
            ids = torch.tensor(ids, dtype=torch.int64)
            hits = mlm_hit.double().cpu()
            masked_per_language += ids.bincount(minlength=len(languages))
            hits_per_language += ids.bincount(hits, minlength=len(languages))
    model.train()

    # Over all ranks.
    sums = ranks.sum([loss_sum, mlm_hits, masked, nsp_hits, pairs])
    loss_sum, mlm_hits, masked, nsp_hits, pairs = sums
    most_frequent = max(ranks.sum(label_counts))
    scores = {
        "mlm_loss": loss_sum / max(masked, 1),
        "mlm_accuracy": mlm_hits / max(masked, 1),
        "majority_accuracy": most_frequent / max(masked, 1),
        "nsp_accuracy": nsp_hits / pairs,
        "coin_flip": 0.5,
    }
    per_language = zip(languages, ranks.sum(masked_per_language), ranks.sum(hits_per_language))
    for name, masked_in_it, hits_in_it in per_language:
        if masked_in_it:  # a language without masked tokens has no score
            scores[f"mlm_accuracy/{name}"] = hits_in_it / masked_in_it
    return scores


# ---- training ------------------------------------------------------------------------------------


def train(config):
    """Runs, or resumes, the training that `config` describes.

    Returns the last held-out scores, or None if a signal stopped it. Raises ValueError if the
    arguments, the corpus and the run directory do not fit together, and if another process writes
    into the run directory.
    """
    ranks = Ranks.start(config.device, config.timeout)
    with ranks.watched():  # a rank that dies ends all others
        return pretrain(config, ranks)


def pretrain(config, ranks):
    """The body of `train`, once the ranks have joined."""
    make_default_corpus(config, ranks)
    dtype = dtype_of_run(config, ranks)
    with ranks.together():  # an error on one rank is an error on all
        setup = set_up(config, ranks, dtype)
    with RunDirectory(config, ranks, setup.resolved, MACHINE_FIELDS) as run:  # locks it
        done, scores = training_loop(config, ranks, setup, run)
    if done < config.steps:
        ranks.say(
            f"Stopped after step {done} of {config.steps}; the same command goes on from there."
        )
        return None
    if ranks.lead:
        report.last_words(config, setup.model, setup.tokenizer, setup.held_out, scores)
    return scores


def make_default_corpus(config, ranks):
    """Makes the default corpus, if it is asked for and missing."""
    with ranks.together():
        missing = not os.path.exists(os.path.join(DEFAULT_DATA, "meta.json"))
        if ranks.lead and config.data == DEFAULT_DATA and missing:
            print(f"No corpus at {DEFAULT_DATA} yet: making it from Python's standard library.")
            vocab_size = config.vocab_size or DEFAULT_VOCAB_SIZE
            print(summary(corpus.prepare(None, DEFAULT_DATA, vocab_size=vocab_size)))


class Setup(NamedTuple):
    """What the loop needs."""

    train_set: PairDataset  # the split "train"
    held_out: PairDataset  # the split "validation"
    tokenizer: Tokenizer  # the corpus's, saved beside the model
    model: StarEncoderForPreTraining  # on the rank's device, in fp32
    optimizer: torch.optim.Optimizer | MuonAndAdamW
    autocast: Callable  # returns the context manager of a forward pass
    resolved: dict  # the arguments with the dtype chosen, and facts about the corpus


def set_up(config, ranks, dtype):
    """Data, model and optimizer. Raises ValueError if they do not fit together."""
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
    train_set = PairDataset(config.data, "train", config.max_length, config.seed, config.masked)
    held_out = PairDataset(config.data, "validation", config.max_length, seed=0)  # for all runs
    tokenizer = Tokenizer.from_pretrained(config.data)

    # Seeds the initial weights. Nothing later draws from torch's generators.
    torch.manual_seed(config.seed)
    shape = model_config(config, vocab_size, tokenizer.pad_id)
    model = StarEncoderForPreTraining(shape)
    give_head_start(model, words_of(config.head_start), train_set)
    model.to(ranks.device)
    optimizer = make_optimizer(model, config, config.muon_learning_rate, dtype)

    # Saved in train.json and compared on resume: a run goes on only with the corpus it began with.
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

    Returns the number of steps done, and the last held-out scores. It is long so that a whole run
    can be followed in one place.
    """
    model = setup.model
    device = ranks.device
    done = run.resume(model, setup.optimizer)  # steps; 0 for a new run
    peak = plan.peak_flops(device)  # FLOP/s; None for an unknown device, which then shows no MFU
    metrics = Metrics(os.path.join(config.out, "metrics.jsonl"), done, ranks, peak)
    steps_per_epoch = len(setup.train_set) / config.batch_size
    report.announce(config, ranks, model, steps_per_epoch, setup.resolved["dtype"], peak)

    # DDP needs one backward pass before the first step: see `wrap_ddp`.
    def example_loss(ddp_model):
        example = collate([setup.train_set[0]]).to(device)
        with setup.autocast():
            loss, _, _ = loss_on(ddp_model, example, total_masked=1, total_pairs=1, seed=0)
        return loss

    # `ddp_model` averages gradients over the ranks; `model` is the bare module.
    ddp_model = wrap_ddp(model, ranks, example_loss)

    def held_out_scores():
        size = config.micro_batch_size
        return evaluate(model, setup.held_out, config.eval_examples, size, ranks, setup.autocast)

    # This rank's micro-batches of each step, made ahead of time if there are workers.
    steps = range(done, config.steps)
    loader = batches(
        setup.train_set,
        steps,
        config.batch_size,
        config.micro_batch_size,
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=config.workers,
        pin_memory=device.type == "cuda",
    )
    bar = tqdm(
        total=config.steps, initial=done, unit="step", desc="training", disable=not ranks.lead
    )
    model.train()
    scores = None  # of the last evaluation
    signals = []  # that asked this rank to stop: only noted, until the loop looks
    for step, micro_batches in noting_signals(zip(steps, loader), signals):
        # The counts of the global batch normalize the loss. The signals ride along in the same
        # all-reduce, so that all ranks stop after the same step.
        masked = sum(len(batch.labels) for batch in micro_batches)
        pairs = sum(len(batch.next_sentence_label) for batch in micro_batches)
        total_masked, total_pairs, signals_anywhere = ranks.sum([masked, pairs, len(signals)])
        stopping = signals_anywhere > 0

        # Forward and backward.
        losses = torch.zeros(2, device=device)  # MLM and NSP, for the metrics
        for i, batch in enumerate(micro_batches):
            lengths = batch.cu_seqlens.diff().numpy()  # (B,), still on the CPU
            flops = plan.model_flops(model.config, lengths, len(batch.labels))
            metrics.count(len(batch.input_ids), flops)
            batch = batch.to(device)  # non-blocking
            seed = micro_batch_seed(config.seed, step, ranks.rank, i, device)
            is_last = i == len(micro_batches) - 1
            with sync_gradients(ddp_model, now=is_last):
                with setup.autocast():
                    loss, mlm, nsp = loss_on(ddp_model, batch, total_masked, total_pairs, seed=seed)
                # DDP averages gradients over the ranks, but the loss is a sum over the ranks.
                (loss * ranks.world_size).backward()
            losses += torch.stack([mlm, nsp])

        # Clip, step, zero the gradient. A gradient that is not finite changes nothing.
        rate = learning_rate(config, step)
        grad_norm = optimizer_step(model, setup.optimizer, config.max_grad_norm, rate)
        done = step + 1
        metrics.add(done, losses, grad_norm, rate)
        bar.update()

        # Log, evaluate, save: a checkpoint promises that metrics.jsonl is complete up to its step.
        finished = done == config.steps
        evaluating = finished or done % config.eval_every == 0
        saving = finished or stopping or done % config.save_every == 0
        if evaluating or saving or done % config.log_every == 0:
            line = metrics.flush()  # waits for the GPU; all ranks must call it
            bar.set_postfix_str(report.progress(line))
        if evaluating:
            scores = held_out_scores()
            metrics.write({"step": done} | scores)
            if ranks.lead:
                bar.write(f"step {done:6}: held-out {report.describe(scores)}", file=sys.stderr)
                draw_curves(config.out, draw_pretraining)
        if saving:
            must = finished or stopping  # there is no later attempt
            run.save(done, model, setup.optimizer, setup.tokenizer, metrics, must_succeed=must)
        if evaluating or saving:
            metrics.start_clock()  # speeds are of training alone
        if stopping:
            break
    bar.close()
    if metrics.skipped:
        ranks.say(f"{metrics.skipped} of {done} steps were skipped: their gradient was not finite.")
    if scores is None and done == config.steps:  # it had finished before
        scores = held_out_scores()
    return done, scores


def main():
    """The command line."""
    try:
        train(parse_arguments())
    finally:
        # Otherwise PyTorch warns at exit.
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
