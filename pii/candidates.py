"""Proposing where a key or a password may stand, for a model to judge.

    candidates(text)            [Candidate, ...] of a text, sorted, without overlaps
    refused(value, category)    True for what is no secret by its shape: an identifier, a type, ...

A secret most often has a lead: a name that says what it is, in one of the ways to give a name a
value, or a phrase such as `curl -u user:`. A few have none, and look random. `candidates.txt` lists
names, syntaxes, phrases and refusals; its header says how it is read.

One search over the text finds the literal stems of all leads, such as "pass" and "token". Only
there the costly expressions are tried, and each of them looks at a bounded stretch of text, so the
time is in proportion to its size, whatever it is: files come from strangers.
"""

import functools
import re
from pathlib import Path
from typing import NamedTuple

from pii.look import lower_case
from pii.rules import join

# ---- reading candidates.txt ----------------------------------------------------------------------


class Phrase(NamedTuple):
    """A lead of its own."""

    name: str
    category: str
    pattern: re.Pattern  # matches from the stem on


def read_sections():
    """{section: [line, ...]} of candidates.txt; what is indented goes on with the line above."""
    sections = {}
    for line in Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").split("\n"):
        if line.startswith("["):
            lines = sections.setdefault(line.strip("[]"), [])
        elif line.startswith("  "):
            lines[-1] += line
        elif line and not line.startswith("#"):
            lines.append(line)
    return sections


def read_words(lines):
    """{kind: [word, ...]} of lines `kind: a | b | c`."""
    words = {}
    for line in lines:
        kind, _, alternatives = line.partition(": ")
        words.setdefault(kind, []).extend(alternatives.split(" | "))
    return words


def read_patterns(lines, parts):
    """{name: pattern} of lines `name: pattern`, with each {part} replaced."""
    patterns = {}
    for line in lines:
        name, _, pattern = line.partition(": ")
        for part, its_pattern in parts.items():
            pattern = pattern.replace(f"{{{part}}}", its_pattern)
        patterns[name] = pattern
    return patterns


def read_parts(lines):
    """{name: pattern} of the section [parts], in which a part may hold an earlier one."""
    parts = {}
    for line in lines:
        parts |= read_patterns([line], parts)
    return parts


def compiled(pattern):
    """A pattern of leads, which take capitals and small letters alike."""
    return re.compile(pattern, re.VERBOSE | re.IGNORECASE)


