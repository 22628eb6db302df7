"""The labels of real code are well formed and hold no values; the score counts by them."""

import hashlib
import io
import json
import os
import tarfile

import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from bench import pii_judge, pii_real
from bench.pii_real import LabelledFile, Span
from corpus.packages import read_packages
from pii.labels import CATEGORIES
from pii.peers import Report, entities_reported

FILE = LabelledFile(
    "pypi-a-1.0/a.py",
    "",
    [Span(0, 5, "NAME"), Span(10, 15, "KEY"), Span(20, 25, "NONE"), Span(30, 35, "AMBIGUOUS")],
)


def score_of(*entities, categories=CATEGORIES):
    """(tallies, unjudged) of entities given as (start, end, category)."""
    return pii_real.score([FILE], [[(*entity, 0.9) for entity in entities]], categories)


# ---- the committed labels ------------------------------------------------------------------------


def test_labels_are_well_formed():
    files = pii_real.read_labels()  # checks order, verdicts and contradictions
    names = [file.name for file in files]
    assert names == sorted(set(names))
    assert all(len(file.sha256) == 64 for file in files)
    stems = {package.stem for package in read_packages(pii_real.PACKAGES)}
    assert {file.stem for file in files} == stems  # all of these packages, and no others

    # What is nothing does not lie in what is something: a finding there would be right and wrong.
    for file in files:
        for span in file.judged:
            verdicts = {other.verdict for other in pii_real.touching(file.judged, *span[:2])}
            assert span.verdict != "NONE" or verdicts == {"NONE"}


def test_labels_and_findings_hold_no_values():
    with open(pii_real.LABELS, encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            assert set(record) == {"file", "sha256", "judged"}
            assert {tuple(map(type, span)) for span in record["judged"]} <= {(int, int, str)}
    for record in json.loads(pii_real.BEFORE.read_text()).values():
        for findings in record.values():
            for start, end, category, score in findings:
                assert 0 <= start < end and category in CATEGORIES and 0 < score <= 1


def test_nothing_written_down_is_unjudged():
    files = pii_real.read_labels()
    for record in json.loads(pii_real.BEFORE.read_text()).values():
        assert set(record) <= {file.name for file in files}
        found = [record.get(file.name, []) for file in files]
        assert not pii_real.score(files, found, CATEGORIES)[1]


def test_no_package_is_one_that_the_detector_learns_from():
    tested = {(p.registry, p.name) for p in read_packages(pii_real.PACKAGES)}
    hosts = {(p.registry, p.name) for p in read_packages(os.path.join(ROOT, "pii", "packages.txt"))}
    assert not tested & hosts


# ---- the format of labels ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "judged",
    [
        [[3, 1, "NAME"]],
        [[0, 1, "PERSON"]],
        [[5, 9, "NAME"], [0, 4, "NAME"]],
        [[0, 5, "NAME"], [4, 9, "KEY"]],
        [[0, "NAME"]],
        7,
    ],
)
def test_damaged_labels_are_named(tmp_path, judged):
    path = tmp_path / "labels.jsonl"
    good = json.dumps({"file": "a/b", "sha256": "0", "judged": [[0, 1, "KEY"], [0, 9, "NONE"]]})
    bad = json.dumps({"file": "a/c", "sha256": "0", "judged": judged})
    path.write_text(f"{good}\n{bad}\n")
    with pytest.raises(ValueError, match=r"labels.jsonl:2: damaged"):
        pii_real.read_labels(path)


def test_labels_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "labels.jsonl"
    pii_real.write_labels([FILE], path)
    assert pii_real.read_labels(path) == [FILE]


# ---- the score -----------------------------------------------------------------------------------


def test_verdicts():
    right, wrong, unjudged = pii_real.judge(
        FILE,
        [
            (2, 8, "NAME"),  # touches a name
            (2, 8, "EMAIL"),  # that is no e-mail address
            (14, 30, "PASSWORD"),  # a key, by another name; and more
            (21, 22, "KEY"),
            (31, 40, "KEY"),
            (24, 31, "KEY"),  # doubtful in part
            (50, 60, "KEY"),
        ],
    )
    assert [entity for entity, _ in right] == [(2, 8, "NAME"), (14, 30, "PASSWORD")]
    assert wrong == [(2, 8, "EMAIL"), (21, 22, "KEY")]
    assert unjudged == [(50, 60, "KEY")]


