"""Code search: words, BM25, the functions of any file, and the benchmark's pairs."""

import ast
import doctest
import json
import math
import os
import re
import time
from collections import Counter

import numpy as np
import pytest
from conftest import STDLIB
from hypothesis import example, given
from hypothesis import strategies as st

from bench import search_data
from bench.search_data import SPLITS, Package
from finetune import bm25, functions
from finetune.bm25 import BM25, words_of
from finetune.functions import functions_of, functions_under, python_functions

WORDS = st.lists(st.sampled_from(["get", "set", "file", "name", "é"]), max_size=8)


def test_examples_in_docstrings():
    for module in (bm25, functions, search_data):
        assert doctest.testmod(module).failed == 0


# ---- BM25 ----------------------------------------------------------------------------------------


@given(st.text())
def test_words_are_lower_case_letters(text):
    for word in words_of(text):
        assert len(word) >= 2 and word == word.lower()
        assert not re.search(r"[\W\d_]", word)


@given(st.lists(st.from_regex(r"[a-z]{2,5}", fullmatch=True), min_size=1))
def test_an_identifier_is_its_words_however_it_is_spelled(words):
    camel = words[0] + "".join(word.capitalize() for word in words[1:])
    for spelling in ("_".join(words), camel, "_".join(words).upper(), " ".join(words)):
        assert words_of(spelling) == words


def scores_by_the_formula(documents, query, k1, b):
    """The naive twin of `BM25.scores`."""
    mean_length = sum(map(len, documents)) / max(1, len(documents))
    scores = []
    for document in documents:
        score = 0.0
        for word in query:
            f = document.count(word)
            if f == 0:
                continue
            n = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - n + 0.5) / (n + 0.5))
            length = len(document) / mean_length
            score += idf * f * (k1 + 1) / (f + k1 * (1 - b + b * length))
        scores.append(score)
    return scores


@given(st.lists(WORDS, max_size=6), WORDS, st.floats(0, 3), st.floats(0, 1))
@example([[], []], ["get"], 1.2, 0.75)  # no document has a word
def test_bm25_is_its_formula(documents, query, k1, b):
    scores = BM25(documents, k1, b).scores(query)
    assert scores.shape == (len(documents),) and scores.dtype == np.float64
    np.testing.assert_allclose(scores, scores_by_the_formula(documents, query, k1, b), rtol=1e-9)


@pytest.mark.parametrize("parameters", [{"k1": -1}, {"k1": math.nan}, {"b": 1.5}, {"b": math.nan}])
def test_bm25_refuses_parameters_without_sense(parameters):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        BM25([["a"]], **parameters)


# ---- functions -----------------------------------------------------------------------------------

PYTHON = '''"""A module."""

try:
    def first(a):
        """Doc."""
        def inner():
            pass
        return inner
except ImportError:
    first = None


class Ring:
    size = 3

    @property
    @cache
    def full(self):
        \'\'\'
    Is it full?
    \'\'\'  # a comment
        # Another.
        return self.size == 3

    class Inner:
        async def wait(self):
            """Nothing else."""

def shared(): """Doc."""; return 1
'''

C = """#include <a.h>
/* Adds
 * two. */
static int add(struct ring *a,
               int b)
{
#ifdef X
    if (a) {
        return 1;
    } else {
        return 2;
    }
#endif
}
struct point {
    int x;
};
namespace rings {
class Ring : public Base {
 public:
  int size;
  // Pushes.
  void push(int v) {
    if (v) {
      size++;
    }
  }
  void pop()
  {
    size--;
  }
};
}
int main() {
    return 0;
}
"""


def test_python_is_parsed():
    found = functions_of("a/b.py", PYTHON)
    assert [(f.name, f.line) for f in found] == [
        ("first", 4),
        ("Ring.full", 18),
        ("Ring.Inner.wait", 26),
        ("shared", 29),
    ]
    assert found[0].text.endswith("        pass\n    return inner")  # dedented, with what is nested
    assert found[1].text.startswith("@property\n@cache\ndef full(self):\n    '''\nIs it full?")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_docstrings_are_taken_out(end):
    found = python_functions(PYTHON.replace("\n", end))
    assert [(f.name, f.line, f.docstring) for f in found] == [
        ("first", 4, "Doc."),
        ("Ring.full", 18, "Is it full?"),
    ]
    code = "@property\n@cache\ndef full(self):\n    # Another.\n    return self.size == 3"
    assert found[1].code == code


def test_a_file_that_is_not_python_has_no_python_functions():
    assert python_functions("print 'x'") == []
    assert python_functions("\0") == []


@pytest.mark.parametrize("name", ["ast", "argparse", "functools", "inspect"])
def test_code_without_docstrings_is_the_same_function(name):
    with open(os.path.join(STDLIB, f"{name}.py"), encoding="utf-8") as f:
        text = f.read()
    found = python_functions(text)
    assert len(found) > 30
    for function in found:
        node = ast.parse(function.code).body[0]
        assert node.name == function.name.split(".")[-1]
        assert ast.get_docstring(node) is None or function.docstring is None
        line = text.split("\n")[function.line - 1]
        assert re.match(rf"\s*(async )?def {node.name}\b", line)


