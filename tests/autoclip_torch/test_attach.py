"""A clipper on an optimizer: the same object back, one clip a step, and nothing left behind."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from rules import each_mode
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

from autoclip.torch import QuantileClip, StandardClip, StateError

SETTINGS: dict[str, Any] = {"quantile": 0.5, "history_length": 16}


def repickled(optimizer: Any) -> Any:
    return pickle.loads(pickle.dumps(optimizer))


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def batches(count: int = 6) -> list[Tensor]:
    """Batches whose gradients grow and shrink, so that some steps clip."""
    generator = torch.Generator().manual_seed(1)
    sizes = [1.0, 3.0, 0.5, 5.0, 2.0, 8.0, 0.3, 4.0]
    return [torch.randn(5, 4, generator=generator) * sizes[i % 8] for i in range(count)]


def backward(model: nn.Module, batch: Tensor) -> Tensor:
    model.zero_grad()
    loss: Tensor = model(batch).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Optimizer, count: int = 6) -> None:
    for batch in batches(count):
        backward(model, batch)
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def windows(clipper: Any) -> list[list[float]]:
    """The recorded norms of each row, read from the public state."""
    groups = clipper.export_state().groups
    return [window.tolist() for group in groups for window in group.windows()]


def by_hand(
    make_optimizer: Callable[[nn.Module], Optimizer] = lambda m: Adam(m.parameters()),
    count: int = 6,
    **settings: Any,
) -> tuple[Tensor, list[list[float]]]:
    """Train with `clipper.step()` before each `optimizer.step()`: the oracle of this file."""
    model = make_model()
    optimizer = make_optimizer(model)
    clipper = QuantileClip(model.parameters(), **{**SETTINGS, **settings})
    for batch in batches(count):
        backward(model, batch)
        clipper.step()
        optimizer.step()
    return weights(model), windows(clipper)


def snapshot(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's attributes and hooks."""
    return {
        name: dict(value) if "hooks" in name else value
        for name, value in optimizer.__dict__.items()
        if name not in ("state", "param_groups")
    }


# -- attaching ---------------------------------------------------------------------------------


@pytest.mark.parametrize("global_clipping", [False, True])
def test_an_attached_clipper_does_what_clipper_step_does(global_clipping: bool) -> None:
    expected = by_hand(global_clipping=global_clipping)
    model = make_model()
    plain = Adam(model.parameters())
    optimizer = QuantileClip.as_optimizer(plain, **SETTINGS, global_clipping=global_clipping)
    assert optimizer is plain
    assert isinstance(optimizer, Adam)
    train(model, optimizer)
    assert torch.equal(weights(model), expected[0])
    assert windows(optimizer.clipper) == expected[1]
    assert (optimizer.clipper.last.coefficients < 1).any()


def test_standard_clip_attaches_as_well() -> None:
    model = make_model()
    optimizer = StandardClip.as_optimizer(SGD(model.parameters(), lr=0.1), deviations=0.5)
    train(model, optimizer)
    assert isinstance(optimizer.clipper, StandardClip)
    assert [len(window) for window in windows(optimizer.clipper)] == [6] * 4


@pytest.mark.parametrize("order", ["scheduler first", "scheduler last"])
def test_schedulers_made_before_or_after_go_on_working(order: str) -> None:
    def run(attached: bool) -> tuple[Tensor, list[float]]:
        model = make_model()
        optimizer = SGD(model.parameters(), lr=0.1)
        clipper = QuantileClip(model.parameters(), **SETTINGS)
        if attached and order == "scheduler last":
            clipper.attach(optimizer)
        scheduler = StepLR(optimizer, 2, gamma=0.5)
        if attached and order == "scheduler first":
            clipper.attach(optimizer)
        rates = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # "lr_scheduler.step() before optimizer.step()"
            for batch in batches():
                backward(model, batch)
                if not attached:
                    clipper.step()
                optimizer.step()
                scheduler.step()
                rates.append(scheduler.get_last_lr()[0])
        return weights(model), rates

    by_us, rates = run(attached=True)
    expected, expected_rates = run(attached=False)
    assert torch.equal(by_us, expected)
    assert rates == expected_rates


