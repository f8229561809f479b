"""What is drawn of a critic: values where they are, arrows uphill and in proportion."""

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.quiver import Quiver

from dlatlas import plot
from dlatlas.gans.kit.picture import critic_panel

REAL, FAKE = torch.tensor([[1.0, 1.0], [2.0, 1.5]]), torch.tensor([[-1.0, -1.0], [-2.0, 0.0], [-1.5, -0.5]])


def draw(critic, **kwargs):
    _, ax = plot.figure()
    assert critic_panel(ax, critic, REAL, FAKE, **kwargs) is ax
    (quiver,) = (c for c in ax.collections if isinstance(c, Quiver))
    return ax, quiver


def test_arrows_of_a_plane_point_uphill_and_fill_a_cell():
    _, quiver = draw(lambda x: 3 * x[:, 0] + 4 * x[:, 1], xlim=(-3, 3), ylim=(-3, 3), arrows=6)
    np.testing.assert_allclose(quiver.U, 0.6, atol=1e-6)  # cells are 1 wide
    np.testing.assert_allclose(quiver.V, 0.8, atol=1e-6)
    assert quiver.N == 36 and quiver.scale == 1 and quiver.angles == "xy" and quiver.scale_units == "xy"
    assert sorted(set(np.round(quiver.X, 6))) == [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]


def test_arrows_of_a_bowl_grow_with_the_distance():
    _, quiver = draw(lambda x: x.square().sum(1, keepdim=True), xlim=(-2, 2), ylim=(-4, 4), arrows=4)
    length = np.hypot(quiver.U, quiver.V)
    assert length.max() == pytest.approx(1)  # the narrower side of a cell
    np.testing.assert_allclose(length / np.hypot(quiver.X, quiver.Y), length[0] / np.hypot(quiver.X[0], quiver.Y[0]), rtol=1e-5)
    assert (quiver.U * quiver.X > 0).all() and (quiver.V * quiver.Y > 0).all()


def test_the_surface_is_the_critics_and_lies_the_right_way_round():
    ax, _ = draw(lambda x: x[:, 0] + 0 * x[:, 1], xlim=(0, 10), ylim=(-1, 1), levels=5)
    surface = next(c for c in ax.collections if not isinstance(c, Quiver | PolyCollection))
    for value, path in zip(surface.cvalues, surface.get_paths()):
        if len(path.vertices):
            low, high = path.vertices[:, 0].min(), path.vertices[:, 0].max()
            assert low <= value <= high and np.ptp(path.vertices[:, 1]) == pytest.approx(2)


def test_a_flat_critic_and_default_ranges():
    ax, quiver = draw(lambda x: torch.zeros(len(x)), title="flat")
    assert (quiver.U == 0).all() and (quiver.V == 0).all() and ax.get_title() == "flat"
    assert ax.get_xlim() == pytest.approx((-3, 3)) and ax.get_ylim() == pytest.approx((-1.625, 2.125))


def test_both_sets_are_shown_and_not_more_dots_than_asked_for():
    ax, _ = draw(lambda x: x[:, 0], dots=2)
    real, fake = ax.lines
    np.testing.assert_allclose(real.get_xydata(), REAL)
    np.testing.assert_allclose(fake.get_xydata(), FAKE[:2])


def test_networks_of_other_types_and_modes():
    net = torch.nn.Linear(2, 1).double()
    fig, ax = plot.figure()
    critic_panel(ax, net, REAL.double(), FAKE.double().requires_grad_())
    assert net.weight.grad is None
    plot.show(fig, alt="A panel with a tilted plane and arrows")


def test_bad_input():
    _, ax = plot.figure()
    for real, fake in ((REAL[:0], FAKE), (REAL, FAKE[:, :1]), (REAL[0], FAKE)):
        with pytest.raises(ValueError, match=r"points \[N, 2\]"):
            critic_panel(ax, lambda x: x[:, 0], real, fake)
    for bad in ({"arrows": 1}, {"n": 1}, {"levels": 1}, {"dots": 0}):
        with pytest.raises(ValueError, match="expected arrows"):
            critic_panel(ax, lambda x: x[:, 0], REAL, FAKE, **bad)
