"""The commands: python -m pii train | synthesize | detect | redact | eval."""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from common.arguments import add_flags
from common.command_line import CommandLine, run_command
from pii import SHIPPED

# PyTorch takes seconds to import, and `--help` needs none of it. So each command imports what it
# uses when it runs.

# What a new detector is shown on: nobody's data. The § keep scanners of this repository quiet.
SAMPLE = Path(__file__).with_name("sample.txt").read_text(encoding="utf-8").replace("§", "")

# Flags, as keyword arguments of `add_argument`. Those of `train` are the fields of FinetuneConfig.

PATHS_HELP = "files, and directories with all in them but .git, venv, node_modules and the like"
MODEL_HELP = "a detector that `python -m pii train` made (default: pii/tiny, which is shipped)"
RULES_HELP = "only the rules for addresses and known formats of keys, without a model"
SCORE_HELP = "the least score of what the model finds (default: one for each category)"
RECALL_HELP = "find this share of all that is there, by the scores of the validation data"
SOURCE_HELP = "as for python -m corpus (default: fetched packages, or this Python's library)"

DETECTOR_FLAGS = {  # of detect, redact and eval
    "--model": dict(default=SHIPPED, metavar="DIR", help=MODEL_HELP),
    "--rules-only": dict(action="store_true", help=RULES_HELP),
    "--threshold": dict(type=float, metavar="P", help=SCORE_HELP),
    "--recall": dict(type=float, metavar="P", help=RECALL_HELP),
}
SEARCH_FLAGS = {  # of detect and redact; eval measures all categories
    "paths": dict(nargs="+", metavar="PATH", help=PATHS_HELP),
    **DETECTOR_FLAGS,
    "--categories": dict(metavar="A,B", help="only these (default: all six)"),
}
DETECT_FLAGS = {
    **SEARCH_FLAGS,
    "--json": dict(action="store_true", help="print a line of JSON for each thing found"),
    "--sarif": dict(metavar="FILE", help="write what is found as a SARIF log, for code scanning"),
    "--baseline": dict(metavar="FILE", help="leave out what this file knows"),
    "--write-baseline": dict(metavar="FILE", help="write what is found as known, without values"),
    "--fail": dict(action="store_true", help="exit with status 1 if something is found"),
}
REDACT_FLAGS = {
    **SEARCH_FLAGS,
    "--out": dict(metavar="DIR", help="write copies there"),  # one of these two
    "--in-place": dict(action="store_true", help="replace the files"),
}
EVAL_FLAGS = {
    "data": dict(metavar="DATA", help="labelled documents (JSON lines), or a clone of CredSweeper"),
    **DETECTOR_FLAGS,
    "--peers": dict(action="store_true", help="beside detect-secrets, credsweeper and presidio"),
    "--out": dict(metavar="FILE", help="write the scores as JSON"),
}
SYNTHESIZE_FLAGS = {  # the same flags give the same data
    "sources": dict(nargs="*", metavar="SOURCE", help=SOURCE_HELP),
    "--out": dict(required=True, metavar="DIR", help="the directory to write"),
    "--count": dict(type=int, default=16_000, metavar="N", help="documents (default: 16000)"),
    "--seed": dict(type=int, default=0, metavar="N", help="fixes what is drawn (default: 0)"),
}

PACK_FLAGS = {
    "run": dict(metavar="RUN", help="a detector that `python -m pii train` made"),
    "--out": dict(required=True, metavar="DIR", help="the directory to write"),
}


def add_train_flags(parser):
    """The flags of `train`: a preset, the data, and the other fields of FinetuneConfig."""
    from finetune.loop import FinetuneConfig
    from pii.finetune import DEFAULT_DATA, PII_PRESETS

    parser.add_argument("--preset", choices=PII_PRESETS, default="tiny", help="default: tiny")
    help = f"with train.jsonl and validation.jsonl (default: {DEFAULT_DATA}, made if missing)"
    parser.add_argument("--data", metavar="DIR", default=DEFAULT_DATA, help=help)
    not_here = {"train", "validation", "temperature"}
    add_flags(parser, FinetuneConfig, "unless the preset differs", leave_out=not_here)


# The commands.


def train_command(arguments):
    """Trains a detector and shows it at work."""
    import torch.distributed as dist

    from pii.detector import Detector
    from pii.finetune import PII_PRESETS, config_of, train

    given = vars(arguments)  # only what is on the command line: it overrides the preset
    config = config_of(**(PII_PRESETS[given.pop("preset")] | given))
    try:
        finished = train(config) is not None
        if finished and os.environ.get("RANK", "0") == "0":  # one of torchrun's processes
            show_at_work(Detector.from_pretrained(config.out, config.device, rules=True))
            print(f"Try: python -m pii detect --model {config.out} PATH")
    finally:  # else PyTorch warns at exit
        if dist.is_initialized():
            dist.destroy_process_group()


