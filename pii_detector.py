"""Finding personal data and secrets in texts and files by a fine-tuned model and by rules, and replacing what was found.

A text is read in overlapping windows; each token is judged in the window where it is farthest from an edge. The labels of the tokens spell
entities, whose ends are then put where words, quotes and addresses end. Rules are regular expressions for what is regular: addresses, and
the formats of keys. Where both are used, rules decide on those, unless the model is sure that an address is none (a version, say).

References: Li et al., StarCoder, 2023, section 4; Ramshaw & Marcus, 1995 (the B, I, O tags).
"""

import bisect
import codecs
import contextlib
import functools
import os
import re
import shutil
import tempfile
import unicodedata
from collections import Counter
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from data import Tokenizer
from pii_data import CATEGORIES, is_public
from starencoder import StarEncoderForTokenClassification
from train import dtype_of

LABELS = ["O"] + [f"{tag}-{category}" for category in CATEGORIES for tag in "BI"]  # the class of a token


class Entity(NamedTuple):
    """Something found in a text."""

    start: int  # in characters
    end: int
    category: str  # of CATEGORIES
    score: float  # the model's mean probability; 1 where a rule found it


def windows(length, room):
    """Overlapping windows over a text of `length` tokens, of up to `room` each: [(start, end, first, last), ...].

    Each token is judged in one of them, that with first <= token < last. Neighbours overlap by a quarter of `room`, and meet in its middle.

    >>> windows(20, 12)
    [(0, 12, 0, 10), (8, 20, 10, 20)]
    """
    overlap = room // 4
    starts = [0]
    while starts[-1] + room < length:
        starts.append(min(starts[-1] + room - overlap, length - room))
    meet = [0] + [(a + room + b) // 2 for a, b in zip(starts, starts[1:])] + [length]
    return [(start, min(start + room, length), first, last) for start, first, last in zip(starts, meet, meet[1:])]


def pack(sequences, device):
    """(T,) int64 and cu_seqlens (B+1,) int32 of arrays laid end to end."""
    lengths = np.cumsum([0] + [len(s) for s in sequences]).astype(np.int32)
    return torch.from_numpy(np.concatenate(sequences)).to(device), torch.from_numpy(lengths).to(device)


# ---- finding ---------------------------------------------------------------------------------------------------------------------

EMAIL_HERE = re.compile(
    r"[\w.+-]{1,64}@(?:[a-z0-9-]{1,63}\.){1,8}[a-z]{2,24}(?![\w-])",
    re.ASCII | re.IGNORECASE,
)
EMAIL = re.compile(r"(?<![\w.+-])" + EMAIL_HERE.pattern, EMAIL_HERE.flags)
NO_EMAIL = re.compile(
    r"git@|\w+@(example|domain|localhost|company|email|test|foo|bar|site|yourdomain|mysite)\.|(no-?reply|you|your-?name|someone)@|"
    r".*\.(example|invalid|test|local|png|jpg)$",
    re.IGNORECASE,
)
IP_RUN = re.compile(r"[0-9A-Fa-f:.]+")
VERSION = re.compile(r"(version|release|\bv|oid|rfc|[=<>~^]=)\W{0,4}$", re.IGNORECASE)
KEYS = re.compile(
    r"(?<![A-Za-z0-9_])(?:"
    r"(?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36,255}|github_pat_[A-Za-z0-9_]{60,90}|glpat-[\w-]{20,}|AIza[\w-]{35}|"
    r"xox[abeoprs]-[\w-]{10,}|https://hooks\.slack\.com/services/T\w{6,}/B\w{6,}/\w{20,}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|"
    r"SG\.[\w-]{20,24}\.[\w-]{39,50}|SK[0-9a-f]{32}|AC[0-9a-f]{32}|npm_[A-Za-z0-9]{36}|pypi-AgEI[\w-]{50,}|do[oprt]_v1_[0-9a-f]{64}|"
    r"sk-(?:ant-|proj-)?[\w-]{40,}|key-[0-9a-f]{32}|\d{8,10}:AA[\w-]{33}|sq0[a-z]{3}-[\w-]{22,43}|hf_[A-Za-z]{34}|EAAA[\w-]{60}|"
    r"[0-9a-f]{32}-us\d{1,2}|AKC[A-Za-z0-9]{10,}|[MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,38}|hv[sb]\.[\w-]{24,}|dapi[0-9a-f]{32}|"
    r"shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}|ya29\.[\w-]{30,}|gl(?:c|sa)_[\w+/=]{32,}|SWMTKN-1-[\w-]{50,}|oy2[a-z0-9]{43}|ATATT3[\w=-]{100,}|"
    r"amzn\.mws\.[0-9a-f-]{36}|sl\.[\w-]{130,}|gl(?:ptt|dt|rt|ft|soat|imt|agent)-[\w-]{20,}|(?<=AccountKey=)[A-Za-z0-9+/]{86}==|"
    r"(?<!-)eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})(?![A-Za-z0-9_])|"
    r"-----BEGIN(?: [A-Z0-9]+)* PRIVATE KEY(?: BLOCK)?-----(?:[^-]|-(?!----)){20,20000}-----END(?: [A-Z0-9]+)* PRIVATE KEY(?: BLOCK)?-----",
    re.ASCII,
)
SURE = 0.95  # a rule's address that the model gives this probability of being nothing is none
PLACEHOLDER = re.compile(r"<(?:NAME|EMAIL|KEY|PASSWORD|USERNAME)>")
ALLOWED = "pii: allow"
LINE_END = re.compile(r"\r\n?|\n")


def mails(text):
    """(start, end) of the e-mail addresses of a text.

    Another may begin right behind one, as it does once that is replaced: else each pass of
    `redact_file` would find only the next of a long row.
    """
    match = EMAIL.search(text)
    while match:
        behind = None
        if not NO_EMAIL.match(match[0]):
            yield match.span()
            behind = EMAIL_HERE.match(text, match.end())
        match = behind or EMAIL.search(text, match.end())


def addresses(text):
    """(start, end) of the runs of characters in which IPv4 and IPv6 addresses that belong to somebody are written."""
    for found in IP_RUN.finditer(text):
        start, end = found.span()
        while end > start and text[end - 1] in ".:":
            end -= 1
        whole = not (text[start - 1 : start].isalnum() or text[end : end + 1].isalnum() or text[start - 1 : start] == "_")
        if end - start > 6 and whole:
            if is_public(text[start:end]):
                yield start, end
            elif (port := text.rfind(":", start, end)) > start and "." in text[start:end] and is_public(text[start:port]):
                yield start, port  # 8.8.8.8:80


RULE_CATEGORIES = ("EMAIL", "KEY", "IP_ADDRESS")


def by_rules(text, veto=lambda start, end: False):
    """The entities that regular expressions find: e-mail and IP addresses, unless `veto` says of such a span that it is none; keys."""
    found = [Entity(*span, "EMAIL", 1.0) for span in mails(text)]
    found += [Entity(*span, "IP_ADDRESS", 1.0) for span in addresses(text) if not VERSION.search(text[max(0, span[0] - 20) : span[0]])]
    found = [entity for entity in found if not veto(entity.start, entity.end)]
    return join(found + [Entity(*match.span(), "KEY", 1.0) for match in KEYS.finditer(text)], [])


def join(first, second):
    """Both lists of entities without overlaps, sorted; `first` has precedence, and in it what begins first."""
    kept, end = [], 0
    for entity in sorted(first):
        if entity.start >= end:
            kept.append(entity)
            end = entity.end
    starts, ends, end = [e.start for e in kept], [e.end for e in kept], 0
    for entity in sorted(second):
        i = bisect.bisect_right(ends, entity.start)  # the first that ends behind its start
        if (i == len(ends) or starts[i] >= entity.end) and entity.start >= end:
            kept.append(entity)
            end = entity.end
    return sorted(kept)


GOES_ON = {"KEY": "_+-=", "PASSWORD": "_+-.=$!#%^*"}  # the signs that with letters and digits belong to one
ALNUM = re.compile(r"[^\W_]")
CLOSING = {'"': '"', "'": "'", "`": "`", ">": "<"}


def stops_of(text, category):
    """Where a KEY or a PASSWORD cannot go on to its left, and to its right: two sorted lists."""
    right = re.escape(GOES_ON[category])
    left = re.escape(GOES_ON[category].replace("=", "").replace("-", ""))
    return [
        [stop.start() for stop in re.finditer(rf"[^\w{left}]", text)],
        [stop.start() for stop in re.finditer(rf"[^\w{right}]", text)],
    ]


def snap(text, start, end, category, stops):
    """(start, end) of what the tokens of an entity cover, without the quotes, blanks and brackets that share tokens with it; or None.

    stops: from a category to `stops_of` this text, only called for those that go on.
    """
    while start < end and text[start] in " \t\r\n\"'`(<[{,;:|":
        start += 1
    closing = CLOSING.get(text[start - 1 : start])
    if closing and (at := text.find(closing, start, end)) > 0:
        end = at
    if category == "PASSWORD" and re.search(r"://[^:/\s]*:$", text[max(0, start - 60) : start]) and (at := text.rfind("@", start, end)) > 0:
        end = at
    while end > start and text[end - 1] in " \t\r\n\"'`)>]},;:|":
        end -= 1
    if category in GOES_ON and start < end:
        left, right = stops(category)
        before = bisect.bisect_left(left, start) - 1
        start = left[before] + 1 if before >= 0 else 0
        behind = bisect.bisect_left(right, end)
        end = right[behind] if behind < len(right) else len(text)
    if text[end : end + 1] in " \n":  # the end of a sentence
        while end > start and text[end - 1] == ".":
            end -= 1
    if category == "KEY" and (end - start < 12 or not any(c.isdigit() for c in text[start:end])):
        return None
    return (start, end) if ALNUM.search(text, start, end) else None


WORD = re.compile(r"[\w+/=-]{60,}|\w+(?:-\w+)*")  # a long one is base64
JOINS = frozenset("-_.+/=~!?#$%^&*@:")  # a sign between two words of one category, without blanks, belongs to them


def entities_of(text, offsets, probabilities, threshold=0.0):
    """The entities that the labels of the tokens of a text spell, but for addresses that are nobody's.

    offsets: (tokens, 2), in characters. probabilities: (tokens, len(LABELS)). All tokens of a word have one category, the one that is most
    probable on average: a model that is sure of most of a key is right about the rest. A B- begins a new entity at the beginning of a word
    with a blank before it; elsewhere it goes on.
    """
    of_category = np.stack([probabilities[:, 0]] + [probabilities[:, k] + probabilities[:, k + 1] for k in range(1, len(LABELS), 2)], 1)
    words = np.array([match.span() for match in WORD.finditer(text)] or np.zeros((0, 2)), np.int64)
    word = np.searchsorted(words[:, 1], offsets[:, 1] - 1, side="right")  # of the last character of each token: the word that it may lie in
    inside = word < len(words)
    inside[inside] = words[word[inside], 0] < offsets[inside, 1]
    begins = np.flatnonzero(np.concatenate([[True], ~inside[1:] | ~inside[:-1] | (word[1:] != word[:-1])]))  # the first token of each
    lengths = np.diff(np.append(begins, len(offsets)))
    mean = np.add.reduceat(of_category, begins) / lengths[:, None]  # (words, categories)
    best = mean.argmax(1)
    spans = []  # [first word, behind the last, category]
    for w in np.flatnonzero(best).tolist():
        k, first = best[w], begins[w]
        inner = not text[offsets[first, 0]].isspace() or probabilities[first, 2 * k] > probabilities[first, 2 * k - 1]
        if spans and spans[-1][1] == w and 1 in (spans[-1][2], k) and {spans[-1][2], k} <= {1, 1 + CATEGORIES.index("USERNAME")}:
            spans[-1][1:] = w + 1, 1  # beside a word of a name without a sign between them is another
            continue
        if spans and spans[-1][2] == k and inner:
            between = text[offsets[begins[spans[-1][1]] - 1, 1] : offsets[first, 0]] if spans[-1][1] < w else ""
            if spans[-1][1] == w or len(between) < 3 and set(between) <= JOINS:
                spans[-1][1] = w + 1
                continue
        spans.append([w, w + 1, k])
    # Looked up, not walked: each of a thousand pieces of one password would be walked to its ends.
    stops = functools.cache(functools.partial(stops_of, text))
    found = []
    for v, w, k in spans:
        category, end = CATEGORIES[k - 1], begins[w] if w < len(begins) else len(offsets)
        score = float(np.average(mean[v:w, k], weights=lengths[v:w]))
        place = None
        if score >= threshold:
            start, behind = int(offsets[begins[v], 0]), int(offsets[end - 1, 1])
            place = snap(text, start, behind, category, stops)
        if place and category in ("IP_ADDRESS", "EMAIL"):  # the one that is written there, and whole
            shift = max(0, place[0] - 80)
            near = text[shift : place[1] + 80]
            written = addresses(near) if category == "IP_ADDRESS" else mails(near)
            place = next(((a + shift, b + shift) for a, b in written if a + shift < place[1] and b + shift > place[0]), None)
        if place:
            found.append(Entity(*place, category, score))
    return join(found, [])


class Detector:
    """Finds entities by a fine-tuned model, by rules, or by both.

    model, tokenizer: None for the rules alone. rules: whether to use them. threshold: the least score of what the model finds.
    """

    def __init__(self, model=None, tokenizer=None, rules=False, threshold=0.5, categories=CATEGORIES):
        self.model, self.tokenizer, self.rules, self.threshold, self.categories = model, tokenizer, rules, threshold, set(categories)
        self.device, self.dtype = next(model.parameters()).device if model else None, "auto"

    @classmethod
    def from_pretrained(cls, directory, device="auto", **options):
        """Reads a directory that `train` wrote. Raises ValueError for a model with other classes, and for a device that is not there."""
        model, tokenizer = StarEncoderForTokenClassification.from_pretrained(directory), Tokenizer.from_pretrained(directory)
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(f"{directory}: its tokenizer has more tokens than its model")
        if model.config.id2label is None or list(model.config.id2label.values()) != LABELS:
            raise ValueError(
                f"{directory}: no PII detector (its classes are not those of pii.py); fine-tune one with `python pii.py train`"
            )
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device cuda was asked for, and torch sees none; use --device cpu")
        device = "cuda" if device != "cpu" and torch.cuda.is_available() else "cpu"
        return cls(model.to(device).eval(), tokenizer, **options)

    def find(self, texts):
        """[[Entity, ...], ...] of each text, sorted, without overlaps."""
        if not self.model:
            found = [by_rules(text) for text in texts]
        else:
            judged = [(text, *self.judged(text, probabilities)) for text, probabilities in zip(texts, self.probabilities(texts))]
            found = [join(by_rules(text, veto) if self.rules else [], by_model) for text, by_model, veto in judged]
        return [[e for e in of_text if e.category in self.categories] for of_text in found]

    @torch.no_grad()
    def probabilities(self, texts, tokens_at_once=16_384):
        """[(tokens, len(LABELS)) float32, ...]: what the model says of the tokens of each text."""
        room, results, places, sequences = self.model.config.max_position_embeddings - 2, [], [], []
        for t, text in enumerate(texts):
            ids = np.array(self.tokenizer.encode(text.encode(errors="replace").decode()), np.int64)
            results.append(np.zeros((len(ids), len(LABELS)), np.float32))
            for place in windows(len(ids), room) if len(ids) else []:
                places.append((t, *place))
                sequences.append(np.concatenate([[self.tokenizer.cls_id], ids[place[0] : place[1]], [self.tokenizer.sep_id]]))
        autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=dtype_of(self, self.device) == "bfloat16")
        i = 0
        while i < len(sequences):
            j, size = i, 0
            while j < len(sequences) and (size := size + len(sequences[j])) <= tokens_at_once or j == i:
                j += 1
            with autocast:
                logits = self.model(*pack(sequences[i:j], self.device)).logits.float()
            probabilities = logits.softmax(-1).cpu().numpy()
            begin = 1  # behind <cls>
            for (t, start, _, first, last), sequence in zip(places[i:j], sequences[i:j]):
                a = begin + first - start
                results[t][first:last] = probabilities[a : a + last - first]
                begin += len(sequence)
            i = j
        return results

    def judged(self, text, probabilities):
        """(the entities that the probabilities spell, whether the model is sure that a span, (start, end), is none)."""
        offsets = functools.cache(lambda: np.array(self.tokenizer.offsets(text.encode(errors="replace").decode())))

        def veto(start, end):
            first, last = np.searchsorted(offsets()[:, 1], start, side="right"), np.searchsorted(offsets()[:, 0], end)
            return probabilities[first:last, 0].mean() > SURE

        if not probabilities[:, 1:].max(initial=0) > 0.1:  # as in most code
            return [], veto
        return entities_of(text.encode(errors="replace").decode(), offsets(), probabilities, self.threshold), veto


