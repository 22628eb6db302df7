"""What each instruction does: one table from opcodes to functions.

An entry is called once for each instruction of a kernel, with the instruction and the `Code`, and
returns a function of the `Machine` that carries it out. Numbers are NumPy arrays with one element
for each thread. An opcode, a modifier or a type that is not here is refused by name.

Rounding. Each operation on fp32 is NumPy's, rounded once; `fma` is computed in fp64 and rounded to
fp32, which can differ from one rounding in one case of 2^29. The approximate instructions (ex2,
lg2, rcp, div.full, sqrt.approx) are exact here to the last bit or so, and off by up to two units in
the last place on the device.

Section numbers are those of the PTX ISA 8.7.
"""

from typing import NamedTuple

import numpy as np

from ptx import tensor_cores
from ptx.memory import rows_of
from ptx.operands import (
    DTYPES,
    UNSIGNED,
    address_reader,
    check_modifiers,
    declared,
    dtype_of,
    elements_of,
    from_bf16,
    one_nan,
    reader,
    unknown,
    unsigned,
    writer,
)
from ptx.parser import Immediate, PtxError, Vector

SMALLEST_NORMAL = np.finfo(np.float32).smallest_normal
ROUNDED = ("rn",)  # to nearest, which NumPy does


def predicated(instruction, run):
    """Runs an instruction only in the threads whose predicate says so (section 9.3)."""
    name = instruction.predicate
    wanted = not instruction.negated

    def step(machine):
        before = machine.mask
        chosen = machine.registers[name] == wanted
        if before is not None:
            chosen = chosen & before
        if chosen.any():
            machine.mask = None if chosen.all() else chosen
            run(machine)
            machine.mask = before

    return step


def build(instruction, code):
    """The function of the machine that carries out an instruction."""
    if instruction.opcode not in OPCODES:
        raise unknown(instruction, f"the instruction {instruction.opcode}")
    try:
        run = OPCODES[instruction.opcode](instruction, code)
    except PtxError:
        raise
    except Exception as error:  # an operand too many, of another kind, ...
        raise unknown(instruction, "this form of the instruction") from error
    return predicated(instruction, run) if instruction.predicate else run


# ---- arithmetic ----------------------------------------------------------------------------------


def elementwise(function, kinds, allowed=()):
    """An instruction d = function(a, b, ...), where all are of the instruction's type.

    kinds: the first letters of the types that it has: s and u integers, b bits, p predicates, f
    floats. allowed: modifiers that may stand in front of a float type.
    """
    # NumPy would take a surplus operand for `out`.
    count = getattr(function, "nin", None) or function.__code__.co_argcount

    def entry(instruction, code):
        dtype = dtype_of(instruction, instruction.type)
        floating = dtype.kind == "f"
        flush = "ftz" in instruction.modifiers
        check_modifiers(instruction, (*allowed, "ftz") if floating else ())
        if instruction.type[0] not in kinds or (flush and instruction.type != "f32"):
            raise unknown(instruction, f"{instruction.opcode} of {instruction.type}")
        if function is fused_multiply_add and instruction.type == "f64":
            raise unknown(instruction, "fma of f64")  # it would be rounded twice
        target, *sources = instruction.operands
        if len(sources) != count:
            raise unknown(instruction, f"another number of operands than {1 + count}")
        reads = [reader(instruction, code, source, dtype) for source in sources]
        write = writer(instruction, code, target, dtype)
        number = dtype.type

        def run(machine):
            numbers = [read(machine) for read in reads]
            if flush:
                numbers = [flushed(x) for x in numbers]
            result = np.asarray(function(*numbers), number)
            if floating:
                result = one_nan(result)
            write(machine, flushed(result) if flush else result)

        return run

    return entry


