r"""Stein control variate: an action-dependent baseline that is paid back (liu2018action).

A baseline that depends on the state alone may be subtracted from the return without changing the mean of the policy gradient. One that
depends on
the action may not: it has a mean of its own. Stein's identity says what that mean is, whenever the action is a smooth function of
the policy's output and of noise: it can be written with the baseline's gradient with respect to the action. So subtract any function of
state and action, and add that gradient back. If the function follows the return closely, what is left to estimate by luck is small.

Equations: for a policy with actions $a = f_\theta(s, \xi)$ and any smooth $\phi(s, a)$

$$ \nabla_\theta J = \mathbb E\big[\nabla_\theta \log \pi_\theta(a|s)\, (Q - \phi(s, a)) + \nabla_\theta f_\theta(s, \xi)\, \nabla_a \phi(s, a)\big] . $$

For a Gaussian with mean $\mu$ and variance $\sigma^2$ in each dimension the two parts of one sample are

$$ g_\mu = \frac{a - \mu}{\sigma^2} (Q - \phi) + \nabla_a \phi, \qquad
g_{\sigma^2} = \frac12 \Big(\frac{(a - \mu)^2}{\sigma^4} - \frac1{\sigma^2}\Big) (Q - \phi) + \frac12 \nabla_a^2 \phi , $$

where the second derivative may be replaced by $\frac{a - \mu}{\sigma^2} \nabla_a \phi$, which has the same mean. The baseline is
$\phi = V(s) + \psi(s, a)$ with $\psi = -(a - \mu_w(s))^\top \Lambda\, (a - \mu_w(s))$ or a network. It is fitted to the returns (FitQ:
minimise $\mathbb E (Q - \phi)^2$) or to the estimator's own size (MinVar: minimise $\mathbb E \lVert g \rVert^2$; the mean of $g$ does not
depend on $\phi$, so this is its variance).

Deviations from the paper:

1. The precision $\Lambda$ of the quadratic baseline is a full positive semi-definite matrix; the paper's is diagonal.
2. The network sees state and action together in its first layer.
3. The baseline is a function of standardised inputs; this changes the fit and not the identity.
4. In PPO (`SteinHooks`) the baseline is fitted to the last segment's samples and applied to the next one's. The surrogate is the
   clipped one instead of a divergence penalty; the term that pays the baseline back is clipped alike, per part of the action, at the same
   share of a standard deviation.

Later work: Tucker et al. (2018) measured where the variance comes from and found that the part that depends on the action is a small share
of it on the usual robot tasks, where the noise of the future rewards dominates. They traced the published gains to choices of the
implementation that bias the gradient: here, fitting the baseline on the samples that it was then applied to; in Q-Prop and IPG, relatives of
this method, normalising the advantages and not the correction term. For policies that can be reparameterised, the same idea is now mostly used
by differentiating a learned critic (as in soft actor-critic).

Example:
    import torch
    from dlatlas.rl.stein_baseline import SteinBaseline, gaussian_stein_gradients

    target, std = torch.randn(10), 0.5 * torch.ones(10)

    def play(n):  # the policy is N(0, 0.25) in each of ten parts of the action
        a = std * torch.randn(n, 10)
        return torch.zeros(n, 1), a, -(a - target).square().sum(1)

    baseline = SteinBaseline(1, 10, hidden=())
    baseline.fit(*play(1000), steps=150, lr=0.05)  # on other samples than those below
    obs, a, r = play(1000)
    mean, none = torch.zeros_like(a), torch.zeros_like(a)
    plain, _ = gaussian_stein_gradients(mean, std, a, r, r.mean().expand(1000), none)
    # The method: subtract a function of the action and pay its slope back.
    ours, _ = gaussian_stein_gradients(mean, std, a, r, baseline.phi(obs, a), baseline.grad(obs, a))
    for name, g in (("mean reward as baseline", plain), ("Stein control variate", ours)):
        error = (g.mean(0) - 2 * target).norm()
        print(f"{name}: variance {g.var(0).sum():.0f}, error of the average {error:.2f}")
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dlatlas.kit.nets import mlp
from dlatlas.rl.kit.pg import Hooks, ppo_loss
from dlatlas.train import fit as train

__all__ = ["SteinBaseline", "SteinHooks", "gaussian_stein_gradients", "stein_surrogate"]


def stein_surrogate(logp: Tensor, actions: Tensor, returns: Tensor, phi: Tensor, grad_a_phi: Tensor) -> Tensor:
    r"""Scalar to maximise whose gradient is the estimator, $\frac1B \sum_b \log\pi(a_b|s_b)\,(R_b - \phi_b) + a_b^\top \nabla_a\phi_b$.

    `returns`, `phi` and `grad_a_phi` are constants; the gradient flows through `logp` and `actions` only.

    Args:
        logp: log-probabilities ``[B]`` of the sampled actions, which count as constants in them.
        actions: the same actions ``[B, d]``, but as a differentiable function $f_\theta(s, \xi)$ of the policy's parameters.
        returns: estimates of the return ``[B]``.
        phi: the baseline ``[B]`` at the sampled actions.
        grad_a_phi: its gradient with respect to the action, ``[B, d]``.

    Raises:
        ValueError: shapes that do not fit, or an empty batch.
    """
    _check(actions, grad_a_phi=(grad_a_phi, 2), logp=(logp, 1), returns=(returns, 1), phi=(phi, 1))
    return (logp * (returns - phi).detach() + (actions * grad_a_phi.detach()).sum(1)).mean()


def gaussian_stein_gradients(
    mean: Tensor, std: Tensor, actions: Tensor, returns: Tensor, phi: Tensor, grad_a_phi: Tensor, hess_diag: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    r"""Each sample's gradient with respect to the mean $\mu$ and the variance $\sigma^2$ of a diagonal Gaussian.

    $g_\mu = \frac{a-\mu}{\sigma^2}(R-\phi) + \nabla_a\phi$ and
    $g_{\sigma^2} = \frac12\big(\frac{(a-\mu)^2}{\sigma^4} - \frac1{\sigma^2}\big)(R-\phi) + \frac12\nabla_a^2\phi$.

    Args:
        mean: ``[B, d]``.
        std: standard deviations ``[d]``.
        actions: sampled actions ``[B, d]``.
        returns: ``[B]``.
        phi: the baseline at the actions, ``[B]``.
        grad_a_phi: its gradient ``[B, d]``.
        hess_diag: its second derivatives ``[B, d]``; without them $\frac{a-\mu}{\sigma^2}\nabla_a\phi$ stands in.

    Returns:
        ``g_mean [B, d]`` and ``g_var [B, d]``.

    Raises:
        ValueError: shapes that do not fit, an empty batch or a standard deviation that is not positive.
    """
    more = {} if hess_diag is None else {"hess_diag": (hess_diag, 2)}
    _check(actions, mean=(mean, 2), grad_a_phi=(grad_a_phi, 2), returns=(returns, 1), phi=(phi, 1), **more)
    if std.shape != actions.shape[1:] or not bool((std > 0).all()):
        raise ValueError(f"std must hold {actions.shape[1]} positive numbers, got shape {tuple(std.shape)}, smallest {float(std.min()):g}")
    var = std.square()
    score = (actions - mean) / var  # [B, d]
    rest = (returns - phi).unsqueeze(1)  # [B, 1]
    curvature = score * grad_a_phi if hess_diag is None else hess_diag
    return score * rest + grad_a_phi, 0.5 * ((score.square() - 1 / var) * rest + curvature)


class SteinBaseline(nn.Module):
    r"""Baseline $\phi(s, a) = V(s) + \psi(s, a)$ with a quadratic or a network for $\psi$.

    Fit it on other samples than those it is subtracted from: fitted on the same ones, it knows the noise in them, and the estimator is
        biased.

    Args:
        obs_dim: size of a state.
        act_dim: size of an action.
        kind: ``"quadratic"`` or ``"mlp"``.
        hidden: widths of the hidden layers of all networks; an empty sequence makes them affine.

    Raises:
        ValueError: an unknown `kind` or a size below 1.
    """

    def __init__(self, obs_dim: int, act_dim: int, kind: str = "quadratic", *, hidden: Sequence[int] = (32, 32)):
        super().__init__()
        if kind not in ("quadratic", "mlp") or obs_dim < 1 or act_dim < 1:
            raise ValueError(f"kind must be 'quadratic' or 'mlp' and sizes positive, got {kind!r}, {obs_dim} and {act_dim}")
        self.obs_dim, self.act_dim, self.kind = obs_dim, act_dim, kind
        self.value = mlp([obs_dim, *hidden, 1], nn.Tanh)
        if kind == "quadratic":
            self.centre = mlp([obs_dim, *hidden, act_dim], nn.Tanh)
            self.factor = nn.Parameter(0.1 * torch.eye(act_dim))  # Lambda = factor factor^T
        else:
            self.psi = mlp([obs_dim + act_dim, *hidden, 1], nn.Tanh)
        for name, size in (("obs", obs_dim), ("act", act_dim), ("out", 1)):
            self.register_buffer(f"{name}_shift", torch.zeros(size))
            self.register_buffer(f"{name}_scale", torch.ones(size))
        self.register_buffer("scaled", torch.tensor(False))  # new units would make the function jump: the first fit sets them

    def forward(self, obs: Tensor, a: Tensor) -> Tensor:
        """The baseline ``[B]``, differentiable."""
        s, u = (obs - self.obs_shift) / self.obs_scale, (a - self.act_shift) / self.act_scale
        if self.kind == "quadratic":
            psi = -((u - self.centre(s)) @ self.factor).square().sum(1)
        else:
            psi = self.psi(torch.cat([s, u], 1)).squeeze(1)
        return self.out_shift + self.out_scale * (self.value(s).squeeze(1) + psi)

    def phi(self, obs: Tensor, a: Tensor) -> Tensor:
        """The baseline ``[B]`` as a constant."""
        self._inputs(obs, a)
        with torch.no_grad():
            return self(obs, a)

    def grad(self, obs: Tensor, a: Tensor) -> Tensor:
        """Its gradient with respect to the action, ``[B, d]``, as a constant."""
        self._inputs(obs, a)
        with torch.enable_grad():
            a = a.detach().requires_grad_()
            return torch.autograd.grad(self(obs.detach(), a).sum(), a)[0]

    def fit(
        self,
        obs: Tensor,
        actions: Tensor,
        returns: Tensor,
        objective: str = "fitq",
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        steps: int = 300,
        lr: float = 1e-2,
    ) -> list[float]:
        r"""Fit the baseline; a second call goes on where the first stopped, in the units of the first one's samples.

        Args:
            obs: states ``[B, s]``.
            actions: actions ``[B, d]``.
            returns: estimates of the return ``[B]``.
            objective: ``"fitq"`` for $\mathbb E(R - \phi)^2$ or ``"minvar"`` for $\mathbb E\lVert g\rVert^2$ over both Gaussian gradients.
            mean: the policy's means ``[B, d]``; needed by ``"minvar"``.
            std: its standard deviations ``[d]``; needed by ``"minvar"``.
            steps: steps of Adam on the whole batch.
            lr: Adam's learning rate.

        Returns:
            The loss at every step, in units of the variance of these returns (``"fitq"``) or of the gradient without a baseline
            (``"minvar"``).

        Raises:
            ValueError: shapes that do not fit, fewer than two samples, an unknown objective, or ``"minvar"`` without the policy.
        """
        self._inputs(obs, actions)
        if returns.shape != actions.shape[:1] or len(returns) < 2:
            raise ValueError(f"returns must have shape ({len(actions)},) and two entries or more, got {tuple(returns.shape)}")
        if objective not in ("fitq", "minvar"):
            raise ValueError(f"objective must be 'fitq' or 'minvar', got {objective!r}")
        if objective == "minvar" and (mean is None or std is None):
            raise ValueError("objective 'minvar' needs the policy's mean= and std=")
        obs, actions, returns = obs.detach(), actions.detach(), returns.detach()
        if not bool(self.scaled):
            for name, x in (("obs", obs), ("act", actions), ("out", returns.unsqueeze(1))):
                getattr(self, f"{name}_shift").copy_(x.mean(0))
                getattr(self, f"{name}_scale").copy_(_spread(x))
            self.scaled.fill_(True)
        unit = _spread(returns).square()
        if objective == "minvar":
            unit = _size(
                mean.detach(), std.detach(), actions, returns - returns.mean(), torch.zeros_like(returns), torch.zeros_like(actions)
            )
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)

        def step(i: int) -> Tensor:
            if objective == "fitq":
                loss = (returns - self(obs, actions)).square().mean()
            else:
                a = actions.requires_grad_()
                phi = self(obs, a)
                grad = torch.autograd.grad(phi.sum(), a, create_graph=True)[0]
                loss = _size(mean.detach(), std.detach(), a.detach(), returns, phi, grad)
            loss = loss / unit
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            return loss.detach()

        with torch.enable_grad():
            return train(step, steps)["loss"].tolist()

    def _inputs(self, obs: Tensor, a: Tensor) -> None:
        if obs.dim() != 2 or a.dim() != 2 or obs.shape[1] != self.obs_dim or a.shape[1] != self.act_dim or len(obs) != len(a):
            expected = f"obs [B, {self.obs_dim}] and actions [B, {self.act_dim}]"
            raise ValueError(f"expected {expected}, got {tuple(obs.shape)} and {tuple(a.shape)}")


class SteinHooks(Hooks):
    r"""PPO with a Stein control variate, for ``ppo(..., hooks=SteinHooks(...))`` and Gaussian policies.

    After each segment the baseline is evaluated as it was fitted on *earlier* segments, subtracted from the advantages, and only then
    fitted to this one. Advantages and $\nabla_a \phi$ are divided by the same number, so that normalising does not break the identity.

    Args:
        baseline: the control variate for advantages.
        steps: steps of each fit.
        lr: learning rate of each fit.

    Attributes:
        explained: for each segment, the share of the advantages' variance that the baseline removed; negative where it added some.
    """

    def __init__(self, baseline: SteinBaseline, *, steps: int = 40, lr: float = 3e-3):
        self.baseline, self.steps, self.lr = baseline, steps, lr
        self.fitted, self.explained = False, []

    def after_rollout(self, policy: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            dist = policy.distribution(batch["obs"])
        obs, actions, adv = batch["obs"], batch["actions"], batch["adv"]
        phi, grad = torch.zeros_like(adv), torch.zeros_like(actions)
        if self.fitted:
            phi, grad = self.baseline.phi(obs, actions), self.baseline.grad(obs, actions)
        rest = adv - phi
        self.explained.append(float(1 - rest.var() / adv.var()))
        scale = rest.std() + 1e-8
        self.baseline.fit(obs, actions, adv, steps=self.steps, lr=self.lr)
        self.fitted = True
        noise = (actions - dist.mean) / dist.stddev
        return {**batch, "adv": (rest - rest.mean()) / scale, "grad_phi": grad / scale, "noise": noise, "old_std": dist.stddev}

    def policy_loss(
        self, policy: nn.Module, batch: dict[str, Tensor], dist: torch.distributions.Distribution, clip: float | None
    ) -> Tensor:
        if clip is None:
            moving = dist.mean + dist.stddev * batch["noise"]
            return -stein_surrogate(
                dist.log_prob(batch["actions"]), moving, batch["adv"], torch.zeros_like(batch["adv"]), batch["grad_phi"]
            )
        loss = ppo_loss((dist.log_prob(batch["actions"]) - batch["logp"]).exp(), batch["adv"], clip)
        moved = dist.mean + dist.stddev * batch["noise"] - batch["actions"]  # zero under the old policy
        bound = clip * batch["old_std"]
        gain = torch.minimum(batch["grad_phi"] * moved, batch["grad_phi"] * moved.clamp(-bound, bound))
        return loss - gain.sum(1).mean()


def _spread(x: Tensor) -> Tensor:
    """Standard deviation; a column that never changes carries nothing and keeps its unit."""
    spread = x.std(0)
    return torch.where(spread > 1e-6, spread, 1.0)


def _size(mean: Tensor, std: Tensor, actions: Tensor, returns: Tensor, phi: Tensor, grad: Tensor) -> Tensor:
    """Mean squared length of both gradients together."""
    g_mean, g_var = gaussian_stein_gradients(mean, std, actions, returns, phi, grad)
    return g_mean.square().sum(1).mean() + g_var.square().sum(1).mean()


def _check(actions: Tensor, **tensors: tuple[Tensor, int]) -> None:
    """All tensors have the shape of the actions ``[B, d]`` or its first part ``[B]``."""
    if actions.dim() != 2 or len(actions) == 0:
        raise ValueError(f"actions must have shape [B, d] with B >= 1, got {tuple(actions.shape)}")
    for name, (x, dims) in tensors.items():
        if x.shape != actions.shape[:dims]:
            raise ValueError(f"{name} must have shape {tuple(actions.shape[:dims])}, got {tuple(x.shape)}")
