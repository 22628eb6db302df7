"""The CPU speedrun: the time until a held-out loss, of your recipe beside the record's.

`python -m bench speedrun RECIPE` trains both recipes in turns on this machine, one seed after the
other, and reports the ratio of their times. A recipe is a JSON file with the fields of a
`train.TrainConfig` that differ from its defaults. The rules are in results/speedrun.md.

The clock runs while examples are made and steps are taken, not during set-up and evaluations. Each
evaluation is of the same held-out pairs under the same masks, so up to rounding the figure depends
on the weights alone.
"""

import dataclasses
import glob
import math
import os
import platform
import re
import statistics
import time
from importlib.util import find_spec
from typing import NamedTuple

import torch
from tqdm import tqdm

import train
from bench.measure import report
from common.files import read_json
from corpus.build import prepare
from corpus.report import summary
from corpus.store import read_meta
from data import batches
from training.ranks import Ranks
from training.step import dtype_of, micro_batch_seed, optimizer_step

CORPUS = "corpora/speedrun"
VOCAB_SIZE = 4096
# requirements.txt pins the package whose source is the corpus, so that all have the same.
SOURCE = "transformers"
TOKENIZER_SHA256 = "0030235dd01062ca9894648b3eca27cc19471208c247d22ddbb484aae87dab60"
TOKENS = {"train": 13_421_249, "validation": 758_206}
TARGET = 4.1  # nats a masked token; the first recipe ends at 3.7 to 4.0, by the seed

RECORDS = "results/speedrun"  # their recipes, numbered
HELD_OUT = 1024  # pairs of an evaluation
LAST_STEPS = 10  # whose losses are kept, to be verified
# On another machine, which rounds differently: nats of the held-out loss, and the share of steps,
# if that is more than two evaluations.
TOLERANCE = 0.05

# What a recipe may not change. The shape is StarEncoder's, as the tiny preset has it.
FIXED = {
    "hidden_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "intermediate_size": 768,
    "max_length": 64,
}

# Two-sided 95 % quantiles of Student's t by the number of seeds.
STUDENT = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


class Race(NamedTuple):
    """One run of one recipe."""

    reached: bool  # whether it came to the target before its last step
    seconds: float  # of training, without evaluations
    steps: int  # done
    held_out: float  # MLM loss of the last evaluation, nats
    losses: list  # training losses of the last steps


def contenders_of(record, recipe):
    """(record, recipe): the two paths, where None is the newest record that is not the other."""
    numbered = {}
    for path in glob.glob(os.path.join(RECORDS, "*.json")):
        number = re.match(r"(\d+)-", os.path.basename(path))
        if number:
            numbered[int(number[1])] = path
    records = [numbered[number] for number in sorted(numbered)]
    if len(records) < 2 and not (record and recipe):
        raise ValueError(f"no records in {RECORDS} here; name both recipes")
    recipe = recipe or records.pop()
    others = [path for path in records if not os.path.samefile(path, recipe)]
    return record or others.pop(), recipe


def bench_speedrun(recipe, record, seeds=3, path=None, directory=CORPUS, target=TARGET):
    """Both recipes in turns, and the ratio of their times with its 95 % interval.

    recipe, record: paths of recipes. seeds: 2 to 10.
    """
    if seeds not in STUDENT:
        raise ValueError(f"--seeds must lie between 2 and {max(STUDENT)}, got {seeds}")
    contenders = {"record": read_recipe(record), "yours": read_recipe(recipe)}
    pinned_corpus(directory)

    races = {name: [] for name in contenders}
    for seed in range(seeds):
        for name, fields in contenders.items():  # in turns, as the machine may get slower
            race = run_race(fields, seed, directory, target, f"{name}, seed {seed}")
            races[name].append(race)

    rows = []
    for name, runs in races.items():
        for seed, race in enumerate(runs):
            row = {"recipe": name, "seed": seed, "seconds": round(race.seconds, 2)}
            row |= {"steps": race.steps, "held-out loss": race.held_out, "reached": race.reached}
            rows.append(row)
    pairs = zip(races["record"], races["yours"])
    ratio, low, high = ratio_of_times([a.seconds / b.seconds for a, b in pairs])
    reached = all(row["reached"] for row in rows)
    report(
        path,
        "speedrun",
        rows,
        ratio=round(ratio, 3) if reached else None,
        interval=[round(low, 3), round(high, 3)] if reached else None,
        target=target,
        losses=[race.losses for race in races["yours"]],
        record=contenders["record"],
        yours=contenders["yours"],
        **machine(),
    )
    if not reached:
        raise ValueError(f"not every run came down to {target}: there is no ratio")
    print(f"{ratio:.2f} times as fast as the record (95 %: {low:.2f} to {high:.2f})")


def read_recipe(path):
    """The fields of a recipe. Raises ValueError for one that breaks the rules."""
    fields = read_json(path).get("fields")
    if not isinstance(fields, dict):
        raise ValueError(f'{path}: a recipe is {{"idea": "...", "fields": {{...}}}}')
    return checked_fields(fields, path)


def checked_fields(fields, path):
    """The fields with the shape of rule 1. Raises ValueError that names the file."""
    for name, value in FIXED.items():
        if fields.get(name, value) != value:
            raise ValueError(f"{path}: {name} must be {value}")
    kinds = {f.name: f.type for f in dataclasses.fields(train.TrainConfig)}
    for name, value in fields.items():
        if kinds.get(name) is float and type(value) is int:
            continue
        if type(value) is not kinds.get(name):
            raise ValueError(f"{path}: {name} = {value!r} is no field of train.TrainConfig")
    try:
        train.model_config(train.TrainConfig(**fields), VOCAB_SIZE)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return fields | FIXED


