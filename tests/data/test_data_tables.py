"""Tables of numbers."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes

from dlatlas import data


def test_diabetes_is_the_one_of_scikit_learn():
    found, bunch = data.table("diabetes"), load_diabetes(scaled=False)
    assert found.x.dtype == found.y.dtype == torch.float64 and found.columns == tuple(bunch.feature_names)
    np.testing.assert_allclose(found.x.numpy(), bunch.data, rtol=1e-9)
    np.testing.assert_array_equal(found.y.numpy(), bunch.target)
    assert data.used()["diabetes"] == data.describe("diabetes").sha256
    standardised = (found.x - found.x.mean(0)) / found.x.std(0, correction=0)
    np.testing.assert_allclose(standardised.numpy() / 442**0.5, load_diabetes().data, atol=1e-12)


def test_what_is_handed_out_can_be_changed_without_harm():
    data.table("diabetes").x.zero_()
    assert data.table("diabetes").x.abs().sum() > 0


def test_unknown_tables():
    with pytest.raises(ValueError, match="unknown table 'diabetis'; did you mean 'diabetes'"):
        data.table("diabetis")
