"""AutoClip in the Hugging Face Trainer: a callback that attaches, resumes and logs."""

from __future__ import annotations

import json
import os
import weakref
from contextlib import ExitStack
from typing import Any

try:
    from accelerate.optimizer import AcceleratedOptimizer  # type: ignore[import-untyped]
    from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper  # type: ignore[import-untyped]
    from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
    from transformers import TrainingArguments as Arguments
except ModuleNotFoundError as error:
    raise ImportError(
        "autoclip.torch.transformers needs transformers and accelerate, which cannot be imported "
        f'here: {error}. Install them with: pip install "autoclip-torch[transformers]"'
    ) from error

from autoclip.core import Rule
from autoclip.core.adapter import CHECKPOINT_FILE, check_parameters, warn_user
from autoclip.torch._attachment import STATE_KEY
from autoclip.torch._clipper import Clipper
from autoclip.torch._files.reading import state_dicts
from autoclip.torch._trainers.engine import EngineClipper
from autoclip.torch._trainers.maker import ClipperMaker, Clippers
from autoclip.torch.logging import log_values

__all__ = ["AutoClipCallback"]

# The optimizer's state in one of the trainer's checkpoints.
OPTIMIZER_FILE = "optimizer.pt"


class AutoClipCallback(TrainerCallback):
    """Attach a clipper to the trainer's optimizer when training starts, and log its steps.

    The clipper's history is part of the optimizer's state, so it is saved in each checkpoint's
    `optimizer.pt`. The trainer loads that file before any callback can attach a clipper; on resume
    the callback therefore reads the history from there itself. Under FSDP there is no such file,
    and the files that are saved instead drop the history; there the callback writes it into the
    checkpoint as `autoclip.safetensors`.

    At each step that the trainer logs, the values of `autoclip.torch.logging.log_values` are
    logged with the trainer's own. While a step computes its gradients, `args.max_grad_norm` is 0:
    with the trainer's default of 1, the history would hold norms that are clipped already. If that
    step raises, the value is back at once with `add_to`, and otherwise when training starts again.

    An optimizer that comes from `as_optimizer` keeps its clipper, and a callback without arguments
    then only logs. Parameters have the model's names in checkpoints, messages and reports.

    DeepSpeed and FSDP1 clip all gradients together themselves: pass `global_clipping=True`, and
    with DeepSpeed call `add_to`. A norm is then compared with the norms before it. See
    `autoclip.torch.deepspeed.attach` and `autoclip.torch.fsdp.attach`. Their checkpoints hold the
    history as `autoclip.safetensors` too.

    Args:
        clipper_class: `QuantileClip` (default), `StandardClip`, or a subclass of `Clipper`.
        rule: a rule for a plain `Clipper`, instead of a class.
        log_parameters: True to log values for each parameter too; a string is a regular
            expression that is searched in their names. See `log_values`.
        resume_from_checkpoint: the folder that you pass to `trainer.train`, which does not tell
            callbacks. Needed only if it is neither `args.resume_from_checkpoint` nor a checkpoint
            in `args.output_dir`.
        settings: those of the class, such as `quantile`, `history_length`, `global_clipping`.

    Raises:
        TypeError, ValueError: a setting is unknown or wrong.
        RuntimeError: when training starts, if the optimizer has a clipper already and the callback
            was given settings, or if the checkpoint that is resumed from cannot be found.
        StateError: when training starts, if the saved history does not fit the model.

    >>> from autoclip.torch.transformers import AutoClipCallback
    >>> callback = AutoClipCallback(quantile=0.9)  # Trainer(..., callbacks=[callback])
    """

    def __init__(
        self,
        clipper_class: type[Clipper] | None = None,
        *,
        rule: Rule | None = None,
        log_parameters: bool | str = False,
        resume_from_checkpoint: str | os.PathLike[str] | None = None,
        **settings: Any,
    ) -> None:
        check_parameters(log_parameters)
        self._log_parameters = log_parameters
        self._maker = ClipperMaker(clipper_class, rule, settings)
        self._checkpoint = resume_from_checkpoint
        self._clippers = Clippers()
        self._trainer: weakref.ref[Trainer] | None = None
        self._restore = ExitStack()

    def add_to(self, trainer: Trainer) -> None:
        """Add this callback to a trainer, in front of all others.

        `Trainer(callbacks=[...])` and `trainer.add_callback` put it behind the integrations that
        report to TensorBoard, Weights & Biases and so on, which then have written a step's log
        before the values are in it. Nor do they tell a callback which trainer calls it, and with
        that, the DeepSpeed engine.

        Args:
            trainer: the trainer; this callback must not be in it yet.
        """
        trainer.callback_handler.callbacks.insert(0, self)
        self._trainer = weakref.ref(trainer)

    def on_train_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Attach, and read the history from the checkpoint that training resumes from."""
        optimizer = kwargs["optimizer"]
        args, model = _of_trainer(args, kwargs)
        unwrapped = model
        if is_deepspeed := isinstance(optimizer, DeepSpeedOptimizerWrapper):
            model = self._engine()
        while isinstance(optimizer, AcceleratedOptimizer):
            optimizer = optimizer.optimizer
        # The trainer has loaded an engine's checkpoint already.
        had_clipper = hasattr(optimizer, "clipper") and not is_deepspeed
        [clipper] = self._maker.attach([optimizer], model, unwrapped)
        self._clippers = Clippers([clipper])
        if state.global_step:
            self._resume(clipper, had_clipper, args, state)
        self._restore.close()  # after a training that was interrupted
        if args.max_grad_norm:
            warn_user(
                f"TrainingArguments(max_grad_norm={args.max_grad_norm}) would clip the gradients "
                "before AutoClip sees them, and the history would hold norms that are clipped "
                "already. It is treated as 0 at each step. Set max_grad_norm=0 to silence this."
            )

    def on_step_begin(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep the trainer from clipping the gradients of this step.

        Not of the whole training: after an interruption `args.max_grad_norm` would stay 0, and
        checkpoints, which hold the arguments, would say 0.
        """
        args, _ = _of_trainer(args, kwargs)
        if args.max_grad_norm:
            self._restore.callback(setattr, args, "max_grad_norm", args.max_grad_norm)
            args.max_grad_norm = 0.0
            trainer = None if self._trainer is None else self._trainer()
            if trainer is not None:
                _close_on_error(self._restore, trainer)

    def on_pre_optimizer_step(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put `args.max_grad_norm` back: the trainer has read it."""
        self._restore.close()

    def on_log(
        self,
        args: Arguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the last step's values to the trainer's own logs of training."""
        # Evaluations, and the summary at the end, are logged here too, without the learning rate.
        # SetFit renames the loss.
        if logs is None or "learning_rate" not in logs:
            return
        _, model = _of_trainer(args, kwargs)
        for clipper in self._clippers:
            values = log_values(clipper, self._log_parameters, model=model)
            logs.update(values)
            # Checkpoints save a copy that was made before.
            if state.log_history:
                state.log_history[-1].update(values)

    def on_save(
        self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Save the history, if the checkpoint that has just been written lacks it."""
        args, _ = _of_trainer(args, kwargs)
        folder = _checkpoint_folder(args, state)
        if (
            args.should_save  # on one process; the histories are the same on all
            and not args.save_only_model
            and os.path.isdir(folder)
            and not os.path.isfile(os.path.join(folder, OPTIMIZER_FILE))
        ):
            for clipper in self._clippers:
                clipper.save(os.path.join(folder, CHECKPOINT_FILE))

    def _engine(self) -> Any:
        """The trainer's DeepSpeed engine."""
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None:
            raise RuntimeError(
                "The trainer gives its callbacks no DeepSpeed engine. Add the callback with "
                "AutoClipCallback(...).add_to(trainer) instead of callbacks=[...]."
            )
        return trainer.model_wrapped

    def _resume(
        self,
        clipper: Clipper | EngineClipper,
        was_attached: bool,
        args: Arguments,
        state: TrainerState,
    ) -> None:
        folders = [_checkpoint_folder(args, state)]
        if isinstance(args.resume_from_checkpoint, str):
            folders.insert(0, args.resume_from_checkpoint)
        # Another run may have left a checkpoint of the same step there.
        found = next((folder for folder in folders if _is_checkpoint_of(folder, state)), None)
        checkpoint = found if self._checkpoint is None else os.fspath(self._checkpoint)
        if checkpoint is not None and os.path.isfile(os.path.join(checkpoint, CHECKPOINT_FILE)):
            clipper.load(os.path.join(checkpoint, CHECKPOINT_FILE))
        elif was_attached:
            return  # and loaded with the optimizer, which warns if there was no history
        elif checkpoint is not None:
            _load_from_optimizer_file(clipper, os.path.join(checkpoint, OPTIMIZER_FILE))
        else:
            raise RuntimeError(
                f"Training resumes at step {state.global_step}, and the history of the gradients' "
                "norms is in the checkpoint that the trainer has loaded, but that is not "
                f"{' nor '.join(folders)}. Say where it is: "
                "AutoClipCallback(resume_from_checkpoint=...)."
            )


def _of_trainer(args: Arguments, kwargs: dict[str, Any]) -> tuple[Arguments, Any]:
    """The trainer's own arguments and model, for which SetFit passes its own."""
    return kwargs.get("st_args", args), kwargs.get("st_model", kwargs.get("model"))


def _close_on_error(stack: ExitStack, trainer: Trainer) -> None:
    """Until `stack` is closed, close it if a forward or backward pass of the trainer raises."""
    own = vars(trainer).get("training_step")
    training_step = trainer.training_step

    def step(*args: Any, **kwargs: Any) -> Any:
        try:
            return training_step(*args, **kwargs)
        except BaseException:
            stack.close()
            raise

    vars(trainer)["training_step"] = step
    if own is None:
        stack.callback(delattr, trainer, "training_step")
    else:
        stack.callback(setattr, trainer, "training_step", own)


def _load_from_optimizer_file(clipper: Clipper | EngineClipper, path: str) -> None:
    reason = f"There is no {path}"
    if os.path.isfile(path):
        saved = state_dicts(path)
        if STATE_KEY in saved:
            clipper.load_state_dict(saved[STATE_KEY])
            return
        reason = f"{path} has no {STATE_KEY!r} entry"
    if clipper._attachment is not None:
        clipper._attachment.may_lack_history = False  # one warning is enough
    warn_user(
        f"{reason}: the checkpoint holds no history of gradient norms. AutoClip starts with an "
        "empty one."
    )


def _checkpoint_folder(args: Arguments, state: TrainerState) -> str:
    """The folder that the trainer saves to at this step."""
    return os.path.join(args.output_dir or "", f"checkpoint-{state.global_step}")


def _is_checkpoint_of(folder: str, state: TrainerState) -> bool:
    """True if `state` was loaded from this folder, as far as its logs can tell."""
    path = os.path.join(folder, "trainer_state.json")
    if not os.path.isfile(path):
        return False
    saved = TrainerState.load_from_json(path)

    def memory(of: TrainerState) -> str:  # as text, in which NaN equals NaN
        return json.dumps([of.global_step, of.epoch, of.total_flos, of.log_history])

    return memory(saved) == memory(state)
