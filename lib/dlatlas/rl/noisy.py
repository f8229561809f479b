r"""NoisyNet: exploration from learned noise on the weights (fortunato2018noisy).

An epsilon-greedy agent is random at the same rate everywhere, however sure it already is. A noisy layer adds random numbers to its weights and *learns their
size* by the gradient of the ordinary loss: where noise makes the values wrong it is unlearned, where nothing is known yet it stays. New noise for every
decision gives exploration that depends on the state, and no schedule has to be chosen.

Equations: with noise $\varepsilon$ of mean 0, drawn anew again and again,

$$ y = (\mu^w + \sigma^w \odot \varepsilon^w)\, x + \mu^b + \sigma^b \odot \varepsilon^b . $$

Factorised noise needs one number for each input and each output: with $f(e) = \mathrm{sgn}(e) \sqrt{|e|}$ of standard normal $e$,

$$ \varepsilon^w_{ij} = f(e_i)\, f(e_j), \qquad \varepsilon^b_i = f(e_i), \qquad \mathrm{Var}(\varepsilon^w_{ij}) = (E|e|)^2 = 2/\pi . $$

For $p$ inputs $\mu$ starts uniform in $\pm 1/\sqrt p$ and $\sigma = \sigma_0 / \sqrt p$; with independent noise $\mu$ starts uniform in $\pm\sqrt{3/p}$ and $\sigma = 0.017$. The loss of the
noisy Q-network takes its samples of noise independently,

$$ L = E_{\varepsilon, \varepsilon', \varepsilon''} \Big[ r + \gamma\, Q'\big(s', \arg\max_b Q(s', b, \varepsilon''), \varepsilon'\big) - Q(s, a, \varepsilon) \Big]^2 , $$

$\varepsilon'$ for the target network, $\varepsilon''$ for the choice of the next action.

Deviations from the paper:

1. Parallel copies of the environment get a sample of noise each (`reset_noise(rows=...)`), so that they do not all deviate in the same way.
2. Every linear layer is noisy; the paper's agents keep their convolutions plain.
3. For independent noise `sigma0` scales the paper's 0.017, which is meant by the default 0.5.
4. The next action is chosen by the online network (double Q-learning) unless `double=False`; the paper does so for its dueling agent only.

Measured on the chain, three runs for each of the seeds 0, 1, 2: with 12 states the noisy agent solves 3, 3 and 3 of them within 600 episodes, without noise 0, 1 and 0 are solved (hoped for: none ever). With 20 states and 1000 episodes
it solves 3, 2 and 3, an epsilon-greedy agent 0, 0 and 1.

Later work: noisy layers are one of the six parts of Rainbow (Hessel et al., 2018). Taiga et al. (2020) compare methods of exploration over many Atari games: bonuses for novelty help on Montezuma's Revenge, and elsewhere epsilon-greedy or noise
do as well or better. The gradient may also shrink $\sigma$ before any reward was seen: the loss does not know that exploration is wanted.

Example:
    import torch
    from torch import nn
    from dlatlas.rl.noisy import NoisyLinear

    model = nn.Sequential(NoisyLinear(2, 64), nn.ReLU(), NoisyLinear(64, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = torch.rand(256, 2) * torch.tensor([1.0, 0.0])  # the second input is never seen to vary
    for step in range(300):
        for layer in model[::2]:
            layer.reset_noise()
        loss = (model(x) - x[:, :1]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen, unseen = model[0].weight_sigma.abs().mean(0).tolist()
    print(f"noise left on the input that was seen {seen:.2f}, on the other one {unseen:.2f}")
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlatlas.rl.kit.value_agent import DQN

__all__ = ["NoisyDQN", "NoisyLinear"]


class NoisyLinear(nn.Module):
    r"""A linear layer with learned noise, $y = (\mu^w + \sigma^w \odot \varepsilon^w) x + \mu^b + \sigma^b \odot \varepsilon^b$.

    In training mode it uses the noise drawn last (at first the one drawn when it was made), in evaluation mode the means alone. New noise never changes the graph of
    an earlier forward pass. The state dict holds the four parameters and no noise.

    Args:
        in_features: $p$, width of the input.
        out_features: width of the output.
        bias: with $\mu^b$ and $\sigma^b$.
        sigma0: initial noise, $\sigma = \sigma_0 / \sqrt p$; with independent noise $\sigma = 0.017\, \sigma_0 / 0.5$.
        factorised: one number for each input and each output instead of one for each weight.
        device, dtype: of the parameters.

    Raises:
        ValueError: a width below 1 or a negative `sigma0`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        sigma0: float = 0.5,
        factorised: bool = True,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()
        if in_features < 1 or out_features < 1 or not 0 <= sigma0 < math.inf:
            raise ValueError(f"widths must be at least 1 and sigma0 >= 0, got {in_features}, {out_features} and sigma0={sigma0}")
        self.in_features, self.out_features, self.sigma0, self.factorised = in_features, out_features, sigma0, factorised
        for name, shape in (("weight", (out_features, in_features)), ("bias", (out_features,))):
            for kind in ("mu", "sigma"):
                value = nn.Parameter(torch.empty(shape, device=device, dtype=dtype)) if bias or name == "weight" else None
                self.register_parameter(f"{name}_{kind}", value)
        self.reset_parameters()
        self.reset_noise()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Means and sizes as at the start."""
        bound = 1 / math.sqrt(self.in_features) if self.factorised else math.sqrt(3 / self.in_features)
        sigma = self.sigma0 / math.sqrt(self.in_features) if self.factorised else 0.017 * self.sigma0 / 0.5
        for mu, size in ((self.weight_mu, self.weight_sigma), (self.bias_mu, self.bias_sigma)):
            if mu is not None:
                mu.uniform_(-bound, bound)
                size.fill_(sigma)

    def reset_noise(self, generator: torch.Generator | None = None, *, rows: int | None = None) -> None:
        """Draw new noise: one sample for the whole batch, or with `rows` one for each row of a batch ``(rows, in_features)``."""
        lead = () if rows is None else (rows,)
        if self.factorised:
            inputs, outputs = (_root(self._normal((*lead, n), generator)) for n in (self.in_features, self.out_features))
            self.noise = (inputs, outputs)  # new tensors: what an earlier graph saved stays as it was
        else:
            self.noise = tuple(self._normal((*lead, self.out_features, *n), generator) for n in ((self.in_features,), ()))

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight_mu, self.bias_mu)  # (..., out)
        if not self.training:
            return y
        first, second = (e.to(y) for e in self.noise)
        if self.factorised:  # sigma * (f_out f_in^T) applied to x is f_out * (sigma applied to f_in * x): no (out, in) noise is formed
            return y + second * F.linear(first * x, self.weight_sigma, self.bias_sigma)
        y = y + torch.einsum("...oi,...i->...o", self.weight_sigma * first, x)
        return y if self.bias_sigma is None else y + self.bias_sigma * second

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, bias={self.bias_mu is not None}, sigma0={self.sigma0}, factorised={self.factorised}"
        )

    def _normal(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        device = self.weight_mu.device if generator is None else generator.device
        return torch.randn(shape, generator=generator, device=device, dtype=self.weight_mu.dtype).to(self.weight_mu.device)


class NoisyDQN(DQN):
    r"""A Q-network of noisy layers that acts greedily on a sample of itself; there is no epsilon.

    Noise is drawn anew for every decision (for each copy of the environment its own), and for every update three times: for the values, for the
    target network and for the choice of the next action. Deterministic actions use the means.

    Args:
        obs_dim: width of flat observations.
        n_actions: number of actions.
        hidden: widths of the hidden layers.
        sigma0: initial noise; with 0 there is none and none is learned, which leaves a greedy agent.
        factorised: kind of noise, see `NoisyLinear`.
        zero_head: start the means of the last layer at zero.
        kwargs: those of `DQN` but for `network`, `layer_norm` and `epsilon`.

    Attributes:
        layers: the noisy layers of the online network.
    """

    def __init__(
        self,
        obs_dim: int,
        n_actions: int,
        *,
        hidden: Sequence[int] = (64, 64),
        sigma0: float = 0.5,
        factorised: bool = True,
        zero_head: bool = False,
        **kwargs,
    ):
        sizes = (obs_dim, *hidden, n_actions)
        layers = [NoisyLinear(p, q, sigma0=sigma0, factorised=factorised) for p, q in itertools.pairwise(sizes)]
        if zero_head:
            nn.init.zeros_(layers[-1].weight_mu)
            nn.init.zeros_(layers[-1].bias_mu)
        if sigma0 == 0:
            for layer in layers:
                layer.weight_sigma.requires_grad_(False)
                layer.bias_sigma.requires_grad_(False)
        network = nn.Sequential(nn.Flatten(), *[m for layer in layers for m in (layer, nn.ReLU())][:-1])
        super().__init__(obs_dim, n_actions, network=network, epsilon=(0.0, 0.0, 0), **kwargs)
        self.layers = layers
        self._target_layers = [m for m in self.target.modules() if isinstance(m, NoisyLinear)]

    def noise_level(self, layer: int = -1) -> float:
        """Mean of $|\\sigma^w|$ of one layer of the online network, by default the last."""
        return float(self.layers[layer].weight_sigma.detach().abs().mean())

    @torch.no_grad()
    def act(self, obs: np.ndarray | Tensor, deterministic: bool = False) -> np.ndarray:
        """The best actions ``(B,)`` of a noisy sample for each row; `deterministic`: of the means. Ties go to the lowest."""
        x, kept = self.tensor(obs), [layer.noise for layer in self.layers]
        if deterministic:
            self.online.eval()
        else:
            self._draw(self.layers, len(x))
        actions = self.q_values(x).argmax(-1).cpu().numpy()
        self.online.train()
        for layer, noise in zip(self.layers, kept):  # noise for these rows would not fit another batch
            layer.noise = noise
        return actions

    def td_errors(self, batch: dict[str, Tensor]) -> Tensor:
        """Value minus target ``(B,)``, each of the three networks with noise of its own; the gradient flows through the value only."""
        with torch.no_grad():
            self._draw(self._target_layers)
            after = best = self.target(batch["next_obs"])  # (B, A)
            if self.double:
                self._draw(self.layers)
                best = self.online(batch["next_obs"])
            goal = batch["returns"] + batch["discounts"] * after.gather(1, best.argmax(1, keepdim=True)).squeeze(1)
        self._draw(self.layers)
        return self.online(batch["obs"]).gather(1, batch["actions"][:, None]).squeeze(1) - goal

    def _draw(self, layers: list[NoisyLinear], rows: int | None = None) -> None:
        for layer in layers:
            layer.reset_noise(self.generator, rows=rows)


def _root(x: Tensor) -> Tensor:
    """$f(x) = \\mathrm{sgn}(x) \\sqrt{|x|}$."""
    return x.sign() * x.abs().sqrt()
