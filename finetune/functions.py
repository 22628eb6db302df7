"""The functions of source files: the pieces that a search finds.

Python is parsed: functions and methods, with their decorators, and with what is nested in them. Any
other language, and Python that does not parse, is cut by its indentation. There, a header is a line
that opens a block of deeper indentation, at the outermost level or within a class; a brace may
stand on a line of its own. A class that has such headers in it is no piece, but they are.

    class Ring {              not a piece, as it has members
        int size;
        /* Adds a value. */
        void add(int v) {     a piece: 4 lines, named "void add(int v) {"
            ...
        }
    }

A file without any of these is one piece. Left out: top-level statements beside functions, and all
that a real parser of each language would know.
"""

import ast
import os
import re
import warnings
from collections import Counter
from typing import NamedTuple

from corpus.documents import BINARY
from corpus.languages import language_of
from corpus.records import may_be_document
from corpus.sources import files_in

LARGEST = 1_000_000  # bytes of a file; what is larger was written by a program
LONGEST_NAME = 100  # characters


class Function(NamedTuple):
    """A function or a method, or a whole file without any."""

    path: str
    line: int  # of `def`, or of the header; from 1
    name: str  # Class.method; or the header itself, if the file is not parsed
    text: str  # with its docstring and decorators, or the comment above it; dedented


class PythonFunction(NamedTuple):
    """A function or a method, its docstring apart."""

    line: int  # of `def`, from 1
    name: str  # Class.method
    docstring: str | None  # cleaned, as by inspect.cleandoc
    code: str  # without the docstring; with decorators; dedented


# ---- files ---------------------------------------------------------------------------------------


def functions_under(paths, skipped=None):
    """Yields each `Function` of files and of those in directories, in the order of their names.

    skipped: a Counter, to which is added what is left out, by reason. Left out are files of unknown
    languages, of JSON, over 1 MB or with a NUL byte, and directories that `corpus.sources` does not
    enter.
    Raises ValueError for a path that is missing.
    """
    skipped = Counter() if skipped is None else skipped
    for path in paths:
        if not os.path.exists(path):
            raise ValueError(f"{path}: no such file or directory")
    for path in paths:
        for file in files_in(path, skipped) if os.path.isdir(path) else [path]:
            text = _read(file, skipped)
            if text is not None:
                yield from functions_of(file, text)


def _read(path, skipped):
    """The text of a source file; None, and counted in `skipped`, if it is left out."""
    if not may_be_document(path, os.path.isfile(path), 0, skipped):
        return None
    try:
        with open(path, "rb") as f:
            content = f.read(LARGEST + 1)
    except OSError:  # it is gone, or private
        skipped["unreadable"] += 1
        return None
    if len(content) > LARGEST:
        skipped["over 1 MB"] += 1
    elif b"\0" in content:
        skipped[BINARY] += 1
    elif language_of(path, content) is None:
        skipped["no known extension"] += 1
    elif language_of(path, content) == "json":
        skipped["JSON, which has no functions"] += 1
    else:
        return content.decode("utf-8-sig", errors="replace")
    return None


def functions_of(path, text):
    """The functions of a source file, a list of `Function`; a blank file has none.

    path: decides on the language. Takes time linear in the text, and never raises.
    """
    if not text.strip():
        return []
    lines = _lines_of(text)
    tree = parsed(text) if language_of(path) == "python" else None
    if tree is None:
        found = [Function(path, *piece) for piece in _blocks_of(lines)]
    else:
        found = [
            Function(path, node.lineno, name, _dedented(lines[_first_line(node) : node.end_lineno]))
            for name, node in _definitions(tree)
        ]
    return found or [Function(path, 1, os.path.basename(path), text)]


def _lines_of(text):
    """The lines of a text without their ends, as Python's parser counts them.

    str.splitlines would also end a line at a form feed, among others.
    """
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _dedented(lines):
    """Lines as one text, without the indentation of the first; textwrap.dedent takes the least."""
    indentation = lines[0][: len(lines[0]) - len(lines[0].lstrip())]
    return "\n".join(line.removeprefix(indentation) for line in lines).rstrip()


# ---- Python --------------------------------------------------------------------------------------


def python_functions(text):
    """The functions of a Python file, a list of `PythonFunction`; [] if it does not parse.

    A function without any code beside its docstring is left out, as is one whose docstring shares a
    line with code.
    """
    tree = parsed(text)
    if tree is None:
        return []
    lines = _lines_of(text)
    found = []
    for name, node in _definitions(tree):
        docstring = ast.get_docstring(node)
        first = _first_line(node)
        if docstring is None:
            code = lines[first : node.end_lineno]
        elif _is_apart(node, lines):
            statement = node.body[0]
            code = lines[first : statement.lineno - 1]
            code += lines[statement.end_lineno : node.end_lineno]
        else:
            continue
        found.append(PythonFunction(node.lineno, name, docstring, _dedented(code)))
    return found