def test_other_languages_are_cut_by_indentation():
    found = functions_of("a.cc", C)
    assert [(f.line, f.name) for f in found] == [
        (4, "static int add(struct ring *a,"),
        (15, "struct point {"),
        (23, "void push(int v) {"),
        (28, "void pop()"),
        (34, "int main() {"),
    ]
    assert found[0].text.startswith("/* Adds\n * two. */\nstatic") and found[0].text.endswith("\n}")
    assert found[2].text.split("\n")[0] == "// Pushes." and found[2].text.endswith("\n  }\n}")


def test_python_that_does_not_parse_is_cut_by_indentation():
    text = "class A:\n    def f(self):\n        print 1\n\n    def g(self):\n        print 2\n"
    assert [(f.line, f.name) for f in functions_of("a.py", text)] == [
        (2, "def f(self):"),
        (5, "def g(self):"),
    ]


def test_a_file_without_functions_is_one_piece():
    assert functions_of("a/b.py", "x = 1\n") == [("a/b.py", 1, "b.py", "x = 1\n")]
    assert functions_of("a/b.c", "int x;\n") == [("a/b.c", 1, "b.c", "int x;\n")]
    assert functions_of("a/b.c", " \n") == []


FRAGMENTS = st.sampled_from(
    "class A:|def f(a):|{|}|};|if x:|else|/*|*/|#|//|x = 1|\n|\n\t|\n  |\n    |\n        |\r\n|\r"
    '|\f|\v|\x1c|\u2028|\0|\ud800|\ufeff|é|"""|(|)|\\|@d|struct s {|async |public:|;'.split("|")
)


@given(st.one_of(st.text(), st.lists(FRAGMENTS, max_size=40).map("".join)))
@pytest.mark.parametrize("path", ["a.py", "a.c", "a"])
def test_any_text_is_cut(path, text):
    found = functions_of(path, text)
    python_functions(text)
    assert bool(found) == bool(text.strip())
    lines = re.split(r"\r\n|\r|\n", text)
    assert [f.line for f in found] == sorted(f.line for f in found)
    for function in found:
        assert function.path == path and function.name and function.text.strip()
        assert 1 <= function.line <= len(lines)
        # The line that is named is in the text, unless the file is one piece.
        if function.name != path:
            assert lines[function.line - 1].strip() in function.text


@pytest.mark.parametrize(
    "text",
    [
        "(" * 200_000,
        "-" * 200_000 + "1",
        "a." * 100_000 + "a",
        "1+" * 100_000 + "1",
        "if x:\n pass\n" + "elif x:\n pass\n" * 20_000,
        "\n".join(" " * i + "class A:" for i in range(1000)),
        "class A:\n" * 100_000,
        "# x\n" * 100_000,
        "/*" * 500_000,
        "class " * 200_000,
        "x" * 1_000_000,
        " \t" * 500_000 + "x",
    ],
    ids=lambda text: repr(text[:8]),
)
@pytest.mark.parametrize("path", ["a.py", "a.c"])
def test_deep_and_long_texts_take_linear_time(path, text):
    begin = time.process_time()
    assert functions_of(path, text)
    assert time.process_time() - begin < 5  # it takes under 0.3; quadratic would be minutes


def test_functions_under_files_and_directories(tmp_path):
    (tmp_path / "a.py").write_text("def f():\n    pass\n")
    (tmp_path / "b.c").write_bytes(b"\xef\xbb\xbfint f()\n{\n    return '\xff';\n}\n")
    (tmp_path / "c.txt").write_text("no source")
    (tmp_path / "d.py").write_bytes(b"\0")
    (tmp_path / "e.py").write_text("x = 1\n" * 200_000)
    (tmp_path / "g.json").write_text("{}")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "f.py").write_text("x = 1")
    skipped = Counter()
    found = list(functions_under([str(tmp_path), str(tmp_path / "a.py")], skipped))
    assert [f.name for f in found] == ["f", "int f()", "f"]
    assert skipped == {
        "no known extension": 1,
        "binary (a NUL byte)": 1,
        "over 1 MB": 1,
        "JSON, which has no functions": 1,
    }
    with pytest.raises(ValueError, match="nowhere: no such file"):
        list(functions_under([str(tmp_path / "nowhere")]))


# ---- the benchmark's pairs -----------------------------------------------------------------------


def package(name, *modules):
    return Package(name, "1", [os.path.join(STDLIB, f"{module}.py") for module in modules])


def pairs_in(directory):
    """{split: its pairs}"""
    pairs = {}
    for split in SPLITS:
        with open(os.path.join(directory, f"{split}.jsonl"), encoding="utf-8") as f:
            pairs[split] = [json.loads(line) for line in f]
    return pairs


