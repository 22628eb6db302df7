"""Shared by all tests: hypothesis profiles, the kernels under test, and corpora made once."""

import contextlib
import importlib
import importlib.machinery
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import sysconfig

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, register_random, settings

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


class TorchRandom:
    """PyTorch's generator, as hypothesis wants it: every example starts it at one seed."""

    seed = staticmethod(torch.manual_seed)
    getstate = staticmethod(torch.get_rng_state)
    setstate = staticmethod(torch.set_rng_state)


torch_random = TorchRandom()  # hypothesis keeps only a weak reference
register_random(torch_random)

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
STDLIB = sysconfig.get_paths()["stdlib"]
MODULES = """
    abc argparse ast base64 bisect calendar cmd code codecs copy csv dataclasses difflib dis enum
    fractions functools glob
""".split()


# ---- the judge: `pytest tests/test_triton.py --kernels FILE` -------------------------------------

OPERATIONS = ("attention", "layer_norm", "dropout", "cross_entropy")  # see kernels.py
UNDER_TEST = "kernels_under_test"  # the name by which the module of FILE is imported


def pytest_addoption(parser):
    parser.addoption(
        "--kernels",
        metavar="FILE",
        help="judge the operations that this Python file defines, instead of those of kernels.py",
    )


def pytest_configure(config):
    path = config.getoption("--kernels")
    if path:
        import_kernels(path)


def import_kernels(path):
    """Imports a file of operations. Raises UsageError if it is none."""
    if not os.path.isfile(path):
        raise pytest.UsageError(f"--kernels {path}: there is no such file")
    loader = importlib.machinery.SourceFileLoader(UNDER_TEST, path)
    spec = importlib.util.spec_from_loader(UNDER_TEST, loader)
    module = importlib.util.module_from_spec(spec)
    sys.modules[UNDER_TEST] = module  # before it runs, as Triton looks up a kernel's module there
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())  # one line
        raise pytest.UsageError(f"--kernels {path}: it cannot be imported: {reason}") from None
    if not any(defines(module, name) for name in OPERATIONS):
        raise pytest.UsageError(f"--kernels {path}: it defines none of {', '.join(OPERATIONS)}")


def defines(module, operation):
    return callable(getattr(module, operation, None))


def kernels_under_test():
    """The module whose operations a test file judges: that of --kernels, or else kernels.py.

    A test that judges an operation has the mark `judges` with the operation's name.
    """
    return sys.modules.get(UNDER_TEST) or importlib.import_module("kernels")


def pytest_collection_modifyitems(config, items):
    """With --kernels, skips what judges no operation, or one that the file does not define."""
    path = config.getoption("--kernels")
    if not path:
        return
    for item in items:
        mark = item.get_closest_marker("judges")
        if mark is None:
            item.add_marker(pytest.mark.skip(reason="judges this project's own code"))
        elif not defines(kernels_under_test(), *mark.args):
            reason = f"{os.path.basename(path)} does not define {mark.args[0]}"
            item.add_marker(pytest.mark.skip(reason=reason))


# ---- what tests share ----------------------------------------------------------------------------


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
def encoder(small_corpus, tmp_path_factory):
    """A directory with a pretrained encoder, as it were."""
    # Not at the top: it imports the kernels, which are defined by then.
    from starencoder import StarEncoderConfig, StarEncoderForPreTraining

    out = str(tmp_path_factory.mktemp("encoder"))
    tokenizer = Tokenizer.from_pretrained(small_corpus)
    torch.manual_seed(0)
    config = StarEncoderConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=48,
        pad_token_id=tokenizer.pad_id,
        initializer_range=0.1,
    )
    StarEncoderForPreTraining(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


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
    # A handler that the program leaves behind would be inherited by a pool's workers, which then
    # survive `Pool.terminate`: it waits for them forever.
    on_sigterm = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__file__, *arguments])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                run_command(module.main)
            except SystemExit as end:
                status = end.code
            finally:
                signal.signal(signal.SIGTERM, on_sigterm)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def assert_refused(result, *words):
    """Asserts exit status 2 and one line that says what is wrong, in these words among others."""
    assert result.returncode == 2, result.stderr
    lines = result.stderr.strip().replace("\r", "\n").split("\n")  # \r: a progress bar
    errors = [line for line in lines if "error:" in line]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.stderr, result.stderr
    assert all(word in errors[0] for word in words), errors[0]
