"""The commands: python -m finetune TRAIN.jsonl, and predict or search with what came out."""

import sys

from common.arguments import add_flags
from common.command_line import CommandLine, run_command

# PyTorch takes seconds to import, so each command imports what it uses when it runs.

OTHER_COMMANDS = """\
other commands:
  python -m finetune predict DIR FILE...         what the model says of texts
  python -m finetune search DIR "query" PATH...  the functions that a query asks for
"""


def train_command(argv):
    """Fine-tunes an encoder."""
    import argparse

    import torch.distributed as dist

    from finetune.loop import FinetuneConfig, train

    parser = CommandLine(
        prog="python -m finetune",
        description="Fine-tune an encoder on JSON lines. Their keys say what is to be learned: "
        '{"text", "label"}, {"text", "labels"}, {"text", "score"}, {"text", "fragments"} or '
        '{"query", "code"}; for pairs, {"text_a", "text_b"} in place of "text".',
        epilog=OTHER_COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("train", metavar="TRAIN.jsonl", help="examples, as JSON lines")
    add_flags(parser, FinetuneConfig, "default", leave_out={"train"})
    config = FinetuneConfig(**vars(parser.parse_args(argv)))
    try:
        train(config)
    finally:  # else PyTorch warns at exit
        if dist.is_initialized():
            dist.destroy_process_group()


def predict_command(argv):
    """Prints what a model says of texts."""
    parser = CommandLine(
        prog="python -m finetune predict",
        description="What a fine-tuned model says of texts: a line of JSON for each.",
    )
    parser.add_argument("directory", metavar="DIR", help="what `python -m finetune` wrote")
    help = 'text files; of a .jsonl file, each line is one, with "text", or "text_a" and "text_b"'
    parser.add_argument("files", nargs="+", metavar="FILE", help=help)
    arguments = parser.parse_args(argv)

    from finetune.use import predict

    predict(arguments.directory, arguments.files)


def search_command(argv):
    """Prints the functions that a query asks for."""
    parser = CommandLine(
        prog="python -m finetune search",
        description="The functions of a repository that are closest to a query.",
    )
    help = "an encoder that was fine-tuned for search; any other works, but badly"
    parser.add_argument("directory", metavar="DIR", help=help)
    parser.add_argument("query", metavar="QUERY", help='such as "parse a date"')
    parser.add_argument("paths", nargs="+", metavar="PATH", help="files and directories")
    help = "how many functions to print (default: 10)"
    parser.add_argument("--top", type=int, default=10, metavar="N", help=help)
    arguments = parser.parse_args(argv)

    from finetune.use import search

    search(arguments.directory, arguments.query, arguments.paths, arguments.top)


def main(argv=None):
    """The command line. argv: without the program's name; by default, what it was called with."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["predict"]:
        predict_command(argv[1:])
    elif argv[:1] == ["search"]:
        search_command(argv[1:])
    else:
        train_command(argv)


if __name__ == "__main__":
    run_command(main)
