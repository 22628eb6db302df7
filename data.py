"""From tokens on disk to batches: the tokenizer, sentence pairs, masks, and the loader that keeps the accelerator fed.

    corpus directory           tokenizer.json, meta.json, and parts. Of part p and each split: p.SPLIT.bin (the tokens of its documents, end
                               to end) and p.SPLIT.index.npy (where each document begins, and its language, by its number in p.json)
    example i                  <cls> A <sep> B <sep>, masked; a pure function of (seed, i): the same on every rank, on every machine and
                               after every restart, so that training needs no data state but the number of the step
    batch                      examples end to end, without padding

**Next-sentence pairs that cannot be cheated.** Were a negative B always the top of a file, "does B look like a top?" would solve the
task without a look at A. Here an example draws two windows of different documents, trims both to the shorter's length L and cuts both
at the same place c. A is first[:c]; B is first[c:L] or second[c:L], by a fair coin. The two windows are drawn alike, so the two
candidates for B are exchangeable: whatever the coin, B alone has the same distribution, of tokens, length and place in its window.

References: Devlin et al., BERT, 2018 (the two tasks); Black & Rogaway, Ciphers with Arbitrary Finite Domains, 2002 (cycle walking).
"""

import atexit
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.signals import ignore_stop_signals
from corpus.store import PartReader, read_meta
from corpus.tokenizer import Tokenizer, train_tokenizer  # noqa: F401  also found here

MASKED = 0.15  # of the ordinary tokens, each on its own; of these


REPLACED_BY_MASK, REPLACED_BY_RANDOM = (
    0.8,
    0.1,
)  # and the rest stays as it is (Devlin et al., section 3.1)


class Example(NamedTuple):
    """One masked pair of L tokens, M of them to be predicted."""

    input_ids: np.ndarray  # (L,) int64: <cls> A <sep> B <sep>
    masked_positions: np.ndarray  # (M,) int64, rising
    labels: np.ndarray  # (M,) int64: what stood there
    next_sentence_label: int  # 1: B follows A; 0: B is from another document


class Batch(NamedTuple):
    """Examples end to end: B sequences, T tokens, M masked."""

    input_ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (B+1,) int32
    labels: torch.Tensor  # (M,) int64
    next_sentence_label: torch.Tensor  # (B,) int64
    masked_positions: torch.Tensor  # (M,) int64, rows of input_ids

    def to(self, device):
        """The same batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


def mix(x):
    """A 64-bit hash of a 64-bit int (the finalizer of SplitMix64)."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


