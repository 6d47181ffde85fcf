"""tf.train.Checkpoint: the history is a child of the optimizer, or an object of its own."""

from __future__ import annotations

import threading
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip.tf import QuantileClip, StandardClip

KINDS = {
    "quantile": lambda optimizer: QuantileClip.as_optimizer(optimizer, 0.5, 4),
    "standard, global": lambda optimizer: StandardClip.as_optimizer(
        optimizer, 0.5, 4, global_clipping=True, warmup_steps=2
    ),
    "groups": lambda optimizer: QuantileClip.as_optimizer(
        optimizer, 0.5, 4, group_settings=[{"match": "bias", "quantile": 0.2}]
    ),
}


class Training:
    """Two variables, an optimizer, and a checkpoint of all of it."""

    def __init__(self, attach=lambda optimizer: optimizer, build=True):
        self.optimizer = attach(keras.optimizers.Adam(0.1))
        self.variables = []
        if build:
            self.build()

    def build(self):
        self.variables = [tf.Variable([1.0, 2.0], name="weight"), tf.Variable([3.0], name="bias")]
        self.optimizer.build(self.variables)

    @property
    def clipper(self):
        return self.optimizer.clipper

    @property
    def checkpoint(self):
        return tf.train.Checkpoint(optimizer=self.optimizer, variables=self.variables)

    def steps(self, sizes):
        for size in sizes:
            self.optimizer.apply(
                [tf.constant([size, 0.5]), tf.constant([1 / size])], self.variables
            )
        return self

    def everything(self):
        arrays = [v.numpy() for v in [*self.variables, *self.optimizer.variables]]
        return [array.tobytes() for array in arrays]


BEFORE, AFTER = [1.0, 3.0, 2.0, 8.0, 5.0], [4.0, 9.0, 1.0]


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture
def path(kind, tmp_path):
    return Training(kind).steps(BEFORE).checkpoint.save(f"{tmp_path}/checkpoint")


def assert_as_if_it_had_never_stopped(training, kind):
    without_stop = Training(kind).steps(BEFORE)
    assert training.clipper.state_dict() == without_stop.clipper.state_dict()
    assert training.everything() == without_stop.everything()
    training.steps(AFTER)
    without_stop.steps(AFTER)
    assert training.clipper.state_dict() == without_stop.clipper.state_dict()
    assert training.everything() == without_stop.everything()
    np.testing.assert_array_equal(
        training.clipper.last.thresholds, without_stop.clipper.last.thresholds
    )