@pytest.mark.parametrize(
    "make",
    [
        lambda model: model,
        lambda model: [Adam(model.parameters())],
        lambda model: {"adam": Adam(model.parameters())},
        lambda model: partial(Adam, lr=0.1),  # Hydra's `_partial_`
        lambda model: None,
    ],
)
def test_what_is_no_optimizer_is_refused(make: Callable[[nn.Module], Any]) -> None:
    model = make_model()
    message = r"must be a torch\.optim\.Optimizer, but got .* several, attach a clipper to each"
    with pytest.raises(TypeError, match=message):
        QuantileClip.as_optimizer(make(model))
    with pytest.raises(TypeError, match=message):
        QuantileClip(model.parameters()).attach(make(model))


def test_other_parameters_are_refused() -> None:
    model, other = make_model(), make_model()
    optimizer = Adam(model.parameters())
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match="4 of the clipper's are not the optimizer's"):
        QuantileClip(other.parameters()).attach(optimizer)
    with pytest.raises(ValueError, match="2 of the optimizer's are not the clipper's"):
        QuantileClip(model[0].parameters()).attach(optimizer)
    assert snapshot(optimizer) == before


def test_remove_leaves_no_trace_and_keeps_the_history() -> None:
    model = make_model()
    optimizer = Adam(model.parameters())
    clipper = QuantileClip(model.parameters(), **SETTINGS)
    before = snapshot(optimizer)
    handle = clipper.attach(optimizer)
    assert snapshot(optimizer) != before
    train(model, optimizer, 3)
    recorded = windows(clipper)
    handle.remove()
    handle.remove()  # a second call does nothing
    assert snapshot(optimizer) == before
    assert "autoclip" not in optimizer.state_dict()
    train(model, optimizer, 2)
    assert windows(clipper) == recorded
    assert [id(p) for p in clipper.param_groups[0]["params"]] == [*map(id, model.parameters())]
    # Detached, it can be used by hand and attached again.
    backward(model, batches()[0])
    clipper.step()
    clipper.attach(optimizer)
    train(model, optimizer, 1)
    assert [len(window) for window in windows(clipper)] == [5] * 4


def test_a_dropped_optimizer_is_freed_at_once() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(Adam(model.parameters()), **SETTINGS)
    train(model, optimizer)
    clipper, alive = optimizer.clipper, weakref.ref(optimizer)
    recorded = windows(clipper)
    gc.disable()
    try:
        del optimizer
        assert alive() is None
    finally:
        gc.enable()
    # The clipper outlives it, with its history and its parameters.
    assert windows(clipper) == recorded
    assert [id(p) for p in clipper.param_groups[0]["params"]] == [*map(id, model.parameters())]


def test_a_copy_of_a_clipper_is_attached_to_nothing() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(Adam(model.parameters()), **SETTINGS)
    train(model, optimizer, 2)
    clipper = copy.deepcopy(optimizer.clipper)
    recorded = windows(clipper)
    train(model, optimizer, 1)
    assert windows(clipper) == recorded
    assert len(windows(optimizer.clipper)[0]) == 3
    clipper.add_param_group({"params": [torch.zeros(2, requires_grad=True)]})


# -- called by its optimizer alone ----------------------------------------------------------------


@each_mode
def test_an_attached_clipper_refuses_a_step_by_hand(path: str, mode: dict[str, Any]) -> None:
    """It would record each norm twice. The total norm is there without it."""
    expected = make_model()
    clipper = QuantileClip(expected.parameters(), **SETTINGS, **mode)
    plain = SGD(expected.parameters(), lr=0.1)
    model = make_model()
    optimizer = QuantileClip.as_optimizer(SGD(model.parameters(), lr=0.1), **SETTINGS, **mode)
    attached = optimizer.clipper  # type: ignore[attr-defined]
    for each in (clipper, attached):
        with pytest.raises(RuntimeError, match="no total norm yet"):
            _ = each.total_norm
    for batch in batches():
        backward(expected, batch)
        total = clipper.step()
        assert torch.equal(clipper.total_norm, total)
        plain.step()
        backward(model, batch)
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        recorded = windows(attached)
        with pytest.raises(RuntimeError, match=r"clipper\.total_norm after optimizer\.step"):
            attached.step()
        assert windows(attached) == recorded
        assert all(map(torch.equal, gradients, (p.grad for p in model.parameters())))
        optimizer.step()
        assert torch.equal(attached.total_norm, total)
        assert (attached.total_norm.shape, attached.total_norm.dtype) == ((), torch.float32)
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match="found no gradient"):
        optimizer.step()
    assert attached.total_norm == 0.0
    attached.reset()
    with pytest.raises(RuntimeError, match="no total norm yet"):
        _ = attached.total_norm


