"""pip, npm, apt-get and plain addresses, and the archives they bring: with fake clients, real pip off line, and a server on 127.0.0.1."""

import gzip
import hashlib
import http.server
import importlib
import io
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import zipfile
from pathlib import Path

import pytest

from dlatlas.data.store import DataError, Dataset, Source, apt, debian_archive, installed, npm, obtain, pip, unpack, urls

STORE = importlib.import_module("dlatlas.data.store")
TEXT = b"some words of a data set\n" * 200


def toy(*sources):
    return Dataset("toy", "Toy", "none", "nobody", {"words.txt": (len(TEXT), hashlib.sha256(TEXT).hexdigest())}, sources)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLATLAS_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "*")
    return tmp_path / "cache"


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Write a fake client into the only folder of PATH; `$log` is a file for what it was asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setenv("log", str(tmp_path / "log"))

    def write(name, script):
        (folder / name).write_text(f'#!/bin/sh\necho "$@" >> "$log"\n{script}\n')
        (folder / name).chmod(0o755)
        return tmp_path / "log"

    return write


@pytest.fixture
def no_pip_module(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pip" else find(name, *rest))


def deb(data, name="data.tar.xz"):
    """A Debian package: an ar archive of a version, a control tar and a data tar."""
    out = io.BytesIO()
    out.write(b"!<arch>\n")
    for member, content in (("debian-binary", b"2.0\n"), ("control.tar.xz", b"odd"), (name, data)):
        out.write(f"{member:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2))
    return out.getvalue()


def tar(mode, members, prefix="./"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        folder = tarfile.TarInfo(f"{prefix}usr")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members.items():
            entry = tarfile.TarInfo(prefix + name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def wheel(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


NOISE = os.urandom(5000)  # keeps the archives long enough to be cut in the middle of a file
MEMBERS = {"usr/share/words.txt": TEXT, "usr/share/noise": NOISE, "usr/share/words.txt.bak": b"no", "usr/share/other.txt": b"no"}
ARCHIVES = {
    "toy-1.0.tgz": tar("w:gz", MEMBERS, "package/"),
    "toy-1.0.tar.gz": tar("w:gz", MEMBERS, "toy-1.0/"),
    "toy-1.0.tar.bz2": tar("w:bz2", MEMBERS),
    "toy-1.0-py3-none-any.whl": wheel(MEMBERS),
    "toy.zip": wheel(MEMBERS),
    "toy_1.0_all.deb": deb(tar("w:xz", MEMBERS)),
    "toy_2.0_all.deb": deb(tar("w:gz", MEMBERS), "data.tar.gz"),
    "words.txt.gz": gzip.compress(TEXT),
    "toy_gz.tar.gz": tar("w:gz", {"usr/words.txt.gz": gzip.compress(TEXT), "noise": NOISE}),
    "words.txt": TEXT,
}
PATTERN = r"(.*/)?words\.txt(\.gz)?"


# --- archives ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHIVES)
def test_every_kind_of_archive_is_read(name, tmp_path):
    (tmp_path / name).write_bytes(ARCHIVES[name])
    assert unpack(PATTERN)(tmp_path) == {"words.txt": TEXT}


@pytest.mark.parametrize("keep", [0.3, 0.6, 0.95])
@pytest.mark.parametrize("name", ARCHIVES)
def test_a_truncated_archive_is_noticed_and_the_next_source_tried(name, keep, cache):
    def broken(folder):
        (folder / name).write_bytes(ARCHIVES[name][: int(keep * len(ARCHIVES[name]))])

    def whole(folder):
        (folder / name).write_bytes(ARCHIVES[name])

    sources = Source("broken", broken, unpack(PATTERN)), Source("whole", whole, unpack(PATTERN))
    with pytest.raises(DataError, match=r"broken: \S+"):
        obtain(toy(sources[0]))
    assert not (cache / "toy").exists()
    assert (obtain(toy(*sources)) / "words.txt").read_bytes() == TEXT


@pytest.mark.parametrize("name", [name for name in ARCHIVES if name != "words.txt"])
def test_what_is_no_archive_is_noticed(name, tmp_path):
    (tmp_path / name).write_bytes(b"<html>please log in</html>" * 50)
    with pytest.raises((ValueError, OSError, tarfile.TarError, zipfile.BadZipFile)):
        unpack(PATTERN)(tmp_path)


def test_an_archive_without_the_files_says_what_was_looked_for(tmp_path):
    (tmp_path / "toy.zip").write_bytes(ARCHIVES["toy.zip"])
    with pytest.raises(ValueError, match=r"no file in toy\.zip matches .*letters"):
        unpack(r".*letters\.txt")(tmp_path)


@pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="dpkg-deb comes with Debian")
@pytest.mark.parametrize("compression", ["xz", "gzip", "zstd"])
def test_packages_made_by_dpkg_are_read(tmp_path, compression):
    (tmp_path / "root/DEBIAN").mkdir(parents=True)
    (tmp_path / "root/DEBIAN/control").write_text("Package: toy\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n")
    (tmp_path / "root/words.txt").write_bytes(TEXT)
    (tmp_path / "made").mkdir()
    command = ["dpkg-deb", f"-Z{compression}", "--build", "--root-owner-group", "root", "made/toy.deb"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    if "unknown compression" in done.stderr:
        pytest.skip("this dpkg-deb is too old for zstd")
    assert done.returncode == 0, done.stderr
    assert unpack(r"words\.txt")(tmp_path / "made") == {"words.txt": TEXT}


# --- clients that fail --------------------------------------------------------------------------------------------------------------

PIP_OFFLINE = """
echo "WARNING: Retrying (Retry(total=4)) after connection broken by 'NewConnectionError('<Connection at 0x7f>: Failed: [Errno -2] x')': /p/"
echo 'ERROR: Could not find a version that satisfies the requirement toy (from versions: none)' >&2
echo 'ERROR: No matching distribution found for toy==1.0' >&2
exit 1"""
NPM_OFFLINE = """
echo 'npm error code ENOTFOUND' >&2
echo 'npm error syscall getaddrinfo' >&2
echo 'npm error errno ENOTFOUND' >&2
echo 'npm error network request to https://registry.example.org/toy failed, reason: getaddrinfo ENOTFOUND registry.example.org' >&2
echo 'npm error network This is a problem related to network connectivity.' >&2
echo 'npm error A complete log of this run can be found in: /root/.npm/_logs/x.log' >&2
exit 1"""
APT_OFFLINE = """
echo 'Ign:1 http://debian.example.org/debian bookworm InRelease'
echo 'E: Failed to fetch http://debian.example.org/toy.deb  Temporary failure resolving' >&2
echo 'E: Some index files failed to download. They have been ignored, or old ones used instead.' >&2
exit 100"""


@pytest.mark.parametrize(
    ("name", "script", "download", "messages"),
    [
        ("pip", PIP_OFFLINE, pip("toy==1.0"), ["No matching distribution found for toy==1.0", "Failed: [Errno -2] x", "exit status 1"]),
        ("npm", NPM_OFFLINE, npm("toy@1.0"), ["getaddrinfo ENOTFOUND registry.example.org", "exit status 1"]),
        (
            "npm",
            "echo 'npm ERR! code E404' >&2; echo 'npm ERR! 404 Not Found - GET' >&2; exit 1",
            npm("toy"),
            ["npm ERR! 404 Not Found - GET"],
        ),
        (
            "apt-get",
            APT_OFFLINE,
            apt("toy", "1.0"),
            ["E: Failed to fetch", "Temporary failure", "status 100", "apt-get update"],
        ),
        ("npm", "echo one; echo two; exit 7", npm("toy"), ["two (exit status 7)"]),
        ("npm", "exit 3", npm("toy"), ["no message (exit status 3)"]),
        ("npm", "printf 'npm error \\377\\376 caf' >&2; exit 1", npm("toy"), ["caf"]),
    ],
)
def test_a_client_that_fails_is_quoted(client, no_pip_module, name, script, download, messages):
    client(name, script)
    with pytest.raises(DataError) as caught:
        obtain(toy(Source("the registry", download, unpack(PATTERN))))
    for message in ["the registry: ", *messages]:
        assert message in str(caught.value)


@pytest.mark.parametrize(
    ("download", "message"),
    [
        (pip("toy==1.0"), "pip is not installed.*ensurepip"),
        (npm("toy@1.0"), "npm is not installed.*Node"),
        (apt("toy", "1.0"), "apt-get is not installed.*Debian"),
    ],
)
def test_a_client_that_is_not_installed(client, no_pip_module, download, message):
    with pytest.raises(DataError, match=message):
        obtain(toy(Source("the registry", download, unpack(PATTERN))))


def test_a_client_that_hangs_is_given_up(client, monkeypatch):
    monkeypatch.setattr(STORE, "CLIENT_TIMEOUT", 0.3)
    client("npm", "exec /bin/sleep 60")
    with pytest.raises(DataError, match="`npm` gave no result"):
        obtain(toy(Source("the registry", npm("toy"), unpack(PATTERN))))


def alone(code, **options):
    """Run code in another process, with the module loaded by itself, which spares the import of torch."""
    head = f"""
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("store", {STORE.__file__!r})
store = sys.modules["store"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(store)
"""
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, **options)


def test_a_client_that_asks_gets_no_answer(client):
    client("npm", 'read answer && exit 0; echo "asked in vain"; exit 1')
    assert "asked in vain" in alone("store.npm('toy')(Path('.'))", input="yes\n").stderr


def test_a_client_that_brings_nothing(client):
    client("npm", "exit 0")
    with pytest.raises(DataError, match="no file in it matches"):
        obtain(toy(Source("the registry", npm("toy"), unpack(PATTERN))))


# --- clients that work ----------------------------------------------------------------------------------------------------------------


def test_npm_packs_the_named_version(client, tmp_path):
    (tmp_path / "toy.tgz").write_bytes(ARCHIVES["toy-1.0.tgz"])
    log = client("npm", f"/bin/cp {tmp_path}/toy.tgz .")
    assert (obtain(toy(Source("npm", npm("toy@1.0"), unpack(PATTERN)))) / "words.txt").read_bytes() == TEXT
    assert log.read_text().split()[0] == "pack"
    assert log.read_text().split()[-1] == "toy@1.0"


@pytest.mark.parametrize("program", ["pip", "pip3", "uv"])
def test_an_environment_without_pip_uses_one_on_the_path(client, no_pip_module, tmp_path, program):
    (tmp_path / "toy-1.0-py3-none-any.whl").write_bytes(ARCHIVES["toy-1.0-py3-none-any.whl"])
    log = client(program, f"/bin/cp {tmp_path}/*.whl .")
    obtain(toy(Source("PyPI", pip("toy==1.0", "--only-binary=:all:"), unpack(PATTERN))))
    asked = log.read_text().split()
    assert asked[:4] == ["--quiet", "tool", "run", "pip"] if program == "uv" else asked[0] == "download"
    assert {"--no-deps", "--only-binary=:all:", "--dest"} < set(asked)
    assert asked[-1] == "toy==1.0"


@pytest.fixture
def offline_index(tmp_path, monkeypatch):
    """A folder instead of an index, for the real pip."""
    if not importlib.util.find_spec("pip"):
        pytest.skip("this environment has no pip")
    folder = tmp_path / "wheels"
    folder.mkdir()
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(folder), "PIP_CONFIG_FILE": os.devnull}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    return folder


def test_the_real_pip_downloads_a_wheel_of_another_machine(offline_index):
    meta = {"toy-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: toy\nVersion: 1.0\nRequires-Dist: nowhere-to-be-found\n",
            "toy-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: false\nTag: cp311-cp311-win_arm64\n",
            "toy-1.0.dist-info/RECORD": b""}  # fmt: skip
    (offline_index / "toy-1.0-cp311-cp311-win_arm64.whl").write_bytes(wheel(MEMBERS | meta))
    options = "--only-binary=:all:", "--platform=win_arm64", "--python-version=3.11", "--implementation=cp", "--abi=cp311"
    obtain(toy(Source("PyPI", pip("toy==1.0", *options), unpack(PATTERN))))


def test_the_real_pip_says_that_a_package_is_gone(offline_index):
    with pytest.raises(DataError, match=r"PyPI toy: ERROR: No matching distribution found for toy==1\.0"):
        obtain(toy(Source("PyPI toy", pip("toy==1.0"), unpack(PATTERN))))


# --- apt-get without package lists ------------------------------------------------------------------------------------------------

APT = """
lists=; action=; package=
while [ $# -gt 0 ]; do
  case "$1" in
    -o) case "$2" in Dir::State::lists=*) lists="${2#*=}" ;; esac; shift ;;
    update) action=update ;;
    download) action=download; package="$2"; shift ;;
  esac
  shift
done
if [ $action = update ]; then
  [ -d "$lists/partial" ] || { echo "E: List directory $lists/partial is missing" >&2; exit 100; }
  [ "$offline" ] && { echo "E: Failed to fetch InRelease  Temporary failure resolving" >&2; exit 100; }
  : > "$lists/fresh"
elif [ "$system" ] || { [ "$lists" ] && [ -f "$lists/fresh" ]; }; then
  case "$package" in *=1.0) [ "$gone" ] && { echo "E: Version '1.0' for 'toy' was not found" >&2; exit 100; } ;; esac
  /bin/cp "$package_file" .
else
  echo "E: Unable to locate package ${package%=*}" >&2; exit 100
fi
"""


@pytest.fixture
def apt_get(client, tmp_path, monkeypatch):
    (tmp_path / "toy_1.0_all.deb").write_bytes(ARCHIVES["toy_1.0_all.deb"])
    monkeypatch.setenv("package_file", str(tmp_path / "toy_1.0_all.deb"))
    monkeypatch.setattr(STORE, "_apt_lists", [])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for name in ("system", "offline", "gone"):
        monkeypatch.delenv(name, raising=False)
    return client("apt-get", APT)


def updates(log):
    return sum(line.endswith("update") for line in log.read_text().splitlines())


def debian(version="1.0"):
    return toy(Source("Debian toy", apt("toy", version), unpack(PATTERN)))


def test_apt_get_uses_the_lists_of_the_system(apt_get, monkeypatch):
    monkeypatch.setenv("system", "1")
    obtain(debian())
    assert apt_get.read_text() == "download toy=1.0\n"


def test_apt_get_takes_another_version_whose_files_are_the_same(apt_get, monkeypatch):
    monkeypatch.setenv("system", "1")
    monkeypatch.setenv("gone", "1")
    obtain(debian())
    assert apt_get.read_text() == "download toy=1.0\ndownload toy\n"


def test_a_fresh_machine_gets_lists_of_its_own_once(apt_get, tmp_path):
    obtain(debian())
    assert updates(apt_get) == 1
    assert "APT::Sandbox::User" in apt_get.read_text()
    obtain(debian(), force=True)
    assert updates(apt_get) == 1
    assert len(list(tmp_path.glob("dlatlas-apt-*"))) == 1


def test_the_lists_go_with_the_process(apt_get, tmp_path):
    for name in ("temporary", "download"):
        (tmp_path / name).mkdir()
    alone("store.apt('toy', '1.0')(Path('download'))", check=True, cwd=tmp_path, env=os.environ | {"TMPDIR": str(tmp_path / "temporary")})
    assert updates(apt_get) == 1
    assert [path.name for path in (tmp_path / "download").iterdir()] == ["toy_1.0_all.deb"]
    assert not list((tmp_path / "temporary").iterdir())


def test_several_threads_on_a_fresh_machine_update_once(apt_get):
    errors = []

    def one(k):
        try:
            source = debian().sources[0]
            obtain(Dataset(f"toy{k}", "Toy", "none", "nobody", debian().files, (source,)))
        except DataError as error:
            errors.append(error)

    threads = [threading.Thread(target=one, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert updates(apt_get) == 1


def test_without_lists_and_network_both_failures_and_the_remedy_are_told(apt_get, monkeypatch):
    monkeypatch.setenv("offline", "1")
    with pytest.raises(DataError, match=r"Unable to locate package toy.*fresh .* lists: E: Failed to fetch InRelease.*`apt-get update`"):
        obtain(debian())
    monkeypatch.delenv("offline")
    obtain(debian())
    assert updates(apt_get) == 2


def test_a_package_of_debian_has_the_addresses_of_the_archive_too(client, monkeypatch):
    asked = []

    def blocked(request, timeout):
        asked.append(request.full_url)
        raise OSError("blocked")

    monkeypatch.setattr(STORE.urllib.request, "urlopen", blocked)
    with pytest.raises(DataError, match=r"(?s)Debian toy-text: apt-get is not installed.*snapshot\.debian\.org: "):
        obtain(toy(*debian_archive("toy-text", "1.0-2", unpack(PATTERN))))
    path = "pool/main/t/toy-text/toy-text_1.0-2_all.deb"
    assert asked == [f"https://snapshot.debian.org/archive/debian/20240101T000000Z/{path}"]


# --- addresses --------------------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        kind = self.path.split("/")[1]
        self.server.seen.append((self.path, self.headers["User-Agent"]))
        if kind == "absent":
            self.send_error(404)
            return
        self.send_response(200)
        self.close_connection = True
        if kind == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n" % len(TEXT) + TEXT[:100])
            return
        if kind != "unsized":
            self.send_header("Content-Length", str(len(TEXT)))
        self.end_headers()
        self.wfile.write(TEXT if kind in ("good", "unsized") else TEXT[: len(TEXT) // 2])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.seen = []
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        running.base = f"http://127.0.0.1:{running.server_port}"
        yield running
        running.shutdown()


def fetched(base):
    return obtain(toy(Source("the authors", urls(f"{base}/", "words.txt"), unpack(PATTERN))))


@pytest.mark.parametrize("kind", ["good", "unsized"])
def test_an_address_is_downloaded(server, kind):
    assert (fetched(f"{server.base}/{kind}") / "words.txt").read_bytes() == TEXT
    assert server.seen == [(f"/{kind}/words.txt", "dlatlas")]


@pytest.mark.parametrize(("kind", "message"), [("short", "broke off|IncompleteRead"), ("chunked", "IncompleteRead"), ("absent", "404")])
def test_an_address_that_fails_is_told_and_nothing_stored(server, cache, kind, message):
    with pytest.raises(DataError, match=rf"the authors: {server.base}/{kind}/words.txt: .*({message})"):
        fetched(f"{server.base}/{kind}")
    assert not (cache / "toy").exists()


def test_a_broken_connection_leads_to_the_next_source(server):
    broken, good = (Source(kind, urls(f"{server.base}/{kind}/", "words.txt"), unpack(PATTERN)) for kind in ("short", "good"))
    assert (obtain(toy(broken, good)) / "words.txt").read_bytes() == TEXT


def test_nobody_listens(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(DataError, match="refused"):
        fetched(server.base)


def test_an_answer_that_is_no_http():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            connection, _ = listener.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"what?\r\n\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DataError, match="the authors: http://127"):
            fetched(f"http://127.0.0.1:{listener.getsockname()[1]}")
        thread.join()


def test_a_server_that_says_nothing(monkeypatch):
    monkeypatch.setattr(STORE, "URL_TIMEOUT", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as listener, pytest.raises(DataError, match="timed out"):
        fetched(f"http://127.0.0.1:{listener.getsockname()[1]}")


def test_what_is_installed_needs_no_download(tmp_path):
    assert installed(tmp_path) is None
    assert not list(tmp_path.iterdir())
    assert (obtain(toy(Source("library", installed, lambda _: {"words.txt": TEXT}))) / "words.txt").read_bytes() == TEXT


def test_the_interpreters_own_pip_comes_first(client, monkeypatch):
    commands = []
    monkeypatch.setattr(STORE, "_run", lambda command, cwd: commands.append(command))
    client("pip", "exit 1")
    if importlib.util.find_spec("pip"):
        pip("toy")(Path("folder"))
        assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