# ---- files -----------------------------------------------------------------------------------------------------------------------

SEGMENT, GATHER = 1_000_000, 200_000  # bytes of a long file that are read at once; of small files that the model sees at once
SKIPPED_DIRECTORIES = {".git", ".hg", ".svn", "node_modules", "__pycache__", ".venv", "venv"}


# Byte order marks. UTF-32's comes first: one of them begins as UTF-16's does.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}


def is_plain(text):
    """Whether most characters are ASCII, and none is a control, private or unknown."""
    for c in set(text):
        if unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and not c.isspace():
            return False
    return 2 * sum(c.isascii() for c in text) > len(text)


def encoding_of(file):
    """The encoding of a file open for reading bytes, by its beginning; None where it holds no text.

    Text has no NUL. UTF-16 and UTF-32 have a byte order mark, or spell plain text if read as such.
    All else is "utf-8", see `segments`.
    """
    head = file.read(8192)
    file.seek(0)
    marked = next((encoding for mark, encoding in MARKS.items() if head.startswith(mark)), None)
    if not marked and b"\0" not in head:
        return "utf-8"
    for encoding in [marked] if marked else MARKS.values():
        try:  # incrementally, as the head may end within a character
            text = codecs.getincrementaldecoder(encoding)("surrogatepass").decode(head)
        except UnicodeDecodeError:
            continue
        if "\0" not in text and (marked or text and is_plain(text)):
            return encoding
    return None