def flushed(x):
    """Subnormal numbers become 0 (.ftz, section 9.7.3)."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def fused_multiply_add(a, b, c):
    """a b + c in fp64, to be rounded by the caller."""
    return np.float64(a) * b + c


def divide(a, b):
    """a / b; of integers, without what is behind the point."""
    if a.dtype.kind == "f":
        return a / b
    quotient = a // b  # rounded down
    return quotient + ((quotient < 0) & (a % b != 0))


def shift_left(a, b):
    """a << b, 0 where b reaches the width (section 9.7.8)."""
    width = 8 * a.dtype.itemsize
    shifted = np.left_shift(a, np.minimum(b, width - 1).astype(a.dtype))
    return np.where(b < width, shifted, 0)


def shift_right(a, b):
    """a >> b: zeros come in, or copies of the sign of a signed number."""
    width = 8 * a.dtype.itemsize
    shifted = np.right_shift(a, np.minimum(b, width - 1).astype(a.dtype))
    return shifted if a.dtype.kind == "i" else np.where(b < width, shifted, 0)


def shift(function):
    """An instruction d = function(a, b), where b is a number of bits: always u32."""

    def entry(instruction, code):
        check_modifiers(instruction, ())
        dtype = dtype_of(instruction, instruction.type)
        target, a, b = instruction.operands
        read_a = reader(instruction, code, a, dtype)
        read_b = reader(instruction, code, b, np.dtype(np.uint32))
        write = writer(instruction, code, target, dtype)
        number = dtype.type
        return lambda machine: write(
            machine, np.asarray(function(read_a(machine), read_b(machine)), number)
        )

    return entry


def product(instruction, code):
    """mul and mad (sections 9.7.1.3 and 4): lower half of the product, upper half, or all of it."""
    dtype = dtype_of(instruction, instruction.type)
    if dtype.kind == "f" and instruction.opcode == "mul":
        return elementwise(np.multiply, "f", ROUNDED)(instruction, code)
    check_modifiers(instruction, ("lo", "hi", "wide"))
    kind = instruction.modifiers[0]
    count = {"mul": 3, "mad": 4}[instruction.opcode]
    if (
        len(instruction.modifiers) != 2
        or instruction.type[0] not in "su"
        or len(instruction.operands) != count
    ):
        raise unknown(instruction, "this form of the instruction")
    double = {2: "32", 4: "64"}.get(dtype.itemsize)
    if kind != "lo" and double is None:
        raise unknown(instruction, f"mul.{kind} of 64 bits")
    wide = dtype if kind == "lo" else np.dtype(DTYPES[instruction.type[0] + double])
    result = wide if kind == "wide" else dtype
    target, a, b, *addend = instruction.operands
    reads = [reader(instruction, code, source, dtype) for source in (a, b)]
    adds = [reader(instruction, code, source, result) for source in addend]
    write = writer(instruction, code, target, result)
    bits = 8 * dtype.itemsize

    def run(machine):
        left, right = (np.asarray(read(machine)).astype(wide) for read in reads)
        numbers = left * right
        if kind == "hi":
            numbers = (numbers >> wide.type(bits)).astype(dtype)
        for add in adds:
            numbers = numbers + add(machine)
        write(machine, numbers)

    return run


def bit_field(instruction, code):
    """bfe (section 9.7.1.19): `length` bits from position `start` on, extended by zeros or sign."""
    check_modifiers(instruction, ())
    dtype = dtype_of(instruction, instruction.type)
    target, a, *field = instruction.operands
    read = reader(instruction, code, a, dtype)
    write = writer(instruction, code, target, dtype)
    if not all(isinstance(operand, Immediate) for operand in field):
        raise unknown(instruction, "bfe with a field that is not constant")
    start, length = (operand.value for operand in field)
    bits = 8 * dtype.itemsize
    if not 0 < length <= bits - start:
        raise unknown(instruction, "bfe of a field that leaves the register")
    # Up to the top, so that what is above is gone; then down, where the sign is copied.
    up = dtype.type(bits - start - length)
    down = dtype.type(bits - length)
    return lambda machine: write(machine, np.asarray(read(machine) << up >> down, dtype))


def permute_bytes(a, b, selector):
    """prmt (section 9.7.9.7): each nibble of the selector chooses one of the 8 bytes of a and b.

    Its highest bit asks for copies of the byte's sign instead.
    """
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.uint64(0)
    for place in range(4):
        nibble = np.uint64(selector) >> np.uint64(4 * place)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        sign = np.where(byte & np.uint64(0x80), np.uint64(0xFF), np.uint64(0))
        byte = np.where(nibble & np.uint64(8), sign, byte)
        result = result | byte << np.uint64(8 * place)
    return result.astype(np.uint32)


def select(instruction, code):
    """selp (section 9.7.6.3): d = p ? a : b."""
    check_modifiers(instruction, ())
    dtype = dtype_of(instruction, instruction.type)
    target, a, b, p = instruction.operands
    read_a = reader(instruction, code, a, dtype)
    read_b = reader(instruction, code, b, dtype)
    read_p = reader(instruction, code, p, np.dtype(bool))
    write = writer(instruction, code, target, dtype)
    number = dtype.type
    return lambda machine: write(
        machine, np.where(read_p(machine), read_a(machine), read_b(machine)).astype(number)
    )


# A comparison with a NaN is false, but for those with a u in front of or behind their name.
COMPARISONS = {
    "eq": np.equal,
    "ne": lambda a, b: np.not_equal(a, b) & ~either_nan(a, b),
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "equ": lambda a, b: np.equal(a, b) | either_nan(a, b),
    "neu": np.not_equal,
    "ltu": lambda a, b: np.less(a, b) | either_nan(a, b),
    "leu": lambda a, b: np.less_equal(a, b) | either_nan(a, b),
    "gtu": lambda a, b: np.greater(a, b) | either_nan(a, b),
    "geu": lambda a, b: np.greater_equal(a, b) | either_nan(a, b),
    "num": lambda a, b: ~either_nan(a, b),
    "nan": lambda a, b: either_nan(a, b),
}


def either_nan(a, b):
    """True where a or b is NaN (no integer is)."""
    return (a != a) | (b != b)


def compare(instruction, code):
    """setp (section 9.7.6.2): p = a < b, and the like."""
    comparison, *rest = instruction.modifiers[:-1]
    if comparison not in COMPARISONS or rest not in ([], ["ftz"]):
        raise unknown(instruction, "setp with " + ".".join(instruction.modifiers[:-1]))
    function = COMPARISONS[comparison]
    half = instruction.type == "bf16"
    dtype = np.dtype(np.uint16) if half else dtype_of(instruction, instruction.type)
    number = from_bf16 if half else flushed if rest else lambda x: x
    if rest and instruction.type != "f32":
        raise unknown(instruction, f".ftz of {instruction.type}")
    target, a, b = instruction.operands
    read_a = reader(instruction, code, a, dtype)
    read_b = reader(instruction, code, b, dtype)
    write = writer(instruction, code, target, np.dtype(bool))
    return lambda machine: write(
        machine, np.asarray(function(number(read_a(machine)), number(read_b(machine))))
    )


# ---- moving and converting -----------------------------------------------------------------------


def move(instruction, code):
    """mov (section 9.7.9.3): copies a number or an address, or packs and unpacks a register."""
    check_modifiers(instruction, ())
    target, source = instruction.operands
    dtype = dtype_of(instruction, instruction.type)
    if isinstance(target, Vector):
        count = len(target.elements)
        part = np.dtype(UNSIGNED[8 * dtype.itemsize // count])
        read = reader(instruction, code, source, dtype)
        writes = [writer(instruction, code, element, part) for element in target.elements]

        def unpack(machine):
            parts = np.ascontiguousarray(read(machine)).view(part).reshape(-1, count)
            for column, write in enumerate(writes):
                write(machine, np.ascontiguousarray(parts[:, column]))

        return unpack
    write = writer(instruction, code, target, dtype)
    if isinstance(source, Vector):
        count = len(source.elements)
        part = np.dtype(UNSIGNED[8 * dtype.itemsize // count])
        reads = [reader(instruction, code, element, part) for element in source.elements]

        def pack(machine):
            parts = [machine.spread(read(machine)) for read in reads]
            write(machine, np.stack(parts, axis=1).view(dtype)[:, 0])

        return pack
    read = reader(instruction, code, source, dtype)
    return lambda machine: write(machine, read(machine))


def to_bf16(x):
    """fp32 to bf16, to nearest, ties to even: uint16. A NaN becomes the one of the device."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(x != x, np.uint16(0x7FFF), rounded.astype(np.uint16))