def test_detaching_allows_steps_by_hand() -> None:
    model = make_model()
    optimizer = Adam(model.parameters())
    before = snapshot(optimizer)
    clipper = QuantileClip.as_optimizer(optimizer, **SETTINGS).clipper  # type: ignore[attr-defined]
    train(model, optimizer, 2)
    clipper.detach()
    clipper.detach()  # a second call does nothing
    assert snapshot(optimizer) == before
    backward(model, batches()[0])
    clipper.step()
    handle = clipper.attach(optimizer)
    clipper.detach()
    other = clipper.attach(optimizer)
    handle.remove()  # of an attachment that has ended: it does not end the present one
    train(model, optimizer, 1)
    assert [len(window) for window in windows(clipper)] == [4] * 4
    other.remove()
    train(model, optimizer, 1)
    assert [len(window) for window in windows(clipper)] == [4] * 4


def test_a_clipper_whose_optimizer_is_gone_takes_more_parameters() -> None:
    weights = [torch.zeros(1, requires_grad=True) for _ in range(2)]
    clipper = QuantileClip.as_optimizer(torch.optim.SGD(weights[:1]), 0.5).clipper  # type: ignore[attr-defined]
    gc.collect()
    clipper.add_param_group({"params": weights[1:]})
    for size in (1.0, 3.0):
        for weight in weights:
            weight.grad = torch.tensor([size])
        clipper.step()
    assert [weight.grad.item() for weight in weights] == [2.0, 2.0]  # type: ignore[union-attr]


def test_a_clipper_outlives_its_optimizer() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(Adam(model.parameters()), **SETTINGS)
    train(model, optimizer, 2)
    clipper = optimizer.clipper
    del optimizer
    gc.collect()
    backward(model, batches()[0])
    clipper.step()
    clipper.attach(Adam(model.parameters()))
    assert [len(window) for window in windows(clipper)] == [3] * 4


# -- an optimizer that has been trained ------------------------------------------------------------


def trained(make: Any) -> tuple[nn.Module, Any, dict[str, Any]]:
    """A model, and its optimizer after some steps; the checkpoint of one with a clipper."""
    model = make_model()
    optimizer = make(model)
    train(model, optimizer, 3)
    other = make_model()
    clipped = QuantileClip.as_optimizer(make(other), **SETTINGS)
    train(other, clipped, 3)
    return model, optimizer, copy.deepcopy(clipped.state_dict())


MAKERS = [
    lambda model: Adam(model.parameters()),
    lambda model: SGD(model.parameters(), lr=0.1, momentum=0.9),
    lambda model: torch.optim.Adagrad(model.parameters()),
]


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("how", ["as_optimizer", "attach"])
def test_a_history_that_starts_late_is_said_once(make: Any, how: str) -> None:
    model, optimizer, _ = trained(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a history may be loaded until the first step
        if how == "attach":
            QuantileClip(model.parameters()).attach(optimizer)
        else:
            QuantileClip.as_optimizer(optimizer)
    backward(model, batches()[0])
    with pytest.warns(UserWarning, match="starts with an empty history") as caught:
        optimizer.step()
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)


