"""Methods that a well-kept library also has: both are run on the same input, and the largest difference is measured.

Each function below returns (ours, theirs) in double precision; :func:`measure` runs them all in a second. The page of peers and the tests
under ``tests/peers`` use the same rows, so that no figure is typed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment, linprog
from scipy.signal import lfilter
from scipy.spatial.transform import Rotation
from sklearn.linear_model import LogisticRegression
from sklearn.metrics.pairwise import polynomial_kernel
from sklearn.svm import SVC
from torch import Tensor, nn
from torch.distributions import Normal, TanhTransform, TransformedDistribution, kl_divergence
from torch.nn.utils import parametrizations

__all__ = ["PEERS", "Peer", "measure"]

Pair = tuple[Tensor, Tensor]
F64 = torch.float64


@dataclass(frozen=True)
class Peer:
    """One comparison: the paper's key, what is compared with what, the largest difference allowed, and why there is one at all."""

    key: str
    what: str
    peer: str
    tolerance: float
    reason: str
    run: Callable[[], Pair]


PEERS: list[Peer] = []


def measure(rows: Iterable[Peer] | None = None) -> list[tuple[Peer, float]]:
    """Every comparison with the largest absolute difference that was found; the same on every run."""
    found = []
    for row in PEERS if rows is None else rows:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            ours, theirs = row.run()
        if ours.shape != theirs.shape:
            raise ValueError(f"{row.what}: shapes {tuple(ours.shape)} and {tuple(theirs.shape)}")
        found.append((row, float((ours.detach().double() - theirs.detach().double()).abs().max())))
    return found


def _peer(key: str, what: str, peer: str, tolerance: float, reason: str) -> Callable[[Callable[[], Pair]], Callable[[], Pair]]:
    def add(run: Callable[[], Pair]) -> Callable[[], Pair]:
        PEERS.append(Peer(key, what, peer, tolerance, reason, run))
        return run

    return add


EXACT, ROUNDING = "none: the same numbers", "rounding: the sums are taken in another order"


def _descent(make: Callable[[list[Tensor]], torch.optim.Optimizer], steps: int = 30) -> Tensor:
    """The iterates of an optimizer on one noisy quadratic."""
    g = torch.Generator().manual_seed(1)
    w = nn.Parameter(torch.ones(6, dtype=F64))
    optimizer, path = make([w]), []
    for _ in range(steps):
        w.grad = torch.arange(1.0, 7, dtype=F64) * w.detach() + torch.randn(6, generator=g, dtype=F64)
        optimizer.step()
        path.append(w.detach().clone())
    return torch.stack(path)


@_peer(
    "miyato2018spectral",
    "a layer's normalised weight",
    "torch.nn.utils.parametrizations.spectral_norm",
    1e-9,
    "rounding, after 300 power iterations each",
)
def _spectral_norm() -> Pair:
    from dlatlas.gans.spectral_norm import spectral_norm

    ours, theirs = nn.Linear(7, 5).double(), nn.Linear(7, 5).double()
    theirs.load_state_dict(ours.state_dict())
    return spectral_norm(ours, n_power_iterations=300).weight, parametrizations.spectral_norm(theirs, n_power_iterations=300).weight


@_peer("reddi2018amsgrad", "30 iterates with bias correction", "torch.optim.Adam(amsgrad=True)", 1e-12, ROUNDING)
def _amsgrad() -> Pair:
    from dlatlas.theory.amsgrad import AMSGrad

    hyper = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-3}
    return _descent(lambda p: AMSGrad(p, bias_correction=True, **hyper)), _descent(lambda p: torch.optim.Adam(p, amsgrad=True, **hyper))


@_peer("baydin2018hypergradient", "30 iterates of Adam with its rate held fixed", "torch.optim.Adam", 1e-12, ROUNDING)
def _hypergradient() -> Pair:
    from dlatlas.theory.hypergradient import AdamHD

    return _descent(lambda p: AdamHD(p, lr=0.02, hypergrad_lr=0.0)), _descent(lambda p: torch.optim.Adam(p, lr=0.02))


@_peer("merity2018regularizing", "30 iterates before the average begins", "torch.optim.SGD", 0.0, EXACT)
def _nt_asgd() -> Pair:
    from dlatlas.nlp.awd_lstm import NTASGD

    return _descent(lambda p: NTASGD(p, lr=0.1, weight_decay=0.01)), _descent(lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.01))


