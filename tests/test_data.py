"""The tokenizer against the tokenizers library, pairs and masks by their properties, and batches."""

import glob
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from unittest import mock

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from conftest import ROOT, STDLIB, write_corpus
from hypothesis import given
from hypothesis import strategies as st

import corpus
from common import files
from corpus import report, store
from corpus.tokenizer import (
    ENCODER_TOKENS,
    SPECIAL_TOKENS,
    Tokenizer,
    byte_characters,
    train_tokenizer,
)
from data import PairDataset, batches, collate, mask_tokens, permute, share

# Pieces that make the two libraries' regexes disagree if anything does: blanks before digits, marks, controls,
# and what looks like a special token.
PIECES = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "1",
    "23",
    "٣",
    "½",
    "a",
    "Zed",
    "é",
    "e\u0301",
    "中文",
    "🙂",
    "'s",
    "'ll",
    "_",
    "-",
    "()",
]
PIECES += ["\x00", "\x1c", "\x85", "\u2028", "\u3000", "\u200b", "\ufffd", "\ufeff"]
PIECES += ["<mask>", "<cls>", "<|endoftext|>", "<reponame>", "def ", "return", "0x1F"]
any_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
texts = st.lists(st.sampled_from(PIECES) | any_text, max_size=20).map("".join)


@pytest.fixture(scope="module")
def gpt2_tokenizer(tokenizer):
    """The same with GPT-2's pre-tokenizer, which keeps the digits of a number together."""
    spec = json.loads(tokenizer.json)
    spec["pre_tokenizer"] = spec["pre_tokenizer"]["pretokenizers"][1]
    return Tokenizer(json.dumps(spec))


def library_of(tokenizer):
    library = tokenizers.Tokenizer.from_str(tokenizer.json)
    library.encode_special_tokens = True
    return library


# ---- tokenizer ----


