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

import argparse
import atexit
import contextlib
import errno
import functools
import hashlib
import json
import os
import re
import signal
import socket
import sys
import uuid
from typing import NamedTuple

import numpy as np
import tiktoken
import tokenizers
import torch
from torch.utils.data import DataLoader

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ---- the tokenizer ---------------------------------------------------------------------------------------------------------------

# StarCoder's special tokens, in the order of their ids: 0 to 18, and four at the end that StarEncoder adds.
SPECIAL_TOKENS = """<|endoftext|> <fim_prefix> <fim_middle> <fim_suffix> <fim_pad> <filename> <gh_stars> <issue_start> <issue_comment>
<issue_closed> <jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <empty_output> <commit_before> <commit_msg> <commit_after>
<reponame>""".split()
ENCODER_TOKENS = ["<pad>", "<sep>", "<cls>", "<mask>"]

# tiktoken cuts text with one regex where tokenizers has a pipeline. `Digits` cuts before each digit and before the regex of GPT-2 runs, so
# that blanks in front of a digit are one piece: hence `(?=\p{N})`. All that needs no look ahead stands in one atomic group, which the regex
# library runs as an automaton: the same pieces in half the time.
_WORDS = r"(?> ?\p{L}+|%s|'(?:[stmd]|re|ve|ll)| ?[^\s\p{L}\p{N}]+)|\s+(?:%s)|\s"
GPT2_PATTERN = _WORDS % (r" ?\p{N}+", r"(?!\S)")
# `Digits` knows a newer Unicode than the regexes do, with 13 digits more; a test compares all code points.
# They stand here as characters, since each regex library has an escape of its own.
_DIGIT = "\\p{N}\U00011de0-\U00011de9\U00016ff4-\U00016ff6"
DIGITS_PATTERN = _WORDS.replace(r"\p{N}", _DIGIT) % (f"[{_DIGIT}]", rf"(?=[{_DIGIT}])|(?!\S)")

# At a million blanks in a row tiktoken's regex panics: a run above this length is cut by hand.
# Python's \s has four more characters than that of the regexes.
LONG_RUN = 500_000
BLANKS = re.compile(r"[^\S\x1c-\x1f]+")


def _byte_characters():
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _check_readable(text):
    """Raises ValueError for a tokenizer.json that is none, or at which the library would panic."""
    spec = json.loads(text)
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict):
        raise ValueError("no tokenizer: it has no model")
    odd = "dropout continuing_subword_prefix end_of_word_suffix byte_fallback ignore_merges".split()
    if wrong := [name for name in odd if model.get(name)]:
        raise ValueError(f"not a plain byte-level BPE: {wrong[0]!r} is not supported")


def _has_digits(spec):
    """True for StarCoder's pre-tokenizer, False for GPT-2's.

    Raises ValueError for any other, and for a normalizer.
    """
    steps = spec["pre_tokenizer"] or {}
    steps = steps.get("pretokenizers", [steps])
    digits = steps[:1] == [{"type": "Digits", "individual_digits": True}]
    last = steps[1:] if digits else steps
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    plain = spec["model"]["type"] == "BPE" and spec["normalizer"] is None
    if not plain or len(last) != 1 or not byte_level.items() <= last[0].items():
        words = "not a byte-level BPE with GPT-2's or StarCoder's pre-tokenizer and no normalizer"
        raise ValueError(words)
    if ordinary := [t["content"] for t in spec["added_tokens"] if not t["special"]]:
        raise ValueError(f"not a plain byte-level BPE: {ordinary[0]!r} is not supported")
    return digits


def _check_vocabulary(vocabulary, merged, special):
    """Raises ValueError unless ids follow the merges, and each token is a byte, merged, or special.

    vocabulary, special: dicts of token -> id. merged: what each merge makes, in order.
    """
    made = _byte_characters().keys() | {*merged}
    ids = [vocabulary.get(token, -1) for token in merged]
    if any(a >= b for a, b in zip(ids, ids[1:])) or not made <= vocabulary.keys():
        words = "the ids do not follow the order of the merges, or some of the 256 bytes have none"
        raise ValueError(words)
    if unmade := vocabulary.keys() - made - special.keys():
        raise ValueError(f"no merge makes its token {min(unmade)!r}")
    if both := made & special.keys():
        raise ValueError(f"its special token {min(both)!r} may come of ordinary text")
    everything = vocabulary | special
    if sorted(everything.values()) != list(range(len(everything))):
        words = "do not have the ids from 0 up, each once: there are gaps or doubles"
        raise ValueError(f"its {len(everything)} tokens {words}")


