"""A clipper's state: `state_dict`, `save`, `load`, before and after `build`."""

from __future__ import annotations

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from autoclip.core import State
from autoclip.tf import QuantileClip, StandardClip, StateError

SHAPES = [(3,), (2, 2)]
CLIPPERS = {
    "quantile": lambda length=4, **s: QuantileClip(0.3, length, **s),
    "standard": lambda length=4, **s: StandardClip(0.5, length, warmup_steps=2, **s),
    "quantile, global": lambda length=4: QuantileClip(0.3, length, global_clipping=True),
    "standard, groups": lambda length=4: StandardClip(
        0.5,
        length,
        warmup_steps=2,
        group_settings=[{"match": "0", "deviations": 0.1, "history_length": 2}],
    ),
}


@pytest.fixture(params=CLIPPERS)
def make(request):
    return CLIPPERS[request.param]


def make_variables(*shapes):
    return [tf.Variable(tf.zeros(shape), name=f"v{i}") for i, shape in enumerate(shapes or SHAPES)]


def gradients_of(norms):
    return [
        tf.fill(shape, np.float32(norm / np.sqrt(np.prod(shape))))
        for shape, norm in zip(SHAPES, norms)
    ]


def feed(clipper, variables, stream):
    """The clipped gradients and the thresholds of each step."""
    steps = []
    for norms in stream:
        pairs = clipper(zip(gradients_of(norms), variables))
        steps.append([gradient.numpy().tobytes() for gradient, _ in pairs])
        steps[-1].append(clipper.last.thresholds.numpy().tobytes())
    return steps


def data_of(clipper):
    return clipper.state_dict()["data"]


def trained(make=CLIPPERS["quantile"], steps=7, **options):
    clipper = make(**options)
    variables = make_variables()
    feed(clipper, variables, [(1.0 + i, 10.0 * (i + 1)) for i in range(steps)])
    return clipper, variables


norms = st.one_of(st.floats(2.0**-20, 2.0**20, width=32), st.sampled_from([0.0, np.nan, np.inf]))
streams = st.lists(st.tuples(norms, norms), min_size=1, max_size=12)


class TestGoingOn:
    @pytest.mark.parametrize("kind", CLIPPERS)
    @settings(max_examples=10)
    @given(stream=streams, data=st.data())
    def test_as_if_it_had_never_stopped(self, kind, stream, data):
        cut = data.draw(st.integers(0, len(stream)))
        variables = make_variables()
        without_stop, stopped, restarted = (CLIPPERS[kind]() for _ in range(3))
        expected = feed(without_stop, variables, stream)
        stopped.build(variables)
        before = feed(stopped, variables, stream[:cut])
        loads_first = data.draw(st.booleans())
        if not loads_first:
            restarted.build(variables)
        restarted.load_state_dict(stopped.state_dict())
        restarted.build(variables)
        assert before + feed(restarted, variables, stream[cut:]) == expected
        assert data_of(restarted) == data_of(without_stop)

    @pytest.mark.parametrize("kind", CLIPPERS)
    @pytest.mark.parametrize(
        "cut",
        [
            0,
            pytest.param(2, marks=pytest.mark.nightly),
            4,
            pytest.param(6, marks=pytest.mark.nightly),
        ],
    )
    def test_in_a_graph(self, steps, mode, kind, cut):
        stream = [
            (1.0, 9.0),
            (4.0, 0.0),
            (2.0, np.nan),
            (8.0, 5.0),
            (3.0, 7.0),
            (5.0, 6.0),
            (9.0, 1.0),
        ]
        without_stop, stopped, restarted = (
            steps(CLIPPERS[kind](), SHAPES, mode, number=i) for i in range(3)
        )
        for i, norms in enumerate(stream):
            without_stop(*gradients_of(norms))
            if i < cut:
                stopped(*gradients_of(norms))
            else:  # what it has had, and that its function is traced already, does not matter
                restarted(*gradients_of(norms))
        restarted.clipper.load_state_dict(stopped.clipper.state_dict())
        for norms in stream[cut:]:
            restarted(*gradients_of(norms))
        assert data_of(restarted.clipper) == data_of(without_stop.clipper)
        np.testing.assert_array_equal(
            restarted.clipper.last.thresholds, without_stop.clipper.last.thresholds
        )


def test_long_histories_are_the_same_in_a_graph(steps, mode):
    """There the insertion into sorted windows is compiled."""
    eager, other = (
        steps(QuantileClip(0.5, 40_000), [(1,), (2,)], each, number=i)
        for i, each in enumerate(("eager", mode))
    )
    for norms in [(1.0, 9.0), (4.0, 0.0), (2.0, np.nan), (8.0, 5.0), (3.0, 7.0)]:
        for each in (eager, other):
            each(*gradients_of(norms))
        np.testing.assert_array_equal(other.clipper.thresholds, eager.clipper.thresholds)
    assert data_of(other.clipper) == data_of(eager.clipper)


