"""From source code to tokens on disk: directories, archives and JSON lines in, a corpus directory for `data.PairDataset` out.

    python corpus.py SOURCE... --out DIR [--vocab-size N | --tokenizer PATH]

A source is a directory of source files, a .tar.gz or .tar.xz (.tgz, .tar.bz2, .tar) of them, or a .jsonl or .jsonl.gz with a `content`
field; without one, the standard library of the running Python. Documents are UTF-8 text, kept byte for byte, exact duplicates dropped.
The hash of its content decides whether a document is for training or for validation, so it stays there when sources are added or
reordered. What is left out is counted, by reason. The corpus appears under its name only when it is whole.

Files in archives and directories count by the table of languages below; records of JSON lines are taken as they come.
"""

import bz2
import gzip
import hashlib
import json
import lzma
import os
import shutil
import sysconfig
import tarfile
import zlib
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor

import numpy as np
from tqdm import tqdm

from data import CommandLine, Tokenizer, run, train_tokenizer

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

# Directories that hold other people's files or no sources, wherever they lie in a source.
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "node_modules", "__pycache__", ".git"}
TOKENIZER_CHARACTERS = 1_000_000_000  # of training documents are enough for a tokenizer: more changes little and takes memory


def language_of(path):
    """The language of a file by its name, or None: the whole name, else the longest known extension, in its own case first.

    >>> language_of("src/Makefile"), language_of("index.rst.txt"), language_of("A.PY"), language_of("a.xyz")
    ('makefile', 'restructuredtext', 'python', None)
    """
    name = os.path.basename(path)
    suffixes = [name] + [name[i:] for i, c in enumerate(name) if c == "."]
    return next((LANGUAGE_OF[s] for suffix in suffixes for s in (suffix, suffix.lower()) if s in LANGUAGE_OF), None)


# ---- sources ---------------------------------------------------------------------------------------------------------------------


def _files(directory):
    for folder, folders, names in os.walk(directory):
        folders[:] = sorted(f for f in folders if f not in SKIPPED_DIRECTORIES)
        for name in sorted(names):
            path = os.path.join(folder, name)
            if os.path.isfile(path):
                yield path


def _read_directory(source, skipped, progress):
    for path in _files(source):
        language = language_of(path)
        if language is None:
            skipped["no known extension"] += 1
            continue
        try:
            with open(path, "rb") as f:
                content = f.read()
        except OSError:
            skipped["unreadable"] += 1
            continue
        progress(len(content))
        yield language, content