@_peer(
    "soudry2018implicit",
    "normal of the maximum margin",
    "sklearn.svm.SVC(kernel='linear', C=1e8)",
    1e-4,
    "SVC's stopping rule; ours solves to rounding",
)
def _max_margin() -> Pair:
    from dlatlas.theory.kit.tasks import separable_blobs
    from dlatlas.theory.max_margin_bias import hard_margin_svm

    X, y = separable_blobs(60, 5, 0.3, torch.Generator().manual_seed(60))
    peer = SVC(kernel="linear", C=1e8, tol=1e-8).fit(torch.cat([X, -X]).numpy(), torch.cat([y, -y]).numpy())
    return hard_margin_svm(X, y), torch.tensor(peer.coef_[0])


@_peer(
    "smith2018bayesian",
    "the most probable weights",
    "sklearn.linear_model.LogisticRegression",
    1e-5,
    "scikit-learn's stopping rule; ours is Newton's method",
)
def _evidence() -> Pair:
    from dlatlas.theory.bayes_evidence import fit_laplace_logistic

    X, y = _labelled()
    peer = LogisticRegression(C=1 / 0.1, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(X.numpy(), y.numpy())
    return fit_laplace_logistic(X, y, 0.1)["w"], torch.tensor(peer.coef_[0])


@_peer("usman2018stable", "the discriminator, by its dual", "sklearn.linear_model.LogisticRegression", 1e-4, "scikit-learn's stopping rule")
def _dual_alignment() -> Pair:
    from dlatlas.gans.dual_alignment import solve_dual

    X, y = _labelled()
    peer = LogisticRegression(C=1 / 0.3, fit_intercept=False, tol=1e-10, max_iter=10_000).fit(X.numpy(), y.numpy())
    return (solve_dual(X, y, 0.3) * y) @ X / 0.3, torch.tensor(peer.coef_[0])


def _labelled() -> Pair:
    X = torch.randn(60, 4, dtype=F64)
    return X, torch.where(X.sum(1) + torch.randn(60, dtype=F64) > 0, 1.0, -1.0).double()


@_peer("binkowski2018demystifying", "biased KID of two samples", "sklearn.metrics.pairwise.polynomial_kernel", 1e-12, ROUNDING)
def _kid() -> Pair:
    from dlatlas.gans.mmd import mmd2, poly_kernel

    x, y = torch.randn(40, 8, dtype=F64), torch.randn(50, 8, dtype=F64) + 0.3
    k = lambda a, b: polynomial_kernel(a.numpy(), b.numpy(), degree=3, coef0=1).mean()  # noqa: E731  gamma is 1 / d
    return mmd2(x, y, poly_kernel, unbiased=False), torch.tensor(k(x, x) + k(y, y) - 2 * k(x, y))


@_peer(
    "salimans2018otgan",
    "transport at a low temperature",
    "scipy.optimize.linear_sum_assignment",
    1e-3,
    "the temperature: 0.002 instead of zero",
)
def _sinkhorn() -> Pair:
    from dlatlas.gans.ot_gan import sinkhorn

    cost = torch.rand(12, 12, dtype=F64)
    i, j = linear_sum_assignment(cost.numpy())
    return sinkhorn(cost, 0.002, 5000)[0], cost[i, j].mean()


@_peer("martin2018parallelizing", "a recurrence of 1,000 steps", "scipy.signal.lfilter", 1e-11, ROUNDING)
def _linear_recurrence() -> Pair:
    from dlatlas.nlp.linear_recurrence import linear_recurrence

    b = torch.randn(2, 1000, 3, dtype=F64)
    return linear_recurrence(torch.full_like(b, 0.95), b), torch.tensor(lfilter([1.0], [1.0, -0.95], b.numpy(), axis=1))


@_peer("melis2018state", "an LSTM cell without the cap", "torch.nn.LSTMCell", 1e-12, ROUNDING)
def _lstm_cell() -> Pair:
    from dlatlas.nlp.fair_tuning import CappedLSTMCell

    ours, theirs = CappedLSTMCell(3, 5, cap_input_gate=False).double(), nn.LSTMCell(3, 5).double()
    theirs.load_state_dict(ours.state_dict())
    x, state = torch.randn(4, 3, dtype=F64), (torch.randn(4, 5, dtype=F64), torch.randn(4, 5, dtype=F64))
    return ours(x, state)[0], theirs(x, state)[0]


@_peer("dangovski2018rum", "a rotation in three dimensions", "scipy.spatial.transform.Rotation.from_rotvec", 1e-12, ROUNDING)
def _rotation() -> Pair:
    from dlatlas.nlp.rum import rotation

    a, b = torch.randn(20, 3, dtype=F64), torch.randn(20, 3, dtype=F64)
    axis = torch.linalg.cross(a, b)
    angle = torch.atan2(axis.norm(dim=1), (a * b).sum(1))
    vectors = axis / axis.norm(dim=1, keepdim=True) * angle[:, None]
    return rotation(a, b), torch.tensor(Rotation.from_rotvec(vectors.numpy()).as_matrix())


@_peer("jose2018kronecker", "a Kronecker product times vectors", "torch.kron", 1e-12, ROUNDING)
def _kronecker() -> Pair:
    from dlatlas.nlp.kronecker_rnn import kron_apply

    A, B, C = (torch.randn(n, n, dtype=F64) for n in (2, 3, 4))
    x = torch.randn(5, 24, dtype=F64)
    return kron_apply([A, B, C], x), x @ torch.kron(torch.kron(A, B), C).T


@_peer(
    "mishra2018wrpn",
    "weights on a grid of 4 bits",
    "torch.fake_quantize_per_tensor_affine",
    1e-6,
    "torch's grid is computed in single precision",
)
def _grid() -> Pair:
    from dlatlas.compression.wrpn import quantize_weight

    w = 0.6 * torch.randn(2000)
    return quantize_weight(w, 4), torch.fake_quantize_per_tensor_affine(w, 1 / 7, 0, -7, 7)


@_peer(
    "haarnoja2018soft",
    "log-density of a tanh-squashed Gaussian",
    "torch.distributions.TanhTransform",
    1e-9,
    "the same density; ours starts from the unsquashed number and needs no inverse of tanh",
)
def _squashed_density() -> Pair:
    from dlatlas.rl.sac import tanh_normal_log_prob

    mean, log_std = torch.randn(50, 3, dtype=F64), torch.randn(50, 3, dtype=F64) / 3
    u = mean + log_std.exp() * torch.randn(50, 3, dtype=F64)
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), [TanhTransform(cache_size=1)])
    return tanh_normal_log_prob(mean, log_std, u), squashed.log_prob(u.tanh()).sum(1)


