"""Sequences end to end, for training; and texts through a model, in batches of about one length."""

from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from starencoder import Window, evaluating, micro_batches, tokens_at_once


class Batch(NamedTuple):
    """A micro-batch: B examples, T tokens."""

    input_ids: torch.Tensor  # (T,) int64
    cu_seqlens: torch.Tensor  # (B+1,) int32; of search (2 B + 1,): the queries, then the code
    lengths: np.ndarray  # (B,) or (2 B,) of the sequences, known without asking a GPU
    labels: torch.Tensor | None  # as the model takes them; None for search
    count: int  # over how many labels the loss is a mean


def batch_of(sequences, labels, count, device):
    """A `Batch` of arrays of ids. labels: an array, or None."""
    if labels is not None:
        labels = torch.from_numpy(labels).to(device)
    lengths = np.array([len(sequence) for sequence in sequences])
    return Batch(*pack(sequences, device), lengths, labels, count)


def pack(sequences, device):
    """Arrays laid end to end, as a model takes them: (T,) int64 and cu_seqlens (B+1,) int32."""
    ends = np.cumsum([0] + [len(sequence) for sequence in sequences]).astype(np.int32)  # (B + 1,)
    tokens = torch.from_numpy(np.concatenate(sequences))  # (T,)
    return tokens.to(device), torch.from_numpy(ends).to(device)


def sequence_of(pieces, tokenizer, positions):
    """<cls> A <sep>, or <cls> A <sep> B <sep>: (tokens,) int64, at most `positions`.

    pieces: lists of ids, one or two. What is too long loses its end. Of a pair it is the longer
    piece that does, or both, as with transformers' "longest_first".
    """
    room = positions - 1 - len(pieces)  # beside <cls> and each <sep>
    if len(pieces) == 2:
        # The shorter piece stays whole, unless both are longer than half of the room.
        shorter = min(map(len, pieces))
        longer = max(shorter, room - shorter)
        if shorter + longer > room:
            shorter = room // 2
            longer = room - shorter
        first_is_longer = len(pieces[0]) > len(pieces[1])
        rooms = (longer, shorter) if first_is_longer else (shorter, longer)
    else:
        rooms = (room,)
    ids = [tokenizer.cls_id]
    for piece, piece_room in zip(pieces, rooms):
        ids += [*piece[:piece_room], tokenizer.sep_id]
    return np.array(ids, np.int64)


def tokenized(texts, tokenizer):
    """[ids, ...] of texts, with a progress bar if it takes a while."""
    return [tokenizer.encode(text) for text in tqdm(texts, "tokenizing", leave=False, delay=2)]


def through_model(model, sequences, autocast, description):
    """Yields (numbers of sequences, their logits in fp32 on the CPU), a batch at a time.

    sequences: arrays of ids. The logits: (B, C), or (T, C) of a model that classifies tokens.
    """
    device = next(model.parameters()).device
    windows = [Window(number, sequence) for number, sequence in enumerate(sequences)]
    windows.sort(key=lambda window: len(window.ids))  # equal lengths in one batch
    with tqdm(total=len(windows), desc=description, delay=2, leave=False) as bar:
        for batch in micro_batches(windows, tokens_at_once(device)):
            # Not around the loop: what the caller does with a batch runs inside of it.
            with evaluating(model), torch.no_grad(), autocast():
                logits = model(*pack([window.ids for window in batch], device)).logits
            yield [window.text for window in batch], logits.float().cpu()
            bar.update(len(batch))


def of_all_ranks(ranks, mine, count):
    """Gathers rows from the ranks: (count, columns) float64, on every rank.

    mine: this rank's, which are rows rank, rank + W, rank + 2 W, ... of all `count`; W ranks.
    """
    rows = torch.zeros(count, mine.shape[1], dtype=torch.float64)
    rows[ranks.rank :: ranks.world_size] = mine.double()
    if ranks.world_size > 1:  # not `ranks.sum`, which makes a list of Python's numbers
        dist.all_reduce(rows, group=ranks.control)
    return rows.numpy()
