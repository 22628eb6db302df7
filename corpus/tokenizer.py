r"""Byte-level BPE: trained by the tokenizers library, stored as its tokenizer.json, and run by
tiktoken, which gives the same ids several times faster.

    in tokenizers                                in tiktoken
    a pipeline cuts the text into pieces         a regex does: GPT2_PATTERN or DIGITS_PATTERN
    a list of merges, first ones first           ids are ranks: the lowest id first
    special tokens in the text are special       encode_ordinary: they are ordinary text

A tokenizer.json that the two would run differently is refused when it is read.

References: Sennrich et al., Neural Machine Translation of Rare Words with Subword Units, 2016;
Radford et al., GPT-2, 2019 (on bytes); Li et al., StarCoder, 2023 (single digits, special tokens).
Left out: normalizers, and pre-tokenizers other than GPT-2's and StarCoder's.
"""

import hashlib
import json
import os
import re
import sys

import numpy as np
import tiktoken
import tokenizers

from common.command_line import first_line
from common.files import write_whole

# StarCoder's special tokens, in the order of their ids: 0 to 18.
SPECIAL_TOKENS = """
    <|endoftext|> <fim_prefix> <fim_middle> <fim_suffix> <fim_pad> <filename> <gh_stars>
    <issue_start> <issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code>
    <jupyter_output> <empty_output> <commit_before> <commit_msg> <commit_after> <reponame>
""".split()
ENCODER_TOKENS = ["<pad>", "<sep>", "<cls>", "<mask>"]  # StarEncoder's, at the end

# What cuts a text into pieces. The alternatives without a look-ahead stand in one atomic group,
# (?>...), which tiktoken's regex library runs as an automaton: the same pieces in half the time.
_WORDS = r"(?> ?\p{L}+|%s|'(?:[stmd]|re|ve|ll)| ?[^\s\p{L}\p{N}]+)|\s+(?:%s)|\s"
GPT2_PATTERN = _WORDS % (r" ?\p{N}+", r"(?!\S)")

# StarCoder cuts at every digit before GPT-2's regex runs, so all blanks in front of a digit are one
# piece: hence (?=...). Its `Digits` step knows 13 digits of a newer Unicode than the regexes do.
# They stand here as characters, because each regex library has escapes of its own.
_DIGIT = "\\p{N}\U00011de0-\U00011de9\U00016ff4-\U00016ff6"
DIGITS_PATTERN = _WORDS.replace(r"\p{N}", _DIGIT) % (f"[{_DIGIT}]", rf"(?=[{_DIGIT}])|(?!\S)")


