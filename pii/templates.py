"""TODO."""

import hashlib
import re
import string

from pii.labels import CATEGORIES

SPLITS = {"train": 0.75, "validation": 0.05, "test": 0.2}  # of files, templates and values alike


# Each line is a template: [[a|b]] is a choice, {NAME} an entity, {lowercase} something harmless, {{ a brace, \n a new line, {c} the sign
# that begins a comment.
COMMENTS = r"""
{c} Author: {NAME} <{EMAIL}>
{c} @author {NAME}
{c} Author(s): {NAME}, {NAME}
{c} __author__: {NAME} ({EMAIL})
{c} Copyright (c) {year} {NAME}
{c} Copyright {year}-{year} {NAME} <{EMAIL}>. All rights reserved.
{c} (C) {year} by {NAME}
{c} [[Written|Contributed|Implemented]] by {NAME}, {month} {year}.
{c} Maintainer: {NAME} ({EMAIL})
{c} Original [[version|code|idea]] by {NAME}
{c} [[Modified|Changed|Ported|Rewritten]] by: {NAME} <{EMAIL}>
{c} Based on the work of {NAME} and {NAME}.
{c} Thanks to {NAME} for [[reporting this|the patch|testing]].
{c} {NAME} {date}: {words}
{c} {date} {NAME} <{EMAIL}>
{c} - {words} ({NAME})
{c} [[Reported|Suggested|Found]] by {NAME} <{EMAIL}>
{c} [[Reviewed-by|Signed-off-by|Co-authored-by|Tested-by]]: {NAME} <{EMAIL}>
{c} Created by {NAME} on {date}.
{c} $Id: {ident}.c,v {version} {date} {USERNAME} Exp $
{c} [[TODO|FIXME|XXX|HACK]]({USERNAME}): {words}
{c} [[TODO|FIXME]] @{USERNAME} {words}
{c} {words} -- {USERNAME}, {date}
{c} created by {USERNAME} on {date}
{c} last edited by {USERNAME}
{c} patch from @{USERNAME}, thanks
{c} see https://github.com/{USERNAME}/{ident}
{c} fork of git@github.com:{USERNAME}/{ident}.git
{c} as {USERNAME} said in the review, {words}
{c} [[Contact|Write to|Ask]] {EMAIL} [[for|about]] {words}
{c} Questions? [[mailto:|]]{EMAIL}
{c} Bugs: {EMAIL}, {EMAIL}
{c} E-mail: {EMAIL}
{c} ask {NAME} before you change {ident}
{c} {NAME}'s machine is {IP_ADDRESS}
{c} tested [[on|against|with]] {IP_ADDRESS}
{c} the server at {IP_ADDRESS} {words}
{c} allowed from {IP_ADDRESS} and {IP_ADDRESS}
{c} ssh {USERNAME}@{IP_ADDRESS}
{c} scp {ident}.tar.gz {USERNAME}@{IP_ADDRESS}:/home/{USERNAME}/
{c} log in as {USERNAME} with {PASSWORD}
{c} the [[old|test|default]] password [[was|is]] {PASSWORD}
{c} password: {PASSWORD} ({words})
{c} pw={PASSWORD} until {date}
{c} key: {KEY}
{c} use {KEY} as the token [[for now|in staging]]
{c} {ident} needs {KEY}
"""


