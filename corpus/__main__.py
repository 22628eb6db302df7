"""python -m corpus: makes a corpus of tokens from source code, or says what is in one.

With --fetch it downloads source code instead.
"""

import argparse
import time

from common.command_line import CommandLine, run_command
from corpus.build import prepare
from corpus.jobs import EXECUTORS, TASKS
from corpus.packages import fetch, read_packages
from corpus.report import summary
from corpus.sources import KINDS
from corpus.store import read_meta


def command_line():
    """The arguments of `prepare`, --report and --fetch."""
    parser = CommandLine(
        prog="python -m corpus",
        description="Makes a corpus of tokens from source code.",
        argument_default=argparse.SUPPRESS,  # what is not given has the default of `prepare`
    )
    add = parser.add_argument
    sources = f"{KINDS} (default: the standard library of this Python)"
    add("sources", nargs="*", metavar="SOURCE", help=sources)
    add("--out", metavar="DIR", help="the corpus directory to make, or to go on with")
    add("--report", metavar="DIR", help="print what is in this corpus, and do nothing else")
    listed = "download the packages of this list into --out, and do nothing else"
    add("--fetch", metavar="LIST", help=listed)

    # The tokenizer: a new one, or one that is there.
    either = parser.add_mutually_exclusive_group()
    size = "tokens of a tokenizer to train (default: 49156)"
    either.add_argument("--vocab-size", type=int, metavar="N", help=size)
    path = "use this tokenizer.json, or the one in this directory"
    either.add_argument("--tokenizer", metavar="PATH", help=path)

    # Which documents are taken. To go on with a corpus, these must be as they were.
    add("--commits", action="store_true", help="take the histories of git repositories too")
    add("--languages", type=lambda text: text.split(","), metavar="A,B,...", help="only these")
    limit = "the first N distinct documents of each language (before cleaning)"
    add("--limit-per-language", type=int, metavar="N", help=limit)
    clean = "leave out what StarCoder's basic filters do: long lines, generated files, ..."
    add("--clean", action="store_true", help=clean)
    add("--near-dedup", action="store_true", help="leave out near duplicates, by MinHash")
    add("--validation", type=float, metavar="P", help="share held out (default: 0.05)")

    # Who does the work. The documents and tokens are the same whatever these say.
    add("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    who = "share the work among tasks, and run them here, on a Ray or on a Slurm cluster"
    add("--executor", choices=EXECUTORS, help=who)
    add("--tasks", type=int, metavar="N", help=f"how many tasks (default: {TASKS})")
    return parser


def main(argv=None):
    """Runs the command."""
    parser = command_line()
    arguments = vars(parser.parse_args(argv))
    if "report" in arguments:
        print(summary(read_meta(arguments["report"])))
        return
    if "out" not in arguments:
        parser.error("the following arguments are required: --out")
    if "fetch" in arguments:
        packages = read_packages(arguments["fetch"])
        paths = fetch(packages, arguments["out"])
        megabytes = sum(path.stat().st_size for path in paths) / 1e6
        print(f"{len(paths)} of {len(packages)} packages, {megabytes:.1f} MB: {arguments['out']}")
        return
    begin = time.perf_counter()
    meta = prepare(**arguments)  # every other flag has the name of one of its arguments
    seconds = time.perf_counter() - begin
    print(summary(meta))
    megabytes = sum(counts["bytes"] for counts in meta["languages"].values()) / 1e6
    print(f"{seconds:,.0f} s, {megabytes / seconds:.1f} MB/s")


if __name__ == "__main__":
    run_command(main)