class Tokenizer:
    """A tokenizer.json, run by tiktoken.

    text: the content of a tokenizer.json. If it lacks some of `<pad> <sep> <cls> <mask>`, they are
    added at its end, as StarEncoder did to StarCoder's. Raises ValueError for one that the two
    libraries would run differently.
    """

    long_run = 500_000  # blanks in a row; at a million, tiktoken's regex panics
    for_transformers = {}  # more entries of tokenizer_config.json

    def __init__(self, text):
        # Read it, and add what an encoder needs.
        check_readable(text)
        self._library = tokenizers.Tokenizer.from_str(text)
        missing = [t for t in ENCODER_TOKENS if self._library.token_to_id(t) is None]
        if missing:
            self._library.add_special_tokens(missing)
            text = self._library.to_str(pretty=True)
        self.json = text  # the content of a tokenizer.json
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()  # by which a corpus knows it

        # Make sure that tiktoken will do what the library would do.
        spec = json.loads(self._library.to_str())  # as the library understood it
        pattern = pattern_of(spec)
        vocabulary = spec["model"]["vocab"]  # token -> id
        merged = ["".join(pair) for pair in spec["model"]["merges"]]  # in the order of the merges
        self.special_tokens = {t["content"]: t["id"] for t in spec["added_tokens"]}  # token -> id
        check_added(spec["added_tokens"])
        check_vocabulary(vocabulary, merged, self.special_tokens)
        check_merges(self._library, merged)

        # Hand it to tiktoken, which has tokens as bytes. A byte-level vocabulary spells them in
        # printable characters, one for each byte.
        byte_of = byte_characters()
        ordinary = [*byte_of, *merged]  # all tokens but the special ones
        ranks = {bytes(byte_of[c] for c in token): vocabulary[token] for token in ordinary}
        self._tiktoken = tiktoken.Encoding(
            "starencoder",
            pat_str=pattern,
            mergeable_ranks=ranks,  # bytes -> id
            special_tokens=self.special_tokens,
        )

        # The library itself runs only in `encode`, where it has to do what tiktoken does.
        self._library.encode_special_tokens = True
        self._library.no_padding()
        self._library.no_truncation()

        self.vocab_size = len(vocabulary | self.special_tokens)
        self.pad_id = self.special_tokens["<pad>"]
        self.sep_id = self.special_tokens["<sep>"]
        self.cls_id = self.special_tokens["<cls>"]
        self.mask_id = self.special_tokens["<mask>"]

    @classmethod
    def from_pretrained(cls, path):
        """Reads `path`/tokenizer.json, or the file `path`.

        Raises FileNotFoundError, or ValueError for one that cannot be used.
        """
        file = os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path
        if not os.path.exists(file):
            advice = "give a tokenizer.json or a directory that holds one"
            raise FileNotFoundError(f"{file}: no such tokenizer; {advice}")
        try:
            with open(file, encoding="utf-8") as f:
                return cls(f.read())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            # The library's parse errors are bare Exceptions; panics of its Rust code are not even
            # that.
            words = f"this tokenizer cannot be used: {first_line(error)}"
            raise ValueError(f"{file}: {words}") from None

    def save_pretrained(self, directory):
        """Writes tokenizer.json, and tokenizer_config.json for `transformers.AutoTokenizer`."""
        os.makedirs(directory, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",  # the one that runs a tokenizer.json
            "clean_up_tokenization_spaces": False,  # decode gives back the very text
            "pad_token": "<pad>",
            "sep_token": "<sep>",
            "cls_token": "<cls>",
            "mask_token": "<mask>",
        }
        config |= self.for_transformers
        write_whole(os.path.join(directory, "tokenizer.json"), self.json)
        config_path = os.path.join(directory, "tokenizer_config.json")
        write_whole(config_path, json.dumps(config, indent=2))

    def encode(self, text):
        """str -> list of ids, without <cls> and <sep>.

        Text that looks like a special token is ordinary text.
        """
        blanks = re.findall(r"\s+", text) if len(text) > self.long_run else []
        if any(len(run) > self.long_run for run in blanks):
            # The library gives the same ids, slowly. It refuses half a surrogate pair, which
            # tiktoken reads as U+FFFD.
            text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            return self._library.encode(text, add_special_tokens=False).ids
        return self._tiktoken.encode_ordinary(text)

    def decode(self, ids):
        """list of ids -> str. Bytes that are not UTF-8 (half a character) become U+FFFD."""
        return self._tiktoken.decode([int(i) for i in ids])  # also of NumPy's ints

    def offsets(self, text):
        """[(start, end), ...] in characters of `text`, one for each token of encode(text).

        Tokens that share a character, each with some of its bytes, all span it.
        """
        # To which character each byte belongs: in UTF-8 all but its first byte are 10xxxxxx.
        character = np.cumsum([byte & 0xC0 != 0x80 for byte in text.encode()]) - 1  # (bytes,)
        tokens = self._tiktoken.decode_tokens_bytes(self.encode(text))
        lengths = np.array([len(token) for token in tokens], np.int64)  # in bytes
        ends = np.cumsum(lengths)  # (tokens,)
        first = character[ends - lengths]
        last = character[ends - 1]  # (tokens,)
        return list(zip(first.tolist(), (last + 1).tolist()))


def train_tokenizer(texts, vocab_size):
    """Trains a byte-level BPE as StarCoder's: digits one by one, special tokens first and last.

    texts: an iterable of str. vocab_size: all tokens, special ones included (49,156 in
    StarEncoder); fewer come out if the texts hold too few pairs.
    Raises ValueError for a size without room for the bytes and the special tokens.
    """
    smallest = len(SPECIAL_TOKENS) + 256 + len(ENCODER_TOKENS)  # without a single merge
    if not smallest <= vocab_size < 2**31:
        words = f"at least {smallest} (the bytes and the special tokens)"
        raise ValueError(f"vocab_size must be {words}, got {vocab_size}")

    # How a text is cut into pieces; pairs are merged only within a piece.
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    digits = tokenizers.pre_tokenizers.Digits(individual_digits=True)
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    library.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([digits, byte_level])
    library.decoder = tokenizers.decoders.ByteLevel()

    # Ids: special tokens, bytes, merges, and the encoder's tokens at the end, as in StarEncoder.
    trainer = tokenizers.trainers.BpeTrainer(
        show_progress=sys.stderr.isatty(),  # its bar is empty lines in a file
        vocab_size=vocab_size - len(ENCODER_TOKENS),
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(byte_level.alphabet()),  # all bytes, so that nothing is unknown
    )
    library.train_from_iterator(texts, trainer)
    library.add_special_tokens(ENCODER_TOKENS)
    return Tokenizer(library.to_str(pretty=True))


