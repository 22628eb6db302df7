"""Search: an encoder that puts a query and the code that it asks for close to each other.

    q, c        unit vectors of G queries and of their code: the mean of the last hidden states
    loss        mean over i of  (CE(q_i . c / temperature, i) + CE(c_i . q / temperature, i)) / 2

InfoNCE (van den Oord et al., 2018) in both directions: for a query, the code of all others in the
*global* batch is wrong, and for code all other queries are. But code that is equal to the right one
is not wrong. The loss needs the vectors of all ranks and micro-batches at once, and a micro-batch
may be all that a device can hold, so each step has two passes (Gao et al., GradCache, 2021):

    compare     without gradients: all vectors, the loss, its gradient with respect to the vectors
    loss        with gradients, a micro-batch at a time: vectors times that gradient

Dropout has the same masks in both, since each micro-batch has its seed.
"""

import itertools
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from finetune.batches import batch_of, of_all_ranks, sequence_of, tokenized
from finetune.bm25 import BM25, words_of
from finetune.export import write_modules
from finetune.scores import place_of_right, pools, prefixed, search_scores
from finetune.task import Task
from starencoder import embed


class Aim(NamedTuple):
    """A micro-batch's part of the loss, and the gradient that its vectors get from it."""

    gradient: torch.Tensor  # (2, B, H) of the loss with respect to its vectors
    value: torch.Tensor  # () its part of the loss


class Search(Task):
    """Pairs of a query and the code that it asks for."""

    measure = "mrr"

    def __init__(self, data, tokenizer, positions, config):
        self.tokenizer = tokenizer
        self.temperature = config.temperature
        self.dtype = config.dtype
        self.held_out = [record.texts for record in data.validation]
        queries_and_code = list(zip(*(record.texts for record in data.training)))
        columns = [tokenized(texts, tokenizer) for texts in queries_and_code]
        self.numbers = np.stack([numbered(texts) for texts in queries_and_code])  # (2, n)
        self.sequences = [
            [sequence_of([ids], tokenizer, positions) for ids in column] for column in columns
        ]

    def __len__(self):
        return len(self.sequences[0])

    def prepare(self, model):
        """Freezes the pooler: a BertModel's files hold it, but the mean gives it no gradient."""
        model.pooler.requires_grad_(False)

    def publish(self, model, directory):
        """Writes the model for use, also by sentence-transformers."""
        write_modules(directory, model.config)
        model.save_pretrained(directory)

    def batch(self, examples, device):
        """A `Batch` of these pairs, by their numbers: the queries, and behind them their code."""
        queries, code = ([column[i] for i in examples] for column in self.sequences)
        return batch_of(queries + code, None, len(examples), device)

    def compare(self, model, batches, seeds, examples, first, autocast, ranks):
        """An `Aim` for each micro-batch. The arguments: see `Task`."""
        device = batches[0].input_ids.device
        G = len(examples)
        vectors = torch.zeros(2, G, model.config.hidden_size, device=device)  # of all ranks
        places = list(itertools.accumulate((batch.count for batch in batches), initial=first))
        with torch.no_grad(), autocast():
            for batch, seed, start, end in zip(batches, seeds, places, places[1:]):
                vectors[:, start:end] = vectors_of(model, batch, seed)
        if ranks.world_size > 1:
            dist.all_reduce(vectors)  # the others' rows are 0

        vectors.requires_grad_()
        of_batch = self.numbers[:, examples]  # (2, G)
        equal = (of_batch[:, :, None] == of_batch[:, None, :]).any(0)  # (G, G)
        losses = pair_losses(*vectors, torch.from_numpy(equal).to(device), self.temperature)
        (gradient,) = torch.autograd.grad(losses.mean(), vectors)
        return [
            Aim(gradient[:, start:end], losses[start:end].detach().sum() / G)
            for start, end in zip(places, places[1:])
        ]

    def loss(self, model, batch, total, seed, aim):
        """A scalar with the gradient of the loss, and this micro-batch's part of the loss."""
        return (vectors_of(model, batch, seed) * aim.gradient).sum(), aim.value

    def evaluate(self, model, autocast, ranks):
        """Mean reciprocal rank and recall among POOL candidates."""
        mine = self.held_out[ranks.rank :: ranks.world_size]
        columns = []
        for side in (0, 1):
            vectors = embed(model, self.tokenizer, [pair[side] for pair in mine], self.dtype)
            columns.append(of_all_ranks(ranks, vectors, len(self.held_out)))
        queries, code = columns  # both (n, H)
        parts = [place_of_right(queries[pool] @ code[pool].T) for pool in pools(len(queries))]
        return search_scores(np.concatenate(parts))

    def baselines(self, model, autocast, ranks):
        """The same of the encoder as it is, and of BM25."""
        before = self.evaluate(model, autocast, ranks)
        return prefixed("before", before) | prefixed("bm25", bm25_scores(self.held_out))


def numbered(texts):
    """(n,) int64: equal texts have equal numbers."""
    numbers = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in texts])


def vectors_of(model, batch, seed):
    """(2, B, H): the unit vectors of the queries of a micro-batch, and of their code."""
    h = model(batch.input_ids, batch.cu_seqlens, seed=seed)  # (T, H)
    sums = torch.stack([states.float().sum(0) for states in h.split(batch.lengths.tolist())])
    return F.normalize(sums, dim=-1).unflatten(0, (2, -1))


def pair_losses(queries, code, equal, temperature):
    """(G,) the loss of each pair. queries, code: (G, H). equal: (G, G), pairs that share a text."""
    G = len(queries)
    right = torch.arange(G, device=queries.device)
    logits = queries @ code.T / temperature  # (G, G)
    others = equal & ~torch.eye(G, dtype=torch.bool, device=equal.device)
    logits = logits.masked_fill(others, float("-inf"))
    rows = F.cross_entropy(logits, right, reduction="none")
    columns = F.cross_entropy(logits.T, right, reduction="none")
    return (rows + columns) / 2


def bm25_scores(pairs):
    """Figures of search by the words that query and code have in common. pairs: (query, code)."""
    places = [place_of_right(similarities) for similarities in bm25_similarities(pairs)]
    return search_scores(np.concatenate(places))


def bm25_similarities(pairs):
    """Yields the BM25 scores of each pool, (queries, code)."""
    for pool in pools(len(pairs)):
        queries, code = zip(*(pairs[i] for i in pool))
        index = BM25([words_of(text) for text in code])
        yield np.stack([index.scores(words_of(query)) for query in queries])
