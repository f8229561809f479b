"""The training loop and the minibatches."""

import itertools

import numpy as np
import pytest
import torch

from dlatlas.train import fit, minibatches


def test_fit_calls_every_step_and_keeps_what_it_reports():
    called = []

    def step(i):
        called.append(i)
        return torch.tensor(float(10 - i), requires_grad=True)

    history = fit(step, 5)
    assert called == [0, 1, 2, 3, 4]
    np.testing.assert_array_equal(history["loss"], [10, 9, 8, 7, 6])
    np.testing.assert_array_equal(history.steps, range(5))
    assert history.final(2) == 6.5 and history.seconds > 0


def test_every_keeps_the_first_of_each_stride_and_the_last():
    history = fit(lambda i: {"loss": i, "error": 2 * i}, 8, every=3)
    np.testing.assert_array_equal(history.steps, [0, 3, 6, 7])
    np.testing.assert_array_equal(history["error"], [0, 6, 12, 14])
    assert list(history) == ["loss", "error"] and len(history) == 2
    assert history.final(1, of="error") == 14


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_no_number_stops_at_its_step(bad):
    with pytest.raises(FloatingPointError, match=r"loss became .* at step 3 of demo"):
        fit(lambda i: bad if i == 3 else 1.0, 10, name="demo")


def test_fit_refuses_nonsense():
    with pytest.raises(ValueError, match="at least 1"):
        fit(lambda i: 0.0, 0)
    with pytest.raises(ValueError, match="earlier steps"):
        fit(lambda i: {"loss": 0.0} if i == 0 else {"other": 0.0}, 2)


def test_fit_trains():
    x = torch.tensor(5.0, requires_grad=True)
    optimiser = torch.optim.SGD([x], lr=0.1)

    def step(i):
        optimiser.zero_grad()
        loss = x**2
        loss.backward()
        optimiser.step()
        return loss

    history = fit(step, 20)
    np.testing.assert_allclose(history["loss"], 25 * 0.64 ** np.arange(20), rtol=1e-5)


def test_an_epoch_of_minibatches_visits_every_example_once():
    batches = minibatches(10, 3, torch.Generator().manual_seed(0), drop_last=False)
    for _ in range(3):
        epoch = list(itertools.islice(batches, 4))
        assert [len(b) for b in epoch] == [3, 3, 3, 1]
        assert sorted(torch.cat(epoch).tolist()) == list(range(10))
    dropped = list(itertools.islice(minibatches(10, 3), 30))
    assert all(len(b) == 3 and len(set(b.tolist())) == 3 for b in dropped)


def test_minibatches_are_reshuffled_and_repeatable():
    first, again = (list(itertools.islice(minibatches(50, 50, torch.Generator().manual_seed(1)), 2)) for _ in range(2))
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    with pytest.raises(ValueError, match="batch size"):
        minibatches(3, 4)
