"""The game of two networks: the critic's steps, then the generator's, over and over."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dlatlas.train import fit, minibatches

__all__ = ["History", "fit_gan"]

Sampler = Callable[[int], Tensor]


@dataclass
class History:
    """What a game reported: the two losses at each step, samples at chosen steps (from the same noise), and the seconds."""

    d: list[float] = field(default_factory=list)
    g: list[float] = field(default_factory=list)
    snapshots: dict[int, Tensor] = field(default_factory=dict)
    seconds: float = 0.0


def fit_gan(
    G: nn.Module,
    D: nn.Module,
    data: Tensor | Sampler,
    d_loss: Callable[[nn.Module, Tensor, Tensor, int], Tensor],
    g_loss: Callable[[nn.Module, Tensor, int], Tensor],
    *,
    steps: int,
    batch: int = 64,
    n_critic: int = 1,
    z_dim: int,
    opt_g: Optimizer,
    opt_d: Optimizer,
    seed: int,
    hooks: Iterable[Callable[[int, nn.Module, nn.Module], object]] = (),
    snapshot_at: Collection[int] = (),
    n_snapshot: int = 64,
    critic_context: Callable[[int], AbstractContextManager] = lambda step: nullcontext(),
) -> History:
    """Let G and D play: in each step `n_critic` updates of D on fresh batches, then one update of G on fresh noise.

    Args:
        G: noise ``[B, z_dim]`` to samples.
        D: whatever the losses call.
        data: real samples ``[N, ...]``, drawn in a new order each epoch, or a function from a number to that many samples.
        d_loss: ``d_loss(D, real, fake, step)``, to be minimised over D; `fake` carries no gradient to G.
        g_loss: ``g_loss(D, fake, step)``, to be minimised over G.
        steps: updates of G.
        batch: samples of each kind.
        n_critic: updates of D before each update of G.
        z_dim: size of the Gaussian noise.
        opt_g: optimizer of G's parameters.
        opt_d: optimizer of D's parameters.
        seed: of noise and batches; two games with one seed see the same ones.
        hooks: called as ``hook(step, G, D)`` after each step.
        snapshot_at: steps after which samples are kept; the same noise each time. Step ``steps - 1`` is the end.
        n_snapshot: samples of a snapshot.
        critic_context: the context manager in which the critic's updates of a step run.

    Raises:
        ValueError: a count below 1.
        FloatingPointError: a loss is NaN or infinite; the message names the step.
    """
    if min(steps, batch, n_critic, z_dim, n_snapshot) < 1:
        raise ValueError(f"counts must be at least 1, got {steps=}, {batch=}, {n_critic=}, {z_dim=}, {n_snapshot=}")
    device = next(G.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    fixed = torch.randn(n_snapshot, z_dim, generator=torch.Generator().manual_seed(seed + 1)).to(device)
    history, hooks = History(), tuple(hooks)
    order = minibatches(len(data), batch, generator) if isinstance(data, Tensor) else None

    def real() -> Tensor:
        return data[next(order)] if order is not None else data(batch)

    def noise() -> Tensor:
        return torch.randn(batch, z_dim, generator=generator).to(device)

    def step(i: int) -> dict[str, Tensor]:
        with critic_context(i):
            for _ in range(n_critic):
                with torch.no_grad():
                    fake = G(noise())
                loss_d = d_loss(D, real(), fake, i)
                opt_d.zero_grad()
                loss_d.backward()
                opt_d.step()
        # The critic's gradients of this pass are never used: without them the backward pass costs a third less.
        frozen = [p for p in D.parameters() if p.requires_grad]
        for p in frozen:
            p.requires_grad_(False)
        try:
            loss_g = g_loss(D, G(noise()), i)
            opt_g.zero_grad()
            loss_g.backward()
            opt_g.step()
        finally:
            for p in frozen:
                p.requires_grad_(True)
        if i in snapshot_at:
            history.snapshots[i] = _samples(G, fixed)
        for hook in hooks:
            hook(i, G, D)
        return {"d": loss_d.detach(), "g": loss_g.detach()}

    record = fit(step, steps)
    history.d, history.g, history.seconds = record["d"].tolist(), record["g"].tolist(), record.seconds
    return history


@torch.no_grad()
def _samples(G: nn.Module, z: Tensor) -> Tensor:
    was_training = G.training
    G.eval()
    try:
        return G(z).cpu()
    finally:
        G.train(was_training)
