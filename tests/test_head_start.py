"""Initial weights that know frequencies, positions and neighbours."""

import math

import numpy as np
import pytest
import torch
from conftest import write_corpus
from hypothesis import given
from hypothesis import strategies as st

import train
from data import PairDataset
from starencoder import StarEncoderConfig, StarEncoderForPreTraining
from training import head_start
from training.ranks import Ranks

ALL = "frequencies+positions+neighbours"


def model_of(dataset, H=192, N=6, L=64):
    torch.manual_seed(0)
    config = StarEncoderConfig(
        vocab_size=len(dataset.special),
        hidden_size=H,
        num_hidden_layers=3,
        num_attention_heads=N,
        intermediate_size=2 * H,
        max_position_embeddings=L,
    )
    return StarEncoderForPreTraining(config).eval()


@pytest.fixture(scope="module")
def dataset(small_corpus):
    return PairDataset(small_corpus, "train", 64, seed=0)


def test_words():
    assert head_start.words_of("none") == []
    assert head_start.words_of(ALL) == ["frequencies", "positions", "neighbours"]
    for wrong in ("", "all", "frequencies,positions", "none+positions", "neighbours"):
        with pytest.raises(ValueError, match="head_start"):
            train.TrainConfig(head_start=wrong)
    with pytest.raises(ValueError, match="in proportion to learning_rate"):
        train.TrainConfig(learning_rate=0.0, muon_learning_rate=0.01)


def test_nothing_changes_what_was_not_asked_for(dataset):
    before = model_of(dataset).state_dict()
    changed = {
        "none": set(),
        "frequencies": {"mlm_bias"},
        "positions": {"bert.position_embeddings.weight"},
        "positions+neighbours": {
            "bert.position_embeddings.weight",
            "bert.layers.0.qkv.weight",
            "bert.layers.1.qkv.weight",
        },
    }
    for text, names in changed.items():
        model = model_of(dataset)
        head_start.give_head_start(model, head_start.words_of(text), dataset)
        after = model.state_dict()
        assert {n for n in before if not torch.equal(before[n], after[n])} == names


def test_frequencies_are_worth_their_entropy(dataset):
    """Before the first step the loss is that of a model that knows frequencies and nothing else."""
    model = model_of(dataset)
    head_start.give_head_start(model, ["frequencies"], dataset)
    assert abs(model.mlm_bias.exp().sum().item() - 1) < 1e-5
    labels = np.concatenate([dataset[i].labels for i in range(400)])
    shares = np.bincount(labels) / len(labels)
    entropy = -sum(share * math.log(share) for share in shares if share)
    loss = train.evaluate(model, dataset, 400, 100, Ranks())["mlm_loss"]
    assert abs(loss - entropy) < 0.25  # the logits are not quite equal, and the sample is small
    assert loss < math.log(len(dataset.special)) - 0.5


@given(L=st.integers(2, 80), half=st.integers(1, 40), odd=st.booleans())
def test_waves_depend_on_the_distance_alone(L, half, odd):
    """The product of two positions' embeddings is a function of how far they are apart."""
    H = 2 * half + odd
    embeddings = head_start.waves(L, H)
    products = embeddings @ embeddings.T
    for distance in range(L):
        diagonal = products.diagonal(distance)
        assert (diagonal - diagonal[0]).abs().max() < 1e-9 * H
    square = embeddings.square().sum(1)
    assert torch.allclose(square, torch.full_like(square, 2.0 * half))


@pytest.mark.parametrize("H, N, L", [(192, 6, 64), (512, 8, 512)])
def test_heads_look_at_their_neighbours(dataset, H, N, L):
    """In the first two layers each head's mean weight is largest at its neighbour."""
    model = model_of(dataset, H, N, L)
    head_start.give_head_start(model, head_start.words_of(ALL), dataset)
    ids = torch.from_numpy(np.concatenate([dataset[i].input_ids for i in range(12)])[:L])
    cu_seqlens = torch.tensor([0, L], dtype=torch.int32)
    inputs = []
    for layer in model.bert.layers:
        layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    with torch.no_grad():
        model.bert(ids, cu_seqlens)
        for layer, h in zip(model.bert.layers[: head_start.NEIGHBOUR_LAYERS], inputs):
            q, k, _ = layer.qkv(h).unflatten(-1, (3, N, -1)).unbind(1)  # (L, N, D)
            scores = torch.einsum("qnd,knd->nqk", q, k) * (H // N) ** -0.5
            weights = scores.softmax(-1)  # (N, L, L)
            for n in range(N):
                d = (n // 2 + 1) * (-1) ** (n % 2 + 1)  # -1, 1, -2, 2, ...
                mean = {at: weights[n].diagonal(at).mean().item() for at in range(-20, 21)}
                assert max(mean, key=mean.get) == d and mean[d] > 0.1, (n, mean)


def test_tokens_are_counted_up_to_a_limit(dataset, monkeypatch):
    counts = head_start.token_counts(dataset)
    tokens = np.concatenate([part.tokens for part in dataset.parts])
    assert (counts == np.bincount(tokens, minlength=len(counts))).all()
    monkeypatch.setattr(head_start, "TOKENS_COUNTED", 100)
    assert (head_start.token_counts(dataset) == np.bincount(tokens[:100], minlength=600)).all()


def test_tokens_of_every_part_are_counted(tokenizer, tmp_path, monkeypatch):
    parts = [[[7] * 40, [7] * 40], [[9] * 40, [9] * 40]]
    dataset = PairDataset(write_corpus(tmp_path, tokenizer, *parts), "train", 64, seed=0)
    monkeypatch.setattr(head_start, "TOKENS_COUNTED", 60)
    counts = head_start.token_counts(dataset)
    assert counts[7] == counts[9] == 30 and counts.sum() == 60


def test_heads_of_size_1_have_no_neighbours(dataset):
    model = model_of(dataset, H=4, N=4)
    with pytest.raises(ValueError, match="heads of size 2 or more"):
        head_start.give_head_start(model, head_start.words_of(ALL), dataset)
