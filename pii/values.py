"""TODO."""

import base64
import ipaddress
import json
import re
import string
import uuid

from pii.labels import CATEGORIES
from pii.rules import NOT_GLOBAL, is_public
from pii.templates import split_of

LOCALES = """en_US en_GB en_IN en_US de_DE fr_FR es_ES it_IT nl_NL pt_BR pl_PL cs_CZ sv_SE da_DK fi_FI no_NO hu_HU ro_RO tr_TR hr_HR id_ID
vi_VN es_MX fr_CA ru_RU uk_UA el_GR zh_CN ja_JP ko_KR""".split()


MAILERS = "gmail.com yahoo.com hotmail.com outlook.com gmx.de web.de mail.ru protonmail.com 163.com qq.com icloud.com free.fr".split()


FAKE = {
    "fake_password": """password changeme your_password ******** xxxxxxxx <password> ${PASSWORD} secret test 123456 CHANGE_ME none example
                        yourpassword {{password}} %(password)s passw0rd hunter2 foobar""".split(),
    "fake_key": """your-api-key YOUR_API_KEY <token> xxxxxxxxxxxxxxxx abc123 INSERT_KEY_HERE ${TOKEN} {{api_key}} dummy test-token
                   ...""".split(),
    "fake_email": """user@example.com john@example.org name@domain.com you@example.net foo@bar.com noreply@example.com email@example.com
                     test@test.com someone@localhost me@example.co.uk""".split(),
    "fake_user": "user username root admin test guest postgres anonymous nobody default".split(),
}


