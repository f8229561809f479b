r"""Black-box tuning of a capped-gate LSTM (melis2018state).

Published rankings of language models compare architectures that were tuned with unequal care. Give every model the same budget of
a black-box tuner, and a standard LSTM comes out ahead of most of what was said to be better. Two pieces are needed: the cell, an LSTM whose input
gate is capped so that its state stays bounded, and the tuner, a Gaussian process that learns how the validation loss depends on the
hyper-parameters and proposes those that promise most.

Equations:

With $i, f, o = \sigma(\cdot)$ and $g = \tanh(\cdot)$ affine in $(x_t, h_{t-1})$ inside, the cap is

$$ i \leftarrow \min(1 - f, i) , \qquad c_t = f \odot c_{t-1} + i \odot g , \qquad h_t = o \odot \tanh(c_t) , $$

so that $c_t$ is at most a mean of $c_{t-1}$ and $g$, in $[-1, 1]$ from $c_0 = 0$. Tied gates have $i = 1 - f$.

Tuner: hyper-parameters are mapped to $[0, 1]^n$, after the logarithm where the scale is one. After a few Sobol points, a Gaussian process with a
Matérn-5/2 kernel and a length a dimension is fitted to the standardised losses, and the next point maximises the expected improvement over the
lowest loss $y^*$ so far,

$$ \operatorname{EI}(u) = E[\max(y^* - y(u), 0)] = (y^* - \mu) \Phi(z) + \sigma \phi(z) , \qquad z = \frac{y^* - \mu}{\sigma} , $$

with mean $\mu$ and standard deviation $\sigma$ at $u$. Within a batch, points that wait for their losses are filled in with their $\mu$.

Deviations from the paper:

1. The paper's tuner is an internal service; here the process is scikit-learn's, and the expected improvement and its maximisation are those
   of the package `bayesian-optimization`.
2. Sobol points first: $4 n$ of them, but at most half of the budget. The paper does not tell how its service starts.
3. A learnt noise term, since training is noisy; a loss that is not finite counts as the highest finite one.
4. The cell has one bias a gate too many, so that its weights are those of `torch.nn.LSTMCell`.

Later work: Merity et al. (2018, in this atlas) reached the same figures independently. Mogrifier LSTM (Melis, Kočiský and Blunsom 2020) was tuned
under the same rule and does improve on the LSTM. Dodge et al. (2019, "Show your work: improved reporting of experimental results") propose to report the
expected best validation result as a function of the tuning budget, and equal budgets became part of reproducibility checklists.

Example:
    import torch
    from torch import nn
    from dlatlas.nlp.fair_tuning import compare

    x = torch.randn(400, 10)
    y = (x[:, 0] * x[:, 1] > 0).long()

    def objective(activation):  # takes hyper-parameters, trains, returns the validation loss
        def validation_loss(p):
            model = nn.Sequential(nn.Linear(10, p["width"]), activation(), nn.Linear(p["width"], 2))
            optimizer = torch.optim.Adam(model.parameters(), lr=p["lr"])
            for _ in range(60):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(x[:300]), y[:300]).backward()
                optimizer.step()
            return nn.functional.cross_entropy(model(x[300:]), y[300:]).item()
        return validation_loss

    models = {"tanh": objective(nn.Tanh), "relu": objective(nn.ReLU)}
    print("untuned:", {name: round(f({"lr": 1e-3, "width": 32}), 3) for name, f in models.items()})
    space = {"lr": (1e-4, 1e-1, "log"), "width": (8, 64, "int")}
    # the method: a tuner, and equal care for all
    for row in compare(models, dict.fromkeys(models, space), n_trials=6, seeds=[0, 1]):
        print(f"{row['name']}: {row['mean']:.3f} +- {row['spread']:.3f}")
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from bayes_opt import TargetSpace
from bayes_opt.acquisition import ExpectedImprovement
from scipy.stats import qmc
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from torch import Tensor, nn
from torch.nn.functional import linear

__all__ = ["CappedLSTMCell", "TuneResult", "compare", "tune"]

Space = Mapping[str, tuple[float, float, str]]
Params = dict[str, Any]
SCALES = ("linear", "log", "int")


class CappedLSTMCell(nn.Module):
    r"""LSTM cell with $i \le 1 - f$: ``forward(x_t [B, d_in], (h, c)) -> (h, (h, c))``; the state None is zero.

    Args:
        d_in: width of the input.
        d_hidden: width of the state.
        cap_input_gate: $i \leftarrow \min(1 - f, i)$.
        tie_gates: $i = 1 - f$; the input gate's own weights have no effect then.

    Attributes:
        weight_ih, weight_hh, bias_ih, bias_hh: as of `torch.nn.LSTMCell`, gates in the order i, f, g, o.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, d_in: int, d_hidden: int, cap_input_gate: bool = True, tie_gates: bool = False):
        super().__init__()
        if min(d_in, d_hidden) < 1:
            raise ValueError(f"sizes must be at least 1, got d_in={d_in}, d_hidden={d_hidden}")
        self.cap_input_gate, self.tie_gates = cap_input_gate, tie_gates
        for name, p in nn.LSTMCell(d_in, d_hidden).named_parameters():
            self.register_parameter(name, p)

    def forward(self, x_t: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if x_t.dim() != 2 or x_t.shape[1] != self.weight_ih.shape[1]:
            raise ValueError(f"expected inputs [batch, {self.weight_ih.shape[1]}], got {tuple(x_t.shape)}")
        h, c = (x_t.new_zeros(len(x_t), self.weight_hh.shape[1]),) * 2 if state is None else state
        gates = linear(x_t, self.weight_ih, self.bias_ih) + linear(h, self.weight_hh, self.bias_hh)  # [B, 4 d_hidden]
        i, f, g, o = gates.chunk(4, 1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        if self.tie_gates:
            i = 1 - f
        elif self.cap_input_gate:
            i = torch.minimum(i, 1 - f)
        c = f * c + i * g
        h = o * c.tanh()
        return h, (h, c)


@dataclass(frozen=True)
class TuneResult:
    """The best hyper-parameters, their value, and all trials in order as (hyper-parameters, value)."""

    best_params: Params
    best_value: float
    history: list[tuple[Params, float]] = field(repr=False)


def tune(objective: Callable[[Params], float], space: Space, n_trials: int, seed: int = 0, batch: int = 1) -> TuneResult:
    """Minimise a function of named numbers that is expensive, noisy and has no gradient.

    Args:
        objective: takes a dict with the names of `space`; NaN and infinite values are allowed (a run that diverged).
        space: name -> (low, high, scale), scale "linear", "log" (float, uniform in the logarithm) or "int" (whole, both ends included).
        n_trials: number of calls; no point is tried twice.
        seed: of the Sobol points and the search for the best point; equal seeds give equal trials.
        batch: points that are chosen together before their values are known.

    Raises:
        ValueError: an empty space, low >= high, a log scale that begins at 0 or below, an unknown scale, integers that are none, a count
            below 1, fewer points than trials, or no finite value at all.
    """
    _check(space, n_trials, batch)
    rng = np.random.RandomState(seed)
    n_first = min(4 * len(space), (n_trials + 1) // 2)
    sobol = qmc.Sobol(len(space), seed=seed).random_base2(max(1, (n_first - 1).bit_length()))[:n_first]
    points: list[np.ndarray] = []
    values: list[float] = []
    history: list[tuple[Params, float]] = []
    while len(values) < n_trials:
        for _ in range(min(batch, n_trials - len(values))):
            n = len(points)
            u = sobol[n] if n < n_first else _propose(points, values, rng)
            points.append(_new(u, points, space, rng))
        for u in points[len(values) :]:
            params = _params(u, space)
            value = float(objective(params))
            values.append(value)
            history.append((params, value))
    finite = [v if math.isfinite(v) else math.inf for v in values]
    best = int(np.argmin(finite))
    if finite[best] == math.inf:
        raise ValueError(f"expected at least one finite value, got {values}")
    return TuneResult(history[best][0], values[best], history)


def compare(
    models: Mapping[str, Callable[[Params], float]], spaces: Mapping[str, Space], n_trials: int, seeds: Iterable[int]
) -> list[dict[str, Any]]:
    """Tune every model with the same number of trials, once a seed.

    torch's global generator is seeded before each tuning, so that training noise counts as well as the tuner's luck.

    Args:
        models: name -> objective, as for :func:`tune`.
        spaces: name -> space of the same model.
        n_trials: trials a model and seed.
        seeds: at least one.

    Returns:
        A row a model: `name`, `best`, `mean` and `spread` (standard deviation, 0 for one seed) over the seeds of the best values, and all of
        them as `values`.

    Raises:
        ValueError: names that differ, or no model or seed.
    """
    seeds = list(seeds)
    if not seeds or not models or models.keys() != spaces.keys():
        raise ValueError(f"expected seeds, and a space for every model; got seeds {seeds}, {sorted(models)} and {sorted(spaces)}")
    rows = []
    for name, objective in models.items():
        values = []
        for seed in seeds:
            torch.manual_seed(seed)
            values.append(tune(objective, spaces[name], n_trials, seed).best_value)
        spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        rows.append({"name": name, "best": min(values), "mean": float(np.mean(values)), "spread": spread, "values": values})
    return rows


def _propose(points: list[np.ndarray], values: list[float], rng: np.random.RandomState) -> np.ndarray:
    """The point of the cube with the largest expected improvement."""
    kernel = ConstantKernel() * Matern(np.full(len(points[0]), 0.5), (0.05, 20.0), nu=2.5) + WhiteKernel(1e-3, (1e-6, 0.3))
    gp = GaussianProcessRegressor(kernel, normalize_y=True, n_restarts_optimizer=1, random_state=rng)
    finite = [v for v in values if math.isfinite(v)]
    worst = max(finite, default=0.0)
    known = [v if math.isfinite(v) else worst for v in values]
    if pending := points[len(values) :]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a length at its bound is no news
            known += gp.fit(np.array(points[: len(values)]), known).predict(np.array(pending)).tolist()
    space = TargetSpace(None, {f"{k:03d}": (0.0, 1.0) for k in range(len(points[0]))}, allow_duplicate_points=True)
    for u, value in zip(points, known):
        space.register(u, -value)  # it maximises
    return ExpectedImprovement(xi=0.0).suggest(gp, space, n_random=2000, n_smart=2, random_state=rng)


def _new(u: np.ndarray, points: list[np.ndarray], space: Space, rng: np.random.RandomState) -> np.ndarray:
    """`u` moved to where its whole numbers are; a random point if that has been tried."""
    while True:
        u = np.array([_unit(v, *bounds) for v, bounds in zip(_params(u, space).values(), space.values())])
        if not any(np.allclose(u, other, rtol=0, atol=1e-9) for other in points):
            return u
        u = rng.uniform(size=len(u))


def _params(u: np.ndarray, space: Space) -> Params:
    return {name: _value(float(x), *bounds) for (name, bounds), x in zip(space.items(), u)}


def _value(u: float, low: float, high: float, scale: str) -> float | int:
    if scale == "log":
        return min(max(low * (high / low) ** u, low), high)
    if scale == "int":
        return min(int(low) + int(u * (high - low + 1)), int(high))  # equal shares
    return low + u * (high - low)


def _unit(value: float, low: float, high: float, scale: str) -> float:
    if scale == "log":
        return math.log(value / low) / math.log(high / low)
    if scale == "int":
        return (value - low + 0.5) / (high - low + 1)  # the middle of its share
    return (value - low) / (high - low)


def _check(space: Space, n_trials: int, batch: int) -> None:
    if not space or n_trials < 1 or batch < 1:
        raise ValueError(f"expected a space with a name, n_trials >= 1 and batch >= 1, got {dict(space)}, {n_trials} and {batch}")
    count = 1.0
    for name, (low, high, scale) in space.items():
        if scale not in SCALES:
            raise ValueError(f"{name}: expected a scale of {', '.join(SCALES)}; got {scale!r}")
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ValueError(f"{name}: expected finite low < high, got {low} and {high}")
        if scale == "log" and low <= 0:
            raise ValueError(f"{name}: expected a log scale above 0, got low={low}")
        if scale == "int" and (low != int(low) or high != int(high)):
            raise ValueError(f"{name}: expected whole numbers for an int scale, got {low} and {high}")
        count *= high - low + 1 if scale == "int" else math.inf
    if count < n_trials:
        raise ValueError(f"expected at most as many trials as the space has points, {count:.0f}; got {n_trials}")
