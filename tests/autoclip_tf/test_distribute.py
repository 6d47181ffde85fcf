"""Strategies over two devices: the same as one device with the same global batch.

One MirroredStrategy a process: several in one leave threads and collectives of each other behind.
"""

from __future__ import annotations

import contextlib
import socket
from functools import cache

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras_training import build_optimizer

from autoclip.tf import QuantileClip, StandardClip, StateError
from autoclip.tf.callbacks import AutoClipCallback

pytestmark = pytest.mark.processes(1, devices=2)

CLIPPERS = {
    "parameter-wise": lambda optimizer: QuantileClip.as_optimizer(optimizer, 0.5, 10),
    "global": lambda optimizer: StandardClip.as_optimizer(
        optimizer, 0.5, 10, global_clipping=True, include_current=True, warmup_steps=0
    ),
    "groups": lambda optimizer: QuantileClip.as_optimizer(
        optimizer, 0.9, 10, group_settings=[{"match": "bias", "quantile": 0.3, "history_length": 4}]
    ),
    # So long that a graph compiles the insertion into sorted windows.
    "long histories": lambda optimizer: QuantileClip.as_optimizer(optimizer, 0.5, 30_000),
}


@cache
def mirrored():
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@cache
def data():
    generator = np.random.default_rng(0)
    x = generator.normal(size=(64, 4)) * np.exp(generator.normal(size=(64, 1)))
    return x.astype(np.float32), x.sum(axis=1, keepdims=True).astype(np.float32)


def free_port():
    with socket.create_server(("localhost", 0)) as server:
        return server.getsockname()[1]


def make_model(scope, attach, steps=None, **options):
    with scope:
        keras.utils.set_random_seed(0)
        inputs = keras.Input((4,))
        hidden = keras.layers.Dense(8, activation="relu", name="hidden")(inputs)
        model = keras.Model(inputs, keras.layers.Dense(1, name="out")(hidden))
        optimizer = keras.optimizers.SGD(0.002, momentum=0.5, gradient_accumulation_steps=steps)
        model.compile(attach(optimizer), loss="mean_squared_error", **options)
    return model


def fit(model, epochs=2, built=True, **options):
    if built:
        build_optimizer(model)
    model.fit(*data(), batch_size=8, epochs=epochs, shuffle=False, verbose=0, **options)
    return getattr(model.optimizer, "inner_optimizer", model.optimizer).clipper


def windows(clipper):
    return [window for group in clipper.export_state().groups for window in group.windows()]


