"""Matrix products on the tensor cores, and the loads and stores that feed them.

A matrix is spread over the threads of a warp, or lies in shared memory where a descriptor says.
The layouts are those of the PTX ISA 8.7, sections 9.7.14.5 (mma, ldmatrix, stmatrix) and 9.7.15
(wgmma).

In a warp, thread 4 g + t is number t of group g: it holds the elements 2 t and 2 t + 1 of row g of
each 8 x 8 block. Axes in the comments below: w warp, g, t, and e the element of a pair.

A product of halves is exact here, a sum is rounded once to fp32. Tensor cores cut off more; how
much is not documented.
"""

from typing import NamedTuple

import numpy as np

from ptx.memory import WARP
from ptx.operands import (
    address_reader,
    elements_of,
    from_bf16,
    one_nan,
    reader,
    registers_in,
    unknown,
    writer,
)
from ptx.parser import PtxError, Vector

WORD = np.dtype(np.uint32)
SINGLE = np.dtype(np.float32)
GROUP = 128  # threads of a warp group


def as_numbers(halves, type):
    """Half-precision bits (uint16) as fp64."""
    numbers = from_bf16(halves) if type == "bf16" else halves.view(np.float16)
    return numbers.astype(np.float64)


def pairs(registers, type):
    """Registers, each with two halves: (registers, w, 8 g, 4 t, 2 e) fp64."""
    bits = np.stack(registers)  # (registers, lanes)
    return as_numbers(bits.view(np.uint16), type).reshape(len(bits), -1, 8, 4, 2)


def matrix_a(registers, type):
    """The left factor, 4 registers: (w, 16 rows, 16 k)."""
    # Registers: rows 0-7 and k 0-7; rows 8-15; then the same of k 8-15.
    x = pairs(registers, type).reshape(2, 2, -1, 8, 4, 2)  # (k half, row half, w, g, t, e)
    return x.transpose(2, 1, 3, 0, 4, 5).reshape(-1, 16, 16)


def matrix_b(registers, type):
    """The right factor, 2 registers: (w, 16 k, 8 columns)."""
    x = pairs(registers, type)  # (k half, w, g, t, e): here g is the column
    return x.transpose(1, 0, 3, 4, 2).reshape(-1, 16, 8)


def matrix_c(registers):
    """An accumulator of 16 rows, in fp32: (w, 16, 8 n), from 4 n registers."""
    n = len(registers) // 4
    x = np.stack(registers).reshape(n, 2, 2, -1, 8, 4)  # (column block, row half, e, w, g, t)
    return x.transpose(3, 1, 4, 0, 5, 2).reshape(-1, 16, 8 * n)


def registers_c(matrix):
    """`matrix_c` backwards: (4 n, lanes)."""
    n = matrix.shape[2] // 8
    x = matrix.reshape(-1, 2, 8, n, 4, 2)  # (w, row half, g, column block, t, e)
    return np.ascontiguousarray(x.transpose(3, 1, 5, 0, 2, 4)).reshape(4 * n, -1)


def read_all(machine, reads):
    """The numbers of several operands, each (lanes,)."""
    return [machine.spread(read(machine)) for read in reads]


# ---- mma, ldmatrix, stmatrix: a warp -------------------------------------------------------------


def warp_product(instruction, code):
    """mma.sync (section 9.7.14.5.14): D = A B + C, 16 x 8 with k = 16, of halves into fp32."""
    *shape, d_type, a_type, b_type, c_type = instruction.modifiers
    if (
        shape != ["sync", "aligned", "m16n8k16", "row", "col"]
        or (d_type, c_type) != ("f32", "f32")
        or a_type != b_type
        or a_type not in ("f16", "bf16")
    ):
        raise unknown(instruction, "mma." + ".".join(instruction.modifiers))
    d, a, b, c = (elements_of(operand) for operand in instruction.operands)
    if [len(one) for one in (d, a, b, c)] != [4, 4, 2, 4]:
        raise unknown(instruction, "another number of registers")
    reads_a = [reader(instruction, code, one, WORD) for one in a]
    reads_b = [reader(instruction, code, one, WORD) for one in b]
    reads_c = [reader(instruction, code, one, SINGLE) for one in c]
    writes = [writer(instruction, code, one, SINGLE) for one in d]

    def run(machine):
        machine.whole_warps()
        left = matrix_a(read_all(machine, reads_a), a_type)
        right = matrix_b(read_all(machine, reads_b), a_type)
        before = matrix_c(read_all(machine, reads_c))
        result = one_nan((left @ right + before).astype(np.float32))
        for write, numbers in zip(writes, registers_c(result)):
            write(machine, numbers)

    return run


