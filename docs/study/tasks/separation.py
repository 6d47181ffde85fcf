"""Two voices from one recording: the task of AutoClip's paper, in the small.

A bidirectional LSTM reads a mixture's spectrogram. With three of the paper's losses, of very
different gradient scale:

* deep clustering (Hershey et al., 2016): an embedding for each bin of the spectrogram, bins of one
  voice close together; k-means makes masks of them;
* mask inference: a mask for each voice, L1 distance of the masked magnitudes to the voices';
* SNR: the same masks, signal-to-noise ratio of the separated waveforms in dB.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import numpy as np
import speech
import torch
from design import Condition
from torch import Tensor, nn
from training import Outcome, train

WINDOW, HOP, BINS = 256, 128, 129
LENGTH = speech.RATE  # samples, one second
BATCH, STEPS, HIDDEN, LAYERS, EMBEDDING = 8, 500, 64, 2, 12
UTTERANCES = 30  # by each voice
EVALUATED = 120  # mixtures in validation and test
# Bins so far below a mixture's loudest are no voice's.
SILENCE = 10 ** (-40 / 20)


def stft(waves: Tensor) -> Tensor:
    """Spectrogram of [..., samples] as complex [..., frames, bins]."""
    window = torch.hann_window(WINDOW)
    flat = torch.stft(waves.flatten(0, -2), WINDOW, HOP, window=window, return_complex=True)
    return flat.transpose(1, 2).unflatten(0, waves.shape[:-1])


def istft(spectrograms: Tensor) -> Tensor:
    window = torch.hann_window(WINDOW)
    flat = spectrograms.flatten(0, -3).transpose(1, 2)
    waves = torch.istft(flat, WINDOW, HOP, window=window, length=LENGTH)
    return waves.unflatten(0, spectrograms.shape[:-2])


class Separator(nn.Module):
    """A mixture's magnitudes to masks [batch, 2, frames, bins] or unit embeddings of its bins."""

    def __init__(self, clusters: bool) -> None:
        super().__init__()
        self.clusters = clusters
        self.lstm = nn.LSTM(BINS, HIDDEN, LAYERS, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * HIDDEN, BINS * (EMBEDDING if clusters else 2))

    def forward(self, magnitudes: Tensor) -> Tensor:
        features = torch.log(magnitudes + 1e-3)
        features = (features - features.mean((1, 2), keepdim=True)) / features.std()
        hidden, _ = self.lstm(features)
        heads = self.head(hidden).unflatten(-1, (BINS, -1))
        if self.clusters:
            return nn.functional.normalize(heads, dim=-1)
        return torch.sigmoid(heads).movedim(-1, 1)


def best_order(errors: Tensor) -> Tensor:
    """Mean over a batch of the better assignment; errors [batch, estimates, sources]."""
    straight = errors[:, 0, 0] + errors[:, 1, 1]
    crossed = errors[:, 0, 1] + errors[:, 1, 0]
    return torch.minimum(straight, crossed).mean() / 2


def audible(magnitudes: Tensor) -> Tensor:
    return magnitudes > SILENCE * magnitudes.amax((1, 2), keepdim=True)


def clustering_loss(embeddings: Tensor, mixtures: Tensor, sources: Tensor) -> Tensor:
    """Squared distance of the affinities of all pairs of bins, per bin."""
    weights = audible(mixtures).flatten(1).float()[..., None]
    v = embeddings.flatten(1, 2) * weights
    dominant = sources.argmax(1).flatten(1)
    y = nn.functional.one_hot(dominant, 2).float() * weights

    def square(a: Tensor, b: Tensor) -> Tensor:
        return (a.transpose(1, 2) @ b).square().sum((1, 2))

    distance = square(v, v) - 2 * square(v, y) + square(y, y)
    return (distance / weights.sum((1, 2))).mean()


def masks_loss(masks: Tensor, mixtures: Tensor, sources: Tensor) -> Tensor:
    estimates = masks * mixtures[:, None]
    errors = (estimates[:, :, None] - sources[:, None]).abs().mean((-2, -1))
    return best_order(errors)