class TestAttached:
    def test_restored_when_everything_exists(self, path, kind):
        training = Training(kind).steps([7.0] * 6)
        training.checkpoint.restore(path).assert_consumed()
        assert_as_if_it_had_never_stopped(training, kind)

    def test_restored_before_the_variables_exist(self, path, kind):
        training = Training(kind, build=False)
        checkpoint = training.checkpoint
        status = checkpoint.restore(path)
        with pytest.raises(AssertionError):
            status.assert_consumed()
        assert not training.clipper.built
        training.build()
        checkpoint.variables.extend(training.variables)
        status.assert_consumed()
        assert_as_if_it_had_never_stopped(training, kind)

    @pytest.mark.parametrize("build", [False, True])
    def test_restored_before_the_clipper_exists(self, path, kind, build):
        training = Training(build=build)
        checkpoint = training.checkpoint
        status = checkpoint.restore(path)
        kind(training.optimizer)
        if not build:
            training.build()
            checkpoint.variables.extend(training.variables)
        status.assert_consumed()
        assert_as_if_it_had_never_stopped(training, kind)

    def test_written_without_a_counter(self, kind, tmp_path):
        path = Training(kind).steps(BEFORE).checkpoint.write(f"{tmp_path}/checkpoint")
        training = Training(kind)
        training.checkpoint.read(path).assert_consumed()
        assert_as_if_it_had_never_stopped(training, kind)

    def test_one_entry_holds_all_of_it(self, path):
        names = [name for name, _ in tf.train.list_variables(path)]
        assert [name for name in names if "clipper" in name] == [
            "optimizer/clipper/history/.ATTRIBUTES/state"
        ]

    def test_a_manager_that_keeps_the_last_two(self, kind, tmp_path):
        training = Training(kind)
        manager = tf.train.CheckpointManager(training.checkpoint, tmp_path, max_to_keep=2)
        for size in BEFORE:
            training.steps([size])
            manager.save()
        assert len(manager.checkpoints) == 2
        again = Training(kind)
        manager = tf.train.CheckpointManager(again.checkpoint, tmp_path, max_to_keep=2)
        assert manager.restore_or_initialize() == manager.latest_checkpoint
        assert_as_if_it_had_never_stopped(again, kind)

    def test_a_keras_model_brings_its_optimizer(self, model, data, tmp_path):
        first, second = model(), model()
        for each in (first, second):
            each.compile(KINDS["quantile"](keras.optimizers.Adam()), loss="mean_squared_error")
        first.fit(*data, batch_size=8, verbose=0)
        path = tf.train.Checkpoint(model=first).save(f"{tmp_path}/checkpoint")
        tf.train.Checkpoint(model=second).restore(path).expect_partial()
        second.fit(*data, epochs=1, steps_per_epoch=1, verbose=0)  # builds the optimizer
        recorded = second.optimizer.clipper.export_state().groups[0].recorded.tolist()
        assert recorded == [8 + 1] * 4


class TestPlain:
    def test_a_plain_checkpoint_leaves_the_clipper_alone(self, tmp_path):
        plain = Training().steps(BEFORE)
        path = plain.checkpoint.save(f"{tmp_path}/checkpoint")
        training = Training(KINDS["quantile"]).steps([7.0])
        state = training.clipper.state_dict()
        with pytest.warns(UserWarning, match=f"{path} holds no history of AutoClip"):
            status = training.checkpoint.restore(path)
        assert training.everything() == plain.everything()
        assert training.clipper.state_dict() == state
        # What it asserts is that the checkpoint has a value for every object, and it has not.
        with pytest.raises(AssertionError, match="state of a QuantileClip"):
            status.assert_existing_objects_matched()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            training.checkpoint.restore(path).expect_partial()  # it is said once

    def test_a_plain_checkpoint_of_a_whole_model(self, model, data, tmp_path):
        first, second = model(), model()
        first.compile(keras.optimizers.Adam(), loss="mean_squared_error")
        second.compile(KINDS["quantile"](keras.optimizers.Adam()), loss="mean_squared_error")
        first.fit(*data, batch_size=8, verbose=0)
        path = tf.train.Checkpoint(model=first).save(f"{tmp_path}/checkpoint")
        with pytest.warns(UserWarning, match="holds no history of AutoClip"):
            tf.train.Checkpoint(model=second).restore(path).expect_partial()

    def test_a_clipped_checkpoint_into_a_plain_optimizer(self, tmp_path):
        clipped = Training(KINDS["quantile"]).steps(BEFORE)
        path = clipped.checkpoint.save(f"{tmp_path}/checkpoint")
        training = Training()
        status = training.checkpoint.restore(path)
        status.assert_existing_objects_matched()
        assert training.everything() == clipped.everything()
        with pytest.raises(AssertionError, match="clipper"):
            status.assert_consumed()
        status.expect_partial()


