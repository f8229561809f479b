"""Claims: verdicts computed from measured numbers, stored in the executed notebook's own output.

A claim is a sentence, a criterion over measured numbers, and a *null*: the numbers that would have been measured if the
method did nothing. The criterion decides the verdict; it must be false under the null, otherwise it could not fail and
the claim is refused. The record travels as JSON in the output of the cell that measured it, beside a card for readers.
"""

from __future__ import annotations

import ast
import hashlib
import html
import math
import numbers
import operator
import platform
import sys
import time
from collections.abc import Mapping
from typing import Any

MIME = "application/vnd.dlatlas.claim+json"
_STARTED = time.time()

_BINARY = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}
_COMPARE = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}
_UNARY = {ast.USub: operator.neg, ast.UAdd: operator.pos, ast.Not: operator.not_}


class ClaimError(ValueError):
    """A claim that cannot be decided, or that could not fail."""


def evaluate(criterion: str, values: Mapping[str, float]) -> bool:
    """Decide a criterion such as ``"error < 0.5 * baseline and steps <= 100"`` on measured numbers.

    Only the given names, numeric constants, ``+ - * / **``, comparisons (also chained), and/or/not are understood. A
    comparison with NaN is false in Python, but ``not (nan > 0)`` would be true: any NaN among the values that the
    criterion names makes the whole criterion false. So does a division by zero.

    Raises:
        ClaimError: the criterion is not such an expression, names an unknown number or is not a truth value.
    """
    try:
        tree = ast.parse(criterion, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise ClaimError(f"criterion {criterion!r} is not an expression: {error}") from None
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    if unknown := names - values.keys():
        raise ClaimError(f"criterion {criterion!r} names {sorted(unknown)}; measured were {sorted(values)}")
    if not names:
        raise ClaimError(f"criterion {criterion!r} names no measured number, so it could not fail")
    if not isinstance(tree, ast.Compare | ast.BoolOp) and not (isinstance(tree, ast.UnaryOp) and isinstance(tree.op, ast.Not)):
        raise ClaimError(f"criterion {criterion!r} is not a comparison")

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | int() | float() as constant):
                return constant
            case ast.Name(id=name):
                return values[name]
            case ast.UnaryOp(op=op, operand=operand) if type(op) in _UNARY:
                return _UNARY[type(op)](value(operand))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
                # Floats only: an integer power tower would hang instead of overflowing.
                return _BINARY[type(op)](float(value(left)), float(value(right)))
            case ast.BoolOp(op=ast.And(), values=terms):
                return all([value(term) for term in terms])  # noqa: C419 - every term is looked at, also the last
            case ast.BoolOp(op=ast.Or(), values=terms):
                return any([value(term) for term in terms])  # noqa: C419
            case ast.Compare(left=left, ops=ops, comparators=rest) if all(type(op) in _COMPARE for op in ops):
                terms = [value(left), *map(value, rest)]
                return all(_COMPARE[type(op)](a, b) for op, a, b in zip(ops, terms, terms[1:]))
        raise ClaimError(
            f"criterion {criterion!r} contains {ast.unparse(node)!r}; allowed are numbers, + - * / **, comparisons, and/or/not"
        )

    try:
        verdict = value(tree)
    except (ZeroDivisionError, OverflowError):
        return False
    return bool(verdict) and not any(math.isnan(values[name]) for name in names)


def check_record(record: Mapping[str, Any]) -> None:
    """Decide a stored claim again and compare with what it says.

    Raises:
        ClaimError: the stored verdict is not what criterion and numbers give, or the criterion holds under the null.
    """
    values = {k: float(v) for k, v in record["values"].items()}
    null = values | {k: float(v) for k, v in record["null"].items()}
    where = f"claim {record['key']!r} ({record['text']})"
    if evaluate(record["criterion"], values) != record["holds"]:
        raise ClaimError(f"{where}: stored verdict {record['holds']} is not what {record['criterion']!r} gives on the stored numbers")
    if not record["null"] or evaluate(record["criterion"], null):
        raise ClaimError(f"{where}: the criterion {record['criterion']!r} does not fail under its null {dict(record['null'])}")