CODE = r"""
__author__ = "{NAME}"
__author__ = "{NAME} <{EMAIL}>"
__maintainer__, __email__ = "{NAME}", "{EMAIL}"
author = [[new Person|Author]]("{NAME}", "{EMAIL}")
{ident} = ["{NAME}", "{NAME}", "{NAME}"]
assert {ident}("{NAME}") == {number}
[[const|var|let]] [[owner|customer|fullName|contact]] = '{NAME}';
user.[[name|full_name|displayName]] = "{NAME}"
{{"[[name|full_name|customer]]": "{NAME}", "age": {number}}}
insert into [[users|people|customers]] values ({number}, '{NAME}', '{EMAIL}')
<[[name|author|contact]]>{NAME}</[[name|author|contact]]>
print("Hello, {NAME}")
{word}.add(Person("{NAME}", {number}))
new User({{ name: "{NAME}", email: "{EMAIL}", password: "{PASSWORD}" }})
INSERT INTO {word} (name, mail) VALUES ('{NAME}', '{EMAIL}');
expect({ident}.name).toBe("{NAME}")
<td>{NAME}</td><td>{EMAIL}</td>
<option value="{number}">{NAME}</option>
"{NAME}" => "{EMAIL}",
{word}["{NAME}"] = {number}
@patch("{ident}", "{EMAIL}")
assertEquals("{EMAIL}", {ident}.getEmail())
whitelist = {{"{EMAIL}", "{EMAIL}"}}
fetch(`https://{host}/{word}?mail={EMAIL}`)
{ident} = [["{KEY}"]]
os.environ["{WORD}_[[TOKEN|KEY|SECRET]]"] = "{KEY}"
.header("[[X-Auth-Token|Api-Key|X-Token]]", "{KEY}")
--data '{{"token": "{KEY}"}}'
git clone https://{KEY}@{host}/{word}/{ident}.git
docker login -u {USERNAME} -p {PASSWORD} {host}
wget --user={USERNAME} --password={PASSWORD} https://{host}/{word}
new PasswordCredential("{USERNAME}", "{PASSWORD}")
DriverManager.getConnection(url, "{USERNAME}", "{PASSWORD}");
{ident}.setPassword("{PASSWORD}");
assertTrue(check("{PASSWORD}"))
[[pass|pw|pwd]] = [["{PASSWORD}"]]
driver.find_element("password").send_keys("{PASSWORD}")
su - {USERNAME} -c "{word}"
sudo -u {USERNAME} {word} --{word}
usermod -aG {word} {USERNAME}
getUser("{USERNAME}").then({ident})
assert user.login == "{USERNAME}"
https://gitlab.com/{USERNAME}/{ident}/-/issues/{number}
<a href="https://github.com/{USERNAME}">@{USERNAME}</a>
import {word} from "github.com/{USERNAME}/{word}"
rsync -av {USERNAME}@{host}:/{word} .
curl http://{IP_ADDRESS}:{port}/{word}
new InetSocketAddress("{IP_ADDRESS}", {port})
{ident}.connect("{IP_ADDRESS}")
[[peers|hosts|nodes]] = ["{IP_ADDRESS}", "{IP_ADDRESS}", "{IP_ADDRESS}"]
if (ip === '{IP_ADDRESS}') return;
[[email|to|sender|recipient|ADMIN_EMAIL]] = "{EMAIL}"
send_mail([["{ident}"|subject]], to=["{EMAIL}", "{EMAIL}"])
<a href="mailto:{EMAIL}">{word}</a>
"[[email|mail|contact]]": "{EMAIL}",
if ($[[email|address]] == '{EMAIL}') {{
{ident}.[[login|signIn]]('{EMAIL}', '{PASSWORD}')
git config user.email {EMAIL}
[[api_key|apiKey|API_KEY|api_token|APIKEY]] = "{KEY}"
[[const|final String|let]] [[API_KEY|accessToken|SECRET_KEY|authToken]] = "{KEY}";
[[AWS_ACCESS_KEY_ID|AWS_SECRET_ACCESS_KEY|client_secret|STRIPE_KEY]] = '{KEY}'
{ident}.[[set_token|authenticate|configure]]([[token=|]]"{KEY}")
headers = {{"Authorization": "[[Bearer|token|Basic]] {KEY}"}}
"[[secret|token|key|access_token|private_key]]": "{KEY}",
curl -H "[[X-Api-Key|Authorization|PRIVATE-TOKEN]]: {KEY}" https://{host}/{word}
https://{host}/{word}?[[api_key|token|key|access_token]]={KEY}
[[define|setenv]]("{WORD}_[[KEY|TOKEN|SECRET]]", "{KEY}")
{ident} = Client("{KEY}", "{KEY}")
-----BEGIN{kind} PRIVATE KEY-----
[[password|passwd|pwd|PASSWORD|db_password]] = "{PASSWORD}"
[[password|passwd|pass]] = '{PASSWORD}';
[[final String|const|private static string]] [[PASSWORD|dbPass|adminPassword]] = "{PASSWORD}";
"[[password|pwd|passphrase|pass]]": "{PASSWORD}",
{ident}.connect(host="{host}", user="{USERNAME}", [[password|passwd]]="{PASSWORD}")
mysql -u {USERNAME} -p{PASSWORD} {ident}
curl -u {USERNAME}:{PASSWORD} https://{host}/{word}
[[postgres|postgresql|mysql|mongodb|amqp|redis|ftp|https]]://{USERNAME}:{PASSWORD}@{host}[[:{port}|]]/{ident}
Server={host};Database={ident};User Id={USERNAME};Password={PASSWORD};
jdbc:mysql://{IP_ADDRESS}:{port}/{ident}?user={USERNAME}&password={PASSWORD}
sshpass -p '{PASSWORD}' ssh {USERNAME}@{IP_ADDRESS}
<[[password|Password]]>{PASSWORD}</[[password|Password]]>
login("{USERNAME}", "{PASSWORD}")
auth = ("{USERNAME}", "{PASSWORD}")
create user {USERNAME} [[identified by|with password]] '{PASSWORD}';
echo "{PASSWORD}" | sudo -S {word}
[[username|user|login|USER|db_user]] = "{USERNAME}"
"[[username|login|user]]": "{USERNAME}",
User.find_by([[login|username|name]]: "{USERNAME}")
path = "[[/home|/Users]]/{USERNAME}/{word}/{ident}"
C:\Users\{USERNAME}\{word}\{ident}.txt
https://twitter.com/{USERNAME}
chown {USERNAME}:{word} /var/{word}
[[host|HOST|server|ip|address]] = "{IP_ADDRESS}"
[[const|let|var]] [[url|endpoint]] = "http://{IP_ADDRESS}:{port}/{word}";
socket.connect(("{IP_ADDRESS}", {port}))
ping [[-c {number}|]] {IP_ADDRESS}
"[[ip|host|remote_addr|nameserver]]": "{IP_ADDRESS}",
iptables -A INPUT -s {IP_ADDRESS} -j [[DROP|ACCEPT]]
{IP_ADDRESS}	{ident}.{word}.net
nameserver {IP_ADDRESS}
allow {IP_ADDRESS}/[[24|32|16]];
"""