def show_at_work(detector):
    """Prints what a detector finds in SAMPLE, and SAMPLE without it."""
    from pii.redact import redacted
    from pii.scan import masked

    (entities,) = detector.find([SAMPLE])
    print(f"\nBefore:\n\n{SAMPLE}\nFound:\n")
    for start, end, category, score in entities:
        line = SAMPLE.count("\n", 0, start) + 1
        print(f"  line {line:2}  {category:11} {score:4.0%}  {masked(SAMPLE[start:end])}")
    print(f"\nAfter:\n\n{redacted(SAMPLE, entities, {})}")


def synthesize_command(arguments):
    """Writes labelled documents."""
    from pii.synthesize import synthesize

    sizes = synthesize(arguments.sources, arguments.out, arguments.count, arguments.seed)
    print(f"{arguments.out}: {', '.join(f'{split} {n:,}' for split, n in sizes.items())} documents")


def detect_command(arguments):
    """Prints what is found; with a baseline, only what that does not know."""
    from pii.baseline import write_baseline
    from pii.sarif import write_log

    check_detect_flags(arguments)
    found = Counter()
    skipped = Counter()
    kept = []  # for the files that are written at the end: whole, or not at all
    for finding in new_findings(arguments, skipped):
        found[finding.entity.category] += 1
        print_finding(finding, arguments.json)
        if arguments.sarif or arguments.write_baseline:
            kept.append(finding)
    if arguments.sarif:
        write_log(arguments.sarif, kept)
    if arguments.write_baseline:
        write_baseline(arguments.write_baseline, kept)

    # Findings may be piped into a program; the summary is for people.
    left_out = f"; left out: {listed(skipped.items())}" if skipped else ""
    print(f"found: {listed(found.most_common())}{left_out}", file=sys.stderr)
    return 1 if found and arguments.fail else 0


def new_findings(arguments, skipped):
    """Yields each `Finding` that `detect` reports; what is left out is counted in `skipped`."""
    from pii.baseline import Baseline
    from pii.scan import scan

    # Report a damaged baseline before loading the model.
    baseline = None if arguments.baseline is None else Baseline(arguments.baseline)
    detector = detector_of(arguments, arguments.categories)
    own = {os.path.realpath(file) for file in own_files(arguments)}
    for finding in scan(detector, arguments.paths, skipped):
        # A name in a path that a baseline lists would be found anew in each of them.
        if os.path.realpath(finding.path) in own:
            continue
        if baseline and baseline.knows(finding):
            skipped["known"] += 1
        else:
            yield finding


def own_files(arguments):
    """The files that `detect` reads and writes for itself."""
    files = (arguments.sarif, arguments.baseline, arguments.write_baseline)
    return [file for file in files if file is not None]


def print_finding(finding, as_json):
    """Prints a `Finding` as a line for people or as JSON for programs, never its whole value."""
    from pii.scan import masked

    place = {"file": finding.path, "line": finding.line, "column": finding.column}
    category = finding.entity.category
    score = finding.entity.score
    shown = masked(finding.value)
    if as_json:  # it escapes odd file names itself
        found = {"category": category, "text": shown, "score": round(score, 4)}
        print(json.dumps(place | found))
    else:
        path, line, column = place.values()
        print(printable(f"{category:11} {score:4.0%}  {path}:{line}:{column}  {shown}"))


def printable(text):
    """A text on one line: line ends, control characters and halves of pairs become escapes."""
    # A file name may hold what moves the cursor, or bytes that are no UTF-8.
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def redact_command(arguments):
    """Replaces what is found."""
    from pii.redact import redact

    # There is no default: a model that is wrong must not destroy anything unasked.
    if (arguments.out is None) != arguments.in_place:
        raise ValueError("redact needs one of --out DIR and --in-place")
    detector = detector_of(arguments, arguments.categories)
    counts, skipped = redact(detector, arguments.paths, arguments.out)
    print(f"redacted: {listed(counts.most_common())}")
    if skipped:
        print(f"left as they are: {listed(skipped.items())}")


def eval_command(arguments):
    """Prints scores, also those of other tools."""
    from pii.peers import compare

    print(compare(detector_of(arguments), arguments.data, arguments.peers, arguments.out))


def pack_command(arguments):
    """Writes a small copy of a detector."""
    from pii.finetune import pack

    pack(arguments.run, arguments.out)


def listed(counts):
    """[("EMAIL", 3), ("KEY", 1)] as "3 EMAIL, 1 KEY"."""
    return ", ".join(f"{count:,} {name}" for name, count in counts) or "nothing"


def detector_of(arguments, categories=None):
    """The `Detector` that the flags ask for. categories: separated by commas; None for all."""
    from pii.detector import Detector
    from pii.labels import CATEGORIES

    chosen = CATEGORIES if categories is None else [name.strip() for name in categories.split(",")]
    check_detector_flags(arguments, set(chosen))
    options = {"rules": True, "categories": chosen}
    if arguments.rules_only:
        return Detector(**options)
    if arguments.threshold is not None:
        options["threshold"] = arguments.threshold
    detector = Detector.from_pretrained(arguments.model, recall=arguments.recall, **options)
    if arguments.recall is not None:
        warn_of_what_is_not_promised(detector.thresholds, chosen, arguments.recall)
    return detector


