"""TODO."""

from dataclasses import field


def option(default, help):
    """A field of `TrainConfig` that says what it is, also to `--help`."""
    return field(default=default, metadata={"help": help})
