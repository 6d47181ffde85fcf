"""`model.fit` with a clipper: the same training as a loop by hand, however Keras runs it."""

from __future__ import annotations

import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf

from autoclip.core import Quantile, Standard
from autoclip.tf import QuantileClip, StandardClip

FITS = {
    "eager": {"run_eagerly": True},
    "graph": {"jit_compile": False},
    "xla": {"jit_compile": True},
    "auto": {"jit_compile": "auto"},
}
# How a step runs, and `global_clipping`, on each commit. Nightly all.
OFTEN = [("eager", True), ("graph", False), ("xla", False)]


# "auto" means no XLA on a CPU, and so the same graph.
@pytest.fixture(
    params=[pytest.param(how, marks=[pytest.mark.nightly] * (how == "auto")) for how in FITS]
)
def how(request):
    """Arguments of `compile`: in which way `fit` runs a step."""
    return FITS[request.param]


@pytest.mark.parametrize(
    ("how", "global_clipping"),
    [
        pytest.param(how, mode, marks=[pytest.mark.nightly] * ((how, mode) not in OFTEN))
        for how in FITS
        for mode in (False, True)
    ],
    indirect=["how"],
)
def test_fit_is_the_loop_by_hand(model, growing, fit, by_hand, how, global_clipping):
    expected = by_hand(
        model(), keras.optimizers.Adam(1e-3), Quantile(0.9), 1000, global_clipping
    ).fit(*growing, epochs=3)
    assert expected.clipped > 2
    ours = model()
    optimizer = QuantileClip.as_optimizer(
        keras.optimizers.Adam(1e-3),
        quantile=0.9,
        history_length=1000,
        global_clipping=global_clipping,
    )
    ours.compile(optimizer=optimizer, loss="mse", **how)
    assert ours.jit_compile is (how == FITS["xla"])  # "auto" means no on a CPU
    fit(ours, epochs=3, built=False)
    assert int(optimizer.iterations) == 12
    expected.assert_equals(ours, optimizer.clipper)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.1),  # whose first step makes no variable
        pytest.param(keras.optimizers.Adam, marks=pytest.mark.nightly),
    ],
)
def test_a_step_is_traced_as_often_as_without_a_clipper(model, growing, monkeypatch, make):
    traces = []
    original = keras.Model.train_step
    monkeypatch.setattr(
        keras.Model, "train_step", lambda *args: (traces.append(1), original(*args))[1]
    )
    counts = []
    for wrap in (lambda optimizer: optimizer, QuantileClip.as_optimizer):
        trained = model()
        trained.compile(optimizer=wrap(make()), loss="mse", jit_compile=False)
        trained.fit(*growing, batch_size=8, verbose=0)
        counts.append(len(traces))
        traces.clear()
    assert counts[0] == counts[1]


def test_standard_clip_and_a_window_that_is_full(model, growing, fit, by_hand):
    settings = {"warmup_steps": 2}
    expected = by_hand(model(), keras.optimizers.SGD(1e-2), Standard(0.5), 5, **settings).fit(
        *growing, epochs=3
    )
    assert expected.clipped > 2
    ours = model()
    optimizer = StandardClip.as_optimizer(keras.optimizers.SGD(1e-2), 0.5, 5, **settings)
    ours.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    fit(ours, epochs=3)
    expected.assert_equals(ours, optimizer.clipper)


def test_the_example_of_release_0_2_1_in_todays_words(growing, windows):
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.layers.Dense(50),
            keras.layers.ReLU(),
            keras.layers.Dense(50),
            keras.layers.ReLU(),
            keras.layers.Dense(1),
        ]
    )
    optimizer = QuantileClip.as_optimizer(
        keras.optimizers.Adam(learning_rate=1e-3), quantile=0.9, history_length=1000
    )
    model.compile(optimizer=optimizer, loss="mean_absolute_error", metrics=["accuracy"])
    # 63 samples in batches of 21: no sum of an odd number of signs is a gradient of zero.
    history = model.fit(*(each[1:] for each in growing), 21, epochs=5, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert len(history["accuracy"]) == 5
    assert [len(window) for window in windows(optimizer.clipper)] == [15] * 6


@pytest.mark.parametrize("how", ["eager", "graph", "xla"], indirect=True)
def test_several_steps_an_execution(model, growing, fit, by_hand, how):
    """Of 8 steps: two and two thirds executions."""
    expected = by_hand(model(), keras.optimizers.SGD(1e-2)).fit(*growing, batch_size=8)
    ours = model()
    optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1e-2), 0.5)
    ours.compile(optimizer=optimizer, loss="mse", steps_per_execution=3, **how)
    fit(ours, batch_size=8)
    expected.assert_equals(ours, optimizer.clipper)