def warn_of_what_is_not_promised(thresholds, chosen, recall):
    """Says for which categories no threshold keeps a share `recall` of what is there."""
    without = [category for category in chosen if thresholds[category] == 0]
    if without:
        words = "all that the model thinks of is reported, and that may be less"
        print(f"{', '.join(without)}: no threshold finds {recall:.0%}; {words}", file=sys.stderr)


def check_detect_flags(arguments):
    """Raises ValueError for flags that contradict each other, and for files that cannot be."""
    if arguments.write_baseline is not None and (arguments.baseline is not None or arguments.fail):
        words = "makes all that is found known; leave out --baseline and --fail"
        raise ValueError(f"--write-baseline {words}")
    own = [os.path.realpath(file) for file in own_files(arguments)]
    if len(set(own)) < len(own):
        raise ValueError("--sarif would overwrite the baseline; name another file")

    # Said now rather than after minutes of work. An empty name comes from an unset variable.
    for file in (arguments.sarif, arguments.write_baseline):
        if file is not None and not may_be_written(file):
            raise ValueError(f"{file!r}: no file can be written there")


def may_be_written(path):
    """True if a file can be made at `path`, or replaced."""
    folder = os.path.dirname(path) or "."
    # A device or a pipe would be replaced too, and root may do that to /dev/null and /dev/stdout.
    special = (
        os.path.lexists(path) and not os.path.isfile(path) or os.path.realpath(folder) == "/dev"
    )
    return bool(path) and not special and os.access(folder, os.W_OK)


def check_detector_flags(arguments, categories):
    """Raises ValueError if no detector can be made of the flags."""
    from pii.labels import CATEGORIES
    from pii.rules import RULE_CATEGORIES

    unknown = categories.difference(CATEGORIES)
    if unknown:
        raise ValueError(f"unknown category {min(unknown)}; known: {', '.join(CATEGORIES)}")
    threshold = arguments.threshold
    if threshold is not None and not 0 <= threshold <= 1:
        raise ValueError(f"--threshold must lie between 0 and 1, got {threshold}")
    if arguments.recall is not None and not 0 < arguments.recall <= 1:
        raise ValueError(f"--recall must lie above 0 and up to 1, got {arguments.recall}")
    if arguments.recall is not None and (arguments.threshold is not None or arguments.rules_only):
        raise ValueError("--recall says which scores count: no --threshold or --rules-only with it")
    if arguments.rules_only and categories.isdisjoint(RULE_CATEGORIES):
        known = ", ".join(RULE_CATEGORIES)
        raise ValueError(f"the rules find only {known}; without --rules-only the model finds all")
    if not arguments.rules_only and not os.path.isdir(arguments.model):
        hint = "`python -m pii train` makes a detector, --rules-only needs none"
        raise ValueError(f"{arguments.model}: no such directory; {hint}")


class Command(NamedTuple):
    """One of the commands."""

    run: Any  # from its arguments to an exit status, or None for 0
    flags: dict  # from a flag to keyword arguments of `add_argument`
    help: str


COMMANDS = {
    "train": Command(train_command, {}, "fine-tune an encoder"),
    "synthesize": Command(synthesize_command, SYNTHESIZE_FLAGS, "make labelled data"),
    "detect": Command(detect_command, DETECT_FLAGS, "show what is found"),
    "redact": Command(redact_command, REDACT_FLAGS, "replace what is found"),
    "pack": Command(pack_command, PACK_FLAGS, "write a small copy of a detector, to be shipped"),
    "eval": Command(eval_command, EVAL_FLAGS, "measure how well it is found"),
}


def end_cleanly(number, frame):
    """Handles a signal: ends such that the output is flushed and what is half written removed."""
    signal.signal(number, signal.SIG_IGN)  # a second one must not stop that
    sys.exit(128 + number)


def main(argv=None):
    """The command line. argv: without the program's name; by default, what it was called with."""
    argv = sys.argv[1:] if argv is None else argv
    about = "Find and redact personal data and secrets in code."
    parser = CommandLine(prog="python -m pii", description=about)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help)
        for flag, options in command.flags.items():
            subparser.add_argument(flag, **options)
        if name == "train" and argv[:1] == ["train"]:  # importing them takes seconds
            add_train_flags(subparser)
    arguments = parser.parse_args(argv)

    name = vars(arguments).pop("command")
    if name in ("detect", "redact"):  # output may be buffered, or a file half written
        signal.signal(signal.SIGTERM, end_cleanly)
    status = COMMANDS[name].run(arguments)
    if status:  # else return, and `run_command` flushes the output
        sys.exit(status)


if __name__ == "__main__":
    run_command(main)
