"""Every setting, mode and rule, in eager mode, in graphs and under XLA, against the core."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from rules import KINDS, Mad

from autoclip.core import History
from autoclip.tf import Clipper, QuantileClip, StandardClip
from autoclip.tf.logging import log_values

SHAPES = [(3,), (2, 2), ()]


def gradients_of(norms):
    return [
        np.full(shape, norm / np.sqrt(np.prod(shape)), np.float32)
        for shape, norm in zip(SHAPES, norms)
    ]


def norms_of(gradients):
    return [float(np.linalg.norm(np.asarray(each, np.float64))) for each in gradients]


# Quarters of powers of 1.25: any two of them are equal or differ by much more than a tolerance.
usual = st.integers(-20, 20).map(lambda power: float(np.float32(1.25**power)))
streams = st.lists(
    st.tuples(*[st.one_of(usual, usual, st.sampled_from([0.0, np.nan, np.inf]))] * 3),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(stream=streams)
def test_every_rule_and_setting_is_the_cores(steps, mode, kind, stream):
    rule, options = KINDS[kind]
    run = steps(Clipper(rule, 5, **options), SHAPES, mode)
    drops = options.get("on_spike") == "zero"
    core = History(3, rule, 5, **{k: v for k, v in options.items() if k != "on_spike"})
    for norms in stream:
        before = gradients_of(norms)
        clipped = run(*before)
        expected = core.record(norms_of(before))
        np.testing.assert_allclose(run.clipper.last.thresholds, expected.thresholds, rtol=1e-6)
        # A norm that equals its threshold but for its last bits is clipped by these, or not.
        apart = abs(expected.coefficients - 1) > 1e-5
        factors = np.where(drops & apart, 0.0, expected.coefficients)
        near = (expected.coefficients < 1) & ~apart
        for i, (ours, gradient) in enumerate(zip(clipped, before)):
            if not (near[i] and drops):
                np.testing.assert_allclose(ours, gradient * factors[i], rtol=1e-5)
    for ours, theirs in zip(run.windows(), core.read(range(3))[0], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    np.testing.assert_allclose(run.clipper.thresholds, core.thresholds, rtol=1e-5)


class TestModes:
    def make(self, **options):
        variables = [tf.Variable([0.0], name=name) for name in ("a/kernel", "a/bias", "b/kernel")]
        clipper = QuantileClip(0.5, **options)
        clipper.build(variables)
        return clipper, variables

    def test_a_group_has_one_norm(self, mode):
        clipper, variables = self.make(
            group_clipping=True, group_settings=[{"match": "kernel", "quantile": 0.0}]
        )

        def step(gradients):
            return [g for g, _ in clipper(zip(gradients, variables))]

        run = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")
        run([tf.constant([3.0]), tf.constant([1.0]), tf.constant([4.0])])
        clipped = run([tf.constant([6.0]), tf.constant([3.0]), tf.constant([8.0])])
        assert clipper.last.names == ("group 0", "group 1")
        np.testing.assert_allclose(clipper.last.norms, [10.0, 3.0])
        np.testing.assert_allclose(clipper.last.thresholds, [5.0, 2.0])
        np.testing.assert_allclose(clipped, [[3.0], [2.0], [4.0]], rtol=1e-6)
        assert clipper.export_state().mode == "group"

    @pytest.mark.parametrize("modes", [{"global_clipping": True}, {"group_clipping": True}])
    def test_what_is_left_of_a_gradient_that_is_not_finite(self, modes):
        kept, variables = self.make(**modes)
        zeroed, _ = self.make(on_nonfinite="zero", **modes)
        zeroed.reset()
        pairs = [(tf.constant([value]), v) for value, v in zip([3.0, np.nan, 4.0], variables)]
        np.testing.assert_array_equal([g.numpy() for g, _ in kept(pairs)], [[3.0], [np.nan], [4.0]])
        assert kept.export_state().groups[0].recorded.tolist() == [0]
        other = QuantileClip(0.5, on_nonfinite="zero", **modes)
        np.testing.assert_array_equal([g.numpy() for g, _ in other(pairs)], [[3.0], [0.0], [4.0]])
        assert other.export_state().groups[0].values.tolist() == [5.0]

    def test_on_nonfinite_of_a_group(self):
        variables = [tf.Variable([0.0], name=name) for name in "ab"]
        clipper = QuantileClip(group_settings=[{"match": "a", "on_nonfinite": "zero"}])
        pairs = clipper([(tf.constant([np.nan]), variable) for variable in variables])
        np.testing.assert_array_equal([g.numpy() for g, _ in pairs], [[0.0], [np.nan]])

    def test_names(self):
        assert self.norms_named({}) == ("a/kernel", "a/bias", "b/kernel")
        assert self.norms_named({"global_clipping": True}) == ("all parameters",)

    def norms_named(self, modes):
        clipper, variables = self.make(**modes)
        clipper([(tf.constant([1.0]), variable) for variable in variables])
        return clipper.last.names


class TestChangingSettings:
    @pytest.mark.parametrize("mode", ["graph", "xla"])
    def test_a_traced_graph_follows(self, mode):
        variable = tf.Variable([0.0], name="v")
        clipper = QuantileClip(1.0, max_norm=100.0)
        clipper.build([variable])
        traces = []

        @tf.function(jit_compile=mode == "xla")
        def step(gradient):
            traces.append(None)
            return clipper([(gradient, variable)])[0][0]

        step(tf.constant([1.0]))
        np.testing.assert_allclose(step(tf.constant([3.0])), [3.0])
        (group,) = clipper.param_groups
        group["quantile"] = 0.0
        np.testing.assert_allclose(step(tf.constant([5.0])), [1.0])
        group["max_norm"] = 0.5
        np.testing.assert_allclose(step(tf.constant([5.0])), [0.5])
        group["max_norm"] = None
        np.testing.assert_allclose(step(tf.constant([5.0])), [1.0])
        assert len(traces) == 1
        assert clipper.defaults["quantile"] == group["quantile"] == 0.0
        assert clipper.get_config()["quantile"] == 0.0

    @pytest.mark.parametrize(
        ("name", "value", "error"),
        [
            ("quantile", 2.0, ValueError),
            ("quantile", "0.5", TypeError),
            ("history_length", 5, ValueError),
            ("max_norm", 1.0, ValueError),  # no group had one
            ("on_nonfinite", "zero", ValueError),
            ("include_current", False, ValueError),
            ("on_spike", "skip", ValueError),
            ("momentum", 1.0, KeyError),
            ("match", "a", KeyError),
            ("params", [], KeyError),
        ],
    )
    def test_what_cannot_change_is_refused(self, name, value, error):
        clipper = QuantileClip(0.5)
        clipper.build([tf.Variable([0.0], name="v")])
        (group,) = clipper.param_groups
        before = {k: v for k, v in group.items() if k != "params"}
        with pytest.raises(error):
            group[name] = value
        assert {k: v for k, v in group.items() if k != "params"} == before
        assert {k: v for k, v in clipper.param_groups[0].items() if k != "params"} == before

    def test_one_group_of_two(self):
        variables = [tf.Variable([0.0], name=name) for name in "ab"]
        clipper = QuantileClip(0.9, group_settings=[{"match": "a", "quantile": 0.2}])
        clipper.build(variables)
        clipper.param_groups[0]["quantile"] = 0.3
        clipper.param_groups[1]["quantile"] = 0.8
        assert [group["quantile"] for group in clipper.param_groups] == [0.3, 0.8]
        other = QuantileClip.from_config(clipper.get_config())
        other.build(variables)
        assert [group["quantile"] for group in other.param_groups] == [0.3, 0.8]


class SetQuantiles(keras.callbacks.Callback):
    """Writes settings before the first batch, when the optimizer has no variables yet."""

    def on_train_begin(self, logs=None):
        for group, quantile in zip(self.model.optimizer.clipper.param_groups, (0.25, 0.75)):
            group["quantile"] = quantile


class TestBeforeTheVariablesAreKnown:
    def test_a_callback_writes_settings(self, model, fit):
        expected, ours = model(), model()
        for each, quantiles in ((expected, (0.25, 0.75)), (ours, (0.5, 0.9))):
            groups = [{"match": "kernel", "quantile": quantiles[0]}]
            optimizer = QuantileClip.as_optimizer(
                keras.optimizers.SGD(0.01), quantile=quantiles[1], group_settings=groups
            )
            each.compile(optimizer=optimizer, loss="mse")
        fit(expected)
        fit(ours, callbacks=[SetQuantiles()])
        found = ours.optimizer.clipper
        assert [group["quantile"] for group in found.param_groups] == [0.25, 0.75]
        for weight, other in zip(expected.weights, ours.weights):
            np.testing.assert_array_equal(weight.numpy(), other.numpy())
        assert found.get_config() == expected.optimizer.clipper.get_config()

    def test_wrong_values_and_global_clipping(self):
        clipper = QuantileClip(global_clipping=True, group_settings=[{"match": "a"}])
        for group in clipper.param_groups:  # which share their settings
            with pytest.raises(ValueError, match="quantile"):
                group["quantile"] = 2.0
        group, other = clipper.param_groups
        group["quantile"] = 0.5
        other["history_length"] = 3
        assert [each["quantile"] for each in clipper.param_groups] == [0.5, 0.5]
        assert clipper.defaults["history_length"] == 3
        variable = tf.Variable(tf.zeros(4), name="a")
        for size in (8.0, 1.0, 2.0, 9.0):
            [(clipped, _)] = clipper([(tf.fill([4], size / 2), variable)])
        assert float(tf.norm(clipped)) == pytest.approx(2.0)

    @pytest.mark.parametrize("built", [False, True])
    def test_a_configuration_under_global_clipping_holds_written_settings(self, built):
        groups = [{"match": "a"}, {"match": "b"}]
        clipper = QuantileClip(global_clipping=True, group_settings=groups)
        if built:
            clipper.build([tf.Variable([0.0], name=name) for name in "ab"])
        clipper.param_groups[0]["quantile"] = 0.5
        copy = QuantileClip.from_config(clipper.get_config())
        assert copy.defaults == clipper.defaults
        assert copy.defaults["quantile"] == 0.5
        assert copy.get_config() == clipper.get_config()


class TestAStepAndAfter:
    def test_last_is_never_of_an_older_step(self):
        variable = tf.Variable([0.0])
        clipper = QuantileClip()
        clipper.build([variable])
        assert log_values(clipper) == {}
        clipper([(tf.constant([1.0]), variable)])
        assert clipper.last.norms.numpy().tolist() == [1.0]
        clipper([(None, variable)])
        assert log_values(clipper) == {}
        with pytest.raises(RuntimeError, match="nothing to report"):
            _ = clipper.last
        clipper([(tf.constant([0.0]), variable)])
        assert set(log_values(clipper).values()) == {0.0}

    def test_thresholds_after_a_load(self):
        variable = tf.Variable([0.0], name="v")
        clipper = StandardClip(1.0, warmup_steps=2)
        with pytest.raises(RuntimeError, match="does not know its variables"):
            _ = clipper.thresholds
        clipper.build([variable])
        np.testing.assert_array_equal(clipper.thresholds, [np.inf])
        for size in (2.0, 6.0):
            clipper([(tf.constant([size]), variable)])
        other = StandardClip(1.0, warmup_steps=2)
        other.build([variable])
        other.load_state_dict(clipper.state_dict())
        np.testing.assert_array_equal(other.thresholds, [6.0])

    def test_reset(self):
        variable = tf.Variable([0.0], name="v")
        clipper = QuantileClip(0.0)
        clipper([(tf.constant([1.0]), variable)])
        saved = clipper.state_dict()
        clipper.reset()
        assert log_values(clipper) == {}
        ((gradient, _),) = clipper([(tf.constant([9.0]), variable)])
        assert gradient.numpy().tolist() == [9.0]
        assert clipper.export_state().groups[0].recorded.tolist() == [1]
        waiting = QuantileClip(0.0)
        waiting.load_state_dict(saved)
        waiting.reset()
        waiting.build([tf.Variable([0.0, 0.0], name="w")])  # nothing waits that does not fit
        assert waiting.export_state().groups[0].recorded.tolist() == [0]

    def test_a_gradient_of_integers(self):
        variable = tf.Variable([0.0], name="v")
        clipper = QuantileClip()
        with pytest.raises(TypeError, match=r"gradient of 'v' is of int32.*cast its gradient"):
            clipper([(tf.constant([1]), variable)])


class TestMaking:
    def test_skip_is_for_torch(self):
        for make in (
            lambda: QuantileClip(on_spike="skip"),
            lambda: QuantileClip(group_settings=[{"match": "a", "on_spike": "skip"}]),
        ):
            with pytest.raises(ValueError, match='Use on_spike="zero"'):
                make()

    def test_histories_beyond_memory(self):
        with pytest.raises(ValueError, match=r"history_length=1000000000000 takes 7,451 GiB"):
            QuantileClip(history_length=10**12)
        clipper = QuantileClip(history_length=2**32)
        with pytest.raises(ValueError, match="for 3 histories"):
            clipper.build([tf.Variable(0.0) for _ in range(3)])
        assert not clipper.built

    def test_a_rule_of_ones_own_on_an_optimizer(self):
        optimizer = Clipper.as_optimizer(
            keras.optimizers.SGD(), Mad(1.5), 7, group_settings=[{"match": "b", "deviations": 0.5}]
        )
        config = optimizer.get_config()
        assert config["autoclip"]["clipper"]["config"]["rule"] == {
            "name": "tests_mad",
            "deviations": 1.5,
        }
        other = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
        assert other.clipper.rule == Mad(1.5)
        assert other.clipper.get_config() == optimizer.clipper.get_config()
        config["autoclip"]["clipper"]["config"]["rule"]["name"] = "unheard of"
        with pytest.raises(ValueError, match="'unheard of', which is not registered"):
            type(optimizer).from_config(config)

    def test_a_rule_of_ones_own_is_saved_and_loaded(self, tmp_path):
        variable = tf.Variable([0.0], name="v")
        clipper = Clipper(Mad(1.0))
        for size in (1.0, 2.0, 9.0):
            clipper([(tf.constant([size]), variable)])
        clipper.save(tmp_path / "state")
        other = Clipper(Mad(1.0))
        other.load(tmp_path / "state")
        other.build([variable])
        np.testing.assert_array_equal(other.thresholds, [3.0])
        # Another rule goes on with the norms.
        quantile = QuantileClip(0.5)
        quantile.build([variable])
        with pytest.warns(UserWarning, match="rule='tests_mad' there and 'quantile' here"):
            quantile.load(tmp_path / "state")
        np.testing.assert_array_equal(quantile.thresholds, [2.0])
