"""Stable-Baselines3: the optimizer class is a factory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import pytest
import torch
from recipes import Watch, run_recipe, weights
from stable_baselines3 import A2C, DQN, PPO, SAC, TD3
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.utils import set_random_seed

from autoclip.torch import QuantileClip

CLIPPED = QuantileClip.optimizer_factory(torch.optim.Adam, quantile=0.5, history_length=50)
SIZES: dict[Any, dict[str, Any]] = {
    PPO: {"n_steps": 64, "n_epochs": 2, "batch_size": 32, "max_grad_norm": float("inf")},
    A2C: {"max_grad_norm": float("inf")},
    DQN: {"learning_starts": 16, "batch_size": 8, "max_grad_norm": float("inf")},
    SAC: {"learning_starts": 16, "batch_size": 8},
    TD3: {"learning_starts": 16, "batch_size": 8},
}
ACTOR_CRITIC = (SAC, TD3)


class Keep(KVWriter):
    def __init__(self) -> None:
        self.values: list[dict[str, Any]] = []

    def write(self, key_values: Any, key_excluded: Any, step: int = 0) -> None:
        self.values.append(dict(key_values))


def make(kind: Any, **settings: Any) -> Any:
    env = gymnasium.make("Pendulum-v1" if kind in ACTOR_CRITIC else "CartPole-v1")
    options: dict[str, Any] = {**SIZES[kind], "seed": 0, "device": "cpu", **settings}
    return kind(
        "MlpPolicy",
        env,
        policy_kwargs={"optimizer_class": CLIPPED, "net_arch": [8]},
        **options,
    )


def go_on(model: Any, env_id: str, steps: int) -> torch.Tensor:
    """Train on, from a seed and a fresh environment."""
    set_random_seed(1)
    model.set_env(gymnasium.make(env_id))
    model.seed = 1
    model._last_obs = None
    model.set_random_seed(1)
    model.learn(steps, reset_num_timesteps=False)
    return weights(model.policy)


def test_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stable_baselines3

    writer = Keep()
    small = {**SIZES[PPO], "seed": 0, "device": "cpu"}
    del small["max_grad_norm"]

    class Small(PPO):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**small, **kwargs})
            self.set_logger(Logger(None, [writer]))

    monkeypatch.setattr(stable_baselines3, "PPO", Small)
    with Watch(quantile=0.9) as watch:
        names = run_recipe("sb3-ppo", env=gymnasium.make("CartPole-v1"))
    assert watch.steps() == [512 // 64 * 2 * 2]
    assert watch.clipped > 20
    optimizer, loaded = next(iter(watch.norms)), names["model"].policy.optimizer
    assert loaded is not optimizer
    assert loaded.clipper.state_dict() == optimizer.clipper.state_dict()  # type: ignore[attr-defined]
    assert (
        loaded.defaults == PPO("MlpPolicy", "CartPole-v1", device="cpu").policy.optimizer.defaults
    )
    logged = [values for values in writer.values if "autoclip/total_norm" in values]
    assert len(logged) == 7  # no step has been made at the end of the first rollout
    assert all(values["autoclip/clipped"] <= 1 for values in logged)


@pytest.mark.parametrize("kind", SIZES)
def test_the_callback_logs(kind: Any) -> None:
    """The page's two callbacks; the values are those of the last step before a rollout's end."""
    writer = Keep()
    model = make(kind, **({"train_freq": 16} if kind in (DQN, *ACTOR_CRITIC) else {}))
    model.set_logger(Logger(None, [writer]))
    names = run_recipe("sb3-sac" if kind in ACTOR_CRITIC else "sb3")
    model.learn(512, callback=names["LogAutoClip"](), log_interval=1)
    suffixes = ["/actor", "/critic"] if kind in ACTOR_CRITIC else [""]
    for suffix in suffixes:
        name = f"autoclip/total_norm{suffix}"
        assert sum(name in values for values in writer.values) >= 2
        assert all(values[name] > 0 for values in writer.values if name in values)


@pytest.mark.parametrize("kind", SIZES)
def test_one_norm_a_step_as_numpy_clips(kind: Any) -> None:
    model = make(kind)
    with Watch(quantile=0.5, history_length=50) as watch:
        model.learn(256)
    assert all(steps > 10 for steps in watch.steps())
    assert len(watch.norms) == (2 if kind in ACTOR_CRITIC else 1)
    assert watch.clipped > 20


def clippers_of(model: Any) -> list[Any]:
    parts = [model.actor, model.critic] if isinstance(model, ACTOR_CRITIC) else [model.policy]
    return [part.optimizer.clipper for part in parts]


@pytest.mark.parametrize("kind", SIZES)
def test_resume_bit_for_bit(kind: Any, tmp_path: Path) -> None:
    model = make(kind)
    model.learn(128)
    model.save(tmp_path / "agent")
    loaded = kind.load(tmp_path / "agent", device="cpu")
    states = [[clipper.state_dict() for clipper in clippers_of(each)] for each in (loaded, model)]
    assert states[0] == states[1]
    if kind in (DQN, *ACTOR_CRITIC):
        model.save_replay_buffer(tmp_path / "buffer")
        loaded.load_replay_buffer(tmp_path / "buffer")
    env = "Pendulum-v1" if kind in ACTOR_CRITIC else "CartPole-v1"
    expected = go_on(model, env, 128)
    assert torch.equal(go_on(loaded, env, 128), expected)
    states = [[clipper.state_dict() for clipper in clippers_of(each)] for each in (loaded, model)]
    assert states[0] == states[1]


def test_load_with_the_same_factory_named_again(tmp_path: Path) -> None:
    """Stable-Baselines3 raises if the two differ."""
    model = make(PPO)
    model.save(tmp_path / "agent")
    again = QuantileClip.optimizer_factory(torch.optim.Adam, quantile=0.5, history_length=50)
    PPO.load(tmp_path / "agent", policy_kwargs={"optimizer_class": again, "net_arch": [8]})
    with pytest.raises(ValueError, match="do not equal"):
        PPO.load(tmp_path / "agent", policy_kwargs={"optimizer_class": torch.optim.Adam})


def test_load_in_a_new_process(tmp_path: Path) -> None:
    model = make(PPO)
    model.learn(128)
    model.save(tmp_path / "agent")
    code = (
        "from stable_baselines3 import PPO; import sys, pathlib; "
        "model = PPO.load(sys.argv[1], device='cpu'); "
        "data = model.policy.optimizer.clipper.state_dict()['data']; "
        "pathlib.Path(sys.argv[2]).write_bytes(data)"
    )
    out = tmp_path / "data"
    subprocess.run([sys.executable, "-c", code, tmp_path / "agent", out], check=True)
    assert out.read_bytes() == model.policy.optimizer.clipper.state_dict()["data"]


def test_an_agent_saved_without_autoclip(tmp_path: Path) -> None:
    plain = PPO("MlpPolicy", "CartPole-v1", device="cpu", **SIZES[PPO])
    plain.learn(64)
    plain.save(tmp_path / "agent")
    with pytest.warns(UserWarning, match="no 'autoclip' entry"):
        loaded = PPO.load(
            tmp_path / "agent",
            custom_objects={"policy_kwargs": {"optimizer_class": CLIPPED}},
            device="cpu",
        )
    assert torch.equal(weights(loaded.policy), weights(plain.policy))
    loaded.set_env(gymnasium.make("CartPole-v1"))
    with Watch(quantile=0.5, history_length=50) as watch:
        loaded.learn(64)
    assert watch.steps() == [4]


@pytest.mark.parametrize(("off", "zero"), [(float("inf"), False), (0, True)])
def test_zero_does_not_switch_clipping_off(off: float, zero: bool) -> None:
    """The trap that the page names: `max_grad_norm=0` sets every gradient to zero."""
    model = make(A2C, max_grad_norm=off)
    before = weights(model.policy)
    model.learn(20)
    assert torch.equal(weights(model.policy), before) == zero
