"""Takes the verdicts on findings that nobody has judged yet: `python -m bench.pii_judge`.

`python -m bench pii` writes them to runs/pii-unjudged.jsonl. Each is shown with some lines around
it, and the verdict is one letter:

    n name   u username   e e-mail   k key   p password   i IP address   x nothing   a ambiguous

Enter alone leaves it for later, and q ends. The verdicts go to bench/pii_labels.jsonl.
"""

import json

from bench.pii_real import (
    CATEGORIES,
    FOLDER,
    LABELS,
    UNJUDGED,
    Span,
    read_labels,
    text_of,
    touching,
    write_labels,
)
from common.command_line import run_command

LETTERS = {category[0].lower(): category for category in CATEGORIES}
LETTERS |= {"x": "NONE", "a": "AMBIGUOUS"}
AROUND = 2  # lines that are shown before and behind


def context(text, start, end):
    """The lines around text[start:end], with marks around it."""
    before = text[:start].split("\n")[-1 - AROUND :]
    behind = text[end:].split("\n")[: 1 + AROUND]
    return "\n".join(before) + "[[" + text[start:end] + "]]" + "\n".join(behind)


def ask(finding, text):
    """The verdict of a person on a finding, None to leave it, or "q"."""
    print(f"\n---- {finding['file']}: {finding['category']}? ({finding['by']})")
    print(context(text, finding["start"], finding["end"]))
    while True:
        answer = input(f"{' '.join(LETTERS)}, Enter or q: ").strip().lower()
        if answer in LETTERS:
            return LETTERS[answer]
        if answer in ("", "q"):
            return answer or None


def main(argv=None):
    """Asks for a verdict on each finding, and writes them after each."""
    files = {file.name: file for file in read_labels(LABELS)}
    with open(UNJUDGED, encoding="utf-8") as f:
        findings = [json.loads(line) for line in f]
    for finding in findings:
        file = files[finding["file"]]
        start = finding["start"]
        end = finding["end"]
        if touching(file.judged, start, end):  # by a verdict on another finding
            continue
        verdict = ask(finding, text_of(FOLDER / "files" / file.name))
        if verdict == "q":
            return
        if verdict:
            file.judged.append(Span(start, end, verdict))
            write_labels(files.values(), LABELS)


if __name__ == "__main__":
    run_command(main)
