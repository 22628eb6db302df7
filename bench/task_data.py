r"""Labelled data for three small tasks, made offline: train.jsonl and validation.jsonl of each.

    make_languages         {"text", "label"}   the language of a few lines, 20 classes
    make_commented_code    {"text", "label"}   a comment line: commented-out code, or prose?
    make_docstring_scores  {"text", "score"}   how good a docstring is, by the rule docstring_score

A maker returns {split: lines}, and makes nothing if both files exist. The same sources give the
same files. Documents, files and packages are held out as a whole, by a hash of their text or name,
and nothing held out occurs in training. Left out: splits by author, and any judgement of people.
"""

import ast
import hashlib
import io
import json
import os
import random
import re
import sysconfig
import textwrap
import tokenize
from collections import Counter
from typing import NamedTuple

from tqdm import tqdm

from common.files import write_whole
from corpus.languages import SKIPPED_DIRECTORIES
from corpus.store import SPLITS, open_parts, read_meta
from corpus.tokenizer import Tokenizer
from finetune.functions import parsed

HELD_OUT = 1 / 7  # of the documents, files or packages
MOST_CHARACTERS = 400  # of a text

# ---- what the makers share -----------------------------------------------------------------------


def held_out(name):
    """True for about one name in seven, by its hash."""
    return fraction_of(name) < HELD_OUT


def fraction_of(name):
    """A number in [0, 1) that looks random, and is always the same for a name."""
    digest = hashlib.sha256(name.encode(errors="replace")).digest()
    return int.from_bytes(digest[:6]) / 2**48  # a float holds 48 bits exactly


def split_of(name):
    """The split of a file or a package."""
    return "validation" if held_out(name) else "train"


def path_of(out, split):
    """Where the examples of a split are."""
    return os.path.join(out, f"{split}.jsonl")


def exists(out):
    """True if the files of both splits exist."""
    return all(os.path.exists(path_of(out, split)) for split in SPLITS)


def count_lines(out):
    """{split: lines of its file}."""
    counts = {}
    for split in SPLITS:
        with open(path_of(out, split), "rb") as f:
            counts[split] = sum(1 for _ in f)
    return counts


def write_examples(out, examples, source):
    """Writes {split: list of dicts}, shuffled, and returns {split: lines}.

    Raises ValueError, which names the source, if a split has none.
    """
    for split in SPLITS:
        if not examples[split]:
            raise ValueError(f"{source}: too little there, no examples for {split}.jsonl")

    os.makedirs(out, exist_ok=True)
    for split in SPLITS:
        lines = [json.dumps(example) + "\n" for example in examples[split]]
        random.Random(split).shuffle(lines)
        write_whole(path_of(out, split), "".join(lines))
    return count_lines(out)


def python_files(directory):
    """Paths of the .py files below a directory, relative to it and sorted; no tests."""
    paths = []
    for folder, folders, names in os.walk(directory):
        folders[:] = [n for n in folders if n not in SKIPPED_DIRECTORIES | {"test", "tests"}]
        for name in names:
            if name.endswith(".py"):
                paths.append(os.path.relpath(os.path.join(folder, name), directory))
    return sorted(paths)


def read_python(path):
    """(source, its syntax tree) of a Python file, or None if it is not Python of this version."""
    try:
        with tokenize.open(path) as f:
            source = f.read()
    except (SyntaxError, UnicodeDecodeError):  # of its encoding
        return None
    tree = parsed(source)
    return None if tree is None else (source, tree)


# ---- the language of a few lines -----------------------------------------------------------------

LINES = 8  # of a snippet
FEWEST_CHARACTERS = 60  # of a snippet
MOST_LANGUAGES = 20
FEWEST_LANGUAGES = 5
FEWEST_DOCUMENTS = 40  # of a language
FEWEST_HELD_OUT = 5  # documents of a language, below which the corpus' own split is too small
SNIPPETS = {"train": 150, "validation": 30}  # of each language

# The recipe's YAML is mostly the expected results of cloc's tests, all of one form.
REPORT = "cloc_version"

RECIPE = 'make a corpus by the recipe in corpus/README.md, "A corpus of 85 languages"'


