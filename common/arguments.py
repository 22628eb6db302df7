"""The arguments of a program as a dataclass: each field brings its help, its limits and its flag.

@dataclass
class Config:
    steps: int = option(1000, "optimizer steps")
    dtype: str = option("auto", "of the computation", choices=("auto", "float32"))
"""

import argparse
import math
from dataclasses import field, fields


def option(default, help, least=None, choices=None):
    """A field with a help text and limits, which `check_fields` checks.

    least: the least value of a number; 1 for an int and 0 for a float if None. choices: all values
    that a string may have.
    """
    return field(default=default, metadata={"help": help, "least": least, "choices": choices})


def check_fields(config):
    """Raises ValueError if a field of a dataclass is out of its limits."""
    for f in fields(config):
        value = getattr(config, f.name)
        choices = f.metadata["choices"]
        least = f.metadata["least"]
        if choices and value not in choices:
            raise ValueError(f"{f.name} must be one of {', '.join(choices)}, got {value}")
        if f.type is int:
            least = 1 if least is None else least
            if not least <= value < 2**62:
                raise ValueError(f"{f.name} must be at least {least}, got {value}")
        if f.type is float:
            least = 0 if least is None else least
            if not least <= value < math.inf:
                raise ValueError(f"{f.name} must be a number from {least:g} up, got {value}")


def add_flags(parser, kind, preset, leave_out=()):
    """Adds a flag for each field of the dataclass `kind` to a parser: --batch-size for batch_size.

    preset: the name of the preset whose values are the defaults, for the help. A flag that is not
    given is not in the parsed arguments. leave_out: names of fields that get no flag.
    """
    for f in fields(kind):
        if f.name in leave_out:
            continue
        if f.type is bool:
            how = {"action": argparse.BooleanOptionalAction}
        else:
            value = f.type if isinstance(f.type, type) else int  # "int | None"
            how = {"type": value, "metavar": value.__name__.upper()}
        parser.add_argument(
            "--" + f.name.replace("_", "-"),
            default=argparse.SUPPRESS,
            help=f"{f.metadata['help']} ({preset}: {f.default})".replace("%", "%%"),
            **how,
        )
