"""Exercises that tell the reader right or wrong."""

from __future__ import annotations

import html
import traceback
from collections.abc import Callable
from typing import Any

__all__ = ["Exercise", "Outcome"]


class Outcome:
    """Right or wrong, as a truth value and as a line for the reader."""

    def __init__(self, right: bool, text: str):
        self.right = right
        self.text = text

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return self.text

    def _repr_html_(self) -> str:
        state, colour = ("holds", "#1a7f5a") if self.right else ("fails", "#b3541e")
        word, rest = self.text.split(".", 1)
        return (
            f"<p class='dlatlas-check dlatlas-{state}' style='border-left:4px solid {colour};padding:.2em 1em'>"
            f"<strong class='dlatlas-verdict' style='color:{colour}'>{html.escape(word)}.</strong>{html.escape(rest)}</p>"
        )


class Exercise:
    """A question whose answer can be checked: ``exercise(answer)`` says right or wrong.

    Args:
        asks: what to hand in, e.g. "beta2 at the border, a number" or "a function (x) -> gradient".
        right: takes the answer and says whether it is right. An error that it raises counts as wrong and is told.
        hint: told with a wrong answer; it helps without giving the answer away.

    Raises:
        ValueError: nothing is asked for.
    """

    def __init__(self, asks: str, right: Callable[..., Any], *, hint: str = ""):
        if not asks.strip():
            raise ValueError("say what the reader is to hand in")
        self.asks = asks
        self.hint = hint
        self._right = right

    def __call__(self, *answer: Any) -> Outcome:
        """Check an answer; what is asked for in several parts is given as several arguments."""
        if not answer or any(part is None or part is ... for part in answer):
            return Outcome(False, f"No answer yet. Hand in {self.asks}.")
        try:
            right = bool(self._right(*answer))
        except Exception as error:
            said = traceback.format_exception_only(error)[-1].strip()
            return Outcome(False, f"Not right. Your answer could not be checked: {said}. Hand in {self.asks}.")
        return Outcome(True, "Right.") if right else Outcome(False, f"Not right. {self.hint}".strip())

    def __repr__(self) -> str:
        return f"Exercise: hand in {self.asks}"

    def _repr_html_(self) -> str:
        return f"<p class='dlatlas-check'><strong>Check yourself:</strong> hand in {html.escape(self.asks)}.</p>"