def permute(i, n, key):
    """Where a keyed permutation of range(n) sends i, in O(1) memory, so that an epoch of a billion windows needs no list.

    A Feistel network permutes the numbers of an even count of bits; where it leaves range(n) it is applied again until it is back
    (cycle walking), which is a permutation of range(n). At most 4 rounds of walking are expected.

    >>> sorted(permute(i, 10, key=7) for i in range(10)) == list(range(10))
    True
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    while True:
        left, right = i >> half, i & low
        for turn in range(6):
            left, right = right, left ^ (mix(mix(key + turn) ^ right) & low)
        i = left << half | right
        if i < n:
            return i


def mask_tokens(ids, generator, special, ordinary, mask_id):
    """Dynamic masking of `ids` (L,) int64, in place: 15 % of the ordinary tokens, 80 / 10 / 10.

    generator: a numpy Generator. special: (V,) bool, never masked. ordinary: the other ids, of which random replacements are drawn.
    Returns masked_positions (M,) and labels (M,).
    """
    positions = np.flatnonzero((generator.random(len(ids)) < MASKED) & ~special[ids])
    labels = ids[positions]
    fate = generator.random(len(positions))
    by_random = ordinary[generator.integers(len(ordinary), size=len(positions))]
    ids[positions] = np.where(
        fate < REPLACED_BY_MASK,
        mask_id,
        np.where(fate < REPLACED_BY_MASK + REPLACED_BY_RANDOM, by_random, labels),
    )
    return positions, labels


class PairDataset:
    """Masked sentence pairs of one split ("train" or "validation") of a corpus directory.

    A document of n tokens has ceil(n / C) windows of C = max_length - 3 tokens; the last is moved back so that it is full as well, and a
    document below C is one window. An epoch proposes every window once as the first of a pair, in the order of a keyed permutation.
    `dataset[i]` is an `Example` for any i >= 0; the epoch is i // len(dataset).

    Raises ValueError for a corpus that is torn, that another tokenizer made, or that is too small for pairs.
    """

    def __init__(self, directory, split, max_length, seed):
        if max_length < 5:
            raise ValueError(
                f"max_length must be at least 5 (<cls> A <sep> B <sep>), got {max_length}"
            )
        self.arguments = directory, split, max_length, seed
        meta = read_meta(directory)
        tokenizer = Tokenizer.from_pretrained(directory)
        if tokenizer.sha256 != meta["tokenizer_sha256"]:
            raise ValueError(
                f"{directory}: its tokens were made by another tokenizer than its tokenizer.json; prepare the corpus again"
            )
        self.seed, self.room, dtype = seed, max_length - 3, np.dtype(meta["dtype"])
        if meta["splits"][split]["documents"] < 2:
            count = meta["splits"][split]["documents"]
            raise ValueError(
                f"{directory}: {split} has {count} documents; pairs need 2 or more, so prepare more text"
            )
        self.parts = [
            PartReader(directory, p, split, splits[split], dtype, self.room)
            for p, splits in enumerate(meta["parts"])
        ]
        self.first_window = np.concatenate(
            [[0], np.cumsum([part.windows for part in self.parts])]
        )  # of each part
        self.first_document = np.concatenate(
            [[0], np.cumsum([part.counts["documents"] for part in self.parts])]
        )
        longest = -(-max(part.counts["longest"] for part in self.parts) // self.room)
        if longest > 0.99 * len(self):
            raise ValueError(
                f"{directory}: one document is {longest / len(self):.1%} of {split}; pairs need others beside it"
            )
        self.languages = list(meta["languages"])  # of the corpus
        self.cls_id, self.sep_id, self.mask_id = (
            tokenizer.cls_id,
            tokenizer.sep_id,
            tokenizer.mask_id,
        )
        self.special = np.zeros(tokenizer.vocab_size, bool)
        self.special[list(tokenizer.special_tokens.values())] = True
        self.ordinary = np.flatnonzero(~self.special)

    def __reduce__(
        self,
    ):  # a worker process opens the files itself; a pickled memmap would carry its content
        return PairDataset, self.arguments

    def __len__(self):
        """The number of examples of an epoch."""
        return int(self.first_window[-1])

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def window(self, w):
        """(document, start, end) of window `w`: the number of the document, and tokens of it."""
        p = int(np.searchsorted(self.first_window, w, side="right")) - 1
        part, w = self.parts[p], w - int(self.first_window[p])
        d = int(np.searchsorted(part.first_window, w, side="right")) - 1
        length = int(part.offsets[d + 1] - part.offsets[d])
        start = max(0, min((w - int(part.first_window[d])) * self.room, length - self.room))
        return int(self.first_document[p]) + d, start, min(start + self.room, length)

    def _part_of(self, document):
        p = int(np.searchsorted(self.first_document, document, side="right")) - 1
        return self.parts[p], document - int(self.first_document[p])

    def documents(self):
        """The number of documents."""
        return int(self.first_document[-1])

    def document(self, d):
        """The tokens of document `d`, a view of the file."""
        part, d = self._part_of(d)
        return part.tokens[part.offsets[d] : part.offsets[d + 1]]

    def language(self, d):
        """The name of the language of document `d`."""
        part, d = self._part_of(d)
        return part.language(d)

    def proposal(self, i):
        """The window that example i begins with, unless its partner is of the same document: each window once an epoch."""
        epoch, place = divmod(i, len(self))
        return permute(place, len(self), mix(mix(self.seed % 2**64) + epoch))

    def pair(self, i, generator=None):
        """(A, B, next_sentence_label) of example i, before masking. See the top of this file for why it is drawn so."""
        document, other, start, other_start, cut, length, follows = self._draw(
            i, generator or self._generator(i)
        )
        a, b = self.document(document), self.document(document if follows else other)
        b_start = start if follows else other_start
        return a[start : start + cut], b[b_start + cut : b_start + length], follows

    def languages_of_masks(self, i, example):
        """The language of the document of each masked token of example i, which is `example`."""
        document, other, *_, follows = self._draw(i, self._generator(i))
        a, b = self.language(document), self.language(document if follows else other)
        end_of_a = np.flatnonzero(example.input_ids == self.sep_id)[0]
        return [a if position < end_of_a else b for position in example.masked_positions]

    def _draw(self, i, generator):
        draw = lambda: self.window(int(generator.integers(len(self))))
        (document, start, end), (other, other_start, other_end) = (
            self.window(self.proposal(i)),
            draw(),
        )
        while (
            other == document
        ):  # both anew: a second window drawn until it fits the first would come less often from large documents
            (document, start, end), (other, other_start, other_end) = draw(), draw()
        length = min(end - start, other_end - other_start)
        start += int(
            generator.integers(end - start - length + 1)
        )  # trimmed at a random place: no token is out of reach
        other_start += int(generator.integers(other_end - other_start - length + 1))
        margin = max(1, length // 4)
        cut = int(generator.integers(margin, length - margin + 1))
        return document, other, start, other_start, cut, length, int(generator.integers(2))

    def __getitem__(self, i):
        generator = self._generator(i)
        a, b, follows = self.pair(i, generator)
        ids = np.empty(len(a) + len(b) + 3, np.int64)
        ids[0], ids[1 + len(a)], ids[-1] = self.cls_id, self.sep_id, self.sep_id
        ids[1 : 1 + len(a)], ids[2 + len(a) : -1] = a, b
        if ids.max() >= len(self.special):
            words = f"a token of example {i} is beyond the vocabulary; prepare the corpus again"
            raise ValueError(f"{self.arguments[0]}: {words}")
        positions, labels = mask_tokens(ids, generator, self.special, self.ordinary, self.mask_id)
        return Example(ids, positions, labels, follows)

    def _generator(self, i):
        if i < 0:
            raise IndexError(f"examples are numbered from 0, got {i}")
        return np.random.Generator(np.random.Philox(key=self.seed % 2**64 | i << 64))


def collate(examples):
    """Lays examples end to end: a `Batch` of CPU tensors."""
    lengths = [len(e.input_ids) for e in examples]
    starts = np.concatenate([[0], np.cumsum(lengths)])
    return Batch(
        torch.from_numpy(np.concatenate([e.input_ids for e in examples])),
        torch.from_numpy(starts.astype(np.int32)),
        torch.from_numpy(np.concatenate([e.labels for e in examples])),
        torch.tensor([e.next_sentence_label for e in examples]),
        torch.from_numpy(
            np.concatenate([e.masked_positions + start for e, start in zip(examples, starts)])
        ),
    )


def share(first, count, rank, world_size, micro_batch_size):
    """This rank's part of the examples [first, first + count), as a list of micro-batches (ranges of examples).

    Ranks hold neighbouring stretches that differ by at most one example; all of them together hold every example once, whatever
    the number of ranks. No micro-batch is empty, and every rank has one where count >= world_size.

    >>> share(0, 8, rank=1, world_size=2, micro_batch_size=3)
    [range(4, 6), range(6, 8)]
    """
    bounds = [first + count * r // world_size for r in (rank, rank + 1)]
    parts = -(
        -(bounds[1] - bounds[0]) // micro_batch_size
    )  # of equal size, rather than full ones and a small rest
    cuts = [bounds[0] + (bounds[1] - bounds[0]) * p // max(parts, 1) for p in range(parts + 1)]
    return [range(a, b) for a, b in zip(cuts, cuts[1:])]


def batches(
    dataset, steps, batch_size, micro_batch_size, rank=0, world_size=1, workers=1, pin_memory=False
):
    """For each step of the range `steps`, the list of this rank's micro-batches, made ahead of time by background processes.

    The examples of step s are [s * batch_size, (s + 1) * batch_size), whatever the world size. workers: processes; 0: none, made on demand.
    """

    def micro_batches(step):
        return share(step * batch_size, batch_size, rank, world_size, micro_batch_size)

    loader = DataLoader(
        dataset,
        batch_sampler=(part for step in steps for part in micro_batches(step)),
        collate_fn=collate,
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
        generator=torch.Generator(),  # or it would draw from torch's own, whose state is the caller's
    )
    loader = iter(loader)
    # At its end the interpreter terminates and joins all children, and these ignore SIGTERM:
    # they are told to end before, even where an error ends the program.
    stop = getattr(loader, "_shutdown_workers", lambda: None)
    atexit.register(stop)
    try:
        for step in steps:
            yield [_next(loader) for _ in micro_batches(step)]
    finally:
        atexit.unregister(stop)
        stop()


def _next(loader):
    """The next batch of a loader. A worker's error carries its traceback as text: the last line says it."""
    try:
        return next(loader)
    except (ValueError, OSError) as error:
        if not str(error).startswith("Caught "):
            raise
        raise ValueError(str(error).strip().splitlines()[-1].partition(": ")[2]) from None
