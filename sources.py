"""What a corpus is made of: source files, archives, The Stack's records, commits, issues and notebooks, read one document at a time.

    directory               source files by the table of languages below, Jupyter notebooks; with `commits`, the history of the git
                            repositories in it (those inside a repository are its project's files)
    .tar .tar.gz .zip ...   the same inside an archive; nothing is ever unpacked to disk
    .parquet                rows with a `content`, as The Stack has them, read in batches
    .jsonl .gz .zst         records, each by its fields: a file (`content`), a commit (`old_contents`, `new_contents`), a GitHub issue
                            (`events`, as in The Stack, or `title` and `body`, as the API answers), a notebook (`cells`)

A file is its bytes. What has a structure becomes a record of StarCoder's: pairs of a special token and the text after it.

    commit     <commit_before> old <commit_msg> subject <commit_after> new
    issue      <issue_start> Title: title \\n username_0: text <issue_comment> username_1: text ... <issue_closed>
    notebook   <jupyter_start> <jupyter_text> text <jupyter_code> code <jupyter_output> output, or <empty_output>

Memory does not grow with a source, but for the names in a .zip: a table is read 64 rows at a time,
all else one document; those over LARGEST are counted as left out.

References: Li et al., StarCoder, 2023, section 3 (records and their filters); Kocetkov et al., The Stack, 2022.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import itertools
import json
import lzma
import os
import re
import shutil
import stat
import subprocess
import tarfile
import tempfile
import zipfile
import zlib
from typing import NamedTuple

LARGEST = 10_000_000  # bytes of a document; The Stack has none above 1 MB
TOO_LARGE = f"over {LARGEST // 1_000_000} MB"


class Document(NamedTuple):
    """One document of a source."""

    language: str  # of the table below, or what a record says, or jupyter, github-issues, git-commits
    content: bytes | list  # of a file; or a record: [(special token, text), ...]


# The languages of StarEncoder's training data (directories of The Stack) and their file extensions; a word without a dot is a file name.
LANGUAGES = """
ada .adb .ada .ads
agda .agda
alloy .als
antlr .g4
applescript .applescript .scpt
assembly .asm .a51 .nasm
augeas .aug
awk .awk .auk .gawk .mawk .nawk
batchfile .bat .cmd
bluespec .bsv
c .c .cats .h .idc .w
c-sharp .cs .cake .cshtml .csx
clojure .clj .boot .cl2 .cljc .cljs .cljs.hl .cljscm .cljx .hic
cmake .cmake .cmake.in
coffeescript .coffee ._coffee .cjsx .cson .iced
common-lisp .lisp .asd .lsp .ny .podsl .sexp
cpp .cpp .c++ .cc .cp .cxx .h++ .hh .hpp .hxx .inl .ipp .tcc .tpp .C .H
css .css
cuda .cu .cuh
dart .dart
dockerfile .dockerfile Dockerfile
elixir .ex .exs
elm .elm
emacs-lisp .el .emacs .emacs.desktop
erlang .erl .escript .hrl .xrl .yrl
f-sharp .fs .fsi .fsx
fortran .f90 .f .f03 .f08 .f77 .f95 .for .fpp
glsl .glsl .fp .frag .frg .fsh .fshader .geo .geom .glslv .gshader .shader .vert .vrx .vsh .vshader
go .go
groovy .groovy .grt .gtpl .gvy
haskell .hs .hsc
html .html .htm .html.hl .xht .xhtml
idris .idr .lidr
isabelle .thy
java .java
java-server-pages .jsp
javascript .js ._js .bones .es6 .jake .jsb .jscad .jsfl .jsm .jss .njs .pac .sjs .ssjs .xsjs .xsjslib
json .json .geojson .lock .topojson
julia .jl
kotlin .kt .ktm .kts
lean .lean .hlean
literate-agda .lagda
literate-coffeescript .litcoffee
literate-haskell .lhs
lua .lua .nse .pd_lua .rbxs .wlua
makefile .mak .mk .mkfile Makefile
maple .mpl
markdown .md .markdown .mkd .mkdn .mkdown .ron
mathematica .mathematica .cdf .ma .mt .nb .nbp .wl .wlt
matlab .matlab
ocaml .ml .eliom .eliomi .ml4 .mli .mll .mly
pascal .pas .dfm .dpr .lpr
perl .pl .al .perl .ph .plx .pm .psgi .t
php .php .aw .ctp .php3 .php4 .php5 .phps .phpt
powershell .ps1 .psd1 .psm1
prolog .prolog .yap
protocol-buffer .proto
python .py .bzl .gyp .lmi .pyde .pyp .pyt .pyw .tac .wsgi .xpy
r .r .rd .rsx
racket .rkt .rktd .rktl .scrbl
restructuredtext .rst .rest .rest.txt .rst.txt
rmarkdown .rmd
ruby .rb .builder .gemspec .god .irbrc .jbuilder .mspec .podspec .rabl .rake .rbuild .rbw .rbx .ru .ruby .thor .watchr
rust .rs .rs.in
sas .sas
scala .scala .sbt
scheme .scm .sld .sps .ss
shell .sh .bash .bats .command .ksh .sh.in .tmux .tool .zsh
smalltalk .st
solidity .sol
sparql .sparql .rq
sql .pls .pck .pkb .pks .plb .plsql .sql .cql .ddl .prc .tab .udf .viw .db2
stan .stan
standard-ml .ML .fun .sig .sml
stata .do .ado .doh .ihlp .mata .matah .sthlp
systemverilog .sv .svh .vh
tcl .tcl .adp .tm
tcsh .tcsh .csh
tex .tex .aux .bbx .bib .cbx .dtx .ins .lbx .ltx .mkii .mkiv .mkvi .sty .toc
thrift .thrift
typescript .ts .tsx
verilog .veo
vhdl .vhdl .vhd .vhf .vhi .vho .vhs .vht .vhw
visual-basic .vb .bas .frm .frx .vba .vbhtml .vbs
xslt .xslt .xsl
yacc .y .yacc .yy
yaml .yml .reek .rviz .sublime-syntax .syntax .yaml .yaml-tmlanguage
zig .zig
"""
LANGUAGE_OF = {suffix: line.split()[0] for line in LANGUAGES.strip().split("\n") for suffix in line.split()[1:]}


# Extensions that several languages share: (extension, what its text must match, language), the first that fits. None: a language that is
# not in the table. Verilog and MATLAB have the extension to themselves there; others that use it are recognized, and left out.
SHARED = [
    (".h", r"^[ \t]*@(interface|protocol|class|end)\b|^[ \t]*#[ \t]*import\b", None),  # Objective-C
    (".h", r"^[ \t]*class\s+([A-Z_]\w*\s+)?\w+\s*(final\s*)?[:{;]|\bstd::|#[ \t]*include[ \t]*<\w+>", "cpp"),
    (".h", r"^[ \t]*(namespace\b|template[ \t]*<|using[ \t]+\w|(public|private|protected)[ \t]*:)", "cpp"),
    (".h", "", "c"),
    (".m", r"^[ \t]*(@(interface|implementation|protocol|class|end)\b|#[ \t]*(import|include|define)\b)", None),  # Objective-C
    (".m", r"^[ \t]*:-[ \t]*module\b", None),  # Mercury
    (".m", r"\(\*.{0,200}\*\)|^[ \t]*\w+\[[^]\n]{0,80}_[^]\n]{0,80}\][ \t]*:?=|\b(Module|Block|With|BeginPackage)\[", "mathematica"),
    (".m", r"^[ \t]*(%|function\b|classdef\b|end\b|clear\b|for\b|if\b)|;[ \t\r]*$", "matlab"),
    (".v", r"^[ \t]*(module\s+\w+\s*(#\s*\(|[(;])|endmodule\b|`(timescale|define|include|ifdef)\b|primitive\b)", "verilog"),
    (".pl", r"^#!.*\b(swipl|prolog)\b|^[ \t]*:-[ \t]*\w+|^\w+\([^\n]*\)[ \t]*(:-|\.[ \t\r]*$)", "prolog"),
    (".pl", "", "perl"),
]
SHARED = [(extension, re.compile(pattern.encode(), re.MULTILINE), language) for extension, pattern, language in SHARED]
PERL = re.compile(rb"^[ \t]*(use[ \t]+(strict|warnings|\w+::|v?5)|package[ \t]+\w|my[ \t]+[$@%(]|sub[ \t]+\w+)|^#!.*\bperl\b", re.MULTILINE)

# The Stack's names of languages that differ from its directories.
NAMES = {"c++": "cpp", "c#": "c-sharp", "f#": "f-sharp", "jupyter-notebook": "jupyter", "objective-c++": "objective-cpp"}

RECORDS = ("git-commits", "github-issues", "jupyter")  # what else a document may be

# Directories that hold other people's files or no sources, wherever they lie in a source: they are not entered.
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "node_modules", "__pycache__", ".git"}


def language_of(path, content=b""):
    """The language of a file by its name, or None: the whole name, else the longest known extension, in its own case first.

    content: its bytes, of which the first 20,000 decide where languages share an extension (SHARED).

    >>> language_of("src/Makefile"), language_of("index.rst.txt"), language_of("A.PY"), language_of("a.xyz")
    ('makefile', 'restructuredtext', 'python', None)
    >>> language_of("a.h"), language_of("a.h", b"namespace a {}"), language_of("a.v", b"Theorem t : True.")
    ('c', 'cpp', None)
    """
    name = os.path.basename(path)[-100:]  # one of a million dots has a million endings
    suffixes = [name] + [name[i:] for i, c in enumerate(name) if c == "."]
    extension = os.path.splitext(name)[1]
    extension = extension if extension in LANGUAGE_OF else extension.lower()
    rules = [rule for rule in SHARED if rule[0] == extension]
    if rules:
        head = content[:20_000]
        if extension == ".pl" and PERL.search(head):
            return "perl"
        return next((language for _, pattern, language in rules if pattern.search(head)), None)
    return next((LANGUAGE_OF[s] for suffix in suffixes for s in (suffix, suffix.lower()) if s in LANGUAGE_OF), None)


def _may_be_source(path):
    """Whether a file can count, by its name alone."""
    return path.lower().endswith((".ipynb", *{rule[0] for rule in SHARED})) or language_of(path) is not None


def _document(name, content, skipped):
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


# ---- records ---------------------------------------------------------------------------------------------------------------------

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
    cells = notebook["cells"] if "cells" in notebook else [cell for sheet in notebook["worksheets"] for cell in sheet["cells"]]
    record = [("<jupyter_start>", "")]
    for cell in cells:
        text = _text(cell["source"] if "source" in cell else cell.get("input", ""))
        if cell["cell_type"] in ("markdown", "heading"):
            record.append(("<jupyter_text>", text))
        elif cell["cell_type"] == "code":
            record.append(("<jupyter_code>", text))
            output = "".join(_output_text(output) for output in cell.get("outputs", []))[:OUTPUT_CHARACTERS]
            record.append(("<jupyter_output>", output) if output.strip() else ("<empty_output>", ""))
    return record if any(text.strip() for _, text in record) else []


def _output_text(output):
    if output.get("output_type") in ("error", "pyerr"):
        return f"{output.get('ename', '')}: {output.get('evalue', '')}\n"
    return _text(output.get("text") or output.get("data", {}).get("text/plain") or "")


CHANGED_SPAN, WHOLE_FILE = 32, 0.2  # lines of context at most; share of the commits that keep the whole file
LONGEST_FILE = 100_000  # characters
AUTOMATIC = re.compile(
    r"^(merge\b|revert \"|bump\b|update (readme|changelog)(\.\w+)?$|initial commit$|version \d|v?\d+(\.\d+)+$)", re.IGNORECASE
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
    first = next((i for i in range(least) if before[i] != after[i]), least)  # equal lines at the beginning, and at the end
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
        old, new = "".join(before[begin : len(before) - end]), "".join(after[begin : len(after) - end])
    return [("<commit_before>", old), ("<commit_msg>", subject), ("<commit_after>", new)]


LONGEST_COMMENT, SHORTEST_ISSUE = 80, 200  # lines; characters
BOT = re.compile(
    r"\[bot\]$|(^|[-_])(bot|ci)$|^(codecov|dependabot|renovate|greenkeeper|coveralls|stale|k8s-ci-robot|googlebot)\b", re.IGNORECASE
)
# What mail clients and GitHub put around an answer: what is forwarded below it, who is quoted below it, and from where it was sent.
FORWARDED = re.compile(r"Reply to this email directly|-+ ?Original Message ?-+$|From: .*\n(Sent|Date|To|Cc|Subject): ", re.MULTILINE)
QUOTED = re.compile(r"On (?=.*[\d@]).{0,300} (wrote|writes):")
SENT_FROM = re.compile(r"Sent from my .{1,50}")
# A name that may be a user's, or StarCoder's for one: in ASCII, whatever stands around it.
MENTION = re.compile(r"(?<![A-Za-z0-9-])(@?)(username_\d+|[A-Za-z0-9][A-Za-z0-9-]{0,38})(?![A-Za-z0-9-])")


def _said(text):
    """A comment of at most LONGEST_COMMENT lines, without what an answer by mail carries at its end."""
    lines = (text or "").replace("\r\n", "\n").strip().split("\n")
    end = next((i for i in range(len(lines)) if FORWARDED.match("\n".join(lines[i : i + 2]))), len(lines))
    quoted = end
    while quoted and not lines[quoted - 1].split(">")[0].strip():
        quoted -= 1
    for n in (1, 2):  # it may be broken in two
        if quoted >= n and QUOTED.fullmatch(" ".join(lines[quoted - n : quoted]).strip()):
            end = quoted - n
            break
    lines = "\n".join(lines[:end]).strip().split("\n")
    return "\n".join(lines[: -1 if SENT_FROM.fullmatch(lines[-1].strip()) else None][:LONGEST_COMMENT]).strip()


def issue_record(title, comments, closed, skipped):
    """The record of a GitHub issue, or None where a filter leaves it out, counted.

    comments: [(names of its author, is a bot, text), ...], the issue's own text first; without a text, somebody who only took part. Authors
    become username_0, username_1, ... in the order in which they appear, wherever they are mentioned; others that are mentioned become
    @username. Comments of bots go; the issue with them, where a bot opened it.
    """
    if not comments or comments[0][1]:
        skipped["issue: opened by a bot"] += 1
        return None
    people = [(authors, _said(text)) for authors, bot, text in comments if not bot]
    said = [(authors, text) for i, (authors, text) in enumerate(people) if text or i == 0]
    names = {}
    for authors, _ in said + people:
        name = next((names[a.lower()] for a in authors if a.lower() in names), f"username_{len(set(names.values()))}")
        names |= {a.lower(): name for a in authors}

    def anonymous(text):
        def renamed(found):
            at, name = found.groups()
            if name.lower() in names:
                return at + names[name.lower()]
            around = text[max(0, found.start() - 1) : found.start()], text[found.end() : found.end() + 1]
            return "@username" if at and not re.match(r"[\w.@/]", around[0]) and around[1] != "/" else found[0]  # no address, no package

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
        title = record.get("title") or next((event["title"] for event in events if event.get("title")), "")
        closed = False
        for event in events:
            authors = tuple(name for name in (event.get("author"), event.get("masked_author")) if name) or ("",)
            if event.get("action") in ("closed", "reopened"):
                closed = event["action"] == "closed"
            says = event.get("text") or event.get("action") == "opened"
            (comments if says else silent).append((authors, any(map(BOT.search, authors)), event.get("text")))
        return title, comments + silent, closed
    for said in [record, *(record["comments"] if isinstance(record.get("comments"), list) else [])]:
        user = said.get("user") or {}
        login = user.get("login") or ""
        comments.append(((login,), user.get("type") == "Bot" or bool(BOT.search(login)), said["body"]))
    for user in filter(None, [record.get("closed_by"), *(record.get("assignees") or [])]):
        silent.append(((user["login"],), user.get("type") == "Bot" or bool(BOT.search(user["login"])), None))
    return record["title"], comments + silent, record.get("state") == "closed"


def _documents_of(record, skipped):
    """The documents of one record of a table or of JSON lines. Raises KeyError, TypeError or AttributeError for one of unknown shape."""
    path = str(record.get("path") or record.get("max_stars_repo_path") or record.get("new_file") or "." + str(record.get("ext")))
    name = record.get("lang") or record.get("language")
    if "content" in record and not isinstance(record.get("events"), list):
        content = record["content"] if isinstance(record["content"], bytes) else record["content"].encode()
        language = str(name or language_of(path, content) or "other").lower().replace(" ", "-")
        if path.endswith(".ipynb") or NAMES.get(language) == "jupyter":
            found = _document("a.ipynb", content, skipped)
            return [found] if found else []
        return [Document(NAMES.get(language, language).encode(errors="replace").decode(), content)]
    if "old_contents" in record:
        old, new, subject = record["old_contents"], record["new_contents"], record.get("subject") or record.get("message") or ""
        language = NAMES.get(str(name).lower(), str(name).lower()) if name else language_of(path, new.encode(errors="replace"))
        found = commit_record(old, new, subject.split("\n")[0], language, skipped)
        return [Document("git-commits", found)] if found else []
    if "cells" in record or "worksheets" in record:
        return [Document("jupyter", notebook_record(record))]
    found = issue_record(*_issue_of(record), skipped)
    return [Document("github-issues", found)] if found else []


# ---- sources ---------------------------------------------------------------------------------------------------------------------


class Damaged(ValueError):
    """A source that ends in the middle, or is not what its name says."""


def _walk(directory, unreadable=None):
    """(folder, its folders, its files) as of os.walk, sorted; no links or SKIPPED_DIRECTORIES.

    One level of os.walk at a time: Python 3.11's calls itself, and fails a thousand folders deep.
    unreadable: called with the error of a folder that cannot be read.
    """
    waiting = [directory]
    while waiting:
        level = os.walk(waiting.pop(), onerror=unreadable)
        for folder, folders, names in itertools.islice(level, 1):
            folders.sort()
            yield folder, folders, sorted(names)
            entered = [name for name in folders if name not in SKIPPED_DIRECTORIES]
            inner = [os.path.join(folder, name) for name in reversed(entered)]
            waiting += [path for path in inner if not os.path.islink(path)]


def _files(directory, skipped=None):
    def unreadable(error):
        if skipped is not None:
            skipped["unreadable"] += 1

    for folder, folders, names in _walk(directory, unreadable):
        if skipped is not None and (links := sum(os.path.islink(os.path.join(folder, f)) for f in folders)):
            skipped["not a file"] += links  # they are not followed
        for name in names:
            yield os.path.join(folder, name)


def _size(path):
    """Bytes of a file that may be a source; 0 of what is none, or is gone by now."""
    with contextlib.suppress(OSError):
        if _may_be_source(path) and os.path.isfile(path):
            return os.path.getsize(path)
    return 0


def _read_directory(source, skipped, progress):
    for path in _files(source, skipped):
        if not os.path.isfile(path):  # a link to nothing or to itself, a pipe: reading it would fail or never end
            skipped["not a file"] += 1
        elif not _may_be_source(path):
            skipped["no known extension"] += 1
        else:
            try:
                with open(path, "rb") as f:
                    content = f.read(LARGEST + 1)
            except OSError:
                skipped["unreadable"] += 1
                continue
            progress(len(content))
            if len(content) > LARGEST:
                skipped[TOO_LARGE] += 1
            elif document := _document(path, content, skipped):
                yield document


HEADERS = 1_000_000  # bytes at most that describe a member of an archive: its name, its attributes
XZ_MEMORY = 200_000_000  # bytes that unpacking may take; `xz -9` asks for 65 MB


class _Rationed:
    """A stream that gives `left` bytes and no more: tarfile would take a name of any length."""

    def __init__(self, stream):
        self.stream, self.left, self.last = stream, HEADERS, b""
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size):
        self.left -= size
        if size < 0 or self.left < 0:
            raise Damaged(f"what describes a member takes over {HEADERS:,} bytes")
        self.last = self.stream.read(size)
        return self.last


class _Xz:
    """What is in an .xz file, read forward. lzma.open takes the gigabytes that a file asks for."""

    def __init__(self, packed):
        self.packed, self.position, self.rest = packed, 0, b""
        self.stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)

    def read(self, size):
        pieces = []
        while size:
            if self.stream.eof:  # another stream may follow, after zeros
                self.rest = self.stream.unused_data.lstrip(b"\0")
                while not self.rest:
                    block = self.packed.read(1 << 16)
                    if not block:
                        break
                    self.rest = block.lstrip(b"\0")
                if not self.rest:
                    break
                self.stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)
            elif self.stream.needs_input:
                self.rest = self.packed.read(1 << 16)
                if not self.rest:
                    raise EOFError("it ends in the middle")
            pieces.append(self.stream.decompress(self.rest, size))
            size -= len(pieces[-1])
            self.rest = b""
        content = b"".join(pieces)
        self.position += len(content)
        return content

    def tell(self):
        return self.position

    def seek(self, position):
        if position < self.position:
            raise Damaged("a member of negative size")
        while position > self.position and self.read(min(1 << 20, position - self.position)):
            pass


def _read_tar(source, skipped, progress):
    unpack = {".gz": gzip.open, ".tgz": gzip.open, ".xz": _Xz, ".bz2": bz2.open}
    with open(source, "rb") as raw:
        plain = raw if source.endswith(".tar") else unpack[os.path.splitext(source)[1]](raw)
        rationed = _Rationed(plain)
        archive = tarfile.open(fileobj=rationed, mode="r:")
        offset = -1
        while member := archive.next():
            archive.members.clear()  # tarfile would keep them all,
            archive.pax_headers.clear()  # and all that is said of all members
            if archive.offset <= offset:
                raise Damaged("a member of negative size")
            offset = archive.offset
            rationed.left = HEADERS
            progress(raw.tell(), absolute=True)
            folders = member.name.split("/")[:-1]
            if member.isdir() or SKIPPED_DIRECTORIES.intersection(folders):
                continue
            if not member.isfile():
                skipped["not a file"] += 1
            elif not _may_be_source(member.name):
                skipped["no known extension"] += 1
            elif member.size > LARGEST:
                skipped[TOO_LARGE] += 1
            else:
                rationed.left = LARGEST
                content = archive.extractfile(member).read()
                rationed.left = HEADERS
                if document := _document(member.name, content, skipped):
                    yield document
        # To tarfile a damaged header is the end like any other. The real end is blocks of zeros, of
        # which it read the first; reading the others also checks the checksum.
        end = rationed.last + plain.read(1 << 20)
        if not end or any(end):
            raise tarfile.ReadError("it ends in the middle")
        while plain.read(1 << 20):
            pass


def _read_zip(source, skipped, progress):
    with open(source, "rb") as raw, zipfile.ZipFile(raw) as archive:
        raw.seek(max(0, os.path.getsize(source) - 66_000))  # the end record says how many members there are; zipfile does not look
        end = raw.read()
        count = int.from_bytes(end[end.rindex(b"PK\5\6") + 10 :][:2], "little")
        if count not in (0xFFFF, len(archive.infolist())):
            raise zipfile.BadZipFile(f"{count} members are said to be there, {len(archive.infolist())} are")
        for member in archive.infolist():
            progress(member.compress_size)
            if member.is_dir() or SKIPPED_DIRECTORIES.intersection(member.filename.split("/")[:-1]):
                continue
            if stat.S_ISLNK(member.external_attr >> 16):
                skipped["not a file"] += 1
            elif not _may_be_source(member.filename):
                skipped["no known extension"] += 1
            elif member.file_size > LARGEST:
                skipped[TOO_LARGE] += 1
            elif member.flag_bits & 1:
                skipped["encrypted"] += 1
            elif member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile unpacks bzip2 and LZMA to any size, whatever a member claims.
                skipped["neither stored nor deflated"] += 1
            else:
                with archive.open(member) as f:  # reads no more than the size that was checked
                    content = f.read(LARGEST)
                if document := _document(member.filename, content, skipped):
                    yield document


COLUMNS = """content lang language ext path max_stars_repo_path new_file old_contents new_contents subject message
events title comments body user state""".split()


def _read_parquet(source, skipped, progress):
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(source, buffer_size=1 << 20, pre_buffer=False, page_checksum_verification=True) as table:
        names = [name for name in COLUMNS if name in table.schema_arrow.names]
        if not {"content", "old_contents", "events", "title"} & {*names}:
            raise Damaged("it has neither a content, nor commits, nor issues")
        size, seen = os.path.getsize(source), 0
        for batch in table.iter_batches(batch_size=64, columns=names):
            for i in range(len(batch)):
                yield from _checked(lambda i=i, batch=batch: {name: batch[name][i].as_py() for name in names}, skipped)
            seen += len(batch)
            progress(size * seen // max(table.metadata.num_rows, 1), absolute=True)


def _checked(record, skipped):
    """The documents of a record, which a function returns; one of unknown shape is counted."""
    try:
        found = _documents_of(record(), skipped)
    except UnicodeError:  # half of a surrogate pair, which JSON can spell and UTF-8 cannot
        skipped["not UTF-8"] += 1
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        skipped["no content field"] += 1
    else:
        for document in found:
            content = document.content
            if (len(content) if isinstance(content, bytes) else sum(len(text) for _, text in content)) > LARGEST:
                skipped[TOO_LARGE] += 1
            else:
                yield document


def _read_jsonl(source, skipped, progress):
    import pyarrow

    with open(source, "rb") as raw:
        plain = raw
        if source.endswith(".gz"):
            plain = gzip.open(raw)
        elif source.endswith(".zst"):
            plain = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), "zstd"), 1 << 20)
        issue, joined = None, 0  # the API answers comments apart; they join the issue before them
        while line := plain.readline(2 * LARGEST):
            progress(raw.tell(), absolute=True)
            if len(line) == 2 * LARGEST and not line.endswith(b"\n"):
                skipped[TOO_LARGE] += 1
                while (line := plain.readline(LARGEST)) and not line.endswith(b"\n"):
                    pass
                continue
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except UnicodeError:
                skipped["not UTF-8"] += 1
                continue
            except (ValueError, RecursionError):
                skipped["not JSON"] += 1
                continue
            if isinstance(record, dict) and "issue_url" in record and "title" not in record:
                joined += len(line)
                if not (issue and record["issue_url"] == issue.get("url")):
                    skipped["a comment without its issue"] += 1
                elif joined > LARGEST:
                    skipped[f"a comment of an issue {TOO_LARGE}"] += 1
                else:
                    issue["comments"].append(record)
                continue
            if issue:
                yield from _checked(lambda issue=issue: issue, skipped)
            issue, joined = None, 0
            if isinstance(record, dict) and isinstance(record.get("comments"), int) and "title" in record and "url" in record:
                issue = record | {"comments": []}
            else:
                yield from _checked(lambda record=record: record, skipped)
        if issue:
            yield from _checked(lambda: issue, skipped)


def _is_file(path):
    """Whether a path is a plain file: a link may lead elsewhere, and reading a pipe never ends."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: a NUL byte
        return stat.S_ISREG(os.lstat(path).st_mode)
    return False


