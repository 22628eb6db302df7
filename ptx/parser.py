"""PTX text to a list of instructions.

PTX is the assembly language that Triton and nvcc write, and that NVIDIA's ptxas turns into machine
code. This file reads what such compilers emit for one kernel: an `.entry`, its parameters,
registers and shared memory, labels, and instructions. The rest (functions, textures, scopes in
braces) is refused by name.

References: PTX ISA 8.7, chapters 4 (syntax) and 5 (state spaces and types).
"""

import functools
import os
import re
from typing import NamedTuple


class PtxError(ValueError):
    """PTX that is not understood, or that is not supported. The message says what, and where."""


class Register(NamedTuple):
    """A virtual register, such as %r5. Or one that says who runs, such as %tid.x."""

    name: str


class Immediate(NamedTuple):
    """A number in the text."""

    value: int  # of a float: its bits
    float_bytes: int = 0  # 4 for 0f3F800000, 8 for 0d3FF0000000000000, 0 for an integer


class Symbol(NamedTuple):
    """A variable in shared memory, a parameter or a label."""

    name: str


class Address(NamedTuple):
    """[base + offset]."""

    base: tuple  # a Register, a Symbol or an Immediate
    offset: int


class Vector(NamedTuple):
    """{a, b, ...}: several registers as one operand. None stands for `_`, which is not written."""

    elements: tuple


class Instruction(NamedTuple):
    """One instruction, such as `@!%p1 add.s32 %r1, %r2, 4;`."""

    line: int  # in the PTX text, counted from 1
    source: str  # the line of the kernel that it comes from, such as "kernels.py:213"; or ""
    text: str
    predicate: str  # the register that decides whether a thread takes part, or ""
    negated: bool  # True for @!%p1
    opcode: str  # without modifiers, such as "add"
    modifiers: tuple  # such as ("rn", "f32")
    operands: tuple

    @property
    def type(self):
        """The last modifier, which is the type of most instructions."""
        return self.modifiers[-1]


class Kernel(NamedTuple):
    """What a PTX text says about its kernel."""

    name: str
    target: str  # such as "sm_90a"
    parameters: dict  # {name: type}, in order
    threads: int  # of a block, if the text says so (.reqntid), else 0
    registers: dict  # {name up to its number: bits}; 1 bit for predicates
    shared: dict  # {name: (bytes, or 0 if the launch decides; multiple that its address is)}
    instructions: tuple
    labels: dict  # {label: index of the instruction behind it}


LABEL = re.compile(r"([\w$]+):")
LOCATION = re.compile(r"\.loc\s+(\d+)\s+(\d+)")
# Directives in front of the body end with their line, declarations with a semicolon.
LINE_DIRECTIVES = (".version", ".target", ".address_size", ".reqntid", ".maxntid", ".maxnreg")
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)")  # %r<100>, or %r1, %r2, ...
SHARED = re.compile(r"(?:\.extern )?\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)\[(\d*)\]")
PARAMETER = re.compile(r"\.param\s+\.(\w+)[^,)]*?([\w$]+)\s*[,)]")
PREDICATE = re.compile(r"@(!?)(%\w+)\s+")
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s{}\[\]]+")
ADDRESS = re.compile(r"\[\s*([^\s+\]]+)\s*(?:\+\s*(-?\w+))?\s*\]")
NUMBER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|\d+)U?")
FLOAT = re.compile(r"0([fd])([0-9a-fA-F]+)")


@functools.lru_cache(maxsize=256)
def parse(text):
    """The `Kernel` of a PTX text. Raises PtxError for what is not understood."""
    found = dict(parameters={}, threads=0, registers={}, shared={}, labels={})
    instructions = []
    for line, source, statement in statements(text):
        try:
            if statement.endswith(":"):
                found["labels"][statement[:-1]] = len(instructions)
            elif statement.startswith("."):
                read_directive(line, statement, found)
            elif statement:
                instructions.append(read_instruction(line, source, statement))
        except PtxError:
            raise
        except Exception as error:
            message = f"line {line}: {statement[:80]!r} is not understood"
            raise PtxError(message) from error
    if "name" not in found:
        raise PtxError("this PTX has no kernel: no .entry")
    if "target" not in found:
        raise PtxError("this PTX does not say for which chip it is: no .target")
    # A kernel may end without `ret`, and a label may stand at its end.
    ends = bool(instructions) and instructions[-1].opcode == "ret"
    if not ends or len(instructions) in found["labels"].values():
        instructions.append(Instruction(text.count("\n"), "", "ret", "", False, "ret", (), ()))
    return Kernel(**found, instructions=tuple(instructions))