class Claim:
    """A decided claim; shows itself as a card in a notebook and as a line of text elsewhere."""

    def __init__(self, record: dict[str, Any]):
        self.record = record
        self._shown_in: int | None = None

    @property
    def holds(self) -> bool:
        """Whether the criterion is true on the measured numbers."""
        return self.record["holds"]

    @property
    def verdict(self) -> str:
        """ "holds", "does not hold" or, where that differs from what is known of this scale, with "unexpectedly"."""
        word = "holds" if self.holds else "does not hold"
        return word if self.holds == self.record["expected"] else f"unexpectedly {word}"

    def __repr__(self) -> str:
        figures = ", ".join(f"{k} {_figure(v)}" for k, v in self.record["values"].items())
        return f"{self.verdict}: {self.record['text']} [{self.record['criterion']}; {figures}]"

    def _repr_html_(self) -> str:
        r, esc = self.record, html.escape
        state = "holds" if self.holds else "fails"
        rows = "".join(
            f"<tr><td><code>{esc(k)}</code></td><td>{_figure(v)}</td><td>{_figure(r['null'][k]) if k in r['null'] else ''}</td></tr>"
            for k, v in r["values"].items()
        )
        # Inline styles because a notebook has no stylesheet of ours; the book's stylesheet refines the same classes.
        colour = "#1a7f5a" if self.holds else "#b3541e"
        notes = "".join(
            f"<p class='dlatlas-note'><em>{label}:</em> {esc(r[name])}</p>"
            for name, label in (("why", "Why not here"), ("reported", "The paper reports"))
            if r.get(name)
        )
        return (
            f"<div id='claim-{esc(r['id'])}' class='dlatlas-claim dlatlas-{state}' style='border-left:4px solid {colour};padding:.4em 1em;margin:1em 0'>"
            f"<p><strong class='dlatlas-verdict' style='color:{colour}'>Claim {esc(self.verdict)}.</strong> {esc(r['text'])}</p>"
            f"<p class='dlatlas-criterion'>Criterion: <code>{esc(r['criterion'])}</code></p>"
            f"<table><thead><tr><th>number</th><th>measured</th><th>null</th></tr></thead><tbody>{rows}</tbody></table>{notes}</div>"
        )

    def _ipython_display_(self) -> None:
        from IPython.display import display

        # As the last expression of its cell a claim would be shown a second time.
        count = getattr(_shell(), "execution_count", None)
        if count is None or count != self._shown_in:
            self._shown_in = count
            display({"text/plain": repr(self), "text/html": self._repr_html_(), MIME: self.record}, raw=True)


