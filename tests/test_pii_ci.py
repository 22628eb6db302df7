"""In CI: a SARIF log, a baseline and the summary say what is found, and never show a value."""

import json
import os
import re
import shlex
import shutil
import subprocess
import tomllib
import urllib.parse
from collections import Counter

import pytest
from conftest import ROOT, assert_refused, command, program
from hypothesis import given
from hypothesis import strategies as st
from test_house import MAY_IMPORT

from pii.baseline import fingerprint
from pii.labels import CATEGORIES, Entity
from pii.sarif import RULES, result_of
from pii.scan import Finding, masked

# § keeps scanners of this repository quiet.
MAIL = "kim.lee§@mail.org".replace("§", "")
OTHER_MAIL = "ada.b§@mail.org".replace("§", "")
KEY = "AKIA§QJ7ZP2XKM4RTVW3N".replace("§", "")
VALUES = (MAIL, OTHER_MAIL, KEY)


def detect(*arguments):
    """`python -m pii detect ... --rules-only`; no value is in what it prints."""
    result = program("pii", "detect", *map(str, arguments), "--rules-only")
    for value in VALUES:
        assert value[3:] not in result.stdout + result.stderr
    return result


def run_of(path):
    """The run object of a SARIF log."""
    content = path.read_text()
    for value in VALUES:
        assert value[3:] not in content
    (run,) = json.loads(content)["runs"]
    return run


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """The working directory: a file with two findings in two lines."""
    root = tmp_path / "repository"
    root.mkdir()
    monkeypatch.chdir(root)
    (root / "a.py").write_text(f"# {MAIL}\nkey = '{KEY}'\n")
    return root


# ---- values --------------------------------------------------------------------------------------


@given(value=st.text(min_size=1))
def test_at_most_two_characters_are_shown_and_a_third(value):
    shown = masked(value).removesuffix("…")
    assert value.startswith(shown)
    assert len(shown) <= 2 and 3 * len(shown) <= len(value)


def test_a_file_may_have_any_name(repository):
    """A finding is one line, whatever the name; a name in a log is a URI that gives it back."""
    names = [
        b"two words.py",
        b"a:b%41#?.py",
        b"\xff.py",
        b"new\nline.py",
        b"\x1b[31m.py",
        b"\xc3\xa9",
    ]
    for name in names:
        with open(name, "w") as file:
            file.write(OTHER_MAIL)
    result = detect(*map(os.fsdecode, names), "--sarif", "pii.sarif")
    assert len(result.stdout.splitlines()) == len(names)
    assert result.stdout.replace("\n", "").isprintable()

    locations = [
        place_of(result)["artifactLocation"]
        for result in run_of(repository / "pii.sarif")["results"]
    ]
    assert [urllib.parse.unquote_to_bytes(location["uri"]) for location in locations] == names
    for location in locations:
        assert location["uriBaseId"] == "%SRCROOT%"
        assert not urllib.parse.urlsplit(location["uri"]).scheme


# ---- SARIF ---------------------------------------------------------------------------------------


def place_of(result):
    (location,) = result["locations"]
    return location["physicalLocation"]


