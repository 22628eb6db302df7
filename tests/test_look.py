"""What the model gets to see: blocks that make up the text, and those in which something may be."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pii import look, thresholds
from pii.labels import CATEGORIES
from pii.synthesize import ordinary_lines

LINES = st.lists(st.text("ab ,;é\t\r", max_size=40), max_size=30).map("\n".join)


@given(text=LINES | st.text(max_size=300), size=st.integers(1, 60))
def test_blocks_are_the_text(text, size):
    """Nothing is lost, nothing is twice, and only a long line is cut."""
    places = look.blocks(text, size)
    assert "".join(text[start:end] for start, end in places) == text
    for start, end in places:
        assert 0 < end - start <= size
        before = text.rfind("\n", 0, start) + 1
        behind = text.find("\n", start)
        line_end = len(text) if behind < 0 else behind + 1
        assert start == before or line_end - before > size


def test_a_block_ends_behind_a_blank_line():
    text = "a = 1\n" * 5 + "\n" + "b = 2\n" * 5
    assert [text[start:end] for start, end in look.blocks(text, 50)] == [
        "a = 1\n" * 5 + "\n",
        "b = 2\n" * 5,
    ]


@given(text=LINES, places=st.lists(st.integers(0, 500)))
def test_blocks_with_places(text, places):
    pieces = look.blocks(text, 30)
    kept = look.blocks_with(pieces, sorted(places))
    for piece in pieces:
        assert (piece in kept) == any(piece[0] <= place < piece[1] for place in places)


@pytest.mark.parametrize(
    "line",
    [
        "# Author: Ada Lovelace",
        "Copyright (c) 1995-2005 Žofie Holub",
        "| Ada Lovelace | 1815 |",
        '"name": "Ada King Lovelace",',
        "- [Ada Lovelace](https://github.com/ada)",
        "# TODO(ada): remove",
        "see https://github.com/ada/engine",
        "cd /home/ada/engine",
        'db_user = "ada"',
        "user: ada",
        "* Faster loading, thanks to @ada.",
        "Ada Lovelace",
        "# 作者 王小明",
    ],
)
def test_a_name_is_looked_at(line):
    text = f"x = 1\n{line}\ny = 2\n"
    assert any(6 <= place <= 6 + len(line) for place in look.leads(text))


@pytest.mark.parametrize(
    "line",
    [
        "    @property",
        "     * @param user the one who asks",
        "for user in users:",
        "user = self.get_user()",
        "if (handle === undefined) return;",
        "class Foo(Bar):",
        "return Math.Max(a, b)",
        "",
    ],
)
def test_ordinary_code_is_not_looked_at(line):
    assert not look.leads(f"x = 1\n{line}\ny = 2\n")


def test_letters_that_become_two_in_lower_case():
    """İ does: places must be those of the text."""
    text = "x = 'İİİİİİİİ'\nsee https://github.com/ada/engine\n"
    assert text.index("github") in look.leads(text)


# Ordinary lines of many languages: none holds anything of anybody.
ORDINARY = {
    "python": """
def read_token(stream: TextIO) -> Token:
    \"\"\"Return the next Token, or raise Syntax Error.\"\"\"
    password = getpass.getpass()
    if user.is_authenticated and user.token == request.GET["token"]:
        return Token(kind, value=int(match.group(1)))
""",
    "go": """
package main
import "net/http"
func (s *Server) Login(w http.ResponseWriter, r *http.Request) error {
\tuser, err := s.store.Find(r.Context(), r.FormValue("password"))
\treturn fmt.Errorf("Wrong Password for %s", user.Name)
}
""",
    "javascript": """
const token = await client.getToken({ scope: scopes });
export default function Login({ user, onSubmit }) {
  return <input type="password" value={password} onChange={setPassword} />;
}
""",
    "java": """
@Override
public final class Token extends AbstractToken implements Serializable {
    private String password;
    this.password = Objects.requireNonNull(password, "Password Required");
}
""",
    "yaml": """