def claim(
    key: str,
    text: str,
    *,
    criterion: str,
    null: Mapping[str, float],
    expected: bool = True,
    why: str | None = None,
    reported: str | None = None,
    **values: float,
) -> Claim:
    """Decide and show a claim of a paper.

    Args:
        key: the paper's key in the catalogue.
        text: the claim as a sentence.
        criterion: expression over the measured numbers, see :func:`evaluate`. Thresholds are fixed before measuring.
        null: the numbers that would have been measured if the method did nothing, as measured on the baseline; names
            that are not given keep their measured value.
        expected: False for a claim known not to hold at this scale; then `why` says the reason to the reader.
        reported: the paper's own figure and scale, in a line.
        **values: the measured numbers.

    Raises:
        ClaimError: unknown paper, nothing measured, no null, a null that passes, or ``expected=False`` without a reason.
    """
    from dlatlas import catalog

    if key not in catalog.papers():
        raise ClaimError(f"unknown paper {key!r}{catalog.suggestion(key)}")
    measured = {name: _number(name, value) for name, value in values.items()}
    control = {name: _number(name, value) for name, value in null.items()}
    if not control:
        raise ClaimError("the null is empty: give the numbers that the baseline measured in the method's place")
    if extra := control.keys() - measured.keys():
        raise ClaimError(f"the null names {sorted(extra)}, which were not measured; measured were {sorted(measured)}")
    if not expected and not why:
        raise ClaimError("a claim that is not expected to hold needs why='...'")
    if evaluate(criterion, measured | control):
        raise ClaimError(f"{key}: the criterion {criterion!r} holds under the null {control} as well, so it shows nothing")
    record = {
        # Stable name of the claim: the ledger follows it over builds, seeds and profiles, and pages link to it.
        "id": f"{key}-{hashlib.sha256(text.encode()).hexdigest()[:8]}",
        "key": key,
        "text": text,
        "criterion": criterion,
        "values": _jsonable(measured),
        "null": _jsonable(control),
        "holds": evaluate(criterion, measured),
        "expected": bool(expected),
        "why": why,
        "reported": reported,
        **_provenance(),
    }
    decided = Claim(record)
    _show(decided)
    return decided


def glue(**values: Any) -> None:
    """Keep values for the prose: after ``glue(error=0.131)``, ``{glue:text}`error:.3f``` in the text shows 0.131.

    Writes the output that MyST-NB's own `glue` writes, without importing Sphinx into every kernel.
    """
    from IPython.core.formatters import format_display_data
    from IPython.display import display

    for name, value in values.items():
        if isinstance(value, numbers.Number) or hasattr(value, "item"):
            value = _number(name, value)
        bundle, metadata = format_display_data(value)
        prefix = "application/papermill.record/"
        metadata["scrapbook"] = {"name": name, "mime_prefix": prefix}
        display({prefix + mime: data for mime, data in bundle.items()}, raw=True, metadata=metadata)


def _number(name: str, value: Any) -> float | int | bool:
    """A plain Python number from a number, a 0-d array or a 0-d tensor."""
    if hasattr(value, "item") and getattr(value, "size", 1) != 0:
        try:
            value = value.item()
        except (RuntimeError, ValueError):
            raise ClaimError(f"{name} must be a single number, got shape {tuple(value.shape)}") from None
    if not isinstance(value, numbers.Real):
        raise ClaimError(f"{name} must be a number, got {type(value).__name__} {value!r}")
    return value


def _jsonable(values: Mapping[str, float]) -> dict[str, Any]:
    """JSON has no NaN or infinity: these are stored as strings that ``float`` reads."""
    return {k: v if math.isfinite(v) else str(float(v)) for k, v in values.items()}


def _figure(value: Any) -> str:
    value = float(value) if isinstance(value, str) else value
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _provenance() -> dict[str, Any]:
    """Profile, seed, device, versions and seconds: read from the notebook's own variables where there is one."""
    namespace: Mapping[str, Any] = {}
    if (shell := _shell()) is not None:
        namespace = shell.user_ns
    # The modules that are loaded, not an import: a chapter without torch should not pay for it.
    loaded = {name: sys.modules[name].__version__ for name in ("dlatlas", "torch", "numpy") if name in sys.modules}
    on_gpu = getattr(getattr(namespace.get("run"), "device", None), "type", "cpu") == "cuda"
    return {
        "profile": namespace.get("profile"),
        "seed": namespace.get("seed"),
        "device": sys.modules["torch"].cuda.get_device_name() if on_gpu else "cpu",
        "versions": {"python": platform.python_version(), **loaded},
        "seconds": round(time.time() - _STARTED, 1),
    }


def _shell() -> Any:
    try:
        from IPython import get_ipython
    except ImportError:  # the library can be used without the book's packages
        return None
    return get_ipython()


def _show(decided: Claim) -> None:
    if _shell() is None:
        print(decided)
        return
    from IPython.display import display

    display(decided)