def segments(file, encoding="utf-8"):
    """The text of a file open for reading bytes, in pieces of about SEGMENT bytes that end with a line: yields (text, encoding).

    The pieces joined and encoded, with "surrogatepass", are the file's bytes. A byte order mark is
    a piece of its own: no part of what is found. Where UTF-8 fails, a piece is Latin-1, in which
    any bytes are text; UTF-16 may hold half pairs, and end within a character. Raises
    UnicodeDecodeError for what is no UTF-32.
    """
    decoder = None
    if encoding != "utf-8":
        decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    rest = b""
    at_begin = True
    while True:
        block = file.read(SEGMENT)
        ended = not block
        if decoder:  # cut as UTF-8
            block = decoder.decode(block).encode("utf-8", "surrogatepass")
        content = rest + block
        if at_begin and content.startswith(codecs.BOM_UTF8):
            yield "\ufeff", encoding
            content = content.removeprefix(codecs.BOM_UTF8)
        at_begin = False
        if ended and not content:
            break
        # Without \n, behind a \r; but not the one that ends the block: it may be half of a \r\n.
        cut = content.rfind(b"\n") + 1 or content.rfind(b"\r", 0, -1) + 1
        if ended:
            cut = len(content)
        begin = content.rfind(b"-----BEGIN")  # of a key, which stays whole
        open_key = begin >= 0 and b"-----END" not in content[begin:]
        if not ended and open_key and len(content) - begin < 50_000:
            cut = min(cut, begin)
        if not cut:  # a line without end: where a word ends, or else where a character does
            cut = max(content.rfind(b" "), content.rfind(b",")) + 1 if len(content) > 2 * SEGMENT else 0
            if not cut and len(content) > 4 * SEGMENT:
                cut = len(content.removesuffix(b"\r"))
                while cut > len(content) - 3 and content[cut - 1] & 0xC0 == 0x80:
                    cut -= 1
                cut -= content[cut - 1] >= 0xC0
        piece, rest = content[:cut], content[cut:]
        if not piece:
            continue
        try:
            yield piece.decode("utf-8", "surrogatepass" if decoder else "strict"), encoding
        except UnicodeDecodeError:
            yield piece.decode("latin-1"), "latin-1"
    if decoder and decoder.getstate()[0]:
        yield decoder.getstate()[0].decode("latin-1"), "latin-1"


