"""Clippers in threads, and sent to other processes."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip.tf import QuantileClip, StandardClip

STEPS = 10


def make_variables(seed, values=None):
    shapes = [(4, 8), (8,), (8, 1)]
    if values is None:
        generator = np.random.default_rng(seed)
        values = [generator.normal(size=shape) for shape in shapes]
    return [tf.Variable(np.float32(value), name=f"v{i}") for i, value in enumerate(values)]


def make_optimizer(seed):
    kind = (QuantileClip, StandardClip)[seed % 2]
    optimizer = keras.optimizers.SGD(0.01)
    return kind.as_optimizer(optimizer, global_clipping=seed % 3 == 0, warmup_steps=2)


def train(variables, optimizer, steps, function=lambda step: step):
    """Some steps; the history after them."""

    @function
    def step(x):
        with tf.GradientTape() as tape:
            first, bias, second = variables
            loss = tf.reduce_mean(tf.square(tf.tanh(x @ first + bias) @ second))
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))

    optimizer.build(variables)
    for i in steps:
        x = np.random.default_rng(i).normal(size=(5, 4)) * (1 + i % 4)
        step(tf.constant(x, tf.float32))
    return optimizer.clipper.state_dict()["data"]


@pytest.mark.parametrize("function", [lambda step: step, tf.function], ids=["eager", "graph"])
def test_threads_have_clippers_of_their_own(function):
    count = 3
    start = threading.Barrier(count)

    def run(seed):
        variables, optimizer = make_variables(seed), make_optimizer(seed)
        start.wait()
        return train(variables, optimizer, range(STEPS), function)

    with ThreadPoolExecutor(count) as threads:
        found = list(threads.map(run, range(count)))
    alone = [
        train(make_variables(seed), make_optimizer(seed), range(STEPS), function)
        for seed in range(count)
    ]
    assert found == alone


def go_on(path, steps):
    values, clipper, last = pickle.loads(Path(path).read_bytes())
    assert len(last.norms) == len(last.names)
    optimizer = keras.optimizers.SGD(0.01)
    clipper.attach(optimizer)
    Path(path).write_bytes(train(make_variables(None, values), optimizer, range(*steps)))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_clipper_sent_to_another_process_goes_on_there(server, tmp_path, seed):
    """Pickled with the values of its variables, as `multiprocessing` sends them."""
    variables, optimizer = make_variables(seed), make_optimizer(seed)
    train(variables, optimizer, range(STEPS))
    clipper, path = optimizer.clipper, tmp_path / "sent"
    values = [variable.numpy() for variable in variables]
    path.write_bytes(pickle.dumps((values, clipper, clipper.last)))
    server.call(go_on, path=path, steps=[STEPS, 2 * STEPS])
    assert path.read_bytes() == train(variables, optimizer, range(STEPS, 2 * STEPS))
