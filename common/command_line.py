"""Programs that end with one line and an exit status instead of a traceback."""

import argparse
import os
import sys

from tqdm import tqdm


class CommandLine(argparse.ArgumentParser):
    """An argument parser whose errors are one line and exit status 2, not a page of usage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        """Ends the program."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run_command(main):
    """Runs `main`. Bad input (a ValueError or an OSError) ends it with one line and status 2."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has seen enough, as in `... | head`. Nothing more can be written,
        # not even by the interpreter as it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)  # the status of a process that SIGPIPE ends
    except (ValueError, OSError) as error:
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def program_name():
    """The name under which this program was started: `train.py`, or `python -m corpus`."""
    directory, name = os.path.split(sys.argv[0])
    return f"python -m {os.path.basename(directory)}" if name == "__main__.py" else name


def first_line(error, longest=100):
    """The first line of an error's message, or its type if it has none; cut after so many
    characters.
    """
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0][:longest]


def speed_of(texts, seconds):
    """How fast texts were read: "1.20 MB in 3.4 s, 0.35 MB/s"."""
    megabytes = sum(len(text.encode(errors="replace")) for text in texts) / 1e6
    return f"{megabytes:.2f} MB in {seconds:.1f} s, {megabytes / seconds:.2f} MB/s"


def warn(text):
    """Prints a warning above the progress bar."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