def files_of(paths, skipped):
    """[(path, path below its root), ...] of files and of those in directories, sorted.

    Raises ValueError for a path that is missing, and for a file named in `paths` that cannot be read: others are counted in `skipped`.
    """
    found = []

    def unreadable(error):
        skipped["unreadable"] += 1

    for root in paths:
        if os.path.isfile(root):
            if not os.access(root, os.R_OK):
                raise ValueError(f"{root}: may not be read")
            found.append((root, os.path.basename(root)))
            continue
        if not os.path.isdir(root):
            raise ValueError(f"{root}: no such file or directory")
        for folder, folders, names in os.walk(root, onerror=unreadable):
            if left := [f for f in folders if f in SKIPPED_DIRECTORIES]:
                skipped["directories as .git, venv or node_modules"] += len(left)
            folders[:] = sorted(f for f in folders if f not in SKIPPED_DIRECTORIES)
            for name in sorted(names):
                path = os.path.join(folder, name)
                if os.path.isfile(path) and not os.path.islink(path):
                    found.append((path, os.path.relpath(path, root)))
                else:
                    skipped["not a file"] += 1
    return found


def open_text(path, skipped):
    """(a file, open for reading bytes; its encoding); None, and counted, where there is no text."""
    try:
        file = open(path, "rb")
        encoding = encoding_of(file)
        empty = not file.peek(1)
    except OSError:
        skipped["unreadable"] += 1
        return None
    if encoding and not empty:
        return file, encoding
    skipped["empty" if empty else "binary"] += 1
    file.close()
    return None