DATA = r"""
[[username|user|login]]: {USERNAME}\n[[password|passwd|pass]]: {PASSWORD}
[[DB_USER|POSTGRES_USER]]={USERNAME}\n[[DB_PASSWORD|POSTGRES_PASSWORD|DB_PASS]]={PASSWORD}\nDB_HOST={IP_ADDRESS}
export [[AWS_ACCESS_KEY_ID|GITHUB_TOKEN|API_TOKEN|SLACK_TOKEN]]={KEY}
[[SECRET_KEY|API_KEY|TOKEN|ACCESS_KEY]]: [["{KEY}"|{KEY}]]
[[aws_secret_access_key|secret_key|auth_token]] = {KEY}
machine {host} login {USERNAME} password {PASSWORD}
{host}:{port}:{ident}:{USERNAME}:{PASSWORD}
[client]\nuser={USERNAME}\npassword={PASSWORD}\nhost={IP_ADDRESS}
//registry.{host}/:_authToken={KEY}
[user]\n\tname = {NAME}\n\temail = {EMAIL}
"author": {{\n  "name": "{NAME}",\n  "email": "{EMAIL}"\n}},
authors:\n  - {NAME} <{EMAIL}>\n  - {NAME} <{EMAIL}>
maintainers:\n- name: {NAME}\n  email: {EMAIL}\n  github: {USERNAME}
From: {NAME} <{EMAIL}>\nTo: {EMAIL}\nSubject: {words}
{IP_ADDRESS} - {USERNAME} [{date}] "GET /{word} HTTP/1.1" 200 {number}
{date} {time} [[INFO|WARN|ERROR]] {ident}: user {USERNAME} logged in from {IP_ADDRESS}
{date} {time} sshd[{number}]: Failed password for {USERNAME} from {IP_ADDRESS} port {port}
{time} [[connection|request]] from {IP_ADDRESS}:{port} [[closed|accepted]]
{date} {time} mail sent to {EMAIL} ({number} ms)
{NAME},{EMAIL},{IP_ADDRESS}
{number};{NAME};{USERNAME};{date}
commit {sha1}\nAuthor: {NAME} <{EMAIL}>\nDate: {date} {time}
* @{USERNAME} @{USERNAME}
{word}/ @{USERNAME}
Host {word}\n  HostName {IP_ADDRESS}\n  User {USERNAME}
{USERNAME}:x:{number}:{number}:{NAME}:/home/{USERNAME}:/bin/bash
{ident} ansible_host={IP_ADDRESS} ansible_user={USERNAME} ansible_password={PASSWORD}
login {USERNAME}\npassword {PASSWORD}
environment:\n  - [[MYSQL_USER|REDIS_USER|SMTP_USER]]={USERNAME}\n  - [[MYSQL_ROOT_PASSWORD|REDIS_PASSWORD|SMTP_PASSWORD]]={PASSWORD}
stringData:\n  username: {USERNAME}\n  password: {PASSWORD}\n  token: {KEY}
<server>\n  <id>{word}</id>\n  <username>{USERNAME}</username>\n  <password>{PASSWORD}</password>\n</server>
<add name="{ident}" connectionString="Data Source={host};User ID={USERNAME};Password={PASSWORD}" />
DATABASES = {{\n    "NAME": "{ident}",\n    "USER": "{USERNAME}",\n    "PASSWORD": "{PASSWORD}",\n    "HOST": "{IP_ADDRESS}",\n}}
production:\n  adapter: mysql2\n  username: {USERNAME}\n  password: {PASSWORD}\n  host: {host}
define('DB_USER', '{USERNAME}');\ndefine('DB_PASSWORD', '{PASSWORD}');
spring.datasource.username={USERNAME}\nspring.datasource.password={PASSWORD}
index-url = https://{USERNAME}:{PASSWORD}@{host}/simple
[credential]\n\tusername = {USERNAME}
"contributors": [\n  "{NAME} <{EMAIL}>",\n  "{NAME} <{EMAIL}>"\n],
author='{NAME}',\nauthor_email='{EMAIL}',
spec.authors = ["{NAME}", "{NAME}"]\nspec.email = ["{EMAIL}"]
<developer>\n  <id>{USERNAME}</id>\n  <name>{NAME}</name>\n  <email>{EMAIL}</email>\n</developer>
Package: {word}\nAuthor: {NAME} [aut, cre]\nMaintainer: {NAME} <{EMAIL}>
 -- {NAME} <{EMAIL}>  {date} {time}
M:\t{NAME} <{EMAIL}>\nS:\tMaintained
* {NAME}\n* {NAME}\n* {NAME}
- {NAME} (@{USERNAME})\n- {NAME} (@{USERNAME})
{NAME} <{EMAIL}> <{EMAIL}>
MAILTO={EMAIL}
{date} {time} postfix[{number}]: {md5}: from=<{EMAIL}>, to=<{EMAIL}>
{date} {time} sshd[{number}]: Accepted publickey for {USERNAME} from {IP_ADDRESS} port {port}
{date} {time} su: session opened for user {USERNAME} by {USERNAME}(uid={number})
{date} {time} [error] client: {IP_ADDRESS}, server: {host}, request: "GET /{word}"
{date} {time} DEBUG {ident} - login ok: {EMAIL} ({IP_ADDRESS})
{word} IN A {IP_ADDRESS}\n{word} IN A {IP_ADDRESS}
inet addr:{IP_ADDRESS}  Bcast:{IP_ADDRESS}  Mask:255.255.255.0
 {number}  {host} ({IP_ADDRESS})  {number} ms
BEGIN:VCARD\nFN:{NAME}\nEMAIL:{EMAIL}\nEND:VCARD
ORGANIZER;CN={NAME}:mailto:{EMAIL}
INSERT INTO `users` VALUES ({number},'{USERNAME}','{PASSWORD}','{EMAIL}','{NAME}');
[{{"id": {number}, "name": "{NAME}", "email": "{EMAIL}", "login": "{USERNAME}"}},
[{word}]\naccess_key = {KEY}\nsecret_key = {KEY}
provider "{word}" {{\n  token = "{KEY}"\n}}
variable "[[password|db_pass]]" {{\n  default = "{PASSWORD}"\n}}
vars:\n  ansible_ssh_user: {USERNAME}\n  ansible_ssh_pass: {PASSWORD}
smtp:\n  host: {IP_ADDRESS}\n  user: {EMAIL}\n  pass: {PASSWORD}
Dear {NAME},\n{words}\nRegards,\n{NAME}
| {NAME} | {EMAIL} | {date} |
| {USERNAME} | {IP_ADDRESS} | {number} |
drwxr-xr-x  {number} {USERNAME} {USERNAME}  {number} {date} {word}
{USERNAME}@{word}:~$ cd {word}
$ whoami\n{USERNAME}
{USERNAME} pts/0 {date} {time} ({IP_ADDRESS})
server {{\n  listen {IP_ADDRESS}:{port};\n  server_name {host};\n}}
ssh-rsa {public} {USERNAME}@{word}
dn: uid={USERNAME},ou=people\ncn: {NAME}\nmail: {EMAIL}
"""


