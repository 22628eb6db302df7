"""Bugs that a program plants in the Triton kernels: small changes of one expression each.

Python's ast finds the places; only the text of that place changes. Bugs of one kind are ordered by
a hash of their names, and the first few are planted: the same ones each time, and mostly the same
ones after an edit of kernels.py. A bug that nobody could observe stands in NOT_PLANTED, and so does
one that would not be safe to run.
"""

import ast
import zlib
from typing import NamedTuple

OF_EACH_KIND = 7
FLIPPED = {  # {operator: (its text, what replaces it)}
    ast.Lt: ("<", "<="),
    ast.LtE: ("<=", "<"),
    ast.Gt: (">", ">="),
    ast.GtE: (">=", ">"),
}

# {name of a bug: why it is not planted}
NOT_PLANTED = {
    "_bounds, offset: return start, tl.load(cu_seqlens_ptr + sequence + 1 + 1) - start": (
        "unsafe: the last sequence has a length from beyond cu_seqlens, and reads that far"
    ),
    "_bounds, sign: return start, tl.load(cu_seqlens_ptr + sequence + 1) + start": (
        "unsafe: a sequence is longer than the batch, and writes beyond it"
    ),
    "_attention_forward, comparison: "
    "if first_query > length:  # the grid covers the longest sequence; this one is shorter": (
        "a program of no query stores nothing"
    ),
    "_attention_backward_dq, comparison: if first_query > length:": (
        "a program of no query stores nothing"
    ),
    "_attention_backward_dk_dv, comparison: if first_key > length:": (
        "a program of no key stores nothing"
    ),
    "_attention_backward_dq, other: "
    "shift = tl.load(shift_ptr + stat_offset, mask=query_pos < length, "
    'other=float("nan"))': "queries beyond the end share no row with others, and are not stored",
    "_layer_norm_forward, comparison: "
    "bias = tl.load(bias_ptr + column, mask=column <= H, other=0.0).to(tl.float32)": (
        "the bias of a column that is not stored"
    ),
    "_layer_norm_forward, other: "
    'weight = tl.load(weight_ptr + column, mask=column < H, other=float("nan")).to(tl.float32)': (
        "the weight of a column that is not stored"
    ),
    "_cross_entropy_backward, other: "
    'x = tl.load(logits_ptr + column, mask=column < V, other=float("nan")).to(tl.float32)': (
        "the gradient of a column that is not stored"
    ),
}


class Change(NamedTuple):
    """A stretch of the source, in bytes, and what replaces it."""

    kind: str
    begin: int
    end: int
    by: str


class Source:
    """A source text, and where the nodes of its ast lie in it."""

    def __init__(self, text):
        self.text = text.encode()  # ast counts bytes
        self.line_starts = [0]
        for line in self.text.splitlines(keepends=True):
            self.line_starts.append(self.line_starts[-1] + len(line))

    def begin(self, node):
        return self.line_starts[node.lineno - 1] + node.col_offset

    def end(self, node):
        return self.line_starts[node.end_lineno - 1] + node.end_col_offset

    def between(self, begin, end):
        return self.text[begin:end].decode()

    def replaced(self, kind, node, by):
        return Change(kind, self.begin(node), self.end(node), by)

    def appended(self, kind, node, by):
        return Change(kind, self.end(node), self.end(node), by)

    def changed(self, change):
        """The text with a change, and the line on which it begins."""
        text = self.text[: change.begin] + change.by.encode() + self.text[change.end :]
        line_begin = self.text.rfind(b"\n", 0, change.begin) + 1
        line = text[line_begin:].split(b"\n", 1)[0].decode().strip()
        return text.decode(), line


def planted(text):
    """{name: (function, kernels.py with this bug)} for the text of kernels.py.

    Raises ValueError if NOT_PLANTED has a bug that this text does not offer.
    """
    offered = offered_bugs(text)
    unknown = NOT_PLANTED.keys() - {name for bugs in offered.values() for name in bugs}
    if unknown:
        raise ValueError(f"NOT_PLANTED has bugs that kernels.py does not offer: {unknown}")

    chosen = {}
    for bugs in offered.values():
        names = [name for name in bugs if name not in NOT_PLANTED]
        names.sort(key=lambda name: zlib.crc32(name.encode()))
        chosen |= {name: bugs[name] for name in names[:OF_EACH_KIND]}
    return chosen


def offered_bugs(text):
    """{kind: {name: (function, kernels.py with this bug)}}, in the order of the lines."""
    source = Source(text)
    offered = {}
    for function in kernels_in(ast.parse(text)):
        nodes = [node for node in ast.walk(function) if hasattr(node, "lineno")]
        nodes.sort(key=source.begin)
        for node in nodes:
            for change in changes_of(node, source):
                changed, line = source.changed(change)
                name = f"{function.name}, {change.kind}: {line}"
                bugs = offered.setdefault(change.kind, {})
                while name in bugs:  # another line in the same words
                    name += " (again)"
                bugs[name] = (function.name, changed)
    return offered


def kernels_in(tree):
    """The functions that are decorated by triton.jit."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            if any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list):
                yield node


def changes_of(node, source):
    """The changes of one node."""
    match node:
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            if type(operator) in FLIPPED:
                yield other_operator("comparison", left, right, source, *FLIPPED[type(operator)])
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            yield other_operator("sign", left, right, source, "-", "+")
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            sign = source.text.index(b"*", source.end(left), source.begin(right))
            begin = len(source.text[:sign].rstrip())
            yield Change("factor", begin, source.end(node), "")
        case ast.AugAssign(op=ast.Mult(), value=value):
            yield source.replaced("factor", value, "1")
        case ast.Call(func=ast.Attribute(value=ast.Name(id="tl"), attr=called)):
            yield from changes_of_call(node, called, source)


def other_operator(kind, left, right, source, old, new):
    """Replaces the operator between two operands."""
    begin = source.text.index(old.encode(), source.end(left), source.begin(right))
    return Change(kind, begin, begin + len(old), new)


def changes_of_call(node, called, source):
    """The changes of a call of a function of tl."""
    if called == "arange":
        yield source.appended("index", node, " + 1")
    if called in ("load", "store"):
        yield source.appended("offset", node.args[0], " + 1")
    # The masks of loads and stores stay. Without one, the interpreter would reach beyond a tensor
    # by a whole block.
    if called == "where":
        condition = node.args[0]
        text = source.between(source.begin(condition), source.end(condition))
        yield source.replaced("mask", condition, f"({text}) | True")
    for keyword in node.keywords:
        if keyword.arg == "other":
            zero = isinstance(keyword.value, ast.Constant)  # 0.0; the rest are float("...")
            yield source.replaced("other", keyword.value, 'float("nan")' if zero else "0.0")
