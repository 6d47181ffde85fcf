"""The parameter shapes of the models that the benchmarks take gradients of."""

from __future__ import annotations

from collections.abc import Callable

__all__ = ["MODELS", "Shapes", "resnet50"]

Shapes = list[tuple[int, ...]]


def mlp() -> Shapes:
    """A multilayer perceptron for 28 x 28 images: 6 parameters, 235 thousand elements."""
    return [(256, 784), (256,), (128, 256), (128,), (10, 128), (10,)]


def mobilenet_v3_large() -> Shapes:
    """torchvision's MobileNetV3-large: 174 parameters, 5.5 million elements."""
    shapes: Shapes = [(16, 3, 3, 3), (16,), (16,)]
    # Input channels, kernel, expanded channels, output channels, squeezed channels or 0.
    blocks = [
        (16, 3, 16, 16, 0),
        (16, 3, 64, 24, 0),
        (24, 3, 72, 24, 0),
        (24, 5, 72, 40, 24),
        (40, 5, 120, 40, 32),
        (40, 5, 120, 40, 32),
        (40, 3, 240, 80, 0),
        (80, 3, 200, 80, 0),
        (80, 3, 184, 80, 0),
        (80, 3, 184, 80, 0),
        (80, 3, 480, 112, 120),
        (112, 3, 672, 112, 168),
        (112, 5, 672, 160, 168),
        (160, 5, 960, 160, 240),
        (160, 5, 960, 160, 240),
    ]
    for into, kernel, expanded, out, squeezed in blocks:
        if expanded != into:
            shapes += [(expanded, into, 1, 1), (expanded,), (expanded,)]
        shapes += [(expanded, 1, kernel, kernel), (expanded,), (expanded,)]
        if squeezed:
            shapes += [(squeezed, expanded, 1, 1), (squeezed,)]
            shapes += [(expanded, squeezed, 1, 1), (expanded,)]
        shapes += [(out, expanded, 1, 1), (out,), (out,)]
    shapes += [(960, 160, 1, 1), (960,), (960,)]
    return [*shapes, (1280, 960), (1280,), (1000, 1280), (1000,)]


def resnet50() -> Shapes:
    """torchvision's ResNet-50: 161 parameters, 25.6 million elements."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            layers = [(width, channels, 1), (width, width, 3), (4 * width, width, 1)]
            if block == 0:
                layers.append((4 * width, channels, 1))
            for out, into, kernel in layers:
                shapes += [(out, into, kernel, kernel), (out,), (out,)]
            channels = 4 * width
    return [*shapes, (1000, channels), (1000,)]


def lstm_language_model() -> Shapes:
    """Two LSTM layers of 650, 10,000 words (Zaremba et al., 2014): 11 parameters, 20 million."""
    words, size = 10_000, 650
    layer: Shapes = [(4 * size, size), (4 * size, size), (4 * size,), (4 * size,)]
    return [(words, size), *layer, *layer, (words, size), (words,)]


def vit_b_16() -> Shapes:
    """torchvision's ViT-B/16: 152 parameters, 86.6 million elements."""
    size = 768
    shapes: Shapes = [(1, 1, size), (size, 3, 16, 16), (size,), (1, 197, size)]
    for _ in range(12):
        shapes += [(size,), (size,), (3 * size, size), (3 * size,), (size, size), (size,)]
        shapes += [(size,), (size,), (4 * size, size), (4 * size,), (size, 4 * size), (size,)]
    return [*shapes, (size,), (size,), (1000, size), (1000,)]


def gpt2_small() -> Shapes:
    """GPT-2 small with tied embeddings: 148 parameters, 124.4 million elements."""
    return gpt(words=50257, positions=1024, size=768, blocks=12)


def small_transformer() -> Shapes:
    """A GPT over characters: 52 parameters, 0.8 million elements."""
    return gpt(words=65, positions=256, size=128, blocks=4)


def gpt(words: int, positions: int, size: int, blocks: int) -> Shapes:
    """A GPT with tied embeddings, as GPT-2 names its weights: [inputs, outputs]."""
    shapes: Shapes = [(words, size), (positions, size)]
    for _ in range(blocks):
        shapes += [(size,), (size,), (size, 3 * size), (3 * size,), (size, size), (size,)]
        shapes += [(size,), (size,), (size, 4 * size), (4 * size,), (4 * size, size), (size,)]
    return [*shapes, (size,), (size,)]


def many_small() -> Shapes:
    """3,000 vectors of 256 elements."""
    return [(256,)] * 3000


MODELS: dict[str, Callable[[], Shapes]] = {
    "MLP": mlp,
    "small transformer": small_transformer,
    "MobileNetV3-large": mobilenet_v3_large,
    "ResNet-50": resnet50,
    "LSTM language model": lstm_language_model,
    "ViT-B/16": vit_b_16,
    "GPT-2 small": gpt2_small,
    "3000 x 256": many_small,
}
"""The shapes of each model by its name, smallest models first, 3,000 small tensors last."""
