"""What the model gets to see of a text: blocks of lines in which there may be something.

    blocks(text)                  [(start, end), ...]: all of it, some lines each
    leads(text)                   where something may stand: cheap, and more often wrong than right
    blocks_with(blocks, places)   those in which one of the places lies

Most code holds nothing, and a model takes fifty times as long as a regular expression. A block is
the same whatever is looked for, and the model sees each on its own. So what the model says of a
block does not depend on what else is looked at, and the loss is what stands in the other blocks:
`python -m bench pii` measures it.
"""

import bisect
import re

BLOCK = 320  # characters, about a hundred tokens of code

# Two words with a capital, as a full name has, or letters that English lacks.
NAMES = re.compile(
    r"[A-Z\u00c0-\u00de\u0100-\u024f][a-z\u00df-\u024f]{1,30}(?: [A-Z]\.)?"
    r" (?:[a-z]{2,3} )?[^\W\d_a-z][^\W\d_]"
    r"|[A-Z]\. [A-Z][a-z]|[^\W\d_a-zA-Z]{2}"
)

# They may be a person's if one of these stands near them in their line, or a year,
PERSON = (
    "author copyright (c) © contributor maint thank credit review signed name @ owner contact dear"
    " patch courtesy inspired regards created written assign talk patient employee recipient"
    " algorithm 作者 автор"
).split() + ["by ", "by:", "ask ", "based on"]
YEAR = re.compile(r"[12]\d{3}")
# or if they fill a field of a table, a list or a string.
FIELD_BEGIN = re.compile(r"[\"'`|>,;(\[{\t][ ]?$|(?:^|\n)[ ]*(?:[-*] )?$")
FIELD_END = re.compile(r"[\w'.-]*(?: [\w'.-]+)? ?(?:[\"'`|<,;)\]}\t\r\n]|$)")

# A user name may stand behind one of these words: {word, in lower case: what must follow it}. Words
# are found by `str.find`, which is some twenty times as fast as an expression with alternatives.
ASSIGNED = r"[\w.]{0,20}[\"'\])]{0,3}\s{0,3}(?:(?:[:=]>?|:=|=>)\s{0,3})?\\?[\"'][A-Za-z]"
BARE = r"[\w.-]{0,20}(?: |: |=| = |>)(?=[\w.-]{0,40}[a-z])[\w.-]{1,60}[ \t]{0,3}(?:$|[\n\r,;&<])"
SPOKEN = r" @?[a-z]+[\d_-]"
ACCOUNTS = {
    **dict.fromkeys(["user", "login", "owner"], f"{ASSIGNED}|{BARE}|{SPOKEN}"),
    **dict.fromkeys(["account", "nick", "handle", "assign", "uid", "creat"], ASSIGNED),
    **dict.fromkeys(["todo", "fixme", "xxx", "hack"], r"\W{0,2}[(@]\s?\w"),
    **dict.fromkeys(["/home/", "/users/", "\\users\\"], r"\w"),
    **dict.fromkeys(["github.com", "gitlab.com", "bitbucket.org", "twitter.com"], r"[/:]\w"),
    **dict.fromkeys(["created by ", "edited by ", "approved by ", "merged by "], r"@?[a-z]"),
    **dict.fromkeys(["reported by ", "modified by ", "session of ", "chown ", "by @"], r"[a-z]"),
    **dict.fromkeys(["log in as ", "su - ", "fixed by ", "cc: ", "$id:", "actingas("], r"."),
    **dict.fromkeys([" @", "(@", "[@"], r"[A-Za-z0-9]"),
    # A password that `candidates` does not see, as in prose.
    **dict.fromkeys(
        ["password", "passwd", "pwd", "pw="],
        r"[\w\"':=\])({.>-]{0,12}\s{0,3}[\"'(]?[\w.]{0,40}\d",
    ),
}
ACCOUNTS = {word: re.compile(follows, re.IGNORECASE) for word, follows in ACCOUNTS.items()}
# Words of documentation that stand behind an @: annotations and decorators, no accounts.
NO_ACCOUNT = re.compile(
    r"[ (]@(?:param|returns?|throws?|exception|see|since|code|link|type(?:def)?|prop(?:erty)?|brief"
    r"|dev|test|override|private|public|inherit\w*|deprecated|example|var|internal|method|class"
    r"|template|extends|default|ignore|note)\b"
)


def lower_case(text):
    """The text in small letters, as long as it was: of all capitals, only İ becomes two."""
    return text.replace("\u0130", "I").lower()


def blocks(text, size=BLOCK):
    """[(start, end), ...]: a text in pieces of whole lines, at most `size` characters each.

    A piece ends behind a blank line if it is half full there. Only a line that is longer than
    `size` is cut, behind a sign that ends a word if there is one.
    """
    ends = [match.end() for match in re.finditer(r"\n", text)]
    if not ends or ends[-1] < len(text):
        ends.append(len(text))
    found = []
    start = 0  # of the piece
    before = 0  # the end of the line before
    for end in ends:
        if end - start > size and before > start:  # without this line
            found.append((start, before))
            start = before
        while end - start > size:  # a long line
            cut = max(text.rfind(sign, start + size // 2, start + size) for sign in " ,;&") + 1
            cut = cut or start + size
            found.append((start, cut))
            start = cut
        blank = not text[before:end].strip()
        if blank and end - start > size // 2:
            found.append((start, end))
            start = end
        before = end
    if start < len(text):
        found.append((start, len(text)))
    return found


def leads(text):
    """[place, ...] in a text where a name or a user name may stand, sorted."""
    return sorted([*account_leads(text), *name_leads(text)])


def account_leads(text):
    """Yields where one of ACCOUNTS stands."""
    lowered = lower_case(text)
    for word, follows in ACCOUNTS.items():
        at = lowered.find(word)
        while at >= 0:
            if follows.match(text, at + len(word)) and not is_annotation(text, at):
                yield at
            at = lowered.find(word, at + 1)


def is_annotation(text, at):
    """True for an @ that begins a line, or one of a comment as " * @param", and for such words."""
    if text[at : at + 2] not in (" @", "(@"):
        return False
    if NO_ACCOUNT.match(text, at) or text[at - 1 : at] in ("", " ", "\t", "\n"):
        return True
    # But not "* @ada" at the start of a line, as code owners have it.
    return text[at - 1] == "*" and text[at - 2 : at - 1] not in ("", "\n")


def name_leads(text):
    """Yields where NAMES stand that may be a person's."""
    for match in NAMES.finditer(text):
        start, end = match.span()
        before = text[max(0, start - 60) : start]
        near = before[before.rfind("\n") + 1 :] + text[end : end + 60].partition("\n")[0]
        lowered = near.lower()
        if any(word in lowered for word in PERSON) or YEAR.search(near):
            yield start
        elif FIELD_BEGIN.search(before) and FIELD_END.match(text, end):
            yield start


def blocks_with(pieces, places):
    """The pieces, of `blocks`, in which at least one of the places lies. places: sorted."""
    kept = []
    for start, end in pieces:
        at = bisect.bisect_left(places, start)
        if at < len(places) and places[at] < end:
            kept.append((start, end))
    return kept
