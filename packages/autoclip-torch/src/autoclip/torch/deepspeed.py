"""AutoClip in DeepSpeed: global clipping through the engine's own norm and clipping."""

from __future__ import annotations

import math
from inspect import signature
from typing import Any

from torch.optim import Optimizer

try:
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.utils import clip_grad_norm_
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
except ModuleNotFoundError as error:
    raise ImportError(
        "autoclip.torch.deepspeed needs DeepSpeed, which cannot be imported here: "
        f'{error}. Install it with: pip install "autoclip-torch[deepspeed]"'
    ) from error

from autoclip.core import Quantile, Rule
from autoclip.core.adapter import BaseAttachment, second_clipper_message, warn_user
from autoclip.torch._attachment import STATE_KEY
from autoclip.torch._trainers.engine import EngineClipper

__all__ = ["EngineClipper", "attach"]

# DeepSpeed takes 0 for "do not clip".
_SMALLEST = 1e-38
# The attributes that an attachment gives to its engine.
_REPLACED = (
    "_take_model_step",
    "save_checkpoint",
    "load_checkpoint",
    "clip_fp32_gradients",
    "clipper",
)


def attach(
    engine: DeepSpeedEngine,
    rule: Rule | type[Rule] = Quantile,
    history_length: int = 1000,
    **settings: Any,
) -> EngineClipper:
    """Let a DeepSpeed engine clip to a threshold that follows the history of its gradients' norm.

    DeepSpeed measures the norm of all gradients together, over all processes, and clips to a
    constant. The clipper sets that constant before each step and records the norm after it, so a
    norm is compared with the ones before it (`include_current=False`). A step that DeepSpeed skips,
    since its loss scaler found an overflow, records nothing. DeepSpeed multiplies by
    `threshold / (norm + 1e-6)`.

    The engine's `save_checkpoint` and `load_checkpoint` carry the history. Without the optimizer's
    state (`load_module_only=True`, `load_optimizer_states=False`) the history is not loaded either.

    Args:
        engine: the first result of `deepspeed.initialize`, with ZeRO stage 0, 1, 2 or 3.
        rule: the rule that turns the window into a threshold; a class takes its settings from
            `settings`, as `attach(engine, quantile=0.9)` does.
        history_length: the number of norms kept, the newest ones.
        settings: `max_norm`, `warmup_steps` and `record`; see `Clipper`.

    Returns:
        The clipper with the history, also as `engine.clipper`. Its `detach()` gives the engine
        back its own clipping.

    Raises:
        TypeError: it is not a DeepSpeed engine, or a setting is unknown or has a wrong type.
        ValueError: a setting has a wrong value, or one that DeepSpeed cannot do.
        RuntimeError: the engine or its optimizer has a clipper already, or the engine has no
            optimizer, does not measure the norm, or updates weights outside of its step.
    """
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            "engine must be a DeepSpeed engine, the first result of deepspeed.initialize, "
            f"but got {type(engine).__module__}.{type(engine).__qualname__}."
        )
    clipper = EngineClipper("DeepSpeed", rule, {"history_length": history_length, **settings})
    _refuse_unsupported(engine)
    own = engine._config._param_dict.get("gradient_clipping")
    if own:
        warn_user(
            f"The engine's config has gradient_clipping={own}. The clipper replaces it; leave "
            "it out of the config to silence this."
        )
    _Attachment(clipper, engine).begin()
    return clipper


def _refuse_unsupported(engine: Any) -> None:
    # The engine passes on attributes of its module, which may have a clipper of its own.
    for owner in (engine, engine.optimizer, getattr(engine, "basic_optimizer", None)):
        present = getattr(owner, "__dict__", {}).get("clipper")
        if present is not None:
            raise RuntimeError(second_clipper_message(owner, present))
    optimizer = engine.optimizer
    if not (hasattr(optimizer, "clip_grad") or isinstance(optimizer, Optimizer)):
        raise RuntimeError(
            f"This engine has no optimizer that clips, but {type(optimizer).__name__}. Give "
            "deepspeed.initialize an optimizer."
        )
    if not getattr(optimizer, "compute_grad_norm", True):
        raise RuntimeError(
            "This engine does not measure the norm of its gradients. Leave "
            "zero_optimization.compute_grad_norm=false out of its config."
        )
    if getattr(engine, "zenflow", False):
        raise RuntimeError(
            "ZenFlow updates weights outside of the engine's step, with gradients that its norm "
            "does not include. Leave zero_optimization.zenflow out of the config."
        )


