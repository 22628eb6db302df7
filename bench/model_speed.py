"""How fast a training step is beside the models of transformers, and where its time goes.

A step is forward, backward, clipping and AdamW in bf16 autocast, with dropout. All models see the
same sequences: packed for this project, padded to the longest one for transformers. Speeds are of
real tokens; padding does not count. MFU is the share of the GPU's peak that the FLOPs of
`training.plan.model_flops` make up, for BERT as for StarEncoder.
"""

import gc
import itertools
import random
import re
from collections.abc import Callable
from dataclasses import asdict
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers

from bench.kernel_speed import measure_ceilings
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

    # No token is shorter than one character, so that 10,000 tokens are enough.
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
    ids = torch.randint(config.vocab_size - 20, (T,), generator=generator)
    masked = torch.randperm(T, generator=generator)[: round(MASKED * T)].sort().values  # (M,)
    neighbours = torch.randint(2, (len(lengths),), generator=generator)
    packed = {
        "input_ids": ids,
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        "labels": ids[masked],
        "next_sentence_label": neighbours,
        "masked_positions": masked,
        "seed": torch.tensor(5),
    }

    def pad(tokens, value):
        """(T,) -> (B, L)."""
        parts = tokens.split(lengths)
        return torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=value)

    padded = {
        "input_ids": pad(ids, 0),
        "attention_mask": pad(torch.ones_like(ids), 0),
        "labels": pad(torch.full((T,), -100).index_copy(0, masked, ids[masked]), -100),
        "next_sentence_label": neighbours,
    }
    return Batch(*({name: t.to(DEVICE) for name, t in kind.items()} for kind in (packed, padded)))


# How each model is made, and how it is asked for its loss on a batch.


def own_loss(model, batch):
    return model(**batch.packed, max_seqlen=model.config.max_position_embeddings).loss


def loss_of_all_tokens(model, batch):
    """The same loss as most implementations compute it: logits of every token, in fp32."""
    inputs = {name: batch.packed[name] for name in ("input_ids", "cu_seqlens", "seed")}
    out = model(**inputs, max_seqlen=model.config.max_position_embeddings)
    labels = batch.padded["labels"][batch.padded["attention_mask"].bool()]  # (T,)
    mlm_loss = F.cross_entropy(out.mlm_logits.float(), labels)
    return mlm_loss + F.cross_entropy(out.nsp_logits.float(), batch.packed["next_sentence_label"])


def make_bert(config):
    bert = transformers.BertConfig(**asdict(config), attn_implementation="sdpa")
    return transformers.BertForPreTraining(bert)


def bert_loss(model, batch):
    return model(**batch.padded).loss


def make_modern_bert(config):
    """ModernBERT-base; for a config that is smaller than StarEncoder's, one of its shape."""
    shape = {}
    if config.hidden_size != StarEncoderConfig.hidden_size:
        sizes = "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"
        shape = {name: getattr(config, name) for name in sizes}
    # Its own special tokens lie beyond this vocabulary.
    specials = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    shape |= {"vocab_size": config.vocab_size, **specials}
    modern = transformers.ModernBertConfig(**shape, attn_implementation="sdpa")
    return transformers.ModernBertForMaskedLM(modern)


def modern_bert_loss(model, batch):
    inputs = {name: t for name, t in batch.padded.items() if name != "next_sentence_label"}
    return model(**inputs).loss


