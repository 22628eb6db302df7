"""Fetching packages, by clients that are played here, and the hosts that they become."""

import hashlib
import io
import os
import stat
import tarfile

import pytest
from conftest import STDLIB

from corpus import packages
from corpus.__main__ import main
from corpus.packages import Package, fetch, read_packages
from pii import hosts
from pii.hosts import Host, kind_of, read_hosts
from pii.templates import SPLITS, split_of

SHA = "0" * 64


# ---- lists ---------------------------------------------------------------------------------------


def test_a_list_is_read(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text(
        f"# A list.\n\nnpm @a/b-c 1.0.0 {SHA} MIT\ndebian d 1.2+ds~3 {SHA} Apache-2.0\n"
    )
    first, second = read_packages(path)
    assert first == Package("npm", "@a/b-c", "1.0.0", SHA, "MIT")
    assert [first.stem, second.stem] == ["npm-a-b-c-1.0.0", "debian-d-1.2+ds~3"]


@pytest.mark.parametrize(
    "line, words",
    [
        (f"npm a 1.0 {SHA}", "give registry name version sha256 licence"),
        (f"cargo a 1.0 {SHA} MIT", "registry cargo: give pypi, npm, debian"),
        (f"npm --global 1.0 {SHA} MIT", "--global is no name"),
        (f"npm ../../a 1.0 {SHA} MIT", "../../a is no name"),
        (f"npm a ../1.0 {SHA} MIT", "../1.0 is no version"),
        (f"npm a 1.0 {SHA[1:]} MIT", "is no SHA-256"),
        (f"npm a 1.0 {SHA} MIT\nnpm a 1.0 {SHA} MIT", ":3: npm-a-1.0 is listed twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, words):
    path = tmp_path / "list.txt"
    path.write_text(f"# A list.\n{line}\n")
    with pytest.raises(ValueError, match="list.txt:[23]: ") as error:
        read_packages(path)
    assert words in str(error.value)


def test_the_list_of_this_project():
    """It is well formed, and every licence in it is permissive."""
    listed = read_packages(os.path.join(os.path.dirname(hosts.__file__), "packages.txt"))
    permissive = {"MIT", "BSD-2-Clause", "BSD-3-Clause", "Apache-2.0", "ISC", "BSL-1.0"}
    permissive |= {"CC0-1.0", "0BSD", "Unlicense", "Zlib"}
    assert {package.licence for package in listed} <= permissive
    assert len(listed) > 200 and {package.registry for package in listed} == set(packages.CLIENTS)


# ---- fetching ------------------------------------------------------------------------------------

# What npm and pip are here: they write the file that a registry would have into the folder that is
# asked for. This pip does as pip does with a source distribution: it starts a build with Python,
# with the archive still in its temporary directory, and removes that when the build has failed.
NPM = """
#!/bin/sh
echo "$@" >> "$SHELF/calls"
for wanted; do :; done  # the last word
test -e "$SHELF/$wanted.tgz" || { echo npm error code E404; echo npm error 404 gone; exit 1; }
cp "$SHELF/$wanted.tgz" "$4/anything-1.0.tgz"
"""
PIP = """
import os, shutil, subprocess, sys, tempfile
shelf = os.environ["SHELF"]
wanted = open(sys.argv[-1]).read().split()[0]
folder = tempfile.mkdtemp()
shutil.copy(f"{shelf}/{wanted}.tar.gz", folder)
try:
    subprocess.run([sys.executable, "-c", f"open('{shelf}/ran', 'w')"], check=True)
finally:
    shutil.rmtree(folder)
"""


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """The folder from which those clients take files; they are found first."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "npm").write_text(NPM.lstrip())
    (shelf / "npm").chmod(stat.S_IRWXU)
    (shelf / "pip.py").write_text(PIP)
    monkeypatch.setenv("SHELF", str(shelf))
    monkeypatch.setenv("PATH", f"{shelf}{os.pathsep}/usr/bin{os.pathsep}/bin")
    monkeypatch.setenv("PYTHONPATH", str(shelf))
    return shelf


def put(shelf, registry, name, content):
    """Puts a file on the shelf. Returns the `Package`."""
    between, ending = {"npm": ("@", ".tgz"), "pypi": ("==", ".tar.gz")}[registry]
    (shelf / f"{name}{between}1.0{ending}").write_bytes(content)
    return Package(registry, name, "1.0", hashlib.sha256(content).hexdigest(), "MIT")


def test_packages_are_fetched_and_go_on(shelf, tmp_path, capsys):
    """One that is missing is named, and does not stop the others; what is there is not fetched."""
    out = tmp_path / "out"
    listed = [put(shelf, "npm", "a", b"A"), put(shelf, "npm", "b", b"B")]
    listed.append(put(shelf, "pypi", "c", b"C"))
    (shelf / "b@1.0.tgz").unlink()
    assert [path.name for path in fetch(listed, out)] == ["npm-a-1.0.tgz", "pypi-c-1.0.tar.gz"]
    assert "not fetched: npm b 1.0: npm error 404 gone" in capsys.readouterr().out
    assert not (shelf / "ran").exists()  # pip could not run a build

    (shelf / "calls").unlink()
    put(shelf, "npm", "b", b"B")
    (out / "npm-a-1.0.tgz").write_bytes(b"cut")
    assert len(fetch(listed, out)) == 3
    assert capsys.readouterr().out == ""
    calls = (shelf / "calls").read_text().splitlines()
    assert sorted(call.split()[-1] for call in calls) == ["a@1.0", "b@1.0"]
    assert (out / "npm-a-1.0.tgz").read_bytes() == b"A"
    assert len(list(out.iterdir())) == 3


@pytest.mark.parametrize("registry", ["npm", "pypi"])
def test_another_archive_is_refused(shelf, tmp_path, registry):
    package = put(shelf, registry, "a", b"A")._replace(sha256=SHA)
    with pytest.raises(ValueError, match="none of 1 packages.*another SHA-256"):
        fetch([package], tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_a_client_may_be_absent(shelf, tmp_path, monkeypatch, capsys):
    listed = [put(shelf, "pypi", "c", b"C"), Package("debian", "d", "1.0", SHA, "MIT")]
    monkeypatch.setenv("PATH", str(shelf))
    assert len(fetch(listed, tmp_path / "out")) == 1
    assert "not fetched: debian d 1.0: needs the apt-get program" in capsys.readouterr().out


def test_the_command_fetches(shelf, tmp_path, capsys):
    package = put(shelf, "npm", "a", b"A")
    (tmp_path / "list.txt").write_text(" ".join(package))
    main(["--fetch", str(tmp_path / "list.txt"), "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out.startswith("1 of 1 packages, 0.0 MB: ")


# ---- hosts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path, kind",
    [
        ("a/b.go", "go"),
        ("a/.github/workflows/ci.yml", "workflow"),
        ("a/docs/ci.yml", "yaml"),
        ("README.md", "markdown"),
        ("README", "text"),
        ("CMakeLists.txt", "cmake"),
        ("requirements.txt", "text"),
        ("a/Dockerfile.dev", "dockerfile"),
        ("setup.cfg", "ini"),
        (".env.example", "env"),
        ("a/b.ipynb", "notebook"),
        ("pom.xml", "xml"),
        ("CODEOWNERS", "text"),
        ("LICENSE.md", "left_out"),
        ("poetry.lock", "left_out"),
        ("a/vendor/b.go", "left_out"),
        ("jquery.min.js", "left_out"),
        ("a.png", None),
        ("bin/run", "shell"),
    ],
)
def test_kinds(path, kind):
    content = b"#!/usr/bin/env bash\n" if path == "bin/run" else b""
    assert kind_of(path, content) == kind


def text(name, lines=30):
    """The text of a file, unlike that of any other name."""
    return "".join(f"{name} line {i}\n" for i in range(lines))


def archive(folder, name, files):
    """Writes a .tar.gz with {path: text} in it. Returns its path."""
    path = str(folder / f"{name}.tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        for inner, content in files.items():
            member = tarfile.TarInfo(f"top/{inner}")
            member.size = len(content.encode())
            tar.addfile(member, io.BytesIO(content.encode()))
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Thirty packages of five files each, all with one file in common."""
    folder = tmp_path_factory.mktemp("packages")
    paths = []
    for i in range(30):
        files = {f"{name}": text(f"{name} of {i}") for name in ("a.go", "b.yml", "c.ini", "d")}
        files["common.py"] = text("common")
        paths.append(archive(folder, f"pypi-p{i}x-1.{i}.0", files))
    return paths


def test_no_project_and_no_file_is_in_two_splits(sources):
    found = read_hosts(sources)
    projects = {split: {host.project for host in found[split]} for split in SPLITS}
    for split in SPLITS:
        assert projects[split] and all(split_of(project) == split for project in projects[split])
    assert set().union(*projects.values()) == {f"pypi-p{i}x" for i in range(30)}
    everything = [host for split in SPLITS for host in found[split]]
    assert len({host.text for host in everything}) == len(everything) == 30 * 3 + 1
    assert {host.kind for host in everything} == {"go", "yaml", "ini", "python"}


def test_neither_a_kind_nor_a_project_dominates(sources, tmp_path, monkeypatch):
    monkeypatch.setattr(hosts, "MOST_OF_KIND", 20)
    monkeypatch.setattr(hosts, "MOST_OF_PROJECT", 5)
    large = {f"{i}.rs": text(f"{i} in Rust") for i in range(50)}
    paths = [*sources, archive(tmp_path, "npm-large-1.0", large)]
    found = [host for of_split in read_hosts(paths).values() for host in of_split]
    counts = {kind: sum(host.kind == kind for host in found) for kind in ("go", "yaml", "rust")}
    assert counts == {"go": 20, "yaml": 20, "rust": 5}
    # Which ones does not depend on their order.
    large = dict(reversed(large.items()))
    again = read_hosts([archive(tmp_path, "npm-large-1.0", large), *reversed(sources)])
    texts = {host.text for of_split in again.values() for host in of_split}
    assert texts == {host.text for host in found}


def test_what_is_no_host(sources, tmp_path):
    """Small, large, binary, generated, copyleft and unknown files are left out."""
    files = {
        "good.c": text("good"),
        "small.c": "int x;\n",
        "large.c": text("large", 20_000),
        "nul.c": text("nul\0"),
        "made.c": "// Code generated by a program. DO NOT EDIT.\n" + text("made"),
        "gpl.c": "// under the GNU General  Public License\n" + text("gpl"),
        "long.c": "x = 1, " * 1000 + text("long"),
        "unknown.xyz": text("unknown"),
        "vendor/theirs.c": text("theirs"),
    }
    found = read_hosts([*sources, archive(tmp_path, "npm-c-1.0", files)])
    of_project = [host for split in SPLITS for host in found[split] if host.project == "npm-c"]
    assert of_project == [Host(text("good"), "c", "npm-c")]


def test_files_of_a_directory_are_split_one_by_one(tmp_path):
    """A single project cannot be divided otherwise."""
    folder = tmp_path / "vendor"  # where it lies does not matter
    folder.mkdir()
    for i in range(60):
        (folder / f"{i}.ini").write_text(text(f"[{i}]"))
    found = read_hosts([folder])
    assert all(found.values()) and sum(map(len, found.values())) == 60
    for path in list(folder.iterdir())[2:]:
        path.unlink()
    with pytest.raises(ValueError, match="too few files in .*vendor"):
        read_hosts([folder])


def test_without_packages_the_library_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hosts.default_sources() == [STDLIB]