HARMLESS = r"""
{c} version {quad} of {ident}
{c} [[sha256|sha1|md5]]: {hash}
{c} commit {sha1}
{c} [[see|cf.]] RFC {number}, section {version}
{c} [[e.g.|for example|i.e.]] {fake_email} {words}
{c} {uuid}
{c} [[password|token]] [[is read from the environment|must not be empty|{words}]]
{c} TODO: {words}
{c} FIXME({word}): {words}
{c} Copyright (c) {year} The {Word} [[Authors|Project|Foundation]]. All rights reserved.
{c} Licensed under the {Word} {Word} License
{c} {Word} {Word} [[algorithm|theorem|transform]], see {Word} {Word} {year}
{c} listen on {local}
{c} {word}, {word} and {Word} {words}
{c} {Word} {words}. {Word} {words}.
{c} [[Requires|Since|Tested on]] {Word} {version}
{c} {ident}({word}, {word}) -> {word}
{c} see https://{host}/{word}/{number}
{c} [[By|From]] default {words}
{c} the user {words}; the password {words}
class {Word}{Word}({Word}):
raise {Word}Error("{words}")
Host *\n  ServerAliveInterval {number}
Name: {word}\nVersion: {version}
HostName = {host}
User = [[root|nobody|www-data]]
ssh-[[rsa|dss]] {public} [[root@localhost|deploy|key-{number}]]
{word}:{number}:{word}:{word}
{word},{word},{number},{version}
{date},{number},{word}
| {word} | {number} | {version} |
* {Word} {words}
- {Word} {Word}: {words}
version = "{quad}"
"version": "{version}",
__version__ = '{quad}'
{ident}>={version},<{quad}
assembly: AssemblyVersion("{quad}")
[[oid|OID]] = "1.3.6.1.{quad}"
[[sha256|digest|checksum|etag]] = "{hash}"
"integrity": "sha512-{base64}",
"[[resolved|hash|shasum]]": "{hash}",
{word}@sha256:{sha256}
assert hashlib.md5({ident}).hexdigest() == "{md5}"
[[uuid|id|GUID]] = "{uuid}"
[Guid("{uuid}")]
[[password|passwd|PASSWORD]] = [["{fake_password}"|os.environ["{WORD}"]|getpass()|None|""|input("{word}")]]
[[password|secret|token]]: [[{fake_password}|${{{WORD}}}|<{word}>|]]
[[api_key|apiKey|token|secret]] = [["{fake_key}"|os.getenv("{WORD}_KEY")|config.{ident}|null]]
"[[api_key|token|password]]": "[[{fake_key}|{fake_password}|string]]",
[[email|EMAIL|to]] = "{fake_email}"
mail("{fake_email}", {ident})
[[host|HOST|bind|listen]] = "{local}"
http://{local}:{port}/{word}
[[ALLOWED_HOSTS|nameservers]] = ["{local}", "{local}"]
if {ident} == "{local}":
{local} {word}.local
[[user|username|login]] = [["root"|"admin"|"user"|"guest"|"{fake_user}"|getpass.getuser()]]
[[USER|PGUSER|DB_USER]]=[[root|postgres|admin|www-data]]
/home/[[user|ubuntu|runner|vagrant]]/{word}
postgres://[[user:password|{fake_user}:{fake_password}|$USER:$PASS]]@localhost:{port}/{ident}
ssh-[[rsa|ed25519]] {public}
-----BEGIN PUBLIC KEY-----\n{public}\n-----END PUBLIC KEY-----
-----BEGIN CERTIFICATE-----\n{public}\n-----END CERTIFICATE-----
<img src="data:image/png;base64,{base64}">
url(data:font/woff2;base64,{base64})
{ident} = "{base64}"  {c} {words}
{ident} = 0x{md5}
{time} {word}: {number} {words}
{date} {time} [INFO] {ident}: {words}
{ident}::{word}::{Word}
[[name|title|label]] = "{Word} {Word}"
"name": "{Word} {Word}",
<title>{Word} {Word}</title>
@{word}({ident}={number})
[[sort|key|primary_key]] = "{ident}"
{ident}.[[key|token|secret|password]] = {ident}
def [[set_password|check_token|get_key]]({ident}, {word}):
token = {ident}.next_token("{word}")
"""


