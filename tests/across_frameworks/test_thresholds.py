"""Given the same norms, core, torch and TensorFlow find the same thresholds."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import autoclip.tf
import autoclip.torch
from autoclip.core import History, Quantile, Standard

norms = st.one_of(
    st.floats(2.0**-30, 2.0**30, width=32), st.sampled_from([1.0, 2.0, 0.0, np.nan, np.inf])
)


@pytest.mark.parametrize("kind", ["quantile", "standard"])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stream=st.lists(st.tuples(norms, norms, norms), min_size=1, max_size=20),
    history_length=st.integers(1, 8),
    setting=st.floats(0, 1),
)
def test_thresholds_of_all_three(path, kind, stream, history_length, setting):
    name, rule = ("QuantileClip", Quantile) if kind == "quantile" else ("StandardClip", Standard)
    parameters = [torch.zeros(1, requires_grad=True) for _ in range(3)]
    variables = [tf.Variable([0.0]) for _ in range(3)]
    history = History(3, rule(setting), history_length)
    in_torch = getattr(autoclip.torch, name)(parameters, setting, history_length)
    in_tensorflow = getattr(autoclip.tf, name)(setting, history_length)
    for step in stream:
        for parameter, norm in zip(parameters, step):
            parameter.grad = torch.tensor([norm])
        in_torch.step()
        pairs = in_tensorflow([(tf.constant([n]), v) for n, v in zip(step, variables)])
        expected = history.record(np.float32(step))
        for clipper in (in_torch, in_tensorflow):
            last = clipper.last
            np.testing.assert_allclose(last.thresholds, expected.thresholds, rtol=1e-6)
            np.testing.assert_allclose(last.coefficients, expected.coefficients, rtol=1e-6)
        for parameter, (gradient, _) in zip(parameters, pairs):
            np.testing.assert_allclose(parameter.grad, gradient, rtol=1e-6)