class TestBuild:
    def test_a_state_that_is_loaded_before_becomes_the_first_value(self, make, tmp_path):
        clipper, variables = trained(make)
        clipper.save(tmp_path / "state")
        saved = clipper.state_dict()
        for load in (lambda c: c.load(tmp_path / "state"), lambda c: c.load_state_dict(saved)):
            other = make()
            load(other)
            assert not other.built
            assert other.state_dict() == saved  # nothing is lost by saving it again
            other.build(variables)
            assert other.state_dict() == saved

    def test_the_first_call_builds_with_it(self, mode):
        clipper, variables = trained()
        other = CLIPPERS["quantile"]()
        other.load_state_dict(clipper.state_dict())
        pairs = list(zip(gradients_of((2.0, 3.0)), variables))

        def call(clipper):
            def step():
                return [gradient for gradient, _ in clipper(pairs)]

            return (step if mode == "eager" else tf.function(step, jit_compile=mode == "xla"))()

        for ours, theirs in zip(call(other), call(clipper), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert data_of(other) == data_of(clipper)

    def test_the_last_one_that_was_loaded_counts(self):
        first, variables = trained(steps=2)
        second, _ = trained(steps=5)
        clipper = CLIPPERS["quantile"]()
        clipper.load_state_dict(first.state_dict())
        clipper.load_state_dict(second.state_dict())
        clipper.build(variables)
        assert clipper.state_dict() == second.state_dict()

    def test_one_that_does_not_fit_leaves_it_unbuilt(self):
        saved, variables = trained()
        clipper = CLIPPERS["quantile"]()
        clipper.load_state_dict(saved.state_dict())
        for _ in range(2):
            with pytest.raises(
                StateError, match=r"'v1' of shape \(2, 2\), the clipper has 'v1' of"
            ):
                clipper.build(make_variables((3,), (5,)))
            assert not clipper.built
            assert clipper.state_dict() == saved.state_dict()
        clipper.build(variables)
        assert clipper.state_dict() == saved.state_dict()

    def test_what_can_be_checked_before_is(self, tmp_path):
        clipper = CLIPPERS["quantile"]()
        with pytest.raises(StateError, match="global_clipping=True"):
            clipper.load_state_dict(trained(CLIPPERS["quantile, global"])[0].state_dict())
        path = tmp_path / "state"
        path.write_bytes(data_of(trained()[0])[:-1])
        with pytest.raises(StateError, match=f"{path} is damaged or cut off"):
            clipper.load(path)
        with pytest.raises(FileNotFoundError):
            clipper.load(tmp_path / "nowhere")
        # None of these is what the variables get.
        variables = make_variables()
        clipper.build(variables)
        assert clipper.export_state().groups[0].recorded.tolist() == [0, 0]

    def test_there_is_nothing_to_save_before(self, tmp_path):
        clipper = CLIPPERS["quantile"]()
        for save in (clipper.state_dict, lambda: clipper.save(tmp_path / "state")):
            with pytest.raises(ValueError, match=r"no state yet.*build\(variables\)"):
                save()
        assert list(tmp_path.iterdir()) == []


class TestFailingLoads:
    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (lambda: trained(CLIPPERS["quantile, global"])[0], "global_clipping=True"),
        ],
        ids=["mode"],
    )
    def test_another_kind(self, other, words):
        clipper, _ = trained()
        before = data_of(clipper)
        with pytest.raises(StateError, match=words):
            clipper.load_state_dict(other().state_dict())
        assert data_of(clipper) == before

    @pytest.mark.parametrize(
        ("shapes", "words"),
        [
            (
                [(3,), (4,)],
                r"Parameter 1 of group 0 does not match: state_dict has 'v1' of shape \(4,\), the "
                r"clipper has 'v1' of shape \(2, 2\); their shapes differ",
            ),
        ],
    )
    def test_another_model(self, shapes, words):
        clipper, _ = trained()
        before = data_of(clipper)
        other = CLIPPERS["quantile"]()
        other.build(make_variables(*shapes))
        with pytest.raises(StateError, match=words):
            clipper.load_state_dict(other.state_dict())
        assert data_of(clipper) == before

    @pytest.mark.parametrize("wrong", [None, {}, {"format": "autoclip"}, b"", [1, 2]])
    def test_something_else(self, wrong):
        clipper, _ = trained()
        before = data_of(clipper)
        with pytest.raises(StateError, match="state_dict"):
            clipper.load_state_dict(wrong)
        assert data_of(clipper) == before

    def test_damage(self, tmp_path):
        clipper, _ = trained()
        before = data_of(clipper)
        path = tmp_path / "state"
        for position in range(0, len(before), 37):
            damaged = bytearray(before)
            damaged[position] ^= 1
            path.write_bytes(damaged)
            with pytest.raises(StateError, match=f"^{path} "):
                clipper.load(path)
        assert data_of(clipper) == before


