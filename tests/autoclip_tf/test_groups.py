"""`param_groups`: settings for the variables that a regular expression matches."""

from __future__ import annotations

import keras
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from autoclip.core import Quantile
from autoclip.tf import QuantileClip, StandardClip

PATHS = ["encoder/kernel", "encoder/bias", "head/kernel", "head/bias"]


@pytest.fixture
def net():
    """Makes equal models, whose variables have the paths above."""

    def make():
        keras.utils.set_random_seed(0)
        x = keras.Input((4,))
        hidden = keras.layers.Dense(8, activation="relu", name="encoder")(x)
        model = keras.Model(x, keras.layers.Dense(1, name="head")(hidden))
        assert [variable.path for variable in model.trainable_variables] == PATHS
        return model

    return make


def grouped(clipper):
    """The variables of each group, and the group's settings."""
    return [
        (group["param_names"], {k: group[k] for k in ("quantile", "history_length")})
        for group in clipper.param_groups
    ]


def build(net, *overrides, **options):
    clipper = QuantileClip(0.9, 1000, group_settings=overrides, **options)
    clipper.build(net().trainable_variables)
    return clipper


class TestMatching:
    def test_the_first_match_wins_and_the_rest_comes_last(self, net):
        clipper = build(
            net,
            {"match": "head", "quantile": 0.5},
            {"match": "kernel", "quantile": 0.25, "history_length": 7},
        )
        assert grouped(clipper) == [
            (["head/kernel", "head/bias"], {"quantile": 0.5, "history_length": 1000}),
            (["encoder/kernel"], {"quantile": 0.25, "history_length": 7}),
            (["encoder/bias"], {"quantile": 0.9, "history_length": 1000}),
        ]

    def test_there_is_no_rest_where_all_match(self, net):
        clipper = build(net, {"match": "kernel", "quantile": 0.5}, {"match": ""})
        assert [names for names, _ in grouped(clipper)] == [PATHS[::2], PATHS[1::2]]

    @pytest.mark.parametrize(
        ("pattern", "matched"),
        [
            ("^encoder", PATHS[:2]),
            ("bias$", PATHS[1::2]),
            ("encoder/(kernel|bias)", PATHS[:2]),
            ("(?i)KERNEL", PATHS[::2]),
            ("^(?!encoder/).*kernel", ["head/kernel"]),
        ],
    )
    def test_it_is_a_regular_expression_searched_in_the_path(self, net, pattern, matched):
        assert grouped(build(net, {"match": pattern, "quantile": 0.1}))[0][0] == matched

    def test_variables_without_a_path_go_by_their_name(self):
        variables = [tf.Variable([0.0], name=name) for name in ("kernel", "bias")]
        clipper = QuantileClip(group_settings=[{"match": "^bias$", "quantile": 0.5}])
        clipper.build(variables)
        assert [names for names, _ in grouped(clipper)] == [["bias"], ["kernel"]]

    @pytest.mark.parametrize(
        "overrides",
        [
            [{"match": "embedding"}],
            [{"match": "kernel"}, {"match": "head/kernel"}],  # an earlier group has it
        ],
    )
    def test_a_pattern_without_a_variable_is_an_error_that_lists_the_names(self, net, overrides):
        clipper = QuantileClip(group_settings=overrides)
        pattern = overrides[-1]["match"]
        with pytest.raises(ValueError, match=f"match='{pattern}' has no variable") as error:
            clipper.build(net().trainable_variables)
        for path in PATHS:
            assert repr(path) in str(error.value)
        assert not clipper.built
        assert all(group["params"] == [] for group in clipper.param_groups)

    def test_and_so_it_is_in_fit(self, net, fit):
        model = net()
        optimizer = QuantileClip.as_optimizer(
            keras.optimizers.SGD(), group_settings=[{"match": "embedding", "quantile": 0.5}]
        )
        model.compile(optimizer=optimizer, loss="mse", jit_compile=False)
        with pytest.raises(ValueError, match="match='embedding' has no variable"):
            fit(model)


