"""TODO."""

import hashlib
import json
import re
from typing import NamedTuple

from corpus.languages import NAMES, language_of

LARGEST = 10_000_000  # bytes of a document; The Stack has none above 1 MB


TOO_LARGE = f"over {LARGEST // 1_000_000} MB"


class Document(NamedTuple):
    """One document of a source."""

    language: (
        str  # of the table below, or what a record says, or jupyter, github-issues, git-commits
    )
    content: bytes | list  # of a file; or a record: [(special token, text), ...]


class Damaged(ValueError):
    """A source that ends in the middle, or is not what its name says."""


RECORDS = ("git-commits", "github-issues", "jupyter")  # what else a document may be


def file_document(name, content, skipped):
    """The `Document` of a file, or None, counted."""
    if name.lower().endswith(".ipynb"):
        try:
            return Document("jupyter", notebook_record(json.loads(content)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            skipped["not a notebook"] += 1
    elif (language := language_of(name, content)) is None:
        skipped["no known extension"] += 1
    else:
        return Document(language, content)
    return None


OUTPUT_CHARACTERS = 1000  # of a cell's output are kept


def _text(value):
    """A notebook's text, which is a string or a list of lines; old notebooks have lines without their ends."""
    if isinstance(value, str):
        return value
    return ("" if value and value[0].endswith("\n") else "\n").join(value)


def notebook_record(notebook):
    """The record of a Jupyter notebook, format 3 or 4, given as what json.loads returns; [] for one without text.

    Raw cells are left out. Raises TypeError or KeyError for what is no notebook.
    """
    cells = (
        notebook["cells"]
        if "cells" in notebook
        else [cell for sheet in notebook["worksheets"] for cell in sheet["cells"]]
    )
    record = [("<jupyter_start>", "")]
    for cell in cells:
        text = _text(cell["source"] if "source" in cell else cell.get("input", ""))
        if cell["cell_type"] in ("markdown", "heading"):
            record.append(("<jupyter_text>", text))
        elif cell["cell_type"] == "code":
            record.append(("<jupyter_code>", text))
            output = "".join(_output_text(output) for output in cell.get("outputs", []))[
                :OUTPUT_CHARACTERS
            ]
            record.append(
                ("<jupyter_output>", output) if output.strip() else ("<empty_output>", "")
            )
    return record if any(text.strip() for _, text in record) else []


def _output_text(output):
    if output.get("output_type") in ("error", "pyerr"):
        return f"{output.get('ename', '')}: {output.get('evalue', '')}\n"
    return _text(output.get("text") or output.get("data", {}).get("text/plain") or "")


CHANGED_SPAN, WHOLE_FILE = (
    32,
    0.2,
)  # lines of context at most; share of the commits that keep the whole file


LONGEST_FILE = 100_000  # characters


AUTOMATIC = re.compile(
    r"^(merge\b|revert \"|bump\b|update (readme|changelog)(\.\w+)?$|initial commit$|version \d|v?\d+(\.\d+)+$)",
    re.IGNORECASE,
)


DATA_LANGUAGES = {"json", "yaml", "html", "xslt"}


def _chance(*texts):
    """Four numbers in [0, 1) that these texts fix."""
    digest = hashlib.sha256("\0".join(texts).encode(errors="replace")).digest()
    return [int.from_bytes(digest[i : i + 8]) / 2**64 for i in (0, 8, 16, 24)]


def commit_record(old, new, subject, language, skipped):
    """The record of one file's change by a commit, or None where a filter of StarCoder's (its table 5) leaves it out, counted.

    What is random there is fixed by the content here: half of the changes of up to two lines, 10 % of those over 200 lines and half of the
    data formats are kept; 20 % of the records hold the whole file, the others the changed lines and up to 32 around them.
    """
    before, after = old.splitlines(keepends=True), new.splitlines(keepends=True)
    keep, keep_data, whole, context = _chance(old, new, subject)
    least = min(len(before), len(after))
    first = next(
        (i for i in range(least) if before[i] != after[i]), least
    )  # equal lines at the beginning, and at the end
    last = next((i for i in range(least - first) if before[-1 - i] != after[-1 - i]), least - first)
    changed = max(len(before), len(after)) - first - last
    reason = None
    if max(len(old), len(new)) > LONGEST_FILE:
        reason = "commit: file over 100,000 characters"
    elif not subject.strip():
        reason = "commit: no subject"
    elif AUTOMATIC.search(subject.strip()):
        reason = "commit: automatic"
    elif len(subject) / len(subject.split()) > 20:
        reason = "commit: a subject without words"
    elif not changed:
        reason = "commit: no change"
    elif changed <= 2 and keep < 0.5:
        reason = "commit: half of the changes of up to 2 lines"
    elif changed >= 200 and keep < 0.9:
        reason = "commit: 90 % of the changes of 200 lines or more"
    elif language in DATA_LANGUAGES and keep_data < 0.5:
        reason = "commit: half of the data formats"
    if reason:
        skipped[reason] += 1
        return None
    if whole >= WHOLE_FILE:
        around = int(context * (CHANGED_SPAN + 1))
        begin, end = max(0, first - around), max(0, last - around)
        old, new = (
            "".join(before[begin : len(before) - end]),
            "".join(after[begin : len(after) - end]),
        )
    return [("<commit_before>", old), ("<commit_msg>", subject), ("<commit_after>", new)]


LONGEST_COMMENT, SHORTEST_ISSUE = 80, 200  # lines; characters


BOT = re.compile(
    r"\[bot\]$|(^|[-_])(bot|ci)$|^(codecov|dependabot|renovate|greenkeeper|coveralls|stale|k8s-ci-robot|googlebot)\b",
    re.IGNORECASE,
)


# What mail clients and GitHub put around an answer: what is forwarded below it, who is quoted below it, and from where it was sent.
FORWARDED = re.compile(
    r"Reply to this email directly|-+ ?Original Message ?-+$|From: .*\n(Sent|Date|To|Cc|Subject): ",
    re.MULTILINE,
)


QUOTED = re.compile(r"On (?=.*[\d@]).{0,300} (wrote|writes):")


SENT_FROM = re.compile(r"Sent from my .{1,50}")


# A name that may be a user's, or StarCoder's for one: in ASCII, whatever stands around it.
MENTION = re.compile(
    r"(?<![A-Za-z0-9-])(@?)(username_\d+|[A-Za-z0-9][A-Za-z0-9-]{0,38})(?![A-Za-z0-9-])"
)


def said_text(text):
    """A comment of at most LONGEST_COMMENT lines, without what an answer by mail carries at its end."""
    lines = (text or "").replace("\r\n", "\n").strip().split("\n")
    end = next(
        (i for i in range(len(lines)) if FORWARDED.match("\n".join(lines[i : i + 2]))), len(lines)
    )
    quoted = end
    while quoted and not lines[quoted - 1].split(">")[0].strip():
        quoted -= 1
    for n in (1, 2):  # it may be broken in two
        if quoted >= n and QUOTED.fullmatch(" ".join(lines[quoted - n : quoted]).strip()):
            end = quoted - n
            break
    lines = "\n".join(lines[:end]).strip().split("\n")
    return "\n".join(
        lines[: -1 if SENT_FROM.fullmatch(lines[-1].strip()) else None][:LONGEST_COMMENT]
    ).strip()


def issue_record(title, comments, closed, skipped):
    """The record of a GitHub issue, or None where a filter leaves it out, counted.

    comments: [(names of its author, is a bot, text), ...], the issue's own text first; without a text, somebody who only took part. Authors
    become username_0, username_1, ... in the order in which they appear, wherever they are mentioned; others that are mentioned become
    @username. Comments of bots go; the issue with them, where a bot opened it.
    """
    if not comments or comments[0][1]:
        skipped["issue: opened by a bot"] += 1
        return None
    people = [(authors, said_text(text)) for authors, bot, text in comments if not bot]
    said = [(authors, text) for i, (authors, text) in enumerate(people) if text or i == 0]
    names = {}
    for authors, _ in said + people:
        name = next(
            (names[a.lower()] for a in authors if a.lower() in names),
            f"username_{len(set(names.values()))}",
        )
        names |= {a.lower(): name for a in authors}

    def anonymous(text):
        def renamed(found):
            at, name = found.groups()
            if name.lower() in names:
                return at + names[name.lower()]
            around = (
                text[max(0, found.start() - 1) : found.start()],
                text[found.end() : found.end() + 1],
            )
            return (
                "@username"
                if at and not re.match(r"[\w.@/]", around[0]) and around[1] != "/"
                else found[0]
            )  # no address, no package

        return MENTION.sub(renamed, text)

    first, *others = [f"{names[authors[0].lower()]}: {anonymous(text)}" for authors, text in said]
    record = [("<issue_start>", f"Title: {anonymous(title.strip())}\n{first}")]
    record += [("<issue_comment>", text) for text in others] + [("<issue_closed>", "")] * closed
    if sum(len(text) for _, text in record) < SHORTEST_ISSUE:
        skipped["issue: under 200 characters"] += 1
        return None
    return record


def _issue_of(record):
    """(title, comments, closed) of an issue in The Stack's shape or the API's, for `issue_record`."""
    comments, silent = [], []
    if "events" in record:
        events = [event for event in record["events"] if isinstance(event, dict)]
        title = record.get("title") or next(
            (event["title"] for event in events if event.get("title")), ""
        )
        closed = False
        for event in events:
            authors = tuple(
                name for name in (event.get("author"), event.get("masked_author")) if name
            ) or ("",)
            if event.get("action") in ("closed", "reopened"):
                closed = event["action"] == "closed"
            says = event.get("text") or event.get("action") == "opened"
            (comments if says else silent).append(
                (authors, any(map(BOT.search, authors)), event.get("text"))
            )
        return title, comments + silent, closed
    for said in [record, *(record["comments"] if isinstance(record.get("comments"), list) else [])]:
        user = said.get("user") or {}
        login = user.get("login") or ""
        comments.append(
            ((login,), user.get("type") == "Bot" or bool(BOT.search(login)), said["body"])
        )
    for user in filter(None, [record.get("closed_by"), *(record.get("assignees") or [])]):
        silent.append(
            ((user["login"],), user.get("type") == "Bot" or bool(BOT.search(user["login"])), None)
        )
    return record["title"], comments + silent, record.get("state") == "closed"


def documents_of(record, skipped):
    """The documents of one record of a table or of JSON lines. Raises KeyError, TypeError or AttributeError for one of unknown shape."""
    path = str(
        record.get("path")
        or record.get("max_stars_repo_path")
        or record.get("new_file")
        or "." + str(record.get("ext"))
    )
    name = record.get("lang") or record.get("language")
    if "content" in record and not isinstance(record.get("events"), list):
        content = (
            record["content"]
            if isinstance(record["content"], bytes)
            else record["content"].encode()
        )
        language = str(name or language_of(path, content) or "other").lower().replace(" ", "-")
        if path.endswith(".ipynb") or NAMES.get(language) == "jupyter":
            found = file_document("a.ipynb", content, skipped)
            return [found] if found else []
        return [Document(NAMES.get(language, language).encode(errors="replace").decode(), content)]
    if "old_contents" in record:
        old, new, subject = (
            record["old_contents"],
            record["new_contents"],
            record.get("subject") or record.get("message") or "",
        )
        language = (
            NAMES.get(str(name).lower(), str(name).lower())
            if name
            else language_of(path, new.encode(errors="replace"))
        )
        found = commit_record(old, new, subject.split("\n")[0], language, skipped)
        return [Document("git-commits", found)] if found else []
    if "cells" in record or "worksheets" in record:
        return [Document("jupyter", notebook_record(record))]
    found = issue_record(*_issue_of(record), skipped)
    return [Document("github-issues", found)] if found else []
