"""Tianshou, which makes optimizers with factories of its own."""

from __future__ import annotations

import copy
import io
from typing import Any

import gymnasium
import torch
from recipes import Watch, run_recipe, weights, windows_of
from tianshou.algorithm import PPO
from tianshou.algorithm.modelfree.reinforce import DiscreteActorPolicy
from tianshou.data import Collector, VectorReplayBuffer
from tianshou.env import DummyVectorEnv
from tianshou.trainer import OnPolicyTrainerParams
from tianshou.utils.net.common import Net
from tianshou.utils.net.discrete import DiscreteActor, DiscreteCritic


def agent() -> dict[str, Any]:
    torch.manual_seed(0)
    environment = gymnasium.make("CartPole-v1")
    net = Net(state_shape=environment.observation_space.shape, hidden_sizes=[8])
    policy = DiscreteActorPolicy(
        actor=DiscreteActor(preprocess_net=net, action_shape=2),
        action_space=environment.action_space,
        observation_space=environment.observation_space,
    )
    return {"policy": policy, "critic": DiscreteCritic(preprocess_net=net)}


def parameters(policy: Any) -> OnPolicyTrainerParams:
    environments = DummyVectorEnv([lambda: gymnasium.make("CartPole-v1")] * 2)
    environments.seed(0)
    collector = Collector[Any](policy, environments, VectorReplayBuffer(200, 2))
    collector.reset()
    return OnPolicyTrainerParams(
        training_collector=collector,
        test_collector=None,
        max_epochs=1,
        epoch_num_steps=128,
        collection_step_num_env_steps=64,
        batch_size=16,
        update_step_num_repetitions=2,
        show_progress=False,
    )


def optimizer_of(algorithm: PPO) -> Any:
    return algorithm.optim._optim


def test_recipe_and_copies() -> None:
    given = agent()
    with Watch(quantile=0.9) as watch:
        algorithm = run_recipe("tianshou", **given, parameters=parameters(given["policy"]))[
            "algorithm"
        ]
    (steps,) = watch.steps()
    assert steps == 16
    assert watch.clipped > 5

    file = io.BytesIO()
    torch.save(algorithm.state_dict(), file)
    file.seek(0)
    given = agent()
    other = run_recipe("tianshou", **given, parameters=parameters(given["policy"]))["algorithm"]
    other.load_state_dict(torch.load(file))
    assert torch.equal(weights(other), weights(algorithm))
    assert windows_of(optimizer_of(other)) == windows_of(optimizer_of(algorithm))

    copied = copy.deepcopy(algorithm)
    with Watch(quantile=0.9) as watch:
        copied.run_training(parameters(copied.policy))
    assert watch.steps() == [16]
    assert len(windows_of(optimizer_of(copied))[0]) == 2 * steps
    assert windows_of(optimizer_of(algorithm)) == windows_of(optimizer_of(other))