@given(text=texts)
def test_ids_are_those_of_the_library_and_decode_inverts(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids == library_of(tokenizer).encode(text).ids
    assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_ids_are_those_of_the_library_on_the_whole_standard_library(stdlib_corpus):
    tokenizer = Tokenizer.from_pretrained(stdlib_corpus)
    library = library_of(tokenizer)
    paths = glob.glob(os.path.join(STDLIB, "**", "*.py"), recursive=True)
    texts = [
        open(p, "rb").read().decode(errors="replace") for p in paths if "site-packages" not in p
    ]
    assert len(texts) > 500
    for text, encoding in zip(texts, library.encode_batch_fast(texts, add_special_tokens=False)):
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
    for text in [
        "def f(x):\n    return x  12 34\n",
        "é中🙂 'll  \n\n\t1",
        open(os.path.join(STDLIB, "ast.py")).read(),
    ]:
        assert (
            auto(text)["input_ids"]
            == tokenizer.encode(text)
            == auto(text, add_special_tokens=False)["input_ids"]
        )
        assert auto.decode(tokenizer.encode(text)) == text
    assert auto.mask_token_id == tokenizer.mask_id and auto.pad_token_id == tokenizer.pad_id
    assert (
        auto("a <mask>")["input_ids"][-1] == tokenizer.mask_id
    )  # there, special tokens in text are special
    assert len(auto) == tokenizer.vocab_size


def test_special_tokens_stand_where_starcoder_has_them(tokenizer):
    assert [tokenizer.special_tokens[t] for t in SPECIAL_TOKENS] == list(range(19))
    assert tokenizer.special_tokens["<reponame>"] == 18
    assert [tokenizer.pad_id, tokenizer.sep_id, tokenizer.cls_id, tokenizer.mask_id] == list(
        range(596, 600)
    )
    assert tokenizer.vocab_size == 600
    assert (
        tokenizer.decode([tokenizer.cls_id, *tokenizer.encode("x"), tokenizer.mask_id])
        == "<cls>x<mask>"
    )


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
)
def test_megabytes_of_one_character(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == library_of(tokenizer).encode(text).ids


BLANK_PIECES = [
    " ",
    "\n",
    "\u00a0",
    "\u3000",
    "\x1c",
    "\x85",
    "1",
    "٣",
    "\U00011de3",
    "a",
    "é",
    "_",
    "'s",
    "<mask>",
    "\u200b",
]


@given(
    text=st.lists(st.sampled_from(BLANK_PIECES), max_size=30).map("".join),
    longest=st.integers(1, 4),
    gpt2=st.booleans(),
)
def test_long_runs_are_cut_where_the_library_cuts(tokenizer, gpt2_tokenizer, text, longest, gpt2):
    """What is done at half a million blanks, done at a few."""
    chosen = gpt2_tokenizer if gpt2 else tokenizer
    with mock.patch.object(tokenizer, "LONG_RUN", longest):
        assert chosen.encode(text) == library_of(chosen).encode(text).ids
        # half a character, which the library refuses, is U+FFFD to tiktoken
        assert chosen.encode(text + "\ud800") == chosen.encode(text + "\ufffd")


def _spec_that_shows_cuts(tokenizer, gpt2):
    """Bytes, and a token of each byte above ASCII with each of "a1 _\\n" beside it: the ids tell where the text was cut."""
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
    return json.dumps(spec)


def _differing(characters, tokenizer, template):
    """Those of `characters` in whose place in `template` the two libraries give other ids."""
    text = "".join(template.format(c) for c in characters)
    if tokenizer.encode(text) == tokenizer._library.encode(text, add_special_tokens=False).ids:
        return []
    if len(characters) == 1:
        return characters
    half = len(characters) // 2
    return _differing(characters[:half], tokenizer, template) + _differing(
        characters[half:], tokenizer, template
    )


# Which the regexes of the two libraries take for no digits, and `Digits` for digits.
NEW_DIGITS = [chr(c) for c in [*range(0x11DE0, 0x11DEA), *range(0x16FF4, 0x16FF7)]]
PLACES = "a{0}1{0} {0}_"


@pytest.mark.parametrize("gpt2", [False, True])
def test_digits_of_a_newer_unicode_are_cut_as_the_library_cuts_them(tokenizer, gpt2):
    probe = Tokenizer(_spec_that_shows_cuts(tokenizer, gpt2))
    assert not _differing(NEW_DIGITS, probe, PLACES)
    for character in NEW_DIGITS:
        assert (
            probe.encode(character)
            == library_of(probe).encode(character, add_special_tokens=False).ids
        )


@pytest.mark.slow
@pytest.mark.parametrize("gpt2", [False, True])
def test_every_code_point_is_cut_as_the_library_cuts_it(tokenizer, gpt2):
    """All of Unicode, alone and between letters, digits, blanks and others. A new version of either library may fail here."""
    probe = Tokenizer(_spec_that_shows_cuts(tokenizer, gpt2))
    probe._library.encode_special_tokens = True
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    differing = set()
    for i in range(0, len(characters), 4096):
        some = characters[i : i + 4096]
        differing.update(_differing(some, probe, PLACES))
        alone = probe._library.encode_batch_fast(some, add_special_tokens=False)
        differing.update(
            c for c, encoding in zip(some, alone, strict=True) if probe.encode(c) != encoding.ids
        )
    assert not differing, [f"{ord(c):X}" for c in sorted(differing)]


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
    assert again.vocab_size == 600 and [
        again.pad_id,
        again.sep_id,
        again.cls_id,
        again.mask_id,
    ] == list(range(596, 600))


def test_gpt2_pretokenizer_is_read_as_well(gpt2_tokenizer):
    for text in ("a  12345 b\n\n  7", "x = 100_000  # 3.14"):
        assert gpt2_tokenizer.encode(text) == library_of(gpt2_tokenizer).encode(text).ids


PADDING = {
    "direction": "Left",
    "pad_to_multiple_of": 8,
    "pad_id": 3,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


@pytest.mark.parametrize("strategy", ["BatchLongest", {"Fixed": 50}])
def test_padding_and_truncation_of_a_tokenizer_json_do_nothing_here(tokenizer, strategy):
    spec = json.loads(tokenizer.json)
    spec["padding"] = PADDING | {"strategy": strategy}
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


def _spec_of(change):
    def changed(tokenizer):
        spec = json.loads(tokenizer.json)
        change(spec)
        return json.dumps(spec)

    return changed


def _swap(spec):
    a, b = ("".join(m) for m in spec["model"]["merges"][:2])
    vocabulary = spec["model"]["vocab"]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]


def _unreachable(spec):
    """ "ab" + "c" = "abc", but "b" + "c" is joined first: the library never makes "abc", tiktoken would."""
    vocabulary = spec["model"]["vocab"]
    for token, characters in list(vocabulary.items()):
        if characters >= 275:
            del vocabulary[token]
    spec["model"]["merges"] = [["Q", "X"], ["Z", "Q"], ["ZQ", "X"]]
    vocabulary |= {"QX": 275, "ZQ": 276, "ZQX": 277}
    spec["added_tokens"] = [t for t in spec["added_tokens"] if t["content"] not in ENCODER_TOKENS]


def _gap(spec):
    """The last token but one is gone, and the last keeps its id, at which the library puts a special token."""
    token = "".join(spec["model"]["merges"].pop(-2))
    del spec["model"]["vocab"][token]


def _special_of_a_merge(spec):
    token = "".join(spec["model"]["merges"][0])
    entry = {"id": spec["model"]["vocab"][token], "content": token, "special": True}
    spec["added_tokens"].append(spec["added_tokens"][0] | entry)
    spec["added_tokens"].sort(key=lambda t: t["id"])


@pytest.mark.parametrize(
    "change, words",
    [
        (_swap, "order of the merges"),
        (_unreachable, "never make"),
        (lambda s: s.update(normalizer={"type": "NFC"}), "normalizer"),
        (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "pre-tokenizer"),
        (lambda s: s.update(pre_tokenizer=None), "pre-tokenizer"),
        (
            lambda s: s["pre_tokenizer"]["pretokenizers"][1].update(add_prefix_space=True),
            "pre-tokenizer",
        ),
        (lambda s: s["added_tokens"][0].update(special=False), "not supported"),
        (lambda s: s["model"].update(dropout=0.1), "dropout"),
        (lambda s: s["model"]["vocab"].update(orphan=600), "no merge makes its token 'orphan'"),
        (
            lambda s: s.update(pre_tokenizer={"type": "Sequence", "pretokenizers": []}),
            "pre-tokenizer",
        ),
        (lambda s: s["pre_tokenizer"]["pretokenizers"].pop(), "pre-tokenizer"),
        (
            lambda s: s["model"].update(continuing_subword_prefix="é"),
            "'continuing_subword_prefix' is not supported",
        ),
        (
            lambda s: s["model"].update(continuing_subword_prefix="##"),
            "'continuing_subword_prefix' is not supported",
        ),
        (
            lambda s: s["model"].update(type="WordLevel", unk_token="x"),
            "data did not match|not a byte-level BPE",
        ),
        (lambda s: s.update(model=None), "it has no model"),
        (lambda s: s["model"]["vocab"].update({"!": 20}), "some of the 256 bytes"),
        (lambda s: s["model"]["vocab"].pop("a"), "cannot be used"),
        (_gap, "there are gaps or doubles"),
        (_special_of_a_merge, "may come of ordinary text"),
    ],
)
def test_refuses_a_tokenizer_that_tiktoken_cannot_run(tokenizer, tmp_path, change, words, capfd):
    (tmp_path / "tokenizer.json").write_text(_spec_of(change)(tokenizer))
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


# ---- pairs ----


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(n, key):
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_permutation_shuffles():
    order = [permute(i, 1000, 5) for i in range(1000)]
    assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.15
    assert sum(a == b for a, b in zip(order, [permute(i, 1000, 6) for i in range(1000)])) < 20
    assert 0 <= permute(10**12 - 1, 10**12, 3) < 10**12  # no memory, however long the epoch


corpora = st.lists(st.integers(2, 60), min_size=2, max_size=12)


def unique_documents(lengths, low=19, high=590):
    """Documents in whose tokens the document and the place can be read: token = document, place alternating."""
    return [[low + (37 * d + p) % (high - low) for p in range(n)] for d, n in enumerate(lengths)]


@given(lengths=corpora, max_length=st.integers(5, 40))
def test_windows_cover_every_token_and_stay_in_their_document(
    tokenizer, tmp_path_factory, lengths, max_length
):
    directory = write_corpus(tmp_path_factory.mktemp("c"), tokenizer, unique_documents(lengths))
    dataset = PairDataset(directory, "train", max_length, 0)
    covered = np.zeros(sum(lengths), int)
    for w in range(len(dataset)):
        document, start, end = dataset.window(w)
        assert 0 <= start < end <= lengths[document]
        assert end - start == min(
            max_length - 3, lengths[document]
        )  # never a short one where there is more
        covered[sum(lengths[:document]) + start : sum(lengths[:document]) + end] += 1
    assert covered.min() >= 1
    assert len(dataset) == sum(-(-n // (max_length - 3)) for n in lengths)


@given(
    lengths=corpora,
    max_length=st.integers(5, 40),
    seed=st.integers(0, 2**64),
    i=st.integers(0, 10**6),
)
def test_pairs_are_what_they_say(tokenizer, tmp_path_factory, lengths, max_length, seed, i):
    directory = write_corpus(tmp_path_factory.mktemp("c"), tokenizer, unique_documents(lengths))
    dataset = PairDataset(directory, "train", max_length, seed)
    a, b, follows = dataset.pair(i)
    assert len(a) >= 1 and len(b) >= 1 and len(a) + len(b) + 3 <= max_length
    places = [
        (np.shares_memory(a, dataset.parts[0].tokens), part.__array_interface__["data"][0])
        for part in (a, b)
    ]
    base, size = (
        dataset.parts[0].tokens.__array_interface__["data"][0],
        dataset.parts[0].tokens.itemsize,
    )
    start_a, start_b = ((address - base) // size for _, address in places)
    document = lambda place: int(np.searchsorted(dataset.parts[0].offsets, place, side="right")) - 1
    for start, part in ((start_a, a), (start_b, b)):
        assert document(start) == document(start + len(part) - 1)
    if follows:
        assert start_b == start_a + len(a)
    else:
        assert document(start_b) != document(start_a)
    # a pure function of (seed, i), in this process or another
    example, again = dataset[i], pickle.loads(pickle.dumps(dataset))[i]
    for x, y in zip(example, again):
        assert np.array_equal(x, y)
    # the example is the pair, but for its masks
    ids = example.input_ids.copy()
    ids[example.masked_positions] = example.labels
    assert ids.tolist() == [dataset.cls_id, *a, dataset.sep_id, *b, dataset.sep_id]
    assert example.next_sentence_label == follows
    assert not dataset.special[example.labels].any()


@given(lengths=corpora, cuts=st.sets(st.integers(1, 11), max_size=5), max_length=st.integers(5, 40))
def test_parts_change_nothing(tokenizer, tmp_path_factory, lengths, cuts, max_length):
    """A corpus in several parts, some of them empty, gives the examples of the same documents in one."""
    documents = unique_documents(lengths)
    edges = [0, *sorted(cut for cut in cuts if cut < len(lengths)), len(lengths), len(lengths)]
    parts = [documents[a:b] for a, b in zip(edges, edges[1:])]
    one, several = (
        PairDataset(
            write_corpus(tmp_path_factory.mktemp("c"), tokenizer, *split), "train", max_length, 0
        )
        for split in ([documents], parts)
    )
    assert len(several.parts) == len(parts) and len(one) == len(several)
    for i in range(0, 3 * len(one), 2):
        assert all(np.array_equal(a, b) for a, b in zip(one[i], several[i], strict=True))
        assert (
            one.languages_of_masks(i, one[i])
            == several.languages_of_masks(i, one[i])
            == ["python"] * len(one[i].labels)
        )


def test_a_thousand_parts_open_without_being_read(tokenizer, tmp_path, monkeypatch):
    dataset = PairDataset(
        write_corpus(tmp_path, tokenizer, *[unique_documents([9, 30])] * 1000), "train", 16, 0
    )
    assert len(dataset) == 4000 and not any(
        {"first_window", "tokens"} & vars(part).keys() for part in dataset.parts
    )
    assert (
        len(dataset[7].input_ids) <= 16
        and 1 <= sum("tokens" in vars(part) for part in dataset.parts) <= 2
    )
    before = len(os.listdir("/proc/self/fd"))
    for i in range(len(dataset)):
        dataset[i]
    assert len(os.listdir("/proc/self/fd")) == before  # a process may have 1,024


def test_offsets_beyond_four_billion_tokens(tokenizer, tmp_path):
    """Two documents that are holes of 5 GB in a file, and a real one behind them."""
    directory, far = (
        write_corpus(tmp_path, tokenizer, unique_documents([20, 30, 30])),
        5_000_000_000,
    )
    with open(os.path.join(directory, "00000.train.bin"), "r+b") as f:
        f.seek(2 * far)
        f.write(np.arange(20, 50, dtype=np.uint16).tobytes())
    offsets = np.array([(0, 0), (far // 2, 0), (far, 0), (far + 30, 0)], store.INDEX)
    np.save(os.path.join(directory, "00000.train.index.npy"), offsets)
    np.save(
        os.path.join(directory, "00000.train.windows.npy"),
        store.windows_table(np.diff(offsets["offset"])),
    )
    meta = store.read_meta(directory)
    meta["parts"][0]["train"] = meta["splits"]["train"] = {
        "documents": 3,
        "tokens": far + 30,
        "longest": far // 2,
    }
    files.write_whole(os.path.join(directory, "meta.json"), json.dumps(meta))
    dataset = PairDataset(directory, "train", 33, 0)
    assert len(dataset) == 2 * -(-far // 60) + 1 and dataset.document(2).tolist() == list(
        range(20, 50)
    )
    assert dataset.window(len(dataset) - 1) == (2, 0, 30) and len(dataset[3].input_ids) == 33


def test_an_epoch_takes_every_window_once_and_epochs_differ(small_corpus):
    dataset = PairDataset(small_corpus, "train", 64, 3)
    n = len(dataset)
    orders = [[dataset.proposal(i) for i in range(epoch * n, epoch * n + n)] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(n))
    agree = [sum(a == b for a, b in zip(orders[0], other)) for other in (orders[1], range(n))]
    assert max(agree) < 10  # shuffled, and anew in each epoch
    begins = [
        dataset.parts[0].offsets[d] + start for d, start, _ in map(dataset.window, orders[0])
    ]  # the pair does begin with that window, but where the partner was of its document
    base, size = (
        dataset.parts[0].tokens.__array_interface__["data"][0],
        dataset.parts[0].tokens.itemsize,
    )
    starts = [(dataset.pair(i)[0].__array_interface__["data"][0] - base) // size for i in range(n)]
    assert 0.75 * n < sum(a == b for a, b in zip(begins, starts)) < n
    assert len(list(dataset)) == n
    assert not np.array_equal(dataset[0].input_ids, dataset[n].input_ids)
    assert not np.array_equal(
        dataset[0].input_ids, PairDataset(small_corpus, "train", 64, 4)[0].input_ids
    )


def test_every_token_is_reached(tokenizer, tmp_path):
    """As A or as B, in documents shorter and longer than the window."""
    lengths = [2, 5, 9, 17, 30, 64]
    dataset = PairDataset(
        write_corpus(tmp_path, tokenizer, unique_documents(lengths)), "train", 19, 0
    )
    base, size = (
        dataset.parts[0].tokens.__array_interface__["data"][0],
        dataset.parts[0].tokens.itemsize,
    )
    seen = np.zeros(sum(lengths), bool)
    for i in range(3000):
        for part in dataset.pair(i)[:2]:
            start = (part.__array_interface__["data"][0] - base) // size
            seen[start : start + len(part)] = True
    assert seen.all()


def test_large_documents_are_no_likelier_in_positive_pairs(tokenizer, tmp_path):
    """Were only the partner drawn again when it is of the same document, a negative B would rarely be of a large one."""
    lengths = [1600] + [100] * 8  # one document is two thirds of the windows
    dataset = PairDataset(
        write_corpus(tmp_path, tokenizer, unique_documents(lengths)), "train", 23, 0
    )
    base, size = (
        dataset.parts[0].tokens.__array_interface__["data"][0],
        dataset.parts[0].tokens.itemsize,
    )
    large = np.zeros((2, 2))
    for i in range(8000):
        _, b, follows = dataset.pair(i)
        large[follows] += ((b.__array_interface__["data"][0] - base) // size < 1600, 1)
    share_negative, share_positive = large[:, 0] / large[:, 1]
    assert abs(share_negative - share_positive) < 0.04


@pytest.mark.slow
def test_next_sentence_cannot_be_guessed_from_b_alone(stdlib_corpus):
    """A logistic regression on B's first 8 tokens and length: a coin flip here, far more on the original's construction.

    The original: the first 10,000 characters of a file, halved; B is the second half, or the first half of another file.
    """
    tokenizer = Tokenizer.from_pretrained(stdlib_corpus)
    dataset = PairDataset(stdlib_corpus, "train", 128, 0)
    ours = [dataset.pair(i)[1:] for i in range(30_000)]
    halves = []
    for d in range(dataset.documents()):
        text = tokenizer.decode(dataset.document(d))[:10_000]
        halves.append(
            [tokenizer.encode(half) for half in (text[: len(text) // 2], text[len(text) // 2 :])]
        )
    original = [(halves[d][1], 1) for d in range(len(halves))] + [
        (halves[d - 1][0], 0) for d in range(len(halves))
    ]
    accuracy = {
        name: _guess_from_b(pairs, tokenizer.vocab_size)
        for name, pairs in (("here", ours), ("original", original))
    }
    print("NSP from B alone:", accuracy)
    assert abs(accuracy["here"] - 0.5) < 0.03
    assert accuracy["original"] > 0.75


def _guess_from_b(pairs, vocab_size):
    order = np.random.default_rng(0).permutation(len(pairs))
    first = torch.full((len(pairs), 8), vocab_size)
    for row, k in enumerate(order):
        b = torch.as_tensor(np.asarray(pairs[k][0][:8], np.int64))
        first[row, : len(b)] = b
    length = torch.tensor([len(pairs[k][0]) for k in order], dtype=torch.float32)
    length = (length - length.mean()) / length.std()
    labels = torch.tensor([float(pairs[k][1]) for k in order])
    features = first + torch.arange(8) * (vocab_size + 1)  # one weight for each token at each place
    weights = torch.nn.EmbeddingBag(8 * (vocab_size + 1), 1, mode="sum")
    linear = torch.nn.Linear(2, 1)
    torch.nn.init.zeros_(weights.weight)
    optimizer = torch.optim.Adam([*weights.parameters(), *linear.parameters()], lr=0.02)
    extra, train = torch.stack([length, length**2], 1), slice(0, len(order) * 3 // 4)
    score = lambda part: (weights(features[part]) + linear(extra[part])).squeeze(1)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (
            torch.nn.functional.binary_cross_entropy_with_logits(score(train), labels[train])
            + 1e-3 * weights.weight.square().sum()
        )
        loss.backward()
        optimizer.step()
    test = slice(train.stop, None)
    with torch.no_grad():
        return ((score(test) > 0).float() == labels[test]).float().mean().item()


# ---- masks ----


@given(seed=st.integers(0, 2**31), vocab=st.integers(30, 500), specials=st.integers(1, 20))
def test_masks(seed, vocab, specials):
    generator = np.random.default_rng(seed)
    special = np.zeros(vocab, bool)
    special[generator.permutation(vocab)[:specials]] = True
    ordinary, mask_id = np.flatnonzero(~special), int(np.flatnonzero(special)[0])
    ids = generator.integers(vocab, size=20_000)
    before = ids.copy()
    positions, labels = mask_tokens(ids, generator, special, ordinary, mask_id)
    assert np.array_equal(labels, before[positions]) and (np.diff(positions) > 0).all()
    assert not special[before[positions]].any()  # a special token is never masked
    untouched = np.setdiff1d(np.arange(len(ids)), positions)
    assert np.array_equal(ids[untouched], before[untouched])
    after, n = ids[positions], (~special[before]).sum()
    within = lambda count, total, share: (
        abs(count - share * total) <= 5 * (total * share * (1 - share)) ** 0.5 + 1
    )
    assert within(len(positions), n, 0.15)
    assert within((after == mask_id).sum(), len(positions), 0.8)
    assert not special[after[after != mask_id]].any()  # a random replacement is never special
    assert within(
        ((after != mask_id) & (after != labels)).sum(),
        len(positions),
        0.1 * (1 - 1 / len(ordinary)),
    )


# ---- batches ----


@given(indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=9))
def test_collate_lays_examples_end_to_end(small_corpus, indices):
    dataset = PairDataset(small_corpus, "train", 64, 0)
    examples = [dataset[i] for i in indices]
    batch = collate(examples)
    assert (
        batch.cu_seqlens.dtype == torch.int32
        and batch.cu_seqlens[0] == 0
        and batch.cu_seqlens[-1] == len(batch.input_ids)
    )
    assert [
        t.dtype
        for t in (batch.input_ids, batch.labels, batch.next_sentence_label, batch.masked_positions)
    ] == [torch.int64] * 4
    for k, (example, start, end) in enumerate(
        zip(examples, batch.cu_seqlens, batch.cu_seqlens[1:])
    ):
        assert torch.equal(batch.input_ids[start:end], torch.from_numpy(example.input_ids))
        assert batch.next_sentence_label[k] == example.next_sentence_label
        inside = (batch.masked_positions >= start) & (batch.masked_positions < end)
        assert torch.equal(
            batch.masked_positions[inside] - start, torch.from_numpy(example.masked_positions)
        )
        assert torch.equal(batch.labels[inside], torch.from_numpy(example.labels))
    assert len(batch.masked_positions) == len(batch.labels) == sum(len(e.labels) for e in examples)


@given(
    first=st.integers(0, 10**9),
    count=st.integers(1, 5000),
    world_size=st.integers(1, 64),
    micro=st.integers(1, 200),
)
def test_shares_hold_every_example_once(first, count, world_size, micro):
    shares = [share(first, count, rank, world_size, micro) for rank in range(world_size)]
    assert [i for parts in shares for part in parts for i in part] == list(
        range(first, first + count)
    )
    assert all(1 <= len(part) <= micro for parts in shares for part in parts)
    sizes = [sum(map(len, parts)) for parts in shares]
    assert count < world_size or min(sizes) > 0
    assert max(sizes) - min(sizes) <= 1


def test_step_holds_the_same_examples_on_1_2_4_and_64_ranks(small_corpus):
    dataset = PairDataset(small_corpus, "train", 64, 0)
    expected = [dataset[i] for i in range(3 * 128, 4 * 128)]
    for world_size, micro in ((1, 128), (1, 17), (2, 64), (4, 9), (64, 2), (64, 1)):
        found = []
        for rank in range(world_size):
            (micro_batches,) = batches(
                dataset, range(3, 4), 128, micro, rank, world_size, workers=0
            )
            assert sum(len(b.next_sentence_label) for b in micro_batches) == 128 // world_size
            found += [
                ids
                for b in micro_batches
                for ids in b.input_ids.tensor_split(b.cu_seqlens[1:-1].long())
            ]
        assert all(
            np.array_equal(ids.numpy(), e.input_ids) for ids, e in zip(found, expected, strict=True)
        )


@pytest.mark.parametrize("workers", [1, 2])
def test_background_workers_change_nothing(small_corpus, workers):
    dataset = PairDataset(small_corpus, "train", 64, 0)
    plain = list(batches(dataset, range(2, 7), 10, 4, workers=0))
    for step, other in zip(
        plain, batches(dataset, range(2, 7), 10, 4, workers=workers), strict=True
    ):
        assert len(step) == 3
        for x, y in zip(step, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(x, y))


# ---- what is refused ----


@pytest.mark.parametrize("value", [None, "x", True, [], {}, -1, 2.5, 2**70], ids=str)
def test_an_entry_of_any_kind_in_meta_json_is_used_or_refused_in_one_line(
    small_corpus, tmp_path, value
):
    """Each entry in turn, at any depth, replaced and removed."""
    shutil.copytree(small_corpus, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "meta.json"
    meta = json.loads(path.read_text())

    def entries(node):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            if isinstance(node[key], dict | list):
                yield from entries(node[key])

    refused = 0
    for node, key in entries(meta):
        before = node[key]
        for absent in (False, True):
            node[key] = value
            if absent and isinstance(node, dict):
                del node[key]
            path.write_text(json.dumps(meta))
            try:
                report.summary(store.read_meta(str(tmp_path)))
                PairDataset(str(tmp_path), "train", 64, 0)[0]
            except ValueError as error:
                assert str(error).startswith(str(tmp_path)) and "\n" not in str(error)
                refused += 1
            if isinstance(node, dict):
                node.pop(key, None)
            node[key] = before
    assert refused > 40


@pytest.mark.parametrize("name", ["00000.train.windows.npy", "00000.train.index.npy"])
def test_damaged_arrays_are_refused_in_one_line(small_corpus, tmp_path, name):
    """Cut at any place, and with any byte of the header replaced."""
    shutil.copytree(small_corpus, tmp_path, dirs_exist_ok=True)
    content = (tmp_path / name).read_bytes()
    cut = [
        content[:size]
        for size in (
            0,
            5,
            9,
            60,
            127,
            128,
            135,
            len(content) // 2,
            len(content) - 8,
            len(content) - 1,
        )
    ]
    for damaged in [*cut, content + b"x"]:
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{name}: damaged"):
            PairDataset(str(tmp_path), "train", 64, 0)
    for place in range(128):
        for byte in (0, 0x20, content[place] ^ 1):
            (tmp_path / name).write_bytes(content[:place] + bytes([byte]) + content[place + 1 :])
            try:
                PairDataset(str(tmp_path), "train", 64, 0)[0]
            except ValueError as error:
                assert str(error).startswith(str(tmp_path / name)) and "\n" not in str(error)
    table = np.load(io.BytesIO(content))
    if name.endswith("windows.npy"):
        for windows in (0, -1, 2**62):
            table[61] = windows
            np.save(tmp_path / name, table)
            with pytest.raises(ValueError, match=f"{name}: damaged"):
                PairDataset(str(tmp_path), "train", 64, 0)


def test_damaged_tokens_and_languages_are_refused_in_one_line(small_corpus, tmp_path):
    shutil.copytree(small_corpus, tmp_path, dirs_exist_ok=True)
    np.full(os.path.getsize(tmp_path / "00000.train.bin") // 2, 600, np.uint16).tofile(
        tmp_path / "00000.train.bin"
    )
    with pytest.raises(ValueError, match="a token of example 0 is beyond the vocabulary"):
        PairDataset(str(tmp_path), "train", 64, 0)[0]
    part, index = tmp_path / "00000.json", np.load(tmp_path / "00000.train.index.npy")
    for content in ("[]", "{}", '{"languages": 3}', "["):
        part.write_text(content)
        with pytest.raises(ValueError, match="00000.json: damaged"):
            PairDataset(str(tmp_path), "train", 64, 0).language(0)
    shutil.copy(os.path.join(small_corpus, "00000.json"), part)
    index["language"] = 77
    np.save(tmp_path / "00000.train.index.npy", index)
    with pytest.raises(ValueError, match="index.npy: damaged .language 77"):
        PairDataset(str(tmp_path), "train", 64, 0).language(0)


PROGRAM = """
import sys, data
def main():
    for _ in data.batches(data.PairDataset(sys.argv[1], "train", 64, 0), range(100), 8, 8, workers=1):
        if sys.argv[2] == "in the program":
            raise RuntimeError("an error of the program")
command_line.run_command(main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in a worker", "in the program"])
def test_an_error_ends_the_program_and_its_workers(small_corpus, tmp_path, where):
    """Workers ignore SIGTERM, for which the interpreter would wait at its end; and what one raises is one line."""
    shutil.copytree(small_corpus, tmp_path, dirs_exist_ok=True)
    if where == "in a worker":
        np.full(os.path.getsize(tmp_path / "00000.train.bin") // 2, 600, np.uint16).tofile(
            tmp_path / "00000.train.bin"
        )
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path), where],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, error = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    if where == "in a worker":
        assert (
            process.returncode == 2
            and len(error.splitlines()) == 1
            and "beyond the vocabulary; prepare" in error
        )
    else:
        assert (
            process.returncode == 1
            and error.splitlines()[-1] == "RuntimeError: an error of the program"
        )


def test_refuses_a_corpus_that_is_not_whole(small_corpus, sources, tmp_path):
    with pytest.raises(FileNotFoundError, match="no corpus here"):
        PairDataset(str(tmp_path), "train", 64, 0)
    with pytest.raises(ValueError, match="max_length"):
        PairDataset(small_corpus, "train", 4, 0)
    torn = shutil.copytree(small_corpus, tmp_path / "torn")
    os.truncate(torn / "00000.train.bin", os.path.getsize(torn / "00000.train.bin") - 2)
    with pytest.raises(ValueError, match="00000.train.bin.*bytes instead of"):
        PairDataset(str(torn), "train", 64, 0)
    np.save(index := io.BytesIO(), np.array([(0, 0), (9, 0)], store.INDEX))
    for name, content, words in [
        ("meta.json", b"{}", "format"),
        ("meta.json", b'{"for', "meta.json: damaged"),
        ("00000.train.windows.npy", b"", "damaged"),
        ("00000.train.index.npy", index.getvalue(), "index.npy: damaged .not 14 entries"),
    ]:
        broken = shutil.copytree(small_corpus, tmp_path / "broken", dirs_exist_ok=True)
        (broken / name).write_bytes(content)
        with pytest.raises(ValueError, match=words):
            PairDataset(str(broken), "train", 64, 0)
    other = shutil.copytree(small_corpus, tmp_path / "other")
    train_tokenizer(["another text"], 300).save_pretrained(other)
    with pytest.raises(ValueError, match="another tokenizer"):
        PairDataset(str(other), "train", 64, 0)
    one = tmp_path / "one"
    one.mkdir()
    shutil.copy(os.path.join(sources, "ast.py"), one)
    corpus.prepare([str(one)], str(tmp_path / "single"), tokenizer=small_corpus, workers=1)
    with pytest.raises(ValueError, match="documents; pairs need 2"):
        PairDataset(str(tmp_path / "single"), "validation", 64, 0)
    giant = write_corpus(one, Tokenizer.from_pretrained(small_corpus), unique_documents([5000, 2]))
    with pytest.raises(ValueError, match="one document is 99.* of train"):
        PairDataset(giant, "train", 8, 0)
