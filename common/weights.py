"""Weights of any model on disk, in the file names of Hugging Face: found, read and written.

A directory holds `model.safetensors` or, older, `pytorch_model.bin`. Each may be cut into shards;
`NAME.index.json` then says under "weight_map" which shard holds which tensor. Files may come from
strangers: no code in them is run, and no path in them leads out of their directory.
"""

import glob
import json
import os
import re

import torch

from common.command_line import first_line
from common.files import write_whole

# ---- files ---------------------------------------------------------------------------------------


def local_directory(name):
    """The directory `name`, or the model of that name on the Hugging Face hub, once downloaded.

    Raises FileNotFoundError if it is neither.
    """
    if os.path.isdir(name):
        return name

    # "bigcode/starencoder" may be a name on the hub; what was fetched before is not fetched again.
    from huggingface_hub import snapshot_download  # slow to import, and seldom needed

    try:
        # Weights are large: pickles are fetched only if there are no safetensors.
        for weights in ("model*.safetensors", "pytorch_model*.bin"):  # whole or in shards
            files = ["config.json", "tokenizer.json", weights, weights + ".index.json"]
            directory = snapshot_download(name, allow_patterns=files)
            if glob.glob(os.path.join(glob.escape(directory), weights)):
                break
    except Exception as error:  # no such name, no network, no access: the caller has no model
        raise FileNotFoundError(
            f"{name}: no such directory, and the Hugging Face hub did not give it "
            f"({first_line(error)})"
        ) from None
    return directory


def write(directory, weights):
    """Writes {name: tensor on the CPU} to model.safetensors, atomically."""
    from safetensors.torch import save  # here, as not every program writes weights

    content = save(weights, metadata={"format": "pt"})  # transformers refuses files without it
    write_whole(os.path.join(directory, "model.safetensors"), content)


def read(directory):
    """{name: tensor on the CPU} from model.safetensors or else pytorch_model.bin, whole or sharded.

    Raises FileNotFoundError if there is neither, ValueError if they are damaged.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):  # the safer one first
        path = os.path.join(directory, name)
        try:
            if os.path.exists(path):
                return load(path)
            if os.path.exists(path + ".index.json"):  # in shards
                return read_shards(directory, name + ".index.json")
        except Exception as error:  # each library raises its own type for a damaged file
            raise ValueError(
                f"{directory}: the weights cannot be read ({first_line(error)}); "
                "copy or save them again"
            ) from None
    raise FileNotFoundError(
        f"{directory}: neither model.safetensors nor pytorch_model.bin, "
        "nor the index of shards of either"
    )


def load(path):
    """The table of tensors in one file, safetensors or pickled. Runs no code in a pickle."""
    from safetensors.torch import load_file  # here, as not every program reads weights

    if path.endswith(".safetensors"):
        return load_file(path)
    # weights_only refuses a pickle that would run code. It may still hold anything but tensors.
    weights = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(weights, dict) or not all(map(torch.is_tensor, weights.values())):
        raise ValueError("not a table of tensors")
    return weights


def read_shards(directory, index):
    """The weights that an index names, each from its shard.

    Raises ValueError for an index that is damaged, that leads out of the directory, or whose shards
    do not hold what it says.
    """
    with open(os.path.join(directory, index), encoding="utf-8") as f:
        entries = json.load(f)
    shard_of = entries.get("weight_map") if isinstance(entries, dict) else None
    if not isinstance(shard_of, dict) or not shard_of:
        raise ValueError(f"{index} has no weight_map")

    # One shard after the other, so that each is read once.
    weights = {}
    for shard in sorted(set(map(str, shard_of.values()))):
        # No path, or a stranger's index could read any file. A colon is a drive on Windows.
        if shard in (".", "..") or re.search(r"[/\\:\0]", shard):
            raise ValueError(f"not a file name in this directory: the shard {shard!r}")
        path = os.path.join(directory, shard)
        if not os.path.isfile(path):
            raise ValueError(f"the shard {shard} is missing")
        tensors = load(path)
        for name, file in shard_of.items():
            if file != shard:
                continue
            if name not in tensors:
                raise ValueError(f"{shard} lacks {name}, which the index says it holds")
            weights[name] = tensors[name]
    return weights


# ---- modules -------------------------------------------------------------------------------------
#
# `names` is a function from the name of a module's parameter to a list of names in a file. If there
# are several, each names a part of the parameter, which is cut along its first axis.


def of_module(module, names):
    """{name in a file: tensor on the CPU} of a module's parameters."""
    weights = {}
    for name, parameter in module.named_parameters():  # lists a shared one once
        in_file = names(name)  # several for a fused matrix
        weights.update(zip(in_file, parameter.detach().cpu().chunk(len(in_file))))
    return weights


def fill_module(module, weights, names, optional=()):
    """Copies weights into a module. Returns the names of the parameters that the weights lack.

    optional: a tuple of beginnings of names; only parameters so named may be lacking. Raises
    ValueError if another one is lacking or has another shape.
    """
    lacking = []
    for name, parameter in module.named_parameters():
        in_file = names(name)
        if name.startswith(optional) and not weights.keys() >= set(in_file):
            lacking.append(name)  # it keeps its initial weights
            continue
        # `chunk` gives views, so this writes into the parameter itself.
        for part, place in zip(in_file, parameter.data.chunk(len(in_file))):
            check_weight(weights, part, place.shape)
            place.copy_(weights[part])
    return lacking


def check_weight(weights, name, shape):
    """Raises ValueError unless `weights` holds floating-point numbers of this name and shape."""
    if name not in weights:
        raise ValueError(f"the weights lack {name}")
    # `copy_` would broadcast another shape, or raise a less helpful error.
    stored_shape = tuple(weights[name].shape)
    if stored_shape != tuple(shape):
        raise ValueError(f"{name} is {stored_shape}, its config.json asks for {tuple(shape)}")
    if not weights[name].is_floating_point():
        raise ValueError(f"{name} is not made of floating-point numbers")