class Values:
    """Draws the values of one split. generator: a random.Random."""

    def __init__(self, split, generator):
        import faker  # takes a second

        self.split, self.random = split, generator
        self.faker = {
            locale: faker.Faker(locale, use_weighting=False) for locale in dict.fromkeys(LOCALES)
        }
        for fake in self.faker.values():
            fake.seed_instance(generator.getrandbits(64))

    def draw(self, kind):
        """A value of a category, or of something harmless (lowercase). Values of a category are those of this split alone."""
        while True:
            value = getattr(self, kind)()
            if kind not in CATEGORIES or split_of(value) == self.split:
                return value

    def some(self, alphabet, low, high=None):
        """A random string of low to high letters of an alphabet."""
        return "".join(self.random.choices(alphabet, k=self.random.randint(low, high or low)))

    # -- entities --

    def NAME(self):
        """A person's, from one of LOCALES."""
        locale = self.random.choice(LOCALES)
        fake = self.faker[locale]
        if locale in ("zh_CN", "ja_JP", "ko_KR"):
            return fake.name()
        first, last = fake.first_name(), fake.last_name()
        middle = self.random.choice(["", "", "", f" {self.random.choice(string.ascii_uppercase)}."])
        return f"{first}{middle} {last}"

    def USERNAME(self):
        """A login name."""
        fake, random = self.faker[self.random.choice(LOCALES[:20])], self.random
        name = fake.user_name()
        ways = [
            name,
            name,
            f"{name}{random.randint(1, 99)}",
            f"{name[0]}_{name[1:]}",
            f"{fake.word()}-{name}".lower(),
            name.capitalize(),
        ]
        return re.sub(r"[^\w-]", "", random.choice(ways))

    def EMAIL(self):
        """An address that is no example."""
        fake, random = self.faker[self.random.choice(LOCALES[:20])], self.random
        name = random.choice(
            [
                fake.user_name(),
                f"{fake.user_name()}.{fake.user_name()}",
                f"{fake.user_name()}+{random.randint(1, 99)}",
            ]
        )
        domain = random.choice(
            [
                random.choice(MAILERS),
                fake.domain_name(),
                f"{fake.domain_word()}.{random.choice(['edu', 'org', 'io'])}",
            ]
        )
        return (
            f"{re.sub(r'[^A-Za-z0-9.+_-]', '', name)}@{domain.encode('ascii', 'ignore').decode()}"
        )

    def IP_ADDRESS(self):
        """A public IPv4 or IPv6 address."""
        while True:
            if self.random.random() < 0.75:
                address = ipaddress.IPv4Address(self.random.getrandbits(32))
            else:
                address = ipaddress.IPv6Address(
                    (0x2000 + self.random.getrandbits(12) << 112)
                    + self.random.getrandbits(self.random.choice([16, 64, 112]))
                )
            if is_public(str(address)):
                return str(address)

    def PASSWORD(self):
        """As people choose them, and as programs do."""
        random, words = self.random, self.faker["en_US"]
        word = lambda: random.choice([str.lower, str.capitalize, str.lower])(
            random.choice([words.word, words.first_name, words.city])().replace(" ", "")
        )
        way = random.randrange(5)
        if way == 0:
            return self.some(string.ascii_letters + string.digits + "!#$%^&*-_=+.?", 8, 20)
        if way == 1:
            return self.some(string.ascii_letters + string.digits, 8, 16)
        if way == 2:
            return f"{word()}{random.randint(1, 9999)}{random.choice(['', '!', '#', '$'])}"
        if way == 3:
            return random.choice(["-", "_", "", "."]).join(
                [word(), word(), str(random.randint(1, 99))]
            )
        return f"{word()}{random.choice('!@#$%&*')}{random.randint(1, 9999)}"

    def KEY(self):
        """In the formats of some twenty services, or without one."""
        some, digits, letters, hexadecimal = (
            self.some,
            string.digits,
            string.ascii_letters + string.digits,
            "0123456789abcdef",
        )
        upper, url, base = string.ascii_uppercase + digits, letters + "-_", letters + "+/"
        jwt = lambda part: base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=")
        return self.random.choice([
            lambda: self.random.choice(["AKIA", "ASIA"]) + some(upper, 16),
            lambda: some(base, 40),
            lambda: self.random.choice(["ghp_", "gho_", "ghs_"]) + some(letters, 36),
            lambda: "github_pat_" + some(letters, 22) + "_" + some(letters, 59),
            lambda: "glpat-" + some(url, 20),
            lambda: "AIza" + some(url, 35),
            lambda: self.random.choice(["xoxb-", "xoxp-"]) + some(digits, 12) + "-" + some(digits, 12) + "-" + some(letters, 24),
            lambda: "https://hooks.slack.com/services/T" + some(upper, 8) + "/B" + some(upper, 8) + "/" + some(letters, 24),
            lambda: self.random.choice(["sk_live_", "rk_live_", "sk_test_"]) + some(letters, 24),
            lambda: "SG." + some(url, 22) + "." + some(url, 43),
            lambda: "SK" + some(hexadecimal, 32),
            lambda: "npm_" + some(letters, 36),
            lambda: "pypi-AgEIcHlwaS5vcmc" + some(url, 60, 100),
            lambda: "dop_v1_" + some(hexadecimal, 64),
            lambda: "sk-" + some(letters, 48),
            lambda: "key-" + some(hexadecimal, 32),
            lambda: some(digits, 9) + ":AA" + some(url, 33),
            lambda: ".".join([jwt({"alg": "HS256", "typ": "JWT"}), jwt({"sub": some(letters, 9), "iat": 1_600_000_000}), some(url, 43)]),
            lambda: some(base, 86) + "==",
            lambda: some(hexadecimal, self.random.choice([32, 40, 64])),
            lambda: some(letters, 20, 44),
            lambda: some(url, 24, 48),
        ])()  # fmt: skip

    def private_key(self):
        """What lies between the lines of a PEM file."""
        return "\n".join(
            self.some(string.ascii_letters + string.digits + "+/", 64)
            for _ in range(self.random.randint(3, 12))
        )

    # -- what is harmless --

    def word(self):
        """From a dictionary of English."""
        return self.faker["en_US"].word()

    def Word(self):
        """One that begins with a capital."""
        return self.word().capitalize()

    def WORD(self):
        """In capitals."""
        return self.word().upper()

    def title(self):
        """Two words that begin with capitals."""
        return f"{self.Word()} {self.Word()}"

    def words(self):
        """A phrase."""
        return " ".join(self.word() for _ in range(self.random.randint(2, 7)))

    def ident(self):
        """An identifier."""
        parts = [self.word() for _ in range(self.random.randint(1, 3))]
        return self.random.choice(
            ["_".join(parts), parts[0] + "".join(p.capitalize() for p in parts[1:])]
        )

    def host(self):
        """A host's name."""
        return f"{self.word()}.{self.random.choice(['internal', 'local', f'{self.word()}.com', f'{self.word()}.io'])}"

    def base64(self):
        """Of what nobody reads."""
        return self.some(string.ascii_letters + string.digits + "+/", 60, 300)

    def public(self):
        """A public key or a certificate."""
        return "AAAAB3NzaC1yc2EAAAADAQAB" + self.some(
            string.ascii_letters + string.digits + "+/", 100, 300
        )

    def local(self):
        """An address of no one in particular."""
        return self.random.choice(NOT_GLOBAL)

    def uuid(self):
        """A UUID."""
        return str(uuid.UUID(int=self.random.getrandbits(128), version=4))

    def __getattr__(self, kind):
        random, digits = self.random, lambda n: self.some("0123456789abcdef", n)
        simple = {
            "number": lambda: str(random.randint(1, 9999)), "port": lambda: str(random.randint(80, 65535)),
            "year": lambda: str(random.randint(1985, 2025)), "month": lambda: random.choice("January March June August October".split()),
            "date": lambda: f"{random.randint(1990, 2025)}-{random.randint(1, 12):02}-{random.randint(1, 28):02}",
            "time": lambda: f"{random.randint(0, 23):02}:{random.randint(0, 59):02}:{random.randint(0, 59):02}",
            "version": lambda: ".".join(str(random.randint(0, 20)) for _ in range(3)),
            "quad": lambda: ".".join(str(random.randint(0, 20)) for _ in range(4)),
            "md5": lambda: digits(32), "sha1": lambda: digits(40), "sha256": lambda: digits(64),
            "hexnumber": lambda: "0x" + digits(random.choice([8, 16, 32])),
            "hash": lambda: digits(random.choice([32, 40, 64])), "kind": lambda: random.choice(["", " RSA", " EC", " OPENSSH"]),
        }  # fmt: skip
        if kind in FAKE:
            return lambda: random.choice(FAKE[kind])
        if kind in simple:
            return simple[kind]
        raise AttributeError(kind)