def _line(path):
    """What a small file of git's holds; "" without it."""
    if not _is_file(path):
        return ""
    with open(path, "rb") as f:
        return os.fsdecode(f.read(5000).strip())


COMMIT = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # SHA-1, or SHA-256


def _head(own, shared):
    """The name of the commit that a repository's HEAD stands for. Raises Damaged without one.

    own, shared: its directories; two where it is a linked work tree.
    """
    text = _line(os.path.join(own, "HEAD"))
    for _ in range(5):  # a reference may stand for another
        reference = text.removeprefix("ref:").strip()
        if COMMIT.fullmatch(reference):
            return reference
        if not reference.startswith("refs/") or ".." in reference:
            break
        text = _line(os.path.join(shared, reference))
        packed = os.path.join(shared, "packed-refs")
        if not text and _is_file(packed):
            with open(packed, "rb") as f:
                names = (os.fsdecode(line.strip()).partition(" ") for line in f)
                text = next((commit for commit, _, name in names if name == reference), "")
    if os.path.isdir(os.path.join(shared, "reftable")):
        raise Damaged("its references are a reftable, which is not read here")
    raise Damaged("its HEAD stands for no commit")


def _borrow(repository, bare):
    """Makes the directory `bare` a git repository with the history of another, and no more of it.

    A stranger's repository may have git run any command: its configuration names programs that
    fetch missing objects, compare files or check signatures, and it has hooks. So git is only
    pointed at a repository of our own, which takes over the name of a commit, where a shallow
    history ends, and the packs and loose objects: no configuration, hooks, attributes, references
    or alternates.
    Raises Damaged for one without a commit, or that names files elsewhere.
    """
    own = os.path.join(repository, ".git")
    own = own if os.path.lexists(own) else repository
    shared = own
    if os.path.isfile(own):  # a linked work tree or a submodule: a file that names the directory
        own = os.path.join(repository, _line(own).removeprefix("gitdir:").strip())
        shared = os.path.join(own, _line(os.path.join(own, "commondir")))
    shared = os.path.realpath(shared)
    objects = os.path.join(shared, "objects")
    if os.path.lexists(os.path.join(objects, "info", "alternates")):
        raise Damaged("its objects lie in another repository, as after git clone --shared")

    head = _head(own, shared)
    config = "[core]\nbare = true\nrepositoryformatversion = 0\n"
    if len(head) == 64:
        config = config.replace("= 0", "= 1") + "[extensions]\nobjectFormat = sha256\n"
    files = {"HEAD": head + "\n", "config": config}
    shallow = os.path.join(shared, "shallow")
    if _is_file(shallow):
        with open(shallow, errors="replace") as f:
            files["shallow"] = "".join(line for line in f if COMMIT.fullmatch(line.strip()))
    for name, text in files.items():
        with open(os.path.join(bare, name), "w") as f:
            f.write(text)
    os.makedirs(os.path.join(bare, "refs"))
    os.makedirs(os.path.join(bare, "objects", "pack"))

    for folder in os.listdir(objects):
        if not re.fullmatch("pack|[0-9a-f]{2}", folder):
            continue
        path = os.path.join(objects, folder)
        if os.path.islink(objects) or os.path.islink(path):
            raise Damaged(f"objects/{folder} is a link")
        names = os.listdir(path)
        if folder == "pack":
            names = [name for name in names if name.endswith((".pack", ".idx"))]
        for name in names:
            if not _is_file(os.path.join(path, name)):
                raise Damaged(f"objects/{folder}/{name} is not a plain file")
        if folder == "pack":
            for name in names:
                os.symlink(os.path.join(path, name), os.path.join(bare, "objects", "pack", name))
        else:
            os.symlink(path, os.path.join(bare, "objects", folder))