def matrices_of(instruction):
    """How many 8 x 8 matrices an ldmatrix or stmatrix moves, and whether they are transposed."""
    kind = [
        one for one in instruction.modifiers if one not in ("sync", "aligned", "shared", "m8n8")
    ]
    transposed = "trans" in kind
    count = {"x1": 1, "x2": 2, "x4": 4}.get(kind[0])
    if count is None or kind[1:] != ["trans"] * transposed + ["b16"]:
        raise unknown(instruction, instruction.opcode + "." + ".".join(instruction.modifiers))
    if count not in [len(elements_of(operand)) for operand in instruction.operands]:
        raise unknown(instruction, "another number of registers")
    return count, transposed


def element_addresses(machine, addresses, count, transposed):
    """The addresses of what each thread has of the matrices, and the size of a piece.

    Thread 8 i + r of a warp says where row r of matrix i is. Of each matrix a thread has a pair in
    row g, 4 bytes. Transposed it has two elements of column g, 2 bytes each, in rows 2 t and
    2 t + 1. The order: all threads for the first piece, then all for the second, ...
    """
    asked = machine.active() & (machine.thread % WARP < 8 * count)
    crooked = asked & (addresses % 16 != 0)
    if crooked.any():
        machine.wrong("alignment", "a row of a matrix at no multiple of 16 bytes", crooked)
    warp = machine.thread // WARP * WARP
    group, t = np.divmod(machine.thread % WARP, 4)
    matrix = np.arange(count)[:, None]
    if not transposed:
        return (addresses[warp + 8 * matrix + group] + 4 * t).ravel(), 4
    matrix = matrix[:, None]
    element = np.arange(2)[:, None]
    return (addresses[warp + 8 * matrix + 2 * t + element] + 2 * group).ravel(), 2