def texts_of(path, skipped):
    """Yields the pieces of a file's text without its byte order mark.

    A file that cannot be read, wholly or in part, is counted in `skipped`.
    """
    opened = open_text(path, skipped)
    if opened is None:
        return
    file, encoding = opened
    with file:
        try:
            for text, _ in segments(file, encoding):
                if text != "\ufeff":
                    yield text
        except (OSError, UnicodeDecodeError):
            skipped["unreadable"] += 1


def size_of(path):
    """The bytes of a file; 0 where another program has removed it."""
    try:
        return os.path.getsize(path)
    except OSError:
        return 0


def line_starts(text):
    """Where lines begin. One ends with \\n, \\r\\n or \\r, as in editors and in Python's `open`."""
    return [0] + [end.end() for end in LINE_END.finditer(text)]


def not_allowed(text, entities):
    """Those entities whose lines do not say that they may stay."""
    if not entities or ALLOWED not in text:
        return entities
    starts = line_starts(text)
    allowed = {bisect.bisect(starts, mark.start()) for mark in re.finditer(ALLOWED, text)}
    kept = []
    for entity in entities:
        first = bisect.bisect(starts, entity.start)
        last = bisect.bisect(starts, entity.end - 1)
        if allowed.isdisjoint(range(first, last + 1)):
            kept.append(entity)
    return kept