# Assignments: each kind of value under each name in each style is a template of its own.
NAMES = {
    "NAME": "name full_name author customer owner contact_name display_name recipient employee assignee signed_by reviewer patient manager",
    "EMAIL": "email mail email_address to from sender recipient reply_to contact admin_email notify cc support_email user_email",
    "KEY": """api_key apikey token access_token auth_token secret secret_key client_secret private_key api_secret aws_secret_access_key
              bearer_token webhook_secret encryption_key consumer_key app_key service_token deploy_key license_key""",
    "PASSWORD": """password passwd pwd pass db_password admin_password root_password smtp_pass passphrase user_password login_password
                   mysql_pwd ftp_password keystore_password default_password""",
    "USERNAME": """username user login user_name db_user account ssh_user owner screen_name handle nickname uid github_user assigned_to
                   created_by modified_by nick skype slack_user os_user remote_user run_as author_id login_name acct""",
    "IP_ADDRESS": "ip host server address ip_address remote_addr gateway dns nameserver bind_host endpoint peer proxy client_ip",
    "hash": "checksum sha256 digest etag md5 commit revision fingerprint sha1 blob_id content_hash build_hash",
    "quad": "version build release min_version file_version firmware oid",
    "uuid": "id uuid guid request_id session_id device_id project_id trace_id",
    "base64": "data image icon payload integrity thumbnail font certificate",
    "hexnumber": "mask magic seed prime constant modulus offset flags crc key address id",
    "title": "title label heading project product category city team",
    "words": "description message comment summary help hint reason",
    "ident": "key field column table type kind sort_key primary_key token_type password_field user_role",
}


