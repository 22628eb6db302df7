"""TODO."""

import argparse
import os
import sys

from tqdm import tqdm


class CommandLine(argparse.ArgumentParser):
    """The argument parser of all programs here: a bad flag is one line and exit status 2, not a page of usage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        """Ends the program."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run_command(main):
    """Runs a program_name: bad input, which is a ValueError or an OSError everywhere here, becomes one line and exit status 2."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output has enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)  # as of a process that SIGPIPE ends
    except (ValueError, OSError) as error:
        print(f"{program_name()}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def program_name():
    """The name under which this was started."""
    directory, name = os.path.split(sys.argv[0])
    return f"python -m {os.path.basename(directory)}" if name == "__main__.py" else name


def first_line(error):
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def warn(text):
    """Says what went wrong and is tried again."""
    tqdm.write(f"warning: {text}", file=sys.stderr)
