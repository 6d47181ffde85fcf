"""The clipper of an engine: one history of the norm that the engine itself measures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoclip.core import MaxNorm, Rule
from autoclip.core.adapter import ClipperSettings

# The values of settings that an engine which clips all gradients to a constant can follow.
_ONLY = {
    "group_clipping": (False,),
    "include_current": (None, False),
    "on_spike": ("clip",),
    "on_nonfinite": ("keep",),
}


class EngineClipper(MaxNorm):
    """A `MaxNorm` that an engine asks at each step.

    Made by `autoclip.torch.deepspeed.attach` and `autoclip.torch.fsdp.attach`.

    Attributes:
        is_saved_alone: True if trainers' checkpoints of the engine drop the history.

    Args:
        engine: the engine's name in messages.
        rule: the rule that turns the window into a threshold, or the class of such a rule.
        settings: the rule's, if `rule` is a class, and those of a clipper.

    Raises:
        TypeError: a setting is unknown or has a wrong type.
        ValueError: a setting has a wrong value, or one that the engine cannot do.
    """

    is_saved_alone = False

    def __init__(self, engine: str, rule: Rule | type[Rule], settings: Mapping[str, Any]) -> None:
        chosen = dict(settings)
        if chosen.pop("global_clipping", True) is not True:
            raise ValueError(
                f"{engine} clips all gradients together, so there can be one history only, of "
                "their total norm. Ask for it with global_clipping=True."
            )
        for name, possible in _ONLY.items():
            value = chosen.pop(name, possible[0])
            if value not in possible:
                raise ValueError(
                    f"{engine} measures the norm of all gradients and clips to a constant that is "
                    f"given before, so {name}={value!r} cannot work. Leave {name} out."
                )
        self._set_up(
            ClipperSettings.make(
                type(self).__name__, rule, global_clipping=True, include_current=False, **chosen
            )
        )
        self._attachment: Any = None

    def detach(self) -> None:
        """Give the engine back its own clipping. The history stays; a second call does nothing."""
        if self._attachment is not None:
            self._attachment.end()

    def __getstate__(self) -> dict[str, Any]:
        # A copy is a clipper of its own, which no engine asks.
        return {**self.__dict__, "_attachment": None}