class Tokenizer:
    """Byte-level BPE: stored as Hugging Face's tokenizer.json, run by tiktoken, which is several times faster.

    `text` is the content of a tokenizer.json. In tiktoken an id is a merge rank, so the ids must follow the order of the merges; that, and
    everything else that would make the two libraries disagree, is checked, and raises ValueError. A tokenizer without `<pad> <sep> <cls>
    <mask>` gets those that it lacks at its end, as StarEncoder did to StarCoder's.
    """

    def __init__(self, text):
        _check_readable(text)
        library = tokenizers.Tokenizer.from_str(text)
        if missing := [t for t in ENCODER_TOKENS if library.token_to_id(t) is None]:
            library.add_special_tokens(missing)
            text = library.to_str(pretty=True)
        self.json = text
        self._library = library
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

        spec = json.loads(library.to_str())  # as the library understood it, with every entry
        digits = _has_digits(spec)
        vocabulary = spec["model"]["vocab"]
        merged = ["".join(pair) for pair in spec["model"]["merges"]]
        self.special_tokens = {t["content"]: t["id"] for t in spec["added_tokens"]}
        _check_vocabulary(vocabulary, merged, self.special_tokens)
        # tiktoken joins any two neighbours that make a token; the library only those of a merge. They agree if the library can make
        # each token from its own bytes.
        if lost := [t for t in merged if len(library.model.tokenize(t)) != 1]:
            raise ValueError(f"its merges can never make the token {lost[0]!r}")

        byte_of = _byte_characters()
        ranks = {bytes(byte_of[c] for c in token): vocabulary[token] for token in [*byte_of, *merged]}
        self._tiktoken = tiktoken.Encoding(
            "starencoder",
            pat_str=DIGITS_PATTERN if digits else GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.vocab_size = len(vocabulary | self.special_tokens)
        self.pad_id, self.sep_id, self.cls_id, self.mask_id = (self.special_tokens[t] for t in ENCODER_TOKENS)

    @classmethod
    def from_pretrained(cls, path):
        """Reads `path`/tokenizer.json, or the file `path`. Raises ValueError for one that tiktoken could not run exactly."""
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        if not os.path.exists(file):
            raise FileNotFoundError(f"{file}: no such tokenizer; give a tokenizer.json or a directory that holds one")
        try:
            with open(file, encoding="utf-8") as f:
                return cls(f.read())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            # A parse error of the library is a bare Exception, a panic of its Rust code not even that.
            words = first_line(error)
            raise ValueError(f"{file}: this tokenizer cannot be used: {words}") from None

    def save_pretrained(self, directory):
        """Writes tokenizer.json and what `transformers.AutoTokenizer` needs beside it into `directory`."""
        os.makedirs(directory, exist_ok=True)
        names = {"pad_token": "<pad>", "sep_token": "<sep>", "cls_token": "<cls>", "mask_token": "<mask>"}
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False} | names
        for name, content in {"tokenizer.json": self.json, "tokenizer_config.json": json.dumps(config, indent=2)}.items():
            write_whole(os.path.join(directory, name), content)

    def encode(self, text):
        """str -> list of ids, without `<cls>` or `<sep>`. Text that looks like a special token is ordinary text."""
        if len(text) <= LONG_RUN:
            return self._tiktoken.encode_ordinary(text)
        ids, start = [], 0
        for run in BLANKS.finditer(text):
            if run.end() - run.start() > LONG_RUN:
                # A piece begins with the run. It ends with the run, or one blank before, as the next
                # character may take that blank: the library says which of the two, shown the last
                # blanks and that character alone.
                ids += self._tiktoken.encode_ordinary(text[start : run.start()])
                context = text[run.end() - 2 : run.end() + 1]
                context = context.encode(errors="replace").decode()  # half a surrogate is no text
                _, (_, length) = self._library.pre_tokenizer.pre_tokenize_str(context)[0]
                start = run.end() - 2 + length
                ids += self._tiktoken._encode_single_piece(text[run.start() : start])
        return ids + self._tiktoken.encode_ordinary(text[start:])

    def decode(self, ids):
        """list of ids -> str; bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self._tiktoken.decode([int(i) for i in ids])

    def offsets(self, text):
        """[(start, end)] in characters of `text`, for each token of encode(text); tokens that share a character all span it."""
        character = np.cumsum([b & 0xC0 != 0x80 for b in text.encode()]) - 1  # of each byte
        ends = np.cumsum([len(b) for b in self._tiktoken.decode_tokens_bytes(self.encode(text))], dtype=np.int64)
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends
        return list(zip(character[starts].tolist(), (character[ends - 1] + 1).tolist()))


def train_tokenizer(texts, vocab_size):
    """Trains a byte-level BPE as StarCoder's: digits one by one, no normalizer, special tokens first and last.

    texts: an iterable of str. vocab_size: all tokens, special ones included (49,156 for StarEncoder); fewer come out where the texts hold
    too few pairs. Raises ValueError for a size that has no room for the bytes and the special tokens.
    """
    least = len(SPECIAL_TOKENS) + 256 + len(ENCODER_TOKENS)
    if not least <= vocab_size < 2**31:
        raise ValueError(f"vocab_size must be at least {least} (the bytes and the special tokens), got {vocab_size}")
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([tokenizers.pre_tokenizers.Digits(individual_digits=True), byte_level])
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(ENCODER_TOKENS), special_tokens=SPECIAL_TOKENS, initial_alphabet=sorted(byte_level.alphabet())
    )
    library.train_from_iterator(texts, trainer)
    library.add_special_tokens(ENCODER_TOKENS)
    return Tokenizer(library.to_str(pretty=True))


# ---- examples --------------------------------------------------------------------------------------------------------------------

MASKED = 0.15  # of the ordinary tokens, each on its own; of these
REPLACED_BY_MASK, REPLACED_BY_RANDOM = 0.8, 0.1  # and the rest stays as it is (Devlin et al., section 3.1)


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


def _mix(x):
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
            left, right = right, left ^ (_mix(_mix(key + turn) ^ right) & low)
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
    ids[positions] = np.where(fate < REPLACED_BY_MASK, mask_id, np.where(fate < REPLACED_BY_MASK + REPLACED_BY_RANDOM, by_random, labels))
    return positions, labels


def read_meta(directory):
    """The meta.json of a corpus directory. Raises FileNotFoundError or ValueError for a directory that holds no whole corpus."""
    path = os.path.join(directory, "meta.json")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{directory}: no corpus here (no meta.json); make one with `python corpus.py SOURCE... --out {directory}`")
    meta = read_json(path)
    if not isinstance(meta, dict) or meta.get("format") != 2:
        raise ValueError(f"{path}: not of this version's format; prepare the corpus again")
    if not _is_whole(meta):
        words = "damaged (an entry is missing, or is none of its kind)"
        raise ValueError(f"{path}: {words}; prepare the corpus again")
    return meta


SPLITS = ("train", "validation")


def _is_whole(meta):
    """True if a meta.json has all entries, of their types, and the counts of its parts add up."""

    def is_table(entry, *columns):
        """Columns: the counts that each row has."""
        rows = entry.values() if isinstance(entry, dict) else [None]
        for row in rows:
            if not isinstance(row, dict) or not all(is_count(row.get(column)) for column in columns):
                return False
        return True

    def is_count(entry):
        return type(entry) is int and 0 <= entry < 2**63

    splits, parts, languages = meta.get("splits"), meta.get("parts"), meta.get("languages")
    if not isinstance(parts, list):
        return False
    if not all(is_table(part, "documents", "tokens", "longest") for part in parts):
        return False
    if not is_table(splits, "documents", "tokens"):
        return False
    if not is_table(languages, "documents", "bytes", "tokens"):
        return False
    if not languages or any(language["tokens"] == 0 for language in languages.values()):
        return False
    if not all(table.keys() == set(SPLITS) for table in [splits, *parts]):
        return False
    for split in SPLITS:
        for name in ("documents", "tokens"):
            if splits[split][name] != sum(part[split][name] for part in parts):
                return False
    if not isinstance(meta.get("tokenizer_sha256"), str) or meta.get("dtype") not in ("uint16", "uint32"):
        return False
    skipped = meta.get("skipped")
    return is_count(meta.get("vocab_size")) and isinstance(skipped, dict) and all(map(is_count, skipped.values()))


INDEX = np.dtype([("offset", np.int64), ("language", np.uint32)])
WINDOWS_TABLE = 4096


def part_file(directory, number, name):
    """The path of a file of a part: DIRECTORY/00007.train.bin."""
    return os.path.join(directory, f"{number:05d}.{name}")


def windows_table(lengths):
    """[C] -> windows of C tokens in documents of these lengths, C < WINDOWS_TABLE: with it, opening a part need not read its index."""
    lengths, counts = np.unique(lengths, return_counts=True)
    table, size = np.zeros(WINDOWS_TABLE, np.int64), np.arange(1, WINDOWS_TABLE)
    for i in range(0, len(lengths), 100):  # few at a time stay in cache
        table[1:] += counts[i : i + 100] @ -(-lengths[i : i + 100, None] // size)
    return table


class _Part:
    """One part of a split. What is in its files is read when it is first asked for."""

    def __init__(self, directory, number, split, counts, dtype, room):
        self.directory, self.number, self.stem, self.counts, self.dtype, self.room = directory, number, f"{split}.", counts, dtype, room
        path, count = self.path("bin"), counts["tokens"]
        if os.path.getsize(path) != count * dtype.itemsize:
            raise ValueError(f"{path}: {os.path.getsize(path):,} bytes instead of {count * dtype.itemsize:,}; prepare the corpus again")
        self.index = self.load("index.npy", counts["documents"] + 1, INDEX)
        if (self.index["offset"][0], self.index["offset"][-1]) != (0, count):
            raise ValueError(f"{self.path('index.npy')} does not fit {path}; prepare the corpus again")
        if room < WINDOWS_TABLE:
            self.windows = int(self.load("windows.npy", WINDOWS_TABLE, np.dtype(np.int64))[room])
        else:
            self.windows = int(self.first_window[-1])
        # The exact sum is looked at when the index is read.
        if not counts["documents"] <= self.windows <= count:
            raise ValueError(f"{self.path('windows.npy')}: damaged; prepare the corpus again")

    def path(self, name):
        return part_file(self.directory, self.number, self.stem + name)

    def load(self, name, length, dtype):
        """The array (length,) of a .npy file, mapped."""
        path = self.path(name)
        try:
            with open(path, "rb") as f:
                np.lib.format.read_magic(f)
                header = np.lib.format.read_array_header_1_0(f)
                start = f.tell()
            if header != ((length,), False, dtype):
                raise ValueError(f"not {length:,} entries of {dtype}")
            if os.path.getsize(path) != start + length * dtype.itemsize:
                raise ValueError("cut short, or longer than it says")
        except OSError:
            raise
        except Exception as error:  # NumPy reads the header as Python, and raises as that does
            words = first_line(error)
            raise ValueError(f"{path}: damaged ({words}); prepare the corpus again") from None
        return self.mapped(path, start).view(dtype)

    @staticmethod
    def mapped(path, offset=0):
        """The bytes of a file, mapped. NumPy would keep a file descriptor for each, of which a process may have 1,024."""
        size = os.path.getsize(path)
        return torch.from_file(path, size=size, dtype=torch.uint8).numpy()[offset:] if size else np.zeros(0, np.uint8)

    @functools.cached_property
    def tokens(self):
        return self.mapped(self.path("bin")).view(self.dtype)

    @property
    def offsets(self):
        return self.index["offset"]

    @functools.cached_property
    def first_window(self):
        lengths = np.diff(self.offsets)
        first = np.concatenate([[0], np.cumsum(-(-lengths // self.room))])
        if lengths.min(initial=2) < 2 or first[-1] != getattr(self, "windows", first[-1]):
            raise ValueError(f"{self.path('index.npy')}: damaged; prepare the corpus again")
        return first

    def language(self, document):
        """The name of the language of a document of this part."""
        number = int(self.index["language"][document])
        if number >= len(self.languages):
            path = self.path("index.npy")
            raise ValueError(f"{path}: damaged (language {number}); prepare the corpus again")
        return self.languages[number]

    @functools.cached_property
    def languages(self):
        path = part_file(self.directory, self.number, "json")
        facts = read_json(path)
        if not isinstance(facts, dict) or not isinstance(facts.get("languages"), dict):
            raise ValueError(f"{path}: damaged (it names no languages); prepare the corpus again")
        return list(facts["languages"])


class PairDataset:
    """Masked sentence pairs of one split ("train" or "validation") of a corpus directory.

    A document of n tokens has ceil(n / C) windows of C = max_length - 3 tokens; the last is moved back so that it is full as well, and a
    document below C is one window. An epoch proposes every window once as the first of a pair, in the order of a keyed permutation.
    `dataset[i]` is an `Example` for any i >= 0; the epoch is i // len(dataset).

    Raises ValueError for a corpus that is torn, that another tokenizer made, or that is too small for pairs.
    """

    def __init__(self, directory, split, max_length, seed):
        if max_length < 5:
            raise ValueError(f"max_length must be at least 5 (<cls> A <sep> B <sep>), got {max_length}")
        self.arguments = directory, split, max_length, seed
        meta = read_meta(directory)
        tokenizer = Tokenizer.from_pretrained(directory)
        if tokenizer.sha256 != meta["tokenizer_sha256"]:
            raise ValueError(f"{directory}: its tokens were made by another tokenizer than its tokenizer.json; prepare the corpus again")
        self.seed, self.room, dtype = seed, max_length - 3, np.dtype(meta["dtype"])
        if meta["splits"][split]["documents"] < 2:
            count = meta["splits"][split]["documents"]
            raise ValueError(f"{directory}: {split} has {count} documents; pairs need 2 or more, so prepare more text")
        self.parts = [_Part(directory, p, split, splits[split], dtype, self.room) for p, splits in enumerate(meta["parts"])]
        self.first_window = np.concatenate([[0], np.cumsum([part.windows for part in self.parts])])  # of each part
        self.first_document = np.concatenate([[0], np.cumsum([part.counts["documents"] for part in self.parts])])
        longest = -(-max(part.counts["longest"] for part in self.parts) // self.room)
        if longest > 0.99 * len(self):
            raise ValueError(f"{directory}: one document is {longest / len(self):.1%} of {split}; pairs need others beside it")
        self.languages = list(meta["languages"])  # of the corpus
        self.cls_id, self.sep_id, self.mask_id = tokenizer.cls_id, tokenizer.sep_id, tokenizer.mask_id
        self.special = np.zeros(tokenizer.vocab_size, bool)
        self.special[list(tokenizer.special_tokens.values())] = True
        self.ordinary = np.flatnonzero(~self.special)

    def __reduce__(self):  # a worker process opens the files itself; a pickled memmap would carry its content
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
        return permute(place, len(self), _mix(_mix(self.seed % 2**64) + epoch))

    def pair(self, i, generator=None):
        """(A, B, next_sentence_label) of example i, before masking. See the top of this file for why it is drawn so."""
        document, other, start, other_start, cut, length, follows = self._draw(i, generator or self._generator(i))
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
        (document, start, end), (other, other_start, other_end) = self.window(self.proposal(i)), draw()
        while other == document:  # both anew: a second window drawn until it fits the first would come less often from large documents
            (document, start, end), (other, other_start, other_end) = draw(), draw()
        length = min(end - start, other_end - other_start)
        start += int(generator.integers(end - start - length + 1))  # trimmed at a random place: no token is out of reach
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
        torch.from_numpy(np.concatenate([e.masked_positions + start for e, start in zip(examples, starts)])),
    )


# ---- batches ---------------------------------------------------------------------------------------------------------------------


def share(first, count, rank, world_size, micro_batch_size):
    """This rank's part of the examples [first, first + count), as a list of micro-batches (ranges of examples).

    Ranks hold neighbouring stretches that differ by at most one example; all of them together hold every example once, whatever
    the number of ranks. No micro-batch is empty, and every rank has one where count >= world_size.

    >>> share(0, 8, rank=1, world_size=2, micro_batch_size=3)
    [range(4, 6), range(6, 8)]
    """
    bounds = [first + count * r // world_size for r in (rank, rank + 1)]
    parts = -(-(bounds[1] - bounds[0]) // micro_batch_size)  # of equal size, rather than full ones and a small rest
    cuts = [bounds[0] + (bounds[1] - bounds[0]) * p // max(parts, 1) for p in range(parts + 1)]
    return [range(a, b) for a, b in zip(cuts, cuts[1:])]


STOP_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)]  # Windows has two


def _ignore_signals(worker):
    """A signal to the whole process group asks the trainer to save and stop; its workers serve until it has."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def batches(dataset, steps, batch_size, micro_batch_size, rank=0, world_size=1, workers=1, pin_memory=False):
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
        worker_init_fn=_ignore_signals,
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


