"""What the reinforcement-learning chapters share: memories, returns, networks, exact MDPs, rollouts, agents and their evaluation."""
