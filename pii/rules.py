"""TODO."""

import bisect
import ipaddress
import re

from pii.labels import Entity

NOT_GLOBAL = [
    "127.0.0.1",
    "0.0.0.0",
    "::1",
    "localhost",
    "255.255.255.0",
    "10.0.0.1",
    "192.168.0.1",
    "192.168.1.10",
    "172.16.0.5",
    "10.1.2.3",
]


def is_public(address):
    """Whether a text is an IPv4 or IPv6 address that belongs to somebody: none of a private network, of this machine, or of many."""
    try:
        address = ipaddress.ip_address(address)
    except ValueError:
        return False
    return address.is_global and not address.is_multicast


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
        whole = not (
            text[start - 1 : start].isalnum()
            or text[end : end + 1].isalnum()
            or text[start - 1 : start] == "_"
        )
        if end - start > 6 and whole:
            if is_public(text[start:end]):
                yield start, end
            elif (
                (port := text.rfind(":", start, end)) > start
                and "." in text[start:end]
                and is_public(text[start:port])
            ):
                yield start, port  # 8.8.8.8:80


RULE_CATEGORIES = ("EMAIL", "KEY", "IP_ADDRESS")


def by_rules(text, veto=lambda start, end: False):
    """The entities that regular expressions find: e-mail and IP addresses, unless `veto` says of such a span that it is none; keys."""
    found = [Entity(*span, "EMAIL", 1.0) for span in mails(text)]
    found += [
        Entity(*span, "IP_ADDRESS", 1.0)
        for span in addresses(text)
        if not VERSION.search(text[max(0, span[0] - 20) : span[0]])
    ]
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
