"""What is in a corpus, for people to read."""

from corpus.store import reasons

COLUMNS = ("documents", "bytes", "tokens")  # what meta.json counts of each language


def summary(meta):
    """A line for each language, then the splits, and what was left out and why.

    meta: what `prepare` and `read_meta` return.
    """
    languages = meta["languages"]
    total = {name: sum(counts[name] for counts in languages.values()) for name in COLUMNS}
    lines = [f"{'language':24}{'documents':>12}{'MB':>10}{'tokens':>16}{'bytes/token':>13}"]
    # The languages come as in meta.json, the largest first; the total is the last line.
    for name, counts in [*languages.items(), (f"all {len(languages)}", total)]:
        documents, size, tokens = (counts[column] for column in COLUMNS)
        # Every language that is listed has tokens: see `read_meta`.
        numbers = f"{documents:12,}{size / 1e6:10.2f}{tokens:16,}{size / tokens:13.2f}"
        lines.append(f"{name:24}{numbers}")

    # Then one line for each of: how much is held out, and what was left out.
    splits = []
    for split, counts in meta["splits"].items():
        splits.append(f"{split} {counts['documents']:,} documents, {counts['tokens']:,} tokens")
    lines.append(f"{', '.join(splits)}; vocabulary {meta['vocab_size']:,}")
    lines.append(f"skipped: {reasons(meta['skipped'])}")  # the most frequent reason first
    return "\n".join(lines)
