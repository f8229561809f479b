"""What every environment of the part promises: gymnasium's contract, one batch equal to single copies, restarts in the same step."""

import importlib
import inspect
import warnings

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv

import dlatlas.rl.envs
from dlatlas.rl.envs import SingleEnv
from dlatlas.rl.envs.control import BatchedPendulum, Pendulum
from dlatlas.rl.envs.grids import HealthGrid, PushBox
from dlatlas.rl.envs.points import FOUR_ROOMS, MultiGoal, PointNav
from dlatlas.rl.envs.toy import BatchedTabular, BlindCliffwalk, Bridge, Chain, SlipperyGrid, Tabular, bridge_mdp

SMALL = {"size": 6, "boxes": 3, "goals": 2, "obstacles": 2, "steps": 30}
# Environments whose steps draw no random numbers: a batch can be held against single copies step by step.
DETERMINISTIC = [
    (Chain, {"n": 6}),
    (Chain, {"n": 4, "obs": "one-hot"}),
    (BlindCliffwalk, {"n": 3, "flips": 1}),
    (Bridge, {"k": 4}),
    (Pendulum, {"steps": 25}),
    (PushBox, SMALL),
    (PointNav, {"walls": FOUR_ROOMS, "gain": 3.0, "steps": 20}),
    (PointNav, {"reward": "sparse", "goal_in_obs": False, "goal": (0.2, 0.1), "start": (-1, -1, 0, 1)}),
    (MultiGoal, {}),
]
ALL = [
    *DETERMINISTIC,
    (SlipperyGrid, {}),
    (Tabular, dict(zip("PR", bridge_mdp(2)))),
    (HealthGrid, {"delay": 3, "sparsity": 0.5}),
    (PushBox, {}),
]
IDS = sorted(name for name in gymnasium.registry if name.startswith("dlatlas/"))


def ids(cases):
    return [f"{cls.__name__}-{i}" for i, (cls, _) in enumerate(cases)]


def adopt(single: SingleEnv, batch, i: int) -> None:
    """Give a single environment the complete state of copy i of a batch."""
    for name, value in vars(batch).items():
        if (
            isinstance(value, np.ndarray)
            and name != "copies"
            and vars(single.core)[name].shape == (1, *value.shape[1:])
            and len(value) == 5
        ):
            setattr(single.core, name, value[i : i + 1].copy())


def test_registered_ids():
    wanted = {"BatchedPendulum", "BlindCliffwalk", "Bridge", "Chain", "HealthGrid", "MultiGoal", "PointNav", "PushBox", "SlipperyGrid"}
    assert {f"dlatlas/{name}-v0" for name in wanted} <= set(IDS)
    before = dict(gymnasium.registry)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        importlib.reload(dlatlas.rl.envs)
    assert dict(gymnasium.registry) == before


@pytest.mark.filterwarnings("ignore:.*For Box action spaces, we recommend using a symmetric and normalized space.*")  # torque in [-2, 2]
@pytest.mark.parametrize("name", IDS)
def test_check_env_of_every_registered_id(name):
    env = gymnasium.make(name)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.filterwarnings("ignore:.*For Box action spaces, we recommend using a symmetric and normalized space.*")
@pytest.mark.parametrize(("cls", "kwargs"), ALL, ids=ids(ALL))
def test_check_env_of_variants(cls, kwargs):
    check_env(cls(**kwargs), skip_render_check=True)


@pytest.mark.parametrize("name", IDS)
def test_make_vec_gives_the_batched_class_in_the_declared_mode(name):
    vec = gymnasium.make_vec(name, num_envs=3)
    assert type(vec.unwrapped) is gymnasium.make(name).unwrapped.batched
    assert vec.metadata["autoreset_mode"] is AutoresetMode.SAME_STEP
    obs, _ = vec.reset(seed=1)
    assert vec.observation_space.contains(obs) and obs.shape == (3, *vec.single_observation_space.shape)
    obs, rewards, terminated, truncated, _ = vec.step(vec.action_space.sample())
    assert vec.observation_space.contains(obs)
    assert (rewards.shape, rewards.dtype) == ((3,), np.float64)
    assert terminated.dtype == truncated.dtype == bool and terminated.shape == truncated.shape == (3,)
    assert vec.close() is None


@pytest.mark.parametrize(("cls", "kwargs"), DETERMINISTIC, ids=ids(DETERMINISTIC))
def test_a_batch_equals_single_copies(cls, kwargs):
    batch = cls(**kwargs).batch(5)
    singles = [cls(**kwargs) for _ in range(5)]
    obs, _ = batch.reset(seed=3)
    for i, single in enumerate(singles):
        single.reset(seed=99)
        adopt(single, batch, i)
    batch.action_space.seed(4)
    episodes, worth = 0, 0.0
    for _ in range(150):
        actions = batch.action_space.sample()
        before = obs.copy()
        obs, rewards, terminated, truncated, info = batch.step(actions)
        ended = terminated | truncated
        assert ("final_obs" in info) == ended.any()
        assert not (terminated & truncated).any()
        for i, single in enumerate(singles):
            one, reward, term, trunc, one_info = single.step(actions[i])
            assert (reward, term, trunc) == pytest.approx((rewards[i], terminated[i], truncated[i]), abs=1e-12)
            last = info["final_obs"][i] if ended[i] else obs[i]
            np.testing.assert_allclose(one, last, atol=1e-7)
            reports = info["final_info"] if ended[i] else info
            assert dict(one_info) == pytest.approx({key: reports[key][i] for key in one_info})
            if ended[i]:
                adopt(single, batch, i)
                assert info["_final_obs"][i] and info["_final_info"][i]
            elif ended.any():
                assert info["final_obs"][i] is None and not info["_final_obs"][i]
        episodes += ended.sum()
        worth += np.abs(rewards).sum()
        assert before is not obs
    assert episodes >= 5 and (worth > 0 or cls in {Bridge, PointNav, BlindCliffwalk})


