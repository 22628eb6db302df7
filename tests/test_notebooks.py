"""The notebooks: their outputs are those of the code, no exercise comes solved, each solution solves it; and the five changes fit.

What a trained model says depends on how a CPU rounds, and what a clock says on the day. A cell that prints either has the tag `varies`:
its text is not compared, and its assertions say what holds everywhere. Any other cell prints the same on all machines.
"""

import glob
import math
import os
import re
import shlex
import shutil
import subprocess
import sys

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient

NOTEBOOKS = sorted(glob.glob(os.path.join(ROOT, "notebooks", "*.ipynb")))
CHANGES = sorted(glob.glob(os.path.join(ROOT, "notebooks", "changes", "*.diff")))
NUMBER = re.compile(r"(?<![\w.])[-+]?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?")
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
    """What a cell prints, without the width of blanks."""
    said = [
        o.get("text", "") if o.output_type == "stream" else o.get("data", {}).get("text/plain", "")
        for o in cell.get("outputs", [])
    ]
    return " ".join("".join(said).split())


def same(a, b):
    """Equal words, and numbers within 5 % or one of their last digit."""
    if NUMBER.sub("#", a) != NUMBER.sub("#", b):
        return False
    for x, y in zip(NUMBER.findall(a), NUMBER.findall(b)):
        digits = len(x.split("e")[0].partition(".")[2])
        if not math.isclose(
            float(x.replace(",", "")),
            float(y.replace(",", "")),
            rel_tol=0.05,
            abs_tol=1.01 * 10**-digits,
        ):
            return False
    return True


def test_what_same_means():
    assert same("loss 4.57, 1,024 tokens", "loss  4.50, 1,030 tokens".replace("  ", " "))
    assert same("0.01 off", "0.02 off") and not same("0.11 off", "0.13 off")
    assert not same("solved", "not solved") and not same("1 token", "1 2 token")


def test_the_comparison_sees_other_outputs():
    cells = [
        c for path in NOTEBOOKS for c in nbformat.read(path, 4).cells if "checker" not in tags(c)
    ]
    cells = [
        c for c in cells if text_of(c).replace("<Figure", "")[:1].strip(" 0123456789")
    ]  # words, not a picture alone
    assert len(cells) > 30
    assert not any(same(text_of(a), text_of(b)) for a, b in zip(cells, cells[1:]))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_form(path):
    cells = nbformat.read(path, 4).cells
    code = [cell for cell in cells if cell.cell_type == "code"]
    assert len(cells) <= 30
    assert all(cell.execution_count for cell in code) and any(
        "image/png" in o.get("data", {}) for c in code for o in c.outputs
    )
    assert not [
        o
        for cell in code
        for o in cell.outputs
        if o.output_type == "error" or o.get("name") == "stderr"
    ]
    assert all(o.get("text", "").count("\n") <= 40 for cell in code for o in cell.outputs)
    exercises = [cell for cell in code if "checker" in tags(cell)]
    assert 3 <= len(exercises) <= 5 and set(solutions(path)) == set(range(1, len(exercises) + 1))
    assert all("not solved yet" in text_of(cell) for cell in exercises)
    assert all("assert" in cell.source for cell in code if "varies" in tags(cell))


def test_no_cell_repeats_the_code():
    """At most 6 lines in a row are lines of the project in a row."""
    lines = lambda text: [line.strip() for line in text.splitlines() if line.strip()]
    runs = lambda found: {tuple(found[i : i + 7]) for i in range(len(found) - 6)}
    project = set().union(
        *(runs(lines(read(path))) for path in glob.glob(os.path.join(ROOT, "*.py")))
    )
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            assert not runs(lines(cell.source)) & project, (name_of(path), cell.source)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=name_of)
def test_executes_as_it_stands_here(path):
    """Each checker fails on its stub and passes on the solution; all cells but those that vary say again what they say here."""
    committed, notebook = nbformat.read(path, 4), nbformat.read(path, 4)
    now, cells, solved = list(notebook.cells), [], []
    for cell in now:
        cells.append(cell)
        if "checker" in tags(cell):
            solved.append(nbformat.v4.new_code_cell(cell.source))
            cells += [nbformat.v4.new_code_cell(solutions(path)[len(solved)]), solved[-1]]
    environment = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "STARENCODER_KERNELS")
    }
    notebook.cells = cells
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": os.path.dirname(path)}},
    )
    client.execute(env=environment)
    for number, cell in enumerate(solved, 1):
        assert text_of(cell).endswith(f"Exercise {number}: solved"), text_of(cell)

    version = lambda nb: nb.metadata.language_info.version.rsplit(".", 1)[0]
    if version(notebook) == version(committed):  # the texts are those of Python's standard library
        for old, new in zip(committed.cells, now, strict=True):
            if "varies" not in tags(old):
                assert same(text_of(old), text_of(new)), (
                    f"{old.source}\n\nsaid: {text_of(old)}\n\nsays: {text_of(new)}"
                )
            images = [
                sum("image/png" in o.get("data", {}) for o in cell.get("outputs", []))
                for cell in (old, new)
            ]
            assert images[0] == images[1]


@pytest.mark.parametrize("path", CHANGES, ids=name_of)
def test_a_change_is_short(path):
    changed = [line for line in read(path).splitlines() if re.match(r"[-+](?!--|\+\+)", line)]
    assert 1 <= len(changed) <= 25


@pytest.mark.slow
@pytest.mark.parametrize("path", CHANGES, ids=name_of)
def test_a_change_applies_and_its_test_passes(path, tmp_path):
    """On a copy of the project: the change applied, and the command run that stands in its first lines after `Must still pass: `."""
    for source in glob.glob(os.path.join(ROOT, "*.py")) + [os.path.join(ROOT, "pyproject.toml")]:
        shutil.copy(source, tmp_path)
    shutil.copytree(
        os.path.join(ROOT, "tests"),
        tmp_path / "tests",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    subprocess.run(
        ["git", "apply", path],
        cwd=tmp_path,
        check=True,
        env={**os.environ, "GIT_CEILING_DIRECTORIES": str(tmp_path.parent)},
    )
    command = re.search(r"^Must still pass: pytest (.*)$", read(path), re.M)[1]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *shlex.split(command)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert re.search(r"\d+ passed", done.stdout)
