"""From documents on disk to masked pairs to batches.

    example i    <cls> A <sep> B <sep>, masked: for a corpus, a split and a max_length, a pure
                 function of (seed, i); training saves no state of its data
    batch        examples laid end to end, without padding

Example i is the same on every rank, on every machine and after every restart, as long as NumPy's
version is: NumPy may change what the `random` and `integers` of its Generator make of a seed.

**Next-sentence pairs that B alone does not solve.** The model has to tell whether B follows A. If a
negative B were always the beginning of a file, "does B look like a beginning?" would be the answer,
without a look at A. Here an example takes two windows of different documents, trims both to the
shorter one's length, and cuts both at the same place:

    A = first[:cut]        B = first[cut:length] or second[cut:length], by a fair coin

Over an epoch both windows are uniform over all windows: the first by a shuffle, so that each is
proposed once, the second at random. If both are of one document, both are redrawn at random. So
the two candidates for B are exchangeable: whatever the coin, B alone has the same distribution, of
its tokens, its length and its place in the document.

A and B together may still be easy: a negative B is of another document, so often on another subject
(Lan et al., ALBERT, 2020) and, if the corpus has several languages, in another language.

References: Devlin et al., BERT, 2018 (the two tasks); Liu et al., RoBERTa, 2019 (new masks in each
epoch). Left out: how text becomes tokens on disk; that is in corpus/.
"""

import atexit
import itertools
import operator
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from common.ranges import mix, permute, share, starts_of
from common.signals import ignore_stop_signals
from corpus.store import open_parts, read_meta
from corpus.tokenizer import Tokenizer, train_tokenizer  # noqa: F401  for users of this file

# Devlin et al., section 3.1.
MASKED = 0.15  # share of the ordinary tokens that are to be predicted, unless another is asked for
REPLACED_BY_MASK = 0.8  # share of those that <mask> replaces
REPLACED_BY_RANDOM = 0.1  # share of those that a random token replaces; the others stay


class Window(NamedTuple):
    """Neighbouring tokens of a document: document[start:end]."""

    document: int  # numbered across all parts of the split
    start: int  # tokens from the document's beginning
    end: int  # one behind its last token

    @property
    def length(self):
        """The number of its tokens."""
        return self.end - self.start


class PairWindows(NamedTuple):
    """Where the tokens of a pair are."""

    a: Window
    b: Window
    next_sentence_label: int  # 1: B follows A; 0: B is from another document


class Pair(NamedTuple):
    """The tokens of a pair, before masking."""

    a: np.ndarray  # (tokens of A,) uint16 or uint32, as on disk
    b: np.ndarray  # (tokens of B,)
    next_sentence_label: int  # as in PairWindows


class Example(NamedTuple):
    """A masked pair: a sequence of T tokens, M of them to be predicted."""

    input_ids: np.ndarray  # (T,) int64: <cls> A <sep> B <sep>
    masked_positions: np.ndarray  # (M,) int64, ascending
    labels: np.ndarray  # (M,) int64: the tokens that stood there
    next_sentence_label: int  # as in PairWindows