def snr_loss(estimates: Tensor, sources: Tensor) -> Tensor:
    noise = (estimates[:, :, None] - sources[:, None]).square().sum(-1)
    signal = sources.square().sum(-1)[:, None]
    return best_order(10 * torch.log10((noise + 1e-6) / (signal + 1e-6)))


def loss_of(model: Separator, waves: Tensor, loss: str) -> Tensor:
    """The loss for a batch of source pairs, [batch, 2, samples]."""
    spectrograms = stft(torch.cat([waves.sum(1, keepdim=True), waves], 1))
    mixtures, sources = spectrograms[:, 0].abs(), spectrograms[:, 1:].abs()
    output = model(mixtures)
    if loss == "clustering":
        return clustering_loss(output, mixtures, sources)
    if loss == "masks":
        return masks_loss(output, mixtures, sources)
    return snr_loss(istft(output * spectrograms[:, :1]), waves)


def cluster(embeddings: Tensor, mixtures: Tensor, iterations: int = 15) -> Tensor:
    """Masks [batch, 2, frames, bins] by 2-means over the audible bins."""
    points = embeddings.flatten(1, 2)
    weights = audible(mixtures).flatten(1)[..., None].float()
    loudest = mixtures.flatten(1).argmax(1)
    first = points[torch.arange(len(points)), loudest]
    # The second centre is the audible bin that is least like the first.
    likeness = (points @ first[..., None]) + 2 * (1 - weights)
    second = points[torch.arange(len(points)), likeness[..., 0].argmin(1)]
    centres = torch.stack([first, second], 1)
    for _ in range(iterations):
        members = nn.functional.one_hot((points @ centres.transpose(1, 2)).argmax(-1), 2).float()
        centres = nn.functional.normalize((members * weights).transpose(1, 2) @ points, dim=-1)
    return members.movedim(-1, 1).unflatten(-1, mixtures.shape[1:])


def si_sdr(estimates: Tensor, sources: Tensor) -> Tensor:
    """Scale-invariant signal-to-distortion ratio in dB (Le Roux et al., 2019) of [..., samples]."""
    scale = (estimates * sources).sum(-1, keepdim=True) / sources.square().sum(-1, keepdim=True)
    target = scale * sources
    noise = (estimates - target).square().sum(-1)
    return 10 * torch.log10((target.square().sum(-1) + 1e-8) / (noise + 1e-8))


@cache
def load_voices(part: str, each: int) -> list[list[np.ndarray]]:
    return speech.utterances(part, each, np.random.default_rng([0, len(part)]))


@cache
def load_mixtures(part: str, each: int, count: int) -> Tensor:
    random = np.random.default_rng([1, len(part)])
    return torch.from_numpy(speech.mixtures(load_voices(part, each), count, LENGTH, random))


def batches(seed: int, steps: int, each: int) -> Iterator[Tensor]:
    voices = load_voices("train", each)
    random = np.random.default_rng(seed)
    for _ in range(steps):
        yield torch.from_numpy(speech.mixtures(voices, BATCH, LENGTH, random))


def improvement(model: Separator, waves: Tensor) -> float:
    """SI-SDR of the separated voices less that of the mixture, mean over voices, in dB."""
    mixed = waves.sum(1, keepdim=True)
    spectrograms = stft(mixed)
    magnitudes = spectrograms[:, 0].abs()
    output = model(magnitudes)
    masks = cluster(output, magnitudes) if model.clusters else output
    estimates = istft(masks * spectrograms)
    after = -best_order(-si_sdr(estimates[:, :, None], waves[:, None]))
    return (after - si_sdr(mixed, waves).mean()).item()


def run(
    condition: Condition, arm: str, constant: float | None, seed: int, *, quick: bool = False
) -> Outcome:
    each, steps, count = (2, 3, 4) if quick else (UTTERANCES, STEPS, EVALUATED)
    torch.manual_seed(seed)
    return train(
        Separator(condition.loss == "clustering"),
        condition,
        arm,
        constant,
        batches(seed, steps, each),
        lambda model, waves: loss_of(model, waves, condition.loss),
        lambda model, part: improvement(model, load_mixtures(part, each, count)),
    )
