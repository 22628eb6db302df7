"""The values of the synthetic data: names, addresses and secrets that are nobody's, and lookalikes.

Six kinds, in capitals, are what a detector must find: NAME, USERNAME and EMAIL of thirty countries
(the `faker` library), IP_ADDRESS in the public ranges, PASSWORD as people and programs choose them,
KEY in the formats of some twenty services. The other kinds are harmless, though some look like the
six: hashes, version numbers, private addresses, placeholders such as `changeme`, words and names of
things.

A value of these six belongs to one split, train, validation or test, by its hash. Otherwise a
detector that learned the names and addresses of the training data by heart would look good in the
test. Harmless values may be in all splits.
"""

import base64
import ipaddress
import json
import re
import string
import uuid

from pii.labels import CATEGORIES
from pii.rules import is_public
from pii.templates import read_table, render, split_of

# The countries of names; one that stands twice is drawn twice as often.
LOCALES = """
    en_US en_GB en_IN en_US de_DE fr_FR es_ES it_IT nl_NL pt_BR pl_PL cs_CZ sv_SE da_DK fi_FI no_NO
    hu_HU ro_RO tr_TR hr_HR id_ID vi_VN es_MX fr_CA ru_RU uk_UA el_GR zh_CN ja_JP ko_KR
""".split()
LATIN = LOCALES[:20]  # for user names and addresses
PATTERNS = read_table("values")  # {kind: [pattern, ...]}

ALNUM = string.ascii_letters + string.digits
ALPHABETS = {  # for the places {hex:32} of a pattern
    "digits": string.digits,
    "hex": "0123456789abcdef",
    "upper": string.ascii_uppercase + string.digits,
    "alnum": ALNUM,
    "url": ALNUM + "-_",  # base64 as in a URL
    "base64": ALNUM + "+/",
    "hashchars": ALNUM + "./",  # of crypt(3)
    "secret": ALNUM + "!#$%^&*-_=+.?",  # what a password may hold
}


