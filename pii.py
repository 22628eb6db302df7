"""StarPII: the encoder, fine-tuned to find personal data and secrets in code, and what it takes to remove them.

    python pii.py train                         the tiny run and synthetic data, both made if missing: a small detector in minutes
    python pii.py detect PATH... [--rules]      a table of what was found, or --json lines; --fail for CI
    python pii.py redact PATH... --out DIR      copies with <NAME>, <EMAIL>, ... in its place; or --in-place
    python pii.py eval DATA.jsonl [--peers]     precision, recall and F1, beside other detectors
    python pii.py synthesize [SOURCE...] --out DIR

A linear layer on each token says whether it begins (B-), continues (I-) or is outside (O) of an entity of one of six categories: here it is
trained and measured, `pii_detector.py` finds and redacts with it, `pii_data.py` makes labelled data, `pii_eval.py` knows other detectors.

References: Li et al., StarCoder, 2023, section 4. Hyperparameters: the StarPII model card.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import signal
import sys
from collections import Counter
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import plan
import train as pretraining
from data import CommandLine, Tokenizer, permute, run, share
from pii_data import CATEGORIES, synthesize
from pii_detector import LABELS, RULE_CATEGORIES, Detector, pack, redact, redacted, scan, windows
from ranks import Ranks
from run_directory import Metrics, draw_curves, load_checkpoint, newest_sound_checkpoint, open_run, save_checkpoint, step_of
from starencoder import StarEncoderConfig, StarEncoderForTokenClassification
from train import dtype_of_run, make_optimizer, option, until_signal

# Categories of the annotated set that are no category here. They neither teach nor count.
IGNORED = set("EMAIL_EXAMPLE NAME_EXAMPLE USERNAME_EXAMPLE KEY_EXAMPLE PASSWORD_EXAMPLE IP_EXAMPLE AMBIGUOUS ID SSH_KEY".split())


# ---- labelled documents ----------------------------------------------------------------------------------------------------------


def read_labelled(path, skipped=None):
    """[(text, [(start, end, category), ...]), ...] of a file of JSON lines with `text` and `fragments`, sorted by their start.

    skipped: a Counter for fragments that are left out: out of range, not what their `value` says, overlapping one before.
    Raises ValueError that names the line for what is not such a document, and for a category that is neither known nor to be ignored.
    """
    skipped, documents = Counter() if skipped is None else skipped, []
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                record = json.loads(line)
                text, spans = record["text"], []
                text.encode()  # half a surrogate pair is no text
                fragments = [(*fragment["position"], fragment["category"], fragment.get("value")) for fragment in record["fragments"]]
                if not all(list(map(type, fragment[:-1])) == [int, int, str] for fragment in fragments):
                    raise TypeError
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                raise ValueError(f'{path}:{number}: not a line of {{"text", "fragments": [{{"category", "position"}}, ...]}}') from None
            for start, end, category, value in sorted(fragments, key=lambda fragment: fragment[:2]):
                if category not in CATEGORIES and category not in IGNORED:
                    raise ValueError(f"{path}:{number}: unknown category {category!r}; known: {', '.join(CATEGORIES)}")
                if not 0 <= start < end <= len(text) or value is not None and text[start:end] != value:
                    skipped["fragments that do not fit their text"] += 1
                elif spans and start < spans[-1][1]:
                    skipped["fragments that overlap another"] += 1
                else:
                    spans.append((start, end, category))
            documents.append((text, spans))
    if not documents:
        raise ValueError(f"{path}: empty")
    return documents


def labels_of(offsets, spans):
    """(tokens,) int64: the label of each token, -100 where a category is ignored. offsets: (tokens, 2); spans: sorted, without overlaps."""
    labels = np.zeros(len(offsets), np.int64)
    for start, end, category in spans:
        inside = np.flatnonzero((offsets[:, 0] < end) & (offsets[:, 1] > start))
        if category in IGNORED:
            labels[inside] = -100
        elif len(inside):
            labels[inside] = LABELS.index(f"I-{category}")
            labels[inside[0]] = LABELS.index(f"B-{category}")
    return labels


class Windows:
    """The windows of labelled documents, as `[i] -> (ids, labels)`: int64 arrays with <cls> and <sep>, which have no label."""

    def __init__(self, documents, tokenizer, max_length):
        self.documents, self.places, room = [], [], max_length - 2
        for text, spans in tqdm(documents, desc="tokenizing", unit=" documents", leave=False, disable=len(documents) < 1000):
            ids, offsets = np.array(tokenizer.encode(text), np.int32), np.array(tokenizer.offsets(text), np.int64).reshape(-1, 2)
            self.places += [(len(self.documents), start, end) for start, end, _, _ in windows(len(ids), room) if end > start]
            self.documents.append((ids, labels_of(offsets, spans).astype(np.int16)))
        self.cls_id, self.sep_id = tokenizer.cls_id, tokenizer.sep_id

    def __len__(self):
        return len(self.places)

    def __getitem__(self, i):
        d, start, end = self.places[i]
        ids, labels = (array[start:end].astype(np.int64) for array in self.documents[d])
        return np.concatenate([[self.cls_id], ids, [self.sep_id]]), np.concatenate([[-100], labels, [-100]])


# ---- evaluation ------------------------------------------------------------------------------------------------------------------


def count_spans(expected, found, text=None):
    """{category: [right, found, expected, overlapped, overlapping]} of two lists of (start, end, category), counted as seqeval does.

    An entity is right where start, end and category are. overlapped: of the expected, those that one found of their category touches;
    overlapping: of the found, those that touch one expected. Found ones that touch an ignored one do not count.
    """
    ignored = [(s, e) for s, e, category in expected if category in IGNORED]
    found = [f for f in found if not any(s < f[1] and e > f[0] for s, e in ignored)]
    counts = {}
    for category in CATEGORIES:
        want, have = ({(s, e) for s, e, c in spans if c == category} for spans in (expected, found))
        touch = lambda a, others: any(s < a[1] and e > a[0] for s, e in others)
        counts[category] = np.array(
            [len(want & have), len(have), len(want), sum(touch(w, have) for w in want), sum(touch(h, want) for h in have)]
        )
    return counts


def scores(counts):
    """{category: {precision, recall, f1, overlap_..., support}} of summed counts, and "macro", their mean.

    A category that is neither there nor found has no score, and is not in the mean.
    """
    table = {}
    ratio = lambda a, b: float(a / b) if b else 0.0
    for category, (right, found, expected, overlapped, overlapping) in counts.items():
        if not found and not expected:
            continue
        row = {"precision": ratio(right, found), "recall": ratio(right, expected)}
        row |= {"overlap_precision": ratio(overlapping, found), "overlap_recall": ratio(overlapped, expected), "support": int(expected)}
        for way in ("", "overlap_"):
            p, r = row[f"{way}precision"], row[f"{way}recall"]
            row[f"{way}f1"] = ratio(2 * p * r, p + r)
        table[category] = row
    if table:
        table["macro"] = {key: float(np.mean([row[key] for row in table.values()])) for key in next(iter(table.values()))}
        table["macro"]["support"] = sum(row["support"] for name, row in table.items() if name != "macro")
    return table


def evaluate(find, documents, ranks=None, at_once=64, description="evaluating"):
    """The `scores` of a function from texts to lists of entities, on documents as `read_labelled` gives them, shared out over the ranks."""
    ranks = ranks or Ranks()
    counts = {category: np.zeros(5) for category in CATEGORIES}
    mine = documents[ranks.rank :: ranks.world_size]
    for i in tqdm(range(0, len(mine), at_once), desc=description, leave=False, disable=ranks.rank != 0):
        part = mine[i : i + at_once]
        for (_, expected), found in zip(part, find([text for text, _ in part])):
            for category, n in count_spans(expected, [tuple(e[:3]) for e in found]).items():
                counts[category] += n
    totals = np.array(ranks.sum(np.stack([counts[c] for c in CATEGORIES])))
    return scores(dict(zip(CATEGORIES, totals)))


# ---- training --------------------------------------------------------------------------------------------------------------------

DEFAULT_ENCODER, DEFAULT_DATA = "runs/tiny", "data/pii"  # made where they are missing


@dataclass
class PIIConfig:
    """All arguments of a fine-tuning; the defaults are the published StarPII's."""

    encoder: str = option("bigcode/starencoder", "the pretrained model: a run directory, or any Bert directory of transformers")
    data: str = option(DEFAULT_DATA, "directory with train.jsonl and validation.jsonl; the default is synthesized where it is missing")
    out: str = option("runs/starpii", "run directory; an unfinished run there is continued")
    random_weights: bool = option(False, "begin from the encoder's shape without its weights: what pretraining is worth")
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
    dtype: str = option("auto", "of the computation: bfloat16, float32, or auto: bfloat16 where the device multiplies it fast")
    keep_checkpoints: int = option(1, "the newest to keep")
    timeout: int = option(600, "seconds after which a rank that does not answer is given up")
    log_every: int = option(10, "steps between lines written to metrics.jsonl")
    keep_every = 2**62  # none for good

    def __post_init__(self):
        for f in fields(self):
            value, least = getattr(self, f.name), 0 if f.name in ("warmup_steps", "seed") else 1
            if f.type is int and not least <= value < 2**62:
                raise ValueError(f"{f.name} must be at least {least}, got {value}")
            if f.type is float and not 0 <= value < math.inf or f.name == "max_grad_norm" and value == 0:
                raise ValueError(f"{f.name} must be a number from 0 up, got {value}")
        if self.device not in ("auto", "cpu", "cuda") or self.dtype not in ("auto", "bfloat16", "float32"):
            raise ValueError(f"device must be auto, cpu or cuda and dtype auto, bfloat16 or float32, got {self.device} and {self.dtype}")


