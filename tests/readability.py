"""How easy the code is to read, in numbers: `python tests/readability.py [FILE...]`.

Without arguments it measures this project, file by file and in three groups: the four files that
are the project, everything but tests and notebooks, and the tests. Any Python file can be named
instead, such as one of nanoGPT's, for comparison.

The numbers are hints, not a grade. Many AST nodes a line mean packed lines, many tuple assignments
(`a, b = c, d`) mean two thoughts in one line, and few comments mean that nobody says why. Shares
and densities are of the lines that are not blank, so that blank lines cannot improve them.
"""

import argparse
import ast
import json
import os
import re
import subprocess
import sys
import tokenize

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
THE_FOUR = ["kernels.py", "starencoder.py", "data.py", "train.py"]
COLUMNS = 100  # the longest line
LONG_FUNCTION = 60  # lines; above this a function needs a reason
HEADER = "{:34} {:>6} {:>6} {:>6} {:>7} {:>9} {:>6}"
FIGURES = "{:34} {:6,} {:6.1f} {:6.1f} {:7.1f} {:9.1f} {:6}"


def count(path):
    """Counts in one Python file, as a dict. They add up over files."""
    with open(path, "rb") as f:
        source = f.read()
    with open(path, "rb") as f:
        tokens = list(tokenize.tokenize(f.readline))
    tree = ast.parse(source)
    # `a = b + 1` has eight nodes: the operator and the names' contexts are nodes as well.
    nodes = list(ast.walk(tree))
    lines = source.decode().splitlines()

    # A "#" in a string is no comment, which only a tokenizer can tell.
    comment_lines = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    long_functions = [
        f"{node.name} ({length_of(node)})"
        for node in nodes
        if isinstance(node, ast.FunctionDef) and length_of(node) > LONG_FUNCTION
    ]
    return {
        "lines": len(lines),
        "written": sum(bool(line.strip()) for line in lines),
        "long_lines": sum(len(line) > COLUMNS for line in lines),
        "nodes": len(nodes),
        "tuple_assignments": sum(is_tuple_assignment(node) for node in nodes),
        "comment_lines": len(comment_lines),
        "long_functions": long_functions,
    }


def length_of(function):
    """Lines of a function, its docstring included."""
    return function.end_lineno - function.lineno + 1


def is_tuple_assignment(node):
    """True for `a, b = c, d`. Unpacking one value, as in `a, b = f()`, is fine."""
    if not isinstance(node, ast.Assign) or not isinstance(node.value, ast.Tuple):
        return False
    return any(isinstance(target, ast.Tuple) for target in node.targets)


def total(counts):
    """The sum of the counts of several files."""
    sums = {key: sum(c[key] for c in counts) for key in counts[0] if key != "long_functions"}
    return sums | {"long_functions": sum((c["long_functions"] for c in counts), [])}


def figures(counts):
    """What is printed and kept: shares and densities of the counts."""
    lines = max(1, counts["written"])
    return {
        "lines": counts["lines"],
        "percent of lines over 100 columns": round(100 * counts["long_lines"] / lines, 1),
        "AST nodes a line": round(counts["nodes"] / lines, 1),
        "tuple assignments in 100 lines": round(100 * counts["tuple_assignments"] / lines, 1),
        "comments in 100 lines": round(100 * counts["comment_lines"] / lines, 1),
        "functions over 60 lines": counts["long_functions"],
    }


def tracked_files(root):
    """The Python files of a checkout that git knows, or is about to."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    listing = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return sorted({file for file in listing.split() if os.path.exists(os.path.join(root, file))})


def measure_project(root):
    """{name of a file or group: its figures} of a checkout of this project."""
    counts = {file: count(os.path.join(root, file)) for file in tracked_files(root)}
    # Notebooks are lessons, with scripts that belong to them, and count for neither.
    tests = [file for file in counts if file.startswith("tests/")]
    code = [file for file in counts if not file.startswith(("tests/", "notebooks/"))]
    groups = {
        "the four files": THE_FOUR,
        "all but tests and notebooks": code,
        "tests": tests,
    }
    table = {file: figures(counts[file]) for file in code + tests}
    return table | {
        name: figures(total([counts[file] for file in files])) for name, files in groups.items()
    }


def print_table(table):
    """One row for each file or group, then the long functions by name."""
    print(HEADER.format("", "lines", "over", "nodes", "tuples", "comments", "long"))
    print(HEADER.format("", "", "100, %", "a line", "in 100", "in 100", "def"))
    for name, row in table.items():
        *numbers, long_functions = row.values()
        print(FIGURES.format(name, *numbers, len(long_functions)))
    for name, row in table.items():
        if row["functions over 60 lines"] and name.endswith(".py"):
            print(f"{name}, lines: {', '.join(row['functions over 60 lines'])}")


def main():
    parser = argparse.ArgumentParser(description="Measure how easy the code is to read.")
    parser.add_argument("files", nargs="*", help="Python files (default: those of this project)")
    parser.add_argument("--root", default=ROOT, help="another checkout of this project")
    parser.add_argument("--json", metavar="FILE", help="add the figures to this JSON file")
    parser.add_argument("--name", default="after", help="the figures' name there (default: after)")
    arguments = parser.parse_args()

    if arguments.files:
        result = {"files": {file: figures(count(file)) for file in arguments.files}}
    else:
        with open(os.path.join(arguments.root, "README.md"), encoding="utf-8") as f:
            words = len(f.read().split())
        result = {"words of README.md": words, "files": measure_project(arguments.root)}
    print_table(result["files"])
    if "words of README.md" in result:
        print(f"README.md: {result['words of README.md']:,} words")

    # Figures of other names stay in the file: "before" beside "after".
    if arguments.json:
        kept = {}
        if os.path.exists(arguments.json):
            with open(arguments.json, encoding="utf-8") as f:
                kept = json.load(f)
        kept[arguments.name] = result
        with open(arguments.json, "w", encoding="utf-8") as f:
            # One line for each file: what lies four levels deep joins the line above.
            f.write(re.sub(r"\n {4,}|\n {3}(?=})", " ", json.dumps(kept, indent=1)) + "\n")


if __name__ == "__main__":
    sys.exit(main())
