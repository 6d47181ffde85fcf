"""Norms and scaling against NumPy in float64: eagerly, in a graph, and compiled by XLA."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autoclip.tf import QuantileClip
from autoclip.tf._layout import Layout

# Both sides of the size from which an array has an operation, and a condition, of its own; shapes
# that are alone and shapes that repeat.
SHAPES = [(3,), (2, 2), (), (3,), (0, 2), (2100,), (2, 2), (70, 40)]
DTYPES = {
    "float32": 1e-6,
    "float64": 1e-6,
    "complex64": 1e-5,
    "complex128": 1e-5,
    "float16": 1e-5,
    "bfloat16": 1e-5,
}
# The spacing of numbers after 1, in each real dtype; more than a product's rounding errors.
ROUNDING = {
    "float32": 2**-23,
    "float64": 1e-15,
    "complex64": 2**-22,
    "complex128": 1e-15,
    "float16": 2**-10,
    "bfloat16": 2**-7,
}
TINY = float(np.finfo(np.float32).tiny)


@cache
def _clipper(count, one_row):
    clipper = QuantileClip(history_length=1, global_clipping=one_row)
    clipper.build([tf.Variable(0.0, name=f"variable_{i}") for i in range(count)])
    return clipper


def layout_of(gradients, one_row=False):
    clipper = _clipper(len(gradients), one_row)
    return Layout(gradients, clipper._groups, clipper._histories)


@cache
def _norms(mode):
    def run(gradients):
        return layout_of(gradients).measure(gradients)

    return run if mode == "eager" else tf.function(run, jit_compile=mode == "xla", autograph=False)


def norms_of(mode, gradients):
    _clipper(len(gradients), False)  # a traced function makes no variables
    return _norms(mode)(gradients).numpy()


def exact_norm(array):
    wide = np.asarray(array)
    wide = wide.astype(np.complex128 if np.iscomplexobj(wide) else np.float64)
    largest = np.abs(wide).max(initial=0.0)
    if largest == 0.0 or not np.isfinite(largest):
        return largest
    return np.linalg.norm(wide / largest) * largest


def arrays_of(seed, dtype, exponents):
    """One array a shape; elements of each are normal, times a power of 2."""
    generator = np.random.default_rng(seed)
    numpy_type = tf.as_dtype(dtype).as_numpy_dtype
    arrays = []
    for shape, exponent in zip(SHAPES, exponents, strict=True):
        values = generator.normal(size=shape)
        if dtype.startswith("complex"):
            values = values + 1j * generator.normal(size=shape)
        arrays.append((values * 2.0**exponent).astype(numpy_type))
    return arrays


def exponents_for(dtype):
    # Squares of float32 elements leave the range of float32 beyond 2 ** -75 and 2 ** 63.
    ends = {"float16": (-6, 10), "float64": (-900, 900), "complex128": (-900, 900)}
    return st.tuples(*[st.integers(*ends.get(dtype, (-100, 110)))] * len(SHAPES))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=20)
@given(data=st.data(), seed=st.integers(0, 2**32 - 1))
def test_norms_are_those_of_float64(mode, dtype, data, seed):
    arrays = arrays_of(seed, dtype, data.draw(exponents_for(dtype)))
    expected = [exact_norm(array) for array in arrays]
    found = norms_of(mode, [tf.constant(array) for array in arrays])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, expected, rtol=DTYPES[dtype])


@settings(max_examples=30)
@given(
    small=hnp.arrays(np.float32, (3,), elements=st.floats(width=32, allow_subnormal=False)),
    large=st.floats(width=32, allow_subnormal=False),
    rest=st.sampled_from([0.0, 1.0, 1e-30, 1e30]),
)
def test_a_norm_is_finite_exactly_if_all_elements_are(mode, small, large, rest):
    """Any elements; the large array has one of any value among equal others."""
    array = np.full(2100, rest, np.float32)
    array[1234] = large
    gradients = [small, array]
    found = norms_of(mode, [tf.constant(gradient) for gradient in gradients])
    for norm, gradient in zip(found, gradients):
        assert np.isfinite(norm) == np.isfinite(gradient).all()
        if np.isfinite(norm):
            np.testing.assert_allclose(norm, exact_norm(gradient), rtol=1e-6)


@pytest.mark.parametrize("size", [1, 100, 5000])
def test_the_smallest_norms_that_hold(mode, size):
    """Elements of half the smallest normal number are lost beside one that carries the norm."""
    array = np.full(size, TINY / 2, np.float32)
    array[0] = 4e-35 * np.sqrt(size)
    [found] = norms_of(mode, [tf.constant(array)])
    np.testing.assert_allclose(found, exact_norm(array), rtol=1e-5)


def test_the_largest_float64(mode):
    largest = np.finfo(np.float64).max
    [found] = norms_of(mode, [tf.fill([100], tf.constant(largest, tf.float64))])
    assert found == largest


@settings(max_examples=20)
@given(
    indices=st.lists(st.integers(0, 4), min_size=1, max_size=6),
    dtype=st.sampled_from([np.int32, np.int64]),
    seed=st.integers(0, 2**32 - 1),
)
def test_slices_with_equal_indices_are_summed(mode, indices, dtype, seed):
    values = np.random.default_rng(seed).normal(size=(len(indices), 3)).astype(np.float32)
    dense = np.zeros((5, 3))
    np.add.at(dense, indices, values)
    slices = tf.IndexedSlices(
        tf.constant(values), tf.constant(indices, dtype), tf.constant([5, 3], dtype)
    )
    # Three values cancel with a probability of zero, and lose few digits in any case that is drawn.
    np.testing.assert_allclose(norms_of(mode, [slices]), [np.linalg.norm(dense)], rtol=1e-5)


@given(present=st.lists(st.booleans(), min_size=len(SHAPES), max_size=len(SHAPES)))
@settings(max_examples=10)
def test_none_has_the_norm_zero(mode, present):
    arrays = arrays_of(0, "float32", [0] * len(SHAPES))
    given_ = [tf.constant(a) if there else None for a, there in zip(arrays, present)]
    expected = [exact_norm(a) if there else 0.0 for a, there in zip(arrays, present)]
    np.testing.assert_allclose(norms_of(mode, given_), expected, rtol=1e-6)


def test_mixed_dtypes(mode):
    arrays = [arrays_of(i, dtype, [0] * len(SHAPES))[-1] for i, dtype in enumerate(DTYPES)]
    arrays += [arrays_of(i, dtype, [0] * len(SHAPES))[0] for i, dtype in enumerate(DTYPES)]
    found = norms_of(mode, [tf.constant(array) for array in arrays])
    np.testing.assert_allclose(found, [exact_norm(array) for array in arrays], rtol=1e-5)


@pytest.mark.parametrize("shape", [None, [None], [None, 2]])
def test_unknown_shapes(shape):
    signature = [tf.TensorSpec(shape, tf.float32), tf.TensorSpec([2], tf.float32)]

    _clipper(2, False)

    @tf.function(input_signature=signature, autograph=False)
    def step(unknown, known):
        gradients = [unknown, known]
        coefficients = tf.constant([[0.5], [1.0]], tf.float64)
        layout = layout_of(gradients)
        return layout.measure(gradients), layout.scale(gradients, coefficients)

    for rows in (1, 3000):
        values = np.full((rows, 2) if shape != [None] else rows, 2.0, np.float32)
        norms, scaled = step(values, np.ones(2, np.float32))
        np.testing.assert_allclose(norms, [exact_norm(values), np.sqrt(2)], rtol=1e-6)
        np.testing.assert_array_equal(scaled[0], values / 2)
        np.testing.assert_array_equal(scaled[1], np.ones(2))


@pytest.mark.parametrize("wrong", [tf.ones(3, tf.int32), np.ones(3, np.int64)])
def test_integers_are_refused(mode, wrong):
    def step():
        return QuantileClip()([(tf.ones(3), tf.Variable(tf.ones(3))), (wrong, named)])

    named = tf.Variable(tf.ones(3), name="counted")
    step = step if mode == "eager" else tf.function(step, jit_compile=mode == "xla")
    with pytest.raises(TypeError, match="The gradient of 'counted' is of int"):
        step()


@given(
    norms=hnp.arrays(
        np.float64, st.integers(1, 9), elements=st.one_of(st.just(0.0), st.floats(1e-45, 1e45))
    )
)
def test_the_root_of_squares(norms):
    np.testing.assert_allclose(Layout.total(tf.constant(norms)), exact_norm(norms), rtol=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_root_of_squares_that_are_not_finite(value):
    np.testing.assert_equal(float(Layout.total(tf.constant([1.0, value], tf.float64))), value)


# -- scaling -------------------------------------------------------------------------------------


@cache
def _scale(mode, one_row):
    def run(gradients, coefficients, zeroed):
        return layout_of(gradients, one_row).scale(gradients, coefficients, zeroed)

    return run if mode == "eager" else tf.function(run, jit_compile=mode == "xla", autograph=False)


def scaled(mode, gradients, factors, zeroed=None):
    """With one factor for all gradients, or one for each."""
    _clipper(len(gradients), np.ndim(factors) == 0)
    coefficients = tf.reshape(tf.constant(factors, tf.float64), [-1, 1])
    return _scale(mode, np.ndim(factors) == 0)(gradients, coefficients, zeroed)


factors_of_all = st.tuples(*[st.one_of(st.just(1.0), st.floats(0.01, 0.99))] * len(SHAPES))


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=15)
@given(factors=st.one_of(factors_of_all, st.just(1.0), st.floats(0.01, 0.99)))
def test_products_are_those_of_float64_rounded(mode, dtype, factors):
    """With one factor each, and with one for all."""
    arrays = arrays_of(0, dtype, [0] * len(SHAPES))
    found = scaled(mode, [tf.constant(array) for array in arrays], factors)
    each = np.broadcast_to(factors, len(arrays))
    for ours, array, factor in zip(found, arrays, each):
        assert ours.dtype == dtype and ours.shape == array.shape
        if factor == 1.0:
            np.testing.assert_array_equal(ours.numpy(), array)
        else:
            wide = np.complex128 if dtype.startswith("complex") else np.float64
            np.testing.assert_allclose(
                ours.numpy().astype(wide),
                array.astype(wide) * factor,
                rtol=ROUNDING[dtype],
                atol=1e-7,
            )


@pytest.mark.parametrize("size", [3, 3000])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_a_gradient_that_is_zeroed_is_zero_whatever_it_holds(mode, dtype, size):
    gradient = tf.cast(tf.fill([size], np.nan), dtype)
    zero, kept = scaled(mode, [gradient, gradient], [1.0, 1.0], tf.constant([True, False]))
    np.testing.assert_array_equal(tf.cast(zero, tf.float32), np.zeros(size))
    assert np.isnan(tf.cast(kept, tf.float32)).all()


def test_slices_stay_slices(mode):
    slices = tf.IndexedSlices(tf.ones([2, 3]), tf.constant([4, 4]), tf.constant([5, 3]))
    [found] = scaled(mode, [slices], [0.5])
    assert isinstance(found, tf.IndexedSlices)
    np.testing.assert_array_equal(found.values, np.full((2, 3), 0.5))
    np.testing.assert_array_equal(found.indices, [4, 4])
    np.testing.assert_array_equal(found.dense_shape, [5, 3])
