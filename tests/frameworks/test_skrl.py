"""skrl, whose agents make their optimizers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium
import torch
from recipes import Watch, run_recipe, windows_of
from skrl.envs.wrappers.torch import wrap_env
from skrl.memories.torch import RandomMemory
from skrl.models.torch import CategoricalMixin, DeterministicMixin, Model
from skrl.trainers.torch import SequentialTrainer
from torch import nn


def make_model(mixin: Any, outputs: int, spaces: dict[str, Any]) -> Any:
    class Network(mixin, Model):  # type: ignore[misc]
        def __init__(self) -> None:
            Model.__init__(self, **spaces)
            mixin.__init__(self)
            self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, outputs))

        def compute(self, inputs: dict[str, Any], role: str) -> Any:
            return self.net(inputs["observations"]), {}

    return Network()


def test_recipe_and_load(tmp_path: Path) -> None:
    environment = wrap_env(gymnasium.make_vec("CartPole-v1", 2))
    spaces = {
        "observation_space": environment.observation_space,
        "action_space": environment.action_space,
        "device": "cpu",
    }

    def agent() -> Any:
        torch.manual_seed(0)
        models = {
            "policy": make_model(CategoricalMixin, 2, spaces),
            "value": make_model(DeterministicMixin, 1, spaces),
        }
        memory = RandomMemory(memory_size=16, num_envs=2, device="cpu")
        return run_recipe("skrl", models=models, spaces={**spaces, "memory": memory})["agent"]

    trained = agent()
    trained.cfg.experiment.write_interval = trained.cfg.experiment.checkpoint_interval = 0
    options = {"timesteps": 64, "headless": True, "disable_progressbar": True}
    options["close_environment_at_exit"] = False
    with Watch(quantile=0.9) as watch:
        SequentialTrainer(env=environment, agents=trained, cfg=options).train()
    assert watch.steps() == [4 * 8 * 2]  # rollouts, epochs, minibatches
    assert watch.clipped > 5
    trained.save(str(tmp_path / "agent.pt"))
    other = agent()
    other.load(str(tmp_path / "agent.pt"))
    assert windows_of(other.optimizer) == windows_of(trained.optimizer)
