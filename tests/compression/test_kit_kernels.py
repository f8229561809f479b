"""Packed products against integer arithmetic on both backends; the build against broken, missing and busy surroundings."""

import ctypes
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from dlatlas.compression.kit import kernels
from dlatlas.compression.kit.kernels import library as build


def a_compiler():
    if not build.compilers():
        pytest.skip("no C compiler")
    return build.compilers()[0]


SIZES = [1, 7, 63, 64, 65, 500, 512, 1000]


@pytest.fixture(params=["c", "portable", "numpy"])
def backend(request, monkeypatch, tmp_path_factory):
    """The C library as built here, the same without this processor's own instructions, and NumPy."""
    if request.param == "numpy":
        monkeypatch.setattr(kernels, "load", lambda: None)
        return "numpy"
    compiler = a_compiler()
    if request.param == "c":
        library = build.build(compiler)
    else:
        monkeypatch.setenv("DLATLAS_CACHE", str(tmp_path_factory.getbasetemp()))
        library = build.build(compiler, [flag for flag in build.FLAGS if flag != "-march=native"])
        assert not library.wide()
    monkeypatch.setattr(kernels, "load", lambda: library)
    return request.param


def signs(*shape):
    return torch.randint(0, 2, shape).float() * 2 - 1


def words_by_hand(bits):
    """Python integers of 64 bits, the first value lowest."""
    return [sum(int(b) << i for i, b in enumerate(bits[k : k + 64])) for k in range(0, len(bits), 64)]


@pytest.mark.parametrize("n", SIZES)
def test_packing_by_hand(backend, n):
    x = torch.randn(3, n)
    x[1, 0] = 0.0  # not above 0
    packed = kernels.pack_bits(x)
    assert packed.dtype == torch.uint64
    assert packed.tolist() == [words_by_hand(row > 0) for row in x]
    assert torch.equal(kernels.unpack_bits(packed, n), torch.where(x > 0, 1.0, -1.0))
    assert torch.equal(kernels.pack_bits(x[0]).view(torch.int64), packed[0].view(torch.int64))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("M", "N"), [(1, 1), (3, 8), (2, 21)])
def test_products_of_signs_are_integer_products(backend, n, M, N):
    a, b = signs(M, n), signs(N, n)
    out = kernels.xnor_gemm(kernels.pack_bits(a), kernels.pack_bits(b), n)
    assert out.dtype == torch.int32
    assert torch.equal(out, (a.long() @ b.long().T).int())
    bias = torch.randn(N)
    x = a * torch.rand(M, n)
    torch.testing.assert_close(kernels.sign_linear(x, kernels.pack_bits(b), bias), out + bias)
    assert torch.equal(kernels.sign_linear(x, kernels.pack_bits(b)), out.float())


def test_many_rows_are_cut_into_blocks(backend):
    a, b = signs(300, 20_000), signs(9, 20_000)  # 313 words a row: about 100 rows a block
    out = kernels.xnor_gemm(kernels.pack_bits(a), kernels.pack_bits(b), 20_000)
    assert torch.equal(out, (a.double() @ b.double().T).int())


@pytest.mark.parametrize(("ka", "kb"), [(1, 1), (2, 2), (2, 3), (4, 1)])
@pytest.mark.parametrize(("M", "N", "n"), [(3, 11, 65), (1, 8, 512), (2, 3, 1)])
def test_multibit_products(backend, ka, kb, M, N, n):
    a, b, beta, alpha = signs(M, ka, n), signs(N, kb, n), torch.rand(M, ka), torch.rand(N, kb)
    expected = torch.einsum("mjn,mj,kin,ki->mk", *(t.double() for t in (a, beta, b, alpha)))
    out = kernels.multibit_gemm(kernels.pack_bits(a), beta, kernels.pack_bits(b), alpha, n)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("n", SIZES)
def test_planes_hold_the_bits_of_bytes(backend, n):
    x = torch.randint(0, 256, (2, n), dtype=torch.uint8)
    planes = kernels.pack_planes(x)
    assert planes.tolist() == [[words_by_hand(row.int() >> b & 1) for row in x] for b in range(8)]


