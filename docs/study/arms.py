"""Ways to clip that the study compares, by name, in either framework."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any

# The same five for every task, as one would choose who knows nothing of a task's gradients.
CONSTANTS = (0.01, 0.1, 1.0, 10.0, 100.0)

# A clipper's class, which autoclip.torch and autoclip.tf share by name, and its settings.
CLIPPERS: dict[str, tuple[str, dict[str, Any]]] = {
    "quantile 0.1, global": ("QuantileClip", {"quantile": 0.1, "global_clipping": True}),
    "quantile 0.5, global": ("QuantileClip", {"quantile": 0.5, "global_clipping": True}),
    "quantile 0.9, global": ("QuantileClip", {"quantile": 0.9, "global_clipping": True}),
    "quantile 0.1": ("QuantileClip", {"quantile": 0.1}),
    "quantile 0.5": ("QuantileClip", {"quantile": 0.5}),
    "quantile 0.9 (default)": ("QuantileClip", {}),
    "quantile 0.9, last 100": ("QuantileClip", {"history_length": 100}),
    "StandardClip": ("StandardClip", {}),
    # As docs/recipes.md has them.
    "ZClip": (
        "StandardClip",
        {
            "deviations": 2.5,
            "decay": 0.97,
            "shrink": True,
            "record": "clipped",
            "global_clipping": True,
        },
    ),
    "AdaGC": (
        "StandardClip",
        {
            "deviations": 0,
            "decay": 0.98,
            "factor": 1.04,
            "record": "clipped",
            "warmup_steps": 100,
        },
    ),
    "percentile 5": ("QuantileClip", {"quantile": 5 / 99, "history_length": 100}),
}


def grid() -> dict[str, tuple[str, dict[str, Any]]]:
    """The exploration's arms: low baselines that a divergence cannot drag along, with a factor.

    Clipped norms under a factor of 1 are left out: their thresholds could only fall.
    """
    arms = {}
    for scope, record, length, quantile, factor in product(
        ("global", "parameter"),
        ("raw", "clipped"),
        (1000, 200, 100, 50),
        (0.1, 0.25, 0.5),
        (1.0, 1.5, 2.0, 3.0),
    ):
        if record == "clipped" and factor == 1.0:
            continue
        settings: dict[str, Any] = {
            "quantile": quantile,
            "factor": factor,
            "history_length": length,
            "global_clipping": scope == "global",
        }
        if record == "clipped":
            settings |= {"record": "clipped", "include_current": False}
        name = f"{quantile:g} ×{factor:g}, {record}, last {length}, {scope}"
        arms[name] = ("QuantileClip", settings)
    return arms


def further() -> dict[str, tuple[str, dict[str, Any]]]:
    """Arms that the grid's first results suggested: shorter windows, smaller factors."""
    clipped = {"record": "clipped", "include_current": False}
    arms: dict[str, tuple[str, dict[str, Any]]] = {}
    for scope, length, (quantile, factor) in product(
        ("global", "parameter"), (50, 20), ((0.1, 1.25), (0.1, 1.5), (0.25, 1.25), (0.25, 1.5))
    ):
        settings = {
            "quantile": quantile,
            "factor": factor,
            "history_length": length,
            "global_clipping": scope == "global",
        }
        name = f"{quantile:g} ×{factor:g}, clipped, last {length}, {scope}"
        arms[name] = ("QuantileClip", settings | clipped)
    arms["0.1 ×1, raw, last 20, global"] = (
        "QuantileClip",
        {"quantile": 0.1, "history_length": 20, "global_clipping": True},
    )
    arms["0.1 ×1, raw, last 1000, global, max_norm 100"] = (
        "QuantileClip",
        {"quantile": 0.1, "global_clipping": True, "max_norm": 100.0},
    )
    for factor, decay in product((1.25, 1.5), (0.9, 0.97)):
        arms[f"mean of logarithms, decay {decay:g}, ×{factor:g}, clipped, global"] = (
            "StandardClip",
            {
                "deviations": 0,
                "decay": decay,
                "factor": factor,
                "log": True,
                "record": "clipped",
                "warmup_steps": 10,
                "global_clipping": True,
            },
        )
    return arms


GRID = grid() | further()

# The one arm that the exploration chose, see confirmation.md.
CANDIDATE = "candidate"
CHOSEN: dict[str, tuple[str, dict[str, Any]]] = {
    CANDIDATE: (
        "QuantileClip",
        {
            "quantile": 0.1,
            "factor": 1.5,
            "history_length": 20,
            "record": "clipped",
            "include_current": False,
            "global_clipping": True,
        },
    ),
}