def test_pieces_count_once_and_unjudged_findings_are_wrong():
    tallies, unjudged = score_of((10, 12, "KEY"), (13, 15, "KEY"), (50, 60, "KEY"))
    assert len(tallies["KEY"].right) == 1 and tallies["KEY"].wrong == 1
    assert [entity[:3] for _, entity in unjudged] == [(50, 60, "KEY")]
    assert pii_real.cell([tallies["KEY"]]) == "50.0 / 100.0"


def test_recall_is_of_the_true_category_and_precision_of_the_reported_one():
    tallies, _ = score_of((10, 15, "PASSWORD"))
    assert pii_real.cell([tallies["KEY"]]) == "- / 100.0"
    assert len(tallies["PASSWORD"].right) == 1 and not tallies["PASSWORD"].expected


def test_a_tool_is_scored_on_what_it_looks_for():
    tallies, unjudged = score_of((0, 5, "NAME"), (50, 60, "NAME"), categories=("KEY",))
    assert set(tallies) == {"KEY"} and not unjudged
    row = pii_real.row_of("x", tallies, 0, 0, lines=100, speed=None)
    assert row["NAME"] == "-" and row["KEY"] == "- / 0.0" and row["MB/s"] == "-"


spans = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 9), st.sampled_from(CATEGORIES)))


@given(spans)
def test_counts_add_up(drawn):
    entities = [(start, start + length, category) for start, length, category in drawn]
    tallies, unjudged = score_of(*entities)
    assert sum(len(tally.right) + tally.wrong for tally in tallies.values()) <= len(entities)
    assert len(unjudged) <= sum(tally.wrong for tally in tallies.values())
    for tally in tallies.values():
        assert tally.found <= tally.expected


# ---- the files -----------------------------------------------------------------------------------


def test_files_are_taken_from_archives_and_checked(tmp_path, monkeypatch):
    """A package that is there already is not fetched."""
    content = b"x = 1\r\n"
    with tarfile.open(tmp_path / "pypi-a-1.0.tar.gz", "w:gz") as tar:
        member = tarfile.TarInfo("a-1.0/b.py")
        member.size = len(content)
        tar.addfile(member, io.BytesIO(content))
    digest = hashlib.sha256((tmp_path / "pypi-a-1.0.tar.gz").read_bytes()).hexdigest()
    packages = tmp_path / "packages.txt"
    packages.write_text(f"pypi a 1.0 {digest} MIT\n")
    labels = tmp_path / "labels.jsonl"
    monkeypatch.setattr(pii_real, "PACKAGES", packages)
    file = LabelledFile("pypi-a-1.0/a-1.0/b.py", hashlib.sha256(content).hexdigest(), [])
    pii_real.write_labels([file], labels)

    files, paths = pii_real.labelled_files(tmp_path, labels)
    assert files == [file] and pii_real.text_of(paths[0]) == "x = 1\r\n"
    (tmp_path / "files" / file.name).write_bytes(b"changed")
    with pytest.raises(ValueError, match="not the file that was judged"):
        pii_real.labelled_files(tmp_path, labels)


def test_a_report_is_placed_in_its_line():
    text = "a = 1\nkey = 'abc'\n"
    (entity,) = entities_reported(Report("f", 2, "abc", "KEY"), text)
    assert text[entity.start : entity.end] == "abc"
    assert entities_reported(Report("f", 1, "abc", "KEY"), text) == []
    assert entities_reported(Report("f", 9, "abc", "KEY"), text) == []


# ---- judging -------------------------------------------------------------------------------------


def test_judging_appends_a_verdict(tmp_path, monkeypatch):
    (tmp_path / "files" / "pypi-a-1.0").mkdir(parents=True)
    (tmp_path / "files" / FILE.name).write_text("x" * 99)
    monkeypatch.setattr(pii_judge, "FOLDER", tmp_path)
    monkeypatch.setattr(pii_judge, "LABELS", tmp_path / "labels.jsonl")
    monkeypatch.setattr(pii_judge, "UNJUDGED", tmp_path / "unjudged.jsonl")
    pii_real.write_labels([FILE], pii_judge.LABELS)
    unjudged = {(FILE.name, 40, 50, "NAME"): (0.5, "x"), (FILE.name, 45, 48, "KEY"): (0.5, "x")}
    pii_real.write_unjudged(unjudged, pii_judge.UNJUDGED)

    answers = iter(["?", "u"])  # the second finding lies in the first, and is not asked for

    def answer(prompt):
        return next(answers)

    monkeypatch.setattr("builtins.input", answer)
    pii_judge.main()
    (file,) = pii_real.read_labels(pii_judge.LABELS)
    assert Span(40, 50, "USERNAME") in file.judged and len(file.judged) == 5