def scan(detector, paths, skipped, description="detecting"):
    """Yields (path, line, column, Entity, its text) for all that is found in files and directories; lines and columns count from 1."""
    files = files_of(paths, skipped)
    waiting = []  # (path, lines before it, characters of its first line before it, text)

    def found():
        for (path, line, column, text), entities in zip(waiting, detector.find([text for *_, text in waiting])):
            starts = line_starts(text) if entities else []
            for entity in not_allowed(text, entities):
                number = bisect.bisect(starts, entity.start)  # from 1
                place = entity.start - starts[number - 1] + 1 + (column if number == 1 else 0)
                yield path, line + number, place, entity, text[entity.start : entity.end]
        waiting.clear()

    total = sum(size_of(path) for path, _ in files)
    with tqdm(total=total, unit="B", unit_scale=True, desc=description, leave=False) as bar:
        gathered = 0
        for path, _ in files:
            line, column, characters = 0, 0, 0
            for text in texts_of(path, skipped):
                waiting.append((path, line, column, text))
                ends = text.count("\n") + text.count("\r") - text.count("\r\n")
                line += ends
                begin = max(text.rfind("\n"), text.rfind("\r")) + 1
                column = len(text) - begin + (0 if ends else column)
                characters += len(text)
                gathered += len(text)
                if gathered >= GATHER:
                    yield from found()
                    gathered = 0
                bar.update(len(text))
            bar.update(size_of(path) - characters)  # more bytes than characters
        yield from found()


