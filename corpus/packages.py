"""Fetches the archives that a list pins from PyPI, npm and Debian.

A line of a list is `registry name version sha256 licence`:

    pypi    a wheel or a source distribution, whichever has this SHA-256
    npm     the package
    debian  the upstream source (.orig.tar.*) of a source package; the version is upstream's

The registries' own clients are run (pip, npm, apt-get), so their settings hold: mirrors, proxies,
certificates. An archive is kept only if its SHA-256 is that of the list.

No code of a package runs. npm and apt-get only download. pip would run the build of a source
distribution to learn what it depends on, so it is started without a Python to run that with; it
fails there, when the archive lies in its temporary directory.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from common.command_line import first_line

ENDINGS = (".tar.gz", ".tgz", ".tar.xz", ".tar.bz2", ".zip", ".whl")  # of `corpus.sources`
AT_ONCE = 4  # packages that are fetched at a time: most of it is waiting
PATIENCE = 600  # seconds for one run of a client

# What runs pip. It keeps its temporary files, which the caller removes.
PIP = """
import os, runpy, shutil, sys
def keep(*arguments, **options):
    pass
shutil.rmtree = keep
sys.executable = os.devnull
runpy.run_module("pip", run_name="__main__")
"""

# What the fields of a line look like. A name or a version goes to a client and into a file name, so
# neither may be a flag or a path.
NAME = re.compile(r"(@\w[\w.-]*/)?\w[\w.+-]*", re.ASCII)
VERSION = re.compile(r"\w[\w.+~-]*", re.ASCII)
SHA256 = re.compile(r"[0-9a-f]{64}")


class Package(NamedTuple):
    """An archive in a registry."""

    registry: str  # pypi, npm or debian
    name: str
    version: str
    sha256: str  # of the archive, 64 hexadecimal digits
    licence: str  # as SPDX calls it

    @property
    def stem(self):
        """The name of its file without the ending: "npm-auth-core-0.41.3"."""
        name = self.name.removeprefix("@").replace("/", "-")
        return f"{self.registry}-{name}-{self.version}"


# ---- lists ---------------------------------------------------------------------------------------


def read_packages(path):
    """[`Package`, ...] of a list. Lines that begin with # are comments.

    Raises ValueError that names the line if it is not five such words, or repeats a package.
    """
    packages = []
    seen = set()
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            if line.startswith("#") or not line.strip():
                continue
            place = f"{path}:{number}"
            words = line.split()
            if len(words) != len(Package._fields):
                raise ValueError(f"{place}: give {' '.join(Package._fields)}")
            package = Package(*words)
            _check_package(package, place)
            if package.stem in seen:
                raise ValueError(f"{place}: {package.stem} is listed twice")
            seen.add(package.stem)
            packages.append(package)
    if not packages:
        raise ValueError(f"{path}: no packages are listed")
    return packages


def _check_package(package, place):
    """Raises ValueError, which begins with `place`, for a field that cannot be."""
    if package.registry not in CLIENTS:
        raise ValueError(f"{place}: registry {package.registry}: give {', '.join(CLIENTS)}")
    if not NAME.fullmatch(package.name):
        raise ValueError(f"{place}: {package.name} is no name of a package")
    if not VERSION.fullmatch(package.version):
        raise ValueError(f"{place}: {package.version} is no version")
    if not SHA256.fullmatch(package.sha256):
        raise ValueError(
            f"{place}: {package.sha256} is no SHA-256 (64 digits, a to f in lower case)"
        )


# ---- the clients ---------------------------------------------------------------------------------


def _run(command, line=-1, **options):
    """Runs a client. Returns a line that it printed, which says what went wrong, if anything did.

    line: the number of that line. Raises ValueError if there is no such client or it takes too
    long.
    """
    try:
        result = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=PATIENCE,
            **options,
        )
    except FileNotFoundError:
        raise ValueError(f"needs the {command[0]} program") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"{command[0]} took over {PATIENCE} s") from None
    lines = result.stdout.decode(errors="replace").strip().splitlines()
    if not lines:
        return f"{command[0]} ended with status {result.returncode}"
    return lines[min(line, len(lines) - 1)]


def _fetch_pypi(package, folder, lists):
    """Runs pip, which checks the SHA-256 too."""
    requirements = folder / "requirements.txt"
    pinned = f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n"
    requirements.write_text(pinned)
    command = [sys.executable, "-c", PIP, "download", "--quiet", "--no-deps", "--no-cache-dir"]
    command += ["--no-build-isolation", "--ignore-requires-python"]
    command += ["--dest", str(folder), "--requirement", str(requirements)]
    return _run(command, env={**os.environ, "TMPDIR": str(folder)})


def _fetch_npm(package, folder, lists):
    """Runs npm."""
    wanted = f"{package.name}@{package.version}"
    command = ["npm", "pack", "--ignore-scripts", "--pack-destination", str(folder), wanted]
    return _run(command, line=1, cwd=folder)  # the first has a code, the last ones hints


def _fetch_debian(package, folder, lists):
    """Runs apt-get. Debian's part of the source may be gone or new; upstream's part matters."""
    return _run(["apt-get", *lists, "source", "--download-only", package.name], cwd=folder)


CLIENTS = {"pypi": _fetch_pypi, "npm": _fetch_npm, "debian": _fetch_debian}


def _source_lists(folder):
    """The flags with which apt-get knows Debian's sources, and not what is in /etc or /var.

    Writes lists into `folder` like those of the machine, but of sources, and fetches what is in
    them. Needs no root. Raises ValueError without apt-get.
    """
    etc = Path("/etc/apt")
    for path in [etc / "sources.list", *etc.glob("sources.list.d/*")]:
        if path.suffix == ".list" and path.is_file():
            text = re.sub(r"^deb ", "deb-src ", path.read_text(), flags=re.MULTILINE)
        elif path.suffix == ".sources":
            text = re.sub(r"^Types:.*", "Types: deb-src", path.read_text(), flags=re.MULTILINE)
        else:
            continue
        (folder / path.name).write_text(text)

    (folder / "lists" / "partial").mkdir(parents=True)
    flags = []
    for key, value in [
        ("Dir::Etc::sourcelist", os.devnull),
        ("Dir::Etc::sourceparts", folder),
        ("Dir::State::lists", folder / "lists"),
        ("Dir::Cache", folder),
    ]:
        flags += ["-o", f"{key}={value}"]
    _run(["apt-get", *flags, "update"])
    return flags


# ---- fetching ------------------------------------------------------------------------------------


def fetched(package, folder):
    """The path of a package's archive in `folder`, or None if it is not there, or another one."""
    for ending in ENDINGS:
        path = Path(folder, package.stem + ending)
        if path.is_file() and _has_hash(path, package.sha256):
            return path
    return None


