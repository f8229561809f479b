"""Exercises say right, wrong, or what is missing."""

import math
import re
from pathlib import Path

import pytest

from dlatlas.exercise import Exercise


@pytest.fixture
def root():
    return Exercise("the positive root of 2, a number", lambda x: math.isclose(x**2, 2, rel_tol=1e-3), hint="Its square is 2 & more.")


def test_a_right_answer_is_right(root):
    assert root(1.4142)
    assert repr(root(1.4142)) == "Right."


def test_a_wrong_answer_is_wrong_and_brings_the_hint(root):
    assert not root(1.5)
    assert repr(root(1.5)) == "Not right. Its square is 2 & more."
    assert "2 &amp; more" in root(1.5)._repr_html_()


@pytest.mark.parametrize("answer", [(), (None,), (...,)])
def test_no_answer_asks_for_one(root, answer):
    assert not root(*answer)
    assert "positive root" in repr(root(*answer))


def test_an_answer_of_the_wrong_kind_is_wrong_and_says_why(root):
    said = root("one")
    assert not said
    assert "TypeError" in repr(said)


def test_several_parts():
    pair = Exercise("two numbers of sum 3", lambda a, b: a + b == 3)
    assert pair(1, 2)
    assert not pair(1, 3)
    assert "TypeError" in repr(pair(1))


def test_a_question_without_text_is_refused():
    with pytest.raises(ValueError, match="hand in"):
        Exercise(" ", bool)


@pytest.mark.parametrize(
    "chapter", sorted((Path(__file__).parents[1] / "chapters").glob("*/*.md")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_exercise_of_a_chapter_has_a_check_before_its_solution_and_the_solution_passes_it(chapter):
    text = chapter.read_text(encoding="utf-8")
    exercises = re.split(r"(?m)^`{3,}\{exercise\}", text)[1:]
    assert exercises
    for part in exercises:
        question, _, solution = part.partition("{solution-start}")
        checks = re.findall(r"(?m)^(\w+) = Exercise\(", question)
        assert len(checks) == 1, question[:80]
        assert re.search(rf"(?m)^\s*assert {checks[0]}\(", solution.partition("{solution-end}")[0]), checks[0]