class _Attachment(BaseAttachment):
    """A clipper on an engine, with methods in place of some of the engine's."""

    def __init__(self, clipper: EngineClipper, engine: Any) -> None:
        super().__init__(clipper, engine)
        # Without ZeRO in float32 the optimizer is torch's, and the engine clips for it.
        self._clips_itself = not hasattr(engine.optimizer, "clip_grad")
        self._norm: Any = None
        self._own = self._limit

    @property
    def _place(self) -> tuple[Any, str]:
        """The object and attribute that hold the constant DeepSpeed clips to."""
        engine = self.optimizer
        if self._clips_itself:
            return engine._config, "gradient_clipping"
        return engine.optimizer, "clip_grad"

    @property
    def _limit(self) -> float:
        return float(getattr(*self._place))

    def _hook(self, engine: Any) -> None:
        self._step, self._save, self._load = (
            engine._take_model_step,
            engine.save_checkpoint,
            engine.load_checkpoint,
        )
        # Not `step`, which a pipeline's engine does not call.
        engine._take_model_step = self._take_model_step
        engine.save_checkpoint = self._save_checkpoint
        engine.load_checkpoint = self._load_checkpoint
        if self._clips_itself:
            engine.clip_fp32_gradients = self._clip_gradients
        engine.clipper = self._clipper
        self._set_limit()
        self._clipper._attachment = self

    def _unhook(self, engine: Any) -> None:
        if engine is not None:
            for name in _REPLACED:
                vars(engine).pop(name, None)
            setattr(*self._place, self._own)
        self._clipper._attachment = None

    def _set_limit(self) -> None:
        limit = max(self._clipper.max_norm, _SMALLEST)
        # An engine calls us only if this is positive. An optimizer gets no infinity: a norm that
        # overflows would be divided by it, which makes NaN of all.
        setattr(*self._place, limit if self._clips_itself or limit < math.inf else 0.0)

    # -- steps -------------------------------------------------------------------------------

    def _take_model_step(self, *args: Any, **kwargs: Any) -> Any:
        engine = self.optimizer
        self._set_limit()  # a checkpoint brings its own
        self._norm = None
        scale = _loss_scale(engine.optimizer)
        result = self._step(*args, **kwargs)
        if engine.was_step_applied():
            norm = self._norm if self._clips_itself else engine.get_global_grad_norm()
            if norm is not None:
                self._clipper.record(float(norm) * _correction(engine.optimizer, scale))
        # Before the next backward pass, in which an offloaded optimizer looks at it.
        self._set_limit()
        return result

    def _clip_gradients(self) -> None:
        engine = self.optimizer
        if all(p.grad is None for p in engine.module.parameters()):
            return  # DeepSpeed's function raises IndexError
        self._norm = clip_grad_norm_(
            engine.module.parameters(), max_norm=self._limit, mpu=engine.mpu
        )

    # -- checkpoints -------------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        call = signature(self._save).bind(*args, **kwargs)
        theirs = call.arguments.get("client_state") or {}
        call.arguments["client_state"] = {**theirs, STATE_KEY: self._clipper.state_dict()}
        return self._save(*call.args, **call.kwargs)

    def _load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        path, client_state = self._load(*args, **kwargs)
        if path is None:
            return path, client_state
        entry = client_state.pop(STATE_KEY, None)
        given = signature(self._load).bind(*args, **kwargs).arguments
        if given.get("load_optimizer_states", True) and not given.get("load_module_only"):
            if entry is None:
                warn_user(
                    f"The checkpoint {path} has no {STATE_KEY!r} entry in its client state: it was "
                    "saved before a clipper was attached, or the entry was dropped since. The "
                    "clipper keeps the history that it has."
                )
            else:
                source = f"the client state of {path}"
                self._clipper.commit_state(self._clipper._check_state_dict(entry, source))
        self._set_limit()
        return path, client_state


def _loss_scale(optimizer: Any) -> float:
    scale = getattr(optimizer, "loss_scale", None)
    return 1.0 if scale is None else float(scale)


def _correction(optimizer: Any, scale: float) -> float:
    """The factor between the norm that DeepSpeed reports and that of the unscaled gradients.

    Args:
        optimizer: the engine's.
        scale: the loss scale before the step. Where it grows in a step, some optimizers divide by
            the new one already.
    """
    if isinstance(optimizer, FP16_UnfusedOptimizer):  # reports the norm as it is scaled
        return 1.0 / scale
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return 1.0
    return _loss_scale(optimizer) / scale
