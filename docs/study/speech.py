"""Speech to separate: random sentences, spoken by eSpeak NG's voices.

The PyPI package `espeakng-loader` brings the library and its data; nothing else is installed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import espeakng_loader
import numpy as np
from scipy.signal import resample_poly

RATE = 8000

ACCENTS = ("en", "en-us", "en-gb-x-rp", "en-gb-scotland", "en-029")
# Low and high voices; none speaks in two of the three parts.
VOICES = {
    "train": ("m1 m2 m3 m5 m8 david john victor", "f1 f2 f3 f4 belinda steph Annie Andrea"),
    "validation": ("m4 m6", "Alicia aunty"),
    "test": ("m7 sandro ed", "f5 linda anika"),
}
# No noun and no verb occurs in two of the three parts, so no sentence does.
NOUNS = {
    "train": "river window teacher garden engine letter winter morning village doctor station song",
    "validation": "forest market painter bridge summer kitchen",
    "test": "mountain harbor singer library evening candle",
}
VERBS = {
    "train": "finds follows remembers paints carries opens answers leaves",
    "validation": "repairs watches forgets",
    "test": "crosses welcomes describes",
}
ADJECTIVES = "old quiet yellow broken famous little strange heavy distant gentle"
OPENINGS = ("today,", "at noon", "they say that", "in the end", "once a year")

SYNCHRONOUS, CHARACTERS, RATE_PARAMETER, PITCH_PARAMETER = 2, 1, 1, 3
Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)


class Synthesizer:
    """eSpeak NG; one per process, as the library keeps global state."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self._rate = self._library.espeak_Initialize(SYNCHRONOUS, 0, data, 0)
        self._library.espeak_ng_SetRandSeed(1)
        self._chunks: list[np.ndarray] = []
        self._callback = Callback(self._receive)  # kept alive as long as the library may call it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, samples: Sequence[int], count: int, _events: int) -> int:
        if samples and count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, speed: int, pitch: int) -> np.ndarray:
        """Speech as float32[samples] at 8 kHz, with unit power; `speed` in words a minute."""
        self._chunks.clear()
        if self._library.espeak_SetVoiceByName(voice.encode()) != 0:
            raise ValueError(f"eSpeak NG has no voice {voice!r}.")
        self._library.espeak_SetParameter(RATE_PARAMETER, speed, 0)
        self._library.espeak_SetParameter(PITCH_PARAMETER, pitch, 0)
        encoded = text.encode() + b"\0"
        self._library.espeak_Synth(encoded, len(encoded), 0, 0, 0, CHARACTERS, None, None)
        speech = np.concatenate(self._chunks).astype(np.float32)
        speech = resample_poly(speech, RATE, self._rate)
        return (speech / speech.std()).astype(np.float32)


def sentence(part: str, random: np.random.Generator) -> str:
    """A grammatical, meaningless sentence with the part's nouns and verbs."""
    nouns = random.choice(NOUNS[part].split(), 2)
    adjectives = random.choice(ADJECTIVES.split(), 2)
    verb = random.choice(VERBS[part].split())
    opening = random.choice(OPENINGS)
    return f"{opening} the {adjectives[0]} {nouns[0]} {verb} the {adjectives[1]} {nouns[1]}."


def utterances(part: str, each: int, random: np.random.Generator) -> list[list[np.ndarray]]:
    """So many utterances of each low and each high voice, at random accents, speeds, pitches."""
    synthesizer = Synthesizer()
    return [
        [
            synthesizer.say(
                sentence(part, random),
                f"{random.choice(ACCENTS)}+{voice}",
                speed=int(random.integers(130, 210)),
                pitch=int(random.integers(30, 70)),
            )
            for voice in voices.split()
            for _ in range(each)
        ]
        for voices in VOICES[part]
    ]


def mixtures(
    voices: list[list[np.ndarray]], count: int, length: int, random: np.random.Generator
) -> np.ndarray:
    """Pairs of sources, float32[count, 2, length]; a mixture is a pair's sum.

    Random stretches of a low and a high voice, at a random signal-to-noise ratio within ±5 dB.
    """
    pairs = np.empty((count, 2, length), np.float32)
    for pair in pairs:
        level = random.uniform(-2.5, 2.5)
        for source, spoken, gain in zip(pair, voices, (level, -level)):
            utterance = spoken[random.integers(len(spoken))]
            utterance = np.tile(utterance, -(-2 * length // len(utterance)))
            start = random.integers(len(utterance) - length)
            source[:] = utterance[start : start + length] * 10 ** (gain / 20)
    return pairs
