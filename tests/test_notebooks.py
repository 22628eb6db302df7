"""The notebooks print what is stored in them, the solutions solve the exercises, the changes apply.

What a trained model says depends on how a CPU rounds, and what a clock says on the day. A cell that
prints either has the tag `varies`: its text is not compared, and its assertions say what holds
everywhere. Any other cell prints the same on all machines.
"""

import glob
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pytest
from conftest import ROOT
from readability import COLUMNS, tracked_files

# A machine with a GPU that is lent for its tests may lack them; the README's install has them.
nbformat = pytest.importorskip("nbformat")
NotebookClient = pytest.importorskip("nbclient").NotebookClient

NOTEBOOKS = sorted(glob.glob(os.path.join(ROOT, "notebooks", "*.ipynb")))
CHANGES = sorted(glob.glob(os.path.join(ROOT, "notebooks", "changes", "*.diff")))
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "corpora", "runs", "notebooks", "results")
AT_ONCE = min(2, os.cpu_count())  # notebooks, or changes
name_of = os.path.basename


def read(path):
    with open(path, encoding="utf-8") as f:
        return f.read()


def tags(cell):
    return cell.metadata.get("tags", [])


def solutions(path):
    """{number: code} of the exercises of a notebook."""
    name = name_of(path).removesuffix(".ipynb")
    found = re.findall(
        rf"### {name}, exercise (\d+)\n.*?```python\n(.*?)```",
        read(os.path.join(ROOT, "notebooks", "solutions.md")),
        re.S,
    )
    return {int(number): code for number, code in found}


def text_of(cell):
    """What a cell prints, with one blank between words."""
    texts = []
    for output in cell.get("outputs", []):
        if output.output_type == "stream":
            texts.append(output.text)
        else:
            texts.append(output.get("data", {}).get("text/plain", ""))
    return " ".join("".join(texts).split())


def images_of(cell):
    """How many pictures a cell shows."""
    return sum("image/png" in output.get("data", {}) for output in cell.get("outputs", []))


def same(a, b):
    """True for equal words, and numbers within 5 % or within 1 in their last digit."""
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)):
        digits = len(x.split("e")[0].partition(".")[2])  # behind the point
        last_digit = 1.01 * 10**-digits
        x = float(x.replace(",", ""))
        y = float(y.replace(",", ""))
        if not math.isclose(x, y, rel_tol=0.05, abs_tol=last_digit):
            return False
    return True


def test_what_same_means():
    assert same("loss 4.57, 1,024 tokens", "loss 4.50, 1,030 tokens")
    assert same("0.01 off", "0.02 off")
    assert not same("0.11 off", "0.13 off")
    assert not same("solved", "not solved")
    assert not same("1 token", "1 2 token")


