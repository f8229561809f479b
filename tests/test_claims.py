"""The safe evaluator, the null control and the record of a claim."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dlatlas import claims
from dlatlas.claims import ClaimError, check_record, claim, evaluate


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [
        ("a > 1", True),
        ("a - b >= 1.5 and not b > a", True),
        ("a < b or b < a", True),
        ("0 < b < a <= 2", True),
        ("0 < a < b", False),
        ("a ** 2 == 4 and -b == -0.5", True),
        ("a / b == 4", True),
        ("a != 2", False),
        ("not (a < b)", True),
    ],
)
def test_criteria_are_evaluated_like_python(criterion, expected):
    assert evaluate(criterion, {"a": 2.0, "b": 0.5}) is expected
    assert evaluate(criterion, {"a": 2.0, "b": 0.5}) == eval(criterion, {}, {"a": 2.0, "b": 0.5})


@given(st.floats(-10, 10), st.floats(-10, 10), st.sampled_from(["a < b", "a + b > a * b", "a - b <= 1 or a > 3", "not a > b and b != 2"]))
def test_criteria_agree_with_python_on_any_numbers(a, b, criterion):
    assert evaluate(criterion, {"a": a, "b": b}) == eval(criterion, {}, {"a": a, "b": b})


@pytest.mark.parametrize(
    "criterion",
    [
        "__import__('os').system('true') == 0",
        "a.real > 0",
        "a[0] > 0",
        "abs(a) > 0",
        "(lambda: a)() > 0",
        "[a for a in (1,)] == [1]",
        "a if a else b",
        "a > 'x'",
        "a in (1, 2)",
        "a is 1",
        "a % 2 == 0",
        "a // 2 == 1",
        "a | 1 == 1",
        "(a := 3) > 2",
        "f'{a}' == '2'",
        "a >",
        "",
        "import os",
        "a",
        "a + b",
        "1 < 2",
        "c > 1",
    ],
)
def test_anything_but_arithmetic_and_comparisons_of_measured_numbers_is_refused(criterion):
    with pytest.raises(ClaimError):
        evaluate(criterion, {"a": 2.0, "b": 1.0})


def test_nan_and_division_by_zero_make_a_criterion_false():
    assert not evaluate("not (a > 0)", {"a": math.nan})
    assert not evaluate("a > 0 or b > 0", {"a": math.nan, "b": 1.0})
    assert evaluate("b > 0", {"a": math.nan, "b": 1.0})  # a is not asked about
    assert not evaluate("a / b > 1", {"a": 1.0, "b": 0.0})
    assert not evaluate("a ** a ** a ** a > 1", {"a": 99.0})  # overflows at once instead of hanging


GOOD = dict(criterion="error < 0.5 * baseline", error=0.1, baseline=0.4, null=dict(error=0.4))


def test_a_claim_is_decided_by_its_numbers(capsys):
    made = claim("reddi2018amsgrad", "Halves the error", **GOOD)
    assert made.holds and made.verdict == "holds"
    assert "holds: Halves the error" in capsys.readouterr().out
    check_record(made.record)
    json.loads(json.dumps(made.record))
    failed = claim("reddi2018amsgrad", "Halves the error", **GOOD | {"error": 0.3})
    assert not failed.holds and failed.verdict == "unexpectedly does not hold"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"null": {}}, "null is empty"),
        ({"null": dict(error=0.1)}, "holds under the null"),
        ({"null": dict(other=1.0)}, "not measured"),
        ({"expected": False}, "needs why"),
        ({"criterion": "error < unknown"}, "names"),
        ({"error": "0.1"}, "must be a number"),
        ({"error": torch.ones(2)}, "single number"),
        ({"error": 1j}, "must be a number"),
    ],
)
def test_claims_that_prove_nothing_are_refused(changes, message):
    with pytest.raises(ClaimError, match=message):
        claim("reddi2018amsgrad", "Halves the error", **GOOD | changes)


def test_a_claim_without_null_is_refused():
    with pytest.raises(TypeError, match="null"):
        claim("reddi2018amsgrad", "Halves the error", criterion="error < 1", error=0.1)


def test_an_unknown_paper_is_refused_with_a_suggestion():
    with pytest.raises(ClaimError, match="reddi2018amsgrad"):
        claim("reddi2018amsgard", "Halves the error", **GOOD)


def test_numbers_may_be_tensors_arrays_and_infinite():
    made = claim("reddi2018amsgrad", "Diverges", criterion="loss > 10", loss=torch.tensor(float("inf")), null=dict(loss=np.float32(1)))
    assert made.holds
    assert json.loads(json.dumps(made.record, allow_nan=False))["values"] == {"loss": "inf"}
    check_record(made.record)


@pytest.mark.parametrize(
    "tamper",
    [
        {"holds": False},
        {"criterion": "error > 0.5 * baseline"},
        {"values": {"error": 0.3, "baseline": 0.4}},
        {"null": {}},
        {"null": {"error": 0.01}},
    ],
)
def test_a_tampered_record_is_found_out(tamper):
    record = claim("reddi2018amsgrad", "Halves the error", **GOOD).record
    with pytest.raises(ClaimError):
        check_record(record | tamper)


def test_the_card_says_what_was_measured_and_escapes_text():
    made = claim("reddi2018amsgrad", "A <b>bold</b> claim", **GOOD, reported="half")
    card = made._repr_html_()
    assert "A &lt;b&gt;bold&lt;/b&gt; claim" in card
    for part in ("Claim holds", "error &lt; 0.5 * baseline", "<td>0.1</td><td>0.4</td>", "half", f"claim-{made.record['id']}"):
        assert part in card


def test_a_known_failure_shows_its_reason():
    made = claim("reddi2018amsgrad", "Halves the error", **GOOD | {"error": 0.3}, expected=False, why="too few steps")
    assert made.verdict == "does not hold" and "too few steps" in made._repr_html_()


def test_the_id_of_a_claim_depends_on_paper_and_text_only():
    ids = {claim("reddi2018amsgrad", "Halves the error", **GOOD | {"error": e}).record["id"] for e in (0.1, 0.15)}
    assert len(ids) == 1
    assert claim("reddi2018amsgrad", "Other text", **GOOD).record["id"] not in ids
    assert claims.MIME.startswith("application/vnd.dlatlas")