@pytest.mark.parametrize("make", MAKERS)
def test_a_history_that_is_there_is_not_said_to_start_late(make: Any) -> None:
    """A new optimizer; a clipper with a history; each order of loading one."""
    model, optimizer, saved = trained(make)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh_model = make_model()
        fresh = QuantileClip.as_optimizer(make(fresh_model), **SETTINGS)
        train(fresh_model, fresh, 2)
        fresh = QuantileClip.as_optimizer(make(fresh_model), **SETTINGS)
        fresh.load_state_dict(saved)
        train(fresh_model, fresh, 2)
        clipper = fresh.clipper
        clipper.detach()
        clipper.attach(fresh)
        train(fresh_model, fresh, 2)
        QuantileClip.as_optimizer(optimizer, **SETTINGS)
        optimizer.clipper.load_state_dict(saved["autoclip"])
        train(model, optimizer, 2)
    # A checkpoint without a history is said to be one, and that is all.
    saved.pop("autoclip")
    model, optimizer, _ = trained(make)
    QuantileClip.as_optimizer(optimizer, **SETTINGS)
    with pytest.warns(UserWarning, match="has no 'autoclip' entry"):
        optimizer.load_state_dict(saved)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 2)


# -- groups ------------------------------------------------------------------------------------


def test_as_optimizer_takes_the_optimizers_groups_one_to_one() -> None:
    model = make_model()
    names = {"param_names": ["weight", "bias"]}  # as torch ≥ 2.6 takes them from named_parameters()
    optimizer = QuantileClip.as_optimizer(
        AdamW(
            [
                {"params": model[0].parameters(), **names, "quantile": 0.3, "weight_decay": 0.1},
                {"params": model[2].parameters(), **names, "history_length": 3, "lr": 1e-2},
            ]
        ),
        quantile=0.7,
        history_length=5,
    )
    groups = optimizer.clipper.param_groups
    assert [group["quantile"] for group in groups] == [0.3, 0.7]
    assert [group["history_length"] for group in groups] == [5, 3]
    assert [group["param_names"] for group in groups] == [["weight", "bias"]] * 2
    assert [[*map(id, group["params"])] for group in groups] == [
        [*map(id, layer.parameters())] for layer in (model[0], model[2])
    ]
    train(model, optimizer)
    assert [len(window) for window in windows(optimizer.clipper)] == [5, 5, 3, 3]


@pytest.mark.parametrize("value", [None, 0.3])
def test_settings_that_are_written_into_the_optimizers_groups_warn_once(
    value: float | None,
) -> None:
    model = make_model()
    named = {} if value is None else {"quantile": value}
    groups = [{"params": layer.parameters(), **named} for layer in (model[0], model[2])]
    optimizer = QuantileClip.as_optimizer(SGD(groups, lr=0.1), **SETTINGS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)
        StepLR(optimizer, 1)  # adds a key
        train(model, optimizer, 1)
        saved = optimizer.state_dict()
        for group in saved["param_groups"]:
            group["quantile"] = 0.7  # the clipper's settings come from the code
        optimizer.load_state_dict(saved)
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "quantile": 0.2})
        train(model, optimizer, 1)
    optimizer.param_groups[1]["quantile"] = 0.8
    optimizer.param_groups[1]["note"] = "no setting"
    with pytest.warns(UserWarning, match=r"param_groups\[1\]\['quantile'\] = 0.8 does not change"):
        train(model, optimizer, 1)
    found = [group["quantile"] for group in optimizer.clipper.param_groups]
    assert found == [value or 0.5, value or 0.5, 0.2]
    optimizer.param_groups[0]["quantile"] = 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, 1)


def test_an_existing_clipper_keeps_its_own_groups() -> None:
    """One group of the clipper over a decay/no-decay optimizer, and the other way round."""

    def decay_groups(model: nn.Module) -> list[dict[str, Any]]:
        parameters = list(model.parameters())
        return [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
        ]

    expected = by_hand(lambda model: AdamW(decay_groups(model)))
    model = make_model()
    optimizer = AdamW(decay_groups(model))
    clipper = QuantileClip(model.named_parameters(), **SETTINGS)
    clipper.attach(optimizer)
    train(model, optimizer)
    assert torch.equal(weights(model), expected[0])
    assert windows(clipper) == expected[1]  # in the clipper's order, not the optimizer's
    assert [len(group["params"]) for group in clipper.param_groups] == [4]

    model = make_model()
    optimizer = AdamW(model.parameters())
    clipper = QuantileClip(
        [{"params": model[2].parameters(), "quantile": 0.2}, {"params": model[0].parameters()}]
    )
    clipper.attach(optimizer)
    train(model, optimizer)
    assert [group["quantile"] for group in clipper.param_groups] == [0.2, 0.9]
    assert clipper.param_groups[0]["params"][0] is model[2].weight
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["autoclip"] == saved["autoclip"]