PRESETS = {
    # The tiny encoder on a CPU, minutes: narrower, so with a higher rate.
    "tiny": dict(encoder=DEFAULT_ENCODER, out="runs/pii", steps=900, learning_rate=2e-3, eval_every=450),
    "starpii": dict(),
}
MACHINE_FIELDS = set("out micro_batch_size device log_every keep_checkpoints timeout".split())


def learning_rate(config, step):
    """Linear warm-up, then half a cosine to 0: the rate of step `step` (the first is 0)."""
    rise = (step + 1) / max(config.warmup_steps, 1)
    rest = min(1.0, max(0.0, (step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1)))
    return config.learning_rate * min(rise, (1 + math.cos(math.pi * rest)) / 2)


def train(config):
    """Runs, or continues, the fine-tuning that `config` describes; returns the best validation scores, or None where a signal stopped it.

    Raises ValueError for arguments, data, an encoder or a run directory that do not fit together.
    """
    ranks = Ranks.start(config.device, config.timeout)
    with ranks.watched(), contextlib.ExitStack() as held:
        return _train(config, ranks, held)


def _train(config, ranks, held):
    lead, device = ranks.rank == 0, ranks.device
    say = print if lead else lambda *_: None
    if config.encoder == DEFAULT_ENCODER and not os.path.exists(os.path.join(DEFAULT_ENCODER, "model.safetensors")):
        say(f"No encoder at {DEFAULT_ENCODER} yet: pretraining it first.")
        if pretraining._train(pretraining.TrainConfig(**pretraining.PRESETS["tiny"]), ranks, held) is None:
            return None
    with ranks.together():
        tokenizer, skipped = Tokenizer.from_pretrained(config.encoder), Counter()
    with ranks.together():
        if lead and config.data == DEFAULT_DATA and not os.path.exists(os.path.join(DEFAULT_DATA, "train.jsonl")):
            say(f"No data at {DEFAULT_DATA} yet: synthesizing it from the standard library of this Python.")
            synthesize([], DEFAULT_DATA)
    with ranks.together():
        labelled = {split: read_labelled(os.path.join(config.data, f"{split}.jsonl"), skipped) for split in ("train", "validation")}
        for reason, n in skipped.items():
            say(f"left out: {n:,} {reason}")
        torch.manual_seed(config.seed)  # for the new weights
        id2label = dict(enumerate(LABELS))
        if config.random_weights:
            shape = StarEncoderConfig.load(config.encoder)
            model = StarEncoderForTokenClassification(StarEncoderConfig(**asdict(shape) | {"id2label": id2label}))
        else:
            model = StarEncoderForTokenClassification.from_pretrained(config.encoder, id2label=id2label)
        model.to(device).train()
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{config.encoder}: its tokenizer has more tokens than its model")
        train_set = Windows(labelled["train"], tokenizer, model.config.max_position_embeddings)
        if not len(train_set):
            raise ValueError(f"{config.data}: no text in its train.jsonl")
        if config.batch_size < ranks.world_size:
            raise ValueError(f"batch_size {config.batch_size} leaves some of {ranks.world_size} ranks without a window")
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
    metrics = Metrics(os.path.join(config.out, "metrics.jsonl"), first, ranks, plan.peak_flops(device), terms=("loss",))
    best, since = best_so_far(metrics.path, ranks)
    ddp = model
    if ranks.world_size > 1:
        ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
        (ids, cu_seqlens), (labels, _) = [pack([array], device) for array in train_set[0]]
        ddp(ids, cu_seqlens, labels, seed=0).loss.backward()  # DDP sorts its buckets after this one: see train.py
        optimizer.zero_grad(set_to_none=True)
    parameters = sum(p.numel() for p in model.parameters())
    say(f"{parameters / 1e6:.2f} M parameters; {len(labelled['train']):,} documents, {len(train_set):,} windows; {config.steps:,} steps of")
    say(f"{config.batch_size} windows of up to {model.config.max_position_embeddings} tokens on {device}, {dtype}")
    if first:
        say(f"Continuing {config.out} after step {first}.")

    autocast = functools.partial(torch.autocast, device.type, torch.bfloat16, enabled=dtype == "bfloat16")
    bar = tqdm(total=config.steps, initial=first, unit="step", disable=not lead, desc="fine-tuning")
    done, stop, ended = first, [], since >= config.patience
    for step in until_signal(range(config.steps if ended else first, config.steps), stop):
        parts = []
        for part in share(step * config.batch_size, config.batch_size, ranks.rank, ranks.world_size, config.micro_batch_size):
            drawn = [train_set[permute(i % len(train_set), len(train_set), config.seed + i // len(train_set))] for i in part]
            parts.append([pack(arrays, device) for arrays in zip(*drawn)])
        labelled_tokens = [int((labels >= 0).sum()) for _, (labels, _) in parts]
        total, stopping = ranks.sum([sum(labelled_tokens), len(stop)])
        loss_sum = torch.zeros(1, device=device)
        for j, ((ids, cu_seqlens), (labels, _)) in enumerate(parts):
            metrics.tokens += len(ids)
            metrics.flops += plan.model_flops(model.config, cu_seqlens.diff().cpu().numpy(), 0)
            key = np.random.SeedSequence((config.seed, step, ranks.rank, j)).generate_state(1, np.uint64)[0]
            alone = ranks.world_size == 1 or j == len(parts) - 1
            with contextlib.nullcontext() if alone else ddp.no_sync():
                with autocast():
                    out = ddp(ids, cu_seqlens, labels, seed=torch.full((), int(key >> 2), dtype=torch.int64, device=device))
                    loss = out.loss * (labelled_tokens[j] / max(total, 1))  # the mean over the labelled tokens of the global batch
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
            bar.set_postfix_str(f"loss {line.get('loss', math.nan):.4f}, {line['tokens_per_second']:,.0f} tokens/s{so_far}")
        if evaluating:
            model.eval()
            figures = evaluate(Detector(model, tokenizer, threshold=0.0).find, labelled["validation"], ranks)
            model.train()
            f1 = figures.get("macro", {}).get("f1", 0.0)
            by_category = {f"f1/{name}": row["f1"] for name, row in figures.items() if name != "macro"}
            better, since = f1 > best, 0 if f1 > best else since + 1
            best = max(best, f1)
            metrics.write({"step": done, "f1": f1} | by_category)
            if lead:
                words = ", ".join(f"{name.partition('/')[2]} {value:.3f}" for name, value in by_category.items())
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
    say(f"Best F1 {best:.3f} on {config.data}/validation.jsonl. The detector is in {config.out} (a Hugging Face directory),")
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


def draw_fine_tuning(figure, train, lines):
    """The curves of a fine-tuning, for `draw_curves`: the loss of each step, and the F1 of each category in the validation documents."""
    held_out = [m for m in lines if "f1" in m]
    figure.set_size_inches(11, 4)
    losses, figures = figure.subplots(1, 2)
    losses.semilogy([m["step"] for m in train], [m["loss"] for m in train], color="0.5", linewidth=0.8)
    losses.set(xlabel="step", ylabel="loss (nats)")
    for name, marker in zip(("f1", *(f"f1/{category}" for category in CATEGORIES)), "osv^Dx+"):
        points = [(m["step"], m[name]) for m in held_out if name in m]
        style = dict(color="0", linewidth=2) if name == "f1" else dict(color="0.5", linewidth=0.8)
        figures.plot(*zip(*points), marker=marker, label=name[3:] or "macro", **style)
    figures.set(xlabel="step", ylabel="F1, validation", ylim=(0, 1))
    figures.legend()


# ---- programs --------------------------------------------------------------------------------------------------------------------

# Nobody's data: what the detector is shown on after training. Put together from halves, so that no scanner of this file complains.
SAMPLE = f'''"""Nightly backup of the orders.

Author: Katarzyna Nowak <k.nowak{"@"}posteo.de>, with help of Jean-Luc Moreau
"""

import os

VERSION = "2.14.0.1"
HOST, USER, PASSWORD = "{"81.169"}.145.92", "knowak84", "{"Tr0ub"}4dor&3!"
API_KEY = "{"AKIA"}QJ7ZP2XKM4RTVW3N"
CHECKSUM = "9e107d9d372bb6826bd81d3542a419d6"


def connect(password=os.environ["DB_PASSWORD"]):
    # TODO(jlmoreau): the old server was 127.0.0.1
    return f"postgres://{{USER}}:{{password}}@{{HOST}}/orders"
'''


def shown(value, show=False):
    """What is printed of a finding: its first two characters."""
    value = value.replace("\n", "\\n")
    return value if show else value[:2] + "…"


def show_at_work(detector):
    """Prints SAMPLE before and after."""
    (entities,) = detector.find([SAMPLE])
    print(f"\nBefore:\n\n{SAMPLE}\nFound:\n")
    for e in entities:
        line = SAMPLE.count("\n", 0, e.start) + 1
        print(f"  line {line:2}  {e.category:11} {e.score:4.0%}  {SAMPLE[e.start : e.end]}")
    print(f"\nAfter:\n\n{redacted(SAMPLE, entities, {})}")


def parse_arguments(argv=None):
    """The command line as (command, arguments)."""
    parser = CommandLine(prog="pii.py", description="Find and redact personal data and secrets in code.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    about = "Fine-tune an encoder. In brackets: the values of the starpii preset; tiny changes some of them."
    fine_tune = commands.add_parser("train", help="fine-tune an encoder", description=about)
    fine_tune.add_argument("--preset", choices=PRESETS, default="tiny", help="default: tiny")
    for f in fields(PIIConfig):
        how = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar=f.type.__name__.upper())
        text = f"{f.metadata['help']} (starpii: {f.default})".replace("%", "%%")
        fine_tune.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how)

    synthetic = commands.add_parser("synthesize", help="make labelled data from source files")
    synthetic.add_argument("sources", nargs="*", metavar="SOURCE", help="as for corpus.py (default: the standard library of this Python)")
    synthetic.add_argument("--out", required=True, metavar="DIR", help="the directory to write")
    synthetic.add_argument("--count", type=int, default=16_000, metavar="N", help="documents (default: 16000)")
    synthetic.add_argument("--seed", type=int, default=0, metavar="N", help="fixes what is drawn (default: 0)")

    for name, help in (("detect", "show what is found"), ("redact", "replace what is found"), ("eval", "measure how well it is found")):
        command = commands.add_parser(name, help=help)
        if name == "eval":
            command.add_argument(
                "paths", metavar="DATA", help="labelled documents, JSON lines; or a clone of CredSweeper or detect-secrets"
            )
        else:
            text = "files, and directories with all that is in them except .git, venv, node_modules and the like"
            command.add_argument("paths", nargs="+", metavar="PATH", help=text)
        command.add_argument("--model", default="runs/pii", metavar="RUN", help="the fine-tuned model (default: runs/pii)")
        if name != "eval":  # which measures both ways
            command.add_argument("--rules", action="store_true", help="join the model with rules for addresses and known formats of keys")
        command.add_argument("--rules-only", action="store_true", help="the rules without the model")
        command.add_argument("--threshold", type=float, default=0.5, metavar="P", help="least score of what the model finds (default: 0.5)")
        command.set_defaults(categories=",".join(CATEGORIES))
        if name != "eval":
            command.add_argument("--categories", metavar="A,B", help="only these (default: all six)")
        command.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda where there is one")
        if name == "detect":
            command.add_argument("--json", action="store_true", help="print a line of JSON for each thing found")
            command.add_argument("--show", action="store_true", help="print what was found, not only its first two characters")
            command.add_argument("--fail", action="store_true", help="exit with status 1 where something is found")
        if name == "redact":
            where = command.add_mutually_exclusive_group(required=True)
            where.add_argument("--out", metavar="DIR", help="write copies there")
            where.add_argument("--in-place", action="store_true", help="replace the files")
        if name == "eval":
            command.add_argument("--peers", action="store_true", help="beside detect-secrets, credsweeper and presidio")
            command.add_argument("--out", metavar="FILE", help="write the scores as JSON")
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    if command == "train":
        return command, PIIConfig(**(PRESETS[given.pop("preset")] | given))
    return command, argparse.Namespace(**given)


def detector_of(arguments):
    """The `Detector` that the arguments of detect, redact and eval ask for."""
    categories = arguments.categories.split(",")
    if unknown := set(categories) - set(CATEGORIES):
        raise ValueError(f"unknown category {min(unknown)}; known: {', '.join(CATEGORIES)}")
    if not 0 <= arguments.threshold <= 1:
        raise ValueError(f"--threshold must lie between 0 and 1, got {arguments.threshold}")
    options = dict(threshold=arguments.threshold, categories=categories)
    if arguments.rules_only:
        if not set(categories) & set(RULE_CATEGORIES):
            raise ValueError(f"the rules find only {', '.join(RULE_CATEGORIES)}; without --rules-only the model finds all")
        return Detector(rules=True, **options)
    if not os.path.isdir(arguments.model):
        raise ValueError(f"{arguments.model}: no such directory; `python pii.py train` makes a detector, --rules-only needs none")
    return Detector.from_pretrained(arguments.model, arguments.device, rules=getattr(arguments, "rules", False), **options)


def detect_command(arguments):
    """Prints what is found, as a table or as JSON lines; returns the exit status."""
    skipped, found = Counter(), Counter()
    for path, line, column, entity, value in scan(detector_of(arguments), arguments.paths, skipped):
        found[entity.category] += 1
        text = shown(value, arguments.show)
        if arguments.json:
            record = {"file": path, "line": line, "column": column, "category": entity.category, "text": text}
            print(json.dumps(record | {"score": round(entity.score, 4)}))
        else:
            row = f"{entity.category:11} {entity.score:4.0%}  {path}:{line}:{column}  {text}"
            # Half of a surrogate pair, which UTF-16 and names of files may hold, cannot be printed.
            print(row.encode(errors="replace").decode())
    counted = ", ".join(f"{n:,} {what}" for what, n in found.most_common()) or "nothing"
    left_out = "".join(f", {n:,} {what}" for what, n in skipped.items())
    print(f"found: {counted}{'; left out:' + left_out[1:] if left_out else ''}", file=sys.stderr)
    return 1 if found and arguments.fail else 0


def end_cleanly(number, _):
    """Upon a signal: an exit that prints what was found and removes what is half written."""
    # A second one must not stop the first's work.
    signal.signal(number, signal.SIG_IGN)
    sys.exit(128 + number)


def main(argv=None):
    """The command line."""
    command, arguments = parse_arguments(argv)
    if command == "train":
        try:
            if train(arguments) is not None and os.environ.get("RANK", "0") == "0":
                show_at_work(Detector.from_pretrained(arguments.out, arguments.device, rules=True))
                print(f"Try: python pii.py detect --rules --model {arguments.out} PATH")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    elif command == "synthesize":
        made = synthesize(arguments.sources, arguments.out, arguments.count, arguments.seed)
        print(f"{arguments.out}: " + ", ".join(f"{split} {n:,}" for split, n in made.items()) + " documents")
    elif command == "detect":
        signal.signal(signal.SIGTERM, end_cleanly)
        raise SystemExit(detect_command(arguments))
    elif command == "redact":
        signal.signal(signal.SIGTERM, end_cleanly)
        counts, skipped = redact(detector_of(arguments), arguments.paths, arguments.out)
        print("redacted: " + (", ".join(f"{n:,} {what}" for what, n in counts.most_common()) or "nothing"))
        if skipped:
            print("left as they are: " + ", ".join(f"{n:,} {what}" for what, n in skipped.items()))
    else:
        import pii_eval

        print(pii_eval.run(detector_of(arguments), arguments.paths, arguments.peers, arguments.out))


if __name__ == "__main__":
    run(main)
