"""What a document is, and the records that StarCoder makes of notebooks, commits and issues.

A file is its bytes. A record is a list of pairs, a special token and the text after it; the layout
of each kind stands at the head of its section. What is left out is counted by its reason, in a
Counter called `skipped`.

Reference: Li et al., StarCoder, 2023, section 3. Left out: its tokens for stars and for the names
of repositories and files.
"""

import hashlib
import json
import re
from collections.abc import Callable
from typing import NamedTuple

from corpus.languages import language_named, language_of, may_be_source

LARGEST = 10_000_000  # bytes of a document; The Stack has none above 1 MB
TOO_LARGE = f"over {LARGEST // 1_000_000} MB"
RECORDS = ("git-commits", "github-issues", "jupyter")  # the languages of records


class Document(NamedTuple):
    """One document of a source."""

    language: str  # of languages.txt, of RECORDS, or what the row of a table says
    content: bytes | list  # a file; or a record: [(special token, text), ...]


class Damaged(ValueError):
    """A source ends in the middle, or is not what its name says."""


# ---- files ---------------------------------------------------------------------------------------


def may_be_document(name, is_file, size, skipped):
    """True if a file is worth reading, by its name and its size."""
    if not is_file:
        skipped["not a file"] += 1
    elif not may_be_source(name):
        skipped["no known extension"] += 1
    elif size > LARGEST:
        skipped[TOO_LARGE] += 1
    else:
        return True
    return False


