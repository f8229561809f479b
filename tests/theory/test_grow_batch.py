import math

import pytest
import torch
from torch.utils.data import DataLoader

from dlatlas.theory.grow_batch import DecayLR, GrowBatch, noise_scale


def test_noise_scale_by_hand_and_zero_for_full_batches():
    assert noise_scale(0.1, 1000, 100) == pytest.approx(0.1 * 9)
    assert noise_scale(0.1, 1000, 100, momentum=0.9) == pytest.approx(0.1 * 9 * 10)
    assert noise_scale(0.1, 64, 64) == 0


def test_noise_scale_is_the_size_of_the_gradient_noise():
    """The step's variance over batches drawn without replacement is lr^2 (N/B - 1) S^2 / (N - 1) with the population variance S^2."""
    gradients = torch.randn(12, dtype=torch.float64)
    for batch in (1, 3, 6):
        means = torch.stack([gradients[list(c)].mean() for c in _subsets(12, batch)])
        variance = ((means - gradients.mean()) ** 2).mean()
        expected = noise_scale(1.0, 12, batch) * gradients.var(correction=0) / 11
        assert float(variance) == pytest.approx(float(expected), rel=1e-9)


def _subsets(n, k):
    from itertools import combinations

    return combinations(range(n), k)


def test_milestones_count_from_their_epoch():
    grow, decay = GrowBatch(0.1, 64, [6, 9], 5.0), DecayLR(0.1, 64, [6, 9], 5.0)
    assert [grow.at(e)[1] for e in (0, 5, 6, 8, 9, 100)] == [64, 64, 320, 320, 1600, 1600]
    assert {grow.at(e)[0] for e in range(12)} == {0.1}
    assert [decay.at(e)[0] for e in (5, 6, 9)] == pytest.approx([0.1, 0.02, 0.004])
    assert {decay.at(e)[1] for e in range(12)} == {64}
    assert GrowBatch(0.1, 8, [0], 2.0).at(0) == (0.1, 16)


@pytest.mark.parametrize("max_batch", [None, 64, 100, 320, 400, 10**6])
def test_both_schedules_have_the_same_ratio_in_every_epoch(max_batch):
    grow, decay = GrowBatch(0.3, 64, [2, 4, 7], 2.5, max_batch), DecayLR(0.3, 64, [2, 4, 7], 2.5, max_batch)
    for epoch in range(10):
        lr, batch = grow.at(epoch)
        other, constant = decay.at(epoch)
        assert batch <= (max_batch or math.inf)
        # Rounding moves a batch size by at most one half.
        assert lr / batch == pytest.approx(other / constant, rel=0.5 / batch if batch != max_batch else 1e-12)


def test_the_limit_is_reached_exactly_and_the_rest_goes_into_the_step():
    schedule = GrowBatch(0.1, 64, [1, 2, 3], 2.0, max_batch=128)
    assert schedule.at(1) == (0.1, 128)
    assert schedule.at(2) == (pytest.approx(0.05), 128)
    assert schedule.at(3) == (pytest.approx(0.025), 128)
    assert GrowBatch(0.1, 64, [1], 2.0, max_batch=64).at(1) == (pytest.approx(0.05), 64)


def test_rounding_does_not_pile_up():
    assert GrowBatch(0.1, 5, [1, 2], 1.5).at(2)[1] == 11  # 5 * 2.25 = 11.25; rounding twice would give 12


@pytest.mark.parametrize("make", [GrowBatch, DecayLR])
def test_updates_by_counting_a_loader(make):
    schedule = make(0.1, 7, [1, 3], 3.0)
    counted = 0
    for epoch in range(5):
        counted += len(list(DataLoader(torch.arange(50), batch_size=schedule.at(epoch)[1])))
    assert schedule.updates(50, 5) == counted
    assert len(list(schedule.batches(50, 5))) == counted
    assert schedule.updates(50, 0) == 0


def test_batches_cover_every_example_once_an_epoch_and_set_the_step():
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    schedule = GrowBatch(0.1, 8, [1, 2], 4.0, max_batch=16)
    steps, seen = [], []
    for index in schedule.batches(20, 3, optimizer, torch.Generator().manual_seed(0)):
        steps.append(optimizer.param_groups[0]["lr"])
        seen.append(index)
    assert [len(i) for i in seen] == [8, 8, 4, 16, 4, 16, 4]
    assert steps == pytest.approx([0.1] * 3 + [0.1 * 16 / 32] * 2 + [0.1 * 16 / 128] * 2)
    for epoch in (seen[:3], seen[3:5], seen[5:]):
        assert torch.cat(epoch).sort().values.tolist() == list(range(20))
    assert torch.cat(seen[3:5]).tolist() != torch.cat(seen[5:]).tolist()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"batch": 0}, "batch must be a positive"),
        ({"factor": 1.0}, "factor must be greater"),
        ({"milestones": [9, 6]}, "ascending"),
        ({"milestones": [6, 6]}, "ascending"),
        ({"milestones": [-1]}, "ascending"),
        ({"max_batch": 63}, "at least the initial batch 64"),
        ({"lr": 0.0}, "lr must be positive"),
    ],
)
@pytest.mark.parametrize("make", [GrowBatch, DecayLR])
def test_bad_schedules(make, kwargs, message):
    with pytest.raises(ValueError, match=message):
        make(**({"lr": 0.1, "batch": 64, "milestones": [6, 9], "factor": 5.0} | kwargs))


def test_bad_noise_scale_and_epochs():
    with pytest.raises(ValueError, match="between 1 and the number of examples 10, got 11"):
        noise_scale(0.1, 10, 11)
    with pytest.raises(ValueError, match="between 1"):
        noise_scale(0.1, 10, 0)
    with pytest.raises(ValueError, match="momentum"):
        noise_scale(0.1, 10, 5, momentum=1.0)
    with pytest.raises(ValueError, match="count from 0"):
        GrowBatch(0.1, 1, [], 2.0).at(-1)
    with pytest.raises(ValueError, match="epochs"):
        GrowBatch(0.1, 1, [], 2.0).updates(10, -1)
