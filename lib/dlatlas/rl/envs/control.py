r"""Continuous control in closed form: the pendulum of gymnasium, many copies at a time.

An angle $\theta$ (0 is upright) and its speed $\omega$ follow

$$
\omega' = \mathrm{clip}\bigl(\omega + (\tfrac{3g}{2l}\sin\theta + \tfrac{3}{ml^2}u)\,\Delta t,\ \pm 8\bigr),\qquad
\theta' = \theta + \omega'\,\Delta t,
$$

with torque $u \in [-2, 2]$, $\Delta t = 0.05$, $m = l = 1$; the reward is $-(\theta^2 + 0.1\,\omega^2 + 0.001\,u^2)$ with the angle of the
old state wrapped to $[-\pi, \pi)$.
"""

import numpy as np
from gymnasium import spaces

from dlatlas.rl.envs import BatchedEnv, SingleEnv

__all__ = ["BatchedPendulum", "Pendulum"]

MAX_SPEED, MAX_TORQUE, DT = 8.0, 2.0, 0.05


class BatchedPendulum(BatchedEnv):
    """Copies of gymnasium's Pendulum-v1: the same dynamics, reward, start distribution and limit of 200 steps.

    The attribute `state` (n, 2) holds angle and speed; observations are (cos, sin, speed), actions one torque in [-2, 2].

    Args:
        num_envs: number of copies.
        g: gravity.
        steps: an episode is truncated after so many steps.
    """

    def __init__(self, num_envs: int, g: float = 10.0, steps: int = 200):
        high = np.array([1.0, 1.0, MAX_SPEED], dtype=np.float32)
        super().__init__(num_envs, spaces.Box(-high, high), spaces.Box(-MAX_TORQUE, MAX_TORQUE, (1,)), steps)
        self.g = g
        self.state = np.zeros((num_envs, 2))

    def _begin(self, which):
        high = np.array([np.pi, 1.0])
        self.state[which] = self.np_random.uniform(-high, high, size=(len(which), 2))

    def _advance(self, actions):
        angle, speed, torque = self.state[:, 0], self.state[:, 1], actions[:, 0]
        wrapped = (angle + np.pi) % (2 * np.pi) - np.pi
        rewards = -(wrapped**2 + 0.1 * speed**2 + 0.001 * torque**2)
        speed = np.clip(speed + (1.5 * self.g * np.sin(angle) + 3.0 * torque) * DT, -MAX_SPEED, MAX_SPEED)
        self.state = np.stack([angle + speed * DT, speed], axis=1)  # (n, 2)
        return rewards, np.zeros(self.num_envs, dtype=bool)

    def _observe(self):
        angle, speed = self.state.T
        return np.stack([np.cos(angle), np.sin(angle), speed], axis=1).astype(np.float32)  # (n, 3)


class Pendulum(SingleEnv):
    """One pendulum: equal to gymnasium's Pendulum-v1, seeds included."""

    batched = BatchedPendulum
