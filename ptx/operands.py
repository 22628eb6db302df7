"""What an operand of an instruction is: functions that read it and write it, and types.

They are made once for each instruction of a kernel, so that running it decides nothing again.
Numbers are NumPy arrays with one element for each thread (lanes,), or single numbers.

Reference: PTX ISA 8.7, sections 5.2 (types) and 9.4 (operands wider than the type).
"""

import numpy as np

from ptx.parser import Address, Immediate, PtxError, Register, Symbol, Vector

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
DTYPES = {
    "pred": np.bool_,
    "f16": np.float16,
    "f32": np.float32,
    "f64": np.float64,  # bf16 is not here: it is read and written by functions of its own
}
for bits in UNSIGNED:
    DTYPES[f"b{bits}"] = DTYPES[f"u{bits}"] = UNSIGNED[bits]
    DTYPES[f"s{bits}"] = np.dtype(f"int{bits}").type


def dtype_of(instruction, type):
    """NumPy's type for a type of PTX."""
    if type not in DTYPES:
        raise unknown(instruction, f"the type {type}")
    return np.dtype(DTYPES[type])


def unknown(instruction, what):
    """The error for something that the machine does not run."""
    return PtxError(f"line {instruction.line}: {what} is not supported: {instruction.text[:80]}")


def declared(instruction, name, names):
    """A name, of a label, a parameter or a variable. Raises PtxError if it is not among `names`."""
    if name not in names:
        raise PtxError(f"line {instruction.line}: {name} is not declared: {instruction.text[:80]}")
    return name


def label_of(instruction, labels):
    """The label that a branch goes to."""
    if len(instruction.operands) != 1 or not isinstance(instruction.operands[0], Symbol):
        raise unknown(instruction, "this form of the instruction")
    return declared(instruction, instruction.operands[0].name, labels)


def unsigned(dtype):
    """The unsigned integer of the same width."""
    return np.dtype(UNSIGNED[8 * dtype.itemsize])


def reader(instruction, code, operand, dtype):
    """A function of the machine that gives an operand's numbers: (lanes,), or () for a constant.

    A register may be wider than the type; its lower bits count.
    """
    if isinstance(operand, Immediate):
        if operand.float_bytes and operand.float_bytes != dtype.itemsize:
            raise unknown(instruction, "a float of another width")
        bits = np.array(operand.value & (2 ** (8 * dtype.itemsize) - 1), unsigned(dtype))
        constant = bits.view(dtype)[()] if dtype.kind != "b" else np.bool_(operand.value != 0)
        return lambda machine: constant
    if isinstance(operand, Symbol):
        declared(instruction, operand.name, code.kernel.shared)
        return lambda machine: dtype.type(machine.symbols[operand.name])
    if not isinstance(operand, Register):
        raise unknown(instruction, "an operand")
    name = operand.name
    if dtype.kind == "b":
        return lambda machine: machine.registers[name]
    width = code.width(name)
    if width == 8 * dtype.itemsize:
        return lambda machine: machine.registers[name].view(dtype)
    if width < 8 * dtype.itemsize:
        raise unknown(instruction, f"{name}, too narrow for its type,")
    narrow = unsigned(dtype)
    return lambda machine: machine.registers[name].astype(narrow).view(dtype)


def writer(instruction, code, operand, dtype):
    """A function (machine, numbers) that writes a register where threads are active.

    A register may be wider than the type: signed numbers are extended by their sign.
    """
    if operand is None:  # `_`
        return lambda machine, numbers: None
    if not isinstance(operand, Register):
        raise unknown(instruction, "a result that is no register")
    name = operand.name
    width = code.width(name)
    bits = np.dtype(bool if width == 1 else UNSIGNED[width])
    if width < 8 * dtype.itemsize and dtype.kind != "b":
        raise unknown(instruction, f"{name}, too narrow for its type,")

    def write(machine, numbers):
        if numbers.dtype != bits:
            same_width = numbers.dtype.itemsize == bits.itemsize
            if not same_width and numbers.dtype.kind == "f":
                numbers = numbers.view(unsigned(numbers.dtype))
            numbers = numbers.view(bits) if same_width else numbers.astype(bits)
        if machine.mask is not None:
            numbers = np.where(machine.mask, numbers, machine.registers[name])
        elif numbers.ndim == 0:
            numbers = np.full(machine.lanes, numbers)
        machine.registers[name] = numbers

    return write


def check_modifiers(instruction, allowed):
    """Raises PtxError for a modifier, the last one (the type) excepted, that is not allowed."""
    for modifier in instruction.modifiers[:-1]:
        if modifier not in allowed:
            raise unknown(instruction, f".{modifier}")


def one_nan(numbers):
    """Replaces each NaN by the device's: all bits set but the sign (section 9.7.3).

    NumPy's NaNs keep a payload, which depends on the order of the operands.
    """
    nan = numbers != numbers
    if not nan.any():
        return numbers
    bits = unsigned(numbers.dtype)
    return (
        np.where(nan, np.iinfo(bits).max >> 1, numbers.view(bits)).astype(bits).view(numbers.dtype)
    )


def from_bf16(bits):
    """bf16 to fp32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def address_reader(instruction, code, operand):
    """A function of the machine that gives addresses: int64 (lanes,)."""
    if not isinstance(operand, Address):
        raise unknown(instruction, "an operand that is no address")
    base = operand.base
    width = code.width(base.name) if isinstance(base, Register) else 64
    read = reader(instruction, code, base, np.dtype(UNSIGNED[width]))
    offset = np.int64(operand.offset)

    def addresses(machine):
        return machine.spread(np.int64(read(machine))) + offset

    return addresses


def elements_of(operand):
    """The registers of an operand, be it one or several."""
    return operand.elements if isinstance(operand, Vector) else (operand,)


def registers_of(instruction):
    """The names of all registers in an instruction."""
    if instruction.predicate:
        yield instruction.predicate
    for operand in instruction.operands:
        yield from registers_in(operand)


def registers_in(operand):
    """The names of the registers in an operand."""
    if isinstance(operand, Register):
        yield operand.name
    elif isinstance(operand, Address):
        yield from registers_in(operand.base)
    elif isinstance(operand, Vector):
        for element in operand.elements:
            yield from registers_in(element)
