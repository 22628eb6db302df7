"""TODO."""

import functools
import gc
import itertools
import os
import random
import re
from unittest import mock

import numpy as np
import torch
import torch._functorch.config
import torch.nn.functional as F

import starencoder
from bench.kernel_speed import measure_ceilings
from bench.measure import medians, report
from corpus.build import prepare
from corpus.tokenizer import Tokenizer
from data import PairDataset
from starencoder import StarEncoder, StarEncoderConfig, StarEncoderForPreTraining
from training.plan import count_parameters, model_flops, peak_flops


def original_lengths(directory, max_length, count):
    """`count` sequence lengths as the original's data gives them: the tokens of each file's first 10,000 characters, cut at max_length.

    They are evenly spaced quantiles over (up to 512 of) the files of a corpus, so that even a small batch is a fair sample of them.
    """
    tokenizer, split = (
        Tokenizer.from_pretrained(directory),
        PairDataset(directory, "train", max_length, seed=0),
    )
    chosen = random.Random(0).sample(range(split.documents()), min(512, split.documents()))
    texts = [tokenizer.decode(split.document(d)[:10_000])[:10_000] for d in chosen]
    lengths = sorted(min(max_length, len(tokenizer.encode(text))) for text in texts)
    return [lengths[(2 * i + 1) * len(lengths) // (2 * count)] for i in range(count)]


def training_steps(config, lengths, device, ablate):
    """{name: function that makes a model and returns its training step} on one batch of sequences of these lengths.

    A step is forward, backward, clipping and AdamW in bf16 autocast. Ours takes the batch packed, the others padded to its longest
    sequence with labels everywhere, as the original trained. Compiled ones on a GPU only. ablate: ours with single savings undone instead.
    """
    import transformers

    generator = torch.Generator().manual_seed(0)
    V, T = config.vocab_size, sum(lengths)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    ids, masked = (
        torch.randint(V - 20, (T,), generator=generator),
        torch.randperm(T, generator=generator)[: round(0.15 * T)].sort().values,
    )
    neighbours = torch.randint(2, (len(lengths),), generator=generator)
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    labels = torch.full((T,), -100).index_copy(0, masked, ids[masked])
    padded = {
        "input_ids": pad(ids.split(lengths)),
        "attention_mask": pad([torch.ones(n, dtype=torch.int64) for n in lengths]),
    }
    padded |= {"labels": pad(labels.split(lengths), padding_value=-100)}
    packed = (ids, cu_seqlens, ids[masked], neighbours, masked)
    packed, padded = (
        tuple(t.to(device) for t in packed),
        {name: t.to(device) for name, t in padded.items()},
    )
    pairs, seed = (
        padded | {"next_sentence_label": neighbours.to(device)},
        torch.tensor(5, device=device),
    )

    def step_of(make, call, compiled=False):
        model = make().to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        run_model = torch.compile(model) if compiled else model

        def step():
            with torch.autocast(device, torch.bfloat16):
                loss = call(run_model)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if device == "cuda":
                torch.cuda.synchronize()
            return T

        return step

    shape = dict(
        vocab_size=V, hidden_size=config.hidden_size, num_hidden_layers=config.num_hidden_layers
    )
    shape |= dict(
        num_attention_heads=config.num_attention_heads, intermediate_size=config.intermediate_size
    )
    bert = transformers.BertConfig(
        **shape, max_position_embeddings=config.max_position_embeddings, attn_implementation="sdpa"
    )
    specials = {f"{name}_token_id": 0 for name in ("pad", "bos", "eos", "cls", "sep")}
    modern = transformers.ModernBertConfig(vocab_size=V, attn_implementation="sdpa", **specials)
    if config.hidden_size != StarEncoderConfig.hidden_size:
        modern = transformers.ModernBertConfig(**shape, attn_implementation="sdpa", **specials)
    here = (
        lambda: StarEncoderForPreTraining(config),
        lambda model: model(*packed, max_seqlen=config.max_position_embeddings, seed=seed).loss,
    )
    there = (lambda: transformers.BertForPreTraining(bert), lambda model: model(**pairs).loss)
    makers = {
        "transformers BertForPreTraining, sdpa": lambda: step_of(*there),
        "StarEncoder": lambda: step_of(*here),
        "ModernBERT-base, sdpa": lambda: step_of(
            lambda: transformers.ModernBertForMaskedLM(modern), lambda model: model(**padded).loss
        ),
    }
    if ablate:  # the step with one of its savings undone
        encode = StarEncoder.forward

        def every_row(self, *inputs, rows=None, **options):
            h = encode(self, *inputs, **options)
            return h if rows is None else h[rows]

        def without(target, name, stand_in):
            def call(model):
                with mock.patch.object(target, name, stand_in):
                    return here[1](model)

            return lambda: step_of(here[0], call)

        everywhere = labels.to(device)

        def head_everywhere(model):
            out = model(*packed[:2], max_seqlen=config.max_position_embeddings, seed=seed)
            return F.cross_entropy(out.mlm_logits.float(), everywhere) + F.cross_entropy(
                out.nsp_logits.float(), packed[3]
            )

        in_fp32 = lambda logits, labels: F.cross_entropy(logits.float(), labels)
        return {
            "StarEncoder": makers["StarEncoder"],
            "last layer for every token": without(StarEncoder, "forward", every_row),
            "cross-entropy by PyTorch, in fp32": without(starencoder, "_cross_entropy", in_fp32),
            "both, and the head for every token": lambda: step_of(here[0], head_everywhere),
        }
    if device == "cuda":
        makers["transformers BertForPreTraining, sdpa, compiled"] = lambda: step_of(
            *there, compiled=True
        )
        makers["StarEncoder, --compile"] = lambda: step_of(*here, compiled=True)
    return makers


def bench_model(
    path=None, config=None, sizes=None, directory="corpora/bench", repetitions=5, ablate=False
):
    """A training step of the full model beside the models of transformers, on full sequences and on lengths as the original's."""
    device, config = "cuda" if torch.cuda.is_available() else "cpu", config or StarEncoderConfig()
    full, real = sizes or ((64, 64) if device == "cuda" else (2, 4))  # sequences of the two batches
    if not os.path.exists(os.path.join(directory, "meta.json")):
        prepare(None, directory, vocab_size=config.vocab_size)
    L, peak, rows = config.max_position_embeddings, peak_flops(torch.device(device)), []
    for what, lengths in (
        ("full", [L] * full),
        ("as the original's", original_lengths(directory, L, real)),
    ):
        steps, memory, step = {}, {}, None
        for name, make in training_steps(config, lengths, device, ablate).items():
            if "compile" in name and what != "full":  # each shape compiles anew
                continue
            step = None  # one that ran out of memory must not lie in the way of the next
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_allocated() if device == "cuda" else 0
            torch.cuda.reset_peak_memory_stats() if device == "cuda" else None
            try:
                step = make()
                step(), step()
            except torch.OutOfMemoryError as error:
                print(f"{name}: not available here ({str(error).splitlines()[0][:100]})")
                continue
            steps[name] = step
            if device == "cuda":
                memory[name] = f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.1f}"
        speeds, reference = medians(steps, repetitions), next(iter(steps))
        flops = model_flops(config, lengths, round(0.15 * sum(lengths))) / sum(lengths)
        for name, speed in speeds.items():
            row = {
                "lengths": f"{what}: {len(lengths)} x {np.mean(lengths):,.0f}",
                "by": name,
                "tokens/s": f"{speed:,.1f}",
            }
            row |= {
                "ratio": f"{speed / speeds[reference]:.2f}",
                "peak memory (GB)": memory.get(name, "-"),
            }
            rows.append(
                row
                | {
                    "MFU": f"{speed * flops / peak:.1%}"
                    if peak and "ModernBERT" not in name
                    else "-"
                }
            )
    report(
        path,
        "ablation" if ablate else "model",
        rows,
        parameters=count_parameters(config),
        max_length=L,
        repetitions=repetitions,
    )


# Parts of a step, by the names of PyTorch's operators; the first that fits. What has an axis of the size of the vocabulary is "head".
PARTS = {
    "optimizer": "_fused_adamw|_foreach_|vector_norm",
    "head and embeddings": "CrossEntropy",
    "attention": "starencoder(::|_)attention|bmm|softmax|scaled_dot_product",
    "LayerNorm and dropout": "starencoder(::|_)(layer_norm|dropout)|native_(layer_norm|dropout)",
    "matmul": r"::(mm|addmm|matmul|linear)$",
    "GELU, casts and the rest": "",
}


def bench_profile(path=None, config=None, sequences=None, repetitions=5):
    """Where the time of a training step goes, on full sequences: each part's share, beside the least time that it could take here.

    The least: FLOPs by the matmul rate, or bytes that must move by the copy rate, both measured in this run. Gaps: the step's time less
    that of all operators, which on a GPU is time in which it waits. Without Triton the rest has the making of dropout masks in it.
    """
    device, config = "cuda" if torch.cuda.is_available() else "cpu", config or StarEncoderConfig()
    B, L, V, H, layers = (
        sequences or (64 if device == "cuda" else 2),
        *(
            getattr(config, name)
            for name in (
                "max_position_embeddings",
                "vocab_size",
                "hidden_size",
                "num_hidden_layers",
            )
        ),
    )
    I, T, masked, ceilings = (
        config.intermediate_size,
        B * L,
        round(0.15 * B * L),
        measure_ceilings(device),
    )  # noqa: E741
    step = training_steps(config, [L] * B, device, False)["StarEncoder"]()
    step(), step()
    seconds = T / medians({"step": step}, repetitions)["step"]
    with torch.profiler.profile(record_shapes=True) as profile:
        for _ in range(repetitions):
            step()
    spent = dict.fromkeys(PARTS, 0.0)
    for event in profile.key_averages(group_by_input_shape=True):
        sizes = {
            size
            for shape in event.input_shapes or []
            if isinstance(shape, list)
            for size in shape
            if isinstance(size, int)
        }
        of_vocabulary = not sizes.isdisjoint((V, V + -V % 64))  # on a GPU the vocabulary is padded
        if (
            event.device_type == torch.autograd.DeviceType.CPU
        ):  # an operator, and with it the kernels that it launched
            part = next(
                p
                for p, words in PARTS.items()
                if re.search(words, event.key) or (of_vocabulary and p.startswith("head"))
            )
            spent[part] += (
                (event.self_device_time_total if device == "cuda" else event.self_cpu_time_total)
                / 1e6
                / repetitions
            )
    everything = model_flops(config, [L] * B, masked)
    attention, head = 12 * layers * H * B * L * L, 6 * (H * V + H * H) * masked
    least = {
        "matmul": (everything - attention - head) / ceilings["matmul"],
        "attention": attention / ceilings["matmul"],
        "head and embeddings": head / ceilings["matmul"],
        "LayerNorm and dropout": 2
        * layers
        * 8
        * 2
        * T
        * H
        / ceilings["copy"],  # three in and out, five in and out, in bf16
        "optimizer": 28
        * count_parameters(config)
        / ceilings["copy"],  # weight and moments in and out, gradient in, fp32
        "GELU, casts and the rest": layers
        * 5
        * 2
        * T
        * I
        / ceilings["copy"],  # GELU alone: in and out; two in and one out
    }
    rows = [
        {"part": p, "ms": t, "least (ms)": least[p]}
        for p, t in sorted(spent.items(), key=lambda item: -item[1])
    ]
    rows.append({"part": "gaps", "ms": max(0.0, seconds - sum(spent.values())), "least (ms)": 0.0})
    total = sum(
        row["ms"] for row in rows
    )  # where the profiler slows the step down, more than it takes by itself
    rows.append({"part": "step, by itself", "ms": seconds, "least (ms)": sum(least.values())})
    for row in rows:
        row |= {
            "ms": f"{row['ms'] * 1e3:,.1f}",
            "least (ms)": f"{row['least (ms)'] * 1e3:,.1f}",
            "share": f"{row['ms'] / total:.1%}",
        }
    report(
        path,
        "profile",
        rows,
        sequences=B,
        max_length=L,
        ceilings=ceilings,
        tokens_per_second=round(T / seconds, 1),
    )
