"""Pretraining: one loop from a CPU in minutes to 64 GPUs for a day.

    python train.py                                                  the tiny preset, on the standard library of this Python
    torchrun --nproc_per_node 8 train.py --preset starencoder --data DIR --out RUN

Each step takes `batch_size` pairs, wherever they are computed: the ranks hold equal shares, in micro-batches, and the loss is the mean over
the *global* batch: the sum of the MLM losses of all ranks and micro-batches by the count of all their masked tokens, and the same for NSP
over pairs. So a split into ranks and micro-batches changes nothing but the speed.

Everything random is a function of (seed, step): examples and masks by their number, dropout by counter. A run that was stopped at any
moment, and started again by the same command, goes on from its last checkpoint and ends with the bits of one that never was (on a CPU).

A run directory is a Hugging Face model directory, with metrics.jsonl (a line for each step and each evaluation), curves.png, train.json
(the resolved arguments) and checkpoints/ beside it.
"""

import argparse
import contextlib
import functools
import math
import os
import sys
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import kernels
from common.arguments import option
from common.command_line import CommandLine, run_command, warn
from common.signals import until_signal
from corpus.build import prepare
from corpus.report import summary
from corpus.store import read_meta
from corpus.tokenizer import Tokenizer
from data import Batch, PairDataset, batches, collate, share
from starencoder import StarEncoderConfig, StarEncoderForPreTraining, fill_mask
from training.curves import draw_curves, draw_pretraining
from training.metrics import Metrics
from training.plan import describe as describe_plan
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

DEFAULT_DATA, DEFAULT_VOCAB_SIZE = (
    "corpora/python",
    4096,
)  # made from the standard library where it is missing


@dataclass
class TrainConfig:
    """All arguments of a run; the defaults are the published StarEncoder's."""

    data: str = option(
        DEFAULT_DATA, "corpus directory (corpus.py); the default is made where it is missing"
    )
    out: str = option("runs/starencoder", "run directory; an unfinished run there is continued")
    # the model, by the names of BertConfig
    vocab_size: int | None = option(None, "must be the corpus's, if given")
    hidden_size: int = option(768, "H")
    num_hidden_layers: int = option(12, "encoder layers")
    num_attention_heads: int = option(12, "N; hidden_size / N is the size of a head")
    intermediate_size: int = option(3072, "width of the feed-forward layers")
    hidden_dropout_prob: float = option(0.1, "dropout on the embeddings and before each LayerNorm")
    attention_probs_dropout_prob: float = option(0.1, "dropout on the attention weights")
    initializer_range: float = option(0.02, "standard deviation of the initial weights")
    max_length: int = option(
        1024, "longest sequence in tokens, <cls> and both <sep> included; the model's positions"
    )
    # the schedule
    steps: int = option(100_000, "optimizer steps")
    batch_size: int = option(4096, "pairs in a step, over all ranks and micro-batches")
    micro_batch_size: int = option(64, "pairs that a rank computes at once, at most")
    learning_rate: float = option(6e-4, "at its peak")
    warmup_steps: int = option(24_000, "of linear rise; then linear decay to 0 at the last step")
    adam_beta1: float = option(0.9, "AdamW")
    adam_beta2: float = option(0.98, "AdamW")
    adam_epsilon: float = option(1e-6, "AdamW")
    weight_decay: float = option(0.01, "AdamW; not on biases and LayerNorms")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm")
    seed: int = option(0, "fixes initial weights, examples, masks and dropout")
    # the machine, and what is written when
    device: str = option("auto", "cpu or cuda; auto: cuda where there is one")
    dtype: str = option(
        "auto",
        "of the computation: bfloat16, float32, or auto: bfloat16 where the device multiplies it fast",
    )
    compile: bool = option(
        False, "run the steps through torch.compile (a minute to begin with; for GPUs)"
    )
    workers: int = option(1, "background processes that make batches, for each rank; 0: none")
    eval_every: int = option(1000, "steps between evaluations")
    eval_examples: int = option(4096, "held-out pairs of an evaluation, always the same ones")
    save_every: int = option(1000, "steps between checkpoints")
    keep_checkpoints: int = option(2, "the newest to keep")
    keep_every: int = option(10_000, "checkpoints of multiples of this step are kept for good")
    timeout: int = option(600, "seconds after which a rank that does not answer is given up")
    bf16_gradients: bool = option(
        False, "GPUs exchange gradients in bf16: half the traffic, and not the same bits"
    )
    tensorboard: bool = option(
        False, "write RUN/tensorboard as well (needs the tensorboard package)"
    )
    log_every: int = option(10, "steps between lines written to metrics.jsonl")

    def __post_init__(self):
        for f in fields(self):
            value, least = (
                getattr(self, f.name),
                0
                if f.name in ("warmup_steps", "workers", "seed", "learning_rate", "weight_decay")
                else 1,
            )
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