def test_train_on_batch(model, growing, by_hand):
    expected = by_hand(model(), keras.optimizers.SGD(1e-2)).fit(*growing)
    ours = model()
    optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1e-2), 0.5)
    ours.compile(optimizer=optimizer, loss="mse")
    x, y = growing
    for start in range(0, len(x), 16):
        ours.train_on_batch(x[start : start + 16], y[start : start + 16])
    expected.assert_equals(ours, optimizer.clipper)


class TestLoopsOfOnesOwn:
    @pytest.mark.parametrize("call", ["clipper", "apply_gradients", "apply", "apply built"])
    @pytest.mark.parametrize("in_graph", [False, True], ids=["eager", "tf.function"])
    def test_all_ways_to_update(self, model, growing, by_hand, in_graph, call):
        expected = by_hand(model(), keras.optimizers.Adam(1e-2)).fit(*growing)
        assert expected.clipped > 2
        ours = model()
        variables = ours.trainable_variables
        optimizer = keras.optimizers.Adam(1e-2)
        clipper = QuantileClip(0.5)
        if call != "clipper":
            clipper.attach(optimizer)
        if call == "apply built":
            optimizer.build(variables)

        def step(x, y):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(ours(x, training=True) - y))
            gradients = tape.gradient(loss, variables)
            if call == "clipper":
                optimizer.apply_gradients(clipper(zip(gradients, variables)))
            elif call == "apply_gradients":
                optimizer.apply_gradients(zip(gradients, variables))
            elif call == "apply":
                optimizer.apply(gradients, variables)
            else:
                optimizer.apply(gradients)

        run = tf.function(step) if in_graph else step
        for start in range(0, 64, 16):
            run(*(tf.constant(each[start : start + 16]) for each in growing))
        expected.assert_equals(ours, clipper)

    def test_fit_with_a_train_step_of_ones_own(self, growing, fit, by_hand, windows):
        class Model(keras.Model):
            def __init__(self):
                super().__init__()
                self.dense = keras.layers.Dense(1)

            def call(self, x):
                return self.dense(x)

            def train_step(self, batch):
                x, y = batch
                with tf.GradientTape() as tape:
                    loss = self.compute_loss(y=y, y_pred=self(x, training=True))
                gradients = tape.gradient(loss, self.trainable_variables)
                self.optimizer.apply_gradients(zip(gradients, self.trainable_variables))
                return {"loss": loss}

        results = []
        for train_step in (Model.train_step, keras.Model.train_step):
            keras.utils.set_random_seed(0)
            model = type("Mine", (Model,), {"train_step": train_step})()
            optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1e-2), 0.5)
            model.compile(optimizer=optimizer, loss="mse")
            fit(model)
            results.append((windows(optimizer.clipper), model.get_weights()))
        np.testing.assert_equal(*results)


class TestAccumulation:
    """`gradient_accumulation_steps`: an update for two batches of 8 is one for a batch of 16."""

    @pytest.mark.parametrize("how", ["eager", "graph", "xla"], indirect=True)
    def test_the_accumulated_gradient_is_clipped_and_recorded(
        self, model, growing, fit, by_hand, how
    ):
        expected = by_hand(model(), keras.optimizers.Adam(1e-2)).fit(*growing, epochs=2)
        assert expected.clipped > 2
        ours = model()
        optimizer = QuantileClip.as_optimizer(
            keras.optimizers.Adam(1e-2, gradient_accumulation_steps=2), 0.5
        )
        ours.compile(optimizer=optimizer, loss="mse", **how)
        fit(ours, epochs=2, batch_size=8)
        assert optimizer.clipper.export_state().groups[0].recorded[0] == 8  # updates, not batches
        expected.assert_equals(ours, optimizer.clipper)

    def test_an_update_that_is_not_due_leaves_the_clipper_alone(self, model, growing):
        ours = model()
        optimizer = QuantileClip.as_optimizer(
            keras.optimizers.SGD(1e-2, gradient_accumulation_steps=4)
        )
        ours.compile(optimizer=optimizer, loss="mse")
        for batch in range(1, 9):
            before = optimizer.clipper.export_state().to_bytes() if batch > 1 else b""
            ours.train_on_batch(*growing)
            after = optimizer.clipper.export_state().to_bytes()
            assert (after != before) is (batch in (1, 4, 8))  # 1: built


