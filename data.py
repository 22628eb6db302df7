"""From documents on disk to masked pairs to batches.

    example i    <cls> A <sep> B <sep>, masked: a pure function of (seed, i), the same on every
                 rank, on every machine and after every restart; training saves no state of its data
    batch        examples laid end to end, without padding

**Next-sentence pairs that cannot be cheated.** The model has to tell whether B follows A. If a
negative B were always the beginning of a file, "does B look like a beginning?" would be the answer,
without a look at A. Here an example takes two windows of different documents, trims both to the
shorter one's length L, and cuts both at the same place c:

    A = first[:c]        B = first[c:L] or second[c:L], by a fair coin

Both windows are drawn in the same way, so the two candidates for B are exchangeable: whatever the
coin, B alone has the same distribution, of its tokens, its length and its place in the document.

References: Devlin et al., BERT, 2018 (the two tasks); Black & Rogaway, Ciphers with Arbitrary
Finite Domains, 2002 (cycle walking); Steele et al., Fast Splittable Pseudorandom Number Generators,
2014 (SplitMix64). Left out: how text becomes tokens on disk; that is in corpus/.
"""

import atexit
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.signals import ignore_stop_signals
from corpus.store import open_parts, read_meta
from corpus.tokenizer import Tokenizer, train_tokenizer  # noqa: F401  also found here

MASKED = 0.15  # of the ordinary tokens are to be predicted; of these,
REPLACED_BY_MASK = 0.8  # become <mask>,
REPLACED_BY_RANDOM = 0.1  # become a random token, and the rest stay (Devlin et al., section 3.1)


class Window(NamedTuple):
    """Neighbouring tokens of a document: document[start:end]."""

    document: int  # counted through all parts of the split
    start: int  # tokens from the document's beginning
    end: int  # one behind its last token


class Draw(NamedTuple):
    """Where the tokens of a pair are."""

    a: Window  # c tokens
    b: Window  # L - c tokens
    next_sentence_label: int  # 1: B follows A; 0: B is from another document


class Pair(NamedTuple):
    """The tokens of a pair, before masking."""

    a: np.ndarray  # (c,) uint16 or uint32, as on disk
    b: np.ndarray  # (L-c,)
    next_sentence_label: int  # as in Draw


class Example(NamedTuple):
    """A masked pair of n = L + 3 tokens, M of them to be predicted."""

    input_ids: np.ndarray  # (n,) int64: <cls> A <sep> B <sep>
    masked_positions: np.ndarray  # (M,) int64, rising
    labels: np.ndarray  # (M,) int64: the tokens that stood there
    next_sentence_label: int  # as in Draw


class Batch(NamedTuple):
    """Examples end to end: B sequences, T tokens, M of them masked."""

    input_ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (B+1,) int32: sequence b is input_ids[cu_seqlens[b]:cu_seqlens[b+1]]
    labels: torch.Tensor  # (M,) int64
    next_sentence_label: torch.Tensor  # (B,) int64
    masked_positions: torch.Tensor  # (M,) int64, rows of input_ids


# ---- shuffling without a list --------------------------------------------------------------------


