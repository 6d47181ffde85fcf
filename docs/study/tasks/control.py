"""Proximal policy optimization balances a pole: Stable-Baselines3's PPO on CartPole.

The data depend on the policy, so a bad update also spoils the data of the next ones. The library's
own clipping, to a norm of 0.5, is off; it is an arm of its own.
"""

from __future__ import annotations

import time
from typing import Any

import gymnasium
import numpy as np
from arms import clipped_torch_optimizer
from design import Condition
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env
from training import Outcome

ENVIRONMENTS, ROLLOUT, BATCH, EPOCHS, STEPS = 8, 32, 256, 20, 20_000
EPISODES = 10


def mean_return(policy: Any, seed: int) -> float:
    """Mean return of the most likely actions over episodes that start as the seed says."""
    environment = gymnasium.make("CartPole-v1")
    returns = []
    for episode in range(EPISODES):
        state, _ = environment.reset(seed=1000 * seed + episode)
        total, done = 0.0, False
        while not done:
            action, _ = policy.predict(state, deterministic=True)
            state, reward, terminated, truncated, _ = environment.step(int(action))
            total += float(reward)
            done = terminated or truncated
        returns.append(total)
    return float(np.mean(returns))


def run(
    condition: Condition, arm: str, constant: float | None, seed: int, *, quick: bool = False
) -> Outcome:
    begin = time.process_time()
    environments = make_vec_env("CartPole-v1", ENVIRONMENTS, seed=seed)
    model = PPO(
        "MlpPolicy", environments, condition.learning_rate, ROLLOUT, BATCH, EPOCHS,
        gamma=0.98, gae_lambda=0.8, max_grad_norm=float("inf"), seed=seed, device="cpu",
    )  # fmt: skip
    optimizer = clipped_torch_optimizer(model.policy.optimizer, arm, constant)
    outcome = Outcome()
    try:
        model.learn(2 * ENVIRONMENTS * ROLLOUT if quick else STEPS)
    except ValueError:
        # A policy whose weights are not finite has no distribution of actions.
        outcome.finite = False
    parameters = list(model.policy.parameters())
    outcome.finite = outcome.finite and all(bool(p.isfinite().all()) for p in parameters)
    if outcome.finite:
        outcome.validation = mean_return(model.policy, 1)
        outcome.test = mean_return(model.policy, 2)
    if hasattr(optimizer, "clipper"):
        # Of the last step: the policy is trained by the library's own loop.
        outcome.clipped = float((optimizer.clipper.last.coefficients < 1).float().mean())
    outcome.seconds = time.process_time() - begin
    return outcome
