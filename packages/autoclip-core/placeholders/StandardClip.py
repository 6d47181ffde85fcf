"""An answer to `from autoclip import StandardClip`: the namespace itself holds no class."""

raise ImportError(
    "autoclip is a namespace without names of its own. Import the class for your framework: "
    "from autoclip.torch import StandardClip, or from autoclip.tf import StandardClip.",
    name=__name__,
)
