"""PGD against closed forms of linear models, a plain transcription, and what an attack must not do to a model."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dlatlas.kit.nets import mlp
from dlatlas.robustness.pgd import PGDTrainer, attacking, pgd, project

LINE = (-math.inf, math.inf)


class Logistic(nn.Module):
    """Two classes with logits 0 and w x."""

    def __init__(self, w):
        super().__init__()
        self.w = nn.Parameter(w)

    def forward(self, x):
        z = x.flatten(1) @ self.w
        return torch.stack([torch.zeros_like(z), z], 1)


def problem(n=12, classes=3, seed=0):
    torch.manual_seed(seed)
    x = torch.rand(n, 1, 4, 5, dtype=torch.float64)
    model = nn.Sequential(nn.Flatten(), mlp([20, 16, classes], "tanh")).double()
    for p in model.parameters():
        p.data *= 3
    return model, x, model(x).argmax(1)


def losses(model, x, y):
    with torch.no_grad():
        return cross_entropy(model(x), y, reduction="none")


def test_projection_is_the_nearest_point_of_the_ball():
    d = torch.randn(6, 2, 3, dtype=torch.float64)
    np.testing.assert_allclose(project(d, 0.4, "linf"), np.clip(d.numpy(), -0.4, 0.4))
    for row, out in zip(d, project(d, 1.5, "l2")):
        length = np.sqrt((row.numpy() ** 2).sum())
        np.testing.assert_allclose(out, row * (1.5 / length if length > 1.5 else 1.0))
    assert torch.equal(project(torch.zeros(2, 3), 1.0, "l2"), torch.zeros(2, 3))
    assert torch.equal(project(d, 0.0, "l2"), torch.zeros_like(d))


def test_one_step_is_optimal_on_a_linear_model():
    w = torch.randn(7, dtype=torch.float64)
    x, y = torch.rand(9, 7, dtype=torch.float64), torch.tensor([0, 1, 1] * 3)
    side = (1 - 2 * y.double())[:, None]
    got = pgd(Logistic(w), x, y, 0.1, alpha=0.1, steps=1, random_start=False, clip=LINE)
    torch.testing.assert_close(got, x + 0.1 * side * w.sign())
    got = pgd(Logistic(w), x, y, 0.7, alpha=0.7, steps=1, norm="l2", random_start=False, clip=LINE)
    torch.testing.assert_close(got, x + 0.7 * side * w / w.norm())
    # From any start in the ball too, with steps to spare.
    got = pgd(Logistic(w), x, y, 0.1, steps=10, clip=LINE)
    torch.testing.assert_close(got, x + 0.1 * side * w.sign())
    # In the box the optimum is cut off coordinate by coordinate.
    got = pgd(Logistic(w), x, y, 0.3, steps=10)
    torch.testing.assert_close(got, (x + 0.3 * side * w.sign()).clamp(0, 1))


def plain(model, x, y, eps, alpha, steps, norm):
    """The recursion from x, every iterate kept."""
    point, seen = x.clone(), [x]
    for _ in range(steps):
        point = point.detach().requires_grad_()
        cross_entropy(model(point), y, reduction="sum").backward()
        g, moved = point.grad.numpy(), []
        for i in range(len(x)):
            d = point[i].detach().numpy() - x[i].numpy()
            if norm == "linf":
                d = np.clip(d + alpha * np.sign(g[i]), -eps, eps)
            else:
                d = d + alpha * g[i] / np.sqrt((g[i] ** 2).sum())
                d = d * min(1, eps / np.sqrt((d**2).sum()))
            moved.append(np.clip(x[i].numpy() + d, 0, 1))
        point = torch.tensor(np.stack(moved))
        seen.append(point)
    return torch.stack(seen)


@pytest.mark.parametrize(("norm", "eps", "alpha"), [("linf", 0.2, 0.07), ("l2", 0.8, 0.3)])
def test_iterates_are_those_of_the_recursion_and_the_best_is_kept(norm, eps, alpha):
    model, x, y = problem()
    seen = plain(model, x, y, eps, alpha, 6, norm)
    table = torch.stack([losses(model, s, y) + 1e6 * (model(s).argmax(1) != y) for s in seen])
    expected = seen[table.argmax(0), torch.arange(len(x))]
    torch.testing.assert_close(pgd(model, x, y, eps, alpha, 6, norm, random_start=False), expected)


def test_the_best_iterate_is_kept_where_the_last_is_worse():
    # One step of the full length jumps over the peak of the loss at x + 0.1 to where it is lower than before.
    class Peak(nn.Module):
        def forward(self, x):
            z = 3 - 100 * (x[:, 0] - 0.6) ** 2
            return torch.stack([torch.zeros_like(z), z], 1)

    x, y = torch.tensor([[0.55]]), torch.tensor([0])
    got = pgd(Peak(), x, y, 0.4, alpha=0.4, steps=1, random_start=False)
    assert torch.equal(got, x)
    fine = pgd(Peak(), x, y, 0.4, alpha=0.01, steps=40, random_start=False)
    assert float(fine) == pytest.approx(0.6, abs=0.011)


def test_a_misclassified_point_goes_before_a_larger_loss():
    class Two(nn.Module):
        """Right with a huge loss is impossible for a softmax of two classes, not for three."""

        def forward(self, x):
            near = x[:, :1] < 0.5
            right = torch.tensor([[1.0, 0.999, 0.999]])  # loss log 3, class 0 wins
            wrong = torch.tensor([[1.0, 1.001, -9.0]])  # loss log 2, class 0 loses
            return torch.where(near, right, wrong) + 0 * x.sum()

    x = torch.full((64, 1), 0.5)
    got = pgd(Two(), x, torch.zeros(64, dtype=torch.long), 0.4, steps=0, restarts=8)
    assert (got >= 0.5).double().mean() > 0.95


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("targeted", [False, True])
def test_points_stay_in_ball_and_box(norm, targeted):
    model, x, y = problem(40)
    x, model = x.float(), model.float()
    x[:5] = 0
    x[5:10] = 1
    for eps in (0.03, 0.4, 5.0):
        got = pgd(model, x, y, eps, norm=norm, restarts=2, targeted=targeted)
        d = (got - x).flatten(1)
        length = d.abs().amax(1) if norm == "linf" else d.norm(dim=1)
        assert got.min() >= 0 and got.max() <= 1 and length.max() <= eps + 1e-6
        assert got.shape == x.shape and got.dtype == x.dtype and not got.requires_grad


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_are_uniform_in_the_ball(norm):
    x = torch.full((4000, 3), 0.5, dtype=torch.float64)
    d = pgd(nn.Linear(3, 2).double(), x, torch.zeros(4000, dtype=torch.long), 0.4, steps=0, norm=norm) - x
    radius = (d.abs().amax(1) if norm == "linf" else d.norm(dim=1)) / 0.4
    # The radius of a uniform point has the distribution function r^3.
    for r in (0.5, 0.8):
        assert float((radius <= r).double().mean()) == pytest.approx(r**3, abs=0.03)
    assert d.mean(0).abs().max() < 0.02


def test_more_effort_finds_no_smaller_loss():
    model, x, y = problem(200, seed=2)
    means = []
    for steps, restarts in ((0, 1), (1, 1), (5, 1), (20, 1), (20, 4)):
        torch.manual_seed(0)
        means.append(float(losses(model, pgd(model, x, y, 0.1, steps=steps, restarts=restarts), y).mean()))
    assert means[0] < means[1] < means[2] < means[3] <= means[4]
    assert means[3] > losses(model, x, y).mean() + 0.2


def test_targeted_goes_down_to_the_target():
    model, x, y = problem(30, seed=1)
    target = (y + 1) % 3
    got = pgd(model, x, target, 0.4, steps=20, targeted=True)
    assert (losses(model, got, target) <= losses(model, x, target)).all()
    assert (model(got).argmax(1) == target).double().mean() > 0.7


def test_eps_zero_returns_a_copy():
    model, x, y = problem()
    got = pgd(model, x, y, 0)
    assert torch.equal(got, x) and got.data_ptr() != x.data_ptr()


def test_model_is_left_as_it_was_and_attacked_in_evaluation_mode():
    modes = []

    class Spy(nn.Module):
        def forward(self, x):
            modes.append(self.training)
            return x

    model = nn.Sequential(nn.Flatten(), nn.Linear(20, 8), nn.BatchNorm1d(8), nn.Dropout(), Spy(), nn.Linear(8, 3)).train()
    model[2].eval()  # a frozen layer stays frozen
    model[1].bias.requires_grad_(False)
    model[5].weight.grad = torch.ones(3, 8)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    pgd(model, torch.rand(6, 1, 4, 5), torch.zeros(6, dtype=torch.long), 0.1, restarts=2)
    assert modes and not any(modes)
    assert model.training and model[3].training and not model[2].training
    assert not model[1].bias.requires_grad and model[1].weight.requires_grad
    assert torch.equal(model[5].weight.grad, torch.ones(3, 8)) and model[1].weight.grad is None
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    with pytest.raises(RuntimeError, match="stop"), attacking(model):
        raise RuntimeError("stop")
    assert model.training and model[1].weight.requires_grad


def test_adversarial_training_uses_the_worst_points():
    model = Logistic(torch.tensor([1.0, -2.0]))
    x, y = torch.tensor([[0.5, 0.5], [0.3, 0.6]]), torch.tensor([1, 0])
    opt = torch.optim.SGD(model.parameters(), lr=1.0)
    side = (1 - 2 * y.float())[:, None]
    worst = x + 0.1 * side * torch.tensor([1.0, -1.0])
    reference = Logistic(torch.tensor([1.0, -2.0]))
    expected = cross_entropy(reference(worst), y)
    expected.backward()
    loss = PGDTrainer(model, opt, 0.1, steps=10).step(x, y)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(model.w.detach(), reference.w.detach() - reference.w.grad)


def test_adversarial_training_makes_robust():
    # One strong coordinate, and many weak ones that a small change turns round.
    torch.manual_seed(0)
    y = torch.arange(400) % 2
    side = 2.0 * y[:, None] - 1
    x = (0.5 + torch.cat([0.25 * side * (torch.rand(400, 1) < 0.93).float(), 0.03 * side + 0.02 * torch.randn(400, 60)], 1)).clamp(0, 1)
    x = torch.cat([x, 1 - x], 1)  # so that no weight has to make up for the mean
    scores = []
    for eps in (0.0, 0.1):
        model = nn.Linear(122, 2, bias=False)
        nn.init.zeros_(model.weight)
        trainer = PGDTrainer(model, torch.optim.SGD(model.parameters(), 0.1), eps, steps=3)
        for _ in range(300):
            trainer.step(x, y)
        scores.append(float((model(pgd(model, x, y, 0.1)).argmax(1) == y).float().mean()))
    assert scores[0] < 0.3 and scores[1] > 0.85


X, Y = torch.rand(2, 3), torch.tensor([0, 1])


@pytest.mark.parametrize(
    "call",
    [
        lambda m: pgd(m, X, Y, -0.1),
        lambda m: pgd(m, X, Y, math.nan),
        lambda m: pgd(m, X, Y, 0.1, norm="l1"),
        lambda m: pgd(m, X, Y, 0.1, alpha=-1.0),
        lambda m: pgd(m, X, Y, 0.1, steps=-1),
        lambda m: pgd(m, X, Y, 0.1, restarts=0),
        lambda m: pgd(m, X, Y[:1], 0.1),
        lambda m: pgd(m, X + 1, Y, 0.1),
        lambda m: project(X, -1.0, "l2"),
        lambda m: project(X, 1.0, "max"),
        lambda m: PGDTrainer(m, None, -0.1),
        lambda m: PGDTrainer(m, None, 0.1, steps=0),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(ValueError, match="got"):
        call(nn.Linear(3, 2))
