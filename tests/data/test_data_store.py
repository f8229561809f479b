"""The cache: what is fetched, kept, verified, repaired, and what the errors say. No test here needs a network."""

import dataclasses
import hashlib
import importlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dlatlas import data
from dlatlas.data import registry
from dlatlas.data.store import DataError, Dataset, Source, cache_dir, choose, mark_used, obtain, used

CONTENT = {"a": b"alpha", "b": b"beta"}
STORE = importlib.import_module("dlatlas.data.store")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("DLATLAS_DATA", str(folder))
    return folder


def toy(*sources, name="toy", content=CONTENT):
    files = {k: (len(v), hashlib.sha256(v).hexdigest()) for k, v in content.items()}
    return Dataset(name=name, title="Toy", licence="none", citation="nobody", files=files, sources=sources)


class Counting:
    """A source that counts its downloads and gives `content`, or raises it."""

    def __init__(self, content=CONTENT, label="counting"):
        self.content, self.downloads = content, 0
        self.source = Source(label, self.download, lambda folder: self.content)

    def download(self, folder: Path):
        assert folder.is_dir()
        assert not list(folder.iterdir())
        self.downloads += 1
        if isinstance(self.content, Exception):
            raise self.content


def stored(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_data_set_is_fetched_once_and_leaves_nothing_else(cache):
    good = Counting()
    dataset = toy(good.source)
    for _ in range(3):
        assert obtain(dataset) == cache / "toy"
    assert good.downloads == 1
    assert stored(cache / "toy") == CONTENT
    assert {path.name for path in cache.iterdir()} <= {"toy", ".toy.lock"}


def test_only_the_declared_files_are_kept(cache):
    obtain(toy(Counting(CONTENT | {"c": b"more"}).source))
    assert stored(cache / "toy") == CONTENT


def test_a_wrong_checksum_falls_through_to_the_next_source(cache):
    wrong, good = Counting(CONTENT | {"b": b"BETA"}), Counting()
    obtain(toy(wrong.source, good.source))
    assert (wrong.downloads, good.downloads) == (1, 1)
    assert stored(cache / "toy") == CONTENT


def test_when_every_source_is_wrong_the_error_names_expected_and_found(cache):
    sources = [Counting(CONTENT | {"b": b"BETA"}, "first").source, Counting({"a": b"alpha"}, "second").source]
    with pytest.raises(DataError) as caught:
        obtain(toy(*sources))
    message = str(caught.value)
    for part in (
        "'toy'",
        "first: b has SHA-256",
        "second: it does not contain b",
        "Remedy",
        "python -m dlatlas data toy",
        str(cache / "toy"),
    ):
        assert part in message
    assert hashlib.sha256(b"BETA").hexdigest() in message
    assert hashlib.sha256(b"beta").hexdigest() in message
    assert message.index("first") < message.index("second")
    assert not (cache / "toy").exists()
    assert not list(cache.glob(".toy.tmp*"))


def test_whatever_a_source_raises_is_told_and_the_next_one_tried(cache):
    sources = [
        Counting(error, f"source {k}") for k, error in enumerate([OSError("no route"), KeyError("x"), EOFError(), ValueError("odd")])
    ]
    good = Counting()
    obtain(toy(*(s.source for s in sources), good.source))
    assert [s.downloads for s in sources] == [1] * 4
    with pytest.raises(DataError, match=r"(?s)source 0: no route.*source 1: 'x'.*source 2: EOFError.*source 3: odd"):
        obtain(toy(*(s.source for s in sources), name="other"))


def test_a_missing_library_is_told_at_once(cache):
    lacking, other = Counting(DataError("pysword is not installed")), Counting()
    with pytest.raises(DataError, match=r"^pysword is not installed$"):
        obtain(toy(lacking.source, other.source))
    assert other.downloads == 0
    assert not list(cache.glob(".toy.tmp*"))


@pytest.mark.parametrize("damage", ["altered", "truncated", "deleted", "a folder"])
def test_damage_in_the_cache_is_noticed_told_and_repaired(cache, caplog, damage):
    good = Counting()
    dataset = toy(good.source)
    path = obtain(dataset) / "b"
    if damage == "altered":
        path.write_bytes(b"bet!")
        os.utime(path, ns=(0, 0))
    elif damage == "truncated":
        path.write_bytes(b"be")
    else:
        path.unlink()
    if damage == "a folder":
        path.mkdir()
        with pytest.raises(DataError, match="cannot be written"):
            obtain(dataset)
        path.rmdir()
    with caplog.at_level(logging.WARNING, "dlatlas.data"):
        obtain(dataset)
    assert str(path) in caplog.text
    assert ("has 2 bytes instead of 4" in caplog.text) == (damage == "truncated")
    assert stored(cache / "toy") == CONTENT
    assert good.downloads == (3 if damage == "a folder" else 2)


def test_damage_that_cannot_be_repaired_is_an_error(cache):
    (obtain(toy(Counting().source)) / "a").write_bytes(b"?????")
    with pytest.raises(DataError, match="gone"):
        obtain(toy(Counting(OSError("gone")).source))


def test_force_fetches_again_and_a_failure_keeps_what_was_there(cache):
    good = Counting()
    obtain(toy(good.source))
    obtain(toy(good.source), force=True)
    assert good.downloads == 2
    with pytest.raises(DataError, match="no route"):
        obtain(toy(Counting(OSError("no route")).source), force=True)
    assert stored(cache / "toy") == CONTENT
    assert obtain(toy(Counting(OSError("no route")).source)) == cache / "toy"


# --- caches that cannot be written ------------------------------------------------------------------------------------------------


def test_a_read_only_cache_serves_what_it_has(cache, monkeypatch):
    good = Counting()
    obtain(toy(good.source))
    cache.chmod(0o555)

    def refuse(*_, **__):
        raise PermissionError(30, "Read-only file system")

    monkeypatch.setattr(STORE.FileLock, "acquire", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(Path, "write_bytes", refuse)
    assert obtain(toy(good.source)) == cache / "toy"
    with pytest.raises(DataError, match=r"(?s)'other' must be fetched.*Read-only file system.*DLATLAS_DATA"):
        obtain(toy(good.source, name="other"))
    assert good.downloads == 1


def test_a_file_in_place_of_the_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DLATLAS_DATA", str(tmp_path / "file"))
    good = Counting()
    with pytest.raises(DataError, match=r"(?s)cannot be written.*DLATLAS_DATA"):
        obtain(toy(good.source))
    monkeypatch.setenv("DLATLAS_DATA", str(tmp_path / "file" / "below"))
    with pytest.raises(DataError, match=r"(?s)cannot be written.*DLATLAS_DATA"):
        obtain(toy(good.source))
    assert good.downloads == 0


def test_a_file_in_place_of_the_data_set_is_no_fault_of_the_sources(cache):
    cache.mkdir()
    (cache / "toy").write_text("")
    first, second = Counting(), Counting()
    with pytest.raises(DataError, match="cannot be written"):
        obtain(toy(first.source, second.source))
    assert second.downloads == 0
    assert not list(cache.glob(".toy.tmp*"))


def test_a_file_system_without_locks(cache, monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(STORE.FileLock, "acquire", refuse)
    with pytest.raises(DataError, match="support flock"):
        obtain(toy(Counting().source))


# --- several at once, and killed ones ---------------------------------------------------------------------------------------------

# The module is loaded by itself, which spares the import of torch.
CHILD = f"""
import hashlib, importlib.util, json, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("store", {STORE.__file__!r})
store = sys.modules["store"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(store)
mode, marks = sys.argv[1], Path(sys.argv[2])
CONTENT = {CONTENT!r}

def download(folder):
    (folder / "archive").write_bytes(b"half of an arch")
    with (marks / "downloads").open("a") as file:
        file.write("one\\n")
    time.sleep(60 if mode == "hang in download" else 0.5)

class Content(dict):
    def __getitem__(self, name):
        if name == "b" and mode == "hang in writing":
            (marks / "writing").touch()
            time.sleep(60)
        return super().__getitem__(name)

files = {{k: (len(v), hashlib.sha256(v).hexdigest()) for k, v in CONTENT.items()}}
source = store.Source("slow", download, lambda folder: Content(CONTENT))
folder = store.obtain(store.Dataset("toy", "Toy", "none", "nobody", files, (source,)))
print(json.dumps({{path.name: path.read_text() for path in folder.iterdir()}}))
"""


def child(mode, marks):
    return subprocess.Popen([sys.executable, "-c", CHILD, mode, str(marks)], stdout=subprocess.PIPE, text=True)


def wait_for(path):
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.01)


def test_processes_that_want_the_same_data_set_fetch_it_once(cache, tmp_path):
    children = [child("", tmp_path) for _ in range(3)]
    for process in children:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert json.loads(out) == {"a": "alpha", "b": "beta"}
    assert (tmp_path / "downloads").read_text() == "one\n"


def test_threads_that_want_the_same_data_set_fetch_it_once(cache):
    good = Counting()
    slow = dataclasses.replace(good.source, extract=lambda folder: time.sleep(0.2) or CONTENT)
    threads = [threading.Thread(target=obtain, args=(toy(slow),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert good.downloads == 1
    assert stored(cache / "toy") == CONTENT


@pytest.mark.parametrize(("mode", "mark"), [("hang in download", "downloads"), ("hang in writing", "writing")])
def test_a_killed_process_leaves_no_half_file_and_the_next_one_recovers(cache, tmp_path, mode, mark):
    process = child(mode, tmp_path)
    wait_for(tmp_path / mark)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (cache / "toy").exists()
    assert len(list(cache.glob(".toy.tmp*"))) == 1
    good = Counting()
    obtain(toy(good.source))
    assert good.downloads == 1
    assert stored(cache / "toy") == CONTENT
    assert not list(cache.glob(".toy.tmp*"))


def test_half_moved_files_are_completed(cache):
    """As after a kill between the two renamings."""
    (cache / "toy").mkdir(parents=True)
    (cache / "toy" / "a").write_bytes(b"alpha")
    obtain(toy(Counting().source))
    assert stored(cache / "toy") == CONTENT


def test_cleaning_up_leaves_other_data_sets_alone(cache):
    for name in (".toy.tmp-1", ".toy-2.tmp-1", ".toys.tmp-1"):
        (cache / name).mkdir(parents=True)
    obtain(toy(Counting().source))
    assert {path.name for path in cache.iterdir() if "tmp" in path.name} == {".toy-2.tmp-1", ".toys.tmp-1"}


# --- where, what, which -----------------------------------------------------------------------------------------------------------


def test_the_environment_chooses_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLATLAS_DATA", str(tmp_path))
    assert data.cache_dir() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DLATLAS_DATA", "~/x")
    assert cache_dir() == tmp_path / "x"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLATLAS_DATA", "y")
    assert cache_dir() == tmp_path / "y"
    for unset in (lambda: monkeypatch.setenv("DLATLAS_DATA", ""), lambda: monkeypatch.delenv("DLATLAS_DATA")):
        unset()
        monkeypatch.setattr(sys, "platform", "linux")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
        assert cache_dir() == tmp_path / "xdg" / "dlatlas"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache_dir() == tmp_path / ".cache" / "dlatlas"
        monkeypatch.setattr(sys, "platform", "darwin")
        assert cache_dir() == tmp_path / "Library" / "Caches" / "dlatlas"


def test_used_tells_names_and_checksums(monkeypatch):
    monkeypatch.setattr(STORE, "_used", {})
    assert used() == {}
    dataset = toy()
    mark_used(dataset)
    lines = "".join(f"{name} {hashlib.sha256(CONTENT[name]).hexdigest()}\n" for name in ("a", "b"))
    assert used() == {"toy": hashlib.sha256(lines.encode()).hexdigest()}
    used()["toy"] = "changed"
    assert data.used()["toy"] == dataset.sha256
    assert toy(content=CONTENT | {"b": b"BETA"}).sha256 != dataset.sha256
    assert toy(content={"b": b"beta", "a": b"alpha"}).sha256 == dataset.sha256


def test_loading_marks_as_used(monkeypatch):
    monkeypatch.setattr(STORE, "_used", {})
    data.fetch("digits")
    assert used() == {}
    data.images("digits", train=1, test=1)
    assert used() == {"digits": data.describe("digits").sha256}


def test_unknown_names_are_answered_with_the_nearest_one():
    assert choose("mnist", ["mnist", "usps"]) == "mnist"
    with pytest.raises(ValueError, match=r"unknown data set 'nmist'; did you mean 'mnist'\? \(one of: mnist, usps\)"):
        choose("nmist", ["mnist", "usps"])
    with pytest.raises(ValueError, match=r"unknown thing 'zzz'; expected \(one of: mnist, usps\)"):
        choose("zzz", ["mnist", "usps"], "thing")
    for call in (data.describe, data.fetch, lambda name: data.fetch_all([name])):
        with pytest.raises(ValueError, match="did you mean 'fashion-mnist'"):
            call("fashion_mnist")


def test_declarations_are_complete():
    assert set(data.NAMES) >= {"mnist", "fashion-mnist", "usps", "digits", "photos", "brown", "bible-kjv", "bible-web", "bible-rv1909"}
    for name in data.NAMES:
        dataset = data.describe(name)
        assert dataset.name == name
        assert len(dataset.sources) >= (1 if name in ("digits", "diabetes") else 2)
        text = str(dataset)
        for part in (name, dataset.title, dataset.licence, dataset.citation, dataset.sha256, *(s.label for s in dataset.sources)):
            assert part
            assert part in text
        for size, digest in dataset.files.values():
            assert size > 0
            assert len(bytes.fromhex(digest)) == 32
    assert data.describe("digits").size == sum(path.stat().st_size for path in data.fetch("digits").iterdir())


# --- several data sets ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def three(cache, monkeypatch):
    sets = {name: toy(Counting(content).source, name=name) for name, content in
            [("one", CONTENT), ("two", OSError("no route")), ("three", ValueError("no zip"))]}  # fmt: skip
    monkeypatch.setattr(registry, "DATASETS", sets)
    monkeypatch.setattr(registry, "NAMES", tuple(sets))
    return sets


def test_fetch_all_fetches_what_it_can_and_collects_every_failure(three, cache):
    lines = []
    with pytest.raises(DataError) as caught:
        registry.fetch_all(report=lines.append)
    for part in ("'two'", "no route", "'three'", "no zip"):
        assert part in str(caught.value)
    assert "'one'" not in str(caught.value)
    assert stored(cache / "one") == CONTENT
    assert sorted(line.split(":")[0] for line in lines) == ["one", "three", "two"]
    assert {line for line in lines if "failed" in line} == {"two: failed", "three: failed"}


def test_fetch_all_of_some(three, cache, capsys):
    assert registry.fetch_all(["one", "one"]) == {"one": cache / "one"}
    assert capsys.readouterr().out.startswith("one: 0.0 MB")
    assert registry.fetch_all([]) == {}
    assert registry.fetch("one", force=True) == cache / "one"


def test_the_command_line_fetches_and_fails(three, cache, capsys, monkeypatch):
    from dlatlas.__main__ import main

    monkeypatch.setattr(data, "NAMES", registry.NAMES)
    assert main(["data", "one"]) == 0
    assert stored(cache / "one") == CONTENT
    assert main(["data", "all"]) == 1
    assert "no route" in capsys.readouterr().err
    assert main(["data"]) == 0
    assert "three: Toy" in capsys.readouterr().out


def test_the_import_is_light():
    code = """
import sys, time
import numpy, torch
start = time.process_time()
import dlatlas.data
print(time.process_time() - start, *({"sklearn", "scipy", "PIL", "pysword", "matplotlib", "pandas"} & set(sys.modules)))
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert len(out) == 1, f"import dlatlas.data also imports {out[1:]}"
    assert float(out[0]) < 1