def any_of(patterns):
    """One expression for all patterns of a section."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns), re.VERBOSE | re.DOTALL)


SECTIONS = read_sections()
WORDS = read_words(SECTIONS["words"])
PARTS = read_parts(SECTIONS["parts"])
SYNTAXES = {
    name: compiled(pattern) for name, pattern in read_patterns(SECTIONS["syntaxes"], PARTS).items()
}
REFUSED = any_of(read_patterns(SECTIONS["refused"], PARTS).values())
BARE = any_of(read_patterns(SECTIONS["bare"], PARTS).values())
PLACEHOLDERS = frozenset(WORDS["PLACEHOLDER"])
THINGS = frozenset(WORDS["THING"])
PROSE = frozenset(WORDS["PROSE"])
CHECKSUMS = frozenset(WORDS["CHECKSUM"])
ABOUT = frozenset(WORDS["ABOUT"])
NEVER = frozenset(WORDS["NEVER"])


def read_phrases():
    """{stem: [Phrase, ...]}."""
    phrases = {}
    for head, pattern in read_patterns(SECTIONS["phrases"], PARTS).items():
        name, category, stem = head.split(" ", 2)
        phrases.setdefault(stem, []).append(Phrase(name, category, compiled(pattern)))
    return phrases


PHRASES = read_phrases()
NAME_WORDS = [*WORDS["PASSWORD"], *WORDS["KEY"], *WORDS["WEAK"]]


def stem_of(word):
    """The part of a word by which it is searched for: of api_key, "key", which is a name itself."""
    parts = word.split("_")
    names = [part for part in parts if part in NAME_WORDS]
    return max(names or parts, key=len)


def shortest(words):
    """The words that hold no other one of them."""
    return {word for word in words if not any(other in word for other in words - {word})}


NAME_STEMS = shortest({stem_of(word) for word in NAME_WORDS})
STEMS = sorted(NAME_STEMS | PHRASES.keys())

# ---- names ---------------------------------------------------------------------------------------

CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[-.$]+")


def name_pattern(words):
    """Matches a name in snake case that ends with one of the words, whatever begins it.

    Its group `rest` is what comes behind: of password_2_field, `_2_field`.
    """
    # A long word may be glued to what is before it, a short one only to some words.
    longest_first = sorted(words, key=len, reverse=True)
    long_words = "|".join(word.replace("_", "_?") for word in longest_first if len(word) > 5)
    short_words = "|".join(word.replace("_", "_?") for word in longest_first if len(word) <= 5)
    glued = "|".join(sorted(WORDS["GLUED"], key=len, reverse=True))
    return re.compile(
        rf"(?P<before>.*?) (?: {long_words} | (?: (?<![a-z]) | (?:(?<![a-z])(?:{glued})) )"
        rf" (?:{short_words}) ) s? \d* (?P<rest> (?:_.*)? )",
        re.VERBOSE,
    )


NAME_PATTERNS = {kind: name_pattern(WORDS[kind]) for kind in ("KEY", "PASSWORD", "WEAK")}


@functools.lru_cache(maxsize=1 << 16)
def kind_of(name):
    """KEY, PASSWORD or WEAK for an identifier that sounds secret; None for any other.

    >>> [kind_of(name) for name in ("mySqlPwd", "X-Api-Key", "sort_key", "password_field")]
    ['PASSWORD', 'KEY', None, None]
    """
    snake = CAMEL.sub("_", name).lower().strip("_")
    best = None
    for kind, pattern in NAME_PATTERNS.items():
        match = pattern.fullmatch(snake)
        while match:
            rest = match["rest"]
            words_after = set(rest.split("_"))
            words_before = match["before"].split("_")
            # Of two names in one the last says what it is: password_reset_token is a token.
            if not words_after & ABOUT and not NEVER & {words_before[0], words_before[-1]}:
                if best is None or len(rest) < best[0]:
                    best = (len(rest), kind)
            match = pattern.fullmatch(snake, len(snake) - len(rest)) if rest else None
    return best and best[1]


def category_of(kind):
    """The category of what has a name of this kind."""
    return "PASSWORD" if kind == "PASSWORD" else "KEY"


# ---- values --------------------------------------------------------------------------------------

RUNS = re.compile(r"[A-Z]?[a-z]+|[A-Z]+|\d+")
HEX = re.compile(r"[0-9a-fA-F]+")
UUID = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")
SERIES = re.compile(r"0123456|12345678|abcdefg|ABCDEFG")
SEVERAL_WORDS = re.compile(
    r"[A-Za-z]+(?:[_.:-][A-Za-z]+)+|[a-z]+(?:[A-Z][a-z]+)+|(?:[A-Z][a-z]+){2,}"
)
IDENTIFIER = re.compile(r"[A-Za-z_]\w*")
ASSIGNED = re.compile(r"-{0,2}[A-Za-z_.-]+[=+*][\w.]*$")
SIGN_INSIDE = re.compile(r"\w[!#$%^&*+=@?~]+\w")


def looks_random(value):
    """True if letters and digits, capitals and small letters change as often as by chance."""
    if UUID.search(value) or SERIES.search(value) or value.startswith("0x"):
        return False
    if HEX.fullmatch(value):
        digits = sum(map(str.isdigit, value))
        return len(value) >= 16 and 0.35 < digits / len(value) < 0.9 and len(set(value)) > 7

    # Base64 may have a few signs inside; words that are joined by them are short.
    part = max(re.split(r"[^A-Za-z\d]", value), key=len)
    runs = RUNS.findall(part)
    if len(part) < 10 or len(set(part)) < 8 or not any(map(str.isdigit, part)):
        return False
    # A run is a word of an identifier, or what chance puts together: two characters on average,
    # and four without small letters and few digits, as in base32.
    one_case = part.isupper() or part.islower()
    return len(runs) > 4 and len(part) < (4.6 if one_case else 3) * len(runs)


def says_it_is_none(value):
    """True for a placeholder: the name of the thing itself, `none`, a type."""
    folded = value.casefold()
    return folded in PLACEHOLDERS or re.sub(r"[-_. ]", "", folded) in PLACEHOLDERS


def names_a_thing(value, category):
    """True for identifiers of several words, such as password_field, but not for pass phrases."""
    if not SEVERAL_WORDS.fullmatch(value):
        return False
    words = CAMEL.sub("_", value).replace(":", "_").lower().split("_")
    # Random letters look like words of a camel: kaIRYxbIaU.
    if len(value) < 3.5 * len(words):
        return False
    if not value.islower() and (category == "KEY" or value.isupper()):
        return True
    return not THINGS.isdisjoint(words)


def is_sentence(value, category):
    """True for text with blanks that is no pass phrase."""
    words = value.casefold().split()
    if len(words) < 2:
        return False
    return category == "KEY" or len(words) > 8 or not PROSE.isdisjoint(words)


def refused(value, category, bare=False):
    """True for a value that is no secret by its shape.

    bare: it stands without quotes, so it may be an identifier of the program.
    """
    if len(value) < (8 if category == "KEY" else 3) or value != value.strip():
        return True
    if says_it_is_none(value) or is_sentence(value, category):
        return True
    if looks_random(value) and category == "KEY" and " " not in value and "(" not in value:
        return "://" in value or value.startswith(("sha", "ssh-", "data:"))
    if REFUSED.fullmatch(value) or names_a_thing(value, category):
        return True
    return bare and bool(BARE.fullmatch(value))


# ---- names and their values ----------------------------------------------------------------------


class Candidate(NamedTuple):
    """A place where a secret may stand."""

    start: int  # in characters
    end: int  # behind the last
    category: str  # KEY or PASSWORD, as its lead says
    rule: str  # the syntax or the phrase that led here, or "random"


NAME_LENGTH = 64  # of the longest name
NAME_SIGNS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-"
LOOK_BACK = 100  # how far a line is looked at before a name

# What stands before a name where a line of a configuration file begins.
LINE_START = re.compile(
    r"""\s* (?: (?: //+ | \#+ | \*+ | -- | ;+ | % | REM\s | > | - | \d+[.)] | \$ ) \s* )?
        (?: (?: export | set | setx | env | arg | setenv | define ) \s+ )?
        ["']? [\w.:/-]{0,80} """,
    re.VERBOSE | re.IGNORECASE,
)


def name_around(text, at, stem):
    """(start, end) of the identifier around a stem; it may go on beyond NAME_LENGTH."""
    before = text[max(0, at - NAME_LENGTH) : at]
    after = text[at + len(stem) : at + NAME_LENGTH]
    start = at - len(before) + len(before.rstrip(NAME_SIGNS))
    if text[start - 1 : start] == "\\" and start < at:  # the n of a line break in a string
        start += 1
    return start, at + len(stem) + len(after) - len(after.lstrip(NAME_SIGNS))


def line_before(text, at):
    r"""What stands before a place in its line, at most LOOK_BACK characters.

    In a string a line ends with a literal \n.
    """
    return re.split(r"\n|\\n", text[max(0, at - LOOK_BACK) : at])[-1]


def line_behind(text, at):
    """What stands behind a place in its line, at most LOOK_BACK characters."""
    return re.match(r"[^\r\n]*", text[at : at + LOOK_BACK])[0]


def closes(text, start, match):
    """True if the quote that seems to open a value closes the string that the name is in."""
    mark = match["quote"]
    if mark in text[match.start() : match.start("quote")]:
        return False
    before = line_before(text, start)
    if mark == "'":
        before = re.sub(r"\w'\w", "", before)  # don't
    # Not those with a backslash, nor of a longer mark.
    return len(re.findall(rf"(?<!\\){re.escape(mark)}", before)) % 2 == 1


# Ends a value that is one of several in a line: user=x;password=y, ?key=x&page=2
NEXT = re.compile(r"[;,|)\]}]|&[\w.%-]*=|&amp;")
NEXT_NAME = re.compile(r",\w+[:=]")

# What may follow a value without quotes, in a string, a URL, a connection string, a command.
ENDS = ("", ";", "&", '"', "'", "`", "\\", "<", "-", "}")


def trimmed(value, one_of_several):
    """A bare value without what ends it."""
    value = NEXT_NAME.split(value, maxsplit=1)[0]
    if one_of_several:
        value = NEXT.split(value, maxsplit=1)[0]
    return value.rstrip(",;.")


def is_marked(value):
    """True for what no word of a sentence and no plain identifier looks like: Kroep3, a#bc."""
    if not any(map(str.isalpha, value)):
        return False
    digit = any(map(str.isdigit, value))
    return digit or bool(SIGN_INSIDE.search(value)) or len(value) > 7 and is_mixed(value)


def is_mixed(value):
    """True if capitals stand as by chance: RPLCxrWoE, not as in words: userName, OpenBSD."""
    return bool(value.isalpha() and re.search(r"[a-z][A-Z]{2,}[a-z]", value))


class Line(NamedTuple):
    """The line in which a name has a value without quotes."""

    begins: bool  # with the name, apart from a sign of a comment, `export` and the like
    is_option: bool  # --name
    is_tight: bool  # no blank before the value
    is_setting: bool  # nothing else is in the line
    ends_here: bool  # the value of an option, or without blanks around it
    behind: str  # what is behind the value, without blanks at the ends


def may_be_bare(value, category, line):
    """True if a value without quotes is rather a word than a variable. line: a `Line`."""
    has_digit = any(map(str.isdigit, value))
    if category == "KEY" and not has_digit and not (line.is_tight and line.is_setting):
        return False
    if not IDENTIFIER.fullmatch(value):
        return True
    # password = pw, f(password=pw), password: Password; but Server=x;Password=word;
    if line.behind[:1] in (",", ")", ";") and (line.begins or not has_digit):
        return line.is_tight and line.behind[0] == ";"
    if has_digit:
        sure = line.is_tight or line.is_option or line.behind[:1] in ('"', "'")
        return category == "PASSWORD" or sure or looks_random(value) or line.is_setting
    return line.is_setting or line.ends_here or is_mixed(value)


def bare_value(text, start, match, kind):
    """(start, end) of a value without quotes, of a name that begins at `start`; or None."""
    group = "bare" if match.groupdict().get("bare") else "argument"
    first = match.start(group)
    begins = bool(LINE_START.fullmatch(line_before(text, start)))
    is_option = text[start : start + 1] == "-"
    value = trimmed(match[group], one_of_several=not begins and not is_option)
    end = first + len(value)
    behind = line_behind(text, end).strip()
    is_tight = group == "bare" and text[first - 1 : first] in ("=", ":")
    line = Line(
        begins=begins,
        is_option=is_option,
        is_tight=is_tight,
        is_setting=begins and (not behind or behind.startswith(("#", "//", "*/", "\\", '"', "'"))),
        ends_here=behind[:1] == "}" or (is_tight or is_option) and behind[:1] in ENDS,
        behind=behind,
    )
    category = category_of(kind)
    if group == "argument" and not is_option:
        return None
    in_code = behind[:1] in ("(", "[", "<", ">") and behind[:2] != "</"
    # In a file of settings, unlike in a program, top_secret is no variable.
    is_word = (
        line.is_setting and value.islower() and (is_tight or ":" in text[match.start() : first])
    )
    if in_code or refused(value, category, bare=not is_word):
        return None
    return (first, end) if may_be_bare(value, category, line) else None


def spoken_value(text, match, category):
    """(start, end) of a value that a sentence names without quotes, or None."""
    value = match["spoken"].rstrip(".,;:)")
    first = match.start("spoken")
    # Not the next word of a sentence, nor `flags=x` behind "pass".
    if not is_marked(value) or ASSIGNED.match(value) or refused(value, category, bare=True):
        return None
    if category == "KEY" and not looks_random(value):
        return None
    return first, first + len(value)


def place_of(text, start, match, kind):
    """(start, end) of the value in a match of a lead that begins at `start`; None if it is none."""
    groups = match.groupdict()
    category = category_of(kind)
    if groups.get("bare") or groups.get("argument"):
        place = bare_value(text, start, match, kind)
    elif groups.get("spoken"):
        place = spoken_value(text, match, category)
    else:
        group = "random" if groups.get("random") else "value"
        place = match.span(group)
        value = match[group]
        if groups.get("quote") and closes(text, start, match):
            return None
        if refused(value, category) or group == "random" and not looks_random(value):
            return None
    if place and kind == "WEAK" and not looks_random(text[slice(*place)]):
        return None
    return place


# Syntaxes in which a plain word such as "pass" most often is no name.
SPOKEN = ("apart", "call", "pair", "phrase", "prose", "parentheses")
PLAIN_WORDS = ("pass", "Pass", "auth", "token", "tokens", "credential", "pin")

# Before a string: another one and a comma, as in a list, or what has it as its value.
IN_LIST = re.compile(r"""(?:["'`]\s*,|[:=])\s*["'`]$""")


def is_no_name(text, start, end, rule, kind, value):
    """True if text[start:end] only looks like the name of a value in this syntax."""
    if rule == "pair" and IN_LIST.search(text[max(0, start - 40) : start]):
        return True  # in ["id", "password", "city"]
    if rule == "parentheses" and kind != "PASSWORD":  # parse_token(line)
        return True
    return rule in SPOKEN and text[start:end] in PLAIN_WORDS and not is_marked(value)


def is_unpacked(text, start, end, value):
    """True if as many names stand before text[start:end] as values before the one at `value`."""
    return line_before(text, start).count(",") == text[end:value].count(",")


def named(text, start, end):
    """The Candidate of the value that the name text[start:end] has; None if there is none."""
    kind = kind_of(text[start:end]) if end - start < NAME_LENGTH else None
    if not kind:
        return None
    for rule, pattern in SYNTAXES.items():
        match = pattern.match(text, end)
        place = match and place_of(text, start, match, kind)
        if rule == "unpacked" and place and not is_unpacked(text, start, end, place[0]):
            continue
        if place and not is_no_name(text, start, end, rule, kind, text[slice(*place)]):
            return Candidate(*place, category_of(kind), rule)
    return None


# ---- leads, and no lead --------------------------------------------------------------------------

# A long word between quotes, or behind one of the signs that lead to a value; not a key of a dict.
RANDOM = re.compile(
    r"""["'`=:>\s] (?P<value> [A-Za-z0-9+/] [A-Za-z0-9+/_-]{19,}+ ={0,2} )
        (?! [\w@(\[:] | \.\w | ["'`][ ]?[:(] )""",
    re.VERBOSE,
)

# A line that holds but one of them: of a picture or a certificate, if the lines around do too.
DATA = re.compile(
    r"""\s*[*#/]{0,2}\s?[\w(]{0,8}["'`]?[A-Za-z0-9+/_-]{16,}={0,2}(\\n)?["'`]?\s?[+,.&\\);]*\s*"""
)


def stems_in(lowered):
    """[(place, stem), ...] of a text in lower case, sorted.

    One search for each is several times as fast as an expression that looks for all of them.
    """
    found = []
    for stem in STEMS:
        at = lowered.find(stem)
        while at >= 0:
            found.append((at, stem))
            at = lowered.find(stem, at + 1)
    return sorted(found)


def led(text):
    """Two lists of Candidates: by phrases, and by names."""
    by_phrase = []
    by_name = []
    done = 0  # up to here names have been looked at
    for at, stem in stems_in(lower_case(text)):
        for phrase in PHRASES.get(stem, ()):
            match = phrase.pattern.match(text, at)
            place = match and place_of(text, at, match, phrase.category)
            if place:
                by_phrase.append(Candidate(*place, phrase.category, phrase.name))
        if stem in NAME_STEMS and at >= done:
            first, last = name_around(text, at, stem)
            found = named(text, first, last)
            done = last
            if found:
                by_name.append(found)
    return by_phrase, by_name


def is_data(text, start, end):
    """True if text[start:end] is alone in its line, and so is what is in the next or the last."""
    first = text.rfind("\n", max(0, start - 40), start) + 1
    last = text.find("\n", end, end + 40)
    line_is_its = DATA.fullmatch(text[first:last]) if first and last > 0 else None
    if not line_is_its:
        return False
    before = text[max(0, first - 200) : first - 1].rpartition("\n")[2]
    behind = text[last + 1 : last + 200].partition("\n")[0]
    return bool(DATA.fullmatch(before) or DATA.fullmatch(behind))


def unled(text):
    """[Candidate, ...] of what looks random, without a name for it."""
    found = []
    for match in RANDOM.finditer(text):
        value = match["value"]
        if len(value) > 512 or not looks_random(value) or is_data(text, *match.span("value")):
            continue
        # Numbers of objects and commits are hexadecimal; a word before a ) or ; is an identifier.
        is_bare = match[0][0].isspace()
        if HEX.fullmatch(value) and (is_bare or len(value) in (24, 40)):
            continue
        if is_bare and text[match.end() : match.end() + 1] in (")", ";"):
            continue
        before = line_before(text, match.start("value"))[-40:]
        if CHECKSUMS.isdisjoint(re.findall(r"[a-z]+\d*", CAMEL.sub("_", before).lower())):
            found.append(Candidate(*match.span("value"), "KEY", "random"))
    return found


def candidates(text):
    """[Candidate, ...] of a text, sorted, without overlaps."""
    by_phrase, by_name = led(text)
    return join(by_phrase, by_name, unled(text))
