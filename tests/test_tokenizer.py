"""The tokenizer, against the tokenizers library and against transformers."""

import functools
import glob
import json
import os

import pytest
import tokenizers
import transformers
from conftest import STDLIB
from hypothesis import given
from hypothesis import strategies as st

from corpus.tokenizer import (
    ENCODER_TOKENS,
    SPECIAL_TOKENS,
    Tokenizer,
    byte_characters,
    train_tokenizer,
)

# Pieces that make the two libraries' regexes disagree if anything does: blanks before digits,
# marks, controls, and what looks like a special token.
PIECES = [" ", "  ", "\t", "\n", "\r\n", "1", "23", "٣", "½", "a", "Zed", "é", "e\u0301", "中文"]
PIECES += ["🙂", "'s", "'ll", "_", "-", "()", "\x00", "\x1c", "\x85", "\u2028", "\u3000"]
PIECES += ["\u200b", "\ufffd", "\ufeff", "<mask>", "<cls>", "<|endoftext|>", "<reponame>"]
PIECES += ["def ", "return", "0x1F"]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
texts = st.lists(st.sampled_from(PIECES) | any_text, max_size=20).map("".join)


@pytest.fixture(scope="module")
def gpt2_tokenizer(tokenizer):
    """The same with GPT-2's pre-tokenizer, which keeps the digits of a number together."""
    spec = json.loads(tokenizer.json)
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]
    return Tokenizer(json.dumps(spec))


@functools.cache
def library_of(tokenizer):
    """The library's own tokenizer, to which special tokens in a text are ordinary text."""
    library = tokenizers.Tokenizer.from_str(tokenizer.json)
    library.encode_special_tokens = True
    return library


def encoder_ids(tokenizer):
    return [tokenizer.pad_id, tokenizer.sep_id, tokenizer.cls_id, tokenizer.mask_id]


# ---- the same ids as the library's ----


@given(text=texts)
def test_ids_are_those_of_the_library_and_decode_inverts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == library_of(tokenizer).encode(text).ids
    assert tokenizer.decode(ids) == text


@given(text=texts)
def test_ids_with_the_pre_tokenizer_of_gpt2(gpt2_tokenizer, text):
    assert gpt2_tokenizer.encode(text) == library_of(gpt2_tokenizer).encode(text).ids


@pytest.mark.slow
def test_ids_are_those_of_the_library_on_the_whole_standard_library(stdlib_corpus):
    tokenizer = Tokenizer.from_pretrained(stdlib_corpus)
    texts = []
    for path in glob.glob(os.path.join(STDLIB, "**", "*.py"), recursive=True):
        if "site-packages" not in path:
            with open(path, "rb") as f:
                texts.append(f.read().decode(errors="replace"))
    assert len(texts) > 500
    encodings = library_of(tokenizer).encode_batch_fast(texts, add_special_tokens=False)
    for text, encoding in zip(texts, encodings, strict=True):
        ids = tokenizer.encode(text)
        assert ids == encoding.ids
        assert tokenizer.decode(ids) == text


@given(text=texts)
def test_offsets_are_those_of_the_library(tokenizer, text):
    offsets = tokenizer.offsets(text)
    assert offsets == library_of(tokenizer).encode(text).offsets
    covered = {c for start, end in offsets for c in range(start, end)}
    assert covered == set(range(len(text)))


def test_auto_tokenizer_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with open(os.path.join(STDLIB, "ast.py")) as f:
        source = f.read()
    for text in ("def f(x):\n    return x  12 34\n", "é中🙂 'll  \n\n\t1", source):
        ids = tokenizer.encode(text)
        assert auto(text)["input_ids"] == ids
        assert auto(text, add_special_tokens=False)["input_ids"] == ids
        assert auto.decode(ids) == text
    assert auto.mask_token_id == tokenizer.mask_id
    assert auto.pad_token_id == tokenizer.pad_id
    assert len(auto) == tokenizer.vocab_size
    # To transformers, special tokens in a text are special.
    assert auto("a <mask>")["input_ids"][-1] == tokenizer.mask_id


def test_special_tokens_stand_where_starcoder_has_them(tokenizer):
    assert [tokenizer.special_tokens[t] for t in SPECIAL_TOKENS] == list(range(19))
    assert tokenizer.special_tokens["<reponame>"] == 18
    assert encoder_ids(tokenizer) == list(range(596, 600))
    assert tokenizer.vocab_size == 600
    ids = [tokenizer.cls_id, *tokenizer.encode("x"), tokenizer.mask_id]
    assert tokenizer.decode(ids) == "<cls>x<mask>"


# ---- long runs ----