NONE, TUNED, DEFAULT = "none", "tuned constant", "quantile 0.9 (default)"
ARMS = (NONE, TUNED, *CLIPPERS)
# The confirmation's arms: the candidate, and what it is compared with.
COMPARED = (NONE, DEFAULT, "quantile 0.1, global", "percentile 5", CANDIDATE)
CONFIRMED = (*COMPARED, TUNED, "ZClip", "AdaGC")
# The arms whose course of training is recorded and drawn.
DRAWN = (NONE, TUNED, "quantile 0.1, global", DEFAULT)


# The supplement's arms. The package zclip by default also clips to 1; once with and once without.
ZCLIP, UNBOUNDED_ZCLIP = "zclip package", "zclip package, max_norm off"
ZCLIPS: dict[str, dict[str, Any]] = {ZCLIP: {}, UNBOUNDED_ZCLIP: {"max_grad_norm": None}}
# A constant for the first steps of training only: its value, the number of steps.
FIRST_STEPS = "constant 100, first 20 steps"
STARTS = {FIRST_STEPS: (100.0, 20)}
# The default with the constant that was tuned for SGD on the images: for the first steps.
BOUNDED_DEFAULT = "quantile 0.9, max_norm 10"
# A quantile of all norms, and never more than 1.
BOUNDED_ONE = "quantile 0.9, global, max_norm 1"
BOUNDED: dict[str, tuple[str, dict[str, Any]]] = {
    BOUNDED_DEFAULT: ("QuantileClip", {"max_norm": 10.0}),
    BOUNDED_ONE: ("QuantileClip", {"quantile": 0.9, "max_norm": 1.0, "global_clipping": True}),
}
BOUNDED_LOW = "0.1 ×1, raw, last 1000, global, max_norm 100"

GradientClipper = Callable[[Sequence[Any]], object]


def other_clipper(arm: str, constant: float | None) -> GradientClipper | None:
    """A function that clips the gradients of a model's parameters in place, once a step.

    None for no clipping and for AutoClip's clippers, which are part of the optimizer.
    """
    from torch import nn

    if constant is not None:
        return partial(nn.utils.clip_grad_norm_, max_norm=constant)
    if arm in ZCLIPS:
        from zclip import ZClip

        clipper = ZClip(**ZCLIPS[arm])
        return lambda parameters: clipper.step(nn.ParameterList(parameters))
    if arm in STARTS:
        value, steps = STARTS[arm]
        limits = iter([value] * steps)

        def clip(parameters: Sequence[Any]) -> None:
            if (limit := next(limits, None)) is not None:
                nn.utils.clip_grad_norm_(parameters, limit)

        return clip
    return None


def settings_of(arm: str) -> tuple[str, dict[str, Any]]:
    """An AutoClip arm's class and settings."""
    return (CLIPPERS | CHOSEN | GRID | BOUNDED)[arm]


def clipped_torch_optimizer(optimizer: Any, arm: str, constant: float | None) -> Any:
    """The optimizer that clips as the arm does before each step."""
    from autoclip import torch as autoclip

    if clipper := other_clipper(arm, constant):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def clip(*_: Any) -> None:
            clipper(parameters)

        optimizer.register_step_pre_hook(clip)
    elif arm != NONE:
        name, settings = settings_of(arm)
        getattr(autoclip, name).as_optimizer(optimizer, **settings)
    return optimizer


def clipped_by_group(optimizer: Any, arm: str, constant: float | None) -> Any:
    """The same where each parameter group is a model of its own.

    Clipping by group is the global clipping of each model.
    """
    from autoclip import torch as autoclip

    clippers = [other_clipper(arm, constant) for _ in optimizer.param_groups]
    if clippers[0]:

        def clip(*_: Any) -> None:
            for group, clipper in zip(optimizer.param_groups, clippers):
                clipper(group["params"])

        optimizer.register_step_pre_hook(clip)
    elif arm != NONE:
        name, settings = settings_of(arm)
        scope = settings.get("global_clipping", False)
        settings = settings | {"global_clipping": False, "group_clipping": scope}
        getattr(autoclip, name).as_optimizer(optimizer, **settings)
    return optimizer


def clipped_keras_optimizer(optimizer: Any, arm: str, constant: float | None) -> Any:
    """The same for an optimizer of Keras."""
    from autoclip import tf as autoclip

    if constant is not None:
        optimizer.global_clipnorm = constant
    elif arm != NONE:
        name, settings = settings_of(arm)
        optimizer = getattr(autoclip, name).as_optimizer(optimizer, **settings)
    return optimizer


def select(names: Iterable[str] | None) -> tuple[str, ...]:
    """The arms of these names, in the study's order; all of them for None."""
    if names is None:
        return ARMS
    chosen = set(names)
    if unknown := chosen - set(ARMS):
        raise ValueError(f"unknown arms {sorted(unknown)}; there are {list(ARMS)}")
    return tuple(arm for arm in ARMS if arm in chosen)
