"""Finding by regular expressions what is regular: e-mail addresses, IP addresses, formats of keys.

    by_rules(text)                          the rules alone
    join(found_by_rules(text), by_model)    both: where they disagree, the rules decide

Every expression takes time in proportion to the text, whatever it is: files come from strangers.
Names, user names and passwords have no format; they are left to the model.
"""

import bisect
import ipaddress
import re
import string

import numpy as np

from pii.labels import Entity

RULE_CATEGORIES = ("EMAIL", "KEY", "IP_ADDRESS")

# ---- e-mail addresses --------------------------------------------------------------------------

# A local part and a domain of at least two labels, the last one of letters: bob.smith+x@mail.org.
# Not `user@localhost` or `a@b`, and no part of a domain that goes on behind it. The bounds on
# repetition keep the time in proportion.
EMAIL_HERE = re.compile(
    r"[\w.+-]{1,64} @ (?: [a-z0-9-]{1,63} \. ){1,8} [a-z]{2,24} (?![\w-])",
    re.ASCII | re.IGNORECASE | re.VERBOSE,
)

# The same, but only where the local part begins: not at the `b` of `bob@mail.org`.
EMAIL = re.compile(r"(?<![\w.+-])" + EMAIL_HERE.pattern, EMAIL_HERE.flags)

# Matches, at the start of an address, those that belong to nobody.
NO_EMAIL = re.compile(
    r"""
      git@                                              # the user of every Git remote
    | \w+@(example|domain|localhost|company|email|test  # domains of documentation
          |foo|bar|site|yourdomain|mysite)\.
    | (no-?reply|you|your-?name|someone)@               # placeholders
    | .*\.(example|invalid|test|local|png|jpg)$         # reserved domains; icon@2x.png
    """,
    re.IGNORECASE | re.VERBOSE,
)


# Before what looks like an address in a URL: of ftp://user:password@host the password and the host.
USERINFO = re.compile(r"://[^\s:/@\"'<>]{0,80}:?$")


def mails(text):
    """Yields (start, end) of each e-mail address in a text."""
    match = EMAIL.search(text)
    while match:
        next_match = None
        in_url = USERINFO.search(text[max(0, match.start() - 100) : match.start()])
        if not in_url and not NO_EMAIL.match(match[0]):
            yield match.span()
            # Another address may begin right behind this one, as it will once this one is
            # replaced. Otherwise each pass of redaction would find only the next of a long row.
            next_match = EMAIL_HERE.match(text, match.end())
        match = next_match or EMAIL.search(text, match.end())


# ---- IP addresses ------------------------------------------------------------------------------

# Where an address may stand: three dots between digits, two colons with digits of base 16 around
# them. Most code has neither, and this is five times as fast as to look at each run of digits.
MAYBE_IP = re.compile(
    r"\d\.\d{1,3}\.\d{1,3}\.\d|[0-9A-Fa-f]::|::[0-9A-Fa-f]|:[0-9A-Fa-f]{1,4}:[0-9A-Fa-f]"
)
# The characters of IPv4 and IPv6 addresses; `ipaddress` decides whether they spell one.
IP_RUN = re.compile(r"[0-9A-Fa-f:.]+")
IP_SIGNS = frozenset("0123456789abcdefABCDEF:.")
LONGEST_IP = 64  # characters, with a port; a longer run is none

# The end of what stands before a dotted number that is a version and no address: `version = "`.
VERSION = re.compile(
    r"(?:\b(?:\w{0,20}version|release|revision|build|firmware|oid|rfc|v|upgraded? to|at least)"
    r"[^\w\n]{0,4}|[=<>~^]=\s?)$",
    re.IGNORECASE,
)


def is_public(address):
    """True for the IPv4 or IPv6 address of one host on the Internet; False for any other text."""
    try:
        address = ipaddress.ip_address(address)
    except ValueError:
        return False
    # Private networks and this machine itself are not global.
    return address.is_global and not address.is_multicast