class TestErrors:
    @pytest.mark.parametrize(
        ("groups", "error", "words"),
        [
            ({"match": "a"}, TypeError, "group_settings must be a list of dicts"),
            ("kernel", TypeError, "group_settings must be a list of dicts"),
            (["kernel"], TypeError, "An entry of group_settings must be a dict, but got str"),
            ([{"quantile": 0.5}], ValueError, 'a dict with the key "match"'),
            (
                [{"match": 3}],
                TypeError,
                "match must be a regular expression as a string, but got 3",
            ),
            ([{"match": "("}], ValueError, r"match must be a regular expression, but got '\('"),
            ([{"match": "a", "quantile": 2}], ValueError, r"quantile must be a real number in"),
            ([{"match": "a", "history_length": 0}], ValueError, "history_length must be an int"),
            ([{"match": "a", "deviations": 1}], ValueError, "unknown setting 'deviations'"),
            ([{"match": "a", "lr": 1}], ValueError, "unknown setting 'lr'"),
            ([{"match": "a", "global_clipping": True}], ValueError, "unknown setting"),
        ],
    )
    def test_wrong_groups(self, groups, error, words):
        with pytest.raises(error, match=words):
            QuantileClip(group_settings=groups)

    def test_no_settings_of_their_own_in_global_mode(self, net):
        with pytest.raises(ValueError, match="one history for all parameters"):
            QuantileClip(
                global_clipping=True, group_settings=[{"match": "kernel", "quantile": 0.5}]
            )
        with pytest.raises(ValueError, match="one history for all parameters"):
            QuantileClip.as_optimizer(
                keras.optimizers.SGD(),
                global_clipping=True,
                group_settings=[{"match": "kernel", "history_length": 5}],
            )


@pytest.mark.parametrize("jit_compile", [False, True], ids=["graph", "xla"])
def test_each_group_has_its_threshold(net, growing, fit, by_hand, jit_compile):
    """Groups put the rows in another order than the model's."""
    rules = [Quantile(0.25), Quantile(0.75), Quantile(0.25), Quantile(0.5)]
    expected = by_hand(net(), keras.optimizers.SGD(1e-2), rules, 3).fit(*growing, epochs=2)
    ours = net()
    optimizer = QuantileClip.as_optimizer(
        keras.optimizers.SGD(1e-2),
        0.75,
        3,
        group_settings=[
            {"match": "head/bias", "quantile": 0.5},
            {"match": "kernel", "quantile": 0.25},
        ],
    )
    ours.compile(optimizer=optimizer, loss="mse", jit_compile=jit_compile)
    fit(ours, epochs=2)
    rows = [3, 0, 2, 1]  # of the model's variables, in the order of the groups
    assert [name for names, _ in grouped(optimizer.clipper) for name in names] == [
        PATHS[row] for row in rows
    ]
    last, wanted = optimizer.clipper.last, expected.reports[-1]
    np.testing.assert_allclose(last.norms, wanted.norms[rows], rtol=1e-5)
    np.testing.assert_allclose(last.thresholds, wanted.thresholds[rows], rtol=1e-5)
    np.testing.assert_allclose(last.coefficients, wanted.coefficients[rows], rtol=1e-5)
    assert (wanted.coefficients < 1).sum() > 1
    for mine, his in zip(ours.get_weights(), expected.model.get_weights()):
        np.testing.assert_allclose(mine, his, rtol=1e-5, atol=1e-6)


def test_history_lengths_differ(net, fit, windows):
    ours = net()
    optimizer = StandardClip.as_optimizer(
        keras.optimizers.SGD(1e-2),
        1.0,
        warmup_steps=0,
        include_current=True,
        group_settings=[
            {"match": "bias", "history_length": 3},
            {"match": "encoder", "history_length": 5, "deviations": 0.0},
        ],
    )
    ours.compile(optimizer=optimizer, loss="mse", jit_compile=False)
    fit(ours, epochs=2)
    found = [window.astype(np.float64) for window in windows(optimizer.clipper)]
    assert [len(window) for window in found] == [3, 3, 5, 8]
    deviations = [1.0, 1.0, 0.0, 1.0]
    wanted = [w.mean() + factor * w.std() for w, factor in zip(found, deviations)]
    np.testing.assert_allclose(optimizer.clipper.last.thresholds, wanted, rtol=1e-6)


@settings(max_examples=25)
@given(
    quantiles=st.lists(st.sampled_from([0.0, 0.3, 0.5, 1.0]), min_size=3, max_size=3),
    lengths=st.lists(st.integers(1, 4), min_size=3, max_size=3),
    stream=st.lists(
        st.lists(st.floats(2.0**-20, 2.0**20, width=32), min_size=3, max_size=3),
        min_size=1,
        max_size=8,
    ),
)
def test_a_group_is_a_clipper_of_its_own(quantiles, lengths, stream):
    """Whatever the settings: each variable is clipped as one clipper for it alone would."""
    variables = [tf.Variable(0.0, name=name) for name in "abc"]
    together = QuantileClip(
        group_settings=[
            {"match": name, "quantile": quantile, "history_length": length}
            for name, quantile, length in zip("cab", quantiles, lengths)
        ]
    )
    alone = dict(zip("cab", map(QuantileClip, quantiles, lengths)))
    for norms in stream:
        pairs = [(tf.constant(norm), variable) for norm, variable in zip(norms, variables)]
        expected = [alone[n]([pair])[0][0] for n, pair in zip("abc", pairs)]
        np.testing.assert_array_equal([g for g, _ in together(pairs)], expected)
