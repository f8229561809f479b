"""Toy data and the definition of covered modes, by hand."""

import pytest
import torch

from dlatlas.gans.kit.toy import grid, grid_centres, modes_covered, ring, ring_centres, two_lines


def test_ring_and_grid_have_their_centres_and_spread():
    for points, centres, std in ((ring(4000), ring_centres(), 0.02), (grid(4000), grid_centres(), 0.05)):
        away, nearest = torch.cdist(points, centres).min(1)
        assert nearest.bincount(minlength=len(centres)).min() > 0.6 * 4000 / len(centres)
        assert away.square().mean().sqrt() == pytest.approx(std * 2**0.5, rel=0.05)
    torch.testing.assert_close(ring_centres(4, 3.0), torch.tensor([[3.0, 0], [0, 3], [-3, 0], [0, -3]]), atol=1e-6, rtol=0)
    assert sorted(map(tuple, grid_centres(2, 4.0).tolist())) == [(-2, -2), (-2, 2), (2, -2), (2, 2)]


def test_draws_follow_their_generator():
    for draw in (ring, grid):
        a, b = (draw(5, generator=torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(a, b)


def test_lines_are_parallel():
    real, model = two_lines(100, gap=0.7)
    assert (real[:, 0] == 0).all() and (model[:, 0] == 0.7).all() and not torch.equal(real[:, 1], model[:, 1])
    assert min(real[:, 1].min(), model[:, 1].min()) >= 0 and max(real[:, 1].max(), model[:, 1].max()) <= 1


def test_modes_by_hand():
    centres = torch.tensor([[0.0, 0], [10, 0], [0, 10], [10, 10]])
    # A mode needs 0.2 / 4 of 40 samples, which is 2.
    samples = torch.cat([centres[:1].expand(30, 2), centres[1:2].expand(2, 2), centres[2:3], torch.full((7, 2), 5.0)])
    assert modes_covered(samples, centres, std=1.0) == (2, 33 / 40)
    edge = torch.tensor([[2.99, 0.0], [3.01, 0.0]])
    assert modes_covered(edge, centres, std=1.0) == (1, 0.5)
    assert modes_covered(edge, centres, std=1.0, k=4.0) == (1, 1.0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: modes_covered(torch.zeros(0, 2), torch.zeros(1, 2), 1.0),
        lambda: modes_covered(torch.zeros(3, 2), torch.zeros(1, 3), 1.0),
        lambda: modes_covered(torch.zeros(3, 2), torch.zeros(1, 2), 0.0),
        lambda: ring(0),
        lambda: ring(3, modes=0),
        lambda: grid(3, side=0),
        lambda: grid(3, std=-1.0),
        lambda: two_lines(0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match=r"expected|must be"):
        call()