def to_half(type):
    """The function from fp32 to a half-precision type, as uint16."""
    return to_bf16 if type == "bf16" else lambda x: x.astype(np.float16).view(np.uint16)


def convert(instruction, code):
    """cvt (section 9.7.9.21)."""
    *modifiers, to, source_type = instruction.modifiers
    target, *sources = instruction.operands
    if to in ("f16x2", "bf16x2") and source_type == "f32" and modifiers == ["rn"]:
        half = to_half(to.removesuffix("x2"))
        reads = [reader(instruction, code, one, np.dtype(np.float32)) for one in sources]
        write = writer(instruction, code, target, np.dtype(np.uint32))

        def both(machine):
            upper, lower = (half(np.asarray(read(machine))).astype(np.uint32) for read in reads)
            write(machine, upper << np.uint32(16) | lower)

        return both

    allowed = {"rn"} if to[0] in "fb" else {"rzi", "rni", "rmi", "rpi"}
    if not set(modifiers) <= allowed:
        raise unknown(instruction, "cvt with ." + ".".join(modifiers))
    bits = np.dtype(np.uint16)  # of bf16
    before = bits if source_type == "bf16" else dtype_of(instruction, source_type)
    after = bits if to == "bf16" else dtype_of(instruction, to)
    read = reader(instruction, code, sources[0], before)
    write = writer(instruction, code, target, after)
    function = conversion(instruction, to, source_type, modifiers, before, after)
    return lambda machine: write(machine, function(np.asarray(read(machine))))