def parsed(text):
    """The syntax tree of a Python file, or None if it has none."""
    try:
        with warnings.catch_warnings():  # of invalid escapes, say; it is not our file
            warnings.simplefilter("ignore")
            return ast.parse(text.removeprefix("\ufeff"))
    # A NUL or half of a surrogate pair is a ValueError; the others are nested too deep.
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _definitions(tree):
    """Yields (qualified name, node) of functions and methods, in order, not of those in functions.

    They may stand in any statement, such as an `if` or a `try`.
    """
    waiting = [("", tree)]  # a stack, as `elif` after `elif` nests deeper than Python's own
    while waiting:
        prefix, node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield prefix + node.name, node
            continue
        if isinstance(node, ast.ClassDef):
            prefix += f"{node.name}."
        inner = [
            (prefix, child)
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
        ]
        waiting += reversed(inner)


def _first_line(node):
    """The index of a function's first line: of its first decorator, if it has one."""
    return min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1


def _is_apart(node, lines):
    """True if there is code behind a function's docstring, and none on the docstring's lines."""
    if len(node.body) == 1:
        return False
    docstring = node.body[0]
    # Python counts columns in bytes.
    before = lines[docstring.lineno - 1].encode()[: docstring.col_offset]
    return not before.strip() and docstring.end_lineno < node.body[1].lineno


# ---- any language, by indentation ----------------------------------------------------------------

# The header of a block that holds functions. In C, `struct a f(int b)` is the header of a function.
_CONTAINER = re.compile(
    r"[^(=]*?\b(class|interface|impl|trait|mod|module|namespace|object|extension|protocol|record"
    r'|package|contract|library|mixin|service|actor|instance)(\s+[\w"]|\s*[<{:]|$)'
    r"|[^(=]*?\b(struct|union|enum|extern)\b[^(]*$"
)
_COMMENT = re.compile(r"#(?![a-z])(?!.*\{$)|//|/?\*|--|%|;(?!\()")  # `#a {` is CSS
# Lines that stand anywhere and neither open nor close a block, besides comments: directives of the
# C preprocessor and access specifiers.
_APART = re.compile(r"#(?!.*\{$)|(public|private|protected)\s*:")
# Lines of a block that stand at the indentation of its header.
_CONTINUED = re.compile(
    r"[\])}]|\{$|(end|endif|endfunction|endmodule|fi|done|esac|else|elif|elsif|rescue|ensure|catch"
    r"|except|finally|begin|then|do)\b"
)


class _Line(NamedTuple):
    """A line that is neither blank nor a comment."""

    index: int
    indentation: int  # columns
    text: str  # stripped


class _Block:
    """A header, and the lines that belong to it so far."""

    def __init__(self, header):
        self.header = header
        self.is_container = bool(_CONTAINER.match(header.text))
        self.has_members = False


def _blocks_of(lines):
    """[(line, name, text), ...] of the blocks that are pieces, in order."""
    found = []
    opened = []  # blocks, each in the one before; all but the last are containers
    kept = list(_lines_with_code(lines))
    last = 0  # the index of the last line with code

    def close():
        block = opened.pop()
        if not block.has_members:
            header = block.header
            text = _dedented(lines[_comment_above(lines, header) : last + 1])
            found.append((header.index + 1, header.text[:LONGEST_NAME], text))

    for i, line in enumerate(kept):
        while opened and opened[-1].header.indentation > line.indentation:
            close()
        if opened and opened[-1].header.indentation == line.indentation:
            if not _CONTINUED.match(line.text):
                close()
        at_header = opened and opened[-1].header.indentation == line.indentation
        inside = not opened or opened[-1].is_container
        if not at_header and inside and _opens_block(kept, i):
            if opened:
                opened[-1].has_members = True
            opened.append(_Block(line))
        last = line.index
    while opened:
        close()
    return found


def _lines_with_code(lines):
    """Yields a `_Line` for each line that is neither blank nor a comment."""
    in_comment = False  # one that began on a line before
    for index, line in enumerate(lines):
        text = line.strip()
        if in_comment:
            in_comment = "*/" not in text
        elif text.startswith("/*"):
            in_comment = "*/" not in text
        elif text and not _COMMENT.match(text) and not _APART.match(text):
            space = line[: len(line) - len(line.lstrip())]
            yield _Line(index, len(space.expandtabs(4)), text)


def _opens_block(kept, i):
    """True if line i is a header: the next one is deeper, or a lone brace before a deeper one."""
    line = kept[i]
    following = kept[i + 1 : i + 3]
    if following and following[0].text == "{" and following[0].indentation == line.indentation:
        following = following[1:]
    is_deeper = bool(following) and following[0].indentation > line.indentation
    return is_deeper and any(map(str.isalpha, line.text))


def _comment_above(lines, header):
    """The index of the first line of the comment that ends right above a header, or the header's.

    The comment of a function in other languages is what a docstring is in Python.
    """
    index = header.index
    while index and _COMMENT.match(lines[index - 1].strip()):
        index -= 1
    return index
