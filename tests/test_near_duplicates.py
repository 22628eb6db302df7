"""Near duplicates: the same go, whoever reads what, and about as many as is documented."""

import itertools
import random
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from corpus.clean import BANDS, PERMUTATIONS, NearDuplicates, signature_of

pytest.importorskip("rensa", reason="pip install rensa")


def alike(a, b):
    """True if two texts are near duplicates."""
    near = NearDuplicates()
    near.seen(signature_of(a))
    return near.seen(signature_of(b))


def sequences(text):
    """The five-word sequences of a text: what its signature stands for."""
    words = re.findall(r"\w+", text)
    return {tuple(words[start : start + 5]) for start in range(max(1, len(words) - 4))}


def jaccard(a, b):
    """The share of their five-word sequences that two texts have in common."""
    return len(sequences(a) & sequences(b)) / len(sequences(a) | sequences(b))


# ---- signatures ----------------------------------------------------------------------------------

any_text = st.text(max_size=60)


@given(text=any_text)
def test_a_signature_is_25_numbers_below_2_to_the_60(text):
    signature = signature_of(text)
    assert signature.shape == (BANDS,) and signature.dtype == np.uint64
    assert signature.max() < 2**60  # what datatrove's 64-bit hashes must stay below is 2^61 - 1
    assert np.array_equal(signature, signature_of(text))


def test_a_signature_is_the_same_on_every_machine():
    """Another one would make corpora that differ, and one that cannot go on elsewhere."""
    first, *_, last = signature_of("def f(x):\n    return x + 1  # one more\n").tolist()
    assert (first, last) == (27591166649112521, 738705008527486557)


@given(text=any_text)
def test_a_copy_is_alike(text):
    assert alike(text, text)


@given(seed=st.integers(0, 10**6), length=st.integers(1, 40))
def test_unrelated_texts_are_not_alike(seed, length):
    """Different sequences: all 10 hashes of a group are equal by chance alone, once in 2^320."""
    a = " ".join(f"a{seed}_{i}" for i in range(length))
    b = " ".join(f"b{seed}_{i}" for i in range(length))
    assert not alike(a, b)


# ---- how many are found --------------------------------------------------------------------------


def pair_of(similarity, seed):
    """Two texts, and the share of their sequences that they have in common, about `similarity`."""
    # With c + 4 common words in front and d others behind, they share c of c + 2 d sequences.
    others = 10
    common = round(2 * others * similarity / (1 - similarity))
    generator = random.Random(seed)
    front = [f"w{generator.randrange(10**9)}" for _ in range(common + 4)]
    a, b = (
        " ".join([*front, *(f"w{generator.randrange(10**9)}" for _ in range(others))])
        for _ in range(2)
    )
    return a, b, jaccard(a, b)


@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.95])
def test_as_many_are_found_as_is_documented(similarity):
    """Of n pairs, their number is binomial: within four standard deviations of its mean.

    The pairs and the hashes are always the same, so this does not fail by chance, and it would
    fail if a group had 9 or 11 hashes.
    """
    n = 150
    probabilities = []
    found = 0
    for seed in range(n):
        a, b, share = pair_of(similarity, seed)
        assert abs(share - similarity) < 0.01
        probabilities.append(1 - (1 - share ** (PERMUTATIONS // BANDS)) ** BANDS)
        found += alike(a, b)
    mean = sum(probabilities)
    deviation = sum(p * (1 - p) for p in probabilities) ** 0.5
    assert abs(found - mean) < 4 * deviation + 0.5, (found, mean, deviation)


# ---- whoever reads what --------------------------------------------------------------------------


def texts_of(numbers):
    """A text for each number; the last digit says what is changed in the text of the others."""
    for number in numbers:
        words = [f"{number // 10}_{i}" for i in range(60)]
        words[number % 10 * 6] = "changed"
        yield " ".join(words)


def left_out_by_sorting(signatures, cuts):
    """What tasks find that read a slice each: in each band, all but the first of equal numbers."""
    places = []  # (task, document) of each signature
    for task, (start, end) in enumerate(itertools.pairwise([0, *cuts, len(signatures)])):
        places += [(task, document) for document in range(end - start)]
    left_out = set()
    for band in range(BANDS):
        keys = sorted((signature[band], place) for signature, place in zip(signatures, places))
        for (number, _), (later_number, later) in itertools.pairwise(keys):
            if number == later_number:
                left_out.add(later)
    return [place in left_out for place in places]


@given(
    numbers=st.lists(st.integers(0, 59), max_size=14),
    cuts=st.lists(st.integers(0, 14), max_size=4),
)
def test_the_same_are_left_out_whatever_the_slices(numbers, cuts):
    signatures = [signature_of(text) for text in texts_of(numbers)]
    near = NearDuplicates()
    left_out = [near.seen(signature) for signature in signatures]
    # By the rule itself: one that shares a number with any earlier one, kept or not.
    rule = [
        any((signature == earlier).any() for earlier in signatures[:i])
        for i, signature in enumerate(signatures)
    ]
    assert left_out == rule
    slices = sorted(min(cut, len(numbers)) for cut in cuts)
    assert left_out_by_sorting(signatures, slices) == rule
