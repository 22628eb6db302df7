"""What transformers and sentence-transformers need to use a fine-tuned model."""

import json
import os

import tokenizers

from common.files import write_whole
from corpus.tokenizer import Tokenizer


def framed(tokenizer, positions):
    """A copy of a `Tokenizer` whose files make transformers read texts as they are read here.

    A text becomes <cls> A <sep>, a pair <cls> A <sep> B <sep>, all of token type 0. What looks like
    a special token is ordinary text. positions: the tokens at which transformers truncates.
    """
    library = tokenizers.Tokenizer.from_str(tokenizer.json)
    special = [("<cls>", tokenizer.cls_id), ("<sep>", tokenizer.sep_id)]
    library.post_processor = tokenizers.processors.TemplateProcessing(
        single="<cls> $A <sep>",
        pair="<cls>:0 $A:0 <sep>:0 $B:0 <sep>:0",
        special_tokens=special,
    )
    framed_tokenizer = Tokenizer(library.to_str(pretty=True))
    framed_tokenizer.for_transformers = {
        "model_max_length": positions,
        "split_special_tokens": True,
    }
    return framed_tokenizer


def write_modules(directory, config):
    """Writes the files by which sentence-transformers makes the vectors of `starencoder.embed`.

    config: a `StarEncoderConfig`.
    """
    modules = []
    for number, name in enumerate(["Transformer", "Pooling", "Normalize"]):
        path = "" if number == 0 else f"{number}_{name}"
        kind = f"sentence_transformers.models.{name}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": kind})
    pooling = {
        "word_embedding_dimension": config.hidden_size,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
    }
    os.makedirs(os.path.join(directory, "2_Normalize"), exist_ok=True)  # it has no settings
    write_json(directory, "1_Pooling/config.json", pooling)
    write_json(
        directory, "sentence_bert_config.json", {"max_seq_length": config.max_position_embeddings}
    )
    write_json(directory, "modules.json", modules)


def write_json(directory, name, content):
    """Writes a file of a directory, and the directory that it lies in."""
    path = os.path.join(directory, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    write_whole(path, json.dumps(content, indent=2))
