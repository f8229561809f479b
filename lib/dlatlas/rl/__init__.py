"""Reinforcement learning: values, policy gradients, exploration, planning, several agents."""

try:
    import gymnasium  # noqa: F401
except ImportError:
    raise ImportError("the reinforcement-learning part needs gymnasium and MuJoCo; install them with: pip install 'dlatlas[rl]'") from None
