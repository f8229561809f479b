r"""The prediction step for adversarial networks (yadav2018prediction).

Two players who update in turn react to each other's past. The prediction step lets the second one react to the first one's *future*: after its
own step the first player is moved on, once more by the same amount, as a guess of where it will be next. The second player computes its
gradient against that guess. Then the first player returns to where its step had taken it.

Equations, for $\min_u \max_v L(u, v)$ with steps $a$ and $b$:

$$ u_{k+1} = u_k - a\, \nabla_u L(u_k, v_k), \qquad \bar u = u_{k+1} + \gamma (u_{k+1} - u_k), \qquad
v_{k+1} = v_k + b\, \nabla_v L(\bar u, v_k), $$

with $\gamma = 1$ in the paper. On a bilinear game $L = u^\top K v$ one iteration is the primal-dual step of
Chambolle and Pock (2011), which converges for $a b \|K\|^2 < 1$.

Deviations from the paper:

1. The player that is predicted is the one whose optimizer is wrapped; the paper predicts the minimiser.
2. Only parameters are moved. Buffers, such as the running statistics of batch normalisation, are as in any other forward pass.

Later work: prediction, optimism and extragradient turned out to be relatives: each evaluates a gradient near where the players will be
(Gidel et al., 2019). The study of Mescheder et al. (2018) shows on a one-line example that plain alternating training does not converge where
regularised training does; gradient penalties and averaging of weights, not prediction, became common practice.

Example:
    import torch
    from dlatlas.gans.prediction import Predicted

    data = torch.randn(2000, 2) + torch.tensor([3.0, -1.0])
    for gamma in (0.0, 1.0):  # 0: plain alternation
        shift = torch.zeros(2, requires_grad=True)  # the generator: noise + shift
        critic = torch.nn.Linear(2, 1, bias=False)
        opt_g = Predicted(torch.optim.SGD([shift], lr=0.1), gamma)  # the method: wrap it ...
        opt_d = torch.optim.SGD(critic.parameters(), lr=0.1)
        for _ in range(1000):
            opt_g.zero_grad()
            (-critic(torch.randn(256, 2) + shift).mean()).backward()
            opt_g.step()
            with opt_g.lookahead():  # ... and let D look ahead
                fake = torch.randn(256, 2) + shift.detach()
            real = data[torch.randint(len(data), (256,))]
            opt_d.zero_grad()
            (critic(fake).mean() - critic(real).mean()).backward()
            opt_d.step()
        error = (shift - data.mean(0)).norm().item()
        print(f"gamma {gamma:.0f}: the generator's mean ends {error:.2f} from that of the data")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

__all__ = ["Predicted"]


class Predicted:
    r"""An optimizer that remembers where its last step began, so that the other player may look ahead.

    >>> opt_g = Predicted(torch.optim.Adam(G.parameters(), 1e-3))
    >>> opt_g.step()
    >>> with opt_g.lookahead():
    ...     loss = d_loss(D, real, G(z).detach())
    >>> loss.backward()

    A schedule of the learning rate takes the inner optimizer, ``StepLR(opt_g.optimizer, 100)``: schedulers ask for a torch `Optimizer`, which this is not.
    The prediction then follows the last step as it was made, with the rate of that step.

    Args:
        optimizer: of the player that is predicted; any torch optimizer.
        gamma: how far ahead, in steps; 0 gives plain alternation.

    Raises:
        ValueError: `gamma` is negative.
    """

    def __init__(self, optimizer: Optimizer, gamma: float = 1.0):
        if not gamma >= 0:
            raise ValueError(f"gamma must not be negative, got {gamma}")
        self.optimizer, self.gamma = optimizer, gamma
        self._before: list[Tensor] | None = None
        self._ahead = False

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of the optimizer."""
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As the optimizer's."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One step of the optimizer, whose start is kept."""
        if self._ahead:
            raise RuntimeError("step() inside lookahead(): the parameters are not where they belong")
        self._before = [p.detach().clone() for p in self._params()]
        return self.optimizer.step(closure)

    @contextmanager
    def lookahead(self) -> Iterator[None]:
        r"""Within the context every parameter is at $\theta_{new} + \gamma (\theta_{new} - \theta_{old})$; then it is put back, bit for bit.

        Buffers are not: a forward pass in training mode within the context updates running statistics of batch normalisation at the predicted
        place, and they stay so.

        Raises:
            RuntimeError: no step has been made, or the context is nested.
        """
        if self._ahead:
            raise RuntimeError("lookahead() inside lookahead()")
        if self._before is None:
            raise RuntimeError("lookahead() before the first step: there is nothing to predict from")
        params = self._params()
        now = [p.detach().clone() for p in params]
        self._ahead = True
        try:
            with torch.no_grad():
                for p, new, old in zip(params, now, self._before):
                    p.add_(new - old, alpha=self.gamma)
            yield
        finally:
            with torch.no_grad():
                for p, new in zip(params, now):
                    p.copy_(new)
            self._ahead = False

    def state_dict(self) -> dict[str, Any]:
        """The optimizer's state, and the start of the last step."""
        return {"optimizer": self.optimizer.state_dict(), "gamma": self.gamma, "before": self._before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self.gamma = state["gamma"]
        before = state["before"]
        self._before = None if before is None else [t.to(p) for t, p in zip(before, self._params(), strict=True)]

    def _params(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]