# Names that are drawn for these splits.
PACKAGES = [
    package("attrs", "inspect", "ast"),
    package("python", "argparse", "calendar", "statistics"),
    package("smart-open", "zipfile"),
]


@pytest.fixture(scope="module")
def pairs_directory(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("pairs"))
    search_data.make_pairs(out, PACKAGES)
    return out


def test_pairs_are_split_by_package(pairs_directory):
    pairs = pairs_in(pairs_directory)
    packages = {split: {pair["package"] for pair in pairs[split]} for split in SPLITS}
    assert packages == {"train": {"python"}, "validation": {"smart-open"}, "test": {"attrs"}}
    for pair in sum(pairs.values(), []):
        assert 3 <= len(pair["query"].split()) <= 40
        assert pair["query"] == " ".join(pair["query"].split())
        assert ast.get_docstring(ast.parse(pair["code"]).body[0]) is None
    queries = [pair["query"] for pair in sum(pairs.values(), [])]
    assert len(queries) == len(set(queries)) > 100


def test_pairs_are_made_once(pairs_directory, tmp_path):
    path = os.path.join(pairs_directory, "train.jsonl")
    before = os.stat(path)
    counts = search_data.make_pairs(pairs_directory, PACKAGES)
    assert counts == {split: len(rows) for split, rows in pairs_in(pairs_directory).items()}
    assert os.stat(path).st_mtime_ns == before.st_mtime_ns

    # The order in which the packages are found changes nothing; another version does.
    search_data.make_pairs(str(tmp_path), PACKAGES[::-1])
    assert pairs_in(tmp_path) == pairs_in(pairs_directory)
    newer = [PACKAGES[0]._replace(version="2"), PACKAGES[1]._replace(files=[]), PACKAGES[2]]
    assert search_data.make_pairs(str(tmp_path), newer)["train"] == 0


def test_no_twin_is_in_two_splits(tmp_path):
    # Other docstrings, and a comment more in some functions.
    original = package("python", "inspect")
    with open(original.files[0], encoding="utf-8") as f:
        text = f.read()
    text = text.replace('"""Return', '"""Give back').replace("return None", "return None  # none")
    (tmp_path / "twin.py").write_text(text, encoding="utf-8")
    twin = Package("attrs", "1", [str(tmp_path / "twin.py")])

    alone = search_data.make_pairs(str(tmp_path / "alone"), [twin])
    both = search_data.make_pairs(str(tmp_path / "both"), [twin, original])
    assert alone["test"] > 30
    assert both["train"] > 30 and both["test"] == 0


def test_a_large_package_is_limited(tmp_path, pairs_directory):
    counts = search_data.make_pairs(str(tmp_path), PACKAGES, most=5)
    assert counts == {"train": 5, "validation": 5, "test": 5}
    every = pairs_in(pairs_directory)["train"]
    assert all(pair in every for pair in pairs_in(tmp_path)["train"])


@pytest.mark.parametrize(
    "code",
    [
        '"""Adds two numbers."""\n    pass\n    # todo',
        '"""Adds two numbers."""\n    raise NotImplementedError(\n    )',
        '"""Adds two numbers."""\n    return a + b',
        '"""Adds."""\n    c = a + b\n    return c',
        '"""Deprecated: adds two numbers."""\n    c = a + b\n    return c',
        '""">>> add(1, 2) is three\n    3\n    """\n    c = a + b\n    return c',
        '"""Сложить два числа."""\n    c = a + b\n    return c',
        "c = a + b\n    return c",
    ],
)
def test_what_is_no_pair(tmp_path, code):
    file = tmp_path / "add.py"
    good = 'def plus(a, b):\n    """Adds two numbers."""\n    c = a + b\n    return c\n'
    for text, expected in [(f"def add(a, b):\n    {code}\n", 0), (good, 1)]:
        file.write_text(text, encoding="utf-8")
        packages = [Package("python", str(expected), [str(file)])]
        assert search_data.make_pairs(str(tmp_path / "out"), packages)["train"] == expected


def test_words_that_a_query_shares_with_its_code():
    pairs = [
        {"query": "Removes the stopped timers.", "code": "def stop(timer): removing(timer)"},
        {"query": "Removes a timer.", "code": "def remove(clock): pass"},
        {"query": "Removes a timer.", "code": "def drop(clock): pass"},
        {"query": "Get the class.", "code": "def f(): pass"},
    ]
    assert search_data.words_found(pairs) == [1, 0.5, 0, 1]
    assert search_data.words_missing(pairs) == [False, False, True, False]


def test_installed_packages():
    packages = search_data.installed_packages()
    names = [package.name for package in packages]
    assert names == sorted(set(names)) and {"python", "numpy", "tqdm"} <= set(names)
    for package in packages:
        assert package.version and package.files
        assert not any("/tests/" in path for path in package.files)