class TestEmbeddings:
    """Their gradients are IndexedSlices."""

    @pytest.fixture
    def tokens(self):
        generator = np.random.default_rng(0)
        # Many duplicates; the last rows of the table never have a gradient.
        targets = np.sort(np.exp(generator.normal(size=(64, 1))), axis=0)
        return generator.integers(0, 5, size=(64, 6)), targets

    def model(self):
        keras.utils.set_random_seed(0)
        return keras.Sequential(
            [
                keras.layers.Input((6,), dtype="int32"),
                keras.layers.Embedding(8, 3),
                keras.layers.Flatten(),
                keras.layers.Dense(1),
            ]
        )

    @pytest.mark.parametrize(
        ("how", "global_clipping"),
        [
            # The rows are what the modes differ in, and these are the same however a step runs.
            pytest.param(how, is_global, marks=[pytest.mark.nightly] * (is_global and how == "xla"))
            for how in ("eager", "graph", "xla")
            for is_global in (False, True)
        ],
        indirect=["how"],
    )
    def test_fit(self, tokens, by_hand, how, global_clipping):
        x, y = tokens[0].astype(np.int32), tokens[1].astype(np.float32)
        expected = by_hand(
            self.model(), keras.optimizers.SGD(1e-1), global_clipping=global_clipping
        )
        assert isinstance(expected.gradients(x, y)[0], tf.IndexedSlices)
        expected.fit(x, y, epochs=2)
        assert expected.clipped > 2
        ours = self.model()
        optimizer = QuantileClip.as_optimizer(
            keras.optimizers.SGD(1e-1), 0.5, global_clipping=global_clipping
        )
        ours.compile(optimizer=optimizer, loss="mse", **how)
        ours.fit(x, y, epochs=2, batch_size=16, shuffle=False, verbose=0)
        expected.assert_equals(ours, optimizer.clipper)

    def test_the_optimizer_gets_slices_as_it_would_without_a_clipper(self, tokens):
        """Whatever an optimizer does for sparse gradients alone, it goes on doing."""
        kinds = []

        class Spy(keras.optimizers.SGD):
            def update_step(self, gradient, variable, learning_rate):
                kinds.append(type(gradient))
                super().update_step(gradient, variable, learning_rate)

        for clipped in (False, True):
            model = self.model()
            optimizer = Spy(1e-1)
            if clipped:
                QuantileClip.as_optimizer(optimizer, 0.5)
            model.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
            model.train_on_batch(*tokens)
        assert kinds[0] is tf.IndexedSlices
        assert kinds[:3] == kinds[3:]