class TestBytes:
    def test_the_same_past_gives_the_same_bytes(self, make, tmp_path):
        """One clipper went straight on; the other one's ring was turned by loading."""
        clipper, variables = trained(make, steps=7)
        other = make()
        other.build(variables)
        for count in (3, 2, 2):
            done = int(other.export_state().groups[-1].recorded[0])
            feed(other, variables, [(1.0 + i, 10.0 * (i + 1)) for i in range(done, done + count)])
            again = make()
            again.build(variables)
            again.load_state_dict(other.state_dict())
            other = again
        assert data_of(other) == data_of(clipper)
        clipper.save(tmp_path / "state")
        assert (tmp_path / "state").read_bytes() == data_of(clipper)

    def test_what_they_say(self):
        clipper, _ = trained()
        state = State.from_bytes(data_of(clipper))
        assert (state.rule, state.framework) == ("quantile", "tensorflow")
        assert [(p.name, p.shape) for p in state.groups[0].parameters] == [
            ("v0", (3,)),
            ("v1", (2, 2)),
        ]
        assert state.groups[0].settings == clipper.defaults
        assert clipper.defaults["quantile"] == 0.3 and clipper.defaults["history_length"] == 4
        assert state.groups[0].recorded.tolist() == [7, 7]
        windows = [window.tolist() for window in state.groups[0].windows()]
        assert windows == [pytest.approx([4, 5, 6, 7]), pytest.approx([40, 50, 60, 70])]

    def test_saving_changes_nothing(self, make):
        clipper, variables = trained(make)
        other, others = trained(make)
        for norms in [(3.0, 3.0), (1.0, 5.0)]:
            clipper.state_dict()
            assert feed(clipper, variables, [norms]) == feed(other, others, [norms])


class TestOtherHistoryLengths:
    @pytest.mark.parametrize("steps", [2, 3, 4, 5, 7])
    @pytest.mark.parametrize("length", [1, 2, 3, 9])
    def test_the_newest_norms_stay_and_go_on(self, steps, length):
        """As a clipper of that length would that had seen only these."""
        clipper, variables = trained(steps=steps)
        other = CLIPPERS["quantile"](length)
        other.build(variables)
        with pytest.warns(UserWarning, match=f"history_length=4 there and {length} here") as found:
            other.load_state_dict(clipper.state_dict())
        assert found[0].filename == __file__
        stream = [(1.0 + i, 10.0 * (i + 1)) for i in range(steps)][-min(4, length) :]
        alone = CLIPPERS["quantile"](length)
        feed(alone, variables, stream)
        rest = [(2.5, 99.0), (30.0, 1.0), (0.5, 7.0)]
        assert feed(other, variables, rest) == feed(alone, variables, rest)
        assert other.export_state().groups[0].recorded.tolist() == [steps + 3] * 2
        ours, theirs = (clip.export_state().groups[0].values for clip in (other, alone))
        np.testing.assert_array_equal(ours, theirs)

    def test_a_shorter_one_set_aside_before_build(self):
        clipper, variables = trained()
        other = CLIPPERS["quantile"](2)
        other.load_state_dict(clipper.state_dict())
        with pytest.warns(UserWarning, match="history_length=4 there and 2 here"):
            other.build(variables)
        windows = other.export_state().groups[0].windows()
        assert [window.tolist() for window in windows] == [
            pytest.approx([6, 7]),
            pytest.approx([60, 70]),
        ]
        assert other.defaults == {**clipper.defaults, "history_length": 2}


def test_variables_of_any_dtype_and_order_keep_their_rows():
    """A state belongs to the variables in the order of `build`, not in that of a call."""
    a, b = tf.Variable(tf.zeros(3, tf.float16), name="a"), tf.Variable(tf.zeros(2), name="b")
    clipper = QuantileClip(0.5)
    clipper.build([a, b])
    clipper([(tf.constant([3.0, 4.0]), b), (tf.ones(3, tf.float16), a)])
    state = State.from_bytes(data_of(clipper))
    assert [p.name for p in state.groups[0].parameters] == ["a", "b"]
    np.testing.assert_allclose(state.groups[0].values, [np.sqrt(3), 5.0], rtol=1e-6)


def test_variables_of_unknown_shape():
    variables = [
        tf.Variable([0.0, 0.0], name="v", shape=tf.TensorShape(shape)) for shape in (None, [None])
    ]
    clipper, other = QuantileClip(0.5), QuantileClip(0.5)
    for size in (1.0, 3.0):
        clipped = clipper([(tf.constant([size, 0.0]), variable) for variable in variables])
    np.testing.assert_allclose([gradient for gradient, _ in clipped], [[2.0, 0.0]] * 2)
    other.build(variables)
    other.load_state_dict(clipper.state_dict())
    assert data_of(other) == data_of(clipper)
