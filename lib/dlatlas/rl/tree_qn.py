r"""TreeQN and ATreeC: a value network in the shape of a search tree (farquhar2018treeqn).

A planner looks ahead with a model; a Q-network looks once at the state. TreeQN puts the shape of the first into the second: from the encoding of a state it computes
the encodings that each action leads to, again and again to a fixed depth, predicts a reward on every edge and a value in every node, and backs them up to the root with a soft
maximum. Everything is differentiable, so the whole tree is trained by the loss of Q-learning; the rewards that were really seen on the way are a second loss. ATreeC takes the tree's output as the logits of a policy.

Equations: $z_0 = \mathrm{enc}(s)$, and for action $a$

$$ z^{env} = z + \tanh(W^{env} z), \qquad z_a = z^{env} + \tanh(W_a z^{env}), \qquad z \leftarrow z / \lVert z \rVert_2 \text{ in every node}, $$

$$ Q_l(z, a) = r(z)_a + \gamma\, V^\lambda_{l+1}(z_a), \qquad V^\lambda_l(z) = \begin{cases} V(z) & l = d \\ (1 - \lambda) V(z) + \lambda\, b(Q_l(z, \cdot)) & l < d, \end{cases} \qquad b(q) = \sum_a \mathrm{softmax}(q)_a\, q_a, $$

with $r(z) = W_2 \mathrm{relu}(W_1 z + b_1) + b_2$ and $V(z) = w^\top z + b$. The loss is that of n-step Q-learning plus $\eta_r \sum_l (\hat r_l - r_{t+l})^2$ along the actions that were taken.

Deviations from the paper:

1. The bootstrap of n-step Q-learning is the network that played the segment, not a target network that is copied now and then; Adam in the place of RMSProp.
2. Every segment is learned from in minibatches; the paper makes one step for each batch of 16 environments and 5 steps.
3. Rewards after the end of an episode, or of the segment, are left out of the reward loss.
4. The equations are the paper's; the code that its authors published has a bias in $W^{env}$ and applies $W_a$ to $z$ instead of $z^{env}$.

Measured on box pushing, 6 x 6 with 3 boxes, one run of 60,000 steps for each of the seeds 0, 1, 2: a return of -0.51, -0.42 and -0.42 with a tree of depth 2, -1.08, -1.15 and -1.13 with a flat
network, -1.16, -1.18 and -1.17 at random. Hoped for were runs of 120,000 steps, three for each agent. The tree has learned to stay on the board and not to push: 0.03 to 0.05 boxes on goals an episode, 0.055 at
random. It is the loss of the rewards that teaches it: without it (two runs) -1.09 and -1.11 with depth 2; with it -0.40 and -0.39 with depth 1.

Later work: MuZero (Schrittwieser et al., 2020) plans in a latent space that is trained on rewards, values and policies, with a real search instead of a full tree. Hamrick et al. (2021) find that for such agents most of the gain comes from better
targets while learning and little from looking far ahead. Guez et al. (2019) show that recurrent networks without any built-in model can come to behave as if they planned.

Example:
    import torch
    from torch import nn
    from dlatlas.rl.envs.toy import Chain
    from dlatlas.rl.tree_qn import TreeQN, TreeQNAgent

    tree = TreeQN(nn.Sequential(nn.Linear(6, 32), nn.ReLU()), 32, 2, depth=2)  # in the place of a Q-network
    agent = TreeQNAgent(tree, epsilon=(1.0, 0.1, 3000), lr=5e-3, segment=15, reward_weight=100.0)
    history = agent.fit(Chain(6).batch(16), 16_000)  # six states in a row, the right end pays 1
    first, last = history["return"][:64], history["return"][-64:]
    print(f"return at first {sum(first) / 64:.1f}, in the end {sum(last) / 64:.1f}")
    plan = tree.plan(torch.tensor([[1.0, 1, 1, 1, 0, 0]]))  # two steps from the end
    for name, rewards in (("left", plan["rewards"][1][0, 0]), ("right", plan["rewards"][1][0, 1])):
        print(f"predicted rewards after going {name}: {[round(r, 2) for r in rewards.tolist()]}")
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dlatlas.rl.monte_carlo import NStepQ

__all__ = ["ATreeC", "TreeQN", "TreeQNAgent", "path_rewards", "soft_backup", "tree_backup"]


def soft_backup(q: Tensor) -> Tensor:
    r"""$\sum_a \mathrm{softmax}(q)_a\, q_a$ over the last axis, ``(..., A) -> (...)``: a maximum for differences much larger than 1, the mean for much smaller ones."""
    if q.dim() < 1 or q.shape[-1] < 1:
        raise ValueError(f"q must be (..., A) with at least one action, got {tuple(q.shape)}")
    return (q.softmax(-1) * q).sum(-1)


def tree_backup(rewards: Sequence[Tensor], values: Sequence[Tensor], gamma: float, lam: float) -> Tensor:
    r"""Action values of the root of a tree of depth d, ``(B, A)``.

    Args:
        rewards: level l = 0..d-1 holds the predicted rewards of the edges, ``(B, A^l, A)``.
        values: level l holds the values of the nodes below these edges, ``(B, A^(l+1))``; the child of node i by action a is i*A + a.
        gamma: discount in [0, 1].
        lam: $\lambda$ in [0, 1], weight of the backed-up value against the node's own.

    Raises:
        ValueError: levels of the wrong shape or number, `gamma` or `lam` outside [0, 1].
    """
    if not 0 <= gamma <= 1 or not 0 <= lam <= 1:
        raise ValueError(f"gamma and lam must lie in [0, 1], got {gamma} and {lam}")
    if not rewards or len(rewards) != len(values):
        raise ValueError(f"rewards and values must have the same number of levels, at least one, got {len(rewards)} and {len(values)}")
    count, actions = rewards[0].shape[0], rewards[0].shape[-1]
    for level, (r, v) in enumerate(zip(rewards, values)):
        if r.shape != (count, actions**level, actions) or v.shape != (count, actions ** (level + 1)):
            expected = (count, actions**level, actions), (count, actions ** (level + 1))
            raise ValueError(f"level {level} must have rewards and values of {expected}, got {tuple(r.shape)} and {tuple(v.shape)}")
    backed = values[-1]  # (B, A^d)
    for level in range(len(rewards) - 1, -1, -1):
        q = rewards[level] + gamma * backed.view_as(rewards[level])  # (B, A^l, A)
        if level:
            backed = (1 - lam) * values[level - 1] + lam * soft_backup(q)  # (B, A^l)
    return q[:, 0]


def path_rewards(rewards: Sequence[Tensor], actions: Tensor) -> Tensor:
    """Predicted rewards ``(B, d)`` along the path of the actions ``(B, d)`` through a tree of `rewards` as in `tree_backup`."""
    if actions.dim() != 2 or actions.shape[1] != len(rewards):
        raise ValueError(f"actions must be (B, {len(rewards)}), one for each level, got {tuple(actions.shape)}")
    node, out = torch.zeros_like(actions[:, 0]), []
    for level, r in enumerate(rewards):
        node = node * r.shape[-1] + actions[:, level]  # the edge's place in its level is its child's
        out.append(r.flatten(1).gather(1, node[:, None]))
    return torch.cat(out, 1)


class TreeQN(nn.Module):
    r"""Action values from a tree of predicted states: ``forward(obs (B, ...)) -> Q (B, A)``. It fits wherever a Q-network does.

    Args:
        encoder: ``(B, ...) -> (B, embed_dim)``.
        embed_dim: width of the latent states.
        n_actions: $A$, children of a node.
        depth: $d$, levels; the tree has $A + \dots + A^d$ nodes below the root.
        gamma: discount.
        lam: weight of the backed-up values.
        reward_hidden: hidden units of the reward function.

    Raises:
        ValueError: `depth` below 1, `gamma` or `lam` outside [0, 1].
    """

    def __init__(
        self,
        encoder: nn.Module,
        embed_dim: int,
        n_actions: int,
        depth: int = 2,
        gamma: float = 0.99,
        lam: float = 0.8,
        *,
        reward_hidden: int = 64,
    ):
        super().__init__()
        if int(depth) != depth or depth < 1 or embed_dim < 1 or n_actions < 1:
            raise ValueError(f"depth, embed_dim and n_actions must be positive integers, got {depth}, {embed_dim} and {n_actions}")
        if not 0 <= gamma <= 1 or not 0 <= lam <= 1:
            raise ValueError(f"gamma and lam must lie in [0, 1], got {gamma} and {lam}")
        self.encoder, self.embed_dim, self.n_actions, self.depth, self.gamma, self.lam = encoder, embed_dim, n_actions, depth, gamma, lam
        self.environment = nn.Linear(embed_dim, embed_dim, bias=False)
        self.action = nn.Linear(embed_dim, n_actions * embed_dim, bias=False)  # all W_a at once
        self.reward = nn.Sequential(nn.Linear(embed_dim, reward_hidden), nn.ReLU(), nn.Linear(reward_hidden, n_actions))
        self.value = nn.Linear(embed_dim, 1)

    def step(self, z: Tensor) -> Tensor:
        """States after every action, ``(..., E) -> (..., A, E)``."""
        shared = z + torch.tanh(self.environment(z))
        return F.normalize(shared[..., None, :] + torch.tanh(self.action(shared)).unflatten(-1, (self.n_actions, -1)), dim=-1)

    def encode(self, obs: Tensor) -> Tensor:
        """The root's state ``(B, E)``, of length 1."""
        z = self.encoder(obs)
        if z.shape[1:] != (self.embed_dim,):
            raise ValueError(f"the encoder must give (B, {self.embed_dim}), got {tuple(z.shape)}")
        return F.normalize(z, dim=-1)

    def plan(self, obs: Tensor) -> dict[str, list[Tensor]]:
        """The tree: "rewards" ``[(B, A^l, A)]`` and "values" ``[(B, A^(l+1))]`` for l = 0..d-1, as `tree_backup` takes them."""
        return self._grow(self.encode(obs))

    def forward(self, obs: Tensor) -> Tensor:
        return tree_backup(**self.plan(obs), gamma=self.gamma, lam=self.lam)

    def _grow(self, root: Tensor) -> dict[str, list[Tensor]]:
        z, rewards, values = root[:, None], [], []  # (B, nodes, E)
        for _ in range(self.depth):
            rewards.append(self.reward(z))  # (B, A^l, A)
            z = self.step(z).flatten(1, 2)  # (B, A^(l+1), E), child of i by a at i*A + a
            values.append(self.value(z).squeeze(-1))
        return {"rewards": rewards, "values": values}