def _read_tar(source, skipped, progress):
    unpack = {".tar": lambda raw: raw, ".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}[os.path.splitext(source)[1]]
    with open(source, "rb") as raw, unpack(raw) as plain, tarfile.open(fileobj=plain, mode="r:") as archive:
        while member := archive.next():
            archive.members.clear()  # tarfile would keep them all
            progress(raw.tell(), absolute=True)
            folders = member.name.split("/")[:-1]
            if not member.isfile() or SKIPPED_DIRECTORIES.intersection(folders):
                continue
            language = language_of(member.name)
            if language is None:
                skipped["no known extension"] += 1
            else:
                yield language, archive.extractfile(member).read()
        # To tarfile a damaged header is the end like any other. The real end is blocks of zeros; reading them also checks the checksum.
        plain.seek(archive.offset)
        end = plain.read(1 << 20)
        if not end or any(end):
            raise tarfile.ReadError("it ends in the middle")
        while plain.read(1 << 20):
            pass


def _read_jsonl(source, skipped, progress):
    with open(source, "rb") as raw:
        for line in gzip.open(raw) if source.endswith(".gz") else raw:
            progress(raw.tell(), absolute=True)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                content = record["content"].encode()
            except UnicodeError:  # of the file, or half of a surrogate pair, which JSON can spell and UTF-8 cannot
                skipped["not UTF-8"] += 1
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                skipped["no content field"] += 1
            else:
                path = record.get("path") or record.get("max_stars_repo_path") or "." + str(record.get("ext"))
                language = str(record.get("lang") or language_of(str(path)) or "other").lower()
                yield language.encode(errors="replace").decode(), content


def _reader(source):
    """(reader, bytes on disk) of a source. Raises ValueError for one that is missing or of an unknown kind."""
    if os.path.isdir(source):
        return _read_directory, sum(os.path.getsize(path) for path in _files(source) if language_of(path))
    if not os.path.exists(source):
        raise ValueError(f"{source}: no such file or directory")
    for reader, endings in {
        _read_tar: (".tar", ".tar.gz", ".tgz", ".tar.xz", ".tar.bz2"),
        _read_jsonl: (".jsonl", ".jsonl.gz"),
    }.items():
        if source.endswith(endings):
            return reader, os.path.getsize(source)
    raise ValueError(f"{source}: not a source; give a directory, a .tar.gz, .tar.xz, .jsonl or .jsonl.gz")


def documents(sources, validation, skipped, description="reading"):
    """The documents to keep, in the order of the sources: yields (split, language, text).

    validation: share of the documents for validation, chosen by the SHA-256 of their content. skipped: a Counter, to which what is left
    out is added by reason. Raises ValueError for a missing source or a damaged archive.
    """
    readers = [(source, *_reader(source)) for source in sources]
    seen = set()
    with tqdm(total=sum(size for *_, size in readers), unit="B", unit_scale=True, desc=description) as bar:
        for source, reader, _ in readers:
            begun = bar.n

            def progress(n, absolute=False, begun=begun):
                bar.update(begun + n - bar.n if absolute else n)

            try:
                for language, content in reader(source, skipped, progress):
                    digest = hashlib.sha256(content).digest()
                    if not content.strip():
                        skipped["empty"] += 1
                    elif digest[:16] in seen:
                        skipped["exact duplicate"] += 1
                    elif b"\0" in content:
                        skipped["binary (a NUL byte)"] += 1
                    else:
                        seen.add(digest[:16])
                        try:
                            text = content.decode()
                        except UnicodeDecodeError:
                            skipped["not UTF-8"] += 1
                            continue
                        yield ("validation" if int.from_bytes(digest[:8]) < validation * 2**64 else "train"), language, text
            except (tarfile.TarError, EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise ValueError(f"{source}: damaged ({error}); fetch it again") from None


# ---- from text to tokens ---------------------------------------------------------------------------------------------------------


def _load_worker(path):
    global _tokenizer  # one for each worker process
    _tokenizer = Tokenizer.from_pretrained(path)


def _encode(texts):
    return [_tokenizer.encode(text) for text in texts]


def _chunks(stream, size=1_000_000):
    """Lists of documents of about `size` characters, so that handing them to a process costs little."""
    chunk, characters = [], 0
    for document in stream:
        chunk.append(document)
        characters += len(document[2])
        if characters >= size:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _encoded(stream, tokenizer_path, workers):
    """(split, language, text, ids) of each document, in order, by `workers` processes, with a bounded number of chunks in flight."""
    with ProcessPoolExecutor(workers, initializer=_load_worker, initargs=(tokenizer_path,)) as pool:
        flight = deque()

        def landed():
            chunk, result = flight.popleft()
            return ((*document, ids) for document, ids in zip(chunk, result.result()))

        for chunk in _chunks(stream):
            flight.append((chunk, pool.submit(_encode, [text for _, _, text in chunk])))
            if len(flight) > 3 * workers:
                yield from landed()
        while flight:
            yield from landed()


def prepare(sources=None, out="data/python", *, vocab_size=49156, tokenizer=None, validation=0.05, workers=None):
    """Makes the corpus directory `out` from `sources` and returns its meta.json.

    sources: a list of paths (see the top of this file); None: the standard library of the running Python. vocab_size: of a tokenizer
    that is trained on the training documents, unless `tokenizer`, a path or a `data.Tokenizer`, is given. validation: share of the
    documents held out. workers: processes; None: one for each core. The files are those that data.py describes; tokens are uint16, or
    uint32 where the vocabulary needs it.

    Raises ValueError for bad sources, for sources without documents, and for an `out` that holds something already.
    """
    sources = [sysconfig.get_paths()["stdlib"]] if not sources else [sources] if isinstance(sources, str | os.PathLike) else sources
    sources, out = [os.fspath(source) for source in sources], os.path.realpath(out)
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if not 0 < validation < 1:
        raise ValueError(f"validation must lie between 0 and 1, got {validation}")
    if os.path.exists(out) and (not os.path.isdir(out) or os.listdir(out)):
        raise ValueError(f"{out}: exists already; choose another directory or remove it")
    for source in sources:
        _reader(source)
        if os.path.isdir(source) and out.startswith(os.path.join(os.path.realpath(source), "")):
            raise ValueError(f"{out} lies inside the source {source}; choose a directory outside of it")
    if tokenizer is not None and not isinstance(tokenizer, Tokenizer):
        tokenizer = Tokenizer.from_pretrained(tokenizer)
    partial = f"{out}.partial-{os.getpid()}"
    os.makedirs(partial)
    try:
        if tokenizer is None:
            tokenizer = train_tokenizer(_training_texts(sources, validation), vocab_size)
        tokenizer.save_pretrained(partial)
        meta = _write(sources, partial, tokenizer, validation, workers or os.cpu_count())
        os.rename(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return meta


def _training_texts(sources, validation):
    size, skipped = 0, Counter()
    for split, _, text in documents(sources, validation, skipped, "reading for the tokenizer"):
        if split == "train":
            yield text
            size += len(text)
            if size > TOKENIZER_CHARACTERS:
                return
    if not size:
        raise ValueError(f"no documents for training in {', '.join(sources)} (skipped: {_reasons(skipped)})")


def _write(sources, directory, tokenizer, validation, workers):
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    offsets = {"train": [0], "validation": [0]}
    files = {split: open(os.path.join(directory, f"{split}.bin"), "wb") for split in offsets}
    languages, skipped = {}, Counter()
    # tokenizers warns of its threads when a process that used them forks; the children here use none of them.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    for split, language, text, ids in _encoded(documents(sources, validation, skipped, "tokenizing"), directory, workers):
        if len(ids) < 2:
            skipped["under 2 tokens"] += 1
            continue
        files[split].write(np.array(ids, dtype).tobytes())
        offsets[split].append(offsets[split][-1] + len(ids))
        counts = languages.setdefault(language, {"documents": 0, "bytes": 0, "tokens": 0})
        for key, n in {"documents": 1, "bytes": len(text.encode()), "tokens": len(ids)}.items():
            counts[key] += n
    for split, file in files.items():
        file.close()
        np.save(os.path.join(directory, f"{split}.offsets.npy"), np.array(offsets[split], np.int64))
    if not languages:
        raise ValueError(f"no documents in {', '.join(sources)} (skipped: {_reasons(skipped)})")
    meta = {
        "format": 1,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype.name,
        "splits": {split: {"documents": len(o) - 1, "tokens": o[-1]} for split, o in offsets.items()},
        "languages": dict(sorted(languages.items(), key=lambda item: -item[1]["tokens"])),
        "skipped": dict(skipped.most_common()),
        "sources": sources,
    }
    with open(os.path.join(directory, "meta.json"), "w") as f:
        json.dump(meta, f, indent=1)
    return meta


def _reasons(skipped):
    return ", ".join(f"{n:,} {reason}" for reason, n in skipped.items()) or "none"


def summary(meta):
    """What a corpus holds, for people: documents, tokens, bytes per token, what was skipped and why, and a line for each language."""
    total = {key: sum(c[key] for c in meta["languages"].values()) for key in ("documents", "bytes", "tokens")}
    lines = [f"{'language':24}{'documents':>12}{'MB':>10}{'tokens':>16}{'bytes/token':>13}"]
    for name, c in [*meta["languages"].items(), ("all", total)]:
        lines.append(f"{name:24}{c['documents']:12,}{c['bytes'] / 1e6:10.2f}{c['tokens']:16,}{c['bytes'] / c['tokens']:13.2f}")
    splits = ", ".join(f"{split} {s['documents']:,} documents, {s['tokens']:,} tokens" for split, s in meta["splits"].items())
    return "\n".join([*lines, f"{splits}; vocabulary {meta['vocab_size']:,}", f"skipped: {_reasons(meta['skipped'])}"])


def main(argv=None):
    """The command line."""
    parser = CommandLine(prog="corpus.py", description="Make a corpus of tokens from source code.")
    sources_help = "a directory, .tar.gz, .tar.xz, .jsonl or .jsonl.gz (default: the standard library of this Python)"
    parser.add_argument("sources", nargs="*", metavar="SOURCE", help=sources_help)
    parser.add_argument("--out", required=True, metavar="DIR", help="the corpus directory to make")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--vocab-size", type=int, default=49156, metavar="N", help="of the tokenizer to train (default: 49156)")
    choice.add_argument("--tokenizer", metavar="PATH", help="use this tokenizer.json, or the one in this directory")
    parser.add_argument("--validation", type=float, default=0.05, metavar="P", help="share of the documents held out (default: 0.05)")
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one for each core)")
    print(summary(prepare(**vars(parser.parse_args(argv)))))


if __name__ == "__main__":
    run(main)