class Values:
    """Draws the values of one split. generator: a random.Random, on which alone they depend.

    A method is called as the kind of value that it returns.
    """

    def __init__(self, split, generator):
        import faker  # takes a second

        self.split = split
        self.random = generator  # may be replaced: faker's own generators are seeded here once
        self.faker = {}
        for locale in dict.fromkeys(LOCALES):  # each once
            # Without weights, by which a few names would be most of those drawn.
            self.faker[locale] = faker.Faker(locale, use_weighting=False)
            self.faker[locale].seed_instance(generator.getrandbits(64))

    def draw(self, kind, size=""):
        """A value for the place {kind} or {kind:size} of a template or a pattern."""
        if size:  # {hex:32} or {hex:32-64}
            return self.some(kind, *map(int, size.split("-")))
        if "-" in kind:  # {01-12}
            low, high = kind.split("-")
            return str(self.random.randint(int(low), int(high))).zfill(len(low))
        while True:  # until it is one of this split's: five draws on average for the test
            value = self.draw_from_any_split(kind)
            if kind not in CATEGORIES or split_of(value) == self.split:
                return value

    def draw_from_any_split(self, kind):
        """A value of a kind, by one of its patterns or by the method of that name."""
        if kind not in PATTERNS:
            return getattr(self, kind)()
        patterns = PATTERNS[kind]
        pattern = self.random.choice(patterns) if len(patterns) > 1 else patterns[0]
        text, _ = render(pattern, self)  # a pattern has the syntax of a template
        return text

    def some(self, alphabet, low, high=None):
        """Between low and high random characters of one of ALPHABETS."""
        length = self.random.randint(low, high or low)
        return "".join(self.random.choices(ALPHABETS[alphabet], k=length))

    # What a detector must find.

    def NAME(self):
        """A person's full name, now and then with a middle initial."""
        locale = self.random.choice(LOCALES)
        fake = self.faker[locale]
        if locale in ("zh_CN", "ja_JP", "ko_KR"):  # the family name first, no blank
            return fake.name()
        first = fake.first_name()
        last = fake.last_name()
        initial = f" {self.random.choice(string.ascii_uppercase)}."
        return f"{first}{self.random.choice(['', '', '', initial])} {last}"

    def USERNAME(self):
        """A login name."""
        fake = self.faker[self.random.choice(LATIN)]
        name = fake.user_name()
        forms = [
            name,
            name,  # twice as often as the others
            f"{name}{self.random.randint(1, 99)}",
            f"{name[0]}_{name[1:]}",
            f"{fake.word()}-{name}".lower(),
            name.capitalize(),
        ]
        return re.sub(r"[^\w-]", "", self.random.choice(forms))

    def EMAIL(self):
        """An address that is no example."""
        fake = self.faker[self.random.choice(LATIN)]
        names = [
            fake.user_name(),
            f"{fake.user_name()}.{fake.user_name()}",
            f"{fake.user_name()}+{self.random.randint(1, 99)}",
        ]
        name = re.sub(r"[^A-Za-z0-9.+_-]", "", self.random.choice(names))
        domains = [
            self.draw("mailer"),
            fake.domain_name(),
            f"{fake.domain_word()}.{self.random.choice(['edu', 'org', 'io'])}",
        ]
        domain = self.random.choice(domains).encode("ascii", "ignore").decode()
        return f"{name}@{domain}"

    def IP_ADDRESS(self):
        """A public address, three times in four of IPv4."""
        while True:
            if self.random.random() < 0.75:
                address = ipaddress.IPv4Address(self.random.getrandbits(32))
            else:
                network = 0x2000 + self.random.getrandbits(12) << 112  # 2000::/4
                host = self.random.getrandbits(self.random.choice([16, 64, 112]))  # often short
                address = ipaddress.IPv6Address(network + host)
            if is_public(str(address)):
                return str(address)

    def PASSWORD(self):
        """As programs choose them, and as people do: words, numbers and a sign; or only a word."""
        if self.random.random() < 0.4:  # most of those in code are weak
            return self.draw("weak")
        form = self.random.randrange(5)
        if form == 0:  # k7$Wq=0rT_x
            return self.some("secret", 8, 20)
        if form == 1:  # k7Wq0rTx
            return self.some("alnum", 8, 16)
        if form == 2:  # Boston1984!
            return self.spelled() + self.draw("number") + self.random.choice(["", "!", "#", "$"])
        if form == 3:  # maria-Boston-7
            sign = self.random.choice(["-", "_", "", "."])
            return sign.join([self.spelled(), self.spelled(), self.draw("1-99")])
        return self.spelled() + self.random.choice("!@#$%&*") + self.draw("number")  # boston@1984

    def spelled(self):
        """A word, a first name or a city, perhaps with a capital."""
        fake = self.faker["en_US"]
        change = self.random.choice([str.lower, str.capitalize, str.lower])
        word = self.random.choice([fake.word, fake.first_name, fake.city])()
        return change(word.replace(" ", ""))  # of New York

    def private_key(self):
        """A private key in a PEM file."""
        kind = self.draw("kind")
        lines = [self.some("base64", 64) for _ in range(self.random.randint(3, 12))]  # as in PEM
        body = "\n".join(lines)
        return f"-----BEGIN{kind} PRIVATE KEY-----\n{body}\n-----END{kind} PRIVATE KEY-----"

    def claims(self):
        """The second part of a JSON web token."""
        claims = {"sub": self.some("alnum", 9), "iat": 1_600_000_000}  # whose, since when
        return base64.urlsafe_b64encode(json.dumps(claims).encode()).decode().rstrip("=")

    # What is harmless.

    def word(self):
        """An English word."""
        return self.faker["en_US"].word()

    def Word(self):
        """An English word with a capital."""
        return self.word().capitalize()

    def WORD(self):
        """An English word in capitals."""
        return self.word().upper()

    def words(self):
        """Two to seven words."""
        return " ".join(self.word() for _ in range(self.random.randint(2, 7)))

    def ident(self):
        """An identifier of up to three words, in snake or camel case."""
        first, *rest = [self.word() for _ in range(self.random.randint(1, 3))]
        snake = "_".join([first, *rest])
        camel = first + "".join(map(str.capitalize, rest))
        return self.random.choice([snake, camel])

    def surname(self):
        """The last name of a person of somewhere, after whom a thing may be called."""
        return self.faker[self.random.choice(LATIN)].last_name()

    def host(self):
        """The name of a host."""
        name, first, second = [self.word() for _ in range(3)]  # drawn even if not used
        domain = self.random.choice(["internal", "local", f"{first}.com", f"{second}.io"])
        return f"{name}.{domain}"

    def uuid(self):
        """A random UUID."""
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))
