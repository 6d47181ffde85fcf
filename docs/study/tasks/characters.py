"""A transformer that predicts the next character of Python's standard library."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from design import Condition
from torch import Tensor, nn
from training import Outcome, train

# Modules that every supported Python has.
MODULES = {
    "train": (
        "argparse ast calendar codecs configparser copy csv datetime decimal difflib dis doctest "
        "enum fractions functools gettext gzip heapq inspect ipaddress locale mailbox "
        "optparse os pdb pickle pickletools platform plistlib pprint random shutil "
        "smtplib statistics subprocess tarfile tempfile textwrap threading tokenize "
        "traceback turtle typing uuid weakref zipfile"
    ),
    "validation": "ftplib cmd contextlib",
    "test": "trace fileinput socketserver shelve",
}
CHARACTERS, CONTEXT, BATCH, STEPS = 128, 64, 16, 400
WIDTH, HEADS, LAYERS = 64, 4, 2


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, dropout=0.0, activation="gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CHARACTERS)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.characters(text) + self.positions
        return self.head(self.layers(hidden, mask=self.mask, is_causal=True))


@cache
def load_text(part: str) -> Tensor:
    """The part's sources as uint8[characters], ASCII only."""
    library = Path(os.__file__).parent
    files = [library / f"{module}.py" for module in MODULES[part].split()]
    text = "\n".join(file.read_text("utf-8") for file in files)
    return torch.tensor(list(text.encode("ascii", "ignore")), dtype=torch.uint8)


def batches(seed: int, steps: int) -> Iterator[Tensor]:
    """Random stretches, int64[BATCH, CONTEXT + 1]."""
    text = load_text("train")
    stretches = text.unfold(0, CONTEXT + 1, 1)
    order = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield stretches[torch.randint(len(stretches), (BATCH,), generator=order)].long()


def loss_of(model: nn.Module, text: Tensor) -> Tensor:
    """Cross-entropy in nats."""
    return nn.functional.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten())


def evaluate(model: nn.Module, part: str) -> float:
    stretches = load_text(part).unfold(0, CONTEXT + 1, CONTEXT)[:512].long()
    return loss_of(model, stretches).item() / torch.log(torch.tensor(2.0)).item()


def run(
    condition: Condition, arm: str, constant: float | None, seed: int, *, quick: bool = False
) -> Outcome:
    torch.manual_seed(seed)
    model = Transformer()
    count = 10 if quick else STEPS
    steps = batches(seed, count)
    return train(model, condition, arm, constant, steps, loss_of, evaluate, count)
