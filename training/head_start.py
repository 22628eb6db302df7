"""Initial weights that already know what training would find out first.

A new BERT learns within some hundred steps how often each token is. Then little happens for a long
time: to use a token's neighbours, attention must first be able to find them, and all that tells it
where a token stands are random position embeddings. Only then does it learn much about code. Both
can be known before the first step. The architecture stays what it is: these weights are only begun
elsewhere, and training may change each of them.

    frequencies   the MLM head's bias is the logarithm of each token's frequency, so that the model
                  begins where it would have been on the plateau
    positions     the position embeddings are sines and cosines, as in Vaswani et al., 2017, section
                  3.5, but of other frequencies
    neighbours    each head of the first two layers begins by looking at one neighbour: the token
                  to the left, to the right, two to the left, two to the right, ...; it needs
                  `positions`

Why sines and cosines: moving on by d tokens turns each pair (sin w i, cos w i) by the angle w d,
wherever i is. So if keys take some of these pairs as they are, and queries take the same pairs
turned by w d, the product of query i and key j is the sum of cos(w (j - i - d)) over these w, which
is largest at j = i + d. Of random position embeddings the few dimensions of a head say nothing of
the kind: attention has to learn nearly for each position by itself where its neighbour is.

Reference: Trockman and Kolter, Mimetic Initialization of Self-Attention Layers, 2023, begins
attention near what training would make of it.
"""

import math

import numpy as np
import torch

WORDS = ("frequencies", "positions", "neighbours")
NEIGHBOUR_LAYERS = 2
# What a neighbour's logit would be before the first step if a token were nothing but its position.
# With words and token type added it is 7.6 on average in the first layer of the tiny model, the
# others' 1.4 with a spread of 2.8. So the neighbour has a third of the weight of 64 tokens.
NEIGHBOUR_LOGIT = 10.0
TOKENS_COUNTED = 50_000_000  # at most, from all parts of the training split alike


def words_of(text):
    """The parts of a head start that a text names: "none", or some of WORDS joined by "+".

    Raises ValueError for any other text.
    """
    words = [] if text == "none" else text.split("+")
    for word in words:
        if word not in WORDS:
            known = "none, or some of " + "+".join(WORDS)
            raise ValueError(f"head_start must be {known}; got {word!r}")
    if "neighbours" in words and "positions" not in words:
        raise ValueError("head_start: neighbours needs positions, in whose terms they are found")
    return words


@torch.no_grad()
def give_head_start(model, words, dataset):
    """Changes the weights of a new `StarEncoderForPreTraining`.

    words: as `words_of` returns them. dataset: the `PairDataset` to be trained on, for frequencies.
    """
    if "frequencies" in words:
        counts = token_counts(dataset)  # (V,)
        counts[dataset.special] = 0  # they are never to be predicted
        counts += 1  # a token that was not seen is improbable, but not impossible
        model.mlm_bias.copy_(torch.from_numpy(np.log(counts / counts.sum())))
    if "positions" in words:
        embeddings = model.bert.position_embeddings.weight
        embeddings.copy_(waves(*embeddings.shape) * model.config.initializer_range)
    if "neighbours" in words:
        for layer in model.bert.layers[:NEIGHBOUR_LAYERS]:
            look_at_neighbours(layer, model.config)


def token_counts(dataset):
    """How often each token occurs at the beginning of each part of a split: (V,) int64."""
    counts = np.zeros(len(dataset.special), np.int64)
    of_each = math.ceil(TOKENS_COUNTED / len(dataset.parts))
    for part in dataset.parts:
        found = np.bincount(part.tokens[:of_each], minlength=len(counts))
        counts += found[: len(counts)]  # a token beyond the vocabulary is refused when it is read
    return counts


def frequencies(pairs):
    """By how many radians each pair turns from one token to the next, up to pi: (pairs,) float64.

    They are spread over all of this range, so that the mean of cos(w d) over w is far smaller at
    every other d than at 0: the one neighbour that is meant stands out. If they were spread evenly,
    the mean would be as large again at some larger d.
    """
    return math.pi * (torch.arange(1, pairs + 1, dtype=torch.float64) / pairs) ** 1.5


def waves(L, H):
    """Position embeddings (L, H): (sin w i, cos w i) for H // 2 frequencies w, of mean square 1.

    An odd last column is 0.
    """
    i = torch.arange(L, dtype=torch.float64)[:, None]
    angles = i * frequencies(H // 2)  # (L, H // 2)
    pairs = torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (L, H or H - 1)
    return torch.nn.functional.pad(pairs * math.sqrt(2), (0, H % 2))


def look_at_neighbours(layer, config):
    """Adds to a layer's queries and keys what makes each head look at one neighbour."""
    H = config.hidden_size
    N = config.num_attention_heads
    D = H // N
    if D < 2:
        raise ValueError("head_start: neighbours needs heads of size 2 or more")
    # Each head sees D // 2 of the H // 2 frequencies, from the lowest to the highest.
    chosen = torch.linspace(0, H // 2 - 1, D // 2).round().long()
    w = frequencies(H // 2)[chosen]  # (D // 2,)
    sines = 2 * chosen  # the columns of `waves` with sin w i
    cosines = sines + 1
    rows = torch.arange(D // 2)  # of queries and keys: first for sines, then for cosines

    # D // 2 pairs of length 1 that agree have the product D // 2, and attention divides by sqrt(D).
    scale = math.sqrt(NEIGHBOUR_LOGIT / (D // 2) * math.sqrt(D))

    weight = layer.qkv.weight.view(3, N, D, H)
    for n in range(N):
        d = (n // 2 + 1) * (-1 if n % 2 == 0 else 1)  # -1, 1, -2, 2, ...
        query = torch.zeros(D, H, dtype=torch.float64)
        key = torch.zeros(D, H, dtype=torch.float64)
        key[rows, sines] = 1.0
        key[rows + D // 2, cosines] = 1.0
        # sin(w (i + d)) and cos(w (i + d)) by what there is of i.
        query[rows, sines] = (w * d).cos()
        query[rows, cosines] = (w * d).sin()
        query[rows + D // 2, sines] = -(w * d).sin()
        query[rows + D // 2, cosines] = (w * d).cos()
        weight[0, n] += (scale * query).to(weight)
        weight[1, n] += (scale * key).to(weight)