class TestModels:
    def test_variables_without_gradients(self, growing, windows):
        """They are rows like all others, which record nothing."""
        x = keras.Input((4,))
        used, unused = keras.layers.Dense(1, name="used"), keras.layers.Dense(1, name="unused")
        model = keras.Model(x, [used(x), unused(x)])
        optimizer = QuantileClip.as_optimizer(keras.optimizers.Adam(1e-2))
        model.compile(optimizer=optimizer, loss=["mse", None], jit_compile=False)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Gradients do not exist")
            model.fit(growing[0], [growing[1], growing[1]], batch_size=16, verbose=0)
        lengths = dict(zip(names(optimizer.clipper), map(len, windows(optimizer.clipper))))
        assert lengths == {"used/kernel": 4, "used/bias": 4, "unused/kernel": 0, "unused/bias": 0}

    def test_frozen_before_compile(self, model, growing, fit, by_hand):
        """Frozen variables have no row."""
        expected = by_hand(frozen(model()), keras.optimizers.SGD(1e-2)).fit(*growing)
        ours = frozen(model())
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1e-2), 0.5)
        ours.compile(optimizer=optimizer, loss="mse")
        fit(ours)
        assert len(names(optimizer.clipper)) == 2
        expected.assert_equals(ours, optimizer.clipper)

    def test_frozen_after_some_training(self, model, fit, windows):
        """The optimizer knows all variables and gets fewer; the other rows keep their history."""
        ours = model()
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1e-2), 0.5)
        ours.compile(optimizer=optimizer, loss="mse")
        fit(ours)
        before = windows(optimizer.clipper)
        frozen(ours).compile(optimizer=optimizer, loss="mse")
        fit(ours)
        after = windows(optimizer.clipper)
        assert [len(window) for window in after] == [4, 4, 8, 8]
        np.testing.assert_equal(after[:2], before[:2])

    def test_unfrozen_later_needs_a_new_optimizer_with_and_without_a_clipper(self, model, fit):
        for clipped in (False, True):
            ours = frozen(model())
            optimizer = keras.optimizers.SGD(1e-2)
            if clipped:
                QuantileClip.as_optimizer(optimizer)
            ours.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
            fit(ours)
            ours.layers[0].trainable = True
            ours.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
            with pytest.raises(ValueError, match="Unknown variable"):  # Keras's words
                fit(ours)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
    def test_dtypes(self, growing, fit, windows, dtype):
        keras.utils.set_random_seed(0)
        model = keras.Sequential(
            [keras.layers.Dense(8, dtype=dtype), keras.layers.Dense(1, dtype=dtype)]
        )
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1e-3), 0.5)
        model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
        fit(model)
        x, y = (tf.constant(each, dtype) for each in growing)
        assert {variable.dtype for variable in model.trainable_variables} == {dtype}
        with tf.GradientTape() as tape:
            loss = keras.losses.MeanSquaredError(dtype=dtype)(y[:16], model(x[:16]))
        gradients = tape.gradient(loss, model.trainable_variables)
        ours = optimizer.clipper
        optimizer.apply(gradients, model.trainable_variables)
        expected = [np.linalg.norm(np.asarray(g, np.float64)) for g in gradients]
        tolerance = 1e-3 if dtype != "float64" else 1e-6
        np.testing.assert_allclose([w[-1] for w in windows(ours)], expected, rtol=tolerance)
        assert [len(window) for window in windows(ours)] == [5] * 4

    def test_a_model_of_one_variable_is_the_same_in_both_modes(self, growing, fit):
        results = []
        for global_clipping in (False, True):
            keras.utils.set_random_seed(0)
            model = keras.Sequential([keras.layers.Dense(1, use_bias=False)])
            optimizer = QuantileClip.as_optimizer(
                keras.optimizers.SGD(1e-2), 0.5, global_clipping=global_clipping
            )
            model.compile(optimizer=optimizer, loss="mse")
            fit(model)
            results.append((model.get_weights(), [*map(np.asarray, report(optimizer.clipper))]))
            assert len(names(optimizer.clipper)) == 1
        np.testing.assert_equal(*results)

    def test_compiled_again_with_the_same_optimizer_it_goes_on(self, model, growing, fit, by_hand):
        expected = by_hand(model(), keras.optimizers.Adam(1e-2)).fit(*growing, epochs=3)
        ours = model()
        optimizer = QuantileClip.as_optimizer(keras.optimizers.Adam(1e-2), 0.5)
        for how in ({"jit_compile": False}, {"run_eagerly": True}, {"jit_compile": True}):
            ours.compile(optimizer=optimizer, loss="mse", **how)
            fit(ours)
        expected.assert_equals(ours, optimizer.clipper)

    def test_several_models_and_optimizers_do_not_meddle(self, model, growing, fit, by_hand):
        """Two of one kind, trained in turns."""
        rates = (1e-2, 1e-3)
        expected = [by_hand(model(), keras.optimizers.Adam(rate)) for rate in rates]
        ours = [model() for _ in rates]
        optimizers = [QuantileClip.as_optimizer(keras.optimizers.Adam(r), 0.5) for r in rates]
        for each, optimizer in zip(ours, optimizers):
            each.compile(optimizer=optimizer, loss="mse")
        for _ in range(2):
            for each in ours:
                fit(each)
        for each, mine, optimizer in zip(expected, ours, optimizers):
            each.fit(*growing, epochs=2).assert_equals(mine, optimizer.clipper)

    def test_one_optimizer_for_two_models_is_refused_as_keras_does(self, model, fit):
        optimizer = QuantileClip.as_optimizer(keras.optimizers.SGD(1e-2))
        first, second = model(), model()
        for each in (first, second):
            each.compile(optimizer=optimizer, loss="mse", run_eagerly=True)
        fit(first)
        with pytest.raises(ValueError, match="Unknown variable"):
            fit(second)