class TestAlone:
    """A clipper of a loop of one's own."""

    def clipper(self, length=4):
        return QuantileClip(0.5, length)

    def steps(self, clipper, variable, sizes):
        return [clipper([(tf.constant([s]), variable)])[0][0].numpy().item() for s in sizes]

    @pytest.mark.parametrize("build", [False, True])
    def test_restored_before_and_after_build(self, build, tmp_path):
        variable = tf.Variable([0.0])
        clipper, other = self.clipper(), self.clipper()
        self.steps(clipper, variable, BEFORE)
        path = tf.train.Checkpoint(clipper=clipper).save(f"{tmp_path}/checkpoint")
        if build:
            other.build([variable])
        tf.train.Checkpoint(clipper=other).restore(path).assert_consumed()
        assert other.built == build
        assert self.steps(other, variable, AFTER) == self.steps(clipper, variable, AFTER)
        assert other.state_dict() == clipper.state_dict()

    def test_restored_before_it_exists(self, tmp_path):
        variable = tf.Variable([0.0])
        clipper = self.clipper()
        self.steps(clipper, variable, BEFORE)
        path = tf.train.Checkpoint(clipper=clipper).save(f"{tmp_path}/checkpoint")
        checkpoint = tf.train.Checkpoint()
        status = checkpoint.restore(path)
        checkpoint.clipper = self.clipper()
        status.assert_consumed()
        assert checkpoint.clipper.state_dict() == clipper.state_dict()

    def test_saved_before_it_is_built(self, tmp_path):
        path = tf.train.Checkpoint(clipper=self.clipper()).save(f"{tmp_path}/checkpoint")
        variable = tf.Variable([0.0])
        clipper = self.clipper()
        self.steps(clipper, variable, BEFORE)
        state = clipper.state_dict()
        tf.train.Checkpoint(clipper=clipper).restore(path).assert_consumed()
        assert clipper.state_dict() == state

    def test_another_length_and_another_rule(self, tmp_path):
        variable = tf.Variable([0.0])
        clipper = self.clipper()
        self.steps(clipper, variable, BEFORE)
        path = tf.train.Checkpoint(clipper=clipper).save(f"{tmp_path}/checkpoint")
        shorter = self.clipper(2)
        shorter.build([variable])
        with pytest.warns(
            UserWarning, match=r"the tf\.train\.Checkpoint was .*length=4 there and 2 here"
        ):
            tf.train.Checkpoint(clipper=shorter).restore(path)
        np.testing.assert_array_equal(shorter.export_state().groups[0].values, BEFORE[-2:])
        standard = StandardClip()
        self.steps(standard, variable, AFTER)
        with pytest.warns(
            UserWarning,
            match=r"the tf\.train\.Checkpoint was .*rule='quantile' there",
        ):
            tf.train.Checkpoint(clipper=standard).restore(path)
        np.testing.assert_array_equal(standard.export_state().groups[0].values, BEFORE[-4:])

    def test_an_asynchronous_one_holds_the_history_of_its_moment(self, tmp_path):
        """Its thread writes while the training goes on; here it waits until that has ended."""
        has_trained = threading.Event()

        class Gate(tf.Module):
            def _serialize_to_tensors(self):
                assert has_trained.wait(timeout=60)
                return {"gate": tf.constant(0)}

        variable, clipper = tf.Variable([0.0]), self.clipper()
        checkpoint = tf.train.Checkpoint(a_gate=Gate(), clipper=clipper)
        options = tf.train.CheckpointOptions(experimental_enable_async_checkpoint=True)
        for i in range(2):  # TensorFlow copies eagerly first, and in a graph then
            self.steps(clipper, variable, BEFORE)
            has_trained.clear()
            path = checkpoint.save(f"{tmp_path}/{i}/checkpoint", options=options)
            state = clipper.state_dict()
            self.steps(clipper, variable, AFTER)
            has_trained.set()
            checkpoint.sync()
            other = self.clipper()
            other.build([variable])
            tf.train.Checkpoint(clipper=other).restore(path).expect_partial()
            assert other.state_dict() == state

    def test_not_inside_a_function(self, tmp_path):
        clipper = self.clipper()
        self.steps(clipper, tf.Variable([0.0]), BEFORE)
        checkpoint = tf.train.Checkpoint(clipper=clipper)
        with pytest.raises(RuntimeError, match=r"outside of any tf\.function"):
            tf.function(lambda: checkpoint.write(f"{tmp_path}/checkpoint"))()