# Replacements as published: the private addresses are those of StarCoder's data.
PRIVATE = {
    4: ["172.16.31.10", "172.16.58.3", "172.16.17.32", "192.168.127.12", "192.168.3.11"],
    6: ["fd00:c2b6:b24b:be67:2827:688d:e6a1:6a3b", "fd00:a516:7c1b:17cd:6d81:2137:bd2a:2c5b", "fc00:e968:6179::de52:7100",
        "fc00:db20:35b:7399::5", "fdf8:f53e:61e4::18"],
}  # fmt: skip


def redacted(text, entities, addresses_seen):
    """The text with each entity replaced. addresses_seen: {address: its private one}, so that one address stays one throughout a file."""
    pieces, at = [], 0
    for start, end, category, _ in entities:
        pieces.append(text[at:start])
        value, at = text[start:end], end
        if category != "IP_ADDRESS":
            pieces.append(f"<{category}>")
            continue
        choices = PRIVATE[6 if ":" in value else 4]
        pieces.append(addresses_seen.setdefault(value, choices[len(addresses_seen) % len(choices)]))
    return "".join([*pieces, text[at:]])


def outside_placeholders(text, entities):
    """Entities without the parts that are placeholders: what was replaced stays as it is."""
    kept = []
    for entity in entities:
        at, begin = entity.start, max(0, entity.start - 20)  # a placeholder may reach into it
        for hole in PLACEHOLDER.finditer(text, begin, min(len(text), entity.end + 20)):
            if hole.start() < entity.end and hole.end() > entity.start:
                kept.append(entity._replace(start=at, end=max(at, hole.start())))
                at = hole.end()
        kept.append(entity._replace(start=at, end=max(at, entity.end)))
    return [entity for entity in kept if any(c.isalnum() for c in text[entity.start : entity.end])]


def version_of(path):
    """What differs after another program has written to a file, or put another there."""
    status = os.stat(path)
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


@contextlib.contextmanager
def room_beside(path):
    """Two paths for files on the disk of `path`; their directory is removed however this ends."""
    folder = os.path.dirname(path) or "."
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".redacting-") as room:
        yield os.path.join(room, "a"), os.path.join(room, "b")


def overwrite(file, source):
    """Gives a file, open for reading and writing bytes, the content of the file at `source`."""
    file.seek(0)
    with open(source, "rb") as f:
        shutil.copyfileobj(f, file)
    file.truncate()
    file.flush()
    os.fsync(file.fileno())


def replace_content(path, new, backup):
    """Gives the file at `path` the content of the file `new`; it keeps its mode, owner and names.

    A rename does it whole or not at all. But the old content would stay under the file's other
    names, its hard links, and only root may give a new file to another owner. In these two cases
    the file is written over, and written back from `backup`, a path for a copy, if that fails or
    is stopped. The file's time becomes that of this change: make and backups go by it.
    """
    status = os.stat(path)
    try:
        os.chown(new, status.st_uid, status.st_gid)
        may_rename = status.st_nlink == 1
    except OSError:
        may_rename = False
    if may_rename:
        shutil.copystat(path, new)
        os.utime(new)
        os.replace(new, path)
        return
    with open(path, "r+b") as file:
        shutil.copyfile(path, backup)
        try:
            overwrite(file, new)
        except BaseException:  # KeyboardInterrupt and SystemExit are none of Exception's
            overwrite(file, backup)
            raise