def _git(bare, *arguments, **pipes):
    """Starts git in a repository of our own, with no configuration or variables of the user's."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "GIT_DIR": bare,
        "HOME": bare,
        "XDG_CONFIG_HOME": bare,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_ATTR_NOSYSTEM": "1",
        # Should it want to fetch something for all that:
        "GIT_NO_LAZY_FETCH": "1",
        "GIT_ALLOW_PROTOCOL": "none",
        "GIT_TERMINAL_PROMPT": "0",
    }
    command = ["git", *arguments]
    return subprocess.Popen(command, cwd=bare, stdout=subprocess.PIPE, env=environment, **pipes)


def read_commits(source, skipped, progress):
    """The changes of files by the commits of a git repository's current branch, the newest first.

    Merges and new files are none. No command runs that the repository names (see `_borrow`).
    """
    with tempfile.TemporaryDirectory() as bare:
        _borrow(source, bare)
        yield from _read_commits(bare, skipped)


def _read_commits(bare, skipped):
    how = "--no-merges --no-show-signature --encoding=UTF-8 --raw --no-abbrev --no-renames --diff-filter=M -z --format=%x01%s".split()
    said = tempfile.TemporaryFile()  # a pipe that nobody reads would stop git when it is full
    log = _git(bare, "log", *how, "HEAD", stderr=said)
    # One process is asked for an object's size, another for its content where that is not too much.
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    sizes = _git(bare, "cat-file", "--batch-check", **pipes)
    objects = _git(bare, "cat-file", "--batch", **pipes)

    def ask(process, name):
        process.stdin.write(name + b"\n")
        process.stdin.flush()
        words = process.stdout.readline().split()
        if len(words) != 3:
            raise Damaged(f"git has no object {name.decode()}; a partial clone lacks some")
        return words[1], int(words[2])

    def blob(name):
        """The content of a file, or None where it is too large."""
        kind, size = ask(sizes, name)
        if kind != b"blob" or size > LARGEST:
            return None
        ask(objects, name)
        return objects.stdout.read(size + 1)[:-1]

    try:
        subject, change = "", None
        for field in _fields(log.stdout):
            if not change:
                field = field.lstrip(b"\n")
                if field.startswith(b"\1"):
                    subject = field[1:].decode(errors="replace")
                elif field.startswith(b":"):
                    change = field.split()
            else:
                path, (old_mode, new_mode, old, new, _) = field.decode(errors="replace"), change
                change = None
                if not (old_mode.startswith(b":100") and new_mode.startswith(b"100")) or not _may_be_source(path):
                    skipped["no known extension"] += 1
                    continue
                old, new = blob(old), blob(new)
                if old is None or new is None:
                    skipped[TOO_LARGE] += 1
                    continue
                if (language := language_of(path, new)) is None:
                    skipped["no known extension"] += 1
                    continue
                try:
                    record = commit_record(old.decode(), new.decode(), subject, language, skipped)
                except UnicodeDecodeError:
                    skipped["not UTF-8"] += 1
                    continue
                if record:
                    yield Document("git-commits", record)
        if log.wait():
            said.seek(0)
            raise Damaged(said.read(1000).decode(errors="replace").strip().split("\n")[0])
    finally:
        for process in (log, sizes, objects):
            process.kill()
            for pipe in filter(None, (process.stdin, process.stdout)):
                with contextlib.suppress(OSError):  # a pipe whose other end is gone
                    pipe.close()
            process.wait()
        said.close()


def _fields(stream):
    """What lies between the NUL bytes of a stream."""
    rest = b""
    while block := stream.read1(1 << 16):
        *fields, rest = (rest + block).split(b"\0")
        yield from fields
        if len(rest) > LARGEST:
            raise Damaged(f"the subject of a commit is {TOO_LARGE}")
    if rest:
        yield rest


READERS = {
    _read_tar: (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"),
    _read_zip: (".zip", ".whl"),
    _read_parquet: (".parquet",),
    _read_jsonl: (".jsonl", ".jsonl.gz", ".jsonl.zst"),
}
TABLES = READERS[_read_parquet] + READERS[_read_jsonl]
KINDS = "a directory, .tar(.gz, .xz, .bz2), .zip, .parquet or .jsonl(.gz, .zst)"


def _repositories(directory):
    """The git repositories in a directory, which may be one itself: with a work tree, or bare.

    Those inside a repository are its project's files, and not entered. Nor is a `.git` that leads
    elsewhere, a file or a link, but for that of the directory itself, which the user named.
    """
    for folder, folders, names in _walk(directory):
        git = os.path.join(folder, ".git")
        named = folder == directory and os.path.lexists(git)
        plain = os.path.isdir(git) and not os.path.islink(git)
        bare = {"objects", "refs"} <= {*folders} and "HEAD" in names
        if named or plain or bare:
            yield folder
            folders.clear()


def readers(source, commits=False):
    """[(path, reader, bytes on disk), ...] of a source.

    Raises ValueError for one that is missing or of an unknown kind, OSError for one that cannot be
    read.

    A reader is a generator of `Document`; its arguments are the path, a Counter of what is left out, by reason, and a function that is
    told of progress in bytes. commits: the histories of the git repositories in a directory, too.
    """
    if os.path.isdir(source):
        os.scandir(source).close()  # a folder inside that cannot be read is counted; not this one
        size = sum(map(_size, _files(source)))
        if commits and not shutil.which("git"):
            raise ValueError("--commits: needs the git program")
        return [(source, _read_directory, size)] + [(path, read_commits, 0) for path in (_repositories(source) if commits else [])]
    if not os.path.exists(source):
        raise ValueError(f"{source}: no such file or directory")
    for reader, endings in READERS.items():
        if source.endswith(endings):
            return [(source, reader, os.path.getsize(source))]
    raise ValueError(f"{source}: not a source; give {KINDS}")


def read(source, reader, skipped, progress):
    """The documents of a source by one of its `readers`. Raises ValueError for a damaged one."""
    import pyarrow

    archives = (tarfile.TarError, zipfile.BadZipFile, NotImplementedError, EOFError, lzma.LZMAError, zlib.error)
    numbers = (ValueError, OverflowError, RecursionError)  # of a header that claims the impossible
    try:
        yield from reader(source, skipped, progress)
    except (OSError, pyarrow.ArrowException, *archives, *numbers) as error:
        if isinstance(error, OSError) and error.errno:
            raise ValueError(f"{source}: cannot be read ({error.strerror})") from None
        words = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"{source}: damaged ({words}); fetch it again") from None