NAMES |= {fake: NAMES[like] for fake, like in [
    ("fake_password", "PASSWORD"), ("fake_key", "KEY"), ("fake_email", "EMAIL"), ("fake_user", "USERNAME"), ("local", "IP_ADDRESS")
]}  # fmt: skip


STYLES = r"""
{snake} = "{value}"
{snake} = '{value}'
{camel} = "{value}";
const {camel} = '{value}';
private static final String {UPPER} = "{value}";
{UPPER} = "{value}"
{UPPER}={value}
export {UPPER}="{value}"
{snake}: {value}
{kebab}: "{value}"
- {snake}: {value}
"{camel}": "{value}",
"{snake}": "{value}"
'{snake}' => '{value}',
:{snake} => "{value}",
{snake}: '{value}',
<{camel}>{value}</{camel}>
<{kebab} value="{value}"/>
--{kebab} {value}
--{kebab}={value}
{camel} := "{value}"
${snake} = "{value}";
config["{snake}"] = "{value}"
{word}.{camel} = "{value}"
{word}.set("{snake}", "{value}")
{ident}({snake}="{value}")
#define {UPPER} "{value}"
set {snake} {value}
{snake} = {value}
let {snake} = "{value}".to_string();
{c} {snake}: {value}
{c} {snake} = {value}
if {snake} == "{value}":
?{snake}={value}&{word}={number}
"""


