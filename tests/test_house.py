"""The rules of the house, read off the files: who imports whom, who looks at whose private names.

`pytest -s tests/test_house.py -k import_graph` prints the graph of imports.
"""

import ast
import functools
import graphlib
import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT
from readability import COLUMNS, tracked_files

# What each room and each of the four files may import. Whatever is missing here would be an arrow
# upward, or knowledge that the file should not have: the model does not know the data, say.
MAY_IMPORT = {
    "common": set(),
    "kernels": set(),
    "corpus": {"common"},
    "data": {"common", "corpus"},
    "starencoder": {"common", "kernels", "corpus"},  # the tokenizer, for its command line
    "training": {"common", "kernels", "starencoder"},
    "train": {"common", "kernels", "corpus", "data", "starencoder", "training"},
}
MAY_IMPORT["finetune"] = {*MAY_IMPORT, "train"}
MAY_IMPORT["pii"] = {*MAY_IMPORT}
MAY_IMPORT["ptx"] = {"common", "kernels"}
MAY_IMPORT["bench"] = {*MAY_IMPORT}

TOP_LEVEL = set(
    "kernels.py starencoder.py data.py train.py common corpus training finetune pii ptx bench "
    "notebooks tests results README.md CONTRIBUTING.md CITATION.cff LICENSE requirements.txt "
    "requirements-cluster.txt pyproject.toml .ci .gitignore .github .pre-commit-hooks.yaml".split()
)

COMMANDS = [
    ["train.py"],
    ["starencoder.py"],
    ["starencoder.py", "fill-mask"],
    ["starencoder.py", "embed"],
    ["-m", "corpus"],
    ["-m", "finetune"],
    ["-m", "pii"],
    *(["-m", "pii", name] for name in ("train", "eval", "detect", "redact")),
    ["-m", "bench"],
    ["-m", "bench", "pictures"],
    ["-m", "ptx"],
    ["tests/any_cpu.py"],
    ["tests/readability.py"],
]


@functools.cache
def tree_of(file):
    with open(os.path.join(ROOT, file), encoding="utf-8") as f:
        return ast.parse(f.read())


def code_files():
    return [f for f in tracked_files(ROOT) if not f.startswith(("tests/", "notebooks/"))]


def module_of(file):
    """corpus/store.py -> corpus.store; corpus/__init__.py -> corpus."""
    return file[: -len(".py")].replace("/", ".").removesuffix(".__init__")


MODULES = {module_of(file): file for file in code_files()}


def imports_of(tree):
    """(module of this project, name taken from it or None, name bound here), import by import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in MODULES:
                    yield alias.name, None, alias.asname or alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                bound = alias.asname or alias.name
                if f"{node.module}.{alias.name}" in MODULES:
                    yield f"{node.module}.{alias.name}", None, bound
                elif node.module in MODULES:
                    yield node.module, alias.name, bound


def import_graph():
    """{module: set of the modules that it imports}, imports inside functions included."""
    return {
        module: {imported for imported, *_ in imports_of(tree_of(file))}
        for module, file in MODULES.items()
    }


def room(module):
    return module.split(".")[0]


def test_import_graph_has_no_circle_and_no_arrow_upward():
    graph = import_graph()
    rooms = {name: set() for name in MAY_IMPORT}
    for module, imported in graph.items():
        rooms[room(module)] |= {room(other) for other in imported} - {room(module)}

    print()
    for name in MAY_IMPORT:
        print(f"{name:12} <- {' '.join(sorted(rooms[name])) or '-'}")
        for module in sorted(module for module in graph if room(module) == name):
            if graph[module]:
                print(f"    {module:24} {' '.join(sorted(graph[module]))}")

    upward = {
        f"{module} imports {other}"
        for module, imported in graph.items()
        for other in imported
        if room(other) != room(module) and room(other) not in MAY_IMPORT[room(module)]
    }
    assert not upward
    # Training knows the model only to say what a run costs, and to show what a run has learned.
    assert {m for m in graph if room(m) == "training" and "starencoder" in graph[m]} <= {
        "training.plan",
        "training.report",
    }
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, with the circle


def is_private(name):
    """True for _name, but not for __name__ and what every NamedTuple has."""
    if name in ("_fields", "_replace", "_asdict", "_make"):
        return False
    return name.startswith("_") and not name.startswith("__")


def private_definitions(tree):
    """The private names that a file defines: functions, classes, globals and attributes."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in names if is_private(name)}


def private_uses(tree):
    """(line, name) of each private name that is reached for: imported, as attribute, by setattr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1:
            if isinstance(node.args[1], ast.Constant) and isinstance(node.args[1].value, str):
                yield node.lineno, node.args[1].value


def test_private_names_stay_in_their_file():
    files = tracked_files(ROOT)
    defined = {file: private_definitions(tree_of(file)) for file in files}
    found = []
    for file in files:
        elsewhere = set().union(*(names for other, names in defined.items() if other != file))
        for line, name in private_uses(tree_of(file)):
            if is_private(name) and name in elsewhere - defined[file]:
                found.append(f"{file}:{line}: {name}")
    assert not found, "\n".join(found)


def root_name(node):
    """a of a.b.c, or the first word of a string; None for anything else."""
    while isinstance(node, ast.Attribute):
        node = node.value
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value.split(".")[0]
    return node.id if isinstance(node, ast.Name) else None


def test_no_mock_of_the_project_itself():
    found = []
    for file in tracked_files(ROOT):
        tree = tree_of(file)
        own = {bound for *_, bound in imports_of(tree)} | {room(module) for module in MODULES}
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
                words = ast.unparse(node.func).split(".")
                if words[-1] != "setattr" and "patch" in words and root_name(node.args[0]) in own:
                    found.append(f"{file}:{node.lineno}: {ast.unparse(node)[:70]}")
    assert not found, "\n".join(found)
    programs = [file for file in code_files() if "import mock" in ast.unparse(tree_of(file))]
    assert not programs


def test_no_line_is_longer_than_100_columns():
    found = []
    for file in tracked_files(ROOT):
        with open(os.path.join(ROOT, file), encoding="utf-8") as f:
            lengths = [len(line.rstrip("\n")) for line in f]
        found += [f"{file}:{i}: {n}" for i, n in enumerate(lengths, 1) if n > COLUMNS]
    assert not found, "\n".join(found)


def test_nothing_unknown_at_the_top():
    listing = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert {path.split("/")[0] for path in listing.stdout.splitlines()} <= TOP_LEVEL


@pytest.mark.slow
@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_has_help(words):
    file = f"{words[1]}/__main__.py" if words[0] == "-m" else words[0]
    if not os.path.exists(os.path.join(ROOT, file)):
        pytest.skip("this room is not here yet")
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(
        [sys.executable, *words, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(f"{end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime:.1f} CPU seconds")
    assert result.returncode == 0 and "usage:" in result.stdout, result.stderr
