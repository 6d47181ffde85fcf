"""An answer to `from autoclip import QuantileClip`: the namespace itself holds no class."""

raise ImportError(
    "autoclip is a namespace without names of its own. Import the class for your framework: "
    "from autoclip.torch import QuantileClip, or from autoclip.tf import QuantileClip.",
    name=__name__,
)