# The same in prose: what leads to a value, and around it. {lead} is one of these.
LEADS = {
    "NAME": """written by|author|thanks to|reviewed by|maintained by|contributed by|suggested by|copyright {year}|reported by|designed by|
               courtesy of|on behalf of|dear|regards,|talk to|with help of|together with|and|according to|
               joint work with|invented by|ported by|hello|by|credits:""",
    "USERNAME": """ping|cc|assigned to|user|login as|account of|logged in as|by user|owner|home of|su|run as|approved by|merged by|
                   session of|requested by user|blame|follow|member|unknown user|@""",
    "EMAIL": "contact|mail|write to|e-mail|send to|bugs to|subscribe|reply to|sent from|cc|reach us at|address|mailto:|by",
    "PASSWORD": """password is|the password|pw|pass|with password|passphrase|log in with|default password|unlock with|decrypted with|
                   the password was changed to|pwd:""",
    "KEY": "token|api key|the key is|use key|secret is|bearer|access token|license|signed with key|authorized by token|key:|auth",
    "IP_ADDRESS": """tested on|host|ping|from|connect to|server at|blocked|reachable at|gateway|listens on|route via|tunnel to|node|client|
                     deployed to|traffic of|dns""",
    "hexnumber": "the constant|magic number|mask|crc|at address|returns|seed|equals",
    "hash": "checksum|commit|md5 of it:|digest|revision|fixed in|sha256|reverts|cherry picked from|blob",
    "quad": "version|since|requires|release|upgraded to|section|build|needs at least|protocol|rfc",
    "title": "see|the|called|implements|returns a|in|like the|section|chapter|based on the|uses the|part of|for|class|an example of",
    "words": "note|returns|the user|the password|the key|the address|user|password|token|author|by|see|mail|name|host|contact|by default",
    "ident": "see|calls|user|key|password|token|by|from|the|returns|sets|name|login|owner|host|email|cc",
}


LEADS |= {
    "local": LEADS["IP_ADDRESS"],
    "fake_email": LEADS["EMAIL"],
    "fake_password": LEADS["PASSWORD"],
    "fake_user": LEADS["USERNAME"],
}


PROSE = r"""
{c} {lead} {value}
{c} {lead}: {value}
{c} {Lead} {value}, {words}
{c} {Lead} {value} ({date})
{c} {words} {lead} {value}
{c} {words}, {lead} {value}.
{c} {words}; {lead}: {value}; {words}
{lead}={value} {words}
  {Lead} {value}
{lead} {value} {word} {word}
<{lead}> {value}
{c} ({lead} {value})
{Lead} {value}.
 * {Lead}: {value}
- {lead} {value}
{date} {time} {word}: {lead} {value}
[{date}] {Lead} {value} {words}
print("{lead} {value}")
log.info("{Lead} {value}, {words}")
"{lead} {value}"
{Lead} {value} {words} {number}
<p>{Lead} {value}</p>
{words}\n{Lead} {value}\n{words}
"""


# Rows of tables and lists; {} are the fields, of which there may be more than two.
FIELDS = """NAME EMAIL|USERNAME EMAIL|NAME USERNAME EMAIL|USERNAME IP_ADDRESS|IP_ADDRESS USERNAME|USERNAME PASSWORD|EMAIL PASSWORD|
NAME date|number NAME|USERNAME date|number USERNAME|date USERNAME IP_ADDRESS|USERNAME NAME|NAME NAME|USERNAME USERNAME USERNAME|EMAIL EMAIL|
IP_ADDRESS IP_ADDRESS|word IP_ADDRESS|word KEY|USERNAME KEY|number word|word word word|version hash|ident number|date version|word title|
quad date|uuid word|title number"""