def make_languages(out, directory="corpora/many"):
    """In which language are these lines? 180 snippets of each of up to 20 languages.

    directory: a corpus. The languages with the most documents are taken, of those that have 40
    documents and enough snippets. What the corpus holds out is held out here; if that is under five
    documents of a language, also a seventh of its other documents, by a hash of the text.
    Raises ValueError if the corpus is missing, or has under five such languages.
    """
    if exists(out):
        return count_lines(out)
    documents = read_documents(directory)

    # Lines that several documents share (a licence, a table) say little of the language.
    seen = Counter()  # snippets without digits -> documents
    for of_language in documents.values():
        for text in of_language["train"] + of_language["validation"]:
            seen.update({without_digits(snippet) for snippet in snippets_of(text)})

    examples = {split: [] for split in SPLITS}
    languages = 0
    for language, of_language in documents.items():  # the one with the most documents first
        chosen = {s: choose_snippets(of_language[s], seen, SNIPPETS[s]) for s in SPLITS}
        is_full = all(len(chosen[split]) == SNIPPETS[split] for split in SPLITS)
        if is_full and languages < MOST_LANGUAGES:
            languages += 1
            for split in SPLITS:
                examples[split] += [{"text": text, "label": language} for text in chosen[split]]
    check_languages(directory, languages)
    return write_examples(out, examples, directory)


def check_languages(directory, count):
    """Raises ValueError if a corpus has too few languages with enough text."""
    if count < FEWEST_LANGUAGES:
        words = f"{count} languages with enough documents, {FEWEST_LANGUAGES} needed"
        raise ValueError(f"{directory}: {words}; {RECIPE}")


def read_documents(directory):
    """{language: {split: texts}} of a corpus, of all languages with 40 documents, largest first.

    Raises ValueError if the corpus is missing or damaged, or has too few languages.
    """
    try:
        meta = read_meta(directory)
    except FileNotFoundError:
        raise ValueError(f"{directory}: no corpus here; {RECIPE}") from None
    counts = {name: facts["documents"] for name, facts in meta["languages"].items()}
    names = sorted(counts, key=lambda name: (-counts[name], name))
    documents = {
        name: {split: [] for split in SPLITS} for name in names if counts[name] >= FEWEST_DOCUMENTS
    }
    check_languages(directory, len(documents))

    tokenizer = Tokenizer.from_pretrained(directory)
    for split, language, tokens in tokens_of_documents(directory, meta):
        if language in documents:
            text = tokenizer.decode(tokens)
            if REPORT not in text:
                documents[language][split].append(text)

    # Fewer than five documents would be a poor picture of a language.
    for of_language in documents.values():
        if len(of_language["validation"]) < FEWEST_HELD_OUT:
            texts = of_language["train"]
            of_language["train"] = [text for text in texts if not held_out(text)]
            of_language["validation"] += [text for text in texts if held_out(text)]
    return documents


def tokens_of_documents(directory, meta):
    """Yields (split, language, tokens) of each document of a corpus, with a progress bar."""
    total = sum(meta["splits"][split]["documents"] for split in SPLITS)
    with tqdm(total=total, desc="reading", unit=" documents") as bar:
        for split in SPLITS:
            for part in open_parts(directory, split, meta):
                for number in range(len(part.language_numbers)):
                    begin, end = part.offsets[number : number + 2]
                    yield split, part.language(number), part.tokens[begin:end]
                    bar.update()


def snippets_of(text):
    """A document, cut every eight lines, each piece at 400 characters; without the tiny pieces."""
    lines = text.splitlines()
    snippets = []
    for begin in range(0, len(lines), LINES):
        piece = lines[begin : begin + LINES]
        while piece and len("\n".join(piece)) > MOST_CHARACTERS:
            piece.pop()
        snippet = "\n".join(piece).strip("\n")
        if len(snippet.strip()) >= FEWEST_CHARACTERS and re.search("[A-Za-z]", snippet):
            snippets.append(snippet)
    return snippets


def without_digits(text):
    """A text without digits and blanks, to find copies that differ only in a number."""
    return re.sub(r"[\d\s]+", "", text)


def choose_snippets(texts, seen, count):
    """Up to `count` snippets that only one of the texts has: one of each text, then another one.

    seen: a Counter, in how many documents each snippet (without digits) occurs.
    """
    queues = []  # of snippets, one for each text
    for text in sorted(texts, key=fraction_of):
        snippets = [s for s in dict.fromkeys(snippets_of(text)) if seen[without_digits(s)] == 1]
        queues.append(sorted(snippets, key=fraction_of))
    rounds = max(map(len, queues), default=0)
    in_turn = [queue[i] for i in range(rounds) for queue in queues if i < len(queue)]
    return in_turn[:count]


# ---- commented-out code --------------------------------------------------------------------------

COMMENTS = {"train": 3_000, "validation": 500}  # of each label
BUCKET = 4  # characters; the lengths of a comment and its partner are in the same bucket