# ---- what all programs here share ------------------------------------------------------------------------------------------------


class CommandLine(argparse.ArgumentParser):
    """The argument parser of all programs here: a bad flag is one line and exit status 2, not a page of usage."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message):
        """Ends the program."""
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main):
    """Runs a program: bad input, which is a ValueError or an OSError everywhere here, becomes one line and exit status 2."""
    try:
        main()
        sys.stdout.flush()
    except BrokenPipeError:  # who reads the output has enough, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(141)  # as of a process that SIGPIPE ends
    except (ValueError, OSError) as error:
        print(f"{program()}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def program():
    """The name under which this was started."""
    return os.path.basename(sys.argv[0])


def first_line(error):
    """The first line of what an error says, or its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:100]


def read_json(path, kind=dict):
    """The dict (or list, by `kind`) in a JSON file. Raises ValueError that names the file where it holds none."""
    with open(path, encoding="utf-8") as f:
        try:
            content = json.load(f)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: damaged ({first_line(error)})") from None
    if not isinstance(content, kind):
        raise ValueError(f"{path}: damaged (not a JSON {'object' if kind is dict else 'array'})")
    return content


def write_whole(path, content):
    """Writes text or bytes to `path` such that a reader finds the old content or the new, never half."""
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"  # several machines may write the same file
    try:
        with open(temporary, "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise


def lock_directory(path, name=".lock"):
    """Takes the lock `path`/`name`, which one process at a time can hold; returns an ExitStack whose `close` gives it back.

    The lock dies with its process, and also holds on NFS. It is fcntl's and not flock's, as the worker processes of a trainer that is
    killed would inherit the latter. Raises ValueError where another process holds it.
    """
    held = contextlib.ExitStack()
    if fcntl is None:
        return held
    file = os.path.join(path, name)
    while True:
        f = open(file, "a+")
        try:
            fcntl.lockf(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            f.seek(0)
            holder = f.read() or "another process"
            f.close()
            if error.errno in (errno.EACCES, errno.EAGAIN):
                words = f"{holder} is writing there; wait for its end, or choose another directory"
                raise ValueError(f"{path}: {words}") from None
            print(f"warning: {path}: cannot be locked ({error}); start nothing else there", file=sys.stderr)
            return held
        # Who held the lock before may have removed its file since it was opened here.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(f.fileno()), os.stat(file)):
                break
        f.close()
    f.truncate(0)
    f.write(f"process {os.getpid()} on {socket.gethostname()}")
    f.flush()
    held.enter_context(f)
    held.callback(_remove, file)  # before it is closed
    return held


def _remove(path):
    with contextlib.suppress(OSError):
        os.remove(path)