@pytest.mark.parametrize("n", SIZES)
def test_thresholds(backend, n):
    z, t = torch.randint(-5, 6, (3, n), dtype=torch.int32), torch.randint(-5, 6, (n,), dtype=torch.int32)
    t[0] = 2**31 - 1
    z[0, 0] = 2**31 - 1
    assert kernels.pack_reached(z, t).tolist() == [words_by_hand(row >= t) for row in z]


def test_arrays_are_answered_with_arrays(backend):
    a, b = signs(2, 70).numpy(), signs(3, 70).numpy()
    out = kernels.xnor_gemm(kernels.pack_bits(a), kernels.pack_bits(b), 70)
    assert isinstance(out, np.ndarray)
    assert out.dtype == np.int32
    assert (out == a.astype(int) @ b.astype(int).T).all()
    assert kernels.pack_bits(a).dtype == np.uint64
    assert (kernels.unpack_bits(kernels.pack_bits(a), 70) == a).all()
    # What is not contiguous, of another float type or a part of a graph is taken as well.
    x = torch.randn(70, 4, dtype=torch.float64, requires_grad=True).T
    assert torch.equal(kernels.unpack_bits(kernels.pack_bits(x), 70), torch.where(x > 0, 1.0, -1.0))


def test_numpy_1_counts_bits_too(monkeypatch):
    words = np.random.default_rng(0).integers(0, 2**64, (5, 3), dtype=np.uint64)
    expected = [[int(w).bit_count() for w in row] for row in words]
    assert kernels._popcount(words).tolist() == expected
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert kernels._popcount(words).tolist() == expected


@pytest.mark.parametrize(
    "call",
    [
        lambda w: kernels.xnor_gemm(w, w[:, :1], 64),
        lambda w: kernels.xnor_gemm(w, w, 200),
        lambda w: kernels.xnor_gemm(w.view(torch.int64), w, 64),
        lambda w: kernels.unpack_bits(w, 300),
        lambda w: kernels.multibit_gemm(w[None], torch.ones(1, 3), w[None], torch.ones(1, 2), 64),
        lambda w: kernels.sign_linear(torch.ones(2, 300), w),
        lambda w: kernels.sign_linear(torch.ones(2, 100), w, torch.ones(5)),
        lambda w: kernels.multibit_linear(torch.ones(1, 100), 5, 2, w[:, None], torch.ones(2, 1)),
        lambda w: kernels.alternating(torch.ones(1, 4), 0, 2),
        lambda w: kernels.alternating_values(torch.ones(1, 0), 1, 2),
        lambda w: kernels.pack_planes(torch.ones(2, 3)),
        lambda w: kernels.pack_reached(torch.ones(2, 3, dtype=torch.int32), torch.ones(4, dtype=torch.int32)),
    ],
)
def test_bad_input(backend, call):
    with pytest.raises(ValueError, match=r"expected|take"):
        call(kernels.pack_bits(signs(2, 128)))


# --- the build ---------------------------------------------------------------------------------------------------------------------

# The module without its package: it starts in no time, so that the processes really meet.
CHECK = f"""
import ctypes, importlib.util, pathlib, time
spec = importlib.util.spec_from_file_location("library", {build.__file__!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
print("ready", flush=True)
while not pathlib.Path(__import__("sys").argv[1]).exists():
    time.sleep(0.001)
library = build.load()
if library is not None:
    a, out = (ctypes.c_uint64 * 2)(5, 6), (ctypes.c_int32 * 4)()
    library.xnor_gemm(a, a, 2, 2, 1, 3, out)
    assert list(out) == [3, -1, -1, 3], list(out)
print("numpy" if library is None else "c")
"""


def start(folder, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", CHECK, str(folder / "go")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"DLATLAS_CACHE": str(folder)} | environment,
    )  # fmt: skip