class Batch(NamedTuple):
    """Examples end to end: B sequences, T tokens, M of them to be predicted. M may be 0."""

    input_ids: torch.Tensor  # (T,) int64
    # (B+1,) int32, as FlashAttention takes them: cumulative lengths. Sequence b is
    # input_ids[cu_seqlens[b]:cu_seqlens[b+1]].
    cu_seqlens: torch.Tensor
    labels: torch.Tensor  # (M,) int64
    next_sentence_label: torch.Tensor  # (B,) int64
    masked_positions: torch.Tensor  # (M,) int64, rows of input_ids

    def to(self, device):
        """The same batch on a device."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


# ---- masks ---------------------------------------------------------------------------------------


def mask_tokens(ids, generator, special, ordinary, mask_id, masked=MASKED):
    """Chooses tokens to be predicted, and replaces them in `ids` (T,) int64 in place.

    generator: a numpy Generator. special: (V,) bool, tokens that are never chosen. ordinary: the
    other ids, from which random replacements are drawn. masked: the share that is chosen.
    Returns masked_positions (M,), ascending, and labels (M,), the tokens that stood there.
    """
    chosen = generator.random(len(ids)) < masked  # (T,) bool: each token on its own
    positions = np.flatnonzero(chosen & ~special[ids])
    labels = ids[positions]

    # What replaces each of them: <mask>, a random token, or nothing.
    chance = generator.random(len(positions))  # (M,) uniform in [0, 1)
    random_ids = ordinary[generator.integers(len(ordinary), size=len(positions))]
    by_mask = chance < REPLACED_BY_MASK
    by_random = ~by_mask & (chance < REPLACED_BY_MASK + REPLACED_BY_RANDOM)
    ids[positions[by_mask]] = mask_id
    ids[positions[by_random]] = random_ids[by_random]
    return positions, labels


# ---- pairs ---------------------------------------------------------------------------------------


class PairDataset:
    """Masked sentence pairs of one split ("train" or "validation") of a corpus directory.

    A document is divided into windows of max_length - 3 tokens. If the last one would be shorter,
    it begins earlier instead, and overlaps the one before. A document shorter than that is one
    window. In an epoch each window is proposed once as the first of a pair, in shuffled order.

    len(dataset) is the number of examples in an epoch. `dataset[i]` is an `Example` for any i >= 0,
    however large: it belongs to epoch i // len(dataset).

    masked: the share of the ordinary tokens that are to be predicted.

    Raises ValueError for a corpus that is damaged, that another tokenizer made, or that is too
    small for pairs.
    """

    def __init__(self, directory, split, max_length, seed, masked=MASKED):
        if max_length < 5:
            need = "at least 5 (<cls> A <sep> B <sep>)"
            raise ValueError(f"max_length must be {need}, got {max_length}")
        if not 0 < masked < 1:
            raise ValueError(f"masked must lie between 0 and 1, got {masked}")
        self.arguments = (directory, split, max_length, seed, masked)
        self.directory = directory
        self.seed = seed % 2**64
        self.masked = masked
        self.window_size = max_length - 3  # what <cls> and both <sep> leave

        meta = read_meta(directory)
        tokenizer = Tokenizer.from_pretrained(directory)
        if tokenizer.sha256 != meta["tokenizer_sha256"]:
            words = "the tokens were made by another tokenizer than tokenizer.json"
            raise ValueError(f"{directory}: {words}; prepare the corpus again")
        self.languages = list(meta["languages"])  # names, for evaluation by language
        self.cls_id = tokenizer.cls_id
        self.sep_id = tokenizer.sep_id
        self.mask_id = tokenizer.mask_id
        self.special = np.zeros(tokenizer.vocab_size, bool)  # (V,): True for special tokens
        self.special[list(tokenizer.special_tokens.values())] = True
        self.ordinary = np.flatnonzero(~self.special)  # the ids of all others

        # Documents and windows are numbered across all parts of the split.
        self.parts = open_parts(directory, split, meta)
        # (parts+1,): each part's first document.
        self.document_starts = starts_of([len(part.offsets) - 1 for part in self.parts])
        lengths = np.concatenate([np.diff(part.offsets) for part in self.parts])  # (documents,)
        window_counts = -(-lengths // self.window_size)  # (documents,): the quotient, rounded up
        check_pairs(directory, split, window_counts)
        self.window_starts = starts_of(window_counts)  # (documents+1,): each one's first window

    def __reduce__(self):
        # A worker process opens the files itself: pickled arrays would carry their contents.
        return PairDataset, self.arguments

    def __len__(self):
        """The number of examples in an epoch: one for each window."""
        return int(self.window_starts[-1])

    def __getitem__(self, i):
        """The `Example` i. Raises IndexError if i is negative, ValueError if a file is damaged."""
        generator = self.random_stream(i)
        windows = self.draw(i, generator)
        a = self.tokens(windows.a)
        b = self.tokens(windows.b)
        # In int64, as PyTorch's embedding takes them; on disk they are smaller.
        pieces = [[self.cls_id], a, [self.sep_id], b, [self.sep_id]]
        ids = np.concatenate(pieces, dtype=np.int64)  # (T,)
        # Without this check, mask_tokens would raise an IndexError that does not say what to do.
        if ids.max() >= len(self.special):
            words = f"a token of example {i} is beyond the vocabulary; prepare the corpus again"
            raise ValueError(f"{self.directory}: {words}")

        # The same generator continues, from the pair to its masks.
        positions, labels = mask_tokens(
            ids, generator, self.special, self.ordinary, self.mask_id, self.masked
        )
        return Example(ids, positions, labels, windows.next_sentence_label)

    def __iter__(self):
        # Python would otherwise count i up until an IndexError, which never comes.
        return (self[i] for i in range(len(self)))

    def documents(self):
        """The number of documents."""
        return int(self.document_starts[-1])

    def document(self, d):
        """All tokens of document `d`, a view of the file."""
        part, d_in_part = self._part_of(d)
        return part.tokens[part.offsets[d_in_part] : part.offsets[d_in_part + 1]]

    def language(self, d):
        """The name of the language of document `d`."""
        part, d_in_part = self._part_of(d)
        return part.language(d_in_part)

    def _part_of(self, d):
        """The part that holds document `d`, and the document's number in it."""
        p = int(np.searchsorted(self.document_starts, d, side="right")) - 1
        return self.parts[p], d - int(self.document_starts[p])

    def window(self, w):
        """The `Window` number `w`, of len(dataset)."""
        d = int(np.searchsorted(self.window_starts, w, side="right")) - 1
        length = len(self.document(d))
        start = (w - int(self.window_starts[d])) * self.window_size
        start = max(0, min(start, length - self.window_size))  # the last one begins earlier
        return Window(d, start, min(start + self.window_size, length))

    def random_window(self, generator):
        """A `Window`, each as likely as any other."""
        return self.window(int(generator.integers(len(self))))

    def tokens(self, window):
        """The tokens of a `Window`, a view of the file."""
        return self.document(window.document)[window.start : window.end]

    def random_stream(self, i):
        """A new numpy Generator of example i, from which all its random choices are drawn in turn.

        Raises IndexError if i is negative.
        """
        # The 128 bits of Philox's key: the seed in the lower half, i in the upper one.
        return np.random.Generator(np.random.Philox(key=self.seed | (example_number(i) << 64)))

    def proposal(self, i):
        """The number of the window proposed as the first of pair i: each one once an epoch.

        If the second window is of the same document, `draw` redraws both.
        """
        epoch, place = divmod(example_number(i), len(self))
        # Hashed twice: by mix(seed + epoch), epoch 1 of a seed would be epoch 0 of the next.
        return permute(place, len(self), key=mix(mix(self.seed) + epoch))

    def draw(self, i, generator):
        """The `PairWindows` of example i, by a generator fresh from `random_stream(i)`."""
        first = self.window(self.proposal(i))
        second = self.random_window(generator)
        # Redraw both windows. If only the second were redrawn, large documents would be rarer among
        # seconds than among firsts, and a B from a large document would hint at label 1.
        while second.document == first.document:
            first = self.random_window(generator)
            second = self.random_window(generator)

        # Trim both to the shorter one's length, and cut both at the same place in the middle half.
        # A document on disk, and so a window, has at least 2 tokens; A and B then have at least 1.
        length = min(first.length, second.length)
        first = trim(first, length, generator)
        second = trim(second, length, generator)
        margin = max(1, length // 4)
        cut = int(generator.integers(margin, length - margin + 1))

        # The coin decides which of the two B is taken from.
        label = int(generator.integers(2))
        source = first if label else second
        a = Window(first.document, first.start, first.start + cut)
        b = Window(source.document, source.start + cut, source.end)
        return PairWindows(a, b, label)

    def pair(self, i):
        """The `Pair` of example i: its tokens before masking."""
        a, b, label = self.draw(i, self.random_stream(i))
        return Pair(self.tokens(a), self.tokens(b), label)

    def languages_of_masks(self, i, example):
        """The language of the document of each masked token: M names.

        example: `self[i]`, which the caller has already, and which knows only tokens.
        """
        windows = self.draw(i, self.random_stream(i))
        language_of_a = self.language(windows.a.document)
        language_of_b = self.language(windows.b.document)
        sep = 1 + windows.a.length  # the position of the first <sep>, between A and B
        return [language_of_a if p < sep else language_of_b for p in example.masked_positions]


def example_number(i):
    """i as an int of Python, because a NumPy int would overflow. Raises IndexError if negative."""
    i = operator.index(i)
    if i < 0:
        raise IndexError(f"examples are numbered from 0, got {i}")
    return i


def trim(window, length, generator):
    """`length` tokens of a window from a random place in it, so that every token can be reached."""
    start = window.start + int(generator.integers(window.length - length + 1))
    return Window(window.document, start, start + length)


def check_pairs(directory, split, window_counts):
    """Raises ValueError if `draw` would find no two documents, or only after many redraws.

    window_counts: (documents,), the number of windows in each document.
    """
    count = len(window_counts)
    if count < 2:
        words = f"{split} has {count} documents; pairs need 2 or more, so prepare more text"
        raise ValueError(f"{directory}: {words}")
    largest_share = window_counts.max() / window_counts.sum()
    if largest_share > 0.99:
        words = f"one document is {largest_share:.1%} of {split}; pairs need others beside it"
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


class MicroBatches:
    """The DataLoader's dataset: indexed by a range of examples, it gives their batch."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, examples):
        """The `Batch` of these examples, or a ValueError or OSError, for `batches` to raise.

        Raised here, in a worker, it would come out of PyTorch with a traceback for a message.
        """
        try:
            return collate([self.dataset[i] for i in examples])
        except (ValueError, OSError) as error:
            return error


def batches(
    dataset, steps, batch_size, micro_batch_size, rank=0, world_size=1, workers=1, pin_memory=False
):
    """Yields, for each step of the range `steps`, the list of this rank's micro-batches.

    The examples of step s are [s * batch_size, (s + 1) * batch_size), whatever the world size.
    workers: processes that make batches ahead of time, from the first `next()` on; 0: none, batches
    are made on demand. Raises ValueError or OSError if an example cannot be read.
    """

    def micro_batches(step):
        return share(step * batch_size, batch_size, rank, world_size, micro_batch_size)

    loader = iter(
        DataLoader(
            MicroBatches(dataset),
            batch_size=None,  # the sampler's items are batches already
            sampler=(examples for step in steps for examples in micro_batches(step)),
            num_workers=workers,
            prefetch_factor=4 if workers else None,
            pin_memory=pin_memory,
            worker_init_fn=ignore_stop_signals,
            # PyTorch draws a base seed for the workers: by default from the global generator, which
            # is the caller's.
            generator=torch.Generator(),
        )
    )
    # When a program ends, even by an error, the interpreter sends SIGTERM to its workers and waits
    # for them. They ignore SIGTERM, and it would wait for ever. So end them in PyTorch's way first.
    if workers:
        atexit.register(loader._shutdown_workers)
    try:
        for step in steps:
            made = []
            for batch in itertools.islice(loader, len(micro_batches(step))):
                if isinstance(batch, Exception):
                    raise batch
                made.append(batch)
            yield made
    finally:
        if workers:
            atexit.unregister(loader._shutdown_workers)
            loader._shutdown_workers()
