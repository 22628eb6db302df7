"""Ranges of numbers, however long: shuffled without a list, and shared out over ranks.

References: Luby & Rackoff, How to Construct Pseudorandom Permutations, 1988 (Feistel networks);
Black & Rogaway, Ciphers with Arbitrary Finite Domains, 2002 (cycle walking); Steele et al., Fast
Splittable Pseudorandom Number Generators, 2014 (SplitMix64).
"""

import numpy as np

ROUNDS = 6  # 4 look random where the halves are long (Luby & Rackoff); 2 more for short ones


def mix(x):
    """A 64-bit hash of an int: the finalizer of SplitMix64."""
    # Each line spreads high bits to low ones; the product spreads them back. & keeps 64 bits.
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def permute(i, n, key):
    """The number at place i of a shuffle of range(n). The key, an int, selects the shuffle.

    A Feistel network shuffles all numbers of 2 * half bits, of which there are at most 4 n: in each
    round one half changes the other by a hash. If the result is n or more, the network is applied
    to it again until it is below n (cycle walking). That shuffles range(n), and takes at most 4
    applications on average.

    >>> sorted(permute(i, 10, key=7) for i in range(10)) == list(range(10))
    True
    """
    bits = (n - 1).bit_length()
    half = max(1, (bits + 1) // 2)  # bits of each half
    low = (1 << half) - 1  # selects the lower half
    while True:
        left = i >> half
        right = i & low
        for number in range(ROUNDS):
            # Undone by left = changed ^ (the same hash of right), so no two numbers become one.
            changed = left ^ (mix(mix(key + number) ^ right) & low)
            left = right
            right = changed
        i = (left << half) | right
        if i < n:  # otherwise walk on
            return i


def starts_of(lengths):
    """Where each of n things that are laid end to end starts, and where the last one ends.

    >>> starts_of([3, 1, 2]).tolist()
    [0, 3, 4, 6]
    """
    starts = np.zeros(len(lengths) + 1, np.int64)  # (n+1,)
    np.cumsum(lengths, out=starts[1:])
    return starts


def split_range(numbers, count):
    """Cuts a range into `count` neighbouring ranges whose lengths differ by at most one."""
    n = len(numbers)  # may be less than count: some are empty then
    return [numbers[n * k // count : n * (k + 1) // count] for k in range(count)]


def share(first, count, rank, world_size, micro_batch_size):
    """A rank's share of the examples [first, first + count): micro-batches, a list of ranges.

    Ranks hold neighbouring ranges whose lengths differ by at most one; together they hold every
    example once. No micro-batch is empty, and every rank has one if count >= world_size.

    >>> share(0, 8, rank=1, world_size=2, micro_batch_size=3)
    [range(4, 6), range(6, 8)]
    """
    examples = split_range(range(first, first + count), world_size)[rank]
    # Micro-batches of about equal size use the device better than full ones and a small rest.
    micro_batches = -(-len(examples) // micro_batch_size)  # the quotient, rounded up
    return split_range(examples, micro_batches)
