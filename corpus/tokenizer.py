"""TODO."""

import hashlib
import json
import os
import re

import numpy as np
import tiktoken
import tokenizers

from common.command_line import first_line
from common.files import write_whole

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


def byte_characters():
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
    made = byte_characters().keys() | {*merged}
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

        byte_of = byte_characters()
        ranks = {
            bytes(byte_of[c] for c in token): vocabulary[token] for token in [*byte_of, *merged]
        }
        self._tiktoken = tiktoken.Encoding(
            "starencoder",
            pat_str=DIGITS_PATTERN if digits else GPT2_PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special_tokens,
        )
        self.vocab_size = len(vocabulary | self.special_tokens)
        self.pad_id, self.sep_id, self.cls_id, self.mask_id = (
            self.special_tokens[t] for t in ENCODER_TOKENS
        )

    @classmethod
    def from_pretrained(cls, path):
        """Reads `path`/tokenizer.json, or the file `path`. Raises ValueError for one that tiktoken could not run exactly."""
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        if not os.path.exists(file):
            raise FileNotFoundError(
                f"{file}: no such tokenizer; give a tokenizer.json or a directory that holds one"
            )
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
        names = {
            "pad_token": "<pad>",
            "sep_token": "<sep>",
            "cls_token": "<cls>",
            "mask_token": "<mask>",
        }
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
        } | names
        for name, content in {
            "tokenizer.json": self.json,
            "tokenizer_config.json": json.dumps(config, indent=2),
        }.items():
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
        ends = np.cumsum(
            [len(b) for b in self._tiktoken.decode_tokens_bytes(self.encode(text))], dtype=np.int64
        )
        starts = np.concatenate([[0], ends[:-1]]).astype(np.int64) if len(ends) else ends
        return list(zip(character[starts].tolist(), (character[ends - 1] + 1).tolist()))


def train_tokenizer(texts, vocab_size):
    """Trains a byte-level BPE as StarCoder's: digits one by one, no normalizer, special tokens first and last.

    texts: an iterable of str. vocab_size: all tokens, special ones included (49,156 for StarEncoder); fewer come out where the texts hold
    too few pairs. Raises ValueError for a size that has no room for the bytes and the special tokens.
    """
    least = len(SPECIAL_TOKENS) + 256 + len(ENCODER_TOKENS)
    if not least <= vocab_size < 2**31:
        raise ValueError(
            f"vocab_size must be at least {least} (the bytes and the special tokens), got {vocab_size}"
        )
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(individual_digits=True), byte_level]
    )
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(ENCODER_TOKENS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(byte_level.alphabet()),
    )
    library.train_from_iterator(texts, trainer)
    library.add_special_tokens(ENCODER_TOKENS)
    return Tokenizer(library.to_str(pretty=True))