PRESETS = {
    # A CPU, minutes. Without dropout, since no example comes twice; with wider initial weights, since the model is narrower. Short pairs,
    # since a place that is seen more often is learned sooner: at length 128, all else equal, context is found only after twice the time.
    "tiny": dict(
        out="runs/tiny", hidden_size=192, num_hidden_layers=3, num_attention_heads=6, intermediate_size=768, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.05, max_length=64, steps=2600, batch_size=32, micro_batch_size=32,
        learning_rate=1.5e-3, warmup_steps=200, eval_every=650, eval_examples=2048, save_every=650, workers=0,
    ),
    # One GPU, minutes.
    "small": dict(
        out="runs/small", hidden_size=512, num_hidden_layers=8, num_attention_heads=8, intermediate_size=2048, max_length=512, steps=4000,
        batch_size=256, micro_batch_size=256, warmup_steps=400, eval_every=500, save_every=1000, workers=2,
    ),
    # The published run: 400 B tokens.
    "starencoder": dict(),
}  # fmt: skip


# What may differ between the starts of one run: it changes where and how fast it is computed, not what.
MACHINE_FIELDS = set(
    "data out micro_batch_size device compile workers log_every save_every keep_checkpoints keep_every timeout tensorboard".split()
)


def parse_arguments(argv=None):
    """The command line as a `TrainConfig`: the preset, and over it each flag that was given."""
    about = "Pretrain a StarEncoder. In brackets: the values of the starencoder preset; tiny and small change some of them."
    parser = CommandLine(prog="train.py", description=about)
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="default: tiny")
    plan_help = "print what the run would cost on N GPUs of this name (64xA100; without a value: those of this machine), and end"
    parser.add_argument("--plan", metavar="NxGPU", nargs="?", const="", help=plan_help)
    parser.add_argument(
        "--plan-mfu",
        metavar="FLOAT",
        type=float,
        default=0.4,
        help="share of the peak that it assumes (default: 0.4)",
    )
    for f in fields(TrainConfig):
        kind = f.type if isinstance(f.type, type) else int
        how = (
            dict(action=argparse.BooleanOptionalAction)
            if kind is bool
            else dict(type=kind, metavar=kind.__name__.upper())
        )
        text = f"{f.metadata['help']} (starencoder: {f.default})"
        parser.add_argument(
            "--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how
        )
    given = vars(parser.parse_args(argv))
    gpus, mfu = given.pop("plan"), given.pop("plan_mfu")
    config = TrainConfig(**(PRESETS[given.pop("preset")] | given))
    if gpus is not None:
        print(plan_of(config, gpus, mfu))
        raise SystemExit(0)
    return config


def plan_of(config, gpus, mfu):
    """The text of `--plan`: gpus is "64xA100", or "" for the GPUs of this machine. Raises ValueError for what is not known."""
    if not gpus and torch.cuda.is_available():
        gpus = f"{torch.cuda.device_count()}x{torch.cuda.get_device_name()}"
    number, _, name = gpus.partition("x")
    if not number.isdecimal() or not name or not 0 < mfu <= 1:
        raise ValueError(
            "--plan: name the GPUs, as in 64xA100 (there is none here); --plan-mfu lies between 0 and 1"
        )
    vocab_size = config.vocab_size
    if vocab_size is None:
        vocab_size = (
            StarEncoderConfig.vocab_size
            if config.data == DEFAULT_DATA
            else read_meta(config.data)["vocab_size"]
        )
    schedule = (config.steps, config.batch_size, config.micro_batch_size, config.max_length)
    return describe_plan(
        StarEncoderConfig(**model_shape(config, vocab_size)), int(number), name, *schedule, mfu
    )


