"""The policy optimisers under the on-policy papers: A2C, PPO and the trust-region step, with hooks for what a paper changes."""

from __future__ import annotations

from collections.abc import Callable

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from dlatlas.kit.flat import flat_grad, flat_params, set_flat_params
from dlatlas.rl.kit.nets import ActorCritic
from dlatlas.rl.kit.returns import gae
from dlatlas.rl.kit.rollout import SameStep, Source, as_vector, collect

__all__ = ["Hooks", "a2c", "conjugate_gradient", "ppo", "ppo_loss", "trpo_step"]


def ppo_loss(ratio: Tensor, adv: Tensor, clip: float = 0.2) -> Tensor:
    r"""The clipped surrogate, to be minimised: $-\text{mean} \min(r A, \text{clip}(r, 1-\epsilon, 1+\epsilon) A)$.

    Args:
        ratio: probabilities of the actions under the new policy over those under the old ``(B,)``, or another shape that broadcasts with `adv`.
        adv: advantages.
        clip: epsilon, positive.
    """
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")
    adv = adv.detach()
    return -torch.minimum(ratio * adv, ratio.clamp(1 - clip, 1 + clip) * adv).mean()


class Hooks:
    """Where a paper changes A2C or PPO: subclass and override; the defaults are the plain methods.

    A batch holds flat rows ``(N, ...)``: obs, actions, logp (of the policy that acted), values, returns (the targets of the value network), adv
    and next_obs. `after_rollout` gets it before the advantages are normalised.
    """

    def after_rollout(self, policy: ActorCritic, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Called once a segment; fit a baseline here, change advantages or add arrays with N rows."""
        return batch

    def policy_loss(self, policy: ActorCritic, batch: dict[str, Tensor], dist: Distribution, clip: float | None) -> Tensor:
        """The loss of the policy on a minibatch: clipped surrogate, or with ``clip=None`` (A2C) the plain policy gradient."""
        logp = dist.log_prob(batch["actions"])
        if clip is None:
            return -(logp * batch["adv"]).mean()
        return ppo_loss((logp - batch["logp"]).exp(), batch["adv"], clip)


def ppo(
    env_fn: Source,
    steps: int,
    *,
    policy: ActorCritic | None = None,
    n_envs: int = 8,
    horizon: int = 128,
    epochs: int = 4,
    minibatches: int = 4,
    gamma: float = 0.99,
    lam: float = 0.95,
    clip: float | None = 0.2,
    lr: float = 3e-4,
    entropy: float = 0.0,
    value_coef: float = 0.5,
    max_grad_norm: float = 0.5,
    normalise: bool = True,
    reward_scale: float = 1.0,
    seed: int = 0,
    hooks: Hooks | None = None,
    callback: Callable[[ActorCritic, dict[str, list]], bool | None] | None = None,
) -> tuple[ActorCritic, dict[str, list]]:
    r"""Proximal policy optimisation on `n_envs` copies: segments, generalised advantages, several epochs of minibatches.

    $$L = L_\text{policy} + c_v\, \text{mean}\, (V(s) - G)^2 - c_e\, \text{mean}\, H(\pi(\cdot|s)).$$

    Args:
        env_fn: an id, a class or a function that makes an environment, or a vector environment.
        steps: transitions over all copies; the last segment may end a little later.
        policy: the network to train, in place; default a new `ActorCritic` (tanh, 64, 64) for the environment's spaces, drawn from `seed`.
        n_envs: copies, where copies can be made.
        horizon: steps of a segment.
        epochs, minibatches: passes over a segment and parts of a pass.
        gamma, lam: discount and trace of the advantages.
        clip: of the surrogate; None is the plain policy gradient.
        lr: Adam's learning rate.
        entropy, value_coef: weights of the entropy bonus and of the value loss.
        max_grad_norm: clip of the gradient's norm.
        normalise: advantages of a segment get mean 0 and standard deviation 1.
        reward_scale: factor on the rewards that are learned from; the history reports unscaled returns.
        seed: seed of everything; torch's global generator is seeded inside and left as it was.
        hooks: what a paper changes.
        callback: called after every segment with the policy and the history; True ends the training.

    Returns:
        The policy and the history: "step" (transitions so far) and "return" of finished episodes; "update" (transitions so far), "policy_loss",
        "value_loss", "entropy" and "kl" (old to new, sampled) of every segment.
    """
    for name, value in (("steps", steps), ("horizon", horizon), ("epochs", epochs), ("minibatches", minibatches)):
        if int(value) != value or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value}")
    vec, hooks = as_vector(env_fn, n_envs), Hooks() if hooks is None else hooks
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        policy = _policy_for(vec) if policy is None else policy
        optimizer = torch.optim.Adam(policy.parameters(), lr=lr, eps=1e-5, fused=True)
        parameters = list(policy.parameters())
        history: dict[str, list] = {name: [] for name in ("step", "return", "update", "policy_loss", "value_loss", "entropy", "kl")}
        vec.reset(seed=seed)
        vec.running_returns = np.zeros(vec.num_envs)
        made = 0
        while made < steps:
            segment = collect(policy, vec, horizon, generator)
            valid = segment["valid"]
            made += int(valid.sum())
            episodes = segment["episode_returns"].tolist()
            history["step"] += [made] * len(episodes)
            history["return"] += episodes
            adv = gae(
                segment["rewards"] * reward_scale,
                segment["values"],
                segment["dones"],
                gamma,
                lam,
                truncations=segment["truncations"],
                next_values=segment["next_values"],
            )
            rows = {name: segment[name][valid] for name in ("obs", "next_obs", "actions", "logp")}
            rows |= {"adv": adv[valid], "values": segment["values"][:-1][valid], "returns": (adv + segment["values"][:-1])[valid]}
            rows = hooks.after_rollout(policy, rows)
            if normalise:
                rows["adv"] = (rows["adv"] - rows["adv"].mean()) / (rows["adv"].std() + 1e-8)
            sums, parts = np.zeros(4), 0
            for _ in range(epochs):
                for idx in torch.randperm(len(rows["adv"]), generator=generator).chunk(minibatches):
                    batch = {name: x[idx] for name, x in rows.items()}
                    dist, values = policy(batch["obs"])
                    policy_loss = hooks.policy_loss(policy, batch, dist, clip)
                    value_loss = (values - batch["returns"]).pow(2).mean()
                    spread = dist.entropy().mean()
                    optimizer.zero_grad()
                    (policy_loss + value_coef * value_loss - entropy * spread).backward()
                    nn.utils.clip_grad_norm_(parameters, max_grad_norm)
                    optimizer.step()
                    with torch.no_grad():
                        log_ratio = dist.log_prob(batch["actions"]) - batch["logp"]
                        kl = (log_ratio.exp() - 1 - log_ratio).mean()
                    sums += [policy_loss.item(), value_loss.item(), spread.item(), kl.item()]
                    parts += 1
            history["update"].append(made)
            for name, value in zip(("policy_loss", "value_loss", "entropy", "kl"), sums / parts):
                history[name].append(float(value))
            if callback is not None and callback(policy, history):
                break
    return policy, history


def a2c(env_fn: Source, steps: int, *, horizon: int = 16, lr: float = 1e-3, lam: float = 1.0, normalise: bool = False, **kwargs):
    """Advantage actor-critic: one plain policy-gradient step a segment. Arguments and results are those of :func:`ppo`."""
    for name in ("epochs", "minibatches", "clip"):
        if name in kwargs:
            raise ValueError(f"a2c takes one unclipped step a segment; {name} belongs to ppo")
    return ppo(env_fn, steps, horizon=horizon, epochs=1, minibatches=1, clip=None, lr=lr, lam=lam, normalise=normalise, **kwargs)


def trpo_step(
    policy: nn.Module,
    surrogate: Callable[[], Tensor],
    kl: Callable[[], Tensor],
    max_kl: float = 0.01,
    cg_iters: int = 10,
    damping: float = 0.1,
) -> dict[str, float | bool]:
    r"""One natural-gradient step inside a trust region, in place.

    With g the gradient of the surrogate and F the Hessian of the divergence at the old parameters (the Fisher matrix), it tries
    $\theta + \beta^j \sqrt{2 \epsilon / (x^\top F x)}\, x$, $x \approx (F + c I)^{-1} g$, with $\beta = 1/2$ and j = 0, 1, ..., 10. The first step with a divergence of at most
    $1.5\epsilon$ and a larger surrogate is taken; if there is none, the parameters stay.

    Args:
        policy: its parameters that require a gradient are changed.
        surrogate: the objective to MAXIMISE, a scalar of the current parameters, for example the mean of ratio times advantage.
        kl: mean divergence from the old policy (held constant by the caller) to the current one, zero at the old parameters.
        max_kl: epsilon.
        cg_iters: steps of conjugate gradients.
        damping: c.

    Returns:
        "accepted", "kl" (of the step taken), "improvement" (of the surrogate) and "halvings".
    """
    if not max_kl > 0 or cg_iters < 1 or not damping >= 0:
        raise ValueError(f"max_kl and cg_iters must be positive and damping not negative, got {max_kl}, {cg_iters} and {damping}")
    holder = nn.ParameterList(p for p in policy.parameters() if p.requires_grad)
    parameters = list(holder)
    before = surrogate()
    gradient = flat_grad(before, parameters)
    refused = {"accepted": False, "kl": 0.0, "improvement": 0.0, "halvings": 10}
    if not torch.isfinite(gradient).all():
        raise ValueError("the gradient of the surrogate is not finite")
    if not gradient.any():
        return refused
    kl_gradient = flat_grad(kl(), parameters, create_graph=True)

    def fisher(v: Tensor) -> Tensor:
        product = torch.autograd.grad(kl_gradient @ v, parameters, retain_graph=True, allow_unused=True)
        return torch.cat([(torch.zeros_like(p) if h is None else h).reshape(-1) for p, h in zip(parameters, product)])

    direction = conjugate_gradient(lambda v: fisher(v) + damping * v, gradient, cg_iters)
    curvature = direction @ fisher(direction)
    if not curvature > 0:
        # The divergence does not change along the direction; the damped metric still bounds the step.
        curvature = direction @ gradient
    full = (2 * max_kl / curvature).sqrt() * direction
    old, before = flat_params(holder), before.item()
    for halvings in range(11):
        set_flat_params(holder, old + 0.5**halvings * full)
        with torch.no_grad():
            divergence, gain = float(kl()), float(surrogate()) - before
        if divergence <= 1.5 * max_kl and gain > 0:
            return {"accepted": True, "kl": divergence, "improvement": gain, "halvings": halvings}
    set_flat_params(holder, old)
    return refused


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, iters: int = 10, tol: float = 1e-10) -> Tensor:
    """Approximate solution x of A x = b for a positive definite A that is known by ``product(v) = A v``; stops at a relative squared residual `tol`."""
    x, r, p, rr = torch.zeros_like(b), b.clone(), b.clone(), b @ b
    for _ in range(iters):
        if rr <= tol * (b @ b):
            break
        ap = product(p)
        alpha = rr / (p @ ap)
        x, r = x + alpha * p, r - alpha * ap
        new = r @ r
        p, rr = r + new / rr * p, new
    return x


def _policy_for(vec: SameStep) -> ActorCritic:
    space, action = vec.single_observation_space, vec.single_action_space
    if not isinstance(space, gymnasium.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"the observations must be a flat Box, got {space}; give a policy for others")
    if isinstance(action, gymnasium.spaces.Discrete):
        return ActorCritic(space.shape[0], n_actions=int(action.n))
    if isinstance(action, gymnasium.spaces.Box) and len(action.shape) == 1:
        return ActorCritic(space.shape[0], act_dim=action.shape[0])
    raise ValueError(f"the actions must be Discrete or a flat Box, got {action}")