def byte_characters():
    """GPT-2's printable characters -> the bytes they stand for: "A" for itself, "Ġ" for " "."""
    # 173 is the soft hyphen, which cannot be seen; from 256 up come letters for such bytes.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}


def check_readable(text):
    """Raises ValueError for JSON that is no tokenizer, or one that makes the library panic."""
    spec = json.loads(text)
    model = spec.get("model") if isinstance(spec, dict) else None
    if not isinstance(model, dict):
        raise ValueError("no tokenizer: it has no model")
    # Fields of a BPE model that a plain byte-level one leaves empty.
    fields = "dropout continuing_subword_prefix end_of_word_suffix byte_fallback ignore_merges"
    for name in fields.split():
        if model.get(name):
            raise ValueError(f"not a plain byte-level BPE: {name!r} is not supported")


def pattern_of(spec):
    """The regex that cuts a text into pieces as this tokenizer.json does.

    Raises ValueError if that is neither StarCoder's way nor GPT-2's.
    """
    # The pre-tokenizer is one step, or a sequence of steps.
    pre_tokenizer = spec["pre_tokenizer"] or {}
    steps = [dict(step) for step in pre_tokenizer.get("pretokenizers", [pre_tokenizer])]
    for step in steps:
        step.pop("trim_offsets", None)  # does not touch the ids
    digits = {"type": "Digits", "individual_digits": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
    # A normalizer would change the text before it is cut.
    if spec["model"]["type"] == "BPE" and spec["normalizer"] is None:
        if steps == [byte_level]:
            return GPT2_PATTERN
        if steps == [digits, byte_level]:
            return DIGITS_PATTERN
    need = "with GPT-2's or StarCoder's pre-tokenizer and no normalizer"
    raise ValueError(f"not a byte-level BPE {need}")


def check_added(added_tokens):
    """Raises ValueError for added tokens that are not special: the library finds them in text."""
    for token in added_tokens:
        if not token["special"]:
            raise ValueError(f"not a plain byte-level BPE: {token['content']!r} is not supported")


def check_vocabulary(vocabulary, merged, special):
    """Raises ValueError unless ids follow the merges, and each token is a byte, merged, or special.

    vocabulary, special: token -> id. merged: the token that each merge makes, in order.
    """
    # tiktoken merges the pair of the lowest id first, the library the first in its list of merges.
    made = byte_characters().keys() | {*merged}
    ids = [vocabulary.get(token, -1) for token in merged]
    ascending = all(a < b for a, b in zip(ids, ids[1:]))
    if not ascending or not made <= vocabulary.keys():
        words = "the ids do not follow the order of the merges, or some of the 256 bytes have none"
        raise ValueError(words)
    # Text can become any token that has a rank: exactly the bytes and what the merges make.
    unmade = vocabulary.keys() - made - special.keys()
    if unmade:
        raise ValueError(f"no merge makes its token {min(unmade)!r}")
    both = made & special.keys()
    if both:
        raise ValueError(f"its special token {min(both)!r} may come of ordinary text")
    # The model's embedding has a row for each id from 0 up.
    everything = vocabulary | special
    if sorted(everything.values()) != list(range(len(everything))):
        words = "do not have the ids from 0 up, each once: there are gaps or doubles"
        raise ValueError(f"its {len(everything)} tokens {words}")


def check_merges(library, merged):
    """Raises ValueError for a token that tiktoken could make and the library could not.

    tiktoken joins any two neighbours that make a token, the library only those of a merge. They
    agree if the library makes each token from its own bytes.
    """
    for token in merged:
        if len(library.model.tokenize(token)) != 1:
            raise ValueError(f"its merges can never make the token {token!r}")
