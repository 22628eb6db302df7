"""Pairs and masks by their properties, and batches."""

import doctest
import os
import pickle
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, write_corpus
from hypothesis import given
from hypothesis import strategies as st

import corpus
from common import ranges
from common.ranges import permute, share
from corpus import store
from corpus.tokenizer import Tokenizer, train_tokenizer
from data import PairDataset, batches, collate, mask_tokens


def test_examples_in_docstrings():
    result = doctest.testmod(ranges)
    assert result.attempted and not result.failed


# ---- the shuffle ----


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permutation_is_a_bijection(n, key):
    assert sorted(permute(i, n, key) for i in range(n)) == list(range(n))


def test_permutation_shuffles():
    order = [permute(i, 1000, 5) for i in range(1000)]
    other = [permute(i, 1000, 6) for i in range(1000)]
    assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.15
    assert sum(a == b for a, b in zip(order, other)) < 20
    assert 0 <= permute(10**12 - 1, 10**12, 3) < 10**12  # no memory, however long the epoch


# ---- pairs ----

corpora = st.lists(st.integers(2, 60), min_size=2, max_size=12)  # lengths of documents
max_lengths = st.integers(5, 40)


def rising_documents(lengths, low=19, high=590):
    """Documents of ordinary tokens that rise from a first one, another for each document."""
    return [[low + (37 * d + p) % (high - low) for p in range(n)] for d, n in enumerate(lengths)]


@pytest.fixture
def dataset_of(tokenizer, tmp_path_factory):
    """Makes a PairDataset of one part of documents of these lengths."""

    def make(lengths, max_length, seed=0):
        directory = tmp_path_factory.mktemp("corpus")
        write_corpus(directory, tokenizer, rising_documents(lengths))
        return PairDataset(str(directory), "train", max_length, seed)

    return make


def draw(dataset, i):
    """The windows of example i."""
    return dataset.draw(i, dataset.random_stream(i))


