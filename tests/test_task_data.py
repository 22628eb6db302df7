"""The data of the example tasks: balanced, held out as a whole, no label given away."""

import ast
import doctest
import json
import random
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import task_data
from corpus.store import SPLITS, PartWriter, write_meta

LANGUAGES = ["c", "go", "java", "lua", "ruby", "rust"]
LICENCE = "All of these files are free for everybody, and come without any warranty\n" * 8


def read(out):
    """{split: examples}."""
    return {
        split: [json.loads(line) for line in (out / f"{split}.jsonl").read_text().splitlines()]
        for split in SPLITS
    }


def contents(out):
    return {path.name: path.read_bytes() for path in out.iterdir()}


def texts(examples):
    return [example["text"] for example in examples]


# ---- languages -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def languages_corpus(tokenizer, tmp_path_factory):
    """A corpus of six languages. It holds out six documents of each, but only one of Rust.

    Each line of a document ends with the document's own word. Returns (path, {word: split}).
    """
    directory = str(tmp_path_factory.mktemp("corpora") / "languages")
    tokenizer.save_pretrained(directory)
    part = PartWriter(directory, 0, np.uint16)
    generator = random.Random(0)
    split_of_word = {}
    for language in LANGUAGES:
        for number in range(50):
            word = "".join(generator.choices("bcdfghjkmnpq", k=8))
            letters = generator.choices("aeiou", k=7 * task_data.LINES)
            body = "".join(f"{letter} {language} {word}\n" for letter in letters)
            is_held_out = number < (1 if language == "rust" else 6)
            split_of_word[word] = "validation" if is_held_out else "train"
            ids = tokenizer.encode(LICENCE + body)
            part.add(split_of_word[word], language, len(ids), ids)
    part.close()
    write_meta(directory, 1, {}, tokenizer, np.dtype(np.uint16), [])
    return directory, split_of_word


def test_languages_are_balanced_and_held_out_by_document(languages_corpus, tmp_path):
    directory, split_of_word = languages_corpus
    counts = task_data.make_languages(tmp_path / "a", directory)
    assert counts == {"train": 6 * 150, "validation": 6 * 30}
    examples = read(tmp_path / "a")
    for split in SPLITS:
        labels = Counter(example["label"] for example in examples[split])
        assert labels == dict.fromkeys(LANGUAGES, task_data.SNIPPETS[split])
        for example in examples[split]:
            assert 60 <= len(example["text"]) <= 400
            assert example["label"] in example["text"]
            assert "warranty" not in example["text"]  # all documents have it

    # What the corpus holds out is not trained on; of Rust, other documents are held out as well.
    words = {split: {text.split()[-1] for text in texts(examples[split])} for split in SPLITS}
    assert not words["train"] & words["validation"]
    assert {split_of_word[word] for word in words["train"]} == {"train"}
    rust = {e["text"].split()[-1] for e in examples["validation"] if e["label"] == "rust"}
    assert {split_of_word[word] for word in rust} == {"train", "validation"}


def test_the_same_corpus_gives_the_same_files_once(languages_corpus, tmp_path):
    directory, _ = languages_corpus
    counts = task_data.make_languages(tmp_path / "a", directory)
    task_data.make_languages(tmp_path / "b", directory)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    # With both files there, the corpus is not even looked at.
    assert task_data.make_languages(tmp_path / "a", "nowhere") == counts
    (tmp_path / "b" / "train.jsonl").unlink()
    task_data.make_languages(tmp_path / "b", directory)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_corpus_of_too_few_languages_is_refused(small_corpus, tmp_path):
    for directory in (small_corpus, str(tmp_path / "missing")):
        with pytest.raises(ValueError, match="corpus/README.md") as error:
            task_data.make_languages(tmp_path / "out", directory)
        message = str(error.value)
        assert message.startswith(directory) and "\n" not in message
    assert not (tmp_path / "out").exists()


@given(st.text(alphabet="ab 1\n", max_size=2000))
def test_snippets_are_pieces_of_the_text(text):
    for snippet in task_data.snippets_of(text):
        assert snippet in text
        assert len(snippet) <= 400 and len(snippet.strip()) >= 60
        assert len(snippet.splitlines()) <= task_data.LINES


# ---- commented-out code --------------------------------------------------------------------------


def test_neither_sign_nor_length_nor_brackets_tell_code_from_prose(sources, tmp_path):
    counts = task_data.make_commented_code(tmp_path / "a", sources)
    task_data.make_commented_code(tmp_path / "b", sources)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    examples = read(tmp_path / "a")
    assert counts == {split: len(examples[split]) for split in SPLITS}
    for split in SPLITS:
        assert len(examples[split]) >= 20
        looks = {"code": Counter(), "prose": Counter()}
        for example in examples[split]:
            words = example["text"].lstrip("# \t")
            sign = example["text"].removesuffix(words)
            looks[example["label"]][sign, task_data.look_of(words)] += 1
            assert task_data.is_code(words) == (example["label"] == "code")
        assert looks["code"] == looks["prose"]