@pytest.mark.parametrize("global_clipping", [False, True])
def test_parameters_added_to_the_optimizer_get_rows(global_clipping: bool) -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(
        SGD(model[0].parameters(), lr=0.1), **SETTINGS, global_clipping=global_clipping
    )
    train(model, optimizer, 2)
    optimizer.add_param_group({"params": model[2].weight})
    with pytest.raises(RuntimeError, match=r"optimizer\.add_param_group"):
        optimizer.clipper.add_param_group({"params": model[2].bias})
    train(model, optimizer, 2)
    optimizer.param_groups[0]["params"].append(model[2].bias)  # as some libraries do
    train(model, optimizer, 2)
    clipper = optimizer.clipper
    assert [[*map(id, group["params"])] for group in clipper.param_groups] == [
        [*map(id, group["params"])] for group in optimizer.param_groups
    ]
    lengths = [len(window) for window in windows(clipper)]
    assert lengths == ([6] if global_clipping else [6, 6, 2, 4])
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    assert len(norms) == 4
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert optimizer.state_dict()["autoclip"] == saved["autoclip"]


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, repickled])
def test_a_copy_has_rows_for_parameters_added_since_the_last_step(how: Any) -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(SGD(model[0].parameters(), lr=0.1), quantile=0.0)
    train(model, optimizer, 2)
    optimizer.param_groups[0]["params"].append(model[2].weight)
    optimizer.add_param_group({"params": model[2].bias})
    twin = how(optimizer)
    for norm in (1.0, 50.0):
        for group in twin.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.full_like(parameter, norm / parameter.numel() ** 0.5)
        twin.step()
    clipped = twin.clipper.last
    assert clipped.norms.tolist() == pytest.approx([50.0] * 4)
    assert all(clipped.thresholds <= 1.0001)
    twin.load_state_dict(twin.state_dict())


def test_the_last_step_stays_readable_after_other_settings_and_new_parameters() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(
        SGD([{"params": layer.parameters()} for layer in (model[0], model[2])], lr=0.1)
    )
    train(model, optimizer, 2)
    clipper = optimizer.clipper
    before = clipper.last.norms.tolist()
    clipper.param_groups[1]["history_length"] = 7
    assert len(clipper.thresholds) == 4
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(2)))
    assert len(clipper.param_groups[0]["params"]) == 3
    for each in (clipper, copy.deepcopy(optimizer).clipper):
        assert each.last.norms.tolist() == [*before[:2], 0.0, *before[2:]]


def test_an_added_group_has_its_own_settings_and_a_wrong_one_raises() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(SGD(model[0].parameters(), lr=0.1), **SETTINGS)
    optimizer.add_param_group({"params": model[2].weight, "quantile": 0.1})
    assert optimizer.clipper.param_groups[1]["quantile"] == 0.1
    optimizer.add_param_group({"params": model[2].bias, "quantile": 3})
    backward(model, batches()[0])
    for _ in range(2):  # and it is as it was, not half extended
        with pytest.raises(ValueError, match="quantile"):
            optimizer.step()
    optimizer.param_groups[2]["quantile"] = 0.2
    optimizer.step()
    groups = optimizer.clipper.param_groups
    assert [group["quantile"] for group in groups] == [0.5, 0.1, 0.2]


def test_parameters_that_vanish_are_an_error() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(SGD(model.parameters(), lr=0.1))
    optimizer.param_groups[0]["params"].pop()
    backward(model, batches()[0])
    with pytest.raises(RuntimeError, match=r"call optimizer\.clipper\.detach\(\)"):
        optimizer.step()
    former = optimizer.clipper
    former.detach()
    with pytest.raises(RuntimeError, match="cannot tell whose"):
        former.step()
    QuantileClip.as_optimizer(optimizer)
    optimizer.step()
    assert len(optimizer.clipper.last.norms) == 3


# -- parameter objects that are exchanged --------------------------------------------------------


