"""The clippers in a loop of one's own: eagerly, in a graph, and compiled by XLA."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from autoclip.tf import QuantileClip, StandardClip
from autoclip.tf.logging import log_values, summarize

SHAPES = [(3,), (2, 2), ()]


@pytest.fixture(scope="module", params=[False, True], ids=["parameter-wise", "global"])
def global_clipping(request):
    return request.param


def gradients_of(norms):
    """Gradients of SHAPES with these norms; the elements of each are equal."""
    return [
        np.full(shape, norm / np.sqrt(np.prod(shape)), np.float32)
        for shape, norm in zip(SHAPES, norms)
    ]


def norm(gradient):
    return float(np.linalg.norm(np.asarray(gradient, np.float64)))


usual = st.floats(2.0**-20, 2.0**20, width=32)
strange = st.sampled_from([0.0, np.nan, np.inf])
streams = st.lists(st.tuples(*[st.one_of(usual, usual, strange)] * 3), min_size=1, max_size=15)


@settings(max_examples=20)
@given(stream=streams, data=st.data())
def test_a_step_without_a_usable_gradient_leaves_no_trace(steps, mode, stream, data):
    run = steps(QuantileClip(0.3, 5), SHAPES, mode)
    clean = [norms for norms in stream if np.isfinite(norms).all() and min(norms) > 0]
    for norms in clean:
        run(*gradients_of(norms))
    state = run.clipper.state_dict()
    run.reset()
    for norms in clean:
        for _ in range(data.draw(st.integers(0, 2))):
            storm = data.draw(st.tuples(*[strange] * 3))
            for before, after in zip(gradients_of(storm), run(*gradients_of(storm))):
                np.testing.assert_array_equal(before, after)
        run(*gradients_of(norms))
    assert run.clipper.state_dict() == state


def test_variables_record_when_they_have_a_gradient(steps, mode):
    run = steps(QuantileClip(0.5), SHAPES, mode)
    run(*gradients_of([1, 10, 100]))
    clipped = run(gradients_of([3, 0, 0])[0], None, gradients_of([0, 0, 300])[2])
    assert clipped[1] is None
    assert run.windows() == [pytest.approx(w) for w in ([1, 3], [10], [100, 300])]
    np.testing.assert_allclose(run.clipper.last.norms, [3, 0, 300], rtol=1e-6)
    np.testing.assert_allclose(run.clipper.last.thresholds, [2, 10, 200], rtol=1e-6)
    np.testing.assert_allclose(run.clipper.last.coefficients, [2 / 3, 1, 2 / 3], rtol=1e-6)


def test_a_step_without_gradients_does_nothing(steps, mode):
    run = steps(QuantileClip(0.5), SHAPES, mode)
    state = run.clipper.state_dict()
    assert run(None, None, None) == [None, None, None]
    assert run.clipper.state_dict() == state


def test_some_variables_in_another_order():
    first, second = (tf.Variable([0.0], name=name) for name in ("first", "second"))
    clipper = QuantileClip(0.5)
    clipper([(tf.constant([1.0]), first), (tf.constant([10.0]), second)])
    pairs = clipper([(tf.constant([30.0]), second)])
    assert pairs[0][1] is second
    np.testing.assert_allclose(pairs[0][0], [20.0])
    pairs = clipper([(tf.constant([20.0]), second), (tf.constant([3.0]), first)])
    assert [variable.name for _, variable in pairs] == ["second:0", "first:0"]
    np.testing.assert_allclose([gradient.numpy() for gradient, _ in pairs], [[20.0], [2.0]])
    group = clipper.export_state().groups[0]
    assert [window.tolist() for window in group.windows()] == [[1, 3], [10, 30, 20]]


@pytest.mark.parametrize("dtype", [tf.float16, tf.bfloat16, tf.float32, tf.float64, tf.complex64])
def test_dtypes(steps, mode, dtype):
    if mode == "xla" and dtype.is_complex:
        dtype = tf.complex128
    run = steps(QuantileClip(0.5), [(4,)], mode, dtype)
    run(np.full(4, 0.5))
    (clipped,) = run(np.full(4, 1.5))
    assert clipped.dtype == dtype
    np.testing.assert_array_equal(tf.cast(clipped, tf.complex64), np.full(4, 1.0, np.complex64))
    np.testing.assert_allclose(run.clipper.last.thresholds, [2.0])


def test_dtypes_mixed_in_one_clipper(mode):
    variables = [tf.Variable(tf.zeros(4, dtype)) for dtype in (tf.float16, tf.float64, tf.float32)]
    clipper = QuantileClip(0.5, global_clipping=True)

    @tf.function(jit_compile=mode == "xla")
    def step(size):
        gradients = [tf.cast(tf.fill([4], size / 2), v.dtype) for v in variables]
        return [gradient for gradient, _ in clipper(zip(gradients, variables))]

    with_mode = step.python_function if mode == "eager" else step
    with_mode(tf.constant(1.0))
    clipped = with_mode(tf.constant(3.0))
    assert [g.dtype for g in clipped] == [v.dtype for v in variables]
    for gradient in clipped:
        np.testing.assert_allclose(gradient, np.full(4, 1.0), rtol=1e-6)


def test_16_bit_gradients_are_multiplied_in_float32(steps, mode):
    """Rounded to float16, the coefficient 0.9995 would be 0.9995117."""
    run = steps(QuantileClip(0.0), [(2,)], mode, tf.float16)
    run(np.float16([0.0, 999.5]))
    (clipped,) = run(np.float16([0.0, 1000.0]))
    np.testing.assert_array_equal(clipped, np.float16([0.0, 999.5]))


class TestIndexedSlices:
    def slices(self, factor=1.0, rows=6):
        """Row 1 twice, row 4 once: the dense gradient has rows (4, 6) and (0, 12)."""
        values = np.float32([[1, 2], [0, 12], [3, 4]]) * factor
        return tf.IndexedSlices(tf.constant(values), tf.constant([1, 4, 1]), tf.constant([rows, 2]))

    def test_the_norm_is_that_of_the_dense_gradient(self, steps, mode, global_clipping):
        run = steps(QuantileClip(0.5, global_clipping=global_clipping), [(6, 2)], mode)
        run(self.slices())
        (clipped,) = run(self.slices(3.0))
        np.testing.assert_allclose(run.windows(), [[14.0, 42.0]], rtol=1e-6)  # 4² + 6² + 12² = 14²
        assert isinstance(clipped, tf.IndexedSlices)
        np.testing.assert_array_equal(clipped.indices, [1, 4, 1])
        np.testing.assert_array_equal(clipped.dense_shape, [6, 2])
        np.testing.assert_allclose(clipped.values, self.slices(2.0).values, rtol=1e-6)

    def test_nothing_is_made_dense(self, steps):
        """A table of a terabyte, of which three rows have a gradient."""
        clipper = QuantileClip(0.5)
        variable = tf.Variable(tf.zeros((6, 2)))
        clipper.build([variable])
        huge = self.slices(rows=2**37)

        @tf.function(jit_compile=True)
        def compiled(values, indices):
            gradient = tf.IndexedSlices(values, indices, tf.constant([2**37, 2], tf.int64))
            return clipper([(gradient, variable)])[0][0].values

        for call in (
            lambda g: clipper([(g, variable)])[0][0].values,
            lambda g: compiled(g.values, g.indices),
        ):
            np.testing.assert_allclose(call(huge), huge.values, rtol=1e-6)
        np.testing.assert_allclose(clipper.last.norms, [14.0], rtol=1e-6)

    def test_no_slices_at_all(self, steps, mode):
        run = steps(QuantileClip(0.5), [(6, 2)], mode)
        run(tf.IndexedSlices(tf.zeros((0, 2)), tf.zeros(0, tf.int32), tf.constant([6, 2])))
        assert run.windows() == [[]]

    @settings(max_examples=30)
    @given(
        indices=st.lists(st.integers(0, 4), min_size=1, max_size=12),
        seed=st.integers(0, 2**32 - 1),
    )
    def test_any_indices(self, indices, seed):
        values = np.random.default_rng(seed).normal(size=(len(indices), 3)).astype(np.float32)
        dense = np.zeros((5, 3), np.float64)
        np.add.at(dense, indices, values)
        clipper = QuantileClip(0.5)
        gradient = tf.IndexedSlices(tf.constant(values), tf.constant(indices), tf.constant([5, 3]))
        clipper([(gradient, tf.Variable(tf.zeros((5, 3))))])
        expected = np.linalg.norm(dense)
        np.testing.assert_allclose(clipper.last.norms, [expected], rtol=1e-5, atol=1e-6)


class TestNonfinite:
    def bad(self, value):
        return np.float32([1.0, value, 2.0]), np.float32([[3.0, 0.0], [0.0, 0.0]]), np.float32(4.0)

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_keep(self, steps, mode, value):
        run = steps(QuantileClip(0.5), SHAPES, mode)
        before = self.bad(value)
        for ours, gradient in zip(run(*before), before):
            np.testing.assert_array_equal(ours, gradient)
        assert run.windows() == [[], [3.0], [4.0]]

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("kind", ["dense", "slices"])
    def test_zero(self, steps, mode, value, kind):
        run = steps(QuantileClip(0.5, on_nonfinite="zero"), SHAPES, mode)
        before = list(self.bad(value))
        if kind == "slices":
            before[0] = tf.IndexedSlices(
                tf.constant(before[0]), tf.constant([0, 1, 2]), tf.constant([3])
            )
        clipped = run(*before)
        np.testing.assert_array_equal(tf.convert_to_tensor(clipped[0]), np.zeros(3))
        np.testing.assert_array_equal(clipped[1], before[1])
        assert run.windows() == [[], [3.0], [4.0]]

    def test_zero_in_global_mode_records_the_norm_of_what_is_left(self, steps, mode):
        run = steps(QuantileClip(0.5, global_clipping=True, on_nonfinite="zero"), SHAPES, mode)
        clipped = run(*self.bad(np.nan))
        np.testing.assert_array_equal(clipped[0], np.zeros(3))
        np.testing.assert_array_equal(clipped[1], self.bad(0)[1])
        assert run.windows() == [[5.0]]

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_raise_names_the_parameters_and_records_nothing(self, steps, mode, value):
        run = steps(QuantileClip(0.5, on_nonfinite="raise"), SHAPES, mode)
        run(*gradients_of([1, 10, 100]))
        state = run.clipper.state_dict()
        first, second, third = self.bad(value)
        error = tf.errors.InvalidArgumentError if mode == "graph" else FloatingPointError

        def step_and_check(*gradients):
            clipped = run(*gradients)  # raises, except under XLA, which cannot stop
            for ours, gradient in zip(clipped, gradients):
                expected = gradient if np.isfinite(gradient).all() else np.zeros_like(gradient)
                np.testing.assert_array_equal(ours, expected)
            run.clipper.check()

        # TensorFlow escapes quotation marks in the texts of assertions.
        one = r'The gradient of variable_0 holds NaN or infinity, and on_nonfinite is \\?"raise'
        with pytest.raises(error, match=one):
            step_and_check(first, second, third)
        run.clipper.check()  # said once
        assert run.clipper.state_dict() == state
        two = "The gradients of variable_0, variable_2 hold NaN or infinity"
        with pytest.raises(error, match=two):
            step_and_check(first, second, np.float32(value))
        assert run.clipper.state_dict() == state
        run(*gradients_of([3, 30, 300]))
        run.clipper.check()
        assert run.windows() == [pytest.approx(w) for w in ([1, 3], [10, 30], [100, 300])]

    def test_raise_comes_before_the_update_of_the_weights(self):
        variable = tf.Variable([1.0])
        clipper = QuantileClip(on_nonfinite="raise")

        @tf.function
        def step(gradient):
            for clipped, v in clipper([(gradient, variable)]):
                v.assign_sub(clipped)

        with pytest.raises(tf.errors.InvalidArgumentError, match="NaN or infinity"):
            step(tf.constant([np.nan]))
        np.testing.assert_array_equal(variable, [1.0])

    def test_a_finite_gradient_beyond_float32_is_left_alone(self, steps, mode):
        """Its norm is beyond float32, and its elements are not."""
        huge = np.full(3, 3e38, np.float32)
        for on_nonfinite in ("zero", "raise"):
            run = steps(QuantileClip(0.5, on_nonfinite=on_nonfinite), [(3,)], mode)
            (clipped,) = run(huge)
            np.testing.assert_array_equal(clipped, huge)
            assert run.windows() == [[]]
            run.clipper.check()


class TestErrors:
    def test_variables(self):
        a, b = tf.Variable([1.0], name="a"), tf.Variable([1.0], name="b")
        clipper = QuantileClip()
        with pytest.raises(ValueError, match="empty list of variables"):
            clipper.build([])
        with pytest.raises(ValueError, match="empty list of variables"):
            clipper([])
        with pytest.raises(TypeError, match=r"variables must be tf\.Variables or Keras variables"):
            clipper.build([tf.constant([1.0])])
        with pytest.raises(ValueError, match="same variable twice"):
            clipper.build([a, a])
        assert not clipper.built
        clipper.build([a])
        clipper.build([a])  # the same ones, as Keras may do
        with pytest.raises(ValueError, match="with 1 variables and now gets 1 others, such as 'b'"):
            clipper.build([a, b])
        with pytest.raises(ValueError, match="'b' is not among the 1 variables"):
            clipper([(tf.constant([1.0]), b)])
        with pytest.raises(ValueError, match="'a' appears more than once among the variables"):
            clipper([(tf.constant([1.0]), a), (tf.constant([1.0]), a)])
        assert clipper.export_state().groups[0].recorded.tolist() == [0]

    def test_last_before_any_step(self):
        with pytest.raises(RuntimeError, match="There is nothing to report"):
            _ = QuantileClip().last


def test_a_clipper_is_built_by_its_first_call_even_in_a_graph(mode):
    variable = tf.Variable([0.0])
    clipper = QuantileClip(0.5)

    def step(gradient):
        return clipper([(gradient, variable)])[0][0]

    run = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")
    for size in (1.0, 3.0):
        clipped = run(tf.constant([size]))
    np.testing.assert_allclose(clipped, [2.0])


def test_repr():
    clipper = QuantileClip(0.5, 10)
    assert repr(clipper) == "QuantileClip(\n    quantile=0.5, factor=1.0, history_length=10\n)"
    clipper.build([tf.Variable([0.0])])
    assert repr(clipper).endswith("history_length=10\n    group 0: 1 parameter\n)")


@pytest.mark.parametrize(
    "read",
    [log_values, summarize, QuantileClip.state_dict, QuantileClip.check, pickle.dumps],
    ids=["log_values", "summarize", "state_dict", "check", "pickle"],
)
def test_numbers_are_not_read_while_a_function_is_traced(read):
    variable = tf.Variable([0.0])
    clipper = QuantileClip(0.5, on_nonfinite="raise")

    @tf.function
    def step(clips):
        if clips:
            clipper([(tf.constant([1.0]), variable)])
        return read(clipper) if clips else clipper.total_norm

    with pytest.raises(RuntimeError, match=r"such as Keras's train_step.*clipper\.total_norm"):
        step(True)
    clipper([(tf.constant([1.0]), variable)])
    read(clipper)
    assert float(step(False)) == 1.0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_copy_goes_on_with_its_own_history(copied):
    variable = tf.Variable([0.0])
    clipper = QuantileClip(0.5, 10, on_nonfinite="zero", group_settings=[{"match": "Variable"}])
    clipper([(tf.constant([1.0]), variable)])
    other = copied(clipper)
    assert type(other) is QuantileClip
    assert other.get_config() == clipper.get_config()
    ((clipped, _),) = other([(tf.constant([3.0]), variable)])
    np.testing.assert_allclose(clipped, [2.0])
    assert clipper.export_state().groups[0].recorded.tolist() == [1]


def test_a_thousand_variables_are_traced_in_linear_size():
    """Operations in the graph: some for each variable, none for each pair of them."""

    def operations(count):
        variables = [tf.Variable(tf.zeros(3)) for _ in range(count)]
        clipper = QuantileClip()

        @tf.function
        def step():
            return clipper([(tf.ones(3), variable) for variable in variables])[0][0]

        graph = step.get_concrete_function().graph
        return len(graph.get_operations())

    ten, hundred = operations(10), operations(100)
    assert (hundred - ten) / 90 < 12


@pytest.mark.parametrize("size", [3, 5000])
@pytest.mark.parametrize(
    "settings", [{}, {"global_clipping": True}, {"on_nonfinite": "zero"}], ids=str
)
def test_a_coefficient_is_a_constant_to_a_tape(mode, size, settings):
    """Eagerly, in a graph and under XLA: d(c * x ** 2)/dx is 2 * c * x."""
    clipper, variable = QuantileClip(0.5, **settings), tf.Variable(tf.zeros(size))
    clipper.build([variable])

    def derivative(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            [(clipped, _)] = clipper([(x * x, variable)])
            total = tf.reduce_sum(clipped)
        return tape.gradient(total, x)

    run = derivative if mode == "eager" else tf.function(derivative, jit_compile=mode == "xla")
    for value, coefficient in ((1.0, 1.0), (2.0, 2.5 / 4), (5.0, 4 / 25)):
        found = run(tf.fill([size], value))
        np.testing.assert_allclose(found, np.full(size, 2 * coefficient * value), rtol=1e-5)


@pytest.fixture
def checked_numerics():
    tf.debugging.enable_check_numerics()
    yield
    tf.debugging.disable_check_numerics()


@pytest.mark.usefixtures("checked_numerics")
@pytest.mark.parametrize(
    ("make", "is_graph"),
    [
        # Eagerly each; in a graph those that have what this one has, and more.
        pytest.param(
            make,
            is_graph,
            marks=[pytest.mark.nightly] * (is_graph and name == "quantile"),
            id=f"{name}-{'graph' if is_graph else 'eager'}",
        )
        for name, make in {
            "quantile": lambda: QuantileClip(0.5, 5),
            "global": lambda: QuantileClip(0.5, 5, True, on_nonfinite="zero"),
            "spikes": lambda: QuantileClip(
                0.5, 5, on_spike="zero", max_norm=100.0, on_nonfinite="raise"
            ),
            "standard": lambda: StandardClip(1.0, 5, warmup_steps=3, record="clipped"),
            "groups": lambda: QuantileClip(
                0.5, 5, group_settings=[{"match": "_1", "history_length": 3}]
            ),
        }.items()
        for is_graph in (False, True)
    ],
)
def test_no_operation_returns_nan_or_infinity(make, is_graph):
    """Those who look for NaN and infinity in their model find none in a clipper's steps.

    XLA compiles no graph with these checks.
    """
    clipper = make()
    dtypes = [tf.float32, tf.float32, tf.float64, tf.float16, tf.float32]
    shapes = [(3,), (5000,), (5000,), (8,), (0, 2)]
    variables = [
        tf.Variable(tf.zeros(shape, dtype), name=f"variable_{i}")
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes))
    ]
    rows = tf.Variable(tf.zeros([6, 2]), name="rows")
    clipper.build([*variables, rows])

    def step(size, large):
        gradients = [tf.fill(v.shape, tf.cast(size, v.dtype)) for v in variables]
        gradients[1] *= large  # the squares of its elements may leave float32
        slices = tf.IndexedSlices(tf.fill([2, 2], size), tf.constant([1, 1]), tf.constant([6, 2]))
        pairs = [*zip(gradients, variables), (slices, rows)]
        return [tf.convert_to_tensor(clipped) for clipped, _ in clipper(pairs)]

    run = tf.function(step) if is_graph else step
    for size, large in ((0.0, 1.0), (1.0, 1.0), (2.0, 1e-30), (9.0, 1e30), (0.5, 1.0)):
        run(tf.constant(size), tf.constant(large))
        assert np.isfinite(clipper.last.norms).all()
        assert clipper.thresholds.shape == clipper.last.thresholds.shape
        assert np.isfinite(clipper.total_norm)
    recorded = np.concatenate([group.recorded for group in clipper.export_state().groups])
    assert recorded.max() == 4  # zeros are not recorded


def test_graphs_of_tensorflow_1_are_refused():
    """A session would run no update of the history: nothing would ever be clipped."""
    with tf.Graph().as_default():
        weight = tf.Variable([1.0])
        clipper = QuantileClip()
        with pytest.raises(
            RuntimeError, match=r"graphs and sessions of TensorFlow 1.* Use tf\.function"
        ):
            clipper([(2.0 * weight, weight)])
    assert not clipper.built