def test_comments_are_held_out_by_file(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(10, 50):
        comment = f"This is the comment of module{i}.py."
        statement = f"del module{i}_".ljust(len(comment), "x")
        same = "# The same comment everywhere.\n"
        (source / f"module{i}.py").write_text(f"# {comment}\n{same}{statement}\n")
    (source / "tests").mkdir()
    (source / "tests" / "test_it.py").write_text("# This one is never read at all.\n")
    (source / "python2.py").write_text("# Neither is this one.\nprint 1\n")
    task_data.make_commented_code(tmp_path / "out", str(source))

    examples = read(tmp_path / "out")
    everything = texts(examples["train"] + examples["validation"])
    assert len(set(everything)) == len(everything)
    assert not any("never read" in text or "Neither" in text for text in everything)
    for split in SPLITS:
        for text in texts(examples[split]):
            name = re.search("module[0-9]+", text)[0]
            assert task_data.split_of(f"{name}.py") == split


def test_what_is_no_comment_in_prose():
    source = """#!/usr/bin/env of python
# -*- coding: utf-8 for all -*-
# type: ignore for now
# noqa for all of this
# ---- a ruler and words ----
# x = look(at, this)
# if not found:
x = "# a string with words"  # beside the code
#  Two words, and f(x) = 1
"""
    assert task_data.prose_comments(source) == [("#  ", "Two words, and f(x) = 1")]


def test_statements_are_single_lines_without_docstrings():
    source = '''"""Docstring."""
name
x = f(
    y)
if x:
    z = 1  # with a comment
else:
    return_it(x)
'''
    found = task_data.statement_lines(source, ast.parse(source))
    assert sorted(found) == ["if x:", "return_it(x)"]


@given(st.text(max_size=50))
def test_any_line_is_code_or_not(line):
    assert task_data.is_code(line) in (True, False)


# ---- docstrings ----------------------------------------------------------------------------------

GOOD = """Reads a table of numbers from path.

Returns them as rows. Raises OSError if there is no such file.
"""


@pytest.mark.parametrize(
    ("docstring", "score"),
    [
        ("Load table", 0),
        ("Load table.", 0),  # two words are no sentence
        ("Load the table.", 0.2),
        ("Load the table at path.", 0.4),
        ("Loads, splits, checks, e.g. for numbers", 0.2),
        ("Load path, a table; returns it", 0.4),
        (GOOD, 1),
        (GOOD.replace("path", "disk"), 0.8),
        (GOOD.replace("numbers", "numbers " * 15), 0.8),  # too long a first line
    ],
)
def test_docstring_score(docstring, score):
    assert task_data.docstring_score("load_table", ["path"], docstring) == pytest.approx(score)


@given(st.text(max_size=80))
def test_more_words_below_never_lower_a_score(docstring):
    score = task_data.docstring_score("f", ["x", "y"], docstring)
    assert score in (0, 0.2, 0.4, 0.6, 0.8, 1)
    longer = f"{docstring}\n\nSee x and y. Returns them.\n"
    if docstring.strip():
        assert task_data.docstring_score("f", ["x", "y"], longer) >= score


def test_half_of_the_parameters_are_enough():
    for parameters, is_enough in [("a b", True), ("a b c", False), ("a b c d", False), ("", True)]:
        score = task_data.docstring_score("f", parameters.split(), "a")
        assert (score == 0.2) == is_enough
    function = ast.parse("def f(self, a, /, b=1, *c, d, **e): pass").body[0]
    assert task_data.parameters_of(function) == ["a", "b", "d", "c", "e"]


def test_docstrings_are_whole_and_held_out_by_package(sources, tmp_path):
    directory = tmp_path / "packages"
    shutil.copytree(sources, directory)
    package = directory / "package"
    package.mkdir()
    long = f'def f():\n    """{"A long docstring. " * 30}"""\n'
    copied = (directory / "copy.py").read_text()
    (package / "__init__.py").write_text(f"# -*- coding: utf-8 -*-\n{long}{copied}")
    task_data.make_docstring_scores(tmp_path / "a", [str(directory)])
    task_data.make_docstring_scores(tmp_path / "b", [str(directory)])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")

    examples = read(tmp_path / "a")
    for split in SPLITS:
        files = [path for path in directory.glob("*.py") if task_data.split_of(path.stem) == split]
        code = "".join(path.read_text() for path in files)
        assert len({example["score"] for example in examples[split]}) >= 4
        for example in examples[split]:
            text = example["text"]
            assert len(text) <= 400 and "A long docstring" not in text
            assert text.split("(")[0] in code  # the package holds only copies
            try:
                function = ast.parse(text).body[0]
            except SyntaxError:  # the body is cut
                continue
            parameters = task_data.parameters_of(function)
            docstring = ast.get_docstring(function)
            score = task_data.docstring_score(function.name, parameters, docstring)
            assert score == example["score"]


def test_nothing_to_learn_from_is_refused(tmp_path):
    for make, source in [
        (task_data.make_commented_code, str(tmp_path)),
        (task_data.make_docstring_scores, [str(tmp_path)]),
    ]:
        with pytest.raises(ValueError, match="too little there"):
            make(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


def test_examples_in_docstrings():
    result = doctest.testmod(task_data)
    assert result.attempted >= 4 and not result.failed