def addresses(text):
    """Yields (start, end) of each public IPv4 and IPv6 address in a text, without its port."""
    at = 0  # behind the run before
    maybe = MAYBE_IP.search(text)
    while maybe:
        # The whole run of such characters around it.
        start = maybe.start()
        least = max(at, start - LONGEST_IP)
        while start > least and text[start - 1] in IP_SIGNS:
            start -= 1
        run = IP_RUN.match(text, start)
        at = run.end()
        maybe = MAYBE_IP.search(text, at)
        end = start + len(run[0].rstrip(".:"))  # the end of a sentence
        before = text[start - 1 : start]
        in_a_word = before.isalnum() or before == "_" or text[end : end + 1].isalnum()
        # Below seven characters, the length of 8.8.8.8, are times, slices and `a::b` of C++.
        if in_a_word or end - start < 7:
            continue

        if is_public(text[start:end]):
            yield start, end
        elif "." in text[start:end]:
            host = text[start:end].rpartition(":")[0]  # of 8.8.8.8:80
            if is_public(host):
                yield start, start + len(host)


# ---- keys --------------------------------------------------------------------------------------

# Keys whose format says whose they are: a prefix that the issuer chose, and a length. Not a hash or
# other random text without such a prefix, not a public key, and no part of a longer word.
KEYS = re.compile(
    r"""
    (?<![A-Za-z0-9_]) (?:
        (?:AKIA|ASIA|ABIA|ACCA)[A-Z0-9]{16}                         # Amazon Web Services
      | gh[pousr]_[A-Za-z0-9]{36,255} | github_pat_\w{60,90}        # GitHub
      | gl(?:pat|ptt|dt|rt|ft|soat|imt|agent)-[\w-]{20,}            # GitLab
      | AIza[\w-]{35}                                               # Google
      | xox[abeoprs]-[\w-]{10,}                                     # Slack
      | https://hooks\.slack\.com/services/T\w{6,}/B\w{6,}/\w{20,}
      | [sr]k_(?:live|test)_[A-Za-z0-9]{16,}                        # Stripe
      | SG\.[\w-]{20,24}\.[\w-]{39,50}                              # SendGrid
      | (?:SK|AC)[0-9a-f]{32}                                       # Twilio
      | npm_[A-Za-z0-9]{36}                                         # npm
      | pypi-AgEI[\w-]{50,}                                         # PyPI
      | do[oprt]_v1_[0-9a-f]{64}                                    # DigitalOcean
      | sk-(?:ant-|proj-)?[\w-]{40,}                                # OpenAI, Anthropic
      | key-[0-9a-f]{32}                                            # Mailgun
      | \d{8,10}:AA[\w-]{33}                                        # Telegram
      | sq0[a-z]{3}-[\w-]{22,43} | EAAA[\w-]{60}                    # Square
      | hf_[A-Za-z]{34}                                             # Hugging Face
      | [0-9a-f]{32}-us\d{1,2}                                      # Mailchimp
      | AKC[A-Za-z0-9]{10,}                                         # Artifactory
      | [MNO][\w-]{23,25}\.[\w-]{6}\.[\w-]{27,38}                   # Discord
      | hv[sb]\.[\w-]{24,}                                          # HashiCorp Vault
      | dapi[0-9a-f]{32}                                            # Databricks
      | shp(?:at|ca|pa|ss)_[0-9a-fA-F]{32}                          # Shopify
      | ya29\.[\w-]{30,}                                            # Google OAuth
      | gl(?:c|sa)_[\w+/=]{32,}                                     # Grafana
      | SWMTKN-1-[\w-]{50,}                                         # Docker Swarm
      | oy2[a-z0-9]{43}                                             # NuGet
      | ATATT3[\w=-]{100,}                                          # Atlassian
      | amzn\.mws\.[0-9a-f-]{36}                                    # Amazon Marketplace
      | sl\.[\w-]{130,}                                             # Dropbox
      | (?<=AccountKey=)[A-Za-z0-9+/]{86}==                         # Azure storage
      | [\w~.-]{3}[78]Q~[\w~.-]{31,34}                              # Azure, client secret
      | GOCSPX-[\w-]{28} | 1//0[\w-]{40,}                          # Google OAuth
      | AAAA[\w-]{7}:APA91b[\w-]{130,}                             # Firebase messaging
      | xapp-\d-[A-Z0-9]+-\d+-[0-9a-f]{64} | xoxe\.xox[bp]-\d-[\w-]{100,}       # Slack
      | whsec_[A-Za-z0-9+/]{32,}=?                                  # Stripe, webhook
      | https://discord(?:app)?\.com/api/webhooks/\d{17,20}/[\w-]{60,}
      | https://[\w-]+\.webhook\.office\.com/webhookb2/[\w@/-]{80,}  # Microsoft Teams
      | LTAI[A-Za-z0-9]{12,20}                                      # Alibaba Cloud
      | AKID[A-Za-z0-9]{32}                                         # Tencent Cloud
      | EAA[A-Za-z0-9]{80,} | IGQV[\w-]{100,}                       # Facebook, Instagram
      | sk-[A-Za-z0-9]{20}T3BlbkFJ[A-Za-z0-9]{20} | sk-[0-9a-f]{32}  # OpenAI, DeepSeek
      | gsk_[A-Za-z0-9]{52} | xai-[A-Za-z0-9]{80} | pplx-[0-9a-zA-Z]{48} | r8_\w{37}
      | dt0[a-z]\d\d\.[A-Z0-9]{8,24}\.[A-Z0-9]{64}                  # Dynatrace
      | NRAK-[A-Z0-9]{27} | NRII-[\w-]{32}                          # New Relic
      | sntry[su]_[\w+/=]{40,}                                      # Sentry
      | lin_api_[A-Za-z0-9]{40} | secret_[A-Za-z0-9]{43} | ntn_[A-Za-z0-9]{46}
      | PMAK-[0-9a-f]{24}-[0-9a-f]{34}                              # Postman
      | pul-[0-9a-f]{40} | dp\.[a-z]{2,5}\.[A-Za-z0-9.]{40,}          # Pulumi, Doppler
      | rubygems_[0-9a-f]{48} | dckr_[op]at_[\w-]{27,}               # RubyGems, Docker
      | HRKU-[\w-]{36,} | nfp_[A-Za-z0-9]{36} | sbp_[0-9a-f]{40}     # Heroku, Netlify, Supabase
      | pscale_(?:tkn|pw|oauth)_[\w.-]{32,}                         # PlanetScale
      | figd_[\w-]{40,} | shippo_(?:live|test)_[0-9a-f]{40}         # Figma, Shippo
      | EZ[AT]K[0-9a-f]{54}                                         # EasyPost
      | sq[upa]_[0-9a-f]{40} | sgp_(?:[0-9a-f]{16}_)?[0-9a-f]{40}    # Sonar, Sourcegraph
      | xkeysib-[0-9a-f]{64}-[A-Za-z0-9]{16}                        # Brevo
      | xsmtpsib-[0-9a-f]{64}-[A-Za-z0-9]{16}
      | pat-(?:na|eu)1-[0-9a-f-]{36}                                # HubSpot
      | pat[A-Za-z0-9]{14}\.[0-9a-f]{64}                            # Airtable
      | CFPAT-[\w-]{43} | CCIPAT_[\w-]{60,} | bkua_[0-9a-f]{40}      # Contentful, CircleCI
      | ATBB[A-Za-z0-9]{32} | ATCTT3[\w=-]{100,}                    # Bitbucket, Atlassian
      | access_token\$production\$[0-9a-z]{16}\$[0-9a-f]{32}         # PayPal Braintree
      | A3-[A-Z0-9]{6}-[A-Z0-9]{6,11}(?:-[A-Z0-9]{5}){3,4}          # 1Password
      | ops_eyJ[\w+/=-]{200,} | AGE-SECRET-KEY-1[0-9A-Z]{58}         # 1Password, age
      | tfp_[\w-]{40,} | fio-u-[\w=-]{64} | glsa_[A-Za-z0-9]{32}_[0-9a-f]{8}
      | [A-Za-z0-9]{14}\.atlasv1\.[\w-]{60,}                        # Terraform
      | t1\.[\w-]+={0,2}\.[\w-]{86}={0,2} | y[0-3]_[\w-]{50,} | AQVN[\w-]{35,38}  # Yandex
      | bot\d{8,10}:AA[\w-]{33}                                    # Telegram, in an address
      | RGAPI-[0-9a-f-]{36} | waka_[0-9a-f-]{36} | tvly-\w[\w-]{30,}  # Riot, WakaTime, Tavily
      | NRBR-[0-9a-f]{19} | NRJS-[0-9a-f]{19}                       # New Relic, browser
      | ph[acsx]_[A-Za-z0-9]{40,} | tgp_v1_[\w-]{40,}               # PostHog, Together
      | llx-[\w-]{40,} | sbp_v0_[0-9a-f]{40} | glcbt-[\w-]{20,}     # LlamaCloud, Supabase, GitLab
      | ABSK[A-Za-z0-9+/]{100,}=* | bedrock-api-key-[\w=-]{40,}     # Amazon Bedrock
      | [0-9a-f]{32}-[0-9a-f]{8}-[0-9a-f]{8}                        # Mailgun
      | v[1-4]\.(?:local|public)\.[\w-]{60,}                        # PASETO
      | (?<!-)eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}              # JSON Web Token
    ) (?![A-Za-z0-9_])
    """,
    re.ASCII | re.VERBOSE,
)

# A private key as OpenSSL, OpenSSH and GnuPG write it, from its first line to its last.
PRIVATE_KEYS = re.compile(
    r"""
      -----BEGIN (?: [ ][A-Z0-9]+ )* [ ]PRIVATE[ ]KEY (?: [ ]BLOCK )? -----
      (?: [^-] | -(?!----) ){20,20000}
      -----END (?: [ ][A-Z0-9]+ )* [ ]PRIVATE[ ]KEY (?: [ ]BLOCK )? -----
    """,
    re.ASCII | re.VERBOSE,
)

# All but private keys are in a long run of such characters. To look only there takes a fifth of the
# time, as most words are short.
KEY_SIGNS = np.zeros(129, np.int8)  # by the code of a character; 128 for all that are not ASCII
KEY_SIGNS[[ord(sign) for sign in string.ascii_letters + string.digits + "_+/=.:-~$@"]] = 1
SHORTEST_KEY = 13


def long_runs(text):
    """[(start, end), ...] of the runs of KEY_SIGNS that are long enough to hold a key."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    inside = KEY_SIGNS[np.minimum(codes, 128)]
    edges = np.flatnonzero(np.diff(inside, prepend=0, append=0))
    starts = edges[::2]
    ends = edges[1::2]
    long = ends - starts >= SHORTEST_KEY
    return zip(starts[long].tolist(), ends[long].tolist())


def keys(text):
    """Yields (start, end) of each key of a known format in a text."""
    for start, end in long_runs(text):
        for match in KEYS.finditer(text, start, end):
            yield match.span()
    for match in PRIVATE_KEYS.finditer(text):
        yield match.span()


# ---- together ----------------------------------------------------------------------------------


def found_by_rules(text):
    """[Entity, ...] of all that the rules find in a text, in no order, perhaps overlapping."""
    found = [Entity(start, end, "EMAIL", 1.0) for start, end in mails(text)]
    for start, end in addresses(text):
        if not VERSION.search(text[max(0, start - 20) : start]):
            found.append(Entity(start, end, "IP_ADDRESS", 1.0))
    return found + [Entity(start, end, "KEY", 1.0) for start, end in keys(text)]


def by_rules(text):
    """[Entity, ...] of all that the rules find in a text, sorted, without overlaps."""
    return join(found_by_rules(text))


def join(*lists):
    """Lists of entities as one, sorted, without overlaps.

    An earlier list has precedence, whole: rules know exactly where an address or a key ends, a
    model only about. Within a list, the entity that begins first has precedence.

    >>> mail = Entity(3, 9, "EMAIL", 1.0)
    >>> names = [Entity(0, 5, "NAME", 0.9), Entity(12, 14, "NAME", 0.9)]
    >>> [(entity.start, entity.end) for entity in join([mail], names)]
    [(3, 9), (12, 14)]
    """
    kept = []
    for entities in lists:
        for entity in sorted(entities):
            i = bisect.bisect_left(kept, entity[:1])  # the first that does not begin before it
            free_before = i == 0 or kept[i - 1].end <= entity.start
            if free_before and (i == len(kept) or entity.end <= kept[i].start):
                kept.insert(i, entity)
    return kept