def exchange(model: nn.Module, optimizer: Optimizer) -> None:
    """Give the optimizer new parameter objects at the old places, as FSDP and Accelerate do."""
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    optimizer.param_groups[0]["params"] = list(model.parameters())


def test_exchanged_parameters_keep_their_rows() -> None:
    expected = by_hand(lambda model: SGD(model.parameters(), lr=0.1))
    model = make_model()
    optimizer = QuantileClip.as_optimizer(SGD(model.parameters(), lr=0.1), **SETTINGS)
    for i, batch in enumerate(batches()):
        if i == 3:
            exchange(model, optimizer)
        backward(model, batch)
        optimizer.step()
    assert torch.equal(weights(model), expected[0])
    assert windows(optimizer.clipper) == expected[1]


@pytest.mark.parametrize("how", ["assign", "to_empty"])
def test_an_optimizer_left_with_stale_parameters_says_so_once(how: str) -> None:
    """An optimizer of torch does nothing in silence then, and so does a history."""
    if how == "assign":
        model: nn.Module = make_model()
        optimizer = QuantileClip.as_optimizer(SGD(model.parameters(), lr=0.1))
        backward(model, batches()[0])
        optimizer.step()
        optimizer.zero_grad()
        model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    else:
        with torch.device("meta"):
            model = make_model()
        optimizer = QuantileClip.as_optimizer(SGD(model.parameters(), lr=0.1))
        model.to_empty(device="cpu")
        for parameter in model.parameters():
            nn.init.normal_(parameter)
    backward(model, batches()[1])
    with pytest.warns(UserWarning, match="found no gradient on any parameter"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_to_empty_before_attaching_is_followed() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 1)
    model.to_empty(device="cpu")
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = QuantileClip.as_optimizer(SGD(model.parameters(), lr=0.1))
    train(model, optimizer, 3)
    assert [len(window) for window in windows(optimizer.clipper)] == [3, 3]


# -- closures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("make", [SGD, Adam])
def test_with_a_closure_gradients_are_clipped_after_it_has_run(how: str, make: Any) -> None:
    expected = by_hand(lambda model: make(model.parameters(), lr=0.1))
    model = make_model()
    optimizer = QuantileClip.as_optimizer(make(model.parameters(), lr=0.1), **SETTINGS)
    for batch in batches():

        def closure(batch: Tensor = batch) -> Tensor:
            return backward(model, batch)

        loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
        assert loss.dim() == 0
    assert torch.equal(weights(model), expected[0])
    assert windows(optimizer.clipper) == expected[1]


def test_lbfgs_records_every_evaluation_of_its_closure() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(
        torch.optim.LBFGS(model.parameters(), max_iter=4, line_search_fn="strong_wolfe"),
        quantile=0.5,
    )
    evaluations = 0
    for batch in batches(3):

        def closure(batch: Tensor = batch) -> Tensor:
            nonlocal evaluations
            evaluations += 1
            return backward(model, batch)

        optimizer.step(closure)
    assert evaluations > 3
    assert [len(window) for window in windows(optimizer.clipper)] == [evaluations] * 4


def test_a_step_that_is_differentiated_warns() -> None:
    """The derivative of 2 - 0.1 * clipped gradient is not that of clipping, nor is torch's."""
    start = torch.tensor([2.0], requires_grad=True)
    weight = start.clone()
    weight.retain_grad()
    optimizer = SGD([weight], lr=0.1, differentiable=True)
    with pytest.warns(UserWarning, match="clipping is not differentiated"):
        QuantileClip.as_optimizer(optimizer, max_norm=1.0)
    [weight.grad] = torch.autograd.grad((start**3 / 3).sum(), start, create_graph=True)
    optimizer.step()
    assert weight.item() == pytest.approx(1.9)
    [slope] = torch.autograd.grad(weight.sum(), start)
    assert slope.item() == pytest.approx(1 - 0.1 * 4)  # without clipping


# -- subclasses and exceptions -------------------------------------------------------------------


class Calling(SGD):
    """A subclass as people write them: its own step around `super().step()`."""

    fails = False

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        if self.fails:
            raise OSError("the disk is full")
        super().step()
        return loss