@_peer(
    "abdolmaleki2018maximum",
    "divergence of two Gaussians of equal width, and of equal mean",
    "torch.distributions.kl_divergence",
    1e-12,
    "the same formula, split into the part of the mean and that of the width",
)
def _decoupled_divergence() -> Pair:
    from dlatlas.rl.mpo import decoupled_kl

    mean, other = torch.randn(2, 50, 3, dtype=F64)
    std, wide = torch.rand(2, 50, 3, dtype=F64) + 0.2
    ours = torch.stack([decoupled_kl(mean, std, other, std)[0], decoupled_kl(mean, std, mean, wide)[1]])
    old = Normal(mean, std)
    return ours, torch.stack([kl_divergence(old, new).sum(1) for new in (Normal(other, std), Normal(mean, wide))])


@_peer(
    "dai2018boosting",
    "value of the Lagrangian at the saddle point of a random decision problem",
    "scipy.optimize.linprog",
    1e-7,
    "the linear programme's optimal values and multipliers put into our Lagrangian give the programme's own optimum",
)
def _linear_programme() -> Pair:
    from dlatlas.rl.dual_ac import lagrangian

    S, A, gamma = 6, 3, 0.9
    P, R, mu = torch.rand(S, A, S, dtype=F64).softmax(-1), torch.randn(S, A, dtype=F64), torch.full((S,), 1 / S, dtype=F64)
    # V(s) >= R(s, a) + gamma E V(s') for all s, a, written as rows of an upper bound.
    rows = (gamma * P - torch.eye(S, dtype=F64)[:, None]).flatten(0, 1)
    found = linprog((1 - gamma) * mu.numpy(), A_ub=rows.numpy(), b_ub=-R.flatten().numpy(), bounds=(None, None), method="highs")
    V, rho = torch.tensor(found.x), torch.tensor(-found.ineqlin.marginals).view(S, A)
    return lagrangian(P, R, mu, gamma, V, rho), torch.tensor(found.fun, dtype=F64)
