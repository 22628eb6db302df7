"""How fast a training step is, beside the models of transformers.

A step is forward, backward, clipping and AdamW in bf16 autocast, with dropout. All models see the
same sequences: packed for this project, padded to the longest one for transformers. Speeds are of
real tokens; padding does not count. MFU is the share of the GPU's peak that the FLOPs of
`training.plan.model_flops` make up, for BERT as for StarEncoder.
"""

import gc
import itertools
import random
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers

from bench.measure import CORPUS, medians, prepared, report
from corpus.tokenizer import Tokenizer
from data import PairDataset
from starencoder import StarEncoderConfig, StarEncoderForPreTraining
from training.plan import MASKED, count_parameters, model_flops, peak_flops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def original_lengths(directory, max_length, count):
    """`count` lengths of sequences as the original's data has them.

    It takes the tokens of each file's first 10,000 characters, cut at max_length. These are evenly
    spaced quantiles over up to 512 files of a corpus, so that even a small batch is a fair sample.
    """
    tokenizer = Tokenizer.from_pretrained(directory)
    split = PairDataset(directory, "train", max_length, seed=0)
    documents = random.Random(0).sample(range(split.documents()), min(512, split.documents()))

    # 10,000 tokens of code hold at least 10,000 characters, and decoding more would be in vain.
    texts = [tokenizer.decode(split.document(d)[:10_000])[:10_000] for d in documents]
    lengths = sorted(min(max_length, len(tokenizer.encode(text))) for text in texts)
    return [lengths[(2 * i + 1) * len(lengths) // (2 * count)] for i in range(count)]


class Batch(NamedTuple):
    """The same sequences twice, as arguments of a model."""

    packed: dict  # for this project: T tokens end to end
    padded: dict  # for transformers: (B, L), and a label for every token


def random_batch(lengths, config):
    """A `Batch` of random sequences of these lengths, with 15 % of their tokens masked."""
    generator = torch.Generator().manual_seed(0)
    T = sum(lengths)
    ids = torch.randint(config.vocab_size - 20, (T,), generator=generator)  # no special tokens
    masked = torch.randperm(T, generator=generator)[: round(MASKED * T)].sort().values  # (M,)
    neighbours = torch.randint(2, (len(lengths),), generator=generator)  # (B,)
    packed = {
        "input_ids": ids,  # (T,)
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        "labels": ids[masked],  # (M,)
        "next_sentence_label": neighbours,
        "masked_positions": masked,
        "seed": torch.tensor(5),  # of dropout; a tensor, so that torch.compile does not bake it in
    }

    def pad(tokens, value):
        """(T,) -> (B, L)."""
        parts = tokens.split(lengths)
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    padded = {
        "input_ids": pad(ids, 0),  # (B, L)
        "attention_mask": pad(torch.ones_like(ids), 0),  # (B, L)
        "labels": pad(torch.full((T,), -100).index_copy(0, masked, ids[masked]), -100),
        "next_sentence_label": neighbours,
    }
    return Batch(*({name: t.to(DEVICE) for name, t in kind.items()} for kind in (packed, padded)))


# How each model is made, and how it is asked for its loss on a batch.


def own_loss(model, batch):
    """The loss of this project's model."""
    return model(**batch.packed, max_seqlen=model.config.max_position_embeddings).loss


def loss_of_all_tokens(model, batch):
    """The same loss as most implementations compute it: logits of every token, in fp32."""
    inputs = {name: batch.packed[name] for name in ("input_ids", "cu_seqlens", "seed")}
    out = model(**inputs, max_seqlen=model.config.max_position_embeddings)
    labels = batch.padded["labels"][batch.padded["attention_mask"].bool()]  # (T,)
    mlm_loss = F.cross_entropy(out.mlm_logits.float(), labels)
    return mlm_loss + F.cross_entropy(out.nsp_logits.float(), batch.packed["next_sentence_label"])


def make_bert(config):
    """transformers' BERT, as it is."""
    bert = transformers.BertConfig(**asdict(config), attn_implementation="sdpa")
    return transformers.BertForPreTraining(bert)


def bert_loss(model, batch):
    """Its loss, on padded inputs."""
    return model(**batch.padded).loss


def make_modern_bert(config):
    """ModernBERT-base; for a config that is smaller than StarEncoder's, one of its shape."""
    shape = {}  # -base is the default
    if config.hidden_size != StarEncoderConfig.hidden_size:
        sizes = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
        shape = {name: getattr(config, name) for name in sizes}
    # Its own special tokens lie beyond this vocabulary.
    specials = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    shape |= {"vocab_size": config.vocab_size, **specials}
    modern = transformers.ModernBertConfig(**shape, attn_implementation="sdpa")
    return transformers.ModernBertForMaskedLM(modern)


def modern_bert_loss(model, batch):
    """ModernBERT's loss, on padded inputs."""
    # It has no head for pairs.
    inputs = {name: t for name, t in batch.padded.items() if name != "next_sentence_label"}
    return model(**inputs).loss


class Contender(NamedTuple):
    """A model and how its loss is computed."""

    make: Callable  # config -> model
    loss: Callable  # model, batch -> loss
    compiled: bool = False

    def training_step(self, config, batch):
        """A function that takes a step of a new model and returns its number of tokens."""
        tokens = len(batch.packed["input_ids"])
        model = self.make(config).to(DEVICE).train()
        # Nothing can be learned from random tokens: the rate only has to keep numbers finite.
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if self.compiled:
            model.compile()

        def step():
            with torch.autocast(DEVICE, torch.bfloat16):
                loss = self.loss(model, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if DEVICE == "cuda":
                torch.cuda.synchronize()  # the clock must not stop before the GPU does
            return tokens

        return step


CONTENDERS = {
    "transformers BertForPreTraining, sdpa": Contender(make_bert, bert_loss),
    "StarEncoder": Contender(StarEncoderForPreTraining, own_loss),
    "StarEncoder, logits of all tokens": Contender(StarEncoderForPreTraining, loss_of_all_tokens),
    "ModernBERT-base, sdpa": Contender(make_modern_bert, modern_bert_loss),
    "transformers BertForPreTraining, sdpa, compiled": Contender(make_bert, bert_loss, True),
    "StarEncoder, --compile": Contender(StarEncoderForPreTraining, own_loss, True),
}


def training_steps(config, batch, compiled):
    """({name: training step, warmed up}, {name: GB of memory at its peak}) of all contenders.

    compiled: whether those that torch.compile compiles take part.
    """
    steps = {}
    memory = {}
    # All models stay in memory, as they take turns later.
    for name, contender in CONTENDERS.items():
        if contender.compiled and not compiled:
            continue
        gc.collect()  # one that ran out of memory must not stand in the way of the next
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        try:
            step = contender.training_step(config, batch)
            for _ in range(2):  # the first one makes the optimizer's moments, and compiles
                step()
        except torch.OutOfMemoryError:
            print(f"{name}: left out, the memory of this GPU is too small")
            step = None  # and with it the model
            continue
        steps[name] = step
        memory[name] = (torch.cuda.max_memory_allocated() - before) / 1e9  # 0 on a CPU
    return steps, memory


def bench_model(path=None, config=None, sizes=None, directory=CORPUS, repetitions=5):
    """A training step of the full model beside those of transformers, on two kinds of batches.

    sizes: sequences of the batch of full ones, and of that with the lengths of the original's data.
    """
    config = config or StarEncoderConfig()
    full, original = sizes or ((64, 64) if DEVICE == "cuda" else (2, 4))
    max_length = config.max_position_embeddings
    prepared(directory, config.vocab_size)
    batches = {
        "full": [max_length] * full,
        "as the original's": original_lengths(directory, max_length, original),
    }
    peak = peak_flops(torch.device(DEVICE))  # None on a CPU, and there is no MFU then

    rows = []
    for kind, lengths in batches.items():
        # torch.compile takes minutes on a CPU, and again for every batch of other lengths.
        compiled = DEVICE == "cuda" and kind == "full"
        steps, memory = training_steps(config, random_batch(lengths, config), compiled)
        speeds = medians(steps, repetitions)
        reference, *_ = speeds.values()  # BERT's

        # FLOPs a token, as our model computes them: the head on masked positions only.
        tokens = sum(lengths)
        flops = model_flops(config, lengths, round(MASKED * tokens)) / tokens
        for name, speed in speeds.items():
            # The FLOPs are those of this shape, which ModernBERT does not have.
            known = peak and not name.startswith("ModernBERT")
            rows.append(
                {
                    "lengths": f"{kind}: {len(lengths)} x {tokens / len(lengths):,.0f}",
                    "by": name,
                    "tokens/s": f"{speed:,.1f}",
                    "ratio": f"{speed / reference:.2f}",
                    "peak memory (GB)": f"{memory[name]:.1f}" if DEVICE == "cuda" else "-",
                    "MFU": f"{speed * flops / peak:.1%}" if known else "-",
                }
            )
    facts = dict(parameters=count_parameters(config), max_length=max_length)
    report(path, "model", rows, **facts, repetitions=repetitions)
