r"""Guide actor-critic: Newton steps in action space (tangkaratt2018guide).

Where deterministic policy gradients follow the critic's slope in the action, this method also uses its curvature. A second-order Taylor
expansion of the critic makes the best Gaussian within a trust region a closed form, the *guide actor*; the policy network is then fitted to the
guide by regression. Steep directions get short steps and flat directions long ones.

Equations: around an action $a_0$ with gradient $g$ and Hessian $H$ of the critic, $Q(s, a) \approx \tfrac12 a^\top H a + a^\top \psi$ + const, $\psi = g - H a_0$. The
guide solves $\max_{\tilde\pi} \mathbb{E} Q$ subject to $\mathbb{E}_s \mathrm{KL}(\tilde\pi \,\|\, \pi) \le \epsilon$ and $\mathbb{E}_s \mathcal H(\tilde\pi) \ge \kappa$:

$$ F = \eta \Sigma^{-1} - H , \quad L = \eta \Sigma^{-1} \mu + \psi , \quad \mu_+ = F^{-1} L , \quad \Sigma_+ = (\eta + \omega) F^{-1} , $$

where the multipliers $\eta, \omega > 0$ minimise the dual

$$ g(\eta, \omega) = \eta \epsilon - \omega \kappa + \mathbb{E}_s \Bigl[ \tfrac12 L^\top F^{-1} L - \tfrac{\eta}{2} \mu^\top \Sigma^{-1} \mu
   - \tfrac{\eta}{2} \log |2 \pi \Sigma| + \tfrac{\eta + \omega}{2} \log |2 \pi (\eta + \omega) F^{-1}| \Bigr] . $$

Deviations from the paper:

1. The dual is solved by L-BFGS in whitened coordinates, in the critic's own unit; any exact solver gives the same multipliers.
2. The actor's mean is a linear output, cut off at the bounds of the actions, and so is the guide's mean.
3. The critic's target uses one action drawn from the actor; the critic has tanh units, so that its curvature exists.
4. The numbers for divergence, entropy and networks are ours, for budgets of some ten thousand steps.

Later work: MPO (Abdolmaleki et al., 2018) solves the same trust-region problem by weighting sampled actions with $e^{Q/\eta}$ and needs no derivatives of
the critic; the constraints on divergence and entropy themselves go back to MOTO (Akrour et al., 2016). Second derivatives of learned critics
have hardly been used since: what a network fits is values, and its curvature is a by-product.

Example:
    import math
    import torch
    from dlatlas.rl.guide_actor_critic import guide_actor, negative_definite, solve_dual

    hessian = negative_definite(torch.diag(torch.tensor([-1.0, -50.0, 3.0], dtype=torch.float64)))[None]  # a critic with a valley
    top = torch.tensor([[1.0, -1.0, 0.0]], dtype=torch.float64)
    mean, cov = torch.zeros(1, 3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)[None]
    for step in range(1, 7):
        gradient = (mean - top) @ hessian[0]
        entropy = 0.5 * torch.logdet(2 * math.pi * math.e * cov[0]).item()
        eta, omega = solve_dual(mean, cov, gradient, hessian, mean, epsilon=0.5, kappa=entropy - 0.2)
        mean, cov = guide_actor(mean, cov, gradient, hessian, mean, eta, omega)
        print(f"step {step}: distance from the top {(mean - top).norm():.4f}, price of the divergence {eta:.2g}")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from dlatlas.rl.kit.actor_critic import ActorCriticAgent
from dlatlas.rl.kit.nets import mlp

__all__ = ["GAC", "gac_dual", "guide_actor", "negative_definite", "solve_dual"]

CURVATURES = ("gauss-newton", "hessian", "none")


def guide_actor(
    mean: Tensor, cov: Tensor, grad: Tensor, hess: Tensor, a0: Tensor, eta: float | Tensor, omega: float | Tensor
) -> tuple[Tensor, Tensor]:
    r"""Mean and covariance of the guide: $\mu_+ = F^{-1} L$, $\Sigma_+ = (\eta + \omega) F^{-1}$ with $F = \eta \Sigma^{-1} - H$.

    With $H = 0$ and $a_0 = \mu$ the step is $\Sigma g / \eta$, the direction of the deterministic policy gradient.

    Args:
        mean: policy means ``[batch, d]``.
        cov: policy covariances ``[batch, d, d]``.
        grad: gradients of the critic at `a0` ``[batch, d]``.
        hess: its Hessians there, negative semi-definite ``[batch, d, d]``.
        a0: points of expansion ``[batch, d]``.
        eta: multiplier of the divergence, positive.
        omega: multiplier of the entropy, not negative.

    Returns:
        ``[batch, d]`` and ``[batch, d, d]``.

    Raises:
        ValueError: shapes that do not fit, multipliers out of range, or an $F$ that is not positive definite.
    """
    chol_f, lin, _ = _factor(mean, cov, grad, hess, a0, eta, omega)
    mean_plus = torch.cholesky_solve(lin.unsqueeze(-1), chol_f).squeeze(-1)  # [batch, d]
    return mean_plus, (eta + omega) * torch.cholesky_inverse(chol_f)


def negative_definite(hess: Tensor) -> Tensor:
    """The negative semi-definite matrix nearest in Frobenius norm: positive eigenvalues of the symmetric part become 0.

    Args:
        hess: matrices ``[..., d, d]``.

    Raises:
        ValueError: not square.
    """
    if hess.dim() < 2 or hess.shape[-1] != hess.shape[-2]:
        raise ValueError(f"hess must have shape [..., d, d], got {tuple(hess.shape)}")
    values, vectors = torch.linalg.eigh((hess + hess.mT) / 2)
    return (vectors * values.clamp_max(0).unsqueeze(-2)) @ vectors.mT


def gac_dual(
    mean: Tensor, cov: Tensor, grad: Tensor, hess: Tensor, a0: Tensor, eta: Tensor, omega: Tensor, epsilon: float, kappa: float
) -> Tensor:
    r"""The dual $g(\eta, \omega)$, to be minimised over $\eta, \omega > 0$; the constant of the expansion is left out.

    Its derivatives are $\epsilon - \mathbb{E}\,\mathrm{KL}(\pi_+ \| \pi)$ and $\mathbb{E}\,\mathcal H(\pi_+) - \kappa$.

    Args:
        mean: as in :func:`guide_actor`.
        cov: see there.
        grad: see there.
        hess: see there.
        a0: see there.
        eta: multiplier of the divergence, may require gradient.
        omega: multiplier of the entropy, may require gradient.
        epsilon: bound of the mean divergence.
        kappa: lower bound of the mean entropy.

    Raises:
        ValueError: as :func:`guide_actor`, or a negative `epsilon`.
    """
    if not epsilon >= 0:
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    chol_f, lin, chol_cov = _factor(mean, cov, grad, hess, a0, eta, omega)
    d = mean.shape[1]
    white_lin = torch.linalg.solve_triangular(chol_f, lin.unsqueeze(-1), upper=False).squeeze(-1)  # F = C C^T: |C^-1 L|^2 = L^T F^-1 L
    white_mean = torch.linalg.solve_triangular(chol_cov, mean.unsqueeze(-1), upper=False).squeeze(-1)
    quadratic = 0.5 * white_lin.square().sum(-1) - 0.5 * eta * white_mean.square().sum(-1)
    log_det_f, log_det_cov = (2 * c.diagonal(dim1=-2, dim2=-1).log().sum(-1) for c in (chol_f, chol_cov))
    total = torch.as_tensor(eta + omega, dtype=mean.dtype)
    spread = 0.5 * total * (d * torch.log(2 * math.pi * total) - log_det_f)
    return eta * epsilon - omega * kappa + (quadratic + spread - 0.5 * eta * (d * math.log(2 * math.pi) + log_det_cov)).mean()


def solve_dual(
    mean: Tensor,
    cov: Tensor,
    grad: Tensor,
    hess: Tensor,
    a0: Tensor,
    epsilon: float,
    kappa: float,
    *,
    start: tuple[float, float] = (1.0, 1.0),
    bounds: tuple[float, float] = (1e-6, 1e6),
) -> tuple[float, float]:
    r"""The multipliers $(\eta, \omega)$ that minimise :func:`gac_dual`, by L-BFGS over their logarithms.

    In coordinates that whiten the covariance and diagonalise the Hessian the derivatives, which are the slacks of the two constraints, cost a
    few vector operations: no factorisation inside the search.

    Args:
        mean: as in :func:`guide_actor`.
        cov: see there.
        grad: see there.
        hess: see there.
        a0: see there.
        epsilon: bound of the mean divergence, positive.
        kappa: lower bound of the mean entropy.
        start: where the search begins, the multipliers of the step before for instance.
        bounds: smallest and largest multiplier, in units of the critic's mean slope and curvature.

    Raises:
        ValueError: `epsilon` is not positive, shapes that do not fit, or a Hessian that is not negative semi-definite.
    """
    if not epsilon > 0:
        raise ValueError(f"epsilon must be positive, got {epsilon}")
    _check_shapes(mean, cov, grad, hess, a0)
    with torch.no_grad():
        chol = torch.linalg.cholesky(cov.double())  # [batch, d, d], cov = C C^T
        values, vectors = torch.linalg.eigh(chol.mT @ hess.double() @ chol)
        slope = grad.double() + (hess.double() @ (mean - a0).double().unsqueeze(-1)).squeeze(-1)  # of the expansion at the mean
        tilt = (vectors.mT @ chol.mT @ slope.unsqueeze(-1)).squeeze(-1)
        half_log_det = chol.diagonal(dim1=-2, dim2=-1).log().sum(-1).mean().item()
    h, p, d = values.cpu().numpy(), tilt.square().cpu().numpy(), mean.shape[1]
    if h.max() > 1e-6 * (1 + np.abs(h).max()):
        raise ValueError("hess must be negative semi-definite, see negative_definite")
    # The multipliers have the critic's unit: in its natural size the search is the same for any scale of the rewards.
    unit = math.sqrt(p.mean()) + np.abs(h).mean() + 1e-12
    h, p = np.minimum(h, 0) / unit, p / unit**2

    def dual(logs: np.ndarray) -> tuple[float, np.ndarray]:
        eta, omega = np.exp(logs)
        f, total = eta - h, eta + omega  # eigenvalues of the whitened F
        entropy = 0.5 * d * math.log(2 * math.pi * math.e * total) - 0.5 * np.log(f).sum(1).mean() + half_log_det
        kl = 0.5 * (total / f - 1 - np.log(total / f) + p / f**2).sum(1).mean()
        spread = 0.5 * total * (d * math.log(2 * math.pi * total) - np.log(f).sum(1).mean()) + omega * half_log_det
        value = eta * epsilon - omega * kappa + 0.5 * (p / f).sum(1).mean() + spread - 0.5 * eta * d * math.log(2 * math.pi)
        return value, np.array([eta * (epsilon - kl), omega * (entropy - kappa)])

    low, high = np.log(bounds)
    # Near zero the slope along a logarithm vanishes: a multiplier that was slack must not stay so for that reason.
    begin = np.log(np.clip(np.array(start) / unit, 1e-2, 1e2))
    found = minimize(dual, begin, jac=True, method="L-BFGS-B", bounds=[(low, high)] * 2, options={"ftol": 1e-14, "gtol": 1e-8})
    eta, omega = unit * np.exp(found.x)
    return float(eta), float(omega)


class GAC(ActorCriticAgent):
    r"""The agent: a Gaussian actor with one covariance for all states, and a smooth critic with a lagged copy.

    An update moves the critic towards $r + \gamma \bar Q(s', a')$ with $a'$ drawn from the actor, expands the critic around the actor's mean or a
    sample, solves the dual on the batch, regresses the actor's mean on the guide's with the metric $F$ and takes the mean guide covariance.

    Args:
        obs_dim: width of flat observations.
        act_dim: number of action dimensions.
        low: lower bounds of the actions, a number or ``(act_dim,)``.
        high: upper bounds.
        epsilon: bound of the mean divergence of the guide from the actor.
        std: standard deviation at the start, in units of half the width of the box.
        final_std: the entropy's bound falls towards that of a Gaussian with this standard deviation.
        entropy_decay: factor a step on the distance of the entropy's bound from its end.
        curvature: "gauss-newton" for $H = -g g^\top$, "hessian" for the critic's own, projected; or "none" for $H = 0$.
        expand_at: "mean", or "sample" to expand around an action drawn from the actor.
        kwargs: those of :class:`dlatlas.rl.kit.actor_critic.ActorCriticAgent`.

    Raises:
        ValueError: a number out of range, or an unknown word.
    """

    def __init__(
        self,
        obs_dim: int,
        act_dim: int,
        low: float | Sequence[float] | np.ndarray,
        high: float | Sequence[float] | np.ndarray,
        *,
        epsilon: float = 1e-2,
        std: float = 0.6,
        final_std: float = 0.1,
        entropy_decay: float = 0.99,
        curvature: str = "gauss-newton",
        expand_at: str = "mean",
        **kwargs: Any,
    ):
        super().__init__(obs_dim, act_dim, low, high, **kwargs)
        if not epsilon > 0 or not std >= final_std > 0 or not 0 <= entropy_decay <= 1:
            raise ValueError(
                f"expected epsilon > 0, std >= final_std > 0 and a decay in [0, 1], got {epsilon}, {std}, {final_std}, {entropy_decay}"
            )
        if curvature not in CURVATURES or expand_at not in {"mean", "sample"}:
            raise ValueError(f"curvature must be one of {CURVATURES} and expand_at 'mean' or 'sample', got {curvature!r} and {expand_at!r}")
        self.epsilon, self.entropy_decay, self.curvature, self.expand_at = epsilon, entropy_decay, curvature, expand_at
        self.final_entropy = act_dim * (math.log(final_std) + 0.5 * math.log(2 * math.pi * math.e))
        self.cov = std**2 * torch.eye(act_dim, device=self.device)
        self.actor = self.actor_net()
        # Piecewise linear units have no curvature, and kinks in the slope.
        self.critic = mlp((obs_dim + act_dim, *self.hidden, 1), nn.Tanh).to(self.device)
        self.target_critic = self.make_target(self.critic)
        self.actor_optimizer, self.critic_optimizer = self.optimise(self.actor), self.optimise(self.critic)
        self.multipliers = (1.0, 1.0)

    def mean(self, obs: Tensor) -> Tensor:
        """The actor's mean, a unit action; cut off and not squashed, because a saturated tanh would hold back the regression."""
        return self.actor(obs).clamp(-1, 1)

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """Actions ``[batch, act_dim]`` in the box: samples, clipped, or the mean."""
        unit = self.mean(self.tensor(obs))
        return self.scale(unit if deterministic else self._sample(unit)).cpu().numpy()

    def expand(self, obs: Tensor, a0: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient ``[batch, d]`` and negative semi-definite curvature ``[batch, d, d]`` of the critic at unit actions `a0`."""
        a0 = a0.detach().requires_grad_()
        exact = self.curvature == "hessian"
        (grad,) = torch.autograd.grad(self.critic(torch.cat((obs, a0), 1)).sum(), a0, create_graph=exact)
        if exact:
            rows = [torch.autograd.grad(grad[:, i].sum(), a0, retain_graph=True)[0] for i in range(self.act_dim)]
            return grad.detach(), negative_definite(torch.stack(rows, 1))
        return grad, -grad.unsqueeze(2) * grad.unsqueeze(1) * (self.curvature == "gauss-newton")

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of Adam for critic and actor, one solved dual, one new covariance."""
        obs = batch["obs"]
        with torch.no_grad():
            after = torch.cat((batch["next_obs"], self._sample(self.mean(batch["next_obs"]))), 1)
            target = batch["returns"] + batch["discounts"] * self.target_critic(after).squeeze(1)
        q = self.critic(torch.cat((obs, self.unscale(batch["actions"])), 1)).squeeze(1)
        critic_loss = 0.5 * (q - target).square().mean()
        self.critic_optimizer.zero_grad()
        critic_loss.backward()
        self.critic_optimizer.step()

        mean = self.actor(obs)
        center, cov = mean.detach().clamp(-1, 1), self.cov.expand(len(obs), -1, -1)
        a0 = center if self.expand_at == "mean" else self._sample(center)
        grad, hess = self.expand(obs, a0)
        entropy = 0.5 * (torch.logdet(self.cov).item() + self.act_dim * math.log(2 * math.pi * math.e))
        kappa = self.final_entropy + self.entropy_decay * (entropy - self.final_entropy)
        eta, omega = self.multipliers = solve_dual(center, cov, grad, hess, a0, self.epsilon, kappa, start=self.multipliers)
        mean_plus, cov_plus = guide_actor(center, cov, grad, hess, a0, eta, omega)
        away = (mean - mean_plus.clamp(-1, 1)).unsqueeze(2)  # [batch, d, 1]
        metric = eta * torch.linalg.inv(self.cov) - hess
        actor_loss = 0.5 * (away.mT @ metric @ away).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()
        self.cov = cov_plus.mean(0)
        self.track()
        return {"critic_loss": critic_loss.item(), "actor_loss": actor_loss.item(), "entropy": entropy, "eta": eta, "omega": omega}

    def _sample(self, mean: Tensor) -> Tensor:
        noise = torch.randn(mean.shape, generator=self.generator).to(self.device)
        return (mean + noise @ torch.linalg.cholesky(self.cov).mT).clamp(-1, 1)


def _factor(
    mean: Tensor, cov: Tensor, grad: Tensor, hess: Tensor, a0: Tensor, eta: float | Tensor, omega: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Cholesky factor of F, the linear term L, Cholesky factor of the covariance."""
    _check_shapes(mean, cov, grad, hess, a0)
    if not (eta > 0 and omega >= 0):
        raise ValueError(f"expected eta > 0 and omega >= 0, got {float(eta)} and {float(omega)}")
    chol_cov, bad_cov = torch.linalg.cholesky_ex(cov)
    precision = torch.cholesky_inverse(chol_cov)
    chol_f, bad_f = torch.linalg.cholesky_ex(eta * precision - hess)
    if bad_cov.any() or bad_f.any():
        raise ValueError("cov and eta cov^-1 - hess must be positive definite; project the Hessian with negative_definite first")
    psi = grad - (hess @ a0.unsqueeze(-1)).squeeze(-1)
    return chol_f, eta * (precision @ mean.unsqueeze(-1)).squeeze(-1) + psi, chol_cov


def _check_shapes(mean: Tensor, cov: Tensor, grad: Tensor, hess: Tensor, a0: Tensor) -> None:
    matrix = (*mean.shape, mean.shape[-1])
    if mean.dim() != 2 or not mean.numel() or grad.shape != mean.shape or a0.shape != mean.shape or not cov.shape == hess.shape == matrix:
        shapes = [tuple(t.shape) for t in (mean, cov, grad, hess, a0)]
        raise ValueError(f"expected mean, grad, a0 [batch, d] and cov, hess [batch, d, d], got {shapes}")
