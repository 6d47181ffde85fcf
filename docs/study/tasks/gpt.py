"""A GPT of 3.2 million parameters predicts the next character of Python's standard library.

Four blocks of width 256, normalized before each part as GPT-2 is. Texts and loss are those of
`characters`.
"""

from __future__ import annotations

import torch
from design import Condition
from torch import Tensor, nn
from training import Outcome, train

from tasks.characters import CHARACTERS, load_text, loss_of

CONTEXT, BATCH, STEPS = 64, 8, 200
WIDTH, HEADS, LAYERS = 256, 8, 4
EVALUATED = 256  # stretches of text


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters = nn.Embedding(CHARACTERS, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(
            layer, LAYERS, nn.LayerNorm(WIDTH), enable_nested_tensor=False
        )
        self.head = nn.Linear(WIDTH, CHARACTERS, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, text: Tensor) -> Tensor:
        hidden = self.characters(text) + self.positions
        return self.head(self.blocks(hidden, mask=self.mask, is_causal=True))


def evaluate(model: nn.Module, part: str) -> float:
    stretches = load_text(part).unfold(0, CONTEXT + 1, CONTEXT)[:EVALUATED].long()
    return loss_of(model, stretches).item() / torch.log(torch.tensor(2.0)).item()


def run(
    condition: Condition, arm: str, constant: float | None, seed: int, *, quick: bool = False
) -> Outcome:
    torch.manual_seed(seed)
    model = GPT()
    count = 3 if quick else STEPS
    stretches = load_text("train").unfold(0, CONTEXT + 1, 1)
    order = torch.Generator().manual_seed(seed)
    steps = (
        stretches[torch.randint(len(stretches), (BATCH,), generator=order)].long()
        for _ in range(count)
    )
    return train(model, condition, arm, constant, steps, loss_of, evaluate, count)
