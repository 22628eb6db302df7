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
import glob
import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import corpus
import kernels
from data import Batch, CommandLine, PairDataset, Tokenizer, batches, collate, read_json, read_meta, run, share, write_whole
from starencoder import StarEncoderConfig, StarEncoderForPreTraining, fill_mask

# ---- arguments -------------------------------------------------------------------------------------------------------------------

DEFAULT_DATA, DEFAULT_VOCAB_SIZE = "data/python", 4096  # made from the standard library where it is missing


def option(default, help):
    """A field of `TrainConfig` that says what it is, also to `--help`."""
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """All arguments of a run; the defaults are the published StarEncoder's."""

    data: str = option(DEFAULT_DATA, "corpus directory (corpus.py); the default is made where it is missing")
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
    max_length: int = option(1024, "longest sequence in tokens, <cls> and both <sep> included; the model's positions")
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
    dtype: str = option("auto", "of the computation: bfloat16, float32, or auto: bfloat16 where the device multiplies it")
    workers: int = option(1, "background processes that make batches, for each rank; 0: none")
    eval_every: int = option(1000, "steps between evaluations")
    eval_examples: int = option(4096, "held-out pairs of an evaluation, always the same ones")
    save_every: int = option(1000, "steps between checkpoints")
    keep_checkpoints: int = option(2, "the newest to keep")
    log_every: int = option(10, "steps between lines written to metrics.jsonl")

    def __post_init__(self):
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name in ("warmup_steps", "workers", "seed", "learning_rate", "weight_decay") else 1
            if f.type is int and not least <= value < 2**62:
                raise ValueError(f"{f.name} must be at least {least}, got {value}")
            if f.type is float and not 0 <= value < math.inf or f.name == "max_grad_norm" and value == 0:
                raise ValueError(f"{f.name} must be a number from 0 up, got {value}")
        if self.device not in ("auto", "cpu", "cuda") or self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"device must be auto, cpu or cuda and dtype auto, bfloat16 or float32, got {self.device} and {self.dtype}")


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
MACHINE_FIELDS = {"data", "out", "micro_batch_size", "device", "workers", "log_every", "keep_checkpoints", "save_every"}


def parse_arguments(argv=None):
    """The command line as a `TrainConfig`: the preset, and over it each flag that was given."""
    parser = CommandLine(prog="train.py", description="Pretrain a StarEncoder.")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="default: tiny")
    for f in fields(TrainConfig):
        kind = f.type if isinstance(f.type, type) else int
        text = f"{f.metadata['help']} (starencoder: {f.default})"
        parser.add_argument("--" + f.name.replace("_", "-"), type=kind, default=argparse.SUPPRESS, metavar=kind.__name__.upper(), help=text)
    given = vars(parser.parse_args(argv))
    return TrainConfig(**(PRESETS[given.pop("preset")] | given))


# ---- arithmetic of a run ---------------------------------------------------------------------------------------------------------

# Dense bf16 peak in FLOP/s by a part of the device's name, from the vendors' data sheets; the first that fits counts.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12}


