"""The findings that a repository has and keeps, so that a check reports only new ones.

    {
     "known": {
      "shop/backup.py": [
       "EMAIL 3fa2",
       "KEY 91bc"
      ]
     }
    }

A value is known in its file wherever it stands there and however often: lines move, and a model may
see one copy more today than yesterday, or take a password for a key. In another file it is new.
Paths are relative to the directory of the baseline, so that any working directory will do.

A baseline is read by all who read the repository, perhaps after the values have gone from it, so it
must not give them away. But what recognizes a value can be asked about each guess: salt does not
change that, and a slow hash makes a guess dear, not wrong. So only 16 bits of a hash are kept. Of a
million guesses some 15 fit, and nothing tells which of them is right. The hash has no salt: all
baselines and logs show the same 16 bits of a value, and together tell no more. The price: a new
value passes for one of the n that are known in its file with a probability of n in 65,536.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from common.files import read_json, write_whole
from pii.labels import CATEGORIES

ENTRY = re.compile(rf"({'|'.join(CATEGORIES)}) [0-9a-f]{{4}}")


def fingerprint(value):
    """16 bits of a value's SHA-256, as 4 hexadecimal digits."""
    value = value.replace("\r\n", "\n")  # Git may have changed the line ends of a private key
    return hashlib.sha256(value.encode("utf-8", "surrogatepass")).hexdigest()[:4]


def path_below(path, baseline):
    """The path of a file, relative to the directory of a baseline."""
    # Not that of the file to which a link leads: to write the baseline replaces the link.
    directory = os.path.realpath(os.path.dirname(baseline) or ".")
    return Path(os.path.relpath(os.path.realpath(path), directory)).as_posix()


class Baseline:
    """What the file at `path` knows.

    Raises ValueError if it is not there, or damaged.
    """

    def __init__(self, path):
        if not os.path.isfile(path):
            raise ValueError(f"{path!r}: no such file; --write-baseline makes a baseline")
        self.path = path
        self.known = set()  # of (path, fingerprint)
        files = read_json(path).get("known")
        if not isinstance(files, dict):
            raise ValueError(f'{path}: damaged (no object "known")')
        for file, entries in files.items():
            for entry in entries if isinstance(entries, list) else [None]:
                if not isinstance(entry, str) or not ENTRY.fullmatch(entry):
                    raise ValueError(f"{path}: damaged (under {file!r})")
                self.known.add((file, entry[-4:]))

    def knows(self, finding):
        """True if the value of a `Finding` is known in its file."""
        pair = (path_below(finding.path, self.path), fingerprint(finding.value))
        return pair in self.known


def write_baseline(path, findings):
    """Writes a baseline that knows a list of `Finding`s, sorted so that a diff can be read."""
    files = {}
    for finding in findings:
        entry = f"{finding.entity.category} {fingerprint(finding.value)}"
        files.setdefault(path_below(finding.path, path), set()).add(entry)
    known = {file: sorted(entries) for file, entries in sorted(files.items())}
    write_whole(path, json.dumps({"known": known}, indent=1) + "\n")