def test_a_log_holds_what_code_scanning_asks_for(repository):
    assert detect("a.py", "--sarif", "pii.sarif", "--fail").returncode == 1
    log = json.loads((repository / "pii.sarif").read_text())
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-2.1.0.json")
    run = run_of(repository / "pii.sarif")
    assert run["columnKind"] == "unicodeCodePoints"
    driver = run["tool"]["driver"]
    assert driver["name"]
    assert [rule["id"] for rule in driver["rules"]] == [f"pii/{c}" for c in CATEGORIES]
    for rule in driver["rules"]:
        for text in ("shortDescription", "fullDescription", "help"):
            assert rule[text]["text"]
        assert rule["defaultConfiguration"]["level"] in ("warning", "error")

    mail, key = run["results"]
    for result in (mail, key):
        assert driver["rules"][result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["level"] == RULES[result["ruleId"].removeprefix("pii/")].level
        assert all(result["partialFingerprints"].values())
        assert place_of(result)["artifactLocation"] == {"uri": "a.py", "uriBaseId": "%SRCROOT%"}
    assert "EMAIL" in mail["message"]["text"] and "100%" in mail["message"]["text"]
    assert place_of(key)["region"] == {
        "startLine": 2,
        "startColumn": 8,
        "endLine": 2,
        "endColumn": 8 + len(KEY),
    }


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_regions_are_where_the_value_stands(repository, end):
    """Characters and lines as in `open`, also of a key of several lines."""
    name = "PRIVATE§ KEY".replace("§", "")
    block = [f"-----BEGIN {name}-----", "a" * 40, f"-----END {name}-----"]
    lines = ["é 😀", f"😀 {MAIL}, {MAIL}", f"x = '{block[0]}", block[1], f"{block[2]}'"]
    (repository / "a.py").write_bytes(end.join(lines).encode())
    detect("a.py", "--sarif", "pii.sarif")
    with open("a.py", encoding="utf-8") as file:
        text = file.read()
    begins = [0] + [match.end() for match in re.finditer("\n", text)]
    values = []
    for result in run_of(repository / "pii.sarif")["results"]:
        region = place_of(result)["region"]
        start = begins[region["startLine"] - 1] + region["startColumn"] - 1
        values.append(text[start : begins[region["endLine"] - 1] + region["endColumn"] - 1])
    assert values == [MAIL, MAIL, "\n".join(block)]


def test_fingerprints_stay_when_lines_move(repository):
    """And two copies of a value have two."""
    (repository / "a.py").write_text(f"# {MAIL}\n# {MAIL}\n# {OTHER_MAIL}\n")
    detect("a.py", "--sarif", "pii.sarif")
    before = [r["partialFingerprints"] for r in run_of(repository / "pii.sarif")["results"]]
    assert len({json.dumps(fingerprints) for fingerprints in before}) == 3

    (repository / "a.py").write_text(f"import os\n\n    # {MAIL}\n# {MAIL}\n# {OTHER_MAIL}\n")
    detect("a.py", "--sarif", "pii.sarif")
    assert [r["partialFingerprints"] for r in run_of(repository / "pii.sarif")["results"]] == before


def test_a_log_is_written_if_nothing_is_found(repository):
    (repository / "a.py").write_text(f"# {MAIL}  pii: allow\n")
    assert detect("a.py", "--sarif", "pii.sarif", "--fail").returncode == 0
    assert run_of(repository / "pii.sarif")["results"] == []


def test_a_failed_run_leaves_the_old_log(repository):
    (repository / "pii.sarif").write_text("old")
    assert_refused(detect("a.py", "gone.py", "--sarif", "pii.sarif"), "gone.py: no such file")
    assert (repository / "pii.sarif").read_text() == "old"
    assert sorted(os.listdir(repository)) == ["a.py", "pii.sarif"]


def test_a_log_names_files_by_the_working_directory(repository, tmp_path, monkeypatch):
    """Not by a link, in which GitHub shows nothing; outside of the directory by an absolute URI."""
    (repository / "link.py").symlink_to("a.py")
    detect(repository / "link.py", "--categories", "KEY", "--sarif", "pii.sarif")
    (result,) = run_of(repository / "pii.sarif")["results"]
    assert place_of(result)["artifactLocation"]["uri"] == "a.py"

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    detect("../repository/a.py", "--categories", "KEY", "--sarif", "pii.sarif")
    (result,) = run_of(tmp_path / "elsewhere" / "pii.sarif")["results"]
    assert place_of(result)["artifactLocation"] == {"uri": (repository / "a.py").as_uri()}


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_has_a_rule(category):
    value = "v4lue-of-nobody"
    finding = Finding("a.py", 1, 1, 1, 16, Entity(0, 15, category, 0.915), value)
    result = result_of(finding, Counter())
    assert category in result["message"]["text"] and "92%" in result["message"]["text"]
    assert value not in json.dumps(result)


# ---- the baseline --------------------------------------------------------------------------------


def test_only_what_is_new_is_reported(repository):
    assert detect(".", "--write-baseline", "known.json").returncode == 0
    result = detect(".", "--baseline", "known.json", "--fail", "--sarif", "pii.sarif")
    assert result.returncode == 0
    assert result.stdout == ""
    assert "found: nothing; left out: 2 known" in result.stderr
    assert run_of(repository / "pii.sarif")["results"] == []

    # Lines move, and a value is repeated in its file: it was there before.
    (repository / "a.py").write_text(f"import os\nkey = '{KEY}'\n# {MAIL}\n# {MAIL}\n")
    assert detect(".", "--baseline", "known.json", "--fail").returncode == 0

    # Another value in that file, and a known one in another file, are new.
    (repository / "a.py").write_text(f"key = '{KEY}'\n# {MAIL}\n# {OTHER_MAIL}\n")
    (repository / "b.py").write_text(f"key = '{KEY}'\n")
    result = detect(".", "--baseline", "known.json", "--fail", "--sarif", "pii.sarif", "--json")
    assert result.returncode == 1
    records = [json.loads(line) for line in result.stdout.splitlines()]
    assert [(r["file"], r["line"], r["text"]) for r in records] == [
        ("./a.py", 3, OTHER_MAIL[:2] + "…"),
        ("./b.py", 1, KEY[:2] + "…"),
    ]
    assert len(run_of(repository / "pii.sarif")["results"]) == 2


def test_a_baseline_is_sorted_and_holds_no_value(repository):
    (repository / "b").mkdir()
    (repository / "b" / "c.py").write_text(f"{OTHER_MAIL}\n{MAIL}\n{MAIL}\n")
    detect("b", "a.py", "--write-baseline", "known.json")
    content = (repository / "known.json").read_text()
    assert json.loads(content) == {
        "known": {
            "a.py": [f"EMAIL {fingerprint(MAIL)}", f"KEY {fingerprint(KEY)}"],
            "b/c.py": sorted(f"EMAIL {fingerprint(mail)}" for mail in (MAIL, OTHER_MAIL)),
        }
    }
    assert list(json.loads(content)["known"]) == ["a.py", "b/c.py"]
    assert not any(value[3:] in content for value in VALUES)
    detect("a.py", "b", "--write-baseline", "known.json")
    assert (repository / "known.json").read_text() == content


def test_guesses_do_not_tell_which_value_is_known():
    """Of many guesses several have the fingerprint of a value."""
    guesses = [f"password{number}" for number in range(300_000)]
    assert sum(fingerprint(guess) == fingerprint(guesses[0]) for guess in guesses) > 1
    assert fingerprint("a\nb") == fingerprint("a\r\nb")  # as Git may check it out
    assert fingerprint("half \ud83d")


def test_a_baseline_serves_any_working_directory(repository, tmp_path, monkeypatch):
    detect("a.py", "--write-baseline", "known.json")
    monkeypatch.chdir(tmp_path)
    arguments = ("repository", "--baseline", "repository/known.json", "--fail")
    assert detect(*arguments).returncode == 0


def test_a_baseline_is_not_searched(repository):
    """It lists paths, which may hold names."""
    (repository / "jo.wu@mail.org.py").write_text(f"# {OTHER_MAIL}\n")
    detect(".", "--write-baseline", "known.json")
    assert "jo.wu@mail.org" in (repository / "known.json").read_text()
    result = detect(".", "--baseline", "known.json", "--sarif", "pii.sarif", "--fail")
    assert result.returncode == 0
    assert detect(".", "--baseline", "known.json", "--sarif", "pii.sarif", "--fail").returncode == 0


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"known": []}',
        '{"known": {"a.py": "EMAIL 3fa2"}}',
        '{"known": {"a.py": [3]}}',
        '{"known": {"a.py": ["EMAIL 3fa2", "SHOE 3fa2"]}}',
        '{"known": {"a.py": ["EMAIL 3fa2\\n"]}}',
        '{\n<<<<<<< HEAD\n "known": {}}',
        "\xff",
    ],
    ids=range(11),
)
def test_a_damaged_baseline_is_one_line(repository, content):
    (repository / "known.json").write_bytes(content.encode("latin-1"))
    assert_refused(detect("a.py", "--baseline", "known.json"), "known.json: damaged")


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--baseline", "gone.json"], "'gone.json': no such file; --write-baseline"),
        (["--baseline", ""], "'': no such file"),
        (["--baseline", "."], "'.': no such file"),
        (["--sarif", ""], "'': no file can be written there"),
        (["--sarif", "."], "'.': no file can be written there"),
        (["--sarif", "gone/pii.sarif"], "'gone/pii.sarif': no file can be written there"),
        (["--sarif", "/dev/stdout"], "'/dev/stdout': no file can be written there"),
        (["--write-baseline", "/dev/null"], "'/dev/null': no file can be written there"),
        (["--write-baseline", "gone/a.json"], "'gone/a.json': no file can be written there"),
        (["--write-baseline", "a.json", "--fail"], "leave out --baseline and --fail"),
        (["--write-baseline", "a.json", "--baseline", "b"], "leave out --baseline and --fail"),
        (["--write-baseline", "a.json", "--sarif", "./a.json"], "--sarif would overwrite"),
        (["--baseline", "a.py", "--sarif", "a.py"], "--sarif would overwrite"),
        (["--show"], "unrecognized arguments: --show"),
    ],
)
def test_flags_that_cannot_be_are_one_line(repository, flags, words):
    assert_refused(detect("a.py", *flags), words)
    assert os.listdir(repository) == ["a.py"]


