"""The same settings, in the same order, with the same defaults and the same errors.

What each setting takes is tested in the core, which checks them for both.
"""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import tensorflow as tf
import torch
from rules import WRONG_SETTINGS, each_mode

import autoclip.core
import autoclip.tf
import autoclip.torch

CLIPPERS = ["QuantileClip", "StandardClip"]
# What parameters are is the framework's own, and so is a name of autoclip 0.2.1's torch.
OWN = {"self", "parameters", "group_settings", "global_threshold"}


def settings_of(function):
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, p.default, p.annotation) for p in parameters if p.name not in OWN]


@pytest.mark.parametrize("name", ["Clipper", *CLIPPERS])
@pytest.mark.parametrize("method", ["__init__", "as_optimizer"])
def test_signatures(name, method):
    ours, theirs = (
        settings_of(getattr(getattr(package, name), method))
        for package in (autoclip.tf, autoclip.torch)
    )
    if method == "as_optimizer":  # each takes its own framework's
        assert ours.pop(0)[0] == theirs.pop(0)[0] == "optimizer"
    assert ours == theirs
    assert [setting[1] for setting in ours[1:3]] == [1000, False]


def test_public_names():
    """Names that only one package has reflect differences between the frameworks."""
    assert autoclip.tf.__all__ == autoclip.torch.__all__
    for name in ("Report", "StateError", "__version__"):
        assert getattr(autoclip.tf, name) is getattr(autoclip.torch, name)
    for name in CLIPPERS:
        ours, theirs = (
            {n for n in dir(getattr(package, name)) if not n.startswith("_")}
            for package in (autoclip.tf, autoclip.torch)
        )
        assert theirs - ours == {"add_param_group", "step"}
        assert ours - theirs == {
            *("build", "built", "check"),
            *("from_config", "get_config", "saved_state"),
        }


def make_torch(name, *settings, **named):
    parameters = [("weight", torch.zeros(1, requires_grad=True))]
    return getattr(autoclip.torch, name)(parameters, *settings, **named)


def make_tensorflow(name, *settings, **named):
    clipper = getattr(autoclip.tf, name)(*settings, **named)
    clipper.build([tf.Variable([0.0], name="weight")])
    return clipper


@pytest.mark.parametrize(("name", "settings", "error", "match"), WRONG_SETTINGS, ids=str)
def test_wrong_settings(name, settings, error, match):
    with pytest.raises(error, match=match) as in_torch:
        make_torch(name, **settings)
    with pytest.raises(error, match=match) as in_tensorflow:
        make_tensorflow(name, **settings)
    assert in_tensorflow.type is in_torch.type is error
    assert str(in_tensorflow.value) == str(in_torch.value)
    assert next(iter(settings)) in str(in_torch.value)


@pytest.mark.parametrize(
    "settings",
    [{"quantile": 2.0}, {"history_length": 0}, {"quantle": 0.5}, {"deviations": 1.0}],
    ids=str,
)
def test_wrong_settings_of_a_group(settings):
    parameter = torch.zeros(1, requires_grad=True)
    with pytest.raises((TypeError, ValueError)) as in_torch:
        autoclip.torch.QuantileClip([{"params": [parameter], **settings}])
    with pytest.raises((TypeError, ValueError)) as in_tensorflow:
        autoclip.tf.QuantileClip(group_settings=[{"match": "", **settings}])
    assert in_tensorflow.type is in_torch.type
    assert str(in_tensorflow.value) == str(in_torch.value)


def test_settings_of_a_group_under_global_clipping():
    parameter = torch.zeros(1, requires_grad=True)
    group = {"quantile": 0.5}
    with pytest.raises(ValueError, match="With global_clipping there is one") as in_torch:
        autoclip.torch.QuantileClip([{"params": [parameter], **group}], global_clipping=True)
    with pytest.raises(ValueError, match="With global_clipping there is one") as in_tensorflow:
        autoclip.tf.QuantileClip(group_settings=[{"match": "", **group}], global_clipping=True)
    assert str(in_tensorflow.value) == str(in_torch.value)


@pytest.mark.parametrize("name", CLIPPERS)
@pytest.mark.parametrize(
    ("positional", "named"),
    [
        ((), {}),
        ((0.5,), {"group_clipping": True, "max_norm": 3.0}),
        ((1, 10), {"warmup_steps": 4, "include_current": False, "on_spike": "zero"}),
        ((0, 10, True), {"on_nonfinite": "zero"}),
    ],
    ids=["none", "one", "two", "three"],
)
def test_right_settings(name, positional, named):
    ours, theirs = (
        make_tensorflow(name, *positional, **named),
        make_torch(name, *positional, **named),
    )
    assert ours.defaults == theirs.defaults
    assert ours.global_clipping == theirs.global_clipping
    assert ours.group_clipping == theirs.group_clipping
    ((mine,), (yours,)) = ours.param_groups, theirs.param_groups
    assert len(mine["params"]) == len(yours["params"]) == 1
    assert mine["match"] is None
    assert {name: mine[name] for name in yours if name != "params"} == {
        name: value for name, value in yours.items() if name != "params"
    }


@pytest.mark.parametrize("on_nonfinite", ["keep", "zero", "raise"])
@pytest.mark.parametrize("bad", [1, 2])
@each_mode
def test_nonfinite_gradients(on_nonfinite, bad, mode):
    """The same gradients come out, or the same words."""
    values = [[float("nan"), 1.0] if i < bad else [3.0, 4.0] for i in range(3)]
    named = [(f"p{i}", torch.zeros(2, requires_grad=True)) for i in range(3)]
    in_torch = autoclip.torch.QuantileClip(named, on_nonfinite=on_nonfinite, **mode)
    for (_, parameter), value in zip(named, values):
        parameter.grad = torch.tensor(value)
    variables = [tf.Variable([0.0, 0.0], name=f"p{i}") for i in range(3)]
    in_tensorflow = autoclip.tf.QuantileClip(on_nonfinite=on_nonfinite, **mode)
    pairs = [(tf.constant(value), v) for value, v in zip(values, variables)]
    if on_nonfinite == "raise":
        with pytest.raises(FloatingPointError) as theirs:
            in_torch.step()
        with pytest.raises(FloatingPointError) as ours:
            in_tensorflow(pairs)
        assert str(ours.value) == str(theirs.value)
        assert "p0" in str(ours.value)
    else:
        in_torch.step()
        for (gradient, _), (_, parameter) in zip(in_tensorflow(pairs), named):
            assert repr(gradient.numpy().tolist()) == repr(parameter.grad.tolist())
        found, expected = (each.last.norms.numpy() for each in (in_tensorflow, in_torch))
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, rtol=1e-6)