class Contender(NamedTuple):
    make: Callable  # config -> model
    loss: Callable  # model, batch -> loss
    compiled: bool = False

    def training_step(self, config, batch):
        """A function that takes a step of a new model and returns its number of tokens."""
        tokens = len(batch.packed["input_ids"])
        model = self.make(config).to(DEVICE).train()
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

    compiled: whether those that are compiled take part. Whoever finds too little memory does not.
    """
    steps = {}
    memory = {}
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
            for _ in range(2):
                step()
        except torch.OutOfMemoryError:
            print(f"{name}: left out, the memory of this GPU is too small")
            step = None
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
    peak = peak_flops(torch.device(DEVICE))

    rows = []
    for kind, lengths in batches.items():
        # torch.compile takes minutes on a CPU, and again for every batch of other lengths.
        compiled = DEVICE == "cuda" and kind == "full"
        steps, memory = training_steps(config, random_batch(lengths, config), compiled)
        speeds = medians(steps, repetitions)
        reference, *_ = speeds.values()  # BERT's

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


# The parts of a step by the names of the operators that belong to them; the first that fits counts.
# An operator on a tensor with an axis of the size of the vocabulary belongs to the head as well.
HEAD = "head and embeddings"
PARTS = {
    "optimizer": "_fused_adamw|_foreach_|vector_norm",
    HEAD: "cross_?entropy",
    "attention": "attention|bmm|softmax|scaled_dot_product",
    "LayerNorm and dropout": "layer_?norm|dropout",
    "matmul": r"::(mm|addmm|matmul|linear)$",
    "GELU, casts and the rest": "",
}


def part_of(event, vocab_size):
    """The part of a step that an operator belongs to."""
    shapes = [shape for shape in event.input_shapes or [] if isinstance(shape, list)]
    sizes = {size for shape in shapes for size in shape if isinstance(size, int)}
    padded = vocab_size + -vocab_size % 64  # the head pads its matrix on a GPU
    of_vocabulary = not sizes.isdisjoint((vocab_size, padded))
    for part, words in PARTS.items():
        if re.search(words, event.key, re.IGNORECASE) or (part == HEAD and of_vocabulary):
            return part


def time_by_part(step, vocab_size, repetitions):
    """{part: seconds of a step} by PyTorch's profiler."""
    with torch.profiler.profile(record_shapes=True) as profile:
        for _ in range(repetitions):
            step()
    seconds = dict.fromkeys(PARTS, 0.0)
    for event in profile.key_averages(group_by_input_shape=True):
        # An operator runs on the CPU and brings with it the time of the kernels that it launched.
        if event.device_type == torch.autograd.DeviceType.CPU:
            on_gpu = event.self_device_time_total
            microseconds = on_gpu if DEVICE == "cuda" else event.self_cpu_time_total
            seconds[part_of(event, vocab_size)] += microseconds / 1e6 / repetitions
    return seconds


def least_times(config, sequences, ceilings):
    """{part: seconds} that a step on full sequences must take at the rates of `ceilings`.

    FLOPs go by the rate of a large matmul, bytes that must move by the rate of a large copy.
    """
    L = config.max_position_embeddings
    H = config.hidden_size
    layers = config.num_hidden_layers
    T = sequences * L
    masked = round(MASKED * T)
    flops = model_flops(config, [L] * sequences, masked)
    attention = 12 * layers * H * T * L
    head = 6 * (H * config.vocab_size + H * H) * masked
    matmul = flops - attention - head

    # bf16 numbers a token: LayerNorm moves three rows forward and five backward, twice a layer;
    # GELU two forward and three backward. AdamW reads gradient, weight and moments in fp32 and
    # writes the last three.
    norm_bytes = 2 * layers * (3 + 5) * 2 * T * H
    gelu_bytes = layers * (2 + 3) * 2 * T * config.intermediate_size
    adamw_bytes = 4 * (4 + 3) * count_parameters(config)
    return {
        "matmul": matmul / ceilings["matmul"],
        "attention": attention / ceilings["matmul"],
        HEAD: head / ceilings["matmul"],
        "LayerNorm and dropout": norm_bytes / ceilings["copy"],
        "optimizer": adamw_bytes / ceilings["copy"],
        "GELU, casts and the rest": gelu_bytes / ceilings["copy"],
    }


def bench_profile(path=None, config=None, sequences=None, ceilings=None, repetitions=5):
    """Where the time of a training step goes on full sequences, beside the least it could take.

    ceilings: rates as by `measure_ceilings`, which is called if they are not given. Gaps are the
    time in which a GPU waits. Without Triton "the rest" makes the dropout masks, too.
    """
    config = config or StarEncoderConfig()
    sequences = sequences or (64 if DEVICE == "cuda" else 2)
    ceilings = ceilings or measure_ceilings(DEVICE)
    L = config.max_position_embeddings
    T = sequences * L
    batch = random_batch([L] * sequences, config)
    step = CONTENDERS["StarEncoder"].training_step(config, batch)
    for _ in range(2):
        step()
    whole = T / medians({"step": step}, repetitions)["step"]  # seconds, without the profiler

    # Under the profiler a step may take longer than by itself, so that gaps cannot be negative and
    # shares are of the sum of the parts.
    spent = time_by_part(step, config.vocab_size, repetitions)
    spent = dict(sorted(spent.items(), key=lambda item: -item[1]))
    spent["gaps"] = max(0.0, whole - sum(spent.values()))
    total = sum(spent.values())
    least = least_times(config, sequences, ceilings) | {"gaps": 0.0}
    spent["step, by itself"] = whole
    least["step, by itself"] = sum(least.values())

    rows = [
        {
            "part": part,
            "ms": f"{1e3 * seconds:,.1f}",
            "least (ms)": f"{1e3 * least[part]:,.1f}",
            "share": f"{seconds / total:.1%}",
        }
        for part, seconds in spent.items()
    ]
    facts = dict(sequences=sequences, max_length=L, ceilings=ceilings)
    report(path, "profile", rows, **facts, tokens_per_second=round(T / whole, 1))