MANY = 1_200_000


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        " " * MANY + "x",
        "\n" * MANY,
        "x" + " " * MANY + "1",
        "a" * 300_000,
        "\xa0" * MANY + "a",
        "\x1c" * MANY,
    ],
    ids=["blanks", "newlines", "blanks and a digit", "letters", "wide blanks", "separators"],
)
def test_megabytes_of_one_character(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == library_of(tokenizer).encode(text).ids


@given(text=texts, long_run=st.integers(0, 4), gpt2=st.booleans())
def test_texts_with_long_runs_of_blanks(tokenizer, gpt2_tokenizer, text, long_run, gpt2):
    """What is done at half a million blanks, done at a few."""
    chosen = gpt2_tokenizer if gpt2 else tokenizer
    expected = chosen.encode(text)
    half_a_character = chosen.encode(text + "\ud800")  # which the library refuses
    try:
        chosen.long_run = long_run
        assert chosen.encode(text) == expected
        assert chosen.encode(text + "\ud800") == half_a_character == chosen.encode(text + "\ufffd")
    finally:
        del chosen.long_run  # the class has the real one


# ---- all of Unicode ----


def tokenizer_that_shows_cuts(tokenizer, gpt2):
    """A tokenizer whose ids tell where the text was cut into pieces.

    Its tokens are the bytes, and each byte above ASCII with each of "a1 _\\n" beside it.
    """
    spec = json.loads(tokenizer.json)
    character = {byte: c for c, byte in byte_characters().items()}
    vocabulary = {character[byte]: byte for byte in range(256)}
    merges = []
    for neighbour in b"a1 _\n":
        for byte in range(128, 256):
            for pair in ((neighbour, byte), (byte, neighbour)):
                merges.append([character[b] for b in pair])
                vocabulary["".join(merges[-1])] = len(vocabulary)
    spec["model"] |= {"vocab": vocabulary, "merges": merges}
    spec["added_tokens"] = []
    if gpt2:
        spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]
    return Tokenizer(json.dumps(spec))


PLACES = "a{0}1{0} {0}_"


def differing(characters, tokenizer):
    """Those characters in whose place in PLACES the two libraries give other ids."""
    text = "".join(PLACES.format(c) for c in characters)
    if tokenizer.encode(text) == library_of(tokenizer).encode(text, add_special_tokens=False).ids:
        return []
    if len(characters) == 1:
        return characters
    half = len(characters) // 2
    return differing(characters[:half], tokenizer) + differing(characters[half:], tokenizer)


@pytest.mark.parametrize("gpt2", [False, True])
def test_digits_of_a_newer_unicode_are_cut_as_the_library_cuts_them(tokenizer, gpt2):
    """Digits to the step `Digits`, and none to the regexes of the two libraries."""
    probe = tokenizer_that_shows_cuts(tokenizer, gpt2)
    digits = [chr(c) for c in [*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)]]
    assert not differing(digits, probe)
    for digit in digits:
        expected = library_of(probe).encode(digit, add_special_tokens=False).ids
        assert probe.encode(digit) == expected


@pytest.mark.slow
@pytest.mark.parametrize("gpt2", [False, True])
def test_every_code_point_is_cut_as_the_library_cuts_it(tokenizer, gpt2):
    """Alone, and between letters, digits, blanks and others.

    A new version of either library may fail here.
    """
    probe = tokenizer_that_shows_cuts(tokenizer, gpt2)
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    found = set()
    for i in range(0, len(characters), 4096):
        some = characters[i : i + 4096]
        found.update(differing(some, probe))
        alone = library_of(probe).encode_batch_fast(some, add_special_tokens=False)
        for c, encoding in zip(some, alone, strict=True):
            if probe.encode(c) != encoding.ids:
                found.add(c)
    assert not found, [f"{ord(c):X}" for c in sorted(found)]


# ---- reading and writing ----


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = Tokenizer.from_pretrained(str(tmp_path))
    assert (again.sha256, again.json) == (tokenizer.sha256, tokenizer.json)
    assert Tokenizer.from_pretrained(str(tmp_path / "tokenizer.json")).sha256 == tokenizer.sha256


def test_a_tokenizer_without_the_encoder_tokens_gets_them_at_its_end(tokenizer):
    """StarCoder's own tokenizer.json ends at 49,151; StarEncoder added four."""
    spec = json.loads(tokenizer.json)
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in ENCODER_TOKENS]
    again = Tokenizer(json.dumps(spec))
    assert again.vocab_size == 600
    assert encoder_ids(again) == list(range(596, 600))