def test_processes_that_start_together_share_one_library(tmp_path):
    a_compiler()
    jobs = [start(tmp_path) for _ in range(4)]
    for job in jobs:
        assert job.stdout.readline() == "ready\n"
    (tmp_path / "go").touch()
    seen, running = set(), True
    while running:  # whatever stands under a final name is whole at every moment
        running = any(job.poll() is None for job in jobs)
        for path in (tmp_path / "kernels").glob("bitgemm-*.so"):
            ctypes.CDLL(str(path))
            seen.add((path.name, path.stat().st_size))
        time.sleep(0.002)
    for job in jobs:
        out, err = job.communicate()
        assert (job.returncode, out, err) == (0, "c\n", "")
    assert len(seen) == 1
    assert [path.name for path in (tmp_path / "kernels").iterdir()] == [name for name, _ in seen]


def test_a_broken_compiler_and_a_forced_fallback_are_silent(tmp_path):
    for name in ("cc", "gcc", "clang"):
        (tmp_path / name).write_text("#!/bin/sh\necho nonsense >&2\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "go").touch()
    for job in (start(tmp_path, PATH=f"{tmp_path}:/usr/bin:/bin"), start(tmp_path, DLATLAS_KERNELS="numpy")):
        out, err = job.communicate()
        assert (job.returncode, out, err) == (0, "ready\nnumpy\n", "")
    assert not any(tmp_path.rglob("*.so"))


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """An empty cache, and nothing decided yet."""
    monkeypatch.setenv("DLATLAS_CACHE", str(tmp_path))
    monkeypatch.delenv("DLATLAS_KERNELS", raising=False)
    kernels.load.cache_clear()
    yield tmp_path
    kernels.load.cache_clear()


def test_the_library_is_built_once_and_again_if_damaged(fresh, caplog, monkeypatch):
    a_compiler()
    assert build.kernel_dir() == fresh / "kernels"
    assert kernels.load() is kernels.load()
    (path,) = (fresh / "kernels").iterdir()
    content = path.read_bytes()
    path.unlink()  # the loaded one is in use: another file takes its name
    path.write_bytes(content[: len(content) // 2])
    kernels.load.cache_clear()
    assert kernels.backend() == "c"
    assert "damaged" in caplog.text
    assert len(path.read_bytes()) == len(content)
    kernels.load.cache_clear()
    monkeypatch.setattr(build, "_compile", None)  # not needed any more
    assert kernels.backend() == "c"


def test_other_flags_and_another_source_are_another_library(fresh, monkeypatch, tmp_path):
    compiler = a_compiler()
    build.build(compiler)
    build.build(compiler, [*build.FLAGS, "-O1"])
    source = tmp_path / "other.c"
    source.write_text(build.SOURCE.read_text() + "\n/* changed */\n")
    monkeypatch.setattr(build, "SOURCE", source)
    build.build(compiler)
    assert len(list((fresh / "kernels").glob("*.so"))) == 3


def test_without_a_place_for_it_the_library_serves_this_process(fresh, monkeypatch, caplog):
    a_compiler()
    (fresh / "file").touch()
    monkeypatch.setenv("DLATLAS_CACHE", str(fresh / "file"))
    assert kernels.backend() == "c"
    assert "this process only" in caplog.text
    assert torch.equal(kernels.sign_linear(torch.ones(1, 5), kernels.pack_bits(torch.ones(1, 5))), torch.tensor([[5.0]]))


def test_choice_of_the_backend(fresh, monkeypatch):
    monkeypatch.setenv("PATH", str(fresh))
    assert kernels.backend() == "numpy"
    assert kernels.describe() == "NumPy"
    assert kernels.alternating(torch.ones(1, 3), 2, 2) is None
    assert kernels.multibit_linear(torch.ones(1, 3), 2, 2, kernels.pack_bits(torch.ones(1, 1, 3)), torch.ones(1, 1)) is None
    kernels.load.cache_clear()
    monkeypatch.setenv("DLATLAS_KERNELS", "fortran")
    with pytest.raises(ValueError, match="fortran"):
        kernels.load()


def test_the_cache_is_beside_the_data(monkeypatch, tmp_path):
    monkeypatch.delenv("DLATLAS_CACHE", raising=False)
    monkeypatch.delenv("DLATLAS_DATA", raising=False)
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.kernel_dir() == tmp_path / "dlatlas-kernels"