PROSE = re.compile(r"\b[A-Za-z][a-z]+,? [a-z]{2,}\b")  # two words in a row
DIRECTIVE = re.compile(r"(type|noqa|pragma|pylint|mypy|ruff|fmt|flake8|isort)\b:?|[!:]|>>>|-\*-")
RULER = re.compile(r"[-=*~_]{3}")

# A line of code may need others to be whole: "else:", for instance.
FRAMES = ["{}", "{} pass", "if x: pass\n{} pass", "try: pass\n{} pass", "{} pass\nfinally: pass"]


class Comment(NamedTuple):
    """A comment line: "#  see below" is ("#  ", "see below")."""

    sign: str
    words: str


def make_commented_code(out, directory=None):
    """Is a comment line commented-out code ("code") or not ("prose")?

    Prose is comment lines of the Python files of a directory (default: the standard library), code
    is their statements. Each comment has a partner, a statement that gets its sign, is as long, and
    has brackets or equals signs if the comment has: none of these tells them apart. Files are held
    out by their names.
    Raises ValueError if there are too few.
    """
    if exists(out):
        return count_lines(out)
    directory = directory or sysconfig.get_paths()["stdlib"]
    splits = {}  # words of a comment, or a statement -> the split where it occurs first
    prose = {}  # words -> Comment
    for name in tqdm(python_files(directory), desc="reading", unit=" files"):
        module = read_python(os.path.join(directory, name))
        if module is not None:
            comments = {comment.words: comment for comment in prose_comments(module[0])}
            for text in [*comments, *statement_lines(*module)]:
                splits.setdefault(text, split_of(name))
            prose = comments | prose

    examples = {}
    for split in SPLITS:
        here = [text for text in splits if splits[text] == split]
        comments = [prose[text] for text in here if text in prose]
        code = [text for text in here if text not in prose]
        examples[split] = pair_comments(comments, code, COMMENTS[split])
    return write_examples(out, examples, directory)


def prose_comments(source):
    """The `Comment`s of a Python file that have a line for themselves, and are prose."""
    found = []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            match = re.fullmatch(r"(#[ \t]*)([^#]+)", token.string.rstrip())
            if match and is_prose(match[2]):
                found.append(Comment(*match.groups()))
    return found


def is_prose(words):
    """True for two words in a row that are neither Python, a directive nor a heading's ruler.

    >>> is_prose("Only the first of f(x) and f(y) is used."), is_prose("x = f(y)")
    (True, False)
    """
    is_text = PROSE.search(words) and not DIRECTIVE.match(words) and not RULER.search(words)
    return bool(is_text) and not is_code(words)


def is_code(line):
    """True if a line is Python, alone or as the head of a block.

    >>> is_code("x = f(y)"), is_code("elif x:"), is_code("see below")
    (True, True, False)
    """
    frames = FRAMES if line.endswith(":") else FRAMES[:1]
    return any(parsed(frame.format(line)) is not None for frame in frames)


def statement_lines(source, tree):
    """The lines of a Python file that are one statement, or the head of one; no docstrings."""
    lines = source.split("\n")  # as Python counts them
    found = []
    for node in ast.walk(tree):
        is_words = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant | ast.Name)
        if isinstance(node, ast.stmt) and not is_words and node.lineno <= len(lines):
            line = lines[node.lineno - 1].strip()
            if "#" not in line and is_code(line):
                found.append(line)
    return found


def pair_comments(prose, code, count):
    """Examples: up to `count` comments, and as many lines of code that look like them.

    prose: `Comment`s. code: lines. A comment without a partner is left out.
    """
    partners = {}  # look -> lines of code
    for line in sorted(code, key=fraction_of):
        partners.setdefault(look_of(line), []).append(line)
    examples = []
    for comment in sorted(prose, key=lambda comment: fraction_of(comment.words)):
        lines = partners.get(look_of(comment.words))
        if lines and len(examples) < 2 * count:
            examples.append({"text": comment.sign + comment.words, "label": "prose"})
            examples.append({"text": comment.sign + lines.pop(), "label": "code"})
    return examples


def look_of(line):
    """What a comment and its partner have in common: a length, and brackets or equals signs."""
    return len(line) // BUCKET, bool(re.search(r"[=()\[\]]", line))


# ---- the quality of a docstring ------------------------------------------------------------------

FUNCTIONS = {"train": 1_200, "validation": 200}  # of each score, at most
MOST_OF_HEAD = 200  # characters of a head and its docstring: mostly under 62 tokens
MOST_OF_A_PACKAGE = 300  # functions, lest a few packages be most of the data

