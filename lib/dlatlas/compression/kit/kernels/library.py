"""Build the C kernels once a machine, and load them.

The library is kept under a name that holds a hash of its source, the compiler, the processor and the flags, so a new version or another machine
on the same disk builds its own.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from pathlib import Path

__all__ = ["FLAGS", "SOURCE", "build", "compilers", "kernel_dir", "load"]

SOURCE = Path(__file__).with_name("bitgemm.c")
FLAGS = ("-O3", "-march=native", "-shared", "-fPIC")
COMPILE_TIMEOUT = 120.0  # seconds
log = logging.getLogger("dlatlas.kernels")
log.addHandler(logging.NullHandler())  # a machine without a compiler is no reason to write to the reader's terminal

_pointer, _int, _long = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SIGNATURES = {
    "xnor_gemm": (_pointer, _pointer, _long, _long, _long, _int, _pointer),
    "multibit_gemm": (_pointer, _pointer, _long, _pointer, _pointer, _long, _long, _long, _long, _int, _pointer),
    "pack_positive": (_pointer, _long, _long, _pointer),
    "pack_reached": (_pointer, _pointer, _long, _long, _pointer),
    "pack_planes": (_pointer, _long, _long, _pointer),
    "alternating": (_pointer, _long, _long, _long, _long, _pointer, _pointer, _pointer),
    "sign_linear": (_pointer, _long, _long, _pointer, _pointer, _long, _pointer),
    "multibit_linear": (_pointer, _long, _long, _long, _long, _pointer, _pointer, _long, _pointer, _long, _pointer),
}


@functools.cache
def load() -> ctypes.CDLL | None:
    """The C library, built if need be; None if no compiler works or the fallback is forced. Decided once; ``load.cache_clear()`` forgets."""
    choice = os.environ.get("DLATLAS_KERNELS", "")
    if choice not in ("", "c", "numpy"):
        raise ValueError(f"DLATLAS_KERNELS must be 'numpy', 'c' or empty, got {choice!r}")
    for compiler in compilers() if choice != "numpy" else ():
        try:
            return build(compiler)
        except (OSError, subprocess.SubprocessError) as error:
            log.warning("%s cannot build the kernels, which are slower without it: %s", compiler, error)
    return None


def compilers() -> list[str]:
    """C compilers on the PATH."""
    return list(dict.fromkeys(filter(None, map(shutil.which, ("cc", "gcc", "clang")))))


def kernel_dir() -> Path:
    """The folder of built libraries: ``kernels`` in ``DLATLAS_CACHE`` if that is set, else ``dlatlas-kernels`` beside the data sets."""
    if chosen := os.environ.get("DLATLAS_CACHE"):
        return Path(chosen).expanduser().absolute() / "kernels"
    from dlatlas.data.store import cache_dir

    return cache_dir().with_name("dlatlas-kernels")


def build(compiler: str, flags: Sequence[str] = FLAGS) -> ctypes.CDLL:
    """Load the library from the cache, or compile it into the cache first.

    Raises:
        OSError: the compiler fails, or its result cannot be loaded.
        subprocess.SubprocessError: the compiler does not answer.
    """
    version = _run([compiler, "--version"])
    key = _digest("\0".join([SOURCE.read_text("utf-8"), compiler, version, _processor(), *flags]).encode())
    folder = kernel_dir()
    for path in sorted(folder.glob(f"bitgemm-{key}-*.so")):
        # The name ends with the content's checksum: loading a file that was cut short would kill the process.
        if path.stem.endswith(f"-{_digest(path.read_bytes())}"):
            return _open(path)
        log.warning("%s is damaged; building it again", path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Under another name on the same file system: whoever looks for the library finds all of it or nothing.
        unfinished = folder / f".bitgemm-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        unfinished.touch()
    except OSError as error:
        log.warning("%s cannot be written, the kernels are built for this process only: %s", folder, error)
        with tempfile.TemporaryDirectory() as private:  # a loaded library stays when its file goes
            return _open(_compile(compiler, flags, Path(private) / "bitgemm.so"))
    try:
        _compile(compiler, flags, unfinished)
        path = folder / f"bitgemm-{key}-{_digest(unfinished.read_bytes())}.so"
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return _open(path)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _compile(compiler: str, flags: Sequence[str], path: Path) -> Path:
    _run([compiler, *flags, str(SOURCE), "-o", str(path)])
    return path


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", check=False, timeout=COMPILE_TIMEOUT
    )
    if done.returncode:
        raise OSError(f"`{' '.join(command)}` failed with status {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    for name, types in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, _int if name.endswith("_linear") else None
    return library


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    told = {name.strip(): value for name, _, value in (line.partition(":") for line in lines)}
    return " ".join([platform.machine(), *(told.get(name, "") for name in ("model name", "flags", "Features"))])
