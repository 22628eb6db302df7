"""TODO."""

import glob
import json
import os
import re

import torch

from common.command_line import first_line


def read_weights(directory):
    """name -> tensor, of the first of these files that is there, whole or in shards."""
    from safetensors.torch import load_file

    def load_pickle(path):
        return torch.load(path, map_location="cpu", weights_only=True)  # runs no code of the file

    for name, load in (("model.safetensors", load_file), ("pytorch_model.bin", load_pickle)):
        path = os.path.join(directory, name)
        try:
            if os.path.exists(path):
                weights = load(path)
            elif os.path.exists(path + ".index.json"):
                weights = read_shards(directory, path + ".index.json", load)
            else:
                continue
            values = weights.values() if isinstance(weights, dict) else [None]
            if not all(isinstance(value, torch.Tensor) for value in values):
                raise ValueError("not a table of tensors")
            return weights
        except Exception as error:  # each library has its own kind for a file cut short
            words = f"the weights cannot be read ({first_line(error)}); copy or save them again"
            raise ValueError(f"{directory}: {words}") from None
    words = "neither model.safetensors nor pytorch_model.bin, nor the index of shards of either"
    raise FileNotFoundError(f"{directory}: {words}")


def read_shards(directory, index, load):
    """The weights that an index names, each from its shard.

    Raises ValueError for an index that is damaged, that leads out of the directory, or whose shards
    do not hold what it says.
    """
    with open(index, encoding="utf-8") as f:
        entries = json.load(f)
    shard_of = entries.get("weight_map") if isinstance(entries, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{os.path.basename(index)} has no weight_map")
    weights = {}
    for shard in sorted(set(map(str, shard_of.values()))):
        if shard in (".", "..") or re.search(r"[/\\:\0]", shard):
            raise ValueError(f"the shard {shard[:80]!r} is not a file name in this directory")
        tensors = load(os.path.join(directory, shard))
        for name in (name for name, file in shard_of.items() if file == shard):
            if name not in tensors:
                raise ValueError(f"{shard} lacks {name}, which the index says it holds")
            weights[name] = tensors[name]
    return weights


def download(name):
    from huggingface_hub import snapshot_download

    try:
        for weights in ("model*.safetensors", "pytorch_model*.bin"):  # whole or in shards
            files = ["config.json", "tokenizer.json", weights, weights + ".index.json"]
            directory = snapshot_download(name, allow_patterns=files)
            if glob.glob(os.path.join(glob.escape(directory), weights)):
                break
        return directory
    except Exception as error:  # no such name, no network, no access: all one to the caller
        raise FileNotFoundError(
            f"{name}: no such directory, and the Hugging Face hub did not give it ({first_line(error)})"
        ) from None