def fetch(packages, folder):
    """Downloads the archives that are not in `folder` yet, as REGISTRY-NAME-VERSION.EXT.

    Prints a line for each that could not be had, and why. Returns the paths of all others, in the
    order of the list. Stopped at any moment, it goes on where it was. Raises ValueError if none at
    all could be had.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    missing = [package for package in packages if not fetched(package, folder)]
    reasons = []
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder) as work:
        lists = []
        if any(package.registry == "debian" for package in missing) and shutil.which("apt-get"):
            lists = _source_lists(Path(work))

        def attempt(package):
            try:
                _fetch_one(package, folder, work, lists)
            except ValueError as error:
                return f"{package.registry} {package.name} {package.version}: {first_line(error)}"

        with ThreadPoolExecutor(AT_ONCE) as pool:
            results = pool.map(attempt, missing)
            reasons += filter(None, tqdm(results, "fetching", len(missing), unit=" packages"))

    for reason in reasons:
        print(f"not fetched: {reason}")
    paths = [fetched(package, folder) for package in packages]
    if not any(paths):
        raise ValueError(f"none of {len(packages)} packages could be had; {reasons[0]}")
    return [path for path in paths if path]


def _fetch_one(package, folder, work, lists):
    """Puts the archive of a package into `folder`. Raises ValueError if it cannot be had.

    work: a directory for temporary ones, on the same disk.
    """
    with tempfile.TemporaryDirectory(dir=work) as inner:
        words = CLIENTS[package.registry](package, Path(inner), lists)
        archives = [path for path in Path(inner).rglob("*") if path.name.endswith(ENDINGS)]
        for path in archives:
            if path.is_file() and _has_hash(path, package.sha256):
                ending = next(ending for ending in ENDINGS if path.name.endswith(ending))
                os.replace(path, Path(folder, package.stem + ending))
                return
    raise ValueError("the registry's archive has another SHA-256" if archives else words)


def _has_hash(path, sha256):
    """True if a file has this SHA-256."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() == sha256