class Forwarding(SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Twice(Forwarding):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.parametrize("make", [Calling, Forwarding, Twice])
@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("scheduled", [False, True])
def test_a_subclass_that_calls_super_clips_once(
    make: type[SGD], with_closure: bool, scheduled: bool
) -> None:
    expected = by_hand(lambda model: SGD(model.parameters(), lr=0.1))
    model = make_model()
    optimizer = QuantileClip.as_optimizer(make(model.parameters(), lr=0.1), **SETTINGS)
    if scheduled:  # a scheduler wraps the optimizer's step attribute
        StepLR(optimizer, 100)
    for batch in batches():
        if with_closure:
            optimizer.step(lambda batch=batch: backward(model, batch))
        else:
            backward(model, batch)
            optimizer.step()
    assert windows(optimizer.clipper) == expected[1]
    assert torch.equal(weights(model), expected[0])


def test_a_step_that_raised_leaves_nothing_stuck() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(Calling(model.parameters(), lr=0.1), **SETTINGS)
    train(model, optimizer, 1)
    optimizer.fails = True
    backward(model, batches()[1])
    try:
        optimizer.step()
    except OSError:
        # Even while the exception is being handled, and its frames are alive.
        optimizer.fails = False
        backward(model, batches()[2])
        optimizer.step()
    train(model, optimizer, 1)
    assert [len(window) for window in windows(optimizer.clipper)] == [4] * 4

    def broken() -> Tensor:
        raise ValueError("in the closure")

    with pytest.raises(ValueError, match="in the closure"):
        optimizer.step(broken)
    train(model, optimizer, 1)
    assert [len(window) for window in windows(optimizer.clipper)] == [5] * 4


def test_a_step_that_raised_keeps_no_tensor_alive() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(Calling(model.parameters(), lr=0.1), **SETTINGS)
    optimizer.fails = True

    def attempt() -> Any:
        activation = torch.zeros(3)
        alive = weakref.ref(activation)
        backward(model, batches()[0])
        with pytest.raises(OSError, match="disk"):
            optimizer.step()
        return alive

    alive = attempt()
    gc.collect()
    assert alive() is None


def test_on_nonfinite_raise_stops_the_step_before_the_update() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), lr=0.1)
    clipper = QuantileClip(model.named_parameters(), **SETTINGS, on_nonfinite="raise")
    clipper.attach(optimizer)
    train(model, optimizer, 2)
    before, recorded = weights(model), windows(clipper)
    backward(model, batches()[2])
    model[2].weight.grad[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match=r"2\.weight"):
        optimizer.step()
    assert torch.equal(weights(model), before)
    assert windows(clipper) == recorded
    train(model, optimizer, 1)
    assert [len(window) for window in windows(clipper)] == [3] * 4


# -- state -------------------------------------------------------------------------------------


