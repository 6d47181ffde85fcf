"""Mixed-up installations: load the packages that can be found, or say which command helps."""

from __future__ import annotations

import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

import autoclip


def refuse_legacy_installation() -> None:
    """Refuse to be imported next to the files of autoclip 0.2.1.

    That release has an `autoclip/__init__.py`; now `autoclip` is a namespace that several
    distributions share, and none of them ships one.

    Raises:
        ImportError: `autoclip` is a regular package; the text has the commands that help.
    """
    legacy = getattr(autoclip, "__file__", None)
    if legacy is None:
        return
    raise ImportError(
        f"{legacy} belongs to autoclip 0.2.1 or older, whose files are mixed up with this "
        "version's. Remove both, then install again:\n"
        "    pip uninstall -y autoclip autoclip-core autoclip-torch autoclip-tf\n"
        '    pip install "autoclip[torch]"  # or "autoclip[tf]", or "autoclip[all]"\n'
        f"If {legacy} is still there after the first command, delete it manually.",
        name="autoclip",
        path=legacy,
    )


def load_adapter(name: str, distribution: str) -> None:
    """Replace the module `name`, a placeholder, by the adapter that `distribution` installs.

    Python prefers the adapter's package to the placeholder, a module, when both lie in one folder.
    So a placeholder runs only where the adapter is missing, or where it lies in another folder of
    the namespace: an editable install.

    Args:
        name: of the adapter, e.g. `autoclip.torch`.
        distribution: the one to install.

    Raises:
        ModuleNotFoundError: the adapter is nowhere; the text has the command that helps.
    """
    for folder in autoclip.__path__:
        spec = PathFinder.find_spec(name, [folder])
        # The placeholder itself is no package, and a folder that an uninstall left behind, without
        # `__init__.py`, has no loader.
        if spec and spec.loader and spec.submodule_search_locations:
            # The import system returns the module under this name once the placeholder has run.
            sys.modules[name] = module_from_spec(spec)
            spec.loader.exec_module(sys.modules[name])
            return
    raise ModuleNotFoundError(
        f"{name} is not installed: pip install {distribution}\n"
        "If pip says that it is, its files are gone (upgrading from autoclip 0.2.1 can remove "
        f"them): pip install --force-reinstall --no-deps {distribution}",
        name=name,
    )