ROWS = r"""
| {} | {} |
|{}|{}|
{}, {}
{},{}
{};{}
"{}","{}"
{}\t{}
- {} - {}
({}, {}),
('{}', '{}'),
["{}", "{}"],
<tr><td>{}</td><td>{}</td></tr>
{}: {}
* {}  {}
{c} {}, {}
"""


def split_of(value):
    """The split in which a value, a template or a file may appear, by its hash."""
    share = int.from_bytes(hashlib.sha256(value.encode(errors="replace")).digest()[:8]) / 2**64
    for split, part in SPLITS.items():
        share -= part
        if share < 0:
            return split
    return split


def templates(split):
    """{group: [template, ...]} of a split: each has some of every group, and of every category in it. The assignments, whose templates
    are so many that their hashes decide, come as a list for each kind of value."""
    written = {line for text in (COMMENTS, CODE, DATA, HARMLESS) for line in text.split("\n")}
    in_split = lambda template: template not in written and split_of(template) == split
    turn = "train train test train train validation train test train train".split()
    groups = {"comments": COMMENTS, "code": CODE, "data": DATA, "harmless": HARMLESS}
    found = {}
    for name, text in groups.items():
        lines = text.strip("\n").split("\n")
        kind = lambda line: [category for category in CATEGORIES if f"{{{category}}}" in line]
        order = sorted(lines, key=lambda line: (kind(line), hashlib.sha256(line.encode()).digest()))
        found[name] = [line for i, line in enumerate(order) if turn[i % len(turn)] == split]
    found["assignments"] = []
    for kind, names in NAMES.items():
        of_kind = []
        for name in names.split():
            first, *rest = name.split("_")
            cases = {
                "snake": name,
                "UPPER": name.upper(),
                "kebab": name.replace("_", "-"),
                "camel": first + "".join(map(str.title, rest)),
            }
            for style in STYLES.strip("\n").split("\n"):
                template = style.replace("{value}", f"{{{kind}}}")
                for case, spelled in cases.items():
                    template = template.replace(f"{{{case}}}", spelled)
                of_kind += [template] * in_split(template)
        found["assignments"].append(of_kind)
    of_kind = []
    for fields in re.split(r"\|\s*", FIELDS):
        for row in ROWS.strip("\n").split("\n"):
            before, between, after = row.split("{}")
            template = before + between.join(f"{{{field}}}" for field in fields.split()) + after
            of_kind += [template] * in_split(template)
    found["assignments"] += [of_kind] * 3
    for kind, leads in LEADS.items():
        of_kind = []
        for lead in re.split(r"\|\s*", leads):
            for around in PROSE.strip("\n").split("\n"):
                template = (
                    around.replace("{lead}", lead)
                    .replace("{Lead}", lead[0].upper() + lead[1:])
                    .replace("{value}", f"{{{kind}}}")
                )
                of_kind += [template] * in_split(template)
        found["assignments"].append(of_kind)
    return found


def render(template, values, sign="#"):
    """(text, [(category, start, end), ...]) of a template."""
    while choice := re.search(r"\[\[(.*?)\]\]", template):
        template = (
            template[: choice.start()]
            + values.random.choice(choice[1].split("|"))
            + template[choice.end() :]
        )
    if template.startswith("-----BEGIN{kind} PRIVATE"):
        kind = values.draw("kind")
        text = f"-----BEGIN{kind} PRIVATE KEY-----\n{values.private_key()}\n-----END{kind} PRIVATE KEY-----"
        return text, [("KEY", 0, len(text))]
    text, found = "", []
    for literal, kind, *_ in string.Formatter().parse(
        template.replace(r"\n", "\n").replace(r"\t", "\t")
    ):
        text += literal
        if kind is not None:
            value = sign if kind == "c" else values.draw(kind)
            if kind in CATEGORIES:
                found.append((kind, len(text), len(text) + len(value)))
            text += value
    return text + (" -->" if sign == "<!--" and template.startswith("{c}") else ""), found