class TestNonfinite:
    @pytest.fixture
    def broken(self, growing):
        """The third of four batches has a target that is not finite."""
        x, y = (each.copy() for each in growing)
        y[40] = np.nan
        return x, y

    def run(self, model, broken, on_nonfinite, **options):
        optimizer = QuantileClip.as_optimizer(
            keras.optimizers.SGD(1e-2), 0.5, on_nonfinite=on_nonfinite
        )
        model.compile(optimizer=optimizer, loss="mse", **options)
        weights = []

        class Recorder(keras.callbacks.Callback):
            def on_train_batch_end(self, batch, logs=None):
                weights.append(model.get_weights())

        def fit():
            model.fit(*broken, batch_size=16, shuffle=False, verbose=0, callbacks=[Recorder()])

        return optimizer, weights, fit

    @pytest.mark.parametrize("how", ["eager", "graph", "xla"], indirect=True)
    def test_keep_poisons_the_weights_but_not_the_history(self, model, broken, how, windows):
        ours = model()
        optimizer, weights, fit = self.run(ours, broken, "keep", **how)
        fit()
        assert np.isfinite(weights[1][0]).all() and np.isnan(weights[2][0]).any()
        assert [len(window) for window in windows(optimizer.clipper)] == [2] * 4

    @pytest.mark.parametrize("how", ["eager", "graph", "xla"], indirect=True)
    def test_zero_makes_the_step_do_nothing(self, model, broken, how, windows):
        ours = model()
        optimizer, weights, fit = self.run(ours, broken, "zero", **how)
        fit()
        np.testing.assert_equal(weights[2], weights[1])
        assert np.isfinite(weights[3][0]).all() and (weights[3][0] != weights[2][0]).any()
        assert [len(window) for window in windows(optimizer.clipper)] == [3] * 4

    @pytest.mark.parametrize(
        ("how", "error"),
        [("eager", FloatingPointError), ("graph", tf.errors.InvalidArgumentError)],
        indirect=["how"],
    )
    def test_raise_names_the_variables_and_comes_before_the_update(
        self, model, broken, how, error, windows
    ):
        ours = model()
        optimizer, weights, fit = self.run(ours, broken, "raise", **how)
        names = ", ".join(variable.path for variable in ours.trainable_variables)
        with pytest.raises(error, match=f"The gradients of {names} hold NaN or infinity"):
            fit()
        assert len(weights) == 2
        np.testing.assert_equal(ours.get_weights(), weights[1])
        assert [len(window) for window in windows(optimizer.clipper)] == [2] * 4

    @pytest.mark.parametrize("how", ["eager", "graph"], indirect=True)
    def test_weight_decay_comes_even_before_the_error(self, model, broken, how):
        """Keras decays the weights before anyone sees the gradients of all replicas."""
        ours = model()
        optimizer = QuantileClip.as_optimizer(
            keras.optimizers.SGD(0.5, weight_decay=0.5), on_nonfinite="raise"
        )
        ours.compile(optimizer=optimizer, loss="mse", **how)
        before = ours.get_weights()
        with pytest.raises((FloatingPointError, tf.errors.InvalidArgumentError)):
            ours.train_on_batch(*broken)
        for weight, was in zip(ours.get_weights(), before):
            np.testing.assert_allclose(weight, 0.75 * was, rtol=1e-6)


def frozen(model):
    model.layers[0].trainable = False
    return model


def names(clipper):
    return [name for group in clipper.param_groups for name in group["param_names"]]


def report(clipper):
    last = clipper.last
    return last.norms, last.thresholds, last.coefficients