def roundtrip(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Through torch.save and torch.load, which takes no pickled code by default since torch 2.6."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("global_clipping", [False, True])
def test_the_history_travels_in_the_optimizers_state_dict(global_clipping: bool) -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(
        Adam(model.parameters()), **SETTINGS, global_clipping=global_clipping
    )
    train(model, optimizer, 4)
    saved = roundtrip(optimizer.state_dict())
    assert saved["autoclip"] == optimizer.clipper.state_dict()
    saved_model = copy.deepcopy(model.state_dict())
    train(model, optimizer, 5)

    other = make_model()
    resumed = QuantileClip.as_optimizer(
        Adam(other.parameters()), **SETTINGS, global_clipping=global_clipping
    )
    other.load_state_dict(saved_model)
    resumed.load_state_dict(saved)
    train(other, resumed, 5)
    assert torch.equal(weights(other), weights(model))
    assert resumed.state_dict()["autoclip"] == optimizer.state_dict()["autoclip"]


def test_a_plain_optimizer_loads_a_checkpoint_with_the_entry() -> None:
    model = make_model()
    optimizer = QuantileClip.as_optimizer(Adam(model.parameters()), **SETTINGS)
    train(model, optimizer, 2)
    saved = roundtrip(optimizer.state_dict())
    plain = Adam(make_model().parameters())
    plain.load_state_dict(saved)
    assert plain.state_dict()["state"][0]["step"] == 2
    assert "autoclip" not in plain.state_dict()


def test_a_checkpoint_without_the_entry_warns_once_and_clears_nothing() -> None:
    model = make_model()
    plain = Adam(model.parameters())
    train(model, plain, 2)
    saved = plain.state_dict()
    optimizer = QuantileClip.as_optimizer(Adam(model.parameters()), **SETTINGS)
    train(model, optimizer, 3)
    recorded = windows(optimizer.clipper)
    with pytest.warns(UserWarning, match="has no 'autoclip' entry") as caught:
        optimizer.load_state_dict(saved)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    assert windows(optimizer.clipper) == recorded
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_other_settings_are_said_at_the_users_line() -> None:
    model = make_model()
    saved = QuantileClip.as_optimizer(Adam(model.parameters()), quantile=0.5).state_dict()
    other = QuantileClip.as_optimizer(Adam(model.parameters()), quantile=0.9)
    with pytest.warns(UserWarning, match=r"quantile=0\.5 there and 0\.9 here") as caught:
        other.load_state_dict(saved)
    assert [warning.filename for warning in caught] == [__file__]


class TestRefusedCheckpoints:
    """Whoever refuses, the optimizer or the clipper: neither has changed."""

    def prepare(self) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        model = make_model()
        optimizer = QuantileClip.as_optimizer(Adam(model.parameters()), **SETTINGS)
        train(model, optimizer, 3)
        before = copy.deepcopy(optimizer.state_dict())
        train(model, optimizer, 1)
        other = copy.deepcopy(optimizer.state_dict())
        optimizer.load_state_dict(before)
        return optimizer, copy.deepcopy(before), other

    def check(self, optimizer: Any, before: dict[str, Any]) -> None:
        after = optimizer.state_dict()
        assert after["autoclip"] == before["autoclip"]
        assert after["param_groups"] == before["param_groups"]
        for i, state in before["state"].items():
            assert all(torch.equal(value, after["state"][i][k]) for k, value in state.items())

    def test_by_the_optimizer(self) -> None:
        optimizer, before, other = self.prepare()
        other["param_groups"][0]["params"].pop()
        with pytest.raises(ValueError, match="doesn't match the size"):
            optimizer.load_state_dict(other)
        self.check(optimizer, before)
        # What was pending from the refused one is not taken over later.
        entry = before.pop("autoclip")
        with pytest.warns(UserWarning, match="no 'autoclip' entry"):
            optimizer.load_state_dict(before)
        assert optimizer.state_dict()["autoclip"] == entry

    def test_by_the_clipper(self) -> None:
        optimizer, before, other = self.prepare()
        damaged = bytearray(other["autoclip"]["data"])
        damaged[len(damaged) // 2] ^= 1
        other["autoclip"]["data"] = bytes(damaged)
        with pytest.raises(StateError, match="damaged"):
            optimizer.load_state_dict(other)
        self.check(optimizer, before)

    def test_by_the_clipper_of_another_mode(self) -> None:
        optimizer, before, other = self.prepare()
        parameters = make_model().parameters()
        other["autoclip"] = QuantileClip(parameters, global_clipping=True).state_dict()
        with pytest.raises(StateError):
            optimizer.load_state_dict(other)
        self.check(optimizer, before)

    def test_by_another_hook(self) -> None:
        optimizer, before, other = self.prepare()

        def refuse(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
            raise RuntimeError("not this one")

        hook = optimizer.register_load_state_dict_pre_hook(refuse)
        with pytest.raises(RuntimeError, match="not this one"):
            optimizer.load_state_dict(other)
        hook.remove()
        self.check(optimizer, before)


def test_a_file_saved_by_a_clipper_loads_into_an_attached_one(tmp_path: Any) -> None:
    model = make_model()
    optimizer = Adam(model.parameters())
    clipper = QuantileClip(model.named_parameters(), **SETTINGS)
    clipper.attach(optimizer)
    train(model, optimizer, 3)
    clipper.save(tmp_path / "history")
    other = QuantileClip(make_model().named_parameters(), **SETTINGS)
    other.load(tmp_path / "history")
    np.testing.assert_array_equal(windows(other), windows(clipper))