def statements(text):
    """(line, source, statement) of each statement of the first kernel, without comments."""
    files = {number: os.path.basename(name) for number, name in file_table(text).items()}
    source = ""
    pending = ""  # a statement that goes on in the next line
    inside = False  # the braces of the kernel
    for line, raw in enumerate(text.split("\n"), 1):
        code = raw.split("//")[0].strip()
        location = LOCATION.match(code)
        if location:
            if location[2] != "0":  # 0: the compiler does not know
                source = f"{files.get(location[1], '?')}:{location[2]}"
            continue
        if code.startswith((".file", ".pragma")) or not code:
            continue
        if code == "{" and not inside:
            inside = True
            continue
        if code.startswith("{") and not pending:
            raise PtxError(f"line {line}: a scope in braces is not supported")
        if code == "}" and not pending:
            return  # debugging information follows

        pending = f"{pending} {code}".strip()
        while pending:
            end = statement_end(pending)
            if not end:
                break
            yield line, source, pending[:end].rstrip(" ;")
            pending = pending[end:].strip()
    raise PtxError("the text ends within a kernel" if inside else "this PTX has no kernel")


def statement_end(text):
    """Where the first statement of a text ends, or 0 if it goes on in the next line."""
    label = LABEL.match(text)
    if label:
        return label.end()
    if text.startswith(LINE_DIRECTIVES):
        return len(text)
    if text.startswith((".visible", ".entry", ".weak", ".func")):
        return text.find(")") + 1
    return text.find(";") + 1


def file_table(text):
    """{number: path} of the source files that `.loc` refers to."""
    return dict(re.findall(r'^\s*\.file\s+(\d+)\s+"([^"\n]*)"', text, re.M))


def read_directive(line, statement, found):
    """Adds what a directive says to `found`, the fields of a `Kernel`."""
    if ".entry" in statement:
        if "name" in found:
            raise PtxError(f"line {line}: a second kernel in one text is not supported")
        found["name"] = re.search(r"\.entry\s+([\w$]+)", statement)[1]
        found["parameters"] = {name: type for type, name in PARAMETER.findall(statement)}
    elif statement.startswith(".target"):
        found["target"] = re.search(r"sm_\w+", statement)[0]
    elif statement.startswith((".reqntid", ".maxntid")):
        x, *others = (int(number) for number in re.findall(r"\d+", statement))
        if others.count(1) < len(others):
            raise PtxError(f"line {line}: a block of more than one axis is not supported")
        found["threads"] = x
    elif REGISTERS.match(statement):
        type, names = REGISTERS.match(statement).groups()
        for name in names.split(","):
            prefix = re.sub(r"<\d+>$|\d+$", "", name.strip())
            found["registers"][prefix] = 1 if type == "pred" else int(type[1:])
    elif SHARED.fullmatch(statement):
        alignment, type, name, count = SHARED.fullmatch(statement).groups()
        found["shared"][name] = (int(type[1:]) // 8 * int(count or 0), int(alignment))
    elif statement.startswith((".version", ".address_size", ".maxnreg", ".minnctapersm")):
        pass  # says nothing about what is computed
    elif statement.startswith(".global") and "_$_str" in statement:
        pass  # the name of a setting of the compiler
    else:
        raise PtxError(f"line {line}: the directive {statement[:60]!r} is not supported")


def read_instruction(line, source, text):
    """The `Instruction` of a statement."""
    predicate = PREDICATE.match(text)
    words = text[predicate.end() :] if predicate else text
    opcode, *rest = words.split(maxsplit=1)
    name, *modifiers = opcode.split(".")
    # shared::cta and the like name a part of a state space; one block sees no other part.
    modifiers = tuple(modifier.split("::")[0] for modifier in modifiers)
    operands = tuple(read_operand(line, operand) for operand in OPERAND.findall("".join(rest)))
    return Instruction(
        line=line,
        source=source,
        text=text,
        predicate=predicate[2] if predicate else "",
        negated=bool(predicate and predicate[1]),
        opcode=name,
        modifiers=modifiers,
        operands=operands,
    )


def read_operand(line, text):
    """An operand from its text."""
    if text.startswith("{"):
        elements = [element.strip() for element in text[1:-1].split(",")]
        return Vector(tuple(None if e == "_" else read_operand(line, e) for e in elements))
    if text.startswith("["):
        address = ADDRESS.fullmatch(text)
        if not address:
            raise PtxError(f"line {line}: the address {text} is not supported")
        return Address(read_operand(line, address[1]), int(address[2] or "0", 0))
    if text.startswith("%"):
        return Register(text)
    number = NUMBER.fullmatch(text)
    if number:
        value = int(number[2], 0)
        return Immediate(-value if number[1] else value)
    floating = FLOAT.fullmatch(text)
    if floating:
        return Immediate(int(floating[2], 16), 4 if floating[1] == "f" else 8)
    return Symbol(text)