@given(lengths=corpora, max_length=max_lengths)
def test_windows_cover_every_token_and_stay_in_their_document(dataset_of, lengths, max_length):
    dataset = dataset_of(lengths, max_length)
    covered = [np.zeros(n, int) for n in lengths]
    for w in range(len(dataset)):
        document, start, end = dataset.window(w)
        assert 0 <= start < end <= lengths[document]
        # Never a short one if the document has more.
        assert end - start == min(max_length - 3, lengths[document])
        covered[document][start:end] += 1
    assert np.concatenate(covered).min() >= 1
    assert len(dataset) == sum(-(-n // (max_length - 3)) for n in lengths)


@given(
    lengths=corpora,
    max_length=max_lengths,
    seed=st.integers(0, 2**64),
    i=st.integers(0, 10**6),
)
def test_pairs_are_what_they_say(dataset_of, lengths, max_length, seed, i):
    documents = rising_documents(lengths)
    dataset = dataset_of(lengths, max_length, seed)
    windows = draw(dataset, i)
    a, b, follows = dataset.pair(i)
    assert a.tolist() == documents[windows.a.document][windows.a.start : windows.a.end]
    assert b.tolist() == documents[windows.b.document][windows.b.start : windows.b.end]
    assert len(a) == windows.a.end - windows.a.start >= 1  # both lie within their documents
    assert len(b) == windows.b.end - windows.b.start >= 1
    assert len(a) + len(b) + 3 <= max_length
    assert follows == windows.next_sentence_label
    if follows:
        assert (windows.b.document, windows.b.start) == (windows.a.document, windows.a.end)
    else:
        assert windows.b.document != windows.a.document

    # A pure function of (seed, i), in this process or another.
    example = dataset[i]
    again = pickle.loads(pickle.dumps(dataset))[i]
    assert all(np.array_equal(x, y) for x, y in zip(example, again, strict=True))

    # The example is the pair, but for its masks.
    ids = example.input_ids.copy()
    ids[example.masked_positions] = example.labels
    assert ids.tolist() == [dataset.cls_id, *a, dataset.sep_id, *b, dataset.sep_id]
    assert example.next_sentence_label == follows
    assert not dataset.special[example.labels].any()


def test_a_numpy_integer_numbers_the_same_example(small_corpus):
    """In NumPy's 64 bits, a key of 128 would overflow: all examples would draw the same numbers."""
    dataset = PairDataset(small_corpus, "train", 64, 3)
    for i in (0, 3, 2 * len(dataset) + 1):
        for number in (np.int64(i), np.uint16(i)):
            for x, y in zip(dataset[i], dataset[number], strict=True):
                assert np.array_equal(x, y)
            assert draw(dataset, number) == draw(dataset, i)
            assert dataset.proposal(number) == dataset.proposal(i)
    with pytest.raises(TypeError):
        dataset[1.0]


@given(lengths=corpora, cuts=st.sets(st.integers(1, 11), max_size=5), max_length=max_lengths)
def test_parts_change_nothing(tokenizer, tmp_path_factory, lengths, cuts, max_length):
    """A corpus in several parts, some of them empty, gives the examples of the same documents in
    one."""
    documents = rising_documents(lengths)
    edges = [0, *sorted(cut for cut in cuts if cut < len(lengths)), len(lengths), len(lengths)]
    parts = [documents[a:b] for a, b in zip(edges, edges[1:])]
    datasets = []
    for split in ([documents], parts):
        directory = write_corpus(tmp_path_factory.mktemp("corpus"), tokenizer, *split)
        datasets.append(PairDataset(directory, "train", max_length, 0))
    one, several = datasets
    assert len(several.parts) == len(parts)
    assert len(one) == len(several)
    for i in range(0, 3 * len(one), 2):
        example = one[i]
        assert all(np.array_equal(a, b) for a, b in zip(example, several[i], strict=True))
        languages = ["python"] * len(example.labels)
        assert one.languages_of_masks(i, example) == languages
        assert several.languages_of_masks(i, example) == languages


def test_languages_of_masks_are_those_of_their_documents(tokenizer, tmp_path):
    """The first document is C, the others are Python."""
    tokenizer.save_pretrained(tmp_path)
    part = store.PartWriter(str(tmp_path), 0, np.uint16)
    for d, ids in enumerate(rising_documents([40, 50, 60])):
        part.add("train", "python" if d else "c", len(ids), ids)
    part.close()
    store.write_meta(str(tmp_path), 1, {}, tokenizer, np.dtype(np.uint16), [])
    dataset = PairDataset(str(tmp_path), "train", 33, 0)
    seen = set()
    for i in range(200):
        example = dataset[i]
        windows = draw(dataset, i)
        end_of_a = np.flatnonzero(example.input_ids == dataset.sep_id)[0]
        names = dataset.languages_of_masks(i, example)
        for position, name in zip(example.masked_positions, names, strict=True):
            document = windows.a.document if position < end_of_a else windows.b.document
            assert name == ("python" if document else "c")
        seen.update(names)
    assert seen == {"c", "python"}


def test_an_epoch_takes_every_window_once_and_epochs_differ(small_corpus):
    dataset = PairDataset(small_corpus, "train", 64, 3)
    n = len(dataset)
    first = [dataset.proposal(i) for i in range(n)]
    second = [dataset.proposal(i) for i in range(n, 2 * n)]
    assert sorted(first) == sorted(second) == list(range(n))
    for other in (second, range(n)):  # shuffled, and in another order in each epoch
        assert sum(a == b for a, b in zip(first, other)) < 10

    # A pair begins with the window proposed, unless its partner was of the same document.
    kept = 0
    for i in range(n):
        a = draw(dataset, i).a
        document, start, end = dataset.window(first[i])
        kept += a.document == document and start <= a.start < end
    assert 0.75 * n < kept < n

    assert len(list(dataset)) == n
    other_seed = PairDataset(small_corpus, "train", 64, 4)
    assert not np.array_equal(dataset[0].input_ids, dataset[n].input_ids)
    assert not np.array_equal(dataset[0].input_ids, other_seed[0].input_ids)


def test_every_token_is_reached(dataset_of):
    """As A or as B, in documents shorter and longer than the window."""
    lengths = [2, 5, 9, 17, 30, 64]
    dataset = dataset_of(lengths, 19)
    seen = [np.zeros(n, bool) for n in lengths]
    for i in range(3000):
        windows = draw(dataset, i)
        for window in (windows.a, windows.b):
            seen[window.document][window.start : window.end] = True
    assert np.concatenate(seen).all()


def test_large_documents_are_no_likelier_in_positive_pairs(dataset_of):
    """If only the partner were drawn again when it is of the same document, a negative B would
    rarely be of a large one."""
    dataset = dataset_of([1600] + [100] * 8, 23)  # one document is two thirds of the windows
    from_large = np.zeros(2)  # by label
    drawn = np.zeros(2)
    for i in range(8000):
        windows = draw(dataset, i)
        from_large[windows.next_sentence_label] += windows.b.document == 0
        drawn[windows.next_sentence_label] += 1
    negative, positive = from_large / drawn
    assert abs(negative - positive) < 0.04


@pytest.mark.slow
def test_next_sentence_cannot_be_guessed_from_b_alone(stdlib_corpus):
    """By a logistic regression on B's first 8 tokens and its length: a coin flip here, far more
    on the original's construction.

    The original: the first 10,000 characters of a file, halved; B is the second half, or the first
    half of another file.
    """
    tokenizer = Tokenizer.from_pretrained(stdlib_corpus)
    dataset = PairDataset(stdlib_corpus, "train", 128, 0)
    pairs = [dataset.pair(i) for i in range(30_000)]
    here = [(pair.b, pair.next_sentence_label) for pair in pairs]
    first_halves = []
    second_halves = []
    for d in range(dataset.documents()):
        text = tokenizer.decode(dataset.document(d))[:10_000]
        first_halves.append(tokenizer.encode(text[: len(text) // 2]))
        second_halves.append(tokenizer.encode(text[len(text) // 2 :]))
    original = [(half, 1) for half in second_halves] + [(half, 0) for half in first_halves]

    accuracy = {
        "here": guess_from_b(here, tokenizer.vocab_size),
        "original": guess_from_b(original, tokenizer.vocab_size),
    }
    print("NSP from B alone:", accuracy)
    assert abs(accuracy["here"] - 0.5) < 0.03
    assert accuracy["original"] > 0.75


def guess_from_b(pairs, vocab_size):
    """The held-out accuracy of guessing the label of (B, label) from B."""
    order = np.random.default_rng(0).permutation(len(pairs))
    first = torch.full((len(pairs), 8), vocab_size)
    for row, k in enumerate(order):
        b = torch.as_tensor(np.asarray(pairs[k][0][:8], np.int64))
        first[row, : len(b)] = b
    length = torch.tensor([len(pairs[k][0]) for k in order], dtype=torch.float32)
    length = (length - length.mean()) / length.std()
    labels = torch.tensor([float(pairs[k][1]) for k in order])

    # One weight for each token at each of the 8 places, and two for the length.
    features = first + torch.arange(8) * (vocab_size + 1)
    more_features = torch.stack([length, length**2], 1)
    weights = torch.nn.EmbeddingBag(8 * (vocab_size + 1), 1, mode="sum")
    linear = torch.nn.Linear(2, 1)
    torch.nn.init.zeros_(weights.weight)
    optimizer = torch.optim.Adam([*weights.parameters(), *linear.parameters()], lr=0.02)

    def scores(part):
        return (weights(features[part]) + linear(more_features[part])).squeeze(1)

    train = slice(0, len(order) * 3 // 4)
    test = slice(train.stop, None)
    loss_of = torch.nn.functional.binary_cross_entropy_with_logits
    for _ in range(150):
        optimizer.zero_grad()
        loss = loss_of(scores(train), labels[train]) + 1e-3 * weights.weight.square().sum()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        return ((scores(test) > 0).float() == labels[test]).float().mean().item()


# ---- masks ----


@given(seed=st.integers(0, 2**31), vocab=st.integers(30, 500), specials=st.integers(1, 20))
def test_masks(seed, vocab, specials):
    generator = np.random.default_rng(seed)
    special = np.zeros(vocab, bool)
    special[generator.permutation(vocab)[:specials]] = True
    ordinary = np.flatnonzero(~special)
    mask_id = int(np.flatnonzero(special)[0])
    ids = generator.integers(vocab, size=20_000)
    before = ids.copy()
    positions, labels = mask_tokens(ids, generator, special, ordinary, mask_id)

    assert np.array_equal(labels, before[positions])
    assert (np.diff(positions) > 0).all()
    assert not special[labels].any()  # a special token is never masked
    untouched = np.setdiff1d(np.arange(len(ids)), positions)
    assert np.array_equal(ids[untouched], before[untouched])

    def is_share(count, total, share):
        """Within five standard deviations of a binomial distribution."""
        return abs(count - share * total) <= 5 * (total * share * (1 - share)) ** 0.5 + 1

    after = ids[positions]
    masked = after == mask_id
    assert is_share(len(positions), (~special[before]).sum(), 0.15)
    assert is_share(masked.sum(), len(positions), 0.8)
    assert not special[after[~masked]].any()  # a random replacement is never special
    replaced = ~masked & (after != labels)
    assert is_share(replaced.sum(), len(positions), 0.1 * (1 - 1 / len(ordinary)))


# ---- batches ----


@given(indices=st.lists(st.integers(0, 10**6), min_size=1, max_size=9))
def test_collate_lays_examples_end_to_end(small_corpus, indices):
    dataset = PairDataset(small_corpus, "train", 64, 0)
    examples = [dataset[i] for i in indices]
    batch = collate(examples)
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens[0] == 0
    assert batch.cu_seqlens[-1] == len(batch.input_ids)
    for name in ("input_ids", "labels", "next_sentence_label", "masked_positions"):
        assert getattr(batch, name).dtype == torch.int64
    assert len(batch.masked_positions) == len(batch.labels) == sum(len(e.labels) for e in examples)
    for k, example in enumerate(examples):
        start, end = batch.cu_seqlens[k : k + 2]
        assert torch.equal(batch.input_ids[start:end], torch.from_numpy(example.input_ids))
        assert batch.next_sentence_label[k] == example.next_sentence_label
        inside = (batch.masked_positions >= start) & (batch.masked_positions < end)
        positions = torch.from_numpy(example.masked_positions)
        assert torch.equal(batch.masked_positions[inside] - start, positions)
        assert torch.equal(batch.labels[inside], torch.from_numpy(example.labels))


@given(
    first=st.integers(0, 10**9),
    count=st.integers(1, 5000),
    world_size=st.integers(1, 64),
    micro=st.integers(1, 200),
)
def test_shares_hold_every_example_once(first, count, world_size, micro):
    shares = [share(first, count, rank, world_size, micro) for rank in range(world_size)]
    examples = [i for micro_batches in shares for part in micro_batches for i in part]
    assert examples == list(range(first, first + count))
    assert all(1 <= len(part) <= micro for micro_batches in shares for part in micro_batches)
    sizes = [sum(map(len, micro_batches)) for micro_batches in shares]
    assert max(sizes) - min(sizes) <= 1
    assert count < world_size or min(sizes) > 0


def test_step_holds_the_same_examples_on_1_2_4_and_64_ranks(small_corpus):
    dataset = PairDataset(small_corpus, "train", 64, 0)
    expected = [dataset[i].input_ids for i in range(3 * 128, 4 * 128)]
    for world_size, micro in ((1, 128), (1, 17), (2, 64), (4, 9), (64, 2), (64, 1)):
        sequences = []
        for rank in range(world_size):
            steps = batches(dataset, range(3, 4), 128, micro, rank, world_size, workers=0)
            (micro_batches,) = steps
            assert sum(len(b.next_sentence_label) for b in micro_batches) == 128 // world_size
            for batch in micro_batches:
                sequences += batch.input_ids.tensor_split(batch.cu_seqlens[1:-1].long())
        for ids, expected_ids in zip(sequences, expected, strict=True):
            assert np.array_equal(ids.numpy(), expected_ids)


@pytest.mark.parametrize("workers", [1, 2])
def test_background_workers_change_nothing(small_corpus, workers):
    dataset = PairDataset(small_corpus, "train", 64, 0)
    state = torch.random.get_rng_state()
    plain = list(batches(dataset, range(2, 7), 10, 4, workers=0))
    made_ahead = list(batches(dataset, range(2, 7), 10, 4, workers=workers))
    assert torch.equal(torch.random.get_rng_state(), state)  # it is the caller's
    for step, other in zip(plain, made_ahead, strict=True):
        assert len(step) == 3
        for x, y in zip(step, other, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


# ---- what is refused ----


def put_tokens_beyond_the_vocabulary(directory):
    path = os.path.join(directory, "00000.train.bin")
    np.full(os.path.getsize(path) // 2, 600, np.uint16).tofile(path)


def test_a_token_beyond_the_vocabulary_is_refused_in_one_line(small_corpus, tmp_path):
    shutil.copytree(small_corpus, tmp_path, dirs_exist_ok=True)
    put_tokens_beyond_the_vocabulary(tmp_path)
    with pytest.raises(ValueError, match="a token of example 0 is beyond the vocabulary"):
        PairDataset(str(tmp_path), "train", 64, 0)[0]


PROGRAM = """
import sys
from common.command_line import run_command
from data import PairDataset, batches
def main():
    for _ in batches(PairDataset(sys.argv[1], "train", 64, 0), range(100), 8, 8, workers=1):
        if sys.argv[2] == "in the program":
            raise RuntimeError("an error of the program")
run_command(main)
"""


class Unreadable:
    """A dataset whose files have gone."""

    def __init__(self, error):
        self.error = error

    def __getitem__(self, i):
        raise self.error


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "No such file", "x"), ValueError("two\nlines: 1"), ValueError()]
)
def test_an_error_comes_out_of_a_worker_as_it_is(error, workers):
    with pytest.raises(type(error)) as caught:
        list(batches(Unreadable(error), range(2), 4, 2, workers=workers))
    assert type(caught.value) is type(error)
    assert str(caught.value) == str(error)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["in a worker", "in the program"])
def test_an_error_ends_the_program_and_its_workers(small_corpus, tmp_path, where):
    """Workers ignore SIGTERM, which the interpreter sends at its end; and what a worker raises is
    one line."""
    shutil.copytree(small_corpus, tmp_path, dirs_exist_ok=True)
    if where == "in a worker":
        put_tokens_beyond_the_vocabulary(tmp_path)
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
        assert process.returncode == 2
        assert len(error.splitlines()) == 1
        assert "beyond the vocabulary; prepare" in error
    else:
        assert process.returncode == 1
        assert error.splitlines()[-1] == "RuntimeError: an error of the program"


def test_refuses_a_corpus_without_pairs(small_corpus, tokenizer, sources, tmp_path):
    with pytest.raises(ValueError, match="max_length"):
        PairDataset(small_corpus, "train", 4, 0)
    with pytest.raises(IndexError, match="numbered from 0"):
        PairDataset(small_corpus, "train", 64, 0)[-1]

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

    giant = write_corpus(tmp_path / "giant", tokenizer, rising_documents([5000, 2]))
    with pytest.raises(ValueError, match="one document is 99.* of train"):
        PairDataset(giant, "train", 8, 0)
