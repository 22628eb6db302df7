"""TODO."""

import time

from common.command_line import CommandLine, run_command
from corpus.build import prepare
from corpus.report import report, summary
from corpus.sources import KINDS
from corpus.store import read_meta


def _shard(text):
    i, slash, n = text.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal()):
        raise ValueError(f"--shard: give i/n, as in 0/8, not {text}")
    return int(i), int(n)


def main(argv=None):
    """The command line."""
    parser = CommandLine(
        prog="python -m corpus", description="Make a corpus of tokens from source code."
    )
    sources_help = f"{KINDS} (default: the standard library of this Python)"
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=sources_help)
    parser.add_argument(
        "--out", metavar="DIR", help="the corpus directory to make, or to go on with"
    )
    parser.add_argument(
        "--report",
        metavar="DIR",
        help="say what is in the corpus DIR, draw DIR/report.png, and end",
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--vocab-size",
        type=int,
        default=49156,
        metavar="N",
        help="tokens of the tokenizer to train (default: 49156)",
    )
    choice.add_argument(
        "--tokenizer", metavar="PATH", help="use this tokenizer.json, or the one in this directory"
    )
    parser.add_argument(
        "--commits",
        action="store_true",
        help="take the history of git repositories among the sources, too",
    )
    parser.add_argument("--languages", metavar="A,B,...", help="take only these languages")
    parser.add_argument(
        "--limit-per-language",
        type=int,
        metavar="N",
        help="take the first N distinct documents of each language (before cleaning)",
    )
    parser.add_argument(
        "--clean",
        action="store_true",
        help="leave out what StarCoder's basic filters do: long lines, generated files, ...",
    )
    parser.add_argument(
        "--near-dedup", action="store_true", help="leave out near duplicates, by MinHash"
    )
    parser.add_argument(
        "--shard",
        default="0/1",
        metavar="I/N",
        help="write every N-th part from the I-th: one of N machines",
    )
    parser.add_argument(
        "--validation",
        type=float,
        default=0.05,
        metavar="P",
        help="share of the documents held out (default: 0.05)",
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one for each core)"
    )
    arguments = vars(parser.parse_args(argv))
    if report_of := arguments.pop("report"):
        print(summary(read_meta(report_of)))
        print(f"A picture of it is in {report(report_of)}.")
        return
    if arguments["out"] is None:
        parser.error("the following arguments are required: --out")
    arguments |= {
        "shard": _shard(arguments["shard"]),
        "languages": arguments["languages"] and arguments["languages"].split(","),
    }
    begin = time.perf_counter()
    if meta := prepare(**arguments):
        seconds = time.perf_counter() - begin
        print(summary(meta))
        size = sum(counts["bytes"] for counts in meta["languages"].values())
        print(
            f"{seconds:,.0f} s, {size / 1e6 / seconds:.1f} MB/s; `python corpus.py --report {arguments['out']}` draws a picture of it"
        )


if __name__ == "__main__":
    run_command(main)