def peak_flops(device):
    """Peak bf16 FLOP/s of a torch device, or None where it is not known (no MFU is then shown, rather than a wrong one)."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def model_flops(config, lengths, masked):
    """FLOPs that forward and backward need for sequences of these lengths (an int array) with `masked` tokens to predict.

    6 for each weight of a matrix and token (2 forward, 4 backward), 12 L H for each token's attention in a layer; elementwise work and
    recomputation are not counted.
    """
    H, layers = config.hidden_size, config.num_hidden_layers
    lengths = np.asarray(lengths, np.float64)
    linear = 6 * layers * (4 * H * H + 2 * H * config.intermediate_size) * lengths.sum()
    attention = 12 * layers * H * (lengths**2).sum()
    heads = 6 * (H * config.vocab_size + H * H) * masked + 6 * (H * H + 2 * H) * len(lengths)
    return linear + attention + heads


def learning_rate(config, step):
    """Linear warm-up, then linear decay to 0: the rate of step `step` (the first is 0)."""
    rise = (step + 1) / max(config.warmup_steps, 1)
    fall = (config.steps - step) / max(config.steps - config.warmup_steps, 1)
    return config.learning_rate * min(rise, fall, 1.0)


# ---- ranks -----------------------------------------------------------------------------------------------------------------------


@dataclass
class Ranks:
    """Which process this is among those that torchrun started; alone without it."""

    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")
    control: object = None  # a gloo group: small sums on the CPU, for which no GPU has to be waited for

    @classmethod
    def start(cls, device):
        """Joins the process group where torchrun asks for one. device: auto, cpu or cuda."""
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, and torch sees none; use --device cpu")
        device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        if "RANK" not in os.environ:
            return cls(device=torch.device(device, 0 if device == "cuda" else None))
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.device(device, int(os.environ["LOCAL_RANK"]) if device == "cuda" else None)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", device_id=device if device.type == "cuda" else None)
        return cls(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))

    def sum(self, values):
        """The sum over ranks of a list of numbers, or of a CPU tensor."""
        values = torch.as_tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(values, group=self.control)
        return values.tolist()

    @contextlib.contextmanager
    def together(self):
        """A part of the set-up that fails on all ranks where it fails on one: the first of those raises, the others end in silence."""
        failure = None
        try:
            yield
        except (ValueError, OSError) as error:
            failure = error
        failed = self.sum([float(rank == self.rank and failure is not None) for rank in range(self.world_size)])
        if any(failed):
            raise failure if failed.index(1.0) == self.rank else SystemExit(2)


# ---- evaluation ------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, dataset, examples, micro_batch_size, ranks, autocast=contextlib.nullcontext):
    """Held-out figures on the first `examples` pairs of `dataset`, whose masks are always the same, shared out over the ranks.

    Returns a dict: mlm_loss (nats per masked token), mlm_accuracy, nsp_accuracy, and two baselines: majority_accuracy, of always
    answering the token that is masked most often, and coin_flip, 0.5.
    """
    model.eval()
    V = model.config.vocab_size
    totals, label_counts = torch.zeros(5, dtype=torch.float64), torch.zeros(V, dtype=torch.float64)
    parts = share(0, min(examples, len(dataset)), ranks.rank, ranks.world_size, micro_batch_size)
    for part in tqdm(parts, desc="evaluating", leave=False, disable=ranks.rank != 0):
        batch = Batch(*(t.to(ranks.device) for t in collate([dataset[i] for i in part])))
        with autocast():
            out = model(batch.input_ids, batch.cu_seqlens, masked_positions=batch.masked_positions)
        loss = torch.nn.functional.cross_entropy(out.mlm_logits.float(), batch.labels, reduction="sum")
        mlm_hits = (out.mlm_logits.argmax(-1) == batch.labels).sum()
        nsp_hits = (out.nsp_logits.argmax(-1) == batch.next_sentence_label).sum()
        totals += torch.tensor([loss.item(), mlm_hits.item(), len(batch.labels), nsp_hits.item(), len(batch.next_sentence_label)])
        label_counts += batch.labels.cpu().bincount(minlength=V)
    model.train()
    loss, mlm_hits, masked, nsp_hits, pairs = ranks.sum(totals)
    return {
        "mlm_loss": loss / max(masked, 1),
        "mlm_accuracy": mlm_hits / max(masked, 1),
        "majority_accuracy": max(ranks.sum(label_counts)) / max(masked, 1),
        "nsp_accuracy": nsp_hits / pairs,
        "coin_flip": 0.5,
    }


def show_filled_masks(model, tokenizer, dataset, count=3):
    """Prints `count` lines of held-out code with a word masked, what stood there, and what the model would write."""
    shown, i = 0, 0
    while shown < count and i < len(dataset):
        a = dataset.pair(i)[0].tolist()
        i += 1
        words = [p for p in range(len(a) // 4, len(a)) if tokenizer.decode([a[p]]).strip().isalpha() and len(tokenizer.decode([a[p]])) > 3]
        if not words:
            continue
        p = words[len(words) // 2]
        before, after, truth = tokenizer.decode(a[:p]), tokenizer.decode(a[p + 1 :]), tokenizer.decode([a[p]])
        if "<mask>" in before + after:
            continue
        guesses = fill_mask(model, tokenizer, f"{before}<mask>{after}", top_k=3)[0]
        line = before.split("\n")[-1][-60:] + "<mask>" + after.split("\n")[0][:40]
        print(f"  {line.strip()}\n      was {truth!r}; the model: " + ", ".join(f"{g['token_str']!r} {g['score']:.0%}" for g in guesses))
        shown += 1


def draw_curves(run):
    """Draws RUN/curves.png from RUN/metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with open(os.path.join(run, "metrics.jsonl")) as f:
        lines = [json.loads(line) for line in f]
    train, held_out = [m for m in lines if "loss" in m], [m for m in lines if "mlm_accuracy" in m]
    figure, ((losses, accuracies), (rate, speed)) = plt.subplots(2, 2, figsize=(11, 7), sharex=True)
    steps = [m["step"] for m in train]
    width = max(1, len(train) // 100)  # the curve of single steps is noise: a running mean over 1 % of them
    smooth = lambda name: np.convolve([m[name] for m in train], np.ones(width) / width, "valid")  # noqa: E731
    losses.plot(steps[width - 1 :], smooth("mlm_loss"), label="MLM, training", color="0.2")
    losses.plot(steps[width - 1 :], smooth("nsp_loss"), label="NSP, training", color="0.6")
    losses.plot([m["step"] for m in held_out], [m["mlm_loss"] for m in held_out], "o--", label="MLM, held out", color="0.2")
    losses.set(ylabel="loss (nats)", ylim=(0, None))
    for name, style, label in [
        ("mlm_accuracy", "o-", "MLM"),
        ("majority_accuracy", ":", "most frequent token"),
        ("nsp_accuracy", "s-", "NSP"),
        ("coin_flip", "--", "coin flip"),
    ]:
        accuracies.plot([m["step"] for m in held_out], [m[name] for m in held_out], style, label=label, color="0.3")
    accuracies.set(ylabel="held-out accuracy", ylim=(0, 1))
    rate.plot(steps, [m["learning_rate"] for m in train], label="learning rate", color="0.2")
    rate.set(xlabel="step", ylabel="learning rate")
    norm = rate.twinx()
    norm.plot(steps[width - 1 :], smooth("grad_norm"), label="gradient norm", color="0.6")
    norm.set(ylabel="gradient norm (grey)", ylim=(0, None))
    speed.plot(steps, [m["tokens_per_second"] for m in train], color="0.2")
    speed.set(xlabel="step", ylabel="tokens / s", ylim=(0, None))
    losses.legend()
    accuracies.legend()
    figure.tight_layout()
    figure.savefig(os.path.join(run, "curves.tmp.png"), dpi=100)
    os.replace(os.path.join(run, "curves.tmp.png"), os.path.join(run, "curves.png"))
    plt.close(figure)


# ---- files of a run --------------------------------------------------------------------------------------------------------------


def save_checkpoint(config, model, optimizer, tokenizer, step):
    """Writes the model and checkpoints/STEP.pt, each whole or not at all, and drops the oldest checkpoints.

    The checkpoint comes last: where it exists, all that belongs to its step does.
    """
    path = os.path.join(config.out, "checkpoints", f"{step:08d}.pt")
    try:
        model.save_pretrained(config.out)
        tokenizer.save_pretrained(config.out)
        with open(path + ".tmp", "wb") as f:
            torch.save({"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise OSError(f"{path} cannot be written ({_first_line(error)}); make room, and the same command goes on") from None
    for old in checkpoints(config)[: -config.keep_checkpoints]:
        os.remove(old)


def checkpoints(config):
    """The paths of a run's checkpoints, oldest first."""
    return sorted(glob.glob(os.path.join(glob.escape(config.out), "checkpoints", "*.pt")))


def load_checkpoint(config, device):
    """The newest checkpoint of the run as a dict, or None. Raises ValueError for one that is damaged."""
    paths = checkpoints(config)
    if not paths:
        return None
    try:
        return torch.load(paths[-1], map_location=device, weights_only=True)
    except Exception as error:  # a file cut short shows itself in many ways
        before = f"step {int(os.path.basename(paths[-2])[:-3])}" if len(paths) > 1 else "the beginning"
        raise ValueError(f"{paths[-1]}: damaged ({_first_line(error)}); remove it to go on from {before}") from None


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def open_run(config, resolved):
    """Makes the run directory, or checks that the run in it has the same arguments. Raises ValueError where it has not."""
    path = os.path.join(config.out, "train.json")
    if os.path.exists(path):
        before = read_json(path)
        for name, value in resolved.items():
            if name not in MACHINE_FIELDS and before.get(name) != value:
                raise ValueError(f"{config.out} holds a run with {name} {before.get(name)}, not {value}; choose another --out")
    elif os.path.isdir(config.out) and os.listdir(config.out):
        raise ValueError(f"{config.out} is not empty and holds no run; choose another --out")
    os.makedirs(os.path.join(config.out, "checkpoints"), exist_ok=True)
    write_whole(path, json.dumps(resolved, indent=1))


class Metrics:
    """metrics.jsonl: a line for each step and each evaluation, none missing and none twice, however often the run was stopped.

    Steps wait on the device, and are read, summed over the ranks and written at each `flush`, so that no step waits for a GPU.
    """

    def __init__(self, path, first_step, ranks, peak):
        self.path, self.ranks, self.peak, self.waiting = path, ranks, peak, []
        if ranks.rank == 0:
            kept = []
            if os.path.exists(path):
                with open(path) as f:
                    for line in f:
                        with contextlib.suppress(ValueError):  # a line that was cut short belongs to a step after the checkpoint
                            kept += [line] if json.loads(line)["step"] <= first_step else []
            write_whole(path, "".join(kept))
        self.start_clock()

    def start_clock(self):
        """Called after an evaluation or a checkpoint: their time is not the training's."""
        self.clock, self.tokens, self.flops = time.perf_counter(), 0, 0.0

    def add(self, step, mlm_loss, nsp_loss, grad_norm, learning_rate):
        """A step: this rank's parts of the two losses and the norm as 0-d tensors on the device."""
        self.waiting.append((step, learning_rate, torch.stack([mlm_loss, nsp_loss, grad_norm / self.ranks.world_size])))

    def flush(self):
        """Writes the lines of all waiting steps and returns the last one, on every rank."""
        values = self.ranks.sum(torch.stack([values for *_, values in self.waiting]).double().cpu())  # this waits for the device
        tokens, flops = self.ranks.sum([self.tokens, self.flops])
        elapsed = time.perf_counter() - self.clock
        speed = {"tokens_per_second": round(tokens / elapsed, 1)}
        if self.peak:
            speed["mfu"] = round(flops / elapsed / self.peak / self.ranks.world_size, 4)
        lines = [
            {"step": step, "loss": mlm + nsp, "mlm_loss": mlm, "nsp_loss": nsp, "grad_norm": norm, "learning_rate": rate} | speed
            for (step, rate, _), (mlm, nsp, norm) in zip(self.waiting, values)
        ]
        self.write(*lines)
        self.waiting = []
        self.start_clock()
        return lines[-1]

    def write(self, *lines):
        """Appends lines (dicts) on the first rank."""
        if self.ranks.rank == 0:
            with open(self.path, "a") as f:
                f.writelines(json.dumps(line) + "\n" for line in lines)


# ---- training --------------------------------------------------------------------------------------------------------------------


def loss_on(model, batch, masked, pairs, seed=None):
    """This micro-batch's part of the loss of a global batch with `masked` masked tokens and `pairs` pairs, and its two terms.

    The model's losses are means over the micro-batch; weighted by its share of the counts they add up to the mean over the global batch.
    """
    out = model(batch.input_ids, batch.cu_seqlens, batch.labels, batch.next_sentence_label, batch.masked_positions, seed=seed)
    mlm = out.mlm_loss * (len(batch.labels) / max(masked, 1))
    nsp = out.nsp_loss * (len(batch.next_sentence_label) / pairs)
    return mlm + nsp, mlm.detach(), nsp.detach()


def make_optimizer(model, config):
    """AdamW with decay on matrices only: biases and LayerNorms have one axis, and a decay would pull the latter away from 1."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True)


def until_signal(iterable, stop):
    """Iterates; meanwhile the first SIGTERM or SIGINT (Ctrl-C) puts its number into the list `stop` and does nothing else."""

    def note(number, frame):
        stop.append(number)
        signal.signal(number, before[number])  # a second one does what it always did

    main_thread = threading.current_thread() is threading.main_thread()  # only there may handlers be set
    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)} if main_thread else {}
    try:
        yield from iterable
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config):
    """Runs, or continues, the training that `config` describes; returns the last held-out figures, or None where a signal stopped it.

    Raises ValueError for arguments, a corpus or a run directory that do not fit together.
    """
    ranks = Ranks.start(config.device)
    lead, device = ranks.rank == 0, ranks.device
    say = print if lead else lambda *_: None

    with ranks.together():  # the corpus
        if lead and config.data == DEFAULT_DATA and not os.path.exists(os.path.join(DEFAULT_DATA, "meta.json")):
            say(f"No corpus at {DEFAULT_DATA} yet: making it from the standard library of this Python.")
            say(corpus.summary(corpus.prepare(None, DEFAULT_DATA, vocab_size=config.vocab_size or DEFAULT_VOCAB_SIZE)))
    with ranks.together():  # data, model, optimizer
        meta = read_meta(config.data)
        if config.vocab_size not in (None, meta["vocab_size"]):
            raise ValueError(f"{config.data} has a vocabulary of {meta['vocab_size']}, not {config.vocab_size}; drop --vocab-size")
        if config.batch_size < ranks.world_size:
            raise ValueError(f"batch_size {config.batch_size} leaves some of {ranks.world_size} ranks without a pair")
        train_set = PairDataset(config.data, "train", config.max_length, config.seed)
        held_out = PairDataset(config.data, "validation", config.max_length, seed=0)
        tokenizer = Tokenizer.from_pretrained(config.data)
        dtype = config.dtype
        if dtype == "auto":
            multiplies_bf16 = any(torch.cpu.get_capabilities().get(name) for name in ("avx512_bf16", "amx_bf16"))
            dtype = "bfloat16" if device.type == "cuda" or multiplies_bf16 else "float32"
        autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bfloat16")
        shape = {f.name: getattr(config, f.name) for f in fields(StarEncoderConfig) if hasattr(config, f.name)}
        shape |= {"vocab_size": meta["vocab_size"], "max_position_embeddings": config.max_length, "pad_token_id": tokenizer.pad_id}
        torch.manual_seed(config.seed)  # for the initial weights; nothing after this draws from torch's generators
        model = StarEncoderForPreTraining(StarEncoderConfig(**shape)).to(device)
        optimizer = make_optimizer(model, config)
    with ranks.together():  # where were we?
        if lead:
            corpus_facts = {"tokenizer_sha256": meta["tokenizer_sha256"], "train_tokens": meta["splits"]["train"]["tokens"]}
            open_run(config, asdict(config) | {"vocab_size": meta["vocab_size"], "dtype": dtype} | corpus_facts)
    with ranks.together():
        first, checkpoint = 0, load_checkpoint(config, device)
        if checkpoint is not None:
            model.load_state_dict(checkpoint["model"])
            optimizer.load_state_dict(checkpoint["optimizer"])
            first = checkpoint["step"]
            del checkpoint
    if ranks.sum([first])[0] != first * ranks.world_size:
        raise ValueError(f"rank {ranks.rank} found a checkpoint of step {first}, another rank a different one: all must share {config.out}")
    peak = peak_flops(device)
    metrics = Metrics(os.path.join(config.out, "metrics.jsonl"), first, ranks, peak)
    ddp = model
    if ranks.world_size > 1:
        ids = [device.index] if device.type == "cuda" else None
        ddp = DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True, broadcast_buffers=False)

    parameters, epoch = sum(p.numel() for p in model.parameters()), len(train_set) / config.batch_size
    say(f"{parameters / 1e6:.2f} M parameters; {config.steps:,} steps of {config.batch_size:,} pairs of up to {config.max_length:,} tokens")
    say(f"({epoch:,.1f} steps an epoch), in micro-batches of up to {config.micro_batch_size} pairs on each of {ranks.world_size} rank(s)")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU with {torch.get_num_threads()} threads"
    say(f"{name}, {dtype}, peak {f'{peak:.3g} FLOP/s' if peak else 'unknown'}; kernels: {kernels.backend(model.mlm_bias)}")
    if first:
        say(f"Continuing {config.out} after step {first}.")

    steps, pin = range(first, config.steps), device.type == "cuda"
    source = batches(train_set, steps, config.batch_size, config.micro_batch_size, ranks.rank, ranks.world_size, config.workers, pin)
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=not lead, desc="training")
    model.train()
    figures, done, stop = None, first, []
    for step, micro_batches in until_signal(zip(steps, source), stop):
        # The counts of the whole global batch come first: every micro-batch's loss is divided by them. With them goes the word that a
        # rank was asked to stop, so that all stop after this same step.
        masked, pairs, stopping = ranks.sum(
            [sum(len(b.labels) for b in micro_batches), sum(len(b.next_sentence_label) for b in micro_batches), len(stop)]
        )
        terms = torch.zeros(2, device=device)
        for j, batch in enumerate(micro_batches):
            metrics.tokens += len(batch.input_ids)
            metrics.flops += model_flops(model.config, batch.cu_seqlens.diff().numpy(), len(batch.labels))
            batch = Batch(*(t.to(device, non_blocking=True) for t in batch))
            key = np.random.SeedSequence((config.seed, step, ranks.rank, j)).generate_state(1, np.uint64)[0]
            last = j == len(micro_batches) - 1
            with contextlib.nullcontext() if last or ddp is model else ddp.no_sync():  # gradients meet once a step
                with autocast():
                    loss, *parts = loss_on(ddp, batch, masked, pairs, seed=int(key >> 2))
                (loss * ranks.world_size).backward()  # DDP takes the mean over the ranks; the loss is a sum over them
            terms += torch.stack(parts)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        rate = learning_rate(config, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done = step + 1
        metrics.add(done, *terms, norm, rate)
        bar.update()

        ending = bool(stopping) or done == config.steps
        evaluating, saving = done == config.steps or done % config.eval_every == 0, ending or done % config.save_every == 0
        if evaluating or saving or done % config.log_every == 0:
            line = metrics.flush()
            mfu = f"{line['mfu']:.1%}" if peak else "unknown"
            bar.set_postfix_str(f"loss {line['loss']:.3f}, {line['tokens_per_second']:,.0f} tokens/s, MFU {mfu}")
        if evaluating:
            figures = evaluate(model, held_out, config.eval_examples, config.micro_batch_size, ranks, autocast)
            metrics.write({"step": done} | figures)
            if lead:
                draw_curves(config.out)
                bar.write(f"step {done:6}: held-out {describe(figures)}", file=sys.stderr)
        if saving and lead:
            save_checkpoint(config, model, optimizer, tokenizer, done)
        if evaluating or saving:
            metrics.start_clock()
        if stopping:
            break
    bar.close()
    if done < config.steps:
        say(f"Stopped after step {done} of {config.steps}; the same command goes on from there.")
        return None

    if figures is None:  # the run had ended before
        figures = evaluate(model, held_out, config.eval_examples, config.micro_batch_size, ranks, autocast)
    if lead:
        model.eval()
        print(f"\nHeld out, {min(config.eval_examples, len(held_out)):,} pairs: {describe(figures)}")
        print("Masks filled in held-out code:")
        show_filled_masks(model, tokenizer, held_out)
        print(f"The model is in {config.out} (a Hugging Face directory), its curves in {os.path.join(config.out, 'curves.png')}.")
        print(f'Try: python starencoder.py fill-mask {config.out} "def add(a, b): return a <mask> b"')
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
    run(main)