class ATreeC(TreeQN):
    """An actor-critic whose policy logits are a tree's action values: ``forward(obs) -> (logits (B, A), value (B,))``.

    The critic is a linear head of its own on the root's state. Arguments of `TreeQN`.
    """

    def __init__(self, encoder: nn.Module, embed_dim: int, n_actions: int, *args, **kwargs):
        super().__init__(encoder, embed_dim, n_actions, *args, **kwargs)
        self.critic = nn.Linear(embed_dim, 1)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        root = self.encode(obs)
        return tree_backup(**self._grow(root), gamma=self.gamma, lam=self.lam), self.critic(root).squeeze(-1)


class TreeQNAgent(NStepQ):
    r"""n-step Q-learning with a tree, and the loss of its rewards along the actions that were taken.

    Args:
        model: the tree.
        n: rewards before the bootstrap.
        reward_weight: $\eta_r$.
        kwargs: those of `NStepQ` but for `network` and `gamma`.

    Raises:
        ValueError: a negative `reward_weight`.
    """

    def __init__(self, model: TreeQN, n: int = 5, *, reward_weight: float = 1.0, **kwargs):
        if not reward_weight >= 0:
            raise ValueError(f"reward_weight must not be negative, got {reward_weight}")
        super().__init__(model.embed_dim, model.n_actions, n, model.gamma, network=model, **kwargs)
        self.reward_weight = reward_weight

    def targets(self, segment: dict[str, Tensor]) -> dict[str, Tensor]:
        """Those of n-step Q-learning, and for each start the next d actions "path", their "rewards" and whether they are "seen", ``(M, d)``."""
        out, keep = super().targets(segment), segment["valid"]
        depth, steps = self.online.depth, len(keep)
        # A step beyond the segment or the episode has no reward to learn from.
        on = keep & ~segment["dones"].bool() & ~segment["truncations"].bool()
        path, rewards, seen = [], [], []
        alive = keep
        for k in range(depth):
            at = (torch.arange(steps) + k).clamp(max=steps - 1)
            inside = (torch.arange(steps) + k < steps).to(keep.device)[:, None]
            alive = alive & inside & keep[at]
            path.append(segment["actions"][at][keep])
            rewards.append(segment["rewards"][at][keep])
            seen.append(alive[keep])
            alive = alive & on[at]
        return out | {"path": torch.stack(path, 1), "rewards": torch.stack(rewards, 1), "seen": torch.stack(seen, 1)}

    def update(self, batch: dict[str, Tensor]) -> dict[str, float]:
        """One step of Adam on both losses; reports "loss" (of Q) and "reward_loss"."""
        plan = self.online.plan(batch["obs"])
        q = tree_backup(**plan, gamma=self.online.gamma, lam=self.online.lam)
        loss = (q.gather(1, batch["actions"][:, None])[:, 0] - batch["targets"]).square().mean()
        error = (path_rewards(plan["rewards"], batch["path"]) - batch["rewards"]).square() * batch["seen"]  # (M, d)
        reward_loss = error.sum(1).mean()
        self.optimizer.zero_grad()
        (loss + self.reward_weight * reward_loss).backward()
        self.optimizer.step()
        return {"loss": loss.item(), "reward_loss": reward_loss.item()}