def load_matrices(instruction, code):
    """ldmatrix (section 9.7.14.5.15): 8 x 8 matrices of 16-bit numbers from shared memory."""
    count, transposed = matrices_of(instruction)
    target, source = instruction.operands
    addresses_of = address_reader(instruction, code, source)
    writes = [writer(instruction, code, one, WORD) for one in elements_of(target)]

    def run(machine):
        machine.whole_warps()
        places, size = element_addresses(machine, addresses_of(machine), count, transposed)
        data = machine.load("shared", places, size)
        # (matrices, pieces, lanes, bytes): the pieces of a matrix go side by side.
        data = data.reshape(count, 4 // size, machine.lanes, size).transpose(0, 2, 1, 3)
        data = data.reshape(count, machine.lanes, 4).view(WORD)[..., 0]
        for write, numbers in zip(writes, data):
            write(machine, numbers)

    return run


def store_matrices(instruction, code):
    """stmatrix (section 9.7.14.5.16): `ldmatrix` backwards."""
    count, transposed = matrices_of(instruction)
    target, source = instruction.operands
    addresses_of = address_reader(instruction, code, target)
    reads = [reader(instruction, code, one, WORD) for one in elements_of(source)]

    def run(machine):
        machine.whole_warps()
        places, size = element_addresses(machine, addresses_of(machine), count, transposed)
        data = np.stack(read_all(machine, reads)).view(np.uint8)
        data = data.reshape(count, machine.lanes, 4 // size, size).transpose(0, 2, 1, 3)
        machine.store("shared", places, data.reshape(-1, size))

    return run


# ---- wgmma: a warp group -------------------------------------------------------------------------

SWIZZLES = {0: 16, 1: 128, 2: 64, 3: 32}  # {code in a descriptor: bytes of a row of an 8-row atom}


def described_addresses(descriptor, rows, k_major):
    """Where the elements of a factor lie in shared memory: (rows, 16 k) addresses.

    descriptor: an int (section 9.7.15.5.1). rows: 64 for A, the columns of the product for B.
    k_major: True if the elements of a row lie side by side, False if those of a column do.

    The matrix consists of atoms with 8 lines of `width` bytes. The address bits 4 to 6 of a line
    are XORed with its number, so that eight lines touch all banks.
    """
    start = (descriptor & 0x3FFF) << 4
    leading = (descriptor >> 16 & 0x3FFF) << 4
    stride = (descriptor >> 32 & 0x3FFF) << 4
    width = SWIZZLES[descriptor >> 62]
    row = np.arange(rows)[:, None]
    k = np.arange(16)[None, :]
    if k_major:
        # Lines are rows. Without a swizzle, `leading` bytes separate the halves of k.
        chunk, within = np.divmod(2 * k, width)
        if width > 16:  # a line holds all 16 k, from `start` on
            chunk, within = 0, 2 * k
        address = row // 8 * stride + row % 8 * width + chunk * leading + within
    else:
        # Lines are columns k, each with width / 2 rows. `leading` bytes to the next rows, `stride`
        # to the next 8 columns; the other way round without a swizzle.
        chunk, within = np.divmod(2 * row, width)
        next_rows, next_columns = (stride, leading) if width == 16 else (leading, stride)
        address = chunk * next_rows + within + k // 8 * next_columns + k % 8 * width
    address = start + address
    return address ^ (address >> 7 & 7 & (width // 16 - 1)) << 4


class Product(NamedTuple):
    """A wgmma in flight: its accumulators, and what it reads."""

    group: int  # that it is committed in
    targets: list  # the registers of the accumulator
    numbers: np.ndarray  # (registers, lanes): what they will hold
    inputs: list  # the registers that hold A, if any
    places: list  # arrays of offsets in shared memory that it reads, in elements of 2 bytes


class ProductForm(NamedTuple):
    """What the text of a wgmma.mma_async says."""

    type: str  # of A and B: f16 or bf16
    columns: int  # N
    in_registers: bool  # A is
    k_major_a: bool  # see `described_addresses`
    k_major_b: bool


def product_form(instruction):
    """The `ProductForm` of an instruction. Raises PtxError for another form."""
    kind = instruction.modifiers
    shape, d_type, a_type, b_type = kind[-4:]
    if (
        kind[:3] != ("mma_async", "sync", "aligned")
        or not shape.startswith("m64n")
        or not shape.endswith("k16")
        or d_type != "f32"
        or a_type != b_type
        or a_type not in ("f16", "bf16")
    ):
        raise unknown(instruction, "wgmma." + ".".join(kind))

    target, a, _, _, *settings = instruction.operands
    signs_and_layout = [setting.value for setting in settings]
    if signs_and_layout[:2] != [1, 1]:
        raise unknown(instruction, "wgmma that negates a factor")
    # A in registers has no layout to choose.
    turned_a, turned_b = (0, *signs_and_layout[2:])[-2:]
    columns = int(shape[4:-3])
    in_registers = isinstance(a, Vector)
    if (
        columns % 8
        or not 8 <= columns <= 256
        or len(target.elements) != columns // 2
        or not {turned_a, turned_b} <= {0, 1}
        or (in_registers and len(a.elements) != 4)
    ):
        raise unknown(instruction, "this form of the instruction")
    return ProductForm(a_type, columns, in_registers, not turned_a, not turned_b)


def group_product(instruction, code):
    """wgmma: D = A B + D, 64 rows, of halves into fp32 (section 9.7.15.5.2), and its waits."""
    if instruction.modifiers[0] in ("fence", "commit_group", "wait_group"):
        return group_control(instruction)
    type, columns, in_registers, k_major_a, k_major_b = product_form(instruction)
    target, a, b, scale_d, *_ = instruction.operands
    targets = [element.name for element in target.elements]
    reads_c = [reader(instruction, code, one, SINGLE) for one in target.elements]
    reads_a = [reader(instruction, code, one, WORD) for one in elements_of(a) if in_registers]
    long = np.dtype(np.uint64)
    read_a = None if in_registers else reader(instruction, code, a, long)
    read_b = reader(instruction, code, b, long)
    read_scale = reader(instruction, code, scale_d, np.dtype(bool))
    inputs = list(registers_in(a)) if in_registers else []

    def run(machine):
        if machine.lanes % GROUP or machine.mask is not None:
            machine.wrong("divergence", "not all threads take part in a wgmma", machine.active())
            return
        places = []
        if in_registers:
            left = matrix_a(read_all(machine, reads_a), type).reshape(-1, 64, 16)
        else:
            left, where = from_shared(machine, read_a(machine), 64, k_major_a, type)
            places += where
        right, where = from_shared(machine, read_b(machine), columns, k_major_b, type)
        places += where
        result = left @ right.transpose(0, 2, 1)  # (groups, 64, columns)
        keeps = machine.spread(read_scale(machine))[::GROUP]
        before = matrix_c(accumulators(machine, targets, reads_c)).reshape(result.shape)
        result += np.where(keeps[:, None, None], before, 0)
        result = one_nan(result.astype(np.float32))
        numbers = registers_c(result.reshape(-1, 16, columns))
        product = Product(machine.product_groups, targets, numbers, inputs, places)
        machine.products.append(product)
        if machine.watch:
            machine.watch.on_product_begin(machine, product)
        # Until the wait the registers hold nothing that may be read.
        for name in targets:
            machine.registers[name] = np.full(machine.lanes, 0xFFFFFFFF, np.uint32)

    return run


def accumulators(machine, targets, reads):
    """The accumulator that a product adds to: that of an earlier one, if it is still in flight."""
    for product in reversed(machine.products):
        if product.targets == targets:
            return product.numbers
    return read_all(machine, reads)


def from_shared(machine, descriptors, rows, k_major, type):
    """A factor in shared memory: (groups, rows, 16) fp64, and the offsets that it was read from."""
    descriptors = machine.spread(descriptors).reshape(-1, GROUP)
    if (descriptors != descriptors[:, :1]).any():
        message = "the threads of a warp group have different descriptors"
        machine.wrong("wgmma", message, machine.active())
    halves = machine.shared.memory.view(np.uint16)
    numbers = []
    places = []
    for descriptor in descriptors[:, 0]:
        if int(descriptor) >> 49 & 7:
            raise PtxError("a descriptor with a base offset is not supported")
        addresses = described_addresses(int(descriptor), rows, k_major)
        wrong = machine.shared.wrong(addresses.ravel(), 2)
        offsets = (addresses - machine.shared.base) // 2
        if wrong:
            kind, message, _ = wrong
            machine.wrong(kind, message, machine.active())
            offsets = offsets.clip(0, len(halves) - 1)
        numbers.append(as_numbers(halves[offsets], type))
        places.append(offsets.ravel())
    return np.stack(numbers), places


def group_control(instruction):
    """wgmma.fence, .commit_group and .wait_group n (section 9.7.15.7)."""
    kind = instruction.modifiers[0]

    def run_fence(machine):
        if machine.watch:
            machine.watch.on_product_fence(machine)

    def commit(machine):
        machine.product_groups += 1

    def wait(machine):
        pending = instruction.operands[0].value
        first_pending = machine.product_groups - pending
        landing = [product for product in machine.products if product.group < first_pending]
        machine.products = [one for one in machine.products if one.group >= first_pending]
        for product in landing:
            if machine.watch:
                machine.watch.on_product_end(machine, product)
        in_flight = {name for product in machine.products for name in product.targets}
        for product in landing:
            for name, numbers in zip(product.targets, product.numbers):
                if name not in in_flight:
                    machine.registers[name] = numbers.view(np.uint32)

    return {"fence": run_fence, "commit_group": commit, "wait_group": wait}[kind]