def assert_in_step(clipper):
    """One history, with a copy on each device, and all copies equal."""
    for variable in clipper.saved_state.variables:
        assert isinstance(variable, tf.distribute.DistributedValues)
        first, second = variable.values
        assert first.device != second.device
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "kind",
    # Groups are clipped parameter by parameter, too.
    [
        pytest.param(kind, marks=[pytest.mark.nightly] * (kind == "parameter-wise"))
        for kind in CLIPPERS
    ],
)
def test_fit_equals_one_device_with_the_same_global_batch(kind):
    one = make_model(contextlib.nullcontext(), CLIPPERS[kind])
    two = make_model(mirrored().scope(), CLIPPERS[kind])
    expected, clipper = fit(one), fit(two, built=False)
    for ours, theirs in zip(two.get_weights(), one.get_weights(), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(windows(clipper), windows(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    for name in ("norms", "thresholds", "coefficients"):
        ours, theirs = getattr(clipper.last, name), getattr(expected.last, name)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    counts = [group.recorded.tolist() for group in clipper.export_state().groups]
    assert set(np.concatenate(counts)) == {16}  # once an update, not once a replica
    assert_in_step(clipper)


@pytest.mark.parametrize(
    "steps", [None, pytest.param(2, marks=pytest.mark.nightly)], ids=["each batch", "accumulated"]
)
def test_the_callback_adds_up_each_update_once_and_not_once_a_replica(steps):
    # In a graph Keras itself cannot accumulate under this strategy.
    model = make_model(
        mirrored().scope(), CLIPPERS["global"], steps=steps, run_eagerly=steps is not None
    )
    build_optimizer(model)
    history = model.fit(
        *data(), batch_size=8, epochs=2, shuffle=False, verbose=0, callbacks=[AutoClipCallback()]
    ).history
    [norms] = windows(model.optimizer.clipper)
    updates = 8 // (steps or 1)
    means = norms[-updates:].mean()
    assert history["autoclip/total_norm"][-1] == pytest.approx(means, rel=1e-6)
    assert history["autoclip/clipped_norm"][-1] < means


def test_replicas_see_the_sum_of_their_gradients():
    """Each replica's own gradient has another norm, and so would have another history."""
    with mirrored().scope():
        weight = tf.Variable(tf.zeros(2))
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1.0), 0.5)
        optimizer.build([weight])

    @tf.function
    def step(gradients):
        mirrored().run(lambda gradient: optimizer.apply([gradient], [weight]), args=(gradients,))

    def a_value_each(first, second):
        return mirrored().experimental_distribute_values_from_function(
            lambda context: tf.constant([first, second][context.replica_id_in_sync_group])
        )

    step(a_value_each([1.0, 0.0], [2.0, 4.0]))  # the sum has a norm of 5
    step(a_value_each([9.0, 5.0], [0.0, 7.0]))  # 15; the median is 10
    np.testing.assert_allclose(windows(optimizer.clipper), [[5, 15]], rtol=1e-6)
    for replica in weight.values:
        np.testing.assert_allclose(replica, [-3 - 6, -4 - 8], rtol=1e-6)
    assert_in_step(optimizer.clipper)


def test_indexed_slices_in_a_loop_of_ones_own():
    with mirrored().scope():
        table, weight = tf.Variable(tf.ones((5, 3))), tf.Variable(tf.ones(3))
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(0.0), 0.5)
        optimizer.build([table, weight])
    kinds = []

    @tf.function
    def step(ids):
        def replica(ids):
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.gather(table, ids) * weight)
            gradients = tape.gradient(loss, [table, weight])
            kinds.append(type(gradients[0]))
            optimizer.apply(gradients, [table, weight])

        mirrored().run(replica, args=(ids,))

    step(
        mirrored().experimental_distribute_values_from_function(
            lambda context: tf.constant([[0, 0, 1], [0, 2, 3]][context.replica_id_in_sync_group])
        )
    )
    assert kinds == [tf.IndexedSlices] * 2
    # Row 0 three times over both replicas, rows 1, 2, 3 once: (3, 1, 1, 1, 0) in three columns.
    expected = [np.sqrt(3 * 12.0), np.sqrt(3 * 36.0)]
    np.testing.assert_allclose(optimizer.clipper.last.norms, expected, rtol=1e-6)
    assert_in_step(optimizer.clipper)


def test_a_variable_without_a_gradient_records_nothing():
    with mirrored().scope():
        used, unused = tf.Variable([1.0]), tf.Variable([1.0])
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(0.1), 0.5)
        optimizer.build([used, unused])

    @tf.function
    def step():
        mirrored().run(lambda: optimizer.apply([tf.constant([1.0]), None], [used, unused]))

    with pytest.warns(UserWarning, match="Gradients do not exist"):
        step()
    assert [window.tolist() for window in windows(optimizer.clipper)] == [[2.0], []]


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero", "raise"])
def test_nonfinite(on_nonfinite):
    with mirrored().scope():
        first, second = tf.Variable([1.0], name="first"), tf.Variable([1.0], name="second")
        optimizer = QuantileClip.as_optimizer(
            keras.optimizers.SGD(0.25), 0.5, on_nonfinite=on_nonfinite
        )
        optimizer.build([first, second])

    @tf.function
    def step():
        def replica():
            here = tf.distribute.get_replica_context().replica_id_in_sync_group
            bad = tf.where(tf.equal(here, 1), [np.nan], [1.0])
            optimizer.apply([bad, tf.constant([1.0])], [first, second])

        mirrored().run(replica)

    if on_nonfinite == "raise":
        with pytest.raises(tf.errors.InvalidArgumentError, match="The gradient of first holds NaN"):
            step()
        expected, recorded = [1.0, 1.0], [[], []]
    else:
        step()
        expected = [np.nan if on_nonfinite == "keep" else 1.0, 0.5]
        recorded = [[], [2.0]]
    for variable, value in zip((first, second), expected):
        for replica in variable.values:
            np.testing.assert_array_equal(replica, [value])
    assert [window.tolist() for window in windows(optimizer.clipper)] == recorded
    assert_in_step(optimizer.clipper)