def conversion(instruction, to, source_type, modifiers, before, after):
    """The function that converts an array from one type of PTX to another."""
    if source_type == "bf16":
        if to != "f32":
            raise unknown(instruction, f"cvt from bf16 to {to}")
        return from_bf16
    if to == "bf16":
        if source_type != "f32":
            raise unknown(instruction, f"cvt from {source_type} to bf16")
        return to_bf16
    if before.kind == "f" and after.kind in "iu":
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        return lambda x: saturated(rounding[modifiers[0]](x.astype(np.float64)), after)
    if after.kind == "f":
        return lambda x: one_nan(x.astype(after))
    return lambda x: x.astype(after)


def saturated(x, dtype):
    """Whole numbers in fp64 as integers, or the nearest ones that there are; NaN is 0."""
    limits = np.iinfo(dtype)
    below = x < limits.min
    above = x >= float(limits.max) + 1  # a power of two, which fp64 has exactly
    inside = np.where(below | above | (x != x), 0, x).astype(dtype)
    return np.where(above, limits.max, np.where(below, limits.min, inside)).astype(dtype)


def shuffle(instruction, code):
    """shfl.sync (section 9.7.9.6): each thread reads a register of another thread of its warp."""
    if instruction.modifiers not in (("sync", "bfly", "b32"), ("sync", "idx", "b32")):
        raise unknown(instruction, "shfl with ." + ".".join(instruction.modifiers))
    target, a, b, clamp, members = instruction.operands
    everyone = [Immediate(-1), Immediate(0xFFFFFFFF)]
    if clamp != Immediate(31) or members not in everyone:
        raise unknown(instruction, "shfl within a part of a warp")
    word = np.dtype(np.uint32)
    read = reader(instruction, code, a, word)
    read_lane = reader(instruction, code, b, word)
    write = writer(instruction, code, target, word)
    butterfly = instruction.modifiers[1] == "bfly"

    def run(machine):
        machine.whole_warps()
        lane = (machine.thread % 32).astype(np.uint32)
        other = read_lane(machine) & np.uint32(31)
        other = lane ^ other if butterfly else other
        numbers = machine.spread(read(machine))
        write(machine, numbers[machine.thread - lane + other])

    return run


# ---- memory --------------------------------------------------------------------------------------