name: Build And Test
on: [push, pull_request]
    - uses: actions/checkout@v4
      with:
        token: ${{ secrets.GITHUB_TOKEN }}
    runs-on: ubuntu-latest
""",
    "sql": """
CREATE TABLE users (id INT PRIMARY KEY, password VARCHAR(64) NOT NULL);
SELECT login, token FROM users WHERE id = ?;
""",
    "markdown": """
## Getting Started
Install Visual Studio Code, then run `make test`.
The Quick Start Guide shows how a Token Bucket works.
""",
    "ini": """
[server]
user = www-data
password =
token_file = /etc/server/token
""",
}


@pytest.mark.parametrize("language", ORDINARY)
def test_ordinary_lines_survive(language):
    """They become the hosts of synthetic data: without them a detector cries wolf."""
    lines = [line for line in ORDINARY[language].split("\n") if line]
    kept = ordinary_lines(ORDINARY[language])
    lost = [line for line in lines if line not in kept]
    assert len(lost) <= 0.25 * len(lines), lost


def test_a_secret_of_several_lines_is_left_out_whole():
    body = "\n".join(["MIIEpAIBAAKCAQEAqAFs" * 3] * 3)
    key = f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n-----END RSA PRIVATE KEY-----"
    assert ordinary_lines(f"x = 1\n{key}\ny = 2") == ["x = 1", "y = 2"]
    below = "a: 1\n- name: DB_PASSWORD\n  value: Kroep3xx\nb: 2"
    assert "  value: Kroep3xx" not in ordinary_lines(below)


@pytest.mark.parametrize("unit", ["pwd", "password", "user", "A b"])
def test_leads_take_time_in_proportion_to_the_text(unit):
    """Of 16 kB: milliseconds, not the seconds of an expression that looks to the end each time."""
    begin = time.process_time()
    look.leads((unit * 16_000)[:16_000])
    assert time.process_time() - begin < 1


# ---- thresholds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recall", [0.5, 0.8, 0.9])
def test_a_threshold_keeps_the_recall(recall):
    """On average over many validations, as conformal prediction promises; not a hair more."""
    generator = random.Random(0)
    kept = []
    for _ in range(3000):
        scores = [generator.betavariate(3, 1) for _ in range(39)]
        kept.append(generator.betavariate(3, 1) >= thresholds.for_recall(scores, recall))
    share = sum(kept) / len(kept)
    assert recall - 0.03 < share < recall + 0.03 + 1 / 40


def test_thresholds_are_written_and_read(tmp_path):
    wanted = {category: 0.6 for category in CATEGORIES}
    assert thresholds.read_thresholds(tmp_path) == dict.fromkeys(CATEGORIES, 0.5)
    thresholds.write_thresholds(tmp_path, wanted, {"KEY": [0.1 * i for i in range(10)]})
    assert thresholds.read_thresholds(tmp_path) == wanted
    by_recall = thresholds.read_thresholds(tmp_path, 0.8)
    assert by_recall["KEY"] == pytest.approx(0.1)
    assert by_recall["NAME"] == 0.0  # nothing was measured
    (tmp_path / thresholds.FILE).write_text('{"KEY": 3}')
    with pytest.raises(ValueError, match="no thresholds of a detector"):
        thresholds.read_thresholds(tmp_path)


@pytest.mark.parametrize("damaged", [float("nan"), 7, -1])
def test_a_threshold_that_is_no_probability_is_refused(damaged, tmp_path):
    """With NaN a detector would find nothing, and nobody would know why."""
    thresholds.write_thresholds(tmp_path, dict.fromkeys(CATEGORIES, damaged), {"KEY": [damaged]})
    for recall in (None, 0.8):
        with pytest.raises(ValueError, match="no thresholds of a detector"):
            thresholds.read_thresholds(tmp_path, recall)
