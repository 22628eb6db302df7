"""The memory that a kernel sees: bytes, addresses, and what happens at a wrong one.

A wrong address is a finding, never a crash: what is loaded from it is poison, and what is stored
there is lost.

**Global memory.** Each tensor that a kernel was given lies in a region of its own, a terabyte from
the next, at the alignment that it really has. So every address outside of its tensor is seen; on a
GPU it would lie in a neighbour. Tensors that overlap share a region.

**Shared memory** begins at an address that is a multiple of 1,024, as on the device: swizzled
layouts compute with the bits of an address.

**Poison.** What nobody wrote holds 0xFF in every byte, a NaN. A result that used it is NaN as well.

Reference: PTX ISA 8.7, sections 5.1 (state spaces) and 9.7.9.1 (cache operators), 6.4.1 (an address
must be a multiple of the size of the access).
"""

import ctypes

import numpy as np

WARP = 32  # threads that run together
POISON = 0xFF  # each byte: a NaN in fp16, bf16 and fp32, and -1 as an integer
REGION_BITS = 40  # a region for each tensor: 2^40 bytes
SHARED_BASE = 1024
LARGEST = 16  # bytes of one access


def rows_of(memory, size):
    """A view of bytes as aligned rows of `size` bytes: (..., size)."""
    return memory.reshape(-1, size)


class Bytes:
    """A piece of memory with its first address."""

    def __init__(self, name, memory, base, first, end):
        """memory: uint8, of a length that is a multiple of 16. base: the address of memory[0].

        The addresses from `first` up to `end`, without it, may be accessed.
        """
        self.name = name
        self.memory = memory
        self.base = base
        self.first = first
        self.end = end

    def wrong(self, addresses, size):
        """What is wrong with accesses of `size` bytes: (kind, message, bool (n,)), or None."""
        outside = (addresses < self.first) | (addresses + size > self.end)
        if outside.any():
            address = int(addresses[outside][0])
            where = "across the end of"
            if address < self.first:
                where = f"{self.first - address} bytes before"
            elif address >= self.end:
                where = f"{address - self.end} bytes behind"
            return "bounds", f"{size} bytes {where} {self.name}", outside
        crooked = addresses % size != 0
        if crooked.any():
            address = int(addresses[crooked][0])
            message = f"{size} bytes at {address:#x}, which is no multiple of {size}"
            return "alignment", message, crooked
        return None


def shared_memory(size):
    """Shared memory of `size` bytes, poisoned."""
    memory = np.full(-(-size // LARGEST) * LARGEST, POISON, np.uint8)
    return Bytes("shared memory", memory, SHARED_BASE, SHARED_BASE, SHARED_BASE + size)


class GlobalMemory:
    """The tensors of a launch, each in a region of its own."""

    def __init__(self, tensors):
        """tensors: {name: tensor on the CPU}. They are read and written in place."""
        self.regions = []
        self.tensors = tensors  # keeps their memory alive
        full = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
        extents = sorted((*extent(tensor), name) for name, tensor in full.items())
        merged = []  # (first, end, names): real addresses
        for first, end, name in extents:
            if merged and first < merged[-1][1]:
                before, last, names = merged.pop()
                merged.append((before, max(last, end), [*names, name]))
            else:
                merged.append((first, end, [name]))
        self.real = []
        for number, (first, end, names) in enumerate(merged, 1):
            start = first // LARGEST * LARGEST
            length = -(-(end - start) // LARGEST) * LARGEST
            view = np.ctypeslib.as_array((ctypes.c_uint8 * length).from_address(start))
            base = (number << REGION_BITS) + start % 4096
            name = " and ".join(names)
            self.regions.append(Bytes(name, view, base, base + first - start, base + end - start))
            self.real.append(start)

    def pointer(self, tensor):
        """The address of a tensor's first element, as the kernel sees it."""
        if tensor.numel() == 0:
            return 0
        place = tensor.data_ptr()
        for region, start in zip(self.regions, self.real):
            address = region.base + place - start
            if region.first <= address < region.end:
                return address
        raise ValueError("this tensor is not among those of the launch")

    def region(self, number):
        """The region with this number, or None."""
        return self.regions[number - 1] if 1 <= number <= len(self.regions) else None


def extent(tensor):
    """(first, end): the real addresses that the elements of a tensor lie between."""
    span = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (span + 1) * tensor.element_size()
