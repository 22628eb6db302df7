"""What a pretraining run says: at its start, in its progress bar, and at its end."""

import os

import torch

import kernels
from starencoder import fill_mask


def announce(config, ranks, model, steps_per_epoch, dtype, peak):
    """Prints what is about to be computed, and on what. peak: FLOP/s or None."""
    parameters = sum(p.numel() for p in model.parameters())
    device = f"CPU with {torch.get_num_threads()} threads"
    if ranks.device.type == "cuda":
        device = torch.cuda.get_device_name(ranks.device)
    peak = f"{peak:.3g} FLOP/s" if peak else "unknown"
    backend = kernels.backend(model.mlm_bias)
    ranks.say(
        f"{parameters / 1e6:.2f} M parameters; {config.steps:,} steps of {config.batch_size:,} "
        f"pairs of up to {config.max_length:,} tokens\n"
        f"({steps_per_epoch:,.1f} steps an epoch), in micro-batches of up to "
        f"{config.micro_batch_size} pairs on each of {ranks.world_size} rank(s)\n"
        f"{device}, {dtype}, peak {peak}; kernels: {backend}"
    )


def progress(line):
    """A line of the metrics for the progress bar."""
    loss = f"{line['loss']:.3f}" if "loss" in line else "not finite"
    mfu = f"{line['mfu']:.1%}" if "mfu" in line else "unknown"
    return f"loss {loss}, {line['tokens_per_second']:,.0f} tokens/s, MFU {mfu}"


def describe(scores):
    """One line of held-out scores beside their baselines."""
    return (
        f"MLM loss {scores['mlm_loss']:.3f}, MLM accuracy {scores['mlm_accuracy']:.1%} "
        f"(most frequent token: {scores['majority_accuracy']:.1%}), "
        f"NSP accuracy {scores['nsp_accuracy']:.1%} (coin flip: {scores['coin_flip']:.0%})"
    )


def last_words(config, model, tokenizer, held_out, scores):
    """Prints the held-out scores, some filled masks, and what to try next."""
    model.eval()
    pairs = min(config.eval_examples, len(held_out))
    print(f"\nHeld out, {pairs:,} pairs: {describe(scores)}")
    by_language = []
    for name, value in scores.items():
        if name.startswith("mlm_accuracy/"):
            by_language.append(f"{name.removeprefix('mlm_accuracy/')} {value:.0%}")
    if by_language:
        print(f"MLM accuracy by language: {', '.join(by_language)}")
    print("Masks filled in held-out code:")
    show_filled_masks(model, tokenizer, held_out)
    curves = os.path.join(config.out, "curves.png")
    print(f"The model is in {config.out} (a Hugging Face directory), its curves in {curves}.")
    print(f'Try: python starencoder.py fill-mask {config.out} "def __init__(<mask>, name):"')


def show_filled_masks(model, tokenizer, dataset, count=3):
    """Prints `count` lines of held-out code with a masked word, and what the model would write."""
    shown = 0
    for i in range(len(dataset)):
        # Mask a word in the middle of the first of two windows.
        ids = dataset.pair(i).a.tolist()
        pieces = [tokenizer.decode([token]) for token in ids]
        words = []
        for place in range(len(ids) // 4, len(ids)):
            if len(pieces[place]) > 3 and pieces[place].strip().isalpha():
                words.append(place)
        if not words:
            continue
        place = words[len(words) // 2]
        before = tokenizer.decode(ids[:place])
        after = tokenizer.decode(ids[place + 1 :])
        if "<mask>" in before + after:
            continue

        guesses = fill_mask(model, tokenizer, f"{before}<mask>{after}", top_k=3)[0]
        line = before.split("\n")[-1][-60:] + "<mask>" + after.split("\n")[0][:40]
        answers = ", ".join(f"{guess['token_str']!r} {guess['score']:.0%}" for guess in guesses)
        print(f"  {line.strip()}\n      was {pieces[place]!r}; the model: {answers}")
        shown += 1
        if shown == count:
            return