def test_the_comparison_sees_other_outputs():
    """No output passes for that of the next cell, whatever `same` tolerates."""
    texts = []
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            text = text_of(cell)
            words = text.replace("<Figure", "").strip(" 0123456789")  # not only a picture
            if words and "checker" not in tags(cell):
                texts.append(text)
    assert len(texts) > 30
    assert not any(same(a, b) for a, b in zip(texts, texts[1:]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_form(path):
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    outputs = [output for cell in code for output in cell.outputs]
    assert len(cells) <= 30
    assert max(len(line) for cell in code for line in cell.source.split("\n")) <= COLUMNS

    # Every cell was run, without an error or a warning.
    assert all(cell.execution_count for cell in code)
    assert any(images_of(cell) for cell in code)
    assert all(output.output_type != "error" for output in outputs)
    assert all(output.get("name") != "stderr" for output in outputs)
    assert all(output.get("text", "").count("\n") <= 40 for output in outputs)
    assert all("assert" in cell.source for cell in code if "varies" in tags(cell))

    # The exercises have solutions, and are not solved yet.
    checkers = [cell for cell in code if "checker" in tags(cell)]
    assert 3 <= len(checkers) <= 5
    assert set(solutions(path)) == set(range(1, len(checkers) + 1))
    assert all("not solved yet" in text_of(cell) for cell in checkers)


def stretches(text):
    """All stretches of 7 lines of a text, without blank ones and indentation."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return {tuple(lines[i : i + 7]) for i in range(len(lines) - 6)}


def test_no_cell_repeats_the_code():
    """A cell imports the project's code; it has at most 6 lines of it in a row."""
    project = set()
    for file in tracked_files(ROOT):
        if not file.startswith(("tests/", "notebooks/")):
            project |= stretches(read(os.path.join(ROOT, file)))
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            assert not stretches(cell.source) & project, (name_of(path), cell.source)


class Executed(NamedTuple):
    """A notebook that was executed with its solutions."""

    notebook: Any
    cells: list  # those that are stored in it, with what they print now
    solved: list  # its checkers again, each behind its solution


def execute(path, directory):
    """Executes a notebook: behind each checker, the solution and the checker again."""
    notebook = nbformat.read(path, 4)
    originals = list(notebook.cells)
    cells = []
    solved = []
    for cell in originals:
        cells.append(cell)
        if "checker" in tags(cell):
            solved.append(nbformat.v4.new_code_cell(cell.source))
            cells += [nbformat.v4.new_code_cell(solutions(path)[len(solved)]), solved[-1]]
    notebook.cells = cells
    resources = {"metadata": {"path": os.path.dirname(path)}}
    client = NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources)
    ours = ("TRITON_INTERPRET", "STARENCODER_KERNELS")  # set by these tests
    client.execute(env={k: v for k, v in environment().items() if k not in ours})
    return Executed(notebook, originals, solved)


def run_changed(path, directory):
    """Applies a change to a copy of the project, and runs what `Must still pass` names."""
    copy = os.path.join(directory, "copy")
    shutil.copytree(ROOT, copy, ignore=NOT_COPIED)
    # Or git would look for a repository in the directories above.
    of_git = environment() | {"GIT_CEILING_DIRECTORIES": str(directory)}
    subprocess.run(["git", "apply", path], cwd=copy, check=True, env=of_git)
    command = re.search(r"^Must still pass: pytest (.*)$", read(path), re.M)[1]
    pytest_command = [sys.executable, "-m", "pytest", "-q", *shlex.split(command)]
    return subprocess.run(
        pytest_command, cwd=copy, env=environment(), capture_output=True, text=True
    )


def environment():
    """That of a process which shares the cores with another one."""
    return {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // AT_ONCE))} | os.environ


@pytest.fixture(scope="module")
def work(request, tmp_path_factory):
    """{test: a future of what it looks at}. Two processes work at once, in the tests' order."""
    functions = {
        "test_prints_what_is_stored": execute,
        "test_a_change_applies_and_its_test_passes": run_changed,
    }
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = {}
        for test in request.session.items:
            if test.path == request.path and test.originalname in functions:
                path = test.callspec.params["path"]
                directory = tmp_path_factory.mktemp("work")
                function = functions[test.originalname]
                futures[test.nodeid] = pool.submit(function, path, directory)
        yield futures
        pool.shutdown(wait=False, cancel_futures=True)  # if a failure ended the tests


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_prints_what_is_stored(path, work, request):
    """Each checker fails on its stub and passes on the solution; other cells print the same again.

    What a cell with the tag `varies` prints is not compared.
    """
    stored = nbformat.read(path, 4)
    executed = work[request.node.nodeid].result()
    for number, cell in enumerate(executed.solved, 1):
        assert text_of(cell).endswith(f"Exercise {number}: solved"), text_of(cell)

    # The texts that the notebooks read are those of Python's standard library.
    versions = [nb.metadata.language_info.version for nb in (executed.notebook, stored)]
    if versions[0].rsplit(".", 1)[0] != versions[1].rsplit(".", 1)[0]:
        return
    for old, new in zip(stored.cells, executed.cells, strict=True):
        before = text_of(old)
        now = text_of(new)
        words = f"{old.source}\n\nstored: {before}\n\nprinted now: {now}"
        assert "varies" in tags(old) or same(before, now), words
        assert images_of(old) == images_of(new)


@pytest.mark.parametrize("path", CHANGES, ids=name_of)
def test_a_change_is_short(path):
    changed = [line for line in read(path).splitlines() if re.match(r"[-+](?!--|\+\+)", line)]
    assert 1 <= len(changed) <= 25
    assert max(map(len, changed)) <= 1 + COLUMNS


@pytest.mark.slow
@pytest.mark.parametrize("path", CHANGES, ids=name_of)
def test_a_change_applies_and_its_test_passes(path, work, request):
    """The change applies to a copy of the project, and what `Must still pass` names passes."""
    done = work[request.node.nodeid].result()
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed", done.stdout)