@pytest.mark.parametrize(("cls", "kwargs"), ALL, ids=ids(ALL))
def test_one_seed_fixes_all_copies_and_they_differ(cls, kwargs):
    def rollout(seed):
        vec = cls(**kwargs).batch(6)
        vec.action_space.seed(0)
        seen = [vec.reset(seed=seed)[0]]
        for _ in range(40):
            obs, rewards, *_ = vec.step(vec.action_space.sample())
            seen += [obs, rewards]
        return seen

    first, second, other = rollout(7), rollout(7), rollout(8)
    for a, b in zip(first, second):
        np.testing.assert_array_equal(a, b)
    if cls not in {Chain, BlindCliffwalk, Bridge, Tabular}:  # those start in one state and draw nothing
        assert any((a != b).any() for a, b in zip(first, other))
        assert any((a[0] != a[1]).any() for a in first[::2])


def test_information_has_the_form_of_gymnasiums_own_vector_environments():
    kwargs = {"goal": (0.0, 0.0), "steps": 3}
    ours = PointNav(**kwargs).batch(2)
    theirs = SyncVectorEnv([lambda: PointNav(**kwargs)] * 2, autoreset_mode=AutoresetMode.SAME_STEP)
    for vec in (ours, theirs):
        vec.reset(seed=0)
    for _ in range(3):
        actions = ours.action_space.sample()
        a, b = ours.step(actions)[4], theirs.step(actions)[4]
        assert a.keys() == b.keys()
    assert a["final_obs"].dtype == b["final_obs"].dtype == object
    assert a["final_obs"][1].shape == b["final_obs"][1].shape == (6,)
    assert a["final_info"].keys() == b["final_info"].keys() == {"distance", "_distance"}
    assert all(type(a[key]) is type(b[key]) and a[key].dtype == b[key].dtype for key in a if key != "final_info")


def test_gymnasiums_episode_statistics_agree():
    vec = gymnasium.wrappers.vector.RecordEpisodeStatistics(Chain(n=5).batch(3))
    vec.reset(seed=0)
    total = np.zeros(3)
    rng = np.random.default_rng(0)
    for _ in range(14):  # n + 9
        _, rewards, _, truncated, info = vec.step(rng.integers(2, size=3))
        total += rewards
    assert truncated.all()
    recorded = info["episode"] if "episode" in info else info["final_info"]["episode"]
    np.testing.assert_allclose(recorded["r"], total, rtol=1e-6)
    np.testing.assert_array_equal(recorded["l"], 14)


def test_reset_mask_restarts_only_those_copies():
    vec = Chain(n=10).batch(4)
    vec.reset(seed=0)
    for _ in range(3):
        vec.step(np.ones(4, dtype=int))
    vec.reset(options={"reset_mask": np.array([True, False, False, True])})
    assert vec.state.tolist() == [1, 4, 4, 1] and vec.t.tolist() == [0, 3, 3, 0]
    with pytest.raises(ValueError, match="reset_mask"):
        vec.reset(options={"reset_mask": np.array([True])})


def test_a_start_state_can_be_given():
    env = Pendulum()
    obs, _ = env.reset(seed=0, options={"state": [0.5, -0.25]})
    np.testing.assert_allclose(obs, [np.cos(0.5), np.sin(0.5), -0.25], rtol=1e-6)
    vec = Chain(n=9).batch(2)
    assert vec.reset(options={"state": [3, 7]})[0].sum(axis=1).tolist() == [4, 8]
    with pytest.raises(ValueError, match="state"):
        vec.reset(options={"state": [3, 7, 1]})
    with pytest.raises(ValueError, match="state"):
        PushBox().reset(options={"state": [3]})


def test_observations_are_not_views_of_the_state():
    for cls, kwargs in ALL:
        vec = cls(**kwargs).batch(2)
        obs, _ = vec.reset(seed=0)
        again = vec._observe()
        kept = again.copy()
        obs[:] = 0
        np.testing.assert_array_equal(vec._observe(), kept)


def test_bad_input():
    vec = Chain().batch(3)
    with pytest.raises(gymnasium.error.ResetNeeded):
        vec.step(np.zeros(3, dtype=int))
    vec.reset(seed=0)
    for actions in (np.zeros(2, dtype=int), np.full(3, 2), np.full(3, -1), np.zeros(3)):
        with pytest.raises(ValueError, match="actions must be integers"):
            vec.step(actions)
    pendulum = BatchedPendulum(2)
    pendulum.reset(seed=0)
    for actions in (np.zeros(2), np.full((2, 1), np.nan)):
        with pytest.raises(ValueError, match="actions must be finite"):
            pendulum.step(actions)
    for make in (lambda: Chain().batch(0), lambda: BatchedPendulum(1, steps=0)):
        with pytest.raises(ValueError, match="at least 1"):
            make()
    P, R = bridge_mdp(2)
    for kwargs, match in (
        ({"P": P[:, :, :-1], "R": R}, "shape"),
        ({"P": 2 * P, "R": R}, "probabilities"),
        ({"P": P, "R": R, "start": [0.5] * 10}, "start"),
        ({"P": P, "R": R, "obs": "pixels"}, "obs"),
        ({"P": P, "R": R, "obs": np.eye(3)}, "obs"),
    ):
        with pytest.raises(ValueError, match=match):
            BatchedTabular(1, **kwargs)


def test_signatures_name_the_arguments():
    names = list(inspect.signature(PointNav).parameters)
    assert names == list(inspect.signature(PointNav.batched).parameters)[1:] and {"goal", "walls", "steps"} <= set(names)