# Hints to the caches, and words that say what this machine assumes anyway.
HINTS = {"nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "L1", "L2"}


def space_and_count(instruction, spaces):
    """The state space, and the number of elements, of a load or store."""
    space, *rest = (modifier for modifier in instruction.modifiers[:-1] if modifier not in HINTS)
    if space not in spaces or rest not in ([], ["v2"], ["v4"]):
        raise unknown(instruction, "." + ".".join(instruction.modifiers[:-1]))
    return space, int(rest[0][1:]) if rest else 1


def load(instruction, code):
    """ld (section 9.7.9.8), from a parameter, global or shared memory."""
    space, count = space_and_count(instruction, ("param", "global", "shared"))
    dtype = dtype_of(instruction, instruction.type)
    target, address = instruction.operands
    writes = [writer(instruction, code, one, dtype) for one in elements_of(target)]
    if len(writes) != count or count * dtype.itemsize > 16:
        raise unknown(instruction, "a vector of another length")
    if space == "param":
        if address.offset or count > 1:
            raise unknown(instruction, "a part of a parameter")
        name = declared(instruction, address.base.name, code.symbols)
        return lambda machine: writes[0](machine, parameter_bits(machine.symbols[name], dtype))
    if getattr(address.base, "name", None) in code.kernel.parameters:
        raise unknown(instruction, "a parameter as an address")
    addresses = address_reader(instruction, code, address)

    def run(machine):
        data = machine.load(space, addresses(machine), count * dtype.itemsize).view(dtype)
        for column, write in enumerate(writes):
            write(machine, np.ascontiguousarray(data[:, column]))

    return run


def parameter_bits(value, dtype):
    """A parameter as a number of a type; a float parameter may be loaded as its bits."""
    if isinstance(value, float) and dtype.kind != "f":
        floats = {4: np.float32, 8: np.float64}
        return np.asarray(value, floats[dtype.itemsize]).view(dtype)
    if dtype.kind == "f":
        return np.asarray(value, dtype)
    return np.asarray(value & (2 ** (8 * dtype.itemsize) - 1), unsigned(dtype)).view(dtype)


def store(instruction, code):
    """st (section 9.7.9.11), to global or shared memory."""
    space, count = space_and_count(instruction, ("global", "shared"))
    dtype = dtype_of(instruction, instruction.type)
    address, source = instruction.operands
    reads = [reader(instruction, code, one, dtype) for one in elements_of(source)]
    if len(reads) != count or count * dtype.itemsize > 16:
        raise unknown(instruction, "a vector of another length")
    addresses = address_reader(instruction, code, address)

    def run(machine):
        data = np.empty((machine.lanes, count), dtype)
        for column, read in enumerate(reads):
            data[:, column] = read(machine)
        machine.store(space, addresses(machine), data.view(np.uint8))

    return run


class Copy(NamedTuple):
    """A cp.async on its way, of some threads."""

    lanes: np.ndarray  # the threads
    rows: np.ndarray  # where each copies to, in shared memory as rows of its size
    data: np.ndarray  # (threads, size)
    groups: np.ndarray  # the commit group that each thread's copy joins

    def only(self, which):
        """The copy of some of the threads."""
        return Copy(*(field[which] for field in self))


def asynchronous_copy(instruction, code):
    """cp.async (section 9.7.9.25.3): global to shared memory. The bytes land at the wait."""
    kind = instruction.modifiers
    if kind[:2] in (("async", "commit_group"), ("async", "wait_all"), ("async", "wait_group")):
        return copy_group(instruction)
    if kind[0] != "async" or not {*kind[2:]} <= {"shared", "global"} or kind[1] not in ("ca", "cg"):
        raise unknown(instruction, "cp." + ".".join(kind))
    target, source, size_operand, *read_size = instruction.operands
    size = size_operand.value
    if kind[2:] != ("shared", "global") or size not in {"ca": (4, 8, 16), "cg": (16,)}[kind[1]]:
        raise unknown(instruction, "this form of the instruction")
    to = address_reader(instruction, code, target)
    origin = address_reader(instruction, code, source)
    reads = [reader(instruction, code, one, np.dtype(np.uint32)) for one in read_size]

    def run(machine):
        active = machine.active()
        sizes = machine.spread(reads[0](machine) if reads else size)
        if not np.isin(sizes[active], (0, size)).all():
            raise unknown(instruction, "cp.async that reads a part of its bytes")
        # Of 0 bytes nothing is read: the address need not be one. The rest is zeros.
        data = np.zeros((machine.lanes, size), np.uint8)
        before = machine.mask
        machine.mask = active & (sizes == size)
        if machine.mask.any():
            data = np.where(machine.mask[:, None], machine.load("global", origin(machine), size), 0)
        machine.mask = before
        for _, lanes, rows in machine.places("shared", to(machine), size):
            copy = Copy(lanes, rows, data[lanes].astype(np.uint8), machine.copy_groups[lanes])
            machine.copies.append(copy)
            if machine.watch:
                machine.watch.on_copy_begin(machine, lanes, rows, size)

    return run


def copy_group(instruction):
    """cp.async.commit_group, .wait_group n and .wait_all (sections 9.7.9.25.3.2 and 3)."""
    kind = instruction.modifiers[1]
    if kind == "commit_group":

        def commit(machine):
            machine.copy_groups = machine.copy_groups + machine.active()

        return commit
    pending = instruction.operands[0].value if kind == "wait_group" else 0

    def wait(machine):
        # wait_all also waits for what is not committed yet.
        first_pending = machine.copy_groups - pending + (kind == "wait_all")
        active = machine.active()
        kept = []
        for copy in machine.copies:
            landing = active[copy.lanes] & (copy.groups < first_pending[copy.lanes])
            if landing.any():
                landed = copy.only(landing)
                size = landed.data.shape[1]
                rows_of(machine.shared.memory, size)[landed.rows] = landed.data
                if machine.watch:
                    machine.watch.on_copy_end(machine, landed.lanes, landed.rows, size)
            if not landing.all():
                kept.append(copy.only(~landing))
        machine.copies = kept

    return wait


# ---- control -------------------------------------------------------------------------------------


def generic_address(instruction, code):
    """cvta.to.global (section 9.7.9.20): addresses of global memory are generic ones here."""
    if instruction.modifiers != ("to", "global", "u64"):
        raise unknown(instruction, "cvta." + ".".join(instruction.modifiers))
    return move(instruction._replace(modifiers=("u64",)), code)


def branch(instruction, code):
    """bra (section 9.7.12.2). Threads that do not branch go on with the next block."""
    (label,) = instruction.operands
    number = code.segment_at(label.name)

    def run(machine):
        if machine.mask is None:
            machine.segment[:] = number
        else:
            machine.segment[machine.mask] = number

    return run


def leave(instruction, code):
    """ret (section 9.7.12.6): the thread has ended."""

    def run(machine):
        machine.segment[machine.active()] = code.end

    return run


def barrier(instruction, code):
    """bar.sync (section 9.7.13.1): a thread waits until all others are at a barrier."""
    if instruction.modifiers == ("warp", "sync"):
        return lambda machine: machine.whole_warps()
    if instruction.modifiers != ("sync",) or instruction.operands != (Immediate(0),):
        raise unknown(instruction, "a barrier but `bar.sync 0`")

    def run(machine):
        machine.whole_warps()
        machine.waiting |= machine.active()
        machine.barrier = instruction

    return run


def fence(instruction, code):
    """fence.proxy.async (section 9.7.13.4): what was written is visible to wgmma from here on."""
    if instruction.modifiers not in (("proxy", "async"), ("proxy", "async", "shared")):
        raise unknown(instruction, "fence." + ".".join(instruction.modifiers))

    def run(machine):
        # A fence is for the thread that executes it. That of a part of the threads is not counted.
        if machine.watch and machine.mask is None:
            machine.watch.on_proxy_fence(machine)

    return run


# ---- the table -----------------------------------------------------------------------------------

OPCODES = {
    # Integers: section 9.7.1. Floats: section 9.7.3.
    "add": elementwise(np.add, "suf", ROUNDED),
    "sub": elementwise(np.subtract, "suf", ROUNDED),
    "mul": product,
    "mad": product,
    "fma": elementwise(fused_multiply_add, "f", ROUNDED),
    "neg": elementwise(np.negative, "sf"),
    "abs": elementwise(np.abs, "sf"),
    "min": elementwise(np.fmin, "suf"),  # the other one, if one is NaN
    "max": elementwise(np.fmax, "suf"),
    "bfe": bit_field,
    "prmt": elementwise(permute_bytes, "b"),
    "div": elementwise(divide, "suf", ("full", "rn", "approx")),
    "sqrt": elementwise(np.sqrt, "f", ("approx", "rn")),
    "rsqrt": elementwise(lambda x: 1 / np.sqrt(np.float64(x)), "f", ("approx",)),
    "rcp": elementwise(lambda x: 1 / x, "f", ("approx", "rn")),
    "ex2": elementwise(np.exp2, "f", ("approx",)),
    "lg2": elementwise(np.log2, "f", ("approx",)),
    # Comparison and selection: section 9.7.6. Logic and shifts: 9.7.8.
    "setp": compare,
    "selp": select,
    "and": elementwise(np.bitwise_and, "bp"),
    "or": elementwise(np.bitwise_or, "bp"),
    "xor": elementwise(np.bitwise_xor, "bp"),
    "not": elementwise(np.bitwise_not, "bp"),
    "shl": shift(shift_left),
    "shr": shift(shift_right),
    # Data movement and conversion: section 9.7.9.
    "mov": move,
    "cvt": convert,
    "cvta": generic_address,
    "ld": load,
    "st": store,
    "cp": asynchronous_copy,
    "shfl": shuffle,
    # Control flow and synchronization: sections 9.7.12 and 9.7.13.
    "bra": branch,
    "ret": leave,
    "bar": barrier,
    "fence": fence,
    # Tensor cores, of a warp and of a warp group: sections 9.7.14 and 9.7.15.
    "mma": tensor_cores.warp_product,
    "ldmatrix": tensor_cores.load_matrices,
    "stmatrix": tensor_cores.store_matrices,
    "wgmma": tensor_cores.group_product,
}