def file_document(name, content, skipped):
    """The `Document` of a file; None if it is left out."""
    if name.lower().endswith(".ipynb"):
        try:
            return Document("jupyter", notebook_record(json.loads(content)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            skipped["not a notebook"] += 1
            return None
    language = language_of(name, content)
    if language is None:
        skipped["no known extension"] += 1
    return language and Document(language, content)


class Choice(NamedTuple):
    """Which files a reader takes from a directory or an archive, and what it makes of them."""

    may_be: Callable  # by its (name, is_file, size, skipped): is a file worth reading?
    made_of: Callable  # what is yielded of its (name, content, skipped); None to leave it out


SOURCE_FILES = Choice(may_be_document, file_document)


# ---- notebooks -----------------------------------------------------------------------------------
# <jupyter_start> <jupyter_text> text <jupyter_code> code <jupyter_output> output
#                                     <jupyter_code> code <empty_output> ...
# Raw cells are left out.

OUTPUT_CHARACTERS = 1000  # are kept of a cell's output


def notebook_record(notebook):
    """The record of a Jupyter notebook of format 3 or 4, as json.loads returns it.

    It is [] without any text. Raises TypeError, KeyError or AttributeError for what is no notebook.
    """
    if "cells" in notebook:
        cells = notebook["cells"]
    else:
        cells = [cell for sheet in notebook["worksheets"] for cell in sheet["cells"]]  # format 3

    record = [("<jupyter_start>", "")]
    for cell in cells:
        text = joined(cell["source"] if "source" in cell else cell.get("input", ""))  # format 3
        if cell["cell_type"] in ("markdown", "heading"):
            record.append(("<jupyter_text>", text))
        elif cell["cell_type"] == "code":
            # An output may be a table of any length, or nothing but line ends.
            output = "".join(map(output_text, cell.get("outputs", [])))[:OUTPUT_CHARACTERS]
            has_output = bool(output.strip())
            record.append(("<jupyter_code>", text))
            record.append(("<jupyter_output>", output) if has_output else ("<empty_output>", ""))
    return record if any(text.strip() for _, text in record) else []  # no cells, or empty ones


def output_text(output):
    """What a cell printed, its value as plain text, or its error without the traceback."""
    if output.get("output_type") in ("error", "pyerr"):
        return f"{output.get('ename', '')}: {output.get('evalue', '')}\n"
    return joined(output.get("text") or output.get("data", {}).get("text/plain") or "")


def joined(text):
    """A notebook's text, which is a string or a list of lines."""
    if isinstance(text, str):
        return text
    has_ends = text and text[0].endswith("\n")  # not in format 3
    return ("" if has_ends else "\n").join(text)


# ---- commits -------------------------------------------------------------------------------------
# <commit_before> old <commit_msg> subject <commit_after> new
# The filters are those of StarCoder's table 5.

LONGEST_FILE = 100_000  # characters
WHOLE_FILE = 0.2  # the share of records that hold the whole file; the others, the changed lines
CONTEXT_LINES = 32  # at most, around the changed lines
DATA_LANGUAGES = {"json", "yaml", "html", "xslt"}  # seldom written by hand
AUTOMATIC = re.compile(  # subjects that programs write
    r"^(merge\b|revert \"|bump\b|update (readme|changelog)(\.\w+)?$"
    r"|initial commit$|version \d|v?\d+(\.\d+)+$)",
    re.IGNORECASE,
)


def commit_record(old, new, subject, language, skipped):
    """The record of a commit's change of one file; None if it is left out."""
    before = old.splitlines(keepends=True)
    after = new.splitlines(keepends=True)
    # How many lines did not change, at the start and at the end; and how many did.
    start = equal_lines(before, after)
    end = equal_lines(before[start:][::-1], after[start:][::-1])
    changed = max(len(before), len(after)) - start - end

    # Four numbers in [0, 1): the content draws them, so they are the same each time.
    digest = hashlib.sha256("\0".join([old, new, subject]).encode(errors="replace")).digest()
    numbers = [int.from_bytes(digest[i : i + 8]) / 2**64 for i in range(0, 32, 8)]
    keep, keep_data, whole, context = numbers

    # The first filter that applies is the one that is counted.
    word_length = len(subject) / max(1, len(subject.split()))
    filters = {
        "file over 100,000 characters": max(len(old), len(new)) > LONGEST_FILE,
        "no subject": not subject.strip(),
        "automatic": AUTOMATIC.search(subject.strip()),
        "a subject without words": word_length > 20,
        "no change": changed == 0,
        "half of the changes of up to 2 lines": changed <= 2 and keep < 0.5,
        "90 % of the changes of 200 lines or more": changed >= 200 and keep < 0.9,
        "half of the data formats": language in DATA_LANGUAGES and keep_data < 0.5,
    }
    reasons = [reason for reason, applies in filters.items() if applies]
    if reasons:
        skipped[f"commit: {reasons[0]}"] += 1
        return None

    # Most records hold only the changed lines and some around them.
    if whole >= WHOLE_FILE:
        around = int(context * (CONTEXT_LINES + 1))  # 0 to 32
        start = max(0, start - around)
        end = max(0, end - around)
        old = "".join(before[start : len(before) - end])
        new = "".join(after[start : len(after) - end])
    return [("<commit_before>", old), ("<commit_msg>", subject), ("<commit_after>", new)]


def equal_lines(a, b):
    """How many lines two lists share at the beginning."""
    pairs = enumerate(zip(a, b))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


# ---- issues --------------------------------------------------------------------------------------
# <issue_start> Title: title \n username_0: text <issue_comment> username_1: text ... <issue_closed>
# Users are renamed: to username_0, username_1, ... in the order in which they speak, wherever they
# are mentioned; anybody else who is mentioned, to @username. What bots say is left out.

LONGEST_COMMENT = 80  # lines
SHORTEST_ISSUE = 200  # characters
BOT = re.compile(
    r"\[bot\]$|(^|[-_])(bot|ci)$"
    r"|^(codecov|dependabot|renovate|greenkeeper|coveralls|stale|k8s-ci-robot|googlebot)\b",
    re.IGNORECASE,
)
# What mail programs put at the end of an answer: the mail that it answers, as a copy or as a
# quotation below a line that names its author, and the device.
COPIED = re.compile(
    r"^(?:Reply to this email directly|-+ ?Original Message ?-+$"
    r"|From: .*\n(?:Sent|Date|To|Cc|Subject): )",
    re.MULTILINE,
)
QUOTED = re.compile(r"On (?=.*[\d@]).{0,300} (wrote|writes):")
SENT_FROM = re.compile(r"Sent from my .{1,50}")
# A word that may be a user's name, or The Stack's for one: ASCII, whatever stands beside it.
NAME = re.compile(
    r"(?<![A-Za-z0-9-])(@?)(username_\d+|[A-Za-z0-9][A-Za-z0-9-]{0,38})(?![A-Za-z0-9-])"
)


class Comment(NamedTuple):
    """What somebody said in an issue."""

    authors: tuple  # the names of one person: the login, and The Stack's name for it
    is_bot: bool
    text: str | None  # None: took part without a word, as by closing the issue


class Issue(NamedTuple):
    """A GitHub issue, whatever the shape of its record."""

    title: str
    comments: list  # the issue's own text first, those without a word last
    closed: bool  # in the end; it may have been reopened


def stack_issue(record):
    """The `Issue` of a record of The Stack, which is a list of events."""
    events = [event for event in record["events"] if isinstance(event, dict)]
    titles = [event["title"] for event in events if event.get("title")]
    said = []
    silent = []
    closed = False
    for event in events:
        names = [event.get("author"), event.get("masked_author")]
        speaks = event.get("text") or event.get("action") == "opened"  # an issue may have no text
        (said if speaks else silent).append(comment_of(names, event.get("text")))
        if event.get("action") in ("closed", "reopened"):
            closed = event["action"] == "closed"
    return Issue(record.get("title") or (titles or [""])[0], said + silent, closed)


def api_issue(record):
    """The `Issue` of an answer of GitHub's API, with its comments in a list or without them."""
    comments = record["comments"] if isinstance(record.get("comments"), list) else []
    people = [(said.get("user") or {}, said["body"]) for said in [record, *comments]]
    others = [record.get("closed_by"), *(record.get("assignees") or [])]
    people += [(user, None) for user in others if user]  # deleted users are None
    said = [comment_of([user.get("login")], text, user.get("type")) for user, text in people]
    return Issue(record["title"], said, record.get("state") == "closed")


def comment_of(names, text, type_of_user=None):
    """A `Comment`. names: of its author, some of which may be None."""
    names = tuple(name for name in names if name) or ("",)
    is_bot = type_of_user == "Bot" or any(map(BOT.search, names))
    return Comment(names, is_bot, text)


def issue_record(issue, skipped):
    """The record of an `Issue`; None if it is left out."""
    if not issue.comments or issue.comments[0].is_bot:
        skipped["issue: opened by a bot"] += 1
        return None
    # Everybody who took part; of them, those who still say something without what mail adds. The
    # issue's own text may be empty.
    people = [comment for comment in issue.comments if not comment.is_bot]
    people = [comment._replace(text=without_mail(comment.text or "")) for comment in people]
    said = people[:1] + [comment for comment in people[1:] if comment.text]

    # Those who say something have the first numbers. A person may have several names.
    names = {}
    for comment in said + people:
        authors = [author.lower() for author in comment.authors]
        known = [names[author] for author in authors if author in names]
        number = len(set(names.values()))
        names |= dict.fromkeys(authors, known[0] if known else f"username_{number}")

    speakers = [names[comment.authors[0].lower()] for comment in said]
    texts = [anonymous(comment.text, names) for comment in said]
    first, *others = [f"{speaker}: {text}" for speaker, text in zip(speakers, texts)]
    title = anonymous(issue.title.strip(), names)
    record = [("<issue_start>", f"Title: {title}\n{first}")]
    record += [("<issue_comment>", text) for text in others]
    if issue.closed:
        record.append(("<issue_closed>", ""))
    if sum(len(text) for _, text in record) < SHORTEST_ISSUE:
        skipped["issue: under 200 characters"] += 1
        return None
    return record


def anonymous(text, names):
    """A text with other names for users. names: {name in lower case: new name}."""

    def renamed(match):
        at, name = match.groups()
        if name.lower() in names:
            return at + names[name.lower()]
        # Somebody who did not take part is known by an @, unless it is in a@b.c or @babel/core.
        is_address = re.match(r"[\w.@/]", text[max(0, match.start() - 1) : match.start()])
        is_package = text[match.end() : match.end() + 1] == "/"
        return match[0] if not at or is_address or is_package else "@username"

    return NAME.sub(renamed, text)


def without_mail(text):
    """A comment of at most LONGEST_COMMENT lines, without what mail programs put at its end."""
    text = COPIED.split(text.replace("\r\n", "\n").strip(), maxsplit=1)[0]

    # A quotation at the end goes if the line above it says so, which mail may break in two.
    # Other quotations stay: they are what the answer is about.
    lines = text.removesuffix("\n").split("\n")
    end = len(lines)
    while end and not lines[end - 1].split(">")[0].strip():
        end -= 1
    for n in (1, 2):
        if end >= n and QUOTED.fullmatch(" ".join(lines[end - n : end]).strip()):
            lines = lines[: end - n]
            break

    # The device is named in the last line that is left.
    lines = "\n".join(lines).strip().split("\n")
    if SENT_FROM.fullmatch(lines[-1].strip()):
        lines.pop()
    return "\n".join(lines[:LONGEST_COMMENT]).strip()


# ---- rows of a table, lines of JSON --------------------------------------------------------------


def document_of(record, skipped):
    """The `Document` of a record, which says by its fields what it is; None if it is left out.

    Raises ValueError, KeyError, TypeError or AttributeError if its shape is unknown.
    """
    language = record.get("lang") or record.get("language")
    paths = ("path", "max_stars_repo_path", "new_file")  # The Stack v2, The Stack, CommitPack
    path = [str(record[field]) for field in paths if record.get(field)]
    path = path[0] if path else f".{record.get('ext')}"

    if "content" in record and not isinstance(record.get("events"), list):  # a file
        content = record["content"]
        if not isinstance(content, bytes):
            content = content.encode()
        language = language_named(str(language or language_of(path, content) or "other"))
        if path.endswith(".ipynb") or language == "jupyter-notebook":
            document = file_document("a.ipynb", content, skipped)
        else:
            document = Document(language, content)
    elif "old_contents" in record:  # a commit
        new = record["new_contents"]
        subject = (record.get("subject") or record.get("message") or "").split("\n")[0]
        language = language or language_of(path, new.encode(errors="replace"))
        language = language_named(str(language))
        found = commit_record(record["old_contents"], new, subject, language, skipped)
        document = found and Document("git-commits", found)
    elif "cells" in record or "worksheets" in record:
        document = Document("jupyter", notebook_record(record))
    else:
        issue = stack_issue(record) if "events" in record else api_issue(record)
        found = issue_record(issue, skipped)
        document = found and Document("github-issues", found)

    # Only files of their own have been held to this size so far.
    if document:
        is_file = isinstance(document.content, bytes)
        texts = [document.content] if is_file else [text for _, text in document.content]
        if sum(map(len, texts)) > LARGEST:
            skipped[TOO_LARGE] += 1
            return None
    return document
