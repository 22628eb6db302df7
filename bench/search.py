"""Search by meaning beside search by words: which function does a docstring describe?

Pairs from installed packages (search_data.py), held out by package, in pools of 1,000 candidates:

    BM25              words in common
    random weights    the mean of the last hidden states, nothing learned
    pretrained        the mean, the state of <cls>, that of the last <sep>
    fine-tuned        the mean, after `python -m finetune` on the other packages

For each: the mean reciprocal rank, once more for the queries that share no content word with their
code, recall, and how alike the vectors of different functions are.
"""

import json
import os
import statistics

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from bench.measure import report
from bench.search_data import make_pairs, words_found
from corpus.tokenizer import Tokenizer
from finetune.batches import pack, sequence_of, tokenized
from finetune.loop import FinetuneConfig, train
from finetune.scores import place_of_right, pools, search_scores
from finetune.search import bm25_similarities
from starencoder import StarEncoder, StarEncoderConfig, embed

DATA = "corpora/tasks/search"
RUNS = "runs/search"  # and the number of the seed
SETTINGS = dict(steps=600, batch_size=128, micro_batch_size=128, eval_every=200)


def bench_search(path=None, encoder="runs/tiny", seeds=3):
    """Figures of all contenders; several, by seed, of those that depend on chance."""
    make_pairs(DATA)
    with open(os.path.join(DATA, "test.jsonl")) as f:
        pairs = [json.loads(line) for line in f]
    kept = sum(len(pool) for pool in pools(len(pairs)))
    pairs = pairs[:kept]  # whole pools
    shares = np.array(words_found(pairs))  # (n,) of the query's words that are in the code

    texts = [(pair["query"], pair["code"]) for pair in pairs]
    contenders = {"BM25": [figures(bm25_similarities(texts), shares)]}
    tokenizer = Tokenizer.from_pretrained(encoder)
    model = StarEncoder.from_pretrained(encoder)
    untrained = [random_model(encoder, seed) for seed in range(seeds)]
    contenders["random weights, mean"] = [by_mean(m, tokenizer, pairs, shares) for m in untrained]
    contenders["pretrained, mean"] = [by_mean(model, tokenizer, pairs, shares)]
    for name in ("<cls>", "last <sep>"):
        vectors = [
            states_of(model, tokenizer, [pair[side] for pair in pairs], name)
            for side in ("query", "code")
        ]
        contenders[f"pretrained, {name}"] = [by_vectors(*vectors, shares)]

    tuned = []
    for seed in range(seeds):
        out = os.path.join(RUNS, str(seed))
        splits = {split: os.path.join(DATA, f"{split}.jsonl") for split in ("train", "validation")}
        config = FinetuneConfig(**splits, encoder=encoder, out=out, seed=seed, **SETTINGS)
        if train(config) is None:  # a signal stopped it, and means all runs
            raise KeyboardInterrupt
        tuned.append(by_mean(StarEncoder.from_pretrained(out), tokenizer, pairs, shares))
    contenders["fine-tuned, mean"] = tuned

    rows = [row_of(name, of_seeds) for name, of_seeds in contenders.items()]
    facts = dict(queries=len(pairs), without_words=int((shares == 0).sum()), seeds=seeds)
    report(path, "search", rows, **facts, settings=SETTINGS, by_seed=contenders)


def random_model(encoder, seed):
    """An encoder of the same shape with initial weights."""
    torch.manual_seed(seed)
    return StarEncoder(StarEncoderConfig.load(encoder)).eval()


def by_mean(model, tokenizer, pairs, shares):
    """`figures` of a model's `embed`."""
    vectors = [
        embed(model, tokenizer, [pair[side] for pair in pairs]) for side in ("query", "code")
    ]
    return by_vectors(*vectors, shares)


def by_vectors(queries, code, shares):
    """`figures` of unit vectors (n, H), and the mean cosine of different functions."""
    queries = queries.double().numpy()
    code = code.double().numpy()
    similarities = (queries[pool] @ code[pool].T for pool in pools(len(code)))
    n = len(code)
    # The sum over all pairs is the square of the sum.
    alike = (np.square(code.sum(0)).sum() - n) / (n * (n - 1))
    return figures(similarities, shares) | {"cosine": float(alike)}


def figures(similarities, shares):
    """Scores of the queries of all pools, and MRR by how many of their words the code holds."""
    places = np.concatenate([place_of_right(of_pool) for of_pool in similarities])  # (n,)
    by_words = {
        "mrr, no word": shares == 0,
        "mrr, < 1/3": shares < 1 / 3,
        "mrr, < 2/3": (shares >= 1 / 3) & (shares < 2 / 3),
        "mrr, >= 2/3": shares >= 2 / 3,
    }
    chosen = {name: float(np.mean(1 / places[rows])) for name, rows in by_words.items()}
    return search_scores(places) | chosen


@torch.inference_mode()
def states_of(model, tokenizer, texts, name):
    """The state of <cls> or the last <sep> of each text's beginning, as unit vectors (n, H)."""
    positions = model.config.max_position_embeddings
    states = []
    for ids in tqdm(tokenized(texts, tokenizer), name, leave=False):
        input_ids, cu_seqlens = pack([sequence_of([ids], tokenizer, positions)], "cpu")
        row = 0 if name == "<cls>" else len(input_ids) - 1
        states.append(model(input_ids, cu_seqlens, rows=torch.tensor([row])))
    return F.normalize(torch.cat(states), dim=-1)


def row_of(name, of_seeds):
    """A row of the table: means over the seeds, and deviations if there are several."""
    row = {"contender": name}
    for key in ("mrr", "mrr, no word", "recall@1", "recall@10", "cosine"):
        values = [of_seed[key] for of_seed in of_seeds if key in of_seed]
        row[key] = shown(values) if values else ""
    return row


def shown(values):
    """0.512 ± 0.004, or 0.512."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean
