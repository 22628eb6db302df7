"""Where a secret may stand, syntax by syntax; what is none; bounded work, whatever the text is."""

import time
from re import _parser

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pii.candidates import PHRASES, SYNTAXES, candidates, kind_of, looks_random

# The value that is expected stands between two signs §, so that no scanner takes a line for real.
# They are removed before the line is looked at; a ↵ becomes a line break.
PASSWORDS = r"""
password = "§hunter2§"
password = '§letmein§'
password = `§letmein§`
PASSWORD=§toor§
export DB_PASSWORD="§secret123§"
DB_PASS=§D9P&U?VS-D%+9Fsph5§
  password: §simply5264§
  - name: DB_PASSWORD↵    value: §simply5264§
spring.datasource.password=§samuel1711!§
spring.datasource.password = §admin§
mySqlPwd := "§123456§"
"password": "§admin§"
'password' => '§test1§',
:password => '§test1§'
{\"password\": \"§v1234§\"}
"source": ["password = \"§hunter2§\"\n", "x"]
"line\npwd=§hunter2§\n"
&quot;password&quot;: &quot;§hunter2§&quot;
<password>§hunter2§</password>
<password type="plain"> §hunter2§ </password>
<property name="password">§hunter2§</property>
<property name="password" value="§hunter2§"/>
<add key="DbPassword" value="§hunter2§" />
<user name="x" password="§hunter2§"/>
{"name": "PASSWORD", "value": "§hunter2§"}
<key>password</key>↵<string>§hunter2§</string>
#define DB_PASSWORD "§hunter2§"
set_password("§hunter2§")
user.setPassword("§hunter2§");
.password('§hunter2§')
config.set("password", "§hunter2§")
define('DB_PASSWORD', '§wish599#§');
os.environ["DB_PASSWORD"] = "§hunter2§"
os.getenv("DB_PASSWORD", "§hunter2§")
process.env.DB_PASSWORD || '§hunter2§'
"${DB_PASSWORD:-§hunter2§}"
env PGPASSWORD=§hunter2§ psql
if password == "§hunter2§":
if (password !== "§hunter2§") {
connect(user="ada", password="§hunter2§")
HOST, USER, PASSWORD = "81.2.69.142", "ada", "§hunter2§"
user, password = 'ada', '§hunter2§'
password = "§hunter2§", "ada"
password = (↵    "§hunter2§"↵)
$pw = ConvertTo-SecureString "§hunter2§" -AsPlainText -Force
$password = ConvertTo-SecureString -String '§hunter2§' -AsPlainText
def connect(password: str = "§hunter2§"):
private static final String PASSWORD = "§hunter2§";
const password: string = "§hunter2§"
let password: &'static str = "§hunter2§";
var password string = "§hunter2§"
char password[] = "§hunter2§";
password = b"§hunter2§"
password = SecretStr("§hunter2§")
passphrase = "§correct horse battery staple§"
Server=db;User=sa;Password=§hunter2§;Timeout=3
"host=db password=§hunter2§ port=5432"
https://x.org/login?user=ada&password=§hunter2§&next=1
CREATE USER ada IDENTIFIED BY '§hunter2§';
ALTER ROLE ada WITH PASSWORD '§hunter2§';
machine x.org login ada password §hunter2§
postgres://ada:§hunter2§@db:5432/x
mongodb+srv://ada:§hun!ter2§@cluster0.x.net
redis://:§hunter2§@cache:6379
sshpass -p '§hunter2§' ssh ada@x.org
sshpass -p §hunter2§ ssh ada@x.org
mysql -u root -p§hunter2§ shop
curl -u ada:§hunter2§ https://x.org
curl -s --user "ada:§hunter2§" https://x.org
docker login -u ada -p §hunter2§ x.org
wget --user=ada --password=§olivia&7570§ https://x.org
gpg --passphrase §N1Ddk3§ --decrypt x
tool --password §govmomi§ --force
echo "§hunter2§" | sudo -S reboot
openssl rsa -passin pass:§hunter2§
login("ada", "§hunter2§")
auth = ("ada", "§hunter2§")
auth=HTTPBasicAuth('ada', '§hunter2§')
new PasswordCredential("ada", "§hunter2§")
Authorization: Basic §YWRhOmh1bnRlcjI3§
# the password is §hunter2§
# Password: §hunter2§.
(pw: §IhqSb1Gg§)
The password of ada is "§hunter2§"
unlock with §hunter2§
비밀번호: §hunter22§
"PIN": "§4711§"
{user: ada, password: §hunter2§}
"""

KEYS = r"""
API_KEY = "§abcdefgh1234§"
SECRET_KEY = "§supersecretword§"
SECRET_KEY=§supersecretword§
apiKey: '§q8Wn-2k.Lf09§',
X-Api-Key: §abcd1234efgh§
curl -H "X-Api-Key: §abcd1234efgh§" https://x.org
AWS_SECRET_ACCESS_KEY=§abcd/efgh+1234§
setJwtSecretKey("§abcdefgh1234§")
client_secret = "§GOCS-1a2b3c4d§"
<apiKey>§abcd1234efgh§</apiKey>
--auth-token=§abcd1234efgh§
--auth-token §abcd1234efgh§
{"api_key": "§9c2f1e04§"}
https://x.org/v1?api_key=§abcd1234efgh§&page=2
Authorization: Bearer §abcd1234efgh§
headers = {"Authorization": "Bearer §abcd1234efgh§"}
testSecretKey = "§6d6579e5-a5b9-49fc-a35f-b4feb9b87301§"
AccountName=x;AccountKey=§Eby8vdM02xNOcqFlqUwJPLlm==§;Suffix=y
key = "§q8WnZ2kLf09aPzX4§"
thing = "§q8WnZ2kLf09aPzX4vT7b§"
list: [ "§3f9a1c0e7b52d84466ab0f1e2d3c4b5a§" ]
Use it: §q8WnZ2kLf09aPzX4vT7b§ today
https://§q8WnZ2kLf09aPzX4vT7b§@x.org/y.git
"""

# Nothing is to be proposed here.
HARMLESS = r"""
password = ""
password = "x"
password = "password"
password = "changeme"
password = "your-password"
password = "<password>"
password = "${DB_PASSWORD}"
password = "{{ password }}"
password = "%(password)s"
password = "%s"
password = "****"
password = "xxxxxxxx"
password = "..."
password = None
password = password
password = config.password
password = getpass.getpass("Password: ")
password = request.form["password"]
password = os.environ["DB_PASSWORD"]
password = user_password,
password: str
password: string;
password: Optional[str] = None
password: true
password: "Enter your password"
"password": "Passwort"
"password": "The password must not be empty"
password = "$2b$12$abcdefghijklmnopqrstuv"
password = "{SHA}W6ph5Mm5Pz8GgiULbPgzG37mj9g="
password = "pbkdf2_sha256$260000$abc$def"
password = "password_field"
password = "NEW_PASSWORD_ID"
password = "/run/secrets/db"
password = "secret.txt"
password = "https://x.org/reset"
password = "#password"
password = "input[type=password]"
password = "^[a-z]+$"
password = "<b>password</b>"
print("Password: ") or print("twice")
password_field = "hunter2"
password_hash = "abcdef12"
hide_password = "hunter2"
compass = "north-east"
bypass("hunter2")
token = next_token
token = self.token
token = tokens[1]
token = parser.next()
token: Token
token = "IDENTIFIER"
token_type = "bearer"
access_token = "access_token"
public_key = "abcdefgh1234"
for key in keys: print(key)
key = "name"
sort_key = "created_at"
Gson gson = new com.google.gson.Gson();
kernel32.ReadConsoleW(handle)
const KEY = "com.x.app.key"
X = IPV6_HDRINCL
"integrity": "sha512-q8WnZ2kLf09aPzX4vT7bq8WnZ2kLf09aPzX4vT7b=="
sha1: "3f9a1c0e7b52d84466ab0f1e2d3c4b5a12345678"
url(data:font/woff;base64,q8WnZ2kLf09aPzX4vT7b)
ssh-rsa q8WnZ2kLf09aPzX4vT7bq8WnZ2kLf09aPzX4vT7b
id = "123e4567-e89b-42d3-a456-426614174000"
commit 3f9a1c0e7b52d84466ab0f1e2d3c4b5a12345678
github.com/x/y v1.0.0 h1:q8WnZ2kLf09aPzX4vT7bq8WnZ2kLf09aPzX4vT7b=
version = "2.5.4-SNAPSHOT"
getEventTargetFromSomething2OrOther("x")
http://localhost:8080/a@b
git@github.com:x/y.git
// the password is required
# password must not be empty
pass the `name` to it
"""


def cases(lines, category=None):
    """[(text, value, category), ...] of the lines of a table; the value is None without a §."""
    found = []
    for line in lines.strip("\n").split("\n"):
        value = line.split("§")[1] if "§" in line else None
        text = line.replace("§", "").replace("↵", "\n")
        found.append(pytest.param(text, value, category, id=line[:50]))
    return found


@pytest.mark.parametrize(
    "text, value, category", [*cases(PASSWORDS, "PASSWORD"), *cases(KEYS, "KEY")]
)
def test_each_syntax_has_its_candidate(text, value, category):
    found = candidates(text)
    assert [(text[c.start : c.end], c.category) for c in found] == [(value, category)], found


@pytest.mark.parametrize("text, value, category", cases(HARMLESS))
def test_what_is_no_secret_by_its_shape_is_refused(text, value, category):
    assert candidates(text) == []


@pytest.mark.parametrize(
    "names, kind",
    [
        ("password DB_PASSWORD mySqlPwd userpass dbPass2 admin-password PASSWORDS pin", "PASSWORD"),
        ("apiKey X-Api-Key AWS_SECRET_ACCESS_KEY setJwtSecretKey client_secret authToken2", "KEY"),
        ("password_reset_token aws_access_key_id HTTPApiKey", "KEY"),
        ("key salt basicAuth", "WEAK"),
        ("passwordField tokenUrl hide_password public_key sort_key password_hash", None),
        ("compass bypass author monkey turnkey mapping opinion tokenizer keyboard", None),
    ],
)
def test_names(names, kind):
    assert {name: kind_of(name) for name in names.split()} == dict.fromkeys(names.split(), kind)


def test_what_looks_random():
    for value in (
        "q8WnZ2kLf09aPzX4vT7b",
        "Q8WNZ2KLF09APZX4VT7B",
        "3f9a1c0e7b52d84466ab0f1e2d3c4b5a",
    ):
        assert looks_random(value), value
    for value in ("ECDHE-RSA-AES128-GCM-SHA256", "utf8_general_ci_2_table", "0123456789abcdefABCD"):
        assert not looks_random(value), value


def test_a_line_may_hold_several():
    text = 'connect("postgres://u:pw1x@h", password="hunter2", api_key="abcdefgh1234")'
    found = [text[c.start : c.end] for c in candidates(text)]
    assert found == ["pw1x", "hunter2", "abcdefgh1234"]


def test_a_picture_has_no_candidates_but_a_key_between_other_lines_is_one():
    line = "q8WnZ2kLf09aPzX4vT7b" * 3
    assert candidates(f'a = (\n  "{line}"\n  "{line}"\n  "{line}"\n)\n') == []
    assert len(candidates(f'a = (\n  "{line}"\n)\n')) == 1


# Pieces of leads and of values; texts of them come near to many syntaxes.
PIECES = [
    "password",
    "api_key",
    "token",
    "=",
    ": ",
    '"',
    "'",
    "\\",
    "(",
    ")",
    ",",
    " ",
    "\n",
    "<",
    ">",
]
PIECES += [
    "hunter2",
    "://u:",
    "@h",
    "--",
    "${X}",
    "q8WnZ2kLf09aPzX4vT7b",
    "İ",
    "密码",
    "is",
    "&quot;",
]
PIECES += [
    "curl -u a:",
    "login(",
    "value=",
    "[",
    "]",
    "-p ",
    "mysql",
    "Bearer ",
    "é",
    "\ud800",
    "x" * 70,
]
texts = st.lists(st.sampled_from(PIECES), max_size=40).map("".join) | st.text(max_size=200)


@given(texts)
def test_any_text_gives_places_in_it_sorted_and_apart(text):
    end = 0
    for candidate in candidates(text):
        assert end <= candidate.start < candidate.end <= len(text)
        assert candidate.category in ("KEY", "PASSWORD")
        end = candidate.end


@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_line_ends_make_no_difference(pieces):
    text = "".join(pieces)
    found, found_in_windows = (
        [(t[c.start : c.end], c.category, c.rule) for c in candidates(t)]
        for t in (text, text.replace("\n", "\r\n"))
    )
    assert found == found_in_windows


def test_each_expression_looks_at_a_bounded_stretch():
    patterns = [*SYNTAXES.values()]
    patterns += [phrase.pattern for phrases in PHRASES.values() for phrase in phrases]
    for pattern in patterns:
        assert _parser.parse(pattern.pattern, pattern.flags).getwidth()[1] < 3000, pattern.pattern


def test_escapes_cost_no_more_than_their_number():
    """Read in two ways each, two hundred would take longer than the universe has been there."""
    for escape in (r"\n", r"\a", r"\\", r"\\\n"):
        for text in ('password = "{}', 'set_password("{}", "x")', '"token = \\"{}', '"pwd": "{}'):
            candidates(text.format(escape * 200))


# Each is the beginning of a lead, or of a value that does not end.
ENDLESS = ["pass", "pass:", "password=", 'password="', 'password\\"', "password(", '("password", ']
ENDLESS += [
    "<password ",
    "password of a ",
    "://",
    "://a:",
    "curl -u ",
    "mysql -p",
    'login("a",',
    "zip ",
]
ENDLESS += [
    "A1b2C3d4",
    '"A1b2C3d4E5f6G7h8I9j0K1"\n',
    "a_",
    "key : a",
    "密码",
    "İ",
    "x" * 59 + "pass ",
    'a, password = "a", "b", ',
]


@pytest.mark.slow
@pytest.mark.parametrize("unit", ENDLESS)
def test_time_is_in_proportion_to_the_text(unit):
    """Sixteen times the text takes about sixteen times as long, not 256 times."""
    seconds = []
    for size in (20_000, 320_000):
        text = (unit * size)[:size]
        begin = time.process_time()
        candidates(text)
        seconds.append(time.process_time() - begin)
    assert seconds[1] < 64 * seconds[0] + 0.5