# ---- the hook and the workflow -------------------------------------------------------------------


def flags_in(file):
    """The flags of the command `python -P -m pii detect` in a file of the project."""
    with open(os.path.join(ROOT, file), encoding="utf-8") as f:
        (command,) = re.findall(r"python -P -m pii detect\b(.*)", f.read())
    return shlex.split(command)


def test_the_hook_and_the_workflow_fail_on_what_is_new(repository):
    hook = [*flags_in(".pre-commit-hooks.yaml"), "a.py"]
    assert detect(*hook).returncode == 1
    detect(".", "--write-baseline", ".pii-baseline.json")
    workflow = flags_in("pii/workflow.yml")
    assert "." in workflow
    assert detect(*workflow).returncode == 0
    (repository / "b.py").write_text(f"# {MAIL}\n")
    assert detect(*workflow).returncode == 1
    assert len(run_of(repository / "pii.sarif")["results"]) == 1


def test_what_is_installed_is_what_detection_needs():
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        settings = tomllib.load(file)
    with open(os.path.join(ROOT, "requirements.txt"), encoding="utf-8") as file:
        pins = file.read().split()
    assert set(settings["project"]["dependencies"]) <= set(pins)
    installed = settings["tool"]["setuptools"]
    assert {*installed["packages"], *installed["py-modules"]} == {*MAY_IMPORT["pii"], "pii"} - {
        "ptx",
        "bench",
    }


@pytest.mark.slow
def test_it_runs_where_it_is_installed(tmp_path):
    """As the hook does: in a repository that has modules of the same names."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    for file in subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines():
        if not file.startswith(("results/", "notebooks/", "tests/")):
            (source / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(os.path.join(ROOT, file), source / file)
    pip = ["-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation"]
    installed = command(*pip, "--target", str(tmp_path / "site"), str(source))
    assert installed.returncode == 0, installed.stderr

    repository = tmp_path / "repository"
    (repository / "common").mkdir(parents=True)
    for name in ("data.py", "torch.py", "common/__init__.py"):
        (repository / name).write_text(f"raise SystemExit('of the repository')  # {MAIL}\n")
    result = command(
        *("-P", "-m", "pii", "detect", ".", "--rules-only", "--fail"),
        cwd=repository,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )
    assert result.returncode == 1, result.stderr
    assert "found: 3 EMAIL" in result.stderr