@pytest.mark.parametrize("strategy", ["BatchLongest", {"Fixed": 50}])
def test_padding_and_truncation_of_a_tokenizer_json_do_nothing_here(tokenizer, strategy):
    spec = json.loads(tokenizer.json)
    spec["padding"] = {
        "strategy": strategy,
        "direction": "Left",
        "pad_to_multiple_of": 8,
        "pad_id": 3,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    spec["truncation"] = {
        "direction": "Right",
        "max_length": 5,
        "strategy": "LongestFirst",
        "stride": 0,
    }
    again = Tokenizer(json.dumps(spec))
    for text in ("def f(x):", "x" * 100, " " * 600_000 + "x"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == text


# ---- what is refused ----


def swap_two_ids(spec):
    a, b = ("".join(merge) for merge in spec["model"]["merges"][:2])
    vocabulary = spec["model"]["vocab"]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def make_a_token_unreachable(spec):
    """Has the merges Q+X, Z+Q and ZQ+X: the first is always done, so the library never makes ZQX.
    tiktoken would."""
    vocabulary = spec["model"]["vocab"]
    for token, i in list(vocabulary.items()):
        if i >= 275:  # behind the 19 special tokens and the 256 bytes
            del vocabulary[token]
    spec["model"]["merges"] = [["Q", "X"], ["Z", "Q"], ["ZQ", "X"]]
    vocabulary |= {"QX": 275, "ZQ": 276, "ZQX": 277}
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in ENCODER_TOKENS]


def leave_a_gap(spec):
    """Removes the last token but one. The last keeps its id, at which the library puts a special
    token."""
    token = "".join(spec["model"]["merges"].pop(-2))
    del spec["model"]["vocab"][token]


def make_a_merged_token_special(spec):
    token = "".join(spec["model"]["merges"][0])
    entry = {"id": spec["model"]["vocab"][token], "content": token, "special": True}
    spec["added_tokens"].append(spec["added_tokens"][0] | entry)
    spec["added_tokens"].sort(key=lambda t: t["id"])


def change_byte_level(**entries):
    def change(spec):
        spec["pre_tokenizer"]["pretokenizers"][1].update(entries)

    return change


def change_model(**entries):
    return lambda spec: spec["model"].update(entries)


def change_top(**entries):
    return lambda spec: spec.update(entries)


@pytest.mark.parametrize(
    "change, words",
    [
        (swap_two_ids, "order of the merges"),
        (make_a_token_unreachable, "never make"),
        (leave_a_gap, "there are gaps or doubles"),
        (make_a_merged_token_special, "may come of ordinary text"),
        (change_top(normalizer={"type": "NFC"}), "normalizer"),
        (change_top(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer"),
        (change_top(pre_tokenizer=None), "pre-tokenizer"),
        (change_top(pre_tokenizer={"type": "Sequence", "pretokenizers": []}), "pre-tokenizer"),
        (lambda spec: spec["pre_tokenizer"]["pretokenizers"].pop(), "pre-tokenizer"),
        (change_byte_level(add_prefix_space=True), "pre-tokenizer"),
        (change_top(model=None), "it has no model"),
        (change_model(dropout=0.1), "dropout"),
        (change_model(continuing_subword_prefix="é"), "'continuing_subword_prefix' is not supp"),
        (change_model(continuing_subword_prefix="##"), "'continuing_subword_prefix' is not supp"),
        (
            change_model(type="WordLevel", unk_token="x"),
            "data did not match|not a byte-level BPE",
        ),
        (lambda spec: spec["added_tokens"][0].update(special=False), "not supported"),
        (lambda spec: spec["model"]["vocab"].update(orphan=600), "no merge makes.* 'orphan'"),
        (lambda spec: spec["model"]["vocab"].update({"!": 20}), "some of the 256 bytes"),
        (lambda spec: spec["model"]["vocab"].pop("a"), "cannot be used"),
    ],
)
def test_refuses_a_tokenizer_that_tiktoken_cannot_run(tokenizer, tmp_path, change, words, capfd):
    spec = json.loads(tokenizer.json)
    change(spec)
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=words) as refused:
        Tokenizer.from_pretrained(str(tmp_path))
    assert "\n" not in str(refused.value)
    assert "panicked" not in capfd.readouterr().err


def test_refuses_what_is_no_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such tokenizer"):
        Tokenizer.from_pretrained(str(tmp_path))
    for content in ("{", "[]", "3", "null", "[" * 100_000, '{"model": 3}'):
        (tmp_path / "tokenizer.json").write_text(content)
        with pytest.raises(ValueError, match="cannot be used"):
            Tokenizer.from_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="at least 279"):
        train_tokenizer(["text"], 278)
