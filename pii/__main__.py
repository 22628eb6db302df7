"""TODO."""

import argparse
import json
import os
import signal
import sys
from collections import Counter
from dataclasses import fields

import torch.distributed as dist

from common.command_line import CommandLine, run_command
from pii.detector import Detector
from pii.finetune import PII_PRESETS, PIIConfig, train
from pii.labels import CATEGORIES
from pii.peers import compare
from pii.redact import redact, redacted
from pii.rules import RULE_CATEGORIES
from pii.scan import scan
from pii.synthesize import synthesize

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
    parser = CommandLine(
        prog="python -m pii", description="Find and redact personal data and secrets in code."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    about = "Fine-tune an encoder. In brackets: the values of the starpii preset; tiny changes some of them."
    fine_tune = commands.add_parser("train", help="fine-tune an encoder", description=about)
    fine_tune.add_argument("--preset", choices=PII_PRESETS, default="tiny", help="default: tiny")
    for f in fields(PIIConfig):
        how = (
            dict(action=argparse.BooleanOptionalAction)
            if f.type is bool
            else dict(type=f.type, metavar=f.type.__name__.upper())
        )
        text = f"{f.metadata['help']} (starpii: {f.default})".replace("%", "%%")
        fine_tune.add_argument(
            "--" + f.name.replace("_", "-"), default=argparse.SUPPRESS, help=text, **how
        )

    synthetic = commands.add_parser("synthesize", help="make labelled data from source files")
    synthetic.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="as for corpus.py (default: the standard library of this Python)",
    )
    synthetic.add_argument("--out", required=True, metavar="DIR", help="the directory to write")
    synthetic.add_argument(
        "--count", type=int, default=16_000, metavar="N", help="documents (default: 16000)"
    )
    synthetic.add_argument(
        "--seed", type=int, default=0, metavar="N", help="fixes what is drawn (default: 0)"
    )

    for name, help in (
        ("detect", "show what is found"),
        ("redact", "replace what is found"),
        ("eval", "measure how well it is found"),
    ):
        command = commands.add_parser(name, help=help)
        if name == "eval":
            command.add_argument(
                "paths",
                metavar="DATA",
                help="labelled documents, JSON lines; or a clone of CredSweeper or detect-secrets",
            )
        else:
            text = "files, and directories with all that is in them except .git, venv, node_modules and the like"
            command.add_argument("paths", nargs="+", metavar="PATH", help=text)
        command.add_argument(
            "--model",
            default="runs/pii",
            metavar="RUN",
            help="the fine-tuned model (default: runs/pii)",
        )
        if name != "eval":  # which measures both ways
            command.add_argument(
                "--rules",
                action="store_true",
                help="join the model with rules for addresses and known formats of keys",
            )
        command.add_argument(
            "--rules-only", action="store_true", help="the rules without the model"
        )
        command.add_argument(
            "--threshold",
            type=float,
            default=0.5,
            metavar="P",
            help="least score of what the model finds (default: 0.5)",
        )
        command.set_defaults(categories=",".join(CATEGORIES))
        if name != "eval":
            command.add_argument(
                "--categories", metavar="A,B", help="only these (default: all six)"
            )
        command.add_argument(
            "--device",
            default="auto",
            choices=["auto", "cpu", "cuda"],
            help="auto: cuda where there is one",
        )
        if name == "detect":
            command.add_argument(
                "--json", action="store_true", help="print a line of JSON for each thing found"
            )
            command.add_argument(
                "--show",
                action="store_true",
                help="print what was found, not only its first two characters",
            )
            command.add_argument(
                "--fail", action="store_true", help="exit with status 1 where something is found"
            )
        if name == "redact":
            where = command.add_mutually_exclusive_group(required=True)
            where.add_argument("--out", metavar="DIR", help="write copies there")
            where.add_argument("--in-place", action="store_true", help="replace the files")
        if name == "eval":
            command.add_argument(
                "--peers",
                action="store_true",
                help="beside detect-secrets, credsweeper and presidio",
            )
            command.add_argument("--out", metavar="FILE", help="write the scores as JSON")
    given = vars(parser.parse_args(argv))
    command = given.pop("command")
    if command == "train":
        return command, PIIConfig(**(PII_PRESETS[given.pop("preset")] | given))
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
            raise ValueError(
                f"the rules find only {', '.join(RULE_CATEGORIES)}; without --rules-only the model finds all"
            )
        return Detector(rules=True, **options)
    if not os.path.isdir(arguments.model):
        raise ValueError(
            f"{arguments.model}: no such directory; `python pii.py train` makes a detector, --rules-only needs none"
        )
    return Detector.from_pretrained(
        arguments.model, arguments.device, rules=getattr(arguments, "rules", False), **options
    )


def detect_command(arguments):
    """Prints what is found, as a table or as JSON lines; returns the exit status."""
    skipped, found = Counter(), Counter()
    for path, line, column, entity, value in scan(detector_of(arguments), arguments.paths, skipped):
        found[entity.category] += 1
        text = shown(value, arguments.show)
        if arguments.json:
            record = {
                "file": path,
                "line": line,
                "column": column,
                "category": entity.category,
                "text": text,
            }
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
        print(
            f"{arguments.out}: "
            + ", ".join(f"{split} {n:,}" for split, n in made.items())
            + " documents"
        )
    elif command == "detect":
        signal.signal(signal.SIGTERM, end_cleanly)
        raise SystemExit(detect_command(arguments))
    elif command == "redact":
        signal.signal(signal.SIGTERM, end_cleanly)
        counts, skipped = redact(detector_of(arguments), arguments.paths, arguments.out)
        print(
            "redacted: "
            + (", ".join(f"{n:,} {what}" for what, n in counts.most_common()) or "nothing")
        )
        if skipped:
            print("left as they are: " + ", ".join(f"{n:,} {what}" for what, n in skipped.items()))
    else:
        print(compare(detector_of(arguments), arguments.paths, arguments.peers, arguments.out))


if __name__ == "__main__":
    run_command(main)
