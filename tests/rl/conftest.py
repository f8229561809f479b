"""What several tests of agents need."""

import numpy as np
import pytest
from gymnasium import spaces

from dlatlas.rl.envs import BatchedEnv


class Bandit(BatchedEnv):
    """One step: the reward is a function of the action, and the episode is over."""

    def __init__(self, num_envs, reward):
        super().__init__(num_envs, spaces.Box(-1.0, 1.0, (2,)), spaces.Box(-2.0, 4.0, (1,)))
        self.reward, self.state = reward, np.zeros((num_envs, 2))

    def _begin(self, which):
        self.state[which] = self.np_random.uniform(-1, 1, (len(which), 2))

    def _advance(self, actions):
        return self.reward(actions[:, 0]), np.ones(self.num_envs, dtype=bool)

    def _observe(self):
        return self.state.astype(np.float32)


@pytest.fixture
def bandit():
    """``bandit(num_envs, reward)``: an environment whose episodes are one step long."""
    return Bandit