RETURNS = re.compile(r"\b(return|yield|raise)(s|ed|ing)?\b", re.IGNORECASE)
SENTENCE_END = re.compile(r"(?<!\b\w)[.!?](?=\s|$)")  # the look-behind leaves out "e.g. "


class Function(NamedTuple):
    """A function with a docstring."""

    text: str
    docstring: str
    score: float


def make_docstring_scores(out, directories=None):
    """How good is the docstring of a function? A score from 0 to 1, by `docstring_score`.

    The text begins with the head and the whole docstring, in at most 200 characters, so that a
    model of 64 positions can see nearly all of them, and goes on with the body up to 400.

    directories: they hold packages (default: those of the running Python, its own and the installed
    ones), which are held out by their names. All scores are equally frequent if there are enough
    functions of each; the best and the worst are rare. Raises ValueError if a split has none.
    """
    if exists(out):
        return count_lines(out)
    if directories is None:
        paths = sysconfig.get_paths()
        directories = [paths["stdlib"], paths["purelib"]]
    functions = {split: [] for split in SPLITS}
    seen = set()  # docstrings: packages hold copies of one another
    for name, files in tqdm(packages(directories), desc="reading", unit=" packages"):
        functions[split_of(name)] += package_functions(files, seen)

    examples = {split: [] for split in SPLITS}
    for split in SPLITS:
        taken = Counter()  # of each score
        for function in sorted(functions[split], key=lambda function: fraction_of(function.text)):
            if taken[function.score] < FUNCTIONS[split]:
                taken[function.score] += 1
                examples[split].append({"text": function.text, "score": function.score})
    return write_examples(out, examples, ", ".join(directories))


def packages(directories):
    """[(name, paths of its files), ...] of the packages and modules in some directories."""
    found = {}  # the first of a name counts, as on Python's path
    for directory in directories:
        here = {}
        for name in sorted(os.listdir(directory)):
            path = os.path.join(directory, name)
            if name.endswith(".py"):
                here[name.removesuffix(".py")] = [path]
            elif os.path.exists(os.path.join(path, "__init__.py")) and name != "test":
                here[name] = [os.path.join(path, file) for file in python_files(path)]
        found = here | found
    return sorted(found.items())


def package_functions(files, seen):
    """`Function`s of a package, at most 300. seen: docstrings to leave out; grows."""
    found = []
    for path in sorted(files, key=lambda path: fraction_of(os.path.basename(path))):
        module = read_python(path)
        for function in file_functions(*module) if module else []:
            if function.docstring not in seen:
                seen.add(function.docstring)
                found.append(function)
        if len(found) >= MOST_OF_A_PACKAGE:
            break
    return found[:MOST_OF_A_PACKAGE]


def file_functions(source, tree):
    """The `Function`s of a file whose head and docstring have at most 200 characters."""
    lines = source.split("\n")  # as Python counts them
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        docstring = ast.get_docstring(node)
        if not docstring:
            continue
        head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].end_lineno]))
        if len(head) <= MOST_OF_HEAD:
            text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
            score = docstring_score(node.name, parameters_of(node), docstring)
            found.append(Function(text[:MOST_CHARACTERS].rstrip(), docstring, score))
    return found


def parameters_of(node):
    """The names of a function's parameters, but for self and cls. node: from ast."""
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = [argument for argument in (arguments.vararg, arguments.kwarg) if argument]
    names = [argument.arg for argument in named + starred]
    return [name for name in names if name not in ("self", "cls")]


def docstring_score(name, parameters, docstring):
    """A fifth for each of these, so 0, 0.2, ... or 1:

    - three words of four letters or more that are not in the function's name
    - at least half of the parameters, by name (also true if there are none)
    - a first line that ends with a full stop, and has 3 to 15 words
    - a form of return, yield or raise
    - two sentences

    >>> docstring_score("load_table", ["path"], "Load table")
    0.0
    >>> docstring_score("load_table", ["path"], "The rows at path. Raises OSError for none there.")
    1.0
    """
    docstring = docstring.strip()
    first_line = docstring.split("\n")[0].strip()
    words = {word.lower() for word in re.findall(r"[A-Za-z]{4,}", docstring)}
    mentioned = [parameter for parameter in parameters if mentions(docstring, parameter)]
    met = [
        sum(word not in name.lower() for word in words) >= 3,
        2 * len(mentioned) >= len(parameters),
        first_line.endswith(".") and 3 <= len(first_line.split()) <= 15,
        bool(RETURNS.search(docstring)),
        len(SENTENCE_END.findall(docstring)) >= 2,
    ]
    return sum(met) / len(met)


def mentions(text, name):
    """True if a text has this name as a word."""
    return bool(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text))