def mix(x):
    """A 64-bit hash of a 64-bit int: the finalizer of SplitMix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def permute(i, n, key):
    """The place of i in a keyed shuffle of range(n), in O(1) memory: no list of a billion windows.

    A Feistel network permutes the numbers of an even count of bits. If it leads out of range(n), it
    is applied again until it is back (cycle walking), which permutes range(n). There are at most
    4 n such numbers, so it is applied at most 4 times on average.

    >>> sorted(permute(i, 10, key=7) for i in range(10)) == list(range(10))
    True
    """
    bits = max(1, ((n - 1).bit_length() + 1) // 2)  # of each half
    low = (1 << bits) - 1
    while True:
        left = i >> bits
        right = i & low
        for turn in range(6):  # each scrambles one half by a hash of the other
            left, right = right, left ^ (mix(mix(key + turn) ^ right) & low)
        i = left << bits | right
        if i < n:
            return i


def starts_of(lengths):
    """Where things of these lengths (n,), laid end to end, start; and where the last one ends."""
    starts = np.zeros(len(lengths) + 1, np.int64)  # (n+1,), from 0
    np.cumsum(lengths, out=starts[1:])
    return starts


# ---- masks ---------------------------------------------------------------------------------------


def mask_tokens(ids, generator, special, ordinary, mask_id):
    """Masks `ids` (n,) int64 in place. Each epoch masks other tokens, as in RoBERTa (Liu, 2019).

    generator: a numpy Generator. special: (V,) bool, tokens that are never masked. ordinary: the
    other ids, from which random replacements are drawn.
    Returns masked_positions (M,) and labels (M,).
    """
    chosen = generator.random(len(ids)) < MASKED  # (n,) bool: each token on its own
    positions = np.flatnonzero(chosen & ~special[ids])
    labels = ids[positions]

    fate = generator.random(len(positions))
    random_ids = ordinary[generator.integers(len(ordinary), size=len(positions))]
    by_mask = fate < REPLACED_BY_MASK
    by_random = fate < REPLACED_BY_MASK + REPLACED_BY_RANDOM  # if not by_mask
    ids[positions] = np.where(by_mask, mask_id, np.where(by_random, random_ids, labels))
    return positions, labels


# ---- pairs ---------------------------------------------------------------------------------------


class PairDataset:
    """Masked sentence pairs of one split ("train" or "validation") of a corpus directory.

    A document of n tokens has ceil(n / C) windows of C = max_length - 3 tokens. The last one is
    moved back so that it is full as well, and overlaps the one before; a document of less than C
    tokens is one window. An epoch proposes every window once as the first of a pair, in the order
    of a keyed shuffle. `dataset[i]` is an `Example` for any i >= 0, of epoch i // len(dataset).

    Raises ValueError for a corpus that is damaged, that another tokenizer made, or that is too
    small for pairs.
    """

    def __init__(self, directory, split, max_length, seed):
        if max_length < 5:
            least = "at least 5 (<cls> A <sep> B <sep>)"
            raise ValueError(f"max_length must be {least}, got {max_length}")
        self.arguments = (directory, split, max_length, seed)
        self.seed = seed % 2**64
        self.room = max_length - 3  # C: what <cls> and both <sep> leave

        meta = read_meta(directory)
        tokenizer = Tokenizer.from_pretrained(directory)
        check_tokenizer(directory, tokenizer, meta)
        self.languages = list(meta["languages"])
        self.cls_id = tokenizer.cls_id
        self.sep_id = tokenizer.sep_id
        self.mask_id = tokenizer.mask_id
        self.special = np.zeros(tokenizer.vocab_size, bool)  # (V,)
        self.special[list(tokenizer.special_tokens.values())] = True
        self.ordinary = np.flatnonzero(~self.special)

        # Documents and windows are numbered through all parts of the split.
        self.parts = open_parts(directory, split, meta)
        documents = [len(part.offsets) - 1 for part in self.parts]
        self.first_document = starts_of(documents)  # (parts+1,): the first one of each part
        windows = [-(-np.diff(part.offsets) // self.room) for part in self.parts]  # ceil(n / C)
        windows = np.concatenate(windows)  # (documents,)
        check_pairs(directory, split, windows)
        self.first_window = starts_of(windows)  # (documents+1,): the first one of each document

    def __reduce__(self):
        # A worker process opens the files itself: a pickled map would carry their contents.
        return PairDataset, self.arguments

    def __len__(self):
        """The number of examples in an epoch."""
        return int(self.first_window[-1])

    def __getitem__(self, i):
        generator = self.generator(i)
        a, b, follows = self.pair(i, generator)
        # Tokens on disk are uint16 or uint32; PyTorch indexes an embedding with int64.
        ids = np.empty(len(a) + len(b) + 3, np.int64)
        ids[0] = self.cls_id
        ids[1 : 1 + len(a)] = a
        ids[1 + len(a)] = self.sep_id
        ids[2 + len(a) : -1] = b
        ids[-1] = self.sep_id
        if ids.max() >= len(self.special):  # an overwritten file; a GPU would only say "assert"
            words = f"a token of example {i} is beyond the vocabulary; prepare the corpus again"
            raise ValueError(f"{self.arguments[0]}: {words}")
        # The same generator goes on from the pair to its masks.
        positions, labels = mask_tokens(ids, generator, self.special, self.ordinary, self.mask_id)
        return Example(ids, positions, labels, follows)

    def __iter__(self):
        return (self[i] for i in range(len(self)))  # one epoch; `dataset[i]` itself has no end

    # Documents and windows.

    def documents(self):
        """The number of documents."""
        return int(self.first_document[-1])

    def document(self, d):
        """The tokens (n,) of document `d`, a view of the file."""
        part, d = self._part_of(d)
        return part.tokens[part.offsets[d] : part.offsets[d + 1]]

    def language(self, d):
        """The name of the language of document `d`."""
        part, d = self._part_of(d)
        return part.language(d)

    def _part_of(self, d):
        """The part that holds document `d`, and the document's number in it."""
        p = int(np.searchsorted(self.first_document, d, side="right")) - 1
        return self.parts[p], d - int(self.first_document[p])

    def window(self, w):
        """The `Window` number `w`, of len(dataset)."""
        d = int(np.searchsorted(self.first_window, w, side="right")) - 1
        part, d_in_part = self._part_of(d)
        length = int(part.offsets[d_in_part + 1] - part.offsets[d_in_part])
        start = (w - int(self.first_window[d])) * self.room
        start = max(0, min(start, length - self.room))  # the last one is moved back
        return Window(d, start, min(start + self.room, length))

    # Examples.

    def proposal(self, i):
        """The number of the window that example i begins with, unless `draw` has to draw again."""
        epoch, place = divmod(i, len(self))
        return permute(place, len(self), key=mix(mix(self.seed) + epoch))  # each once an epoch

    def generator(self, i):
        """The random numbers of example i: a stream of its own, by its number and the seed."""
        if i < 0:
            raise IndexError(f"examples are numbered from 0, got {i}")
        return np.random.Generator(np.random.Philox(key=self.seed | i << 64))

    def draw(self, i, generator=None):
        """The `Draw` of example i. generator: `self.generator(i)`, which the masks go on with."""
        generator = generator or self.generator(i)
        first = self.window(self.proposal(i))
        second = self.window(int(generator.integers(len(self))))
        # Redraw both. Redrawing only the second would under-sample large documents there: B from
        # a large document would then be a sign that it follows A.
        while second.document == first.document:
            first = self.window(int(generator.integers(len(self))))
            second = self.window(int(generator.integers(len(self))))

        # Trim both to the shorter one's length L, and cut both at the same place, not too near an
        # end. Then the coin decides which of the two B is taken from.
        length = min(first.end - first.start, second.end - second.start)
        first = trim(first, length, generator)
        second = trim(second, length, generator)
        margin = max(1, length // 4)
        cut = int(generator.integers(margin, length - margin + 1))
        follows = int(generator.integers(2))
        source = first if follows else second
        return Draw(
            a=Window(first.document, first.start, first.start + cut),
            b=Window(source.document, source.start + cut, source.end),
            next_sentence_label=follows,
        )

    def pair(self, i, generator=None):
        """The `Pair` of example i: its tokens before masking. generator: as for `draw`."""
        draw = self.draw(i, generator)
        a = self.document(draw.a.document)[draw.a.start : draw.a.end]
        b = self.document(draw.b.document)[draw.b.start : draw.b.end]
        return Pair(a, b, draw.next_sentence_label)

    def languages_of_masks(self, i, example):
        """The language of each masked token's document. example: `self[i]`. Returns M names."""
        draw = self.draw(i)
        of_a = self.language(draw.a.document)
        of_b = self.language(draw.b.document)
        sep = 1 + draw.a.end - draw.a.start  # the position of the first <sep>, between A and B
        return [of_a if position < sep else of_b for position in example.masked_positions]


def trim(window, length, generator):
    """`length` tokens of a window from a random place in it, so that every token can be reached."""
    start = window.start + int(generator.integers(window.end - window.start - length + 1))
    return Window(window.document, start, start + length)


def check_tokenizer(directory, tokenizer, meta):
    """Raises ValueError unless this tokenizer made the tokens."""
    if tokenizer.sha256 != meta["tokenizer_sha256"]:
        words = "its tokens were made by another tokenizer than its tokenizer.json"
        raise ValueError(f"{directory}: {words}; prepare the corpus again")


def check_pairs(directory, split, windows):
    """Raises ValueError if two different documents can hardly be drawn. windows: (documents,)."""
    if len(windows) < 2:
        words = f"{split} has {len(windows)} documents; pairs need 2 or more, so prepare more text"
        raise ValueError(f"{directory}: {words}")
    largest = windows.max() / windows.sum()
    if largest > 0.99:
        words = f"one document is {largest:.1%} of {split}; pairs need others beside it"
        raise ValueError(f"{directory}: {words}")


# ---- batches -------------------------------------------------------------------------------------


def collate(examples):
    """Lays examples end to end: a `Batch` of CPU tensors."""
    starts = starts_of([len(example.input_ids) for example in examples])  # (B+1,)
    positions = [example.masked_positions + start for example, start in zip(examples, starts)]
    return Batch(
        input_ids=torch.from_numpy(np.concatenate([e.input_ids for e in examples])),
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        labels=torch.from_numpy(np.concatenate([e.labels for e in examples])),
        next_sentence_label=torch.tensor([e.next_sentence_label for e in examples]),
        masked_positions=torch.from_numpy(np.concatenate(positions)),
    )


def share(first, count, rank, world_size, micro_batch_size):
    """This rank's share of the examples [first, first + count), as micro-batches (ranges).

    Ranks hold neighbouring stretches whose lengths differ by at most one; together they hold every
    example once. No micro-batch is empty, and every rank has one if count >= world_size.

    >>> share(0, 8, rank=1, world_size=2, micro_batch_size=3)
    [range(4, 6), range(6, 8)]
    """
    begin = first + count * rank // world_size
    end = first + count * (rank + 1) // world_size
    # Micro-batches of about equal size use the device better than full ones and a small rest.
    parts = -(-(end - begin) // micro_batch_size)
    cuts = [begin + (end - begin) * p // parts for p in range(parts)] + [end]  # none: [end]
    return [range(a, b) for a, b in zip(cuts, cuts[1:])]


def batches(
    dataset, steps, batch_size, micro_batch_size, rank=0, world_size=1, workers=1, pin_memory=False
):
    """Yields, for each step of the range `steps`, the list of this rank's micro-batches.

    The examples of step s are [s * batch_size, (s + 1) * batch_size), whatever the world size.
    workers: processes that make batches ahead of time; 0: none, they are made on demand.
    Raises ValueError or OSError if an example cannot be read, also if a worker came across it.
    """

    def micro_batches(step):
        return share(step * batch_size, batch_size, rank, world_size, micro_batch_size)

    loader = iter(
        DataLoader(
            dataset,
            batch_sampler=(examples for step in steps for examples in micro_batches(step)),
            collate_fn=collate,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=ignore_stop_signals,
            generator=torch.Generator(),  # without one, the caller's global generator would advance
        )
    )
    # At its end, the interpreter sends SIGTERM to all child processes and waits for them. Workers
    # ignore SIGTERM, so they are told to end before that, even if an error ends the program.
    stop_workers = getattr(loader, "_shutdown_workers", lambda: None)  # absent without workers
    atexit.register(stop_workers)
    try:
        for step in steps:
            yield [next_batch(loader) for _ in micro_batches(step)]
    finally:
        atexit.unregister(stop_workers)
        stop_workers()


def next_batch(loader):
    """The next batch of a loader. PyTorch puts a worker's whole traceback into the message of its
    error; this raises the error with the worker's own message."""
    try:
        return next(loader)
    except (ValueError, OSError) as error:
        if not str(error).startswith("Caught "):  # this process raised it: there are no workers
            raise
        last_line = str(error).strip().splitlines()[-1]  # "ValueError: what went wrong"
        raise ValueError(last_line.partition(": ")[2]) from None