def test_it_is_saved_once_and_a_restored_run_goes_on(tmp_path):
    without_stop = make_model(mirrored().scope(), CLIPPERS["groups"])
    fit(without_stop, epochs=2)
    stopped = make_model(mirrored().scope(), CLIPPERS["groups"])
    clipper = fit(stopped, epochs=1)
    stopped.save(f"{tmp_path}/model.keras")
    path = tf.train.Checkpoint(optimizer=stopped.optimizer).save(f"{tmp_path}/checkpoint")
    clipper.save(f"{tmp_path}/history.safetensors")
    entries = [name for name, _ in tf.train.list_variables(path) if "clipper" in name]
    assert entries == ["optimizer/clipper/history/.ATTRIBUTES/state"]

    with mirrored().scope():
        loaded = keras.models.load_model(f"{tmp_path}/model.keras")
    assert loaded.optimizer.clipper.state_dict() == clipper.state_dict()
    fit(loaded, epochs=2, initial_epoch=1)
    for ours, theirs in zip(loaded.get_weights(), without_stop.get_weights(), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert_in_step(loaded.optimizer.clipper)
    state = loaded.optimizer.clipper.state_dict()
    assert state == without_stop.optimizer.clipper.state_dict()

    tf.train.Checkpoint(optimizer=loaded.optimizer).restore(path).assert_consumed()
    assert loaded.optimizer.clipper.state_dict() == clipper.state_dict()
    assert_in_step(loaded.optimizer.clipper)
    loaded.optimizer.clipper.load_state_dict(state)
    assert_in_step(loaded.optimizer.clipper)
    loaded.optimizer.clipper.load(f"{tmp_path}/history.safetensors")
    assert loaded.optimizer.clipper.state_dict() == clipper.state_dict()


def test_what_two_devices_saved_one_loads_and_the_reverse(tmp_path):
    one = make_model(contextlib.nullcontext(), CLIPPERS["global"])
    two = make_model(mirrored().scope(), CLIPPERS["global"])
    clipper = fit(two, epochs=1)
    one.optimizer.build(one.trainable_variables)
    one.optimizer.clipper.load_state_dict(clipper.state_dict())
    assert one.optimizer.clipper.state_dict() == clipper.state_dict()
    fit(one, epochs=1)
    clipper.load_state_dict(one.optimizer.clipper.state_dict())
    assert clipper.state_dict() == one.optimizer.clipper.state_dict()
    assert_in_step(clipper)
    state = clipper.state_dict()
    with pytest.raises(StateError, match="neither global_clipping nor group_clipping"):
        clipper.load_state_dict(
            fit(make_model(mirrored().scope(), CLIPPERS["groups"])).state_dict()
        )
    assert clipper.state_dict() == state


def test_loss_scaling():
    def scaled(optimizer):
        return QuantileClip.as_optimizer(
            keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024.0), 0.5, 10
        )

    plain = make_model(contextlib.nullcontext(), lambda o: QuantileClip.as_optimizer(o, 0.5, 10))
    two = make_model(mirrored().scope(), scaled)
    for ours, theirs in zip(windows(fit(two)), windows(fit(plain)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"steps": 2}, pytest.param({"steps_per_execution": 2}, marks=pytest.mark.nightly)],
    ids=["accumulation", "steps"],
)
def test_what_keras_can_do_eagerly_alone(options):
    """In a graph Keras itself cannot, under this strategy; see the documentation."""
    options["run_eagerly"] = True
    one = make_model(contextlib.nullcontext(), CLIPPERS["parameter-wise"], **options)
    two = make_model(mirrored().scope(), CLIPPERS["parameter-wise"], **options)
    expected, clipper = fit(one, epochs=1), fit(two, epochs=1)
    for ours, theirs in zip(windows(clipper), windows(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        assert len(ours) == (4 if "steps" in options else 8)
    assert_in_step(clipper)


def test_a_direct_call_says_what_to_do_instead():
    with mirrored().scope():
        variable = tf.Variable([0.0])
        clipper = QuantileClip()
        with pytest.raises(RuntimeError, match=r"QuantileClip\.as_optimizer\(optimizer\)"):
            clipper([(tf.constant([1.0]), variable)])
    assert not clipper.built


def test_other_strategies_equal_one_device_too():
    one = make_model(contextlib.nullcontext(), CLIPPERS["groups"])
    expected = fit(one, epochs=1)
    for strategy in (
        tf.distribute.OneDeviceStrategy("CPU:1"),
        tf.distribute.experimental.CentralStorageStrategy(["CPU:0", "CPU:1"]),
    ):
        other = make_model(strategy.scope(), CLIPPERS["groups"])
        for ours, theirs in zip(windows(fit(other, epochs=1)), windows(expected), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
        for ours, theirs in zip(other.get_weights(), one.get_weights(), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.processes(1)
def test_parameter_servers_are_refused():
    cluster = tf.train.ClusterSpec({job: [f"localhost:{free_port()}"] for job in ("worker", "ps")})
    servers = [tf.distribute.Server(cluster, job_name=job) for job in cluster.jobs]
    assert len(servers) == 2
    strategy = tf.distribute.ParameterServerStrategy(
        tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    )
    with strategy.scope():
        optimizer = keras.optimizers.SGD()
        with pytest.raises(RuntimeError, match=r"ParameterServerStrategy.*: its workers update"):
            QuantileClip.as_optimizer(optimizer)
        assert type(optimizer) is keras.optimizers.SGD and not hasattr(optimizer, "clipper")
        clipper = QuantileClip()
        with pytest.raises(RuntimeError, match="its workers update the variables one by one"):
            clipper.build([tf.Variable([0.0])])
        variable = tf.Variable([0.0])
    for build in (clipper.build, QuantileClip.as_optimizer(keras.optimizers.SGD()).build):
        with pytest.raises(RuntimeError, match="its workers update the variables one by one"):
            build([variable])  # outside of the scope, too
    assert not clipper.built


def test_strategies_that_nobody_has_tried_are_refused():
    """A TPUStrategy cannot be made here: an empty one is enough to be recognized."""
    strategy = object.__new__(tf.distribute.TPUStrategy)
    strategy._extended = mirrored().extended
    optimizer = keras.optimizers.SGD()
    optimizer._distribution_strategy = strategy
    with pytest.raises(RuntimeError, match="not been tested under TPUStrategy"):
        QuantileClip.as_optimizer(optimizer)
    assert type(optimizer) is keras.optimizers.SGD


def test_a_direct_call_under_a_strategy_of_one_replica():
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        variable = tf.Variable([0.0])
        clipper = QuantileClip(0.5)

    @tf.function
    def step(size):
        return strategy.run(lambda: clipper([(size[None], variable)])[0][0])

    step(tf.constant(1.0))
    np.testing.assert_allclose(step(tf.constant(3.0)), [2.0])


def test_attached_to_a_built_optimizer_outside_of_the_scope():
    """The histories are mirrored as its variables are: norms are recorded once an update."""
    with mirrored().scope():
        weight = tf.Variable(tf.zeros(2))
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build([weight])
    clipper = QuantileClip(0.5)
    clipper.attach(optimizer)

    @tf.function
    def step(gradients):
        mirrored().run(lambda gradient: optimizer.apply([gradient], [weight]), args=(gradients,))

    for size in (1.0, 3.0):
        step(
            mirrored().experimental_distribute_values_from_function(
                lambda context, size=size: tf.constant([size / 2, 0.0])
            )
        )
    np.testing.assert_allclose(windows(clipper), [[1.0, 3.0]])
    assert_in_step(clipper)
