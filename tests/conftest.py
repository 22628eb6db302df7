"""Shared by all tests: hypothesis profiles, a small tokenizer, and corpora made once."""

import contextlib
import importlib
import io
import os
import shutil
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

import corpus
from common.command_line import run_command
from corpus.store import PartWriter, write_meta
from corpus.tokenizer import Tokenizer

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined


every_profile = {
    "deadline": None,
    "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
}
settings.register_profile("default", max_examples=25, **every_profile)
settings.register_profile("thorough", max_examples=500, **every_profile)
settings.register_profile(  # without shrinking the first failure
    "first_failure", max_examples=25, phases=[Phase.explicit, Phase.generate], **every_profile
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STDLIB = sysconfig.get_paths()["stdlib"]
MODULES = """
    abc argparse ast base64 bisect calendar cmd code codecs copy csv dataclasses difflib dis enum
    fractions functools glob
""".split()


@pytest.fixture(scope="session")
def sources(tmp_path_factory):
    """A directory with a few files of the standard library in it."""
    directory = tmp_path_factory.mktemp("sources")
    for name in MODULES:
        shutil.copy(os.path.join(STDLIB, f"{name}.py"), directory)
    return str(directory)


@pytest.fixture(scope="session")
def small_corpus(sources, tmp_path_factory):
    """A corpus of those files: vocabulary 600, a third of the documents held out."""
    out = str(tmp_path_factory.mktemp("corpora") / "small")
    corpus.prepare([sources], out, vocab_size=600, validation=0.34, workers=1)
    return out


@pytest.fixture(scope="session")
def tokenizer(small_corpus):
    return Tokenizer.from_pretrained(small_corpus)


@pytest.fixture(scope="session")
def stdlib_corpus(tmp_path_factory):
    """The whole standard library, as `python train.py` prepares it."""
    out = str(tmp_path_factory.mktemp("corpora") / "stdlib")
    corpus.prepare(None, out, vocab_size=4096)
    return out


def write_corpus(directory, tokenizer, *parts):
    """Writes a corpus of these parts, each a list of documents (lists of ids). Returns its path.

    The splits "train" and "validation" both hold all documents.
    """
    directory = str(directory)
    tokenizer.save_pretrained(directory)
    for number, documents in enumerate(parts):
        part = PartWriter(directory, number, np.uint16)
        for split in ("train", "validation"):
            for ids in documents:
                part.add(split, "python", len(ids), ids)
        part.close()
    write_meta(directory, len(parts), {}, tokenizer, np.dtype(np.uint16), [])
    return directory


def command(*arguments, **kwargs):
    """Runs `python ARGUMENTS...` as a user would."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=kwargs.pop("cwd", ROOT),
        timeout=600,
        **kwargs,
    )


def program(name, *arguments):
    """Runs `python -m ROOM` or `python NAME.py` in this process, which has all imports."""
    room = os.path.isdir(os.path.join(ROOT, name))
    module = importlib.import_module(f"{name}.__main__" if room else name)
    out = io.StringIO()
    err = io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *arguments])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run_command(module.main)
            except SystemExit as end:
                status = end.code
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def assert_refused(result, *words):
    """Asserts exit status 2 and one line that says what is wrong, in these words among others."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().replace("\r", "\n").split("\n")  # \r: a progress bar
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert all(word in errors[0] for word in words), errors[0]
