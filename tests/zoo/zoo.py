"""The optimizer classes of eight libraries, and how those that need more are made."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

LIBRARIES = [
    "schedulefree",
    "heavyball",
    "pytorch_optimizer",
    "timm.optim",
    "bitsandbytes.optim",
    "torchao.optim",
    "galore_torch",
    "torch_optimizer",
]

# Cannot be constructed or stepped, with or without AutoClip; a test makes sure that it still is so.
CANNOT = {
    "schedulefree": {},
    "heavyball": {
        **dict.fromkeys(["BaseOpt", "ChainOpt", "StatefulOptimizer"], "a base class"),
        **dict.fromkeys(["MSAM", "PSGDBase", "ScheduleFree", "SOAPBase"], "a base class"),
        "SplitOpt": "a base class over others' parameters",
    },
    "pytorch_optimizer": {
        "BaseOptimizer": "abstract",
        "MuonBase": "abstract",
        "AdaLOMO": "updates in the backward pass",
        "LOMO": "updates in the backward pass",
        "DeMo": "needs a process group",
        "DistributedMuon": "needs a process group",
        "BSAM": "its step fails",
        "GSAM": "its closure returns a model's outputs too, see its `set_closure`",
        "SafeFP16Optimizer": "needs parameters of 16 bits",
    },
    "bitsandbytes": {
        **dict.fromkeys(["Optimizer8bit", "Optimizer1State", "Optimizer2State"], "abstract"),
        "AdEMAMix32bit": "fails on the CPU",
        "PagedAdEMAMix32bit": "fails on the CPU",
    },
    "timm": {},
    "torchao": {"_AdamBase": "abstract", "CPUOffloadOptimizer": "needs an accelerator"},
    "galore_torch": {"GaLoreAdamW8bit": "needs an accelerator"},
    "torch_optimizer": {},
}


class Model(nn.Module):
    """The parameters as those of a model, for classes that take one."""

    def __init__(self, params: list[Tensor]) -> None:
        super().__init__()
        for i, parameter in enumerate(params):
            self.register_parameter(f"p{i}", parameter)  # type: ignore[arg-type]


def by_rank(kind: Any, params: list[Tensor]) -> Any:
    matrices = [p for p in params if p.ndim == 2]
    rest = [p for p in params if p.ndim != 2]
    groups = [{"params": matrices, "use_muon": True}, {"params": rest, "use_muon": False}]
    return kind(groups)


def around(kind: Any, params: list[Tensor]) -> Any:
    return kind(SGD(params, lr=1e-3))


def momentum(kind: Any, params: list[Tensor]) -> Any:
    return kind(params, lr=1e-3, momentum=0.9)


def sam(kind: Any, params: list[Tensor]) -> Any:
    return kind(params, base_optimizer=SGD, lr=1e-3)


MAKES: dict[str, Callable[[Any, list[Tensor]], Any]] = {
    **dict.fromkeys(
        [
            "bitsandbytes.optim.LARS",
            "bitsandbytes.optim.LARS32bit",
            "bitsandbytes.optim.LARS8bit",
            "bitsandbytes.optim.PytorchLARS",
            "bitsandbytes.optim.SGD",
            "bitsandbytes.optim.SGD32bit",
            "bitsandbytes.optim.SGD8bit",
        ],
        momentum,
    ),
    **dict.fromkeys(
        [
            "pytorch_optimizer.Lookahead",
            "pytorch_optimizer.OrthoGrad",
            "pytorch_optimizer.PCGrad",
            "pytorch_optimizer.ScheduleFreeWrapper",
            "pytorch_optimizer.TRAC",
            "timm.optim.Lookahead",
            "torch_optimizer.Lookahead",
        ],
        around,
    ),
    **dict.fromkeys(
        [f"pytorch_optimizer.{name}" for name in ("FriendlySAM", "LookSAM", "SAM")], sam
    ),
    **dict.fromkeys(
        [
            f"pytorch_optimizer.{name}"
            for name in ("AdaGO", "AdaMuon", "Muon", "MuonClip", "NorMuon")
        ],
        by_rank,
    ),
    "pytorch_optimizer.AdamMini": lambda kind, params: kind(Model(params), lr=1e-3),
    "pytorch_optimizer.BSAM": lambda kind, params: kind(params, num_data=10, lr=1e-3),
    "pytorch_optimizer.Ranger21": lambda kind, params: kind(params, num_iterations=20, lr=1e-3),
    "pytorch_optimizer.WSAM": lambda kind, params: kind(
        Model(params), params, base_optimizer=SGD, lr=1e-3
    ),
    "galore_torch.GaLoreAdafactor": lambda kind, params: kind(params, lr=1e-3, relative_step=False),
    "heavyball.SAMWrapper": lambda kind, params: kind(params),
}

# Only for matrices, the second for pairs of them.
SHAPES = {
    "pytorch_optimizer.SpectralSphere": [(8, 6), (6, 4)],
    "pytorch_optimizer.LoRARite": [(2, 6), (8, 2)],
}

# Their `step` asks for a closure that computes the gradients.
BY_CLOSURE = {
    "heavyball.SAMWrapper",
    "pytorch_optimizer.AliG",
    "pytorch_optimizer.BSAM",
    "pytorch_optimizer.FriendlySAM",
    "pytorch_optimizer.LookSAM",
    "pytorch_optimizer.SAM",
    "pytorch_optimizer.WSAM",
    "schedulefree.AdamWScheduleFreeClosure",
    "schedulefree.RAdamScheduleFreeClosure",
    "schedulefree.SGDScheduleFreeClosure",
}


# They wrap an optimizer and have no hooks of their own: the clipper is attached to the one inside,
# as the error of `as_optimizer` says.
INSIDE = {"timm.optim.Lookahead": "_base_optimizer", "torch_optimizer.Lookahead": "optimizer"}

# They differentiate through the gradients.
CURVATURE = {
    "pytorch_optimizer.AdaHessian",
    "pytorch_optimizer.SophiaH",
    "timm.optim.Adahessian",
    "torch_optimizer.Adahessian",
}


def classes(library: str) -> dict[str, type[Optimizer]]:
    """Every optimizer class that a library defines, once, by its name there."""
    found: dict[Any, str] = {}
    for module in _modules(library):
        for name, kind in vars(module).items():
            if not (inspect.isclass(kind) and issubclass(kind, Optimizer)):
                continue
            if kind.__module__.split(".")[0] == library.split(".")[0]:
                found.setdefault(kind, f"{library}.{name}")
    return {name: kind for kind, name in found.items()}


def _modules(library: str) -> Iterator[Any]:
    package = importlib.import_module(library)
    yield package
    for info in pkgutil.walk_packages(package.__path__, f"{library}."):
        with suppress(ImportError):  # an optional part that needs another package
            yield importlib.import_module(info.name)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    ZOO = {name: kind for library in LIBRARIES for name, kind in classes(library).items()}


def cannot(name: str) -> bool:
    library, *_, own = name.split(".")
    return own in CANNOT[library]


def parameters(name: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = SHAPES.get(name, [(8, 6), (6,), (6, 4)])
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def make(name: str, params: list[Tensor]) -> Any:
    """An optimizer of the class, ready to train."""
    kind: Any = ZOO[name]
    torch.manual_seed(0)
    if name in MAKES:
        optimizer = MAKES[name](kind, params)
    else:
        try:
            optimizer = kind(params, lr=1e-3)
        except TypeError:
            optimizer = kind(params)
    to_train_mode(optimizer)
    return optimizer


def to_train_mode(optimizer: Any) -> None:
    """As schedule-free optimizers need it; a wrapper may have the method, and nothing to call."""
    if hasattr(optimizer, "train"):
        with suppress(AttributeError):
            optimizer.train()
