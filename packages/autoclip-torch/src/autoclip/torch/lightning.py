"""AutoClip in Lightning: a callback for modules that are not to be touched, and for logging."""

from __future__ import annotations

from typing import Any

try:
    try:
        from lightning.pytorch import Callback, LightningModule, Trainer
    except ModuleNotFoundError:  # libraries such as Darts and NeuralForecast bring only this one
        from pytorch_lightning import Callback, LightningModule, Trainer  # type: ignore[assignment]
except ModuleNotFoundError as error:
    raise ImportError(
        "autoclip.torch.lightning needs Lightning, which cannot be imported here: "
        f'{error}. Install it with: pip install "autoclip-torch[lightning]"'
    ) from error

from autoclip.core import Rule
from autoclip.core.adapter import check_parameters, warn_user
from autoclip.torch._clipper import Clipper
from autoclip.torch._private import is_logging_step
from autoclip.torch._trainers.engine import EngineClipper
from autoclip.torch._trainers.maker import (
    ClipperMaker,
    Clippers,
    clipper_of,
    name_parameters,
)
from autoclip.torch.logging import log_values

__all__ = ["AutoClipCallback"]


class AutoClipCallback(Callback):
    """Attach a clipper to each of a module's optimizers when fitting starts, and log its steps.

    The clippers' histories are part of the optimizers' states, so Lightning's checkpoints carry
    them, and `Trainer.fit(ckpt_path=...)` restores them. At each step that Lightning logs, the
    callback logs the values of `autoclip.torch.logging.log_values`. If the module has
    several optimizers, their index is appended: `"autoclip/total_norm/0"`.

    An optimizer that comes from `as_optimizer` keeps its clipper. If one does, a callback without
    arguments only logs, and other optimizers stay without a clipper.

    Parameters that the optimizers got without names have those of the module in checkpoints,
    messages and reports.

    `DeepSpeedStrategy` and `FSDPStrategy` (FSDP1) clip all gradients together themselves: pass
    `global_clipping=True`. A norm is then compared with the norms before it. See
    `autoclip.torch.deepspeed.attach` and `autoclip.torch.fsdp.attach`.

    Args:
        clipper_class: `QuantileClip` (default), `StandardClip`, or a subclass of `Clipper`.
        rule: a rule for a plain `Clipper`, instead of a class.
        log_parameters: True to log values for each parameter too; a string is a regular
            expression that is searched in their names. See `log_values`.
        settings: those of the class, such as `quantile`, `history_length`, `global_clipping`.

    Raises:
        TypeError, ValueError: a setting is unknown or wrong.
        RuntimeError: when fitting starts, if an optimizer has a clipper already and the callback
            was given arguments.

    >>> from lightning.pytorch import Trainer
    >>> from autoclip.torch.lightning import AutoClipCallback
    >>> trainer = Trainer(callbacks=[AutoClipCallback(quantile=0.9)], accelerator="cpu")
    """

    def __init__(
        self,
        clipper_class: type[Clipper] | None = None,
        *,
        rule: Rule | None = None,
        log_parameters: bool | str = False,
        **settings: Any,
    ) -> None:
        check_parameters(log_parameters)
        self._log_parameters = log_parameters
        self._maker = ClipperMaker(clipper_class, rule, settings)
        self._clippers = Clippers()
        self._restored: list[dict[str, Any]] = []
        # The strategy of FSDP2 saves optimizers through torch.distributed.checkpoint.
        self._drops_entries = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attach: the optimizers exist, and their states are restored only after this."""
        model = trainer.strategy.model
        strategies = [each.__name__ for each in type(trainer.strategy).__mro__]
        self._drops_entries = "ModelParallelStrategy" in strategies
        self._clippers = Clippers(self._maker.attach(trainer.optimizers, model, pl_module))
        self._restore()
        if trainer.gradient_clip_val:
            warn_user(
                f"Lightning clips the gradients to gradient_clip_val={trainer.gradient_clip_val} "
                "before AutoClip sees them, so that the history holds norms that are clipped "
                "already. Leave gradient_clip_val out of the Trainer."
            )

    def state_dict(self) -> dict[str, Any]:
        """The histories, where the optimizers' states in a checkpoint have no place for them."""
        return {
            "clippers": [
                clipper.state_dict()
                for clipper in self._clippers
                if self._drops_entries
                or (isinstance(clipper, EngineClipper) and clipper.is_saved_alone)
            ]
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the result of `state_dict`, now or when fitting starts."""
        self._restored = list(state_dict.get("clippers", []))
        self._restore()

    def _restore(self) -> None:
        if clippers := [*self._clippers]:
            for clipper, saved in zip(clippers, self._restored):
                clipper.load_state_dict(saved)
            self._restored = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name parameters that a finetuning callback has added, before a checkpoint is saved."""
        name_parameters(self._clippers, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Log the last step, if this is a step that Lightning logs."""
        # Lightning's own callbacks ask the same; everything else would read on other steps too.
        if not is_logging_step(trainer) or (
            pl_module.automatic_optimization and trainer.fit_loop._should_accumulate()
        ):
            return
        index = {id(clipper_of(each)): i for i, each in enumerate(trainer.optimizers)}
        for clipper in self._clippers:
            suffix = f"/{index.get(id(clipper), 0)}" if len(trainer.optimizers) > 1 else ""
            values = log_values(clipper, self._log_parameters, model=pl_module)
            values = {name + suffix: value for name, value in values.items()}
            pl_module.log_dict(values, on_step=True, on_epoch=False)
