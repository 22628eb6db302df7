"""TODO."""

import os

import numpy as np
from tqdm import tqdm

from corpus.store import part_file, read_meta, reasons


def summary(meta):
    """What a corpus holds, for people: documents, tokens, bytes per token, what was skipped and why, and a line for each language."""
    total = {
        key: sum(c[key] for c in meta["languages"].values())
        for key in ("documents", "bytes", "tokens")
    }
    lines = [f"{'language':24}{'documents':>12}{'MB':>10}{'tokens':>16}{'bytes/token':>13}"]
    for name, c in [*meta["languages"].items(), (f"all {len(meta['languages'])}", total)]:
        lines.append(
            f"{name:24}{c['documents']:12,}{c['bytes'] / 1e6:10.2f}{c['tokens']:16,}{c['bytes'] / c['tokens']:13.2f}"
        )
    splits = ", ".join(
        f"{split} {s['documents']:,} documents, {s['tokens']:,} tokens"
        for split, s in meta["splits"].items()
    )
    return "\n".join(
        [
            *lines,
            f"{splits}; vocabulary {meta['vocab_size']:,}",
            f"skipped: {reasons(meta['skipped'])}",
        ]
    )


def report(directory):
    """Draws DIRECTORY/report.png: tokens of each language, and how long documents are. Returns its path."""
    from matplotlib.figure import Figure  # not pyplot, whose state is the caller's

    meta = read_meta(directory)
    names, tokens = zip(*[(name, counts["tokens"]) for name, counts in meta["languages"].items()])
    figure = Figure(figsize=(12, max(4.0, 0.17 * len(names))))
    left, right = figure.subplots(1, 2, width_ratios=[1.4, 1])
    left.barh(range(len(names)), tokens, color="0.4")
    left.set(yticks=range(len(names)), xscale="log", xlabel="tokens", ylim=(len(names) - 0.5, -0.5))
    left.set_yticklabels(names, fontsize=7)
    bins, counts = np.logspace(0, 7, 71), np.zeros(70)
    for number, part in enumerate(tqdm(meta["parts"], desc="reading", unit="part")):
        for split in part:
            offsets = np.load(part_file(directory, number, f"{split}.index.npy"), mmap_mode="r")[
                "offset"
            ]
            counts += np.histogram(np.diff(offsets), bins)[0]
    right.stairs(counts, bins, fill=True, color="0.4")
    right.set(xscale="log", xlabel="tokens in a document", ylabel="documents")
    for length in (128, 512, 1024):
        right.axvline(length, color="0.7", linestyle=":")
    figure.suptitle(
        f"{sum(tokens):,} tokens, {int(counts.sum()):,} documents, {len(names)} languages"
    )
    figure.tight_layout()
    path = os.path.join(directory, "report.png")
    figure.savefig(path, dpi=110)
    return path
