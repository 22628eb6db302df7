"""TODO."""

import os
import re

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


LANGUAGE_OF = {
    suffix: line.split()[0] for line in LANGUAGES.strip().split("\n") for suffix in line.split()[1:]
}


# Extensions that several languages share: (extension, what its text must match, language), the first that fits. None: a language that is
# not in the table. Verilog and MATLAB have the extension to themselves there; others that use it are recognized, and left out.
SHARED = [
    (".h", r"^[ \t]*@(interface|protocol|class|end)\b|^[ \t]*#[ \t]*import\b", None),  # Objective-C
    (
        ".h",
        r"^[ \t]*class\s+([A-Z_]\w*\s+)?\w+\s*(final\s*)?[:{;]|\bstd::|#[ \t]*include[ \t]*<\w+>",
        "cpp",
    ),
    (
        ".h",
        r"^[ \t]*(namespace\b|template[ \t]*<|using[ \t]+\w|(public|private|protected)[ \t]*:)",
        "cpp",
    ),
    (".h", "", "c"),
    (
        ".m",
        r"^[ \t]*(@(interface|implementation|protocol|class|end)\b|#[ \t]*(import|include|define)\b)",
        None,
    ),  # Objective-C
    (".m", r"^[ \t]*:-[ \t]*module\b", None),  # Mercury
    (
        ".m",
        r"\(\*.{0,200}\*\)|^[ \t]*\w+\[[^]\n]{0,80}_[^]\n]{0,80}\][ \t]*:?=|\b(Module|Block|With|BeginPackage)\[",
        "mathematica",
    ),
    (".m", r"^[ \t]*(%|function\b|classdef\b|end\b|clear\b|for\b|if\b)|;[ \t\r]*$", "matlab"),
    (
        ".v",
        r"^[ \t]*(module\s+\w+\s*(#\s*\(|[(;])|endmodule\b|`(timescale|define|include|ifdef)\b|primitive\b)",
        "verilog",
    ),
    (
        ".pl",
        r"^#!.*\b(swipl|prolog)\b|^[ \t]*:-[ \t]*\w+|^\w+\([^\n]*\)[ \t]*(:-|\.[ \t\r]*$)",
        "prolog",
    ),
    (".pl", "", "perl"),
]
SHARED = [
    (extension, re.compile(pattern.encode(), re.MULTILINE), language)
    for extension, pattern, language in SHARED
]


PERL = re.compile(
    rb"^[ \t]*(use[ \t]+(strict|warnings|\w+::|v?5)|package[ \t]+\w|my[ \t]+[$@%(]|sub[ \t]+\w+)|^#!.*\bperl\b",
    re.MULTILINE,
)


# The Stack's names of languages that differ from its directories.
NAMES = {
    "c++": "cpp",
    "c#": "c-sharp",
    "f#": "f-sharp",
    "jupyter-notebook": "jupyter",
    "objective-c++": "objective-cpp",
}


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
    return next(
        (
            LANGUAGE_OF[s]
            for suffix in suffixes
            for s in (suffix, suffix.lower())
            if s in LANGUAGE_OF
        ),
        None,
    )


def may_be_source(path):
    """Whether a file can count, by its name alone."""
    return (
        path.lower().endswith((".ipynb", *{rule[0] for rule in SHARED}))
        or language_of(path) is not None
    )