def model_shape(config, vocab_size):
    """Those fields of a `StarEncoderConfig` that the arguments of a run fix, as a dict."""
    shape = {
        f.name: getattr(config, f.name)
        for f in fields(StarEncoderConfig)
        if hasattr(config, f.name)
    }
    return shape | {"vocab_size": vocab_size, "max_position_embeddings": config.max_length}


def learning_rate(config, step):
    """Linear warm-up, then linear decay to 0: the rate of step `step` (the first is 0)."""
    rise = (step + 1) / max(config.warmup_steps, 1)
    fall = (config.steps - step) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * min(rise, fall, 1.0)


@torch.no_grad()
def evaluate(model, dataset, examples, micro_batch_size, ranks, autocast=contextlib.nullcontext):
    """Held-out figures on the first `examples` pairs of `dataset`, whose masks are always the same, shared out over the ranks.

    Returns a dict: mlm_loss (nats per masked token), mlm_accuracy, nsp_accuracy, and two baselines: majority_accuracy, of always
    answering the token that is masked most often, and coin_flip, 0.5. Where the corpus has several languages, also mlm_accuracy/LANGUAGE
    of each that came up: of the masked tokens in documents of that language.
    """
    model.eval()
    V, languages = model.config.vocab_size, sorted(dataset.languages)
    totals, label_counts = torch.zeros(5, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
    by_language = torch.zeros(
        2, len(languages), dtype=torch.float64
    )  # masked tokens, and those that were right
    parts = share(0, min(examples, len(dataset)), ranks.rank, ranks.world_size, micro_batch_size)
    for part in tqdm(parts, desc="evaluating", leave=False, disable=ranks.rank != 0):
        drawn = [dataset[i] for i in part]
        batch = Batch(*(t.to(ranks.device) for t in collate(drawn)))
        with autocast():
            out = model(batch.input_ids, batch.cu_seqlens, masked_positions=batch.masked_positions)
        loss = torch.nn.functional.cross_entropy(
            out.mlm_logits.float(), batch.labels, reduction="sum"
        )
        hits = out.mlm_logits.argmax(-1) == batch.labels
        mlm_hits = hits.sum()
        nsp_hits = (out.nsp_logits.argmax(-1) == batch.next_sentence_label).sum()
        totals += torch.tensor(
            [
                loss.item(),
                mlm_hits.item(),
                len(batch.labels),
                nsp_hits.item(),
                len(batch.next_sentence_label),
            ]
        )
        label_counts += batch.labels.cpu().bincount(minlength=V)
        if len(languages) > 1:
            spoken = [
                languages.index(name)
                for i, e in zip(part, drawn)
                for name in dataset.languages_of_masks(i, e)
            ]
            spoken = torch.tensor(spoken, dtype=torch.int64)
            by_language += torch.stack(
                [torch.bincount(spoken, w, len(languages)) for w in (None, hits.double().cpu())]
            )
    model.train()
    loss, mlm_hits, masked, nsp_hits, pairs = ranks.sum(totals)
    counts = zip(languages, *ranks.sum(by_language))
    return {
        "mlm_loss": loss / max(masked, 1),
        "mlm_accuracy": mlm_hits / max(masked, 1),
        "majority_accuracy": max(ranks.sum(label_counts)) / max(masked, 1),
        "nsp_accuracy": nsp_hits / pairs,
        "coin_flip": 0.5,
    } | {f"mlm_accuracy/{name}": right / count for name, count, right in counts if count}


def show_filled_masks(model, tokenizer, dataset, count=3):
    """Prints `count` lines of held-out code with a word masked, what stood there, and what the model would write."""
    shown, i = 0, 0
    while shown < count and i < len(dataset):
        a = dataset.pair(i)[0].tolist()
        i += 1
        words = [
            p
            for p in range(len(a) // 4, len(a))
            if tokenizer.decode([a[p]]).strip().isalpha() and len(tokenizer.decode([a[p]])) > 3
        ]
        if not words:
            continue
        p = words[len(words) // 2]
        before, after, truth = (
            tokenizer.decode(a[:p]),
            tokenizer.decode(a[p + 1 :]),
            tokenizer.decode([a[p]]),
        )
        if "<mask>" in before + after:
            continue
        guesses = fill_mask(model, tokenizer, f"{before}<mask>{after}", top_k=3)[0]
        line = before.split("\n")[-1][-60:] + "<mask>" + after.split("\n")[0][:40]
        print(
            f"  {line.strip()}\n      was {truth!r}; the model: "
            + ", ".join(f"{g['token_str']!r} {g['score']:.0%}" for g in guesses)
        )
        shown += 1


def loss_on(model, batch, masked, pairs, seed=None):
    """This micro-batch's part of the loss of a global batch with `masked` masked tokens and `pairs` pairs, and its two terms.

    The model's losses are means over the micro-batch; weighted by its share of the counts they add up to the mean over the global batch.
    """
    out = model(
        batch.input_ids,
        batch.cu_seqlens,
        batch.labels,
        batch.next_sentence_label,
        batch.masked_positions,
        seed=seed,
    )
    mlm = out.mlm_loss * (len(batch.labels) / max(masked, 1))
    nsp = out.nsp_loss * (len(batch.next_sentence_label) / pairs)
    return mlm + nsp, mlm.detach(), nsp.detach()


def train(config):
    """Runs, or continues, the training that `config` describes; returns the last held-out figures, or None where a signal stopped it.

    Raises ValueError for arguments, a corpus or a run directory that do not fit together, and where another process writes
    into the run directory.
    """
    ranks = Ranks.start(config.device, config.timeout)
    with ranks.watched(), contextlib.ExitStack() as held:
        return _train(config, ranks, held)


def _train(config, ranks, held):
    """held: an ExitStack that keeps the lock on the run directory."""
    lead, device = ranks.rank == 0, ranks.device
    say = print if lead else lambda *_: None

    with ranks.together():  # the corpus
        if (
            lead
            and config.data == DEFAULT_DATA
            and not os.path.exists(os.path.join(DEFAULT_DATA, "meta.json"))
        ):
            say(
                f"No corpus at {DEFAULT_DATA} yet: making it from the standard library of this Python."
            )
            say(
                summary(
                    prepare(None, DEFAULT_DATA, vocab_size=config.vocab_size or DEFAULT_VOCAB_SIZE)
                )
            )
    dtype = dtype_of_run(config, ranks)
    with ranks.together():  # data, model, optimizer
        meta = read_meta(config.data)
        if config.vocab_size not in (None, meta["vocab_size"]):
            raise ValueError(
                f"{config.data} has a vocabulary of {meta['vocab_size']}, not {config.vocab_size}; drop --vocab-size"
            )
        if config.batch_size < ranks.world_size:
            raise ValueError(
                f"batch_size {config.batch_size} leaves some of {ranks.world_size} ranks without a pair"
            )
        if config.bf16_gradients and device.type != "cuda":
            raise ValueError("--bf16-gradients: needs GPUs, whose NCCL adds up bf16")
        train_set = PairDataset(config.data, "train", config.max_length, config.seed)
        held_out = PairDataset(config.data, "validation", config.max_length, seed=0)
        tokenizer = Tokenizer.from_pretrained(config.data)
        autocast = functools.partial(
            torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bfloat16"
        )
        torch.manual_seed(
            config.seed
        )  # for the initial weights; nothing after this draws from torch's generators
        shape = model_shape(config, meta["vocab_size"])
        model = StarEncoderForPreTraining(
            StarEncoderConfig(**shape, pad_token_id=tokenizer.pad_id)
        ).to(device)
        optimizer = make_optimizer(model, config)
    with ranks.together():  # where were we?
        if lead:
            corpus_facts = {
                "tokenizer_sha256": meta["tokenizer_sha256"],
                "train_tokens": meta["splits"]["train"]["tokens"],
            }
            resolved = (
                asdict(config) | {"vocab_size": meta["vocab_size"], "dtype": dtype} | corpus_facts
            )
            held.enter_context(open_run(config, resolved, MACHINE_FIELDS))
    with ranks.together():
        path = newest_sound_checkpoint(config) if lead else None
    first = int(ranks.sum([step_of(path) if path else 0])[0])  # the first rank's word
    with ranks.together():
        if first:
            path = os.path.join(config.out, "checkpoints", f"{first:08d}.pt")
            if not os.path.exists(path):
                raise ValueError(
                    f"rank {ranks.rank} does not see {path}: all ranks must share {config.out}"
                )
            load_checkpoint(path, model, optimizer, device)
        tensorboard = None
        if config.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter as tensorboard
            except ImportError:
                raise ValueError(
                    "--tensorboard: needs the tensorboard package (pip install tensorboard)"
                ) from None
    peak = peak_flops(device)
    metrics = Metrics(os.path.join(config.out, "metrics.jsonl"), first, ranks, peak, tensorboard)
    ddp = model
    if ranks.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
        if config.bf16_gradients:
            ddp.register_comm_hook(None, bf16_compress_hook)
        # After its first backward pass DDP sorts its buckets by when gradients came, and from three ranks up
        # gloo then sums in another order. Have that pass here, on one example, and drop its gradient: no step
        # depends on being the first after a start. (find_unused_parameters=True would keep the first buckets,
        # at the price of a walk through the graph in every step.)
        example = Batch(*(t.to(device) for t in collate([train_set[0]])))
        with autocast():
            loss, *_ = loss_on(ddp, example, 1, 1, seed=0)
        loss.backward()
        optimizer.zero_grad(set_to_none=True)
    if config.compile:  # after DDP, so that its buckets stay overlapped; evaluation goes on with `model`, whose shapes vary
        ddp = torch.compile(ddp)

    parameters, epoch = (
        sum(p.numel() for p in model.parameters()),
        len(train_set) / config.batch_size,
    )
    say(
        f"{parameters / 1e6:.2f} M parameters; {config.steps:,} steps of {config.batch_size:,} pairs of up to {config.max_length:,} tokens"
    )
    say(
        f"({epoch:,.1f} steps an epoch), in micro-batches of up to {config.micro_batch_size} pairs on each of {ranks.world_size} rank(s)"
    )
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"CPU with {torch.get_num_threads()} threads"
    )
    say(
        f"{name}, {dtype}, peak {f'{peak:.3g} FLOP/s' if peak else 'unknown'}; kernels: {kernels.backend(model.mlm_bias)}"
    )
    if first:
        say(f"Continuing {config.out} after step {first}.")

    steps, pin = range(first, config.steps), device.type == "cuda"
    source = batches(
        train_set,
        steps,
        config.batch_size,
        config.micro_batch_size,
        ranks.rank,
        ranks.world_size,
        config.workers,
        pin,
    )
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=not lead, desc="training")
    model.train()
    figures, done, stop = None, first, []
    for step, micro_batches in until_signal(zip(steps, source), stop):
        # The counts of the whole global batch come first: every micro-batch's loss is divided by them. With them goes the word that a
        # rank was asked to stop, so that all stop after this same step.
        masked, pairs, stopping = ranks.sum(
            [
                sum(len(b.labels) for b in micro_batches),
                sum(len(b.next_sentence_label) for b in micro_batches),
                len(stop),
            ]
        )
        terms = torch.zeros(2, device=device)
        for j, batch in enumerate(micro_batches):
            metrics.tokens += len(batch.input_ids)
            metrics.flops += model_flops(
                model.config, batch.cu_seqlens.diff().numpy(), len(batch.labels)
            )
            batch = Batch(*(t.to(device, non_blocking=True) for t in batch))
            key = np.random.SeedSequence((config.seed, step, ranks.rank, j)).generate_state(
                1, np.uint64
            )[0]
            alone = ranks.world_size == 1 or j == len(micro_batches) - 1
            with contextlib.nullcontext() if alone else ddp.no_sync():  # gradients meet once a step
                with autocast():
                    seed = torch.full(
                        (), int(key >> 2), dtype=torch.int64, device=device
                    )  # a tensor: an int would be compiled in
                    loss, *parts = loss_on(ddp, batch, masked, pairs, seed=seed)
                (
                    loss * ranks.world_size
                ).backward()  # DDP takes the mean over the ranks; the loss is a sum over them
            terms += torch.stack(parts)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.found_inf = (
            ~norm.isfinite()
        ).float()  # where it is 1, AdamW's kernel leaves out the step, and no CPU has to look
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        metrics.add(done, *terms, norm, rate)
        bar.update()

        ending = bool(stopping) or done == config.steps
        evaluating, saving = (
            done == config.steps or done % config.eval_every == 0,
            ending or done % config.save_every == 0,
        )
        if evaluating or saving or done % config.log_every == 0:
            line = metrics.flush()
            mfu = f"{line['mfu']:.1%}" if peak else "unknown"
            loss = f"{line['loss']:.3f}" if "loss" in line else "not finite"
            bar.set_postfix_str(
                f"loss {loss}, {line['tokens_per_second']:,.0f} tokens/s, MFU {mfu}"
            )
        if evaluating:
            figures = evaluate(
                model, held_out, config.eval_examples, config.micro_batch_size, ranks, autocast
            )
            metrics.write({"step": done} | figures)
            if lead:
                bar.write(f"step {done:6}: held-out {describe(figures)}", file=sys.stderr)
                draw_curves(config.out, draw_pretraining)
        if saving and lead:
            try:
                if metrics.unwritten:  # no checkpoint without the lines of its steps
                    raise OSError(
                        f"no checkpoint of step {done}: {metrics.path} cannot be written; make room, and the same command goes on"
                    )
                save_checkpoint(config, model, optimizer, tokenizer, done)
            except OSError as error:
                if ending:
                    raise
                warn(error)
        if evaluating or saving:
            metrics.start_clock()
        if stopping:
            break
    bar.close()
    if metrics.skipped:
        say(f"{metrics.skipped} of {done} steps were skipped: their gradient was not finite.")
    if done < config.steps:
        say(f"Stopped after step {done} of {config.steps}; the same command goes on from there.")
        return None

    if figures is None:  # the run had ended before
        figures = evaluate(
            model, held_out, config.eval_examples, config.micro_batch_size, ranks, autocast
        )
    if lead:
        model.eval()
        print(
            f"\nHeld out, {min(config.eval_examples, len(held_out)):,} pairs: {describe(figures)}"
        )
        by_language = [
            f"{name.partition('/')[2]} {value:.0%}"
            for name, value in figures.items()
            if "/" in name
        ]
        if by_language:
            print(f"MLM accuracy by language: {', '.join(by_language)}")
        print("Masks filled in held-out code:")
        show_filled_masks(model, tokenizer, held_out)
        print(
            f"The model is in {config.out} (a Hugging Face directory), its curves in {os.path.join(config.out, 'curves.png')}."
        )
        print(
            f'Try: python starencoder.py fill-mask {config.out} "def add(a, b): return a <mask> b"'
        )
    return figures


def describe(figures):
    """One line of held-out figures beside their baselines."""
    return (
        f"MLM loss {figures['mlm_loss']:.3f}, MLM accuracy {figures['mlm_accuracy']:.1%} (most frequent token: "
        f"{figures['majority_accuracy']:.1%}), NSP accuracy {figures['nsp_accuracy']:.1%} (coin flip: {figures['coin_flip']:.0%})"
    )


def main():
    """The command line."""
    try:
        train(parse_arguments())
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_command(main)