def redact_once(detector, path, out, encoding, addresses_seen):
    """Writes `path` to `out` with all replaced that is found at first; returns it, counted."""
    counts = Counter()
    with open(path, "rb") as f, open(out, "wb") as g:
        for text, of_piece in segments(f, encoding):
            (entities,) = detector.find([text])
            entities = outside_placeholders(text, not_allowed(text, entities))
            counts.update(entity.category for entity in entities)
            g.write(redacted(text, entities, addresses_seen).encode(of_piece, "surrogatepass"))
        g.flush()
        os.fsync(g.fileno())
    return counts


def redact_file(detector, path, out, encoding="utf-8"):
    """Writes `path` to `out`, which may be the same, with everything replaced that is found; returns a Counter of categories.

    What replaces something can let the model see something more, so it is done again until nothing is found: to redact what is redacted
    changes nothing. Whole or not at all, with the same permissions; bytes outside of entities stay what they are.

    In place, a file in which nothing is found is not written to; nor is one that another program
    changed meanwhile, for which None is returned.
    """
    in_place = os.path.exists(out) and os.path.samefile(path, out)
    version = version_of(path)
    seen = {}
    with room_beside(out) as (redacted_path, other):
        counts = redact_once(detector, path, redacted_path, encoding, seen)
        again = counts
        while again:
            again = redact_once(detector, redacted_path, other, encoding, seen)
            counts = counts + again
            os.replace(other, redacted_path)
        if not in_place:
            shutil.copymode(path, redacted_path)
            os.replace(redacted_path, out)
        elif version_of(path) != version:
            return None
        elif counts:
            replace_content(out, redacted_path, other)
    return counts


def targets_of(paths, out, skipped):
    """{where it is written: path} of what `redact` is given. Raises ValueError as said there."""
    places = {}
    for path, name in files_of(paths, skipped):
        # In place, not a link, but what it names.
        target = os.path.realpath(path) if out is None else os.path.join(out, name)
        if out is not None and target in places:
            raise ValueError(f"{target}: two files would be written there; choose another --out")
        if out is not None and os.path.lexists(target):
            raise ValueError(f"{target}: exists already; choose another --out")
        places.setdefault(target, path)  # named twice, it is redacted once

    checked = set()
    for target in places if out is not None else ():
        folder = os.path.dirname(target)
        while len(folder) > len(out) and folder not in checked:
            checked.add(folder)
            if folder in places or os.path.lexists(folder) and not os.path.isdir(folder):
                raise ValueError(
                    f"{folder}: would be both a file and a directory; choose another --out"
                )
            folder = os.path.dirname(folder)
    return places


def redact(detector, paths, out=None):
    """Redacts files and directories into the directory `out`, or in place where that is None. Returns (found, skipped), two Counters.

    What cannot be read as text is copied as it is. Raises ValueError, before anything is written,
    where two files would get the same name, or a file and a directory, a copy exists, or `out` is a
    file or lies in a directory that is to be copied.
    """
    skipped, counts = Counter(), Counter()
    if out is not None and (not out or os.path.exists(out) and not os.path.isdir(out)):
        raise ValueError(f"{out or repr(out)}: not a directory; choose another --out")
    for path in paths if out is not None else ():
        if os.path.isdir(path) and os.path.join(os.path.realpath(out), "").startswith(os.path.join(os.path.realpath(path), "")):
            raise ValueError(f"{out} lies in {path}; choose a directory outside of it")
    places = targets_of(paths, out, skipped)
    for target, path in tqdm(places.items(), desc="redacting", unit=" files", leave=False):
        opened = open_text(path, skipped)
        try:
            if opened:
                file, encoding = opened
                file.close()
                found = redact_file(detector, path, target, encoding)
                if found is None:
                    skipped["changed by another program meanwhile"] += 1
                else:
                    counts.update(found)
            elif out is not None and os.access(path, os.R_OK):
                with room_beside(target) as (copy, _):
                    shutil.copy(path, copy)
                    os.replace(copy, target)
        except UnicodeDecodeError:  # it began as UTF-32 and does not go on so
            skipped["unreadable"] += 1
        except FileNotFoundError:
            if os.path.exists(path):
                raise
            skipped["removed by another program meanwhile"] += 1
    return counts, skipped