def pinned_corpus(directory=CORPUS):
    """Makes the corpus if it is missing. Raises ValueError if it is not the one of all records."""
    if not os.path.exists(os.path.join(directory, "meta.json")):
        found = find_spec(SOURCE)
        if found is None:
            raise ValueError(f"{SOURCE} is not installed, whose source is the corpus")
        source = os.path.dirname(found.origin)
        print(summary(prepare([source], directory, vocab_size=VOCAB_SIZE)))
    meta = read_meta(directory)
    tokens = {split: facts["tokens"] for split, facts in meta["splits"].items()}
    if directory == CORPUS and (meta["tokenizer_sha256"], tokens) != (TOKENIZER_SHA256, TOKENS):
        raise ValueError(
            f"{directory} is not the corpus of the records, which is made from the version of "
            f"{SOURCE} in requirements.txt; install that, and remove {directory}"
        )


def run_race(fields, seed, directory, target, title):
    """Trains until the target, or to the recipe's last step: a `Race`."""
    config = train.TrainConfig(**fields | {"data": directory, "seed": seed, "device": "cpu"})
    ranks = Ranks.start("cpu")
    setup = train.set_up(config, ranks, dtype_of(config, ranks.device))
    model = setup.model
    loader = batches(
        setup.train_set,
        range(config.steps),
        config.batch_size,
        config.micro_batch_size,
        workers=0,
    )
    bar = tqdm(total=config.steps, unit="step", desc=title, leave=False)
    seconds = 0.0
    losses = []
    held_out = math.inf
    model.train()
    for step in range(config.steps):
        begin = time.perf_counter()
        loss = training_step(config, setup, step, next(loader))
        seconds += time.perf_counter() - begin
        losses.append(loss)
        bar.update()
        done = step + 1
        if done == config.steps or done % config.eval_every == 0:
            size = config.micro_batch_size
            evaluated = (model, setup.held_out, HELD_OUT, size, ranks, setup.autocast)
            held_out = train.evaluate(*evaluated)["mlm_loss"]
            bar.set_postfix_str(f"held out {held_out:.3f}, {seconds:.0f} s")
            if held_out <= target:
                break
    bar.close()
    return Race(held_out <= target, seconds, done, held_out, losses[-LAST_STEPS:])


def training_step(config, setup, step, micro_batches):
    """One step of train.py's loop on one rank. Returns the MLM loss."""
    masked = sum(len(batch.labels) for batch in micro_batches)
    mlm_loss = 0.0
    for i, batch in enumerate(micro_batches):
        seed = micro_batch_seed(config.seed, step, 0, i, "cpu")
        with setup.autocast():
            loss, mlm, _ = train.loss_on(setup.model, batch, masked, config.batch_size, seed)
        loss.backward()
        mlm_loss += mlm.item()
    rate = train.learning_rate(config, step)
    optimizer_step(setup.model, setup.optimizer, config.max_grad_norm, rate)
    return mlm_loss


def ratio_of_times(ratios):
    """(mean, lower, upper): the geometric mean of the ratios, and its 95 % interval."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = statistics.mean(logs)
    margin = STUDENT[len(logs)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - margin), math.exp(mean + margin)


def machine():
    """What the bits of a run depend on."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as f:
            for line in f:
                if line.startswith("model name"):
                    model = line.split(":")[1].strip()
                    break
    return {
        "processor": model,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


# ---- verifying a result --------------------------------------------------------------------------


def verify(path, directory=CORPUS):
    """Runs a result's recipe again with its first seed, and compares the figures.

    On a machine that computes as the result's did, the losses of the last steps and the held-out
    loss must be the same bit for bit; on another the number of steps and the held-out loss, within
    TOLERANCE. Raises ValueError if they are not. The times, and so the ratio, are not compared.
    """
    result = read_json(path)
    try:
        claimed = next(row for row in result["rows"] if row["recipe"] == "yours")
        seed = claimed["seed"]
        steps = int(claimed["steps"])
        held_out = float(claimed["held-out loss"])
        seconds = float(claimed["seconds"])
        losses = result["losses"][seed]
        torch_version = result["versions"]["torch"]
        fields = checked_fields(dict(result["yours"]), path)
        target = float(result["target"])
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration):
        raise ValueError(f"{path}: not a result of this program") from None
    if not claimed.get("reached"):
        raise ValueError(f"{path}: it did not reach its target")
    if directory == CORPUS and target != TARGET:
        raise ValueError(f"{path}: its target is {target}, not {TARGET}")
    pinned_corpus(directory)
    race = run_race(fields, seed, directory, target, "verifying")

    same_machine = torch_version == torch.__version__
    for key, value in machine().items():
        same_machine = same_machine and result.get(key) == value
    difference = abs(race.held_out - held_out)
    if same_machine:
        verified = race.steps == steps and difference == 0 and race.losses == losses
    else:
        # Elsewhere the target may be met some evaluations earlier or later, by other losses.
        slack = max(TOLERANCE * steps, 2 * train.TrainConfig(**fields).eval_every)
        verified = abs(race.steps - steps) <= slack and difference <= TOLERANCE
    if not verified:
        raise ValueError(
            f"{path}: not verified: {race.steps} steps to a held-out loss of {race.held_out:.4f}, "
            f"where {steps} to {held_out:.4f} are claimed"
        )
    how = "bit for bit" if same_machine else "within tolerance, on another machine"
    print(f"{path}: verified {how}; {race.seconds:.1f} s here, {seconds:.1f} s there")
