"""The language of a file: by its name, or by its text if several languages share the extension.

`languages.txt` lists the 88 languages and their extensions. Four extensions belong to more than one
language: `.h`, `.m`, `.pl` and `.v`. Rules on the text decide about these, as in GitHub's Linguist.

Left out: scripts without an extension, which Linguist knows by their first line.
"""

import os
import pathlib
import re

LANGUAGE_OF = {}  # extension or file name -> language
for line in pathlib.Path(__file__).with_name("languages.txt").read_text().splitlines():
    if not line.startswith("#"):
        name, *endings = line.split()
        LANGUAGE_OF.update(dict.fromkeys(endings, name))

# The rules of a shared extension: (what the text must contain, language). The first that fits
# decides. None is a language outside of the table; such a file is left out.
SHARED = {
    ".h": [
        # Objective-C
        (rb"^[ \t]*@(interface|protocol|class|end)\b|^[ \t]*#[ \t]*import\b", None),
        # A class, and not the word in a comment; std::; a header of the standard library
        (rb"^[ \t]*class\s+([A-Z_]\w*\s+)?\w+\s*(final\s*)?[:{;]", "cpp"),
        (rb"\bstd::|#[ \t]*include[ \t]*<\w+>", "cpp"),
        (rb"^[ \t]*(namespace\b|template[ \t]*<|using[ \t]+\w)", "cpp"),
        (rb"^[ \t]*(public|private|protected)[ \t]*:", "cpp"),
        (rb"", "c"),
    ],
    ".m": [
        # Objective-C, Mercury
        (rb"^[ \t]*@(interface|implementation|protocol|class|end)\b", None),
        (rb"^[ \t]*#[ \t]*(import|include|define)\b", None),
        (rb"^[ \t]*:-[ \t]*module\b", None),
        # (* a comment *), f[x_] := ..., Module[...]
        (rb"\(\*.{0,200}\*\)", "mathematica"),
        (rb"^[ \t]*\w+\[[^]\n]{0,80}_[^]\n]{0,80}\][ \t]*:?=", "mathematica"),
        (rb"\b(Module|Block|With|BeginPackage)\[", "mathematica"),
        (rb"^[ \t]*(%|function\b|classdef\b|end\b|clear\b|for\b|if\b)|;[ \t\r]*$", "matlab"),
    ],
    ".pl": [
        (rb"^[ \t]*use[ \t]+(strict|warnings|\w+::|v?5)|^#!.*\bperl\b", "perl"),
        (rb"^[ \t]*(package[ \t]+\w|my[ \t]+[$@%(]|sub[ \t]+\w+)", "perl"),
        # :- a directive; a rule or a fact
        (rb"^#!.*\b(swipl|prolog)\b|^[ \t]*:-[ \t]*\w+", "prolog"),
        (rb"^\w+\([^\n]*\)[ \t]*(:-|\.[ \t\r]*$)", "prolog"),
        (rb"", "perl"),
    ],
    ".v": [  # not V, not Coq
        (rb"^[ \t]*(module\s+\w+\s*(#\s*\(|[(;])|endmodule\b|primitive\b)", "verilog"),
        (rb"^[ \t]*`(timescale|define|include|ifdef)\b", "verilog"),
    ],
}

# The names in The Stack's records that differ from its directories by more than case and spaces.
IRREGULAR = {"c++": "cpp", "c#": "c-sharp", "f#": "f-sharp", "objective-c++": "objective-cpp"}

# Directories of other people's files, or of none that are sources. They are not entered.
SKIPPED_DIRECTORIES = {"site-packages", "dist-packages", "node_modules", "__pycache__", ".git"}


def language_of(path, content=b""):
    """The language of a file, or None: by its whole name, else by its longest known extension.

    content: bytes. The first 20,000 decide between languages that share an extension.

    >>> language_of("src/Makefile"), language_of("index.rst.txt"), language_of("A.PY")
    ('makefile', 'restructuredtext', 'python')
    >>> language_of("a.h"), language_of("a.h", b"namespace a {}"), language_of("a.xyz")
    ('c', 'cpp', None)
    """
    name = os.path.basename(path)[-100:]  # a name of a million dots has a million endings

    extension = os.path.splitext(name)[1]
    if extension not in LANGUAGE_OF:
        extension = extension.lower()
    if extension in SHARED:
        for pattern, language in SHARED[extension]:
            if re.search(pattern, content[:20_000], re.MULTILINE):
                return language
        return None

    for ending in [name] + [name[i:] for i, character in enumerate(name) if character == "."]:
        for spelling in (ending, ending.lower()):  # .C is C++, .c is C; .PY is .py
            if spelling in LANGUAGE_OF:
                return LANGUAGE_OF[spelling]
    return None


def may_be_source(path):
    """True if a file may have a language, or is a notebook, by its name alone."""
    return path.lower().endswith((".ipynb", *SHARED)) or language_of(path) is not None


def language_named(name):
    """The Stack's directory of a language, given the name that its records have for it.

    >>> language_named("C++"), language_named("Jupyter Notebook")
    ('cpp', 'jupyter-notebook')
    """
    name = name.lower().replace(" ", "-")
    name = name.encode(errors="replace").decode()  # JSON can spell half a surrogate pair
    return IRREGULAR.get(name, name)
