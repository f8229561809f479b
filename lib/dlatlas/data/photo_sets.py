"""Photographs and textures as float tensors in [0, 1]: the pictures of scikit-image and scikit-learn."""

from __future__ import annotations

from collections.abc import Mapping
from numbers import Integral
from pathlib import Path

import numpy as np
import torch

from dlatlas.data.store import DataError, Dataset, Source, choose, mark_used, obtain, pip, unpack, urls


def photo(name: str, gray: bool = False, size: int | tuple[int, int] | None = None) -> torch.Tensor:
    """The photograph `name`, one of ``PHOTOS``: ``[3, H, W]``, or ``[1, H, W]`` if `gray`; float32 in [0, 1].

    Args:
        gray: luma (0.299 R + 0.587 G + 0.114 B, ITU-R 601) instead of colours. Without it, grey photographs have three equal channels.
        size: ``(H, W)``, or one number for a square: the largest centred part of that shape, resampled (Lanczos) to that size; None: the
            whole photograph as it is.

    Raises:
        ValueError: unknown name, or a size that is not one or two positive integers.
        DataError: the photographs are not in the cache and no source answered, or pillow is not installed.
    """
    file = _NAMES[choose(name, PHOTOS, "photograph")]
    if size is not None:
        shape = tuple(size) if isinstance(size, tuple | list) else (size, size)
        if len(shape) != 2 or not all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in shape):
            raise ValueError(f"size must be a positive integer or (height, width), got {size!r}")
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise DataError("photographs are decoded by pillow, which is not installed; `pip install pillow` installs it") from error
    dataset = PHOTO_SETS["photos"]
    with Image.open(obtain(dataset) / file) as image:
        mark_used(dataset)
        image = image.convert("L" if gray else "RGB")  # 8 bits each; the one with transparency, the horse, is white where it is transparent
    if size is not None:
        image = ImageOps.fit(image, shape[::-1], Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255)  # [H, W] or [H, W, 3]
    return pixels.unsqueeze(0) if gray else pixels.permute(2, 0, 1).contiguous()


def _from_packages(folder: Path) -> Mapping[str, bytes]:
    import sklearn.datasets

    images = Path(sklearn.datasets.__file__).parent / "images"
    found = unpack(r"(skimage/data/)?[\w.]+\.(png|jpg)")(folder)
    return found | {name: (images / name).read_bytes() for name in _SKLEARN_FILES}


_FILES = {
    "astronaut.png": (791555, "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
    "brick.png": (106634, "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf"),
    "camera.png": (139512, "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a"),
    "cell.png": (74183, "8d23a7fb81f7cc877cd09f330357fc7f595651306e84e17252f6e0a1b3f61515"),
    "chelsea.png": (240512, "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
    "china.jpg": (196653, "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29"),
    "clock_motion.png": (58784, "f029226b28b642e80113d86622e9b215ee067a0966feaf5e60604a1e05733955"),
    "coffee.png": (466706, "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
    "coins.png": (75825, "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba"),
    "flower.jpg": (142987, "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638"),
    "grass.png": (217893, "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89"),
    "gravel.png": (194247, "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12"),
    "horse.png": (16633, "c7fb60789fe394c485f842291ea3b21e50d140f39d6dcb5fb9917cc178225455"),
    "hubble_deep_field.jpg": (527940, "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4"),
    "ihc.png": (477916, "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef"),
    "microaneurysms.png": (4950, "a1e1be59aa447f8ce082f7fa809997ab369a2b137cb6c4202abc647c7ccf6456"),
    "moon.png": (50177, "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577"),
    "motorcycle_left.png": (644701, "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179"),
    "motorcycle_right.png": (640373, "5fc913ae870e42a4b662314bc904d1786bcad8e2f0b9b67dba5a229406357797"),
    "page.png": (47679, "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3"),
    "retina.jpg": (269564, "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6"),
    "rocket.jpg": (112525, "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"),
    "text.png": (42704, "bd84aa3a6e3c9887850d45d606c96b2e59433fbef50338570b63c319e668e6d1"),
}
_SKLEARN_FILES = ("china.jpg", "flower.jpg")
_NAMES = {Path(file).stem.removesuffix("_motion").removesuffix("_deep_field"): file for file in _FILES}
PHOTOS = tuple(_NAMES)
# The pictures are the same in the wheels of all machines; asking for one of them works on every Python.
_WHEEL = ("--only-binary=:all:", "--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311")
_REPOSITORY = "https://gitlab.com/scikit-image/data/-/raw/5c090b56df3988d988ff97928e2ef2d2cbe38e1b/"

PHOTO_SETS = {
    "photos": Dataset(
        name="photos",
        title="21 photographs and textures of scikit-image, and 2 photographs of scikit-learn",
        licence="as scikit-image states: public domain, CC0 or no known restrictions (moon, page and the Middlebury motorcycle pair: none "
        "stated); china and flower: CC BY 2.0 (danielbuechele, vultilion)",
        citation="van der Walt et al. (2014). scikit-image: image processing in Python. PeerJ 2:e453; Pedregosa et al. (2011). "
        "Scikit-learn: machine learning in Python. JMLR 12; motorcycle: Scharstein et al. (2014). High-resolution stereo datasets with "
        "subpixel-accurate ground truth. GCPR",
        files=_FILES,
        sources=(
            Source("PyPI scikit-image 0.26.0, scikit-learn (installed)", pip("scikit-image==0.26.0", *_WHEEL), _from_packages),
            Source(
                "gitlab.com/scikit-image/data", urls(_REPOSITORY, *(name for name in _FILES if name not in _SKLEARN_FILES)), _from_packages
            ),
        ),
    )
}
