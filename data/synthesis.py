"""Synthesised music with known attributes: short melodies on five instruments, with or without drums.

Every instrument is additive (after J.-C. Risset and M. Mathews, "Analysis of musical-instrument tones", 1969): a sum of
partials, each with its own onset and decay, and some noise. Every tempo is a whole number of 40 ms frames a beat, so
that beats fall alike on the frames of a codec at 25, 50 or 75 Hz.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

INSTRUMENTS = ("plucked string", "flute", "bell", "bass", "brass")
BEAT_SECONDS = {"slow": 1.0, "medium": 0.64, "fast": 0.4}
"""60, 93.75 and 150 beats a minute. None is twice another: half-beats must not sound like another tempo."""
ROOT_HZ = {"low": (90.0, 150.0), "high": (420.0, 700.0)}
"""Where the tonic lies; a melody stays within the octave above it, so the two registers never meet."""
SCALES = {"major": (0, 2, 4, 5, 7, 9, 11, 12), "minor": (0, 2, 3, 5, 7, 8, 10, 12)}
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "instrument": INSTRUMENTS,
    "register": tuple(ROOT_HZ),
    "tempo": tuple(BEAT_SECONDS),
    "drums": ("drums", "no drums"),
    "mode": tuple(SCALES),
}
"""Every attribute of a clip and its values."""
HIGHEST_HZ = 7_200.0
"""No partial lies above this, so an instrument sounds the same at every sample rate from 16 kHz."""


@dataclass(frozen=True)
class Voice:
    """How an instrument sounds. Times in seconds; `order` is a partial's number counted from 0."""

    ratios: tuple[float, ...]
    """Frequencies of the partials as multiples of the note's."""
    slope: float
    """Partials fall off as number ** -slope."""
    attack: float
    """Time constant of the first partial's rise."""
    attack_step: float = 0.0
    """Each further partial rises this much slower: brass brightens as it swells."""
    decay: float = 0.0
    """Decay of the first partial, 1/s in amplitude."""
    decay_step: float = 0.0
    """Each further partial decays this much faster: a filter that closes, or a damped string."""
    legato: float = 1.0
    """Sounding share of the time to the next note; above 1 a note rings on under its followers."""
    release: float = 0.03
    vibrato: float = 0.0
    """Depth as a share of the frequency, at about 5.5 Hz, after the first tenths of a second."""
    breath: float = 0.0
    """Level of steady noise beside the first partial."""
    pick: float = 0.0
    """Level of the noise of the first few milliseconds."""
    comb: float = 0.0
    """Where along the string it is plucked: takes out partials near its multiples; 0 for none."""


HARMONICS = tuple(float(number) for number in range(1, 25))
BELL = (1.0, 2.0, 2.76, 4.07, 5.40, 6.73, 8.93, 11.34)
VOICES = {
    "plucked string": Voice(HARMONICS, slope=0.7, attack=0.001, decay=5.0, decay_step=0.7, pick=0.6, comb=0.21),
    "flute": Voice(HARMONICS[:3], slope=2.6, attack=0.03, legato=0.94, release=0.06, vibrato=0.008, breath=0.1),
    "bell": Voice(BELL, slope=0.45, attack=0.0005, decay=1.5, decay_step=0.45, legato=2.2, release=0.1),
    "bass": Voice(HARMONICS[:14], slope=1.0, attack=0.003, decay=0.8, decay_step=2.6, legato=0.8),
    "brass": Voice(HARMONICS, slope=0.35, attack=0.025, attack_step=0.006, legato=0.9, release=0.05),
}


def combinations() -> list[dict[str, str]]:
    """Every combination of instrument, register, tempo and drums."""
    names = ("instrument", "register", "tempo", "drums")
    return [dict(zip(names, values, strict=True)) for values in product(*(ATTRIBUTES[name] for name in names))]


def render(
    attributes: Mapping[str, str], seed: int, index: int, seconds: float = 5.0, sample_rate: int = 16_000
) -> np.ndarray:
    """A clip with the given `attributes` (one value for each key of ATTRIBUTES), float32 `[seconds × sample_rate]`.

    The clip is a pure function of its arguments: `(seed, index)` choose tonic, melody, level, tone and detuning. It
    starts on a beat; its peak lies between -8 and -2 dB full scale.
    """
    random = np.random.default_rng((seed, index))
    samples = round(seconds * sample_rate)
    beat = BEAT_SECONDS[attributes["tempo"]]
    starts, pitches = _melody(attributes, beat, seconds, random)
    voice = VOICES[attributes["instrument"]]
    brightness = random.uniform(-0.1, 0.1)
    wave = np.zeros(samples, dtype=np.float32)
    for start, end, pitch in zip(starts, [*starts[1:], seconds], pitches, strict=True):
        _add(
            wave, start, _note(voice, pitch, (end - start) * voice.legato, brightness, sample_rate, random), sample_rate
        )
    wave *= 0.5 / np.abs(wave).max()
    if attributes["drums"] == "drums":
        _add_drums(wave, beat, seconds, sample_rate, random)
    return wave * np.float32(10 ** (random.uniform(-8, -2) / 20) / np.abs(wave).max())


def _melody(
    attributes: Mapping[str, str], beat: float, seconds: float, random: np.random.Generator
) -> tuple[list[float], list[float]]:
    """Starts (seconds) and frequencies (Hz) of the notes: one a beat, here and there split in two half-beats.

    No two beats in a row are split and the first of a bar of four never is, so the beat stays plain without drums. The
    first three notes outline the triad, which tells major from minor; after it the melody wanders by small steps.
    """
    scale = SCALES[attributes["mode"]]
    tonic = np.exp(random.uniform(*np.log(ROOT_HZ[attributes["register"]])))
    starts: list[float] = []
    split = False
    for number in range(int(np.ceil(seconds / beat - 1e-6))):
        split = not split and number % 4 != 0 and random.random() < 0.2
        starts += [number * beat, (number + 0.5) * beat] if split else [number * beat]
    degrees = [0, 2, 4]
    while len(degrees) < len(starts):
        degrees.append(int(np.clip(degrees[-1] + random.choice((-2, -1, -1, 1, 1, 2)), 0, 7)))
    starts = [start for start in starts if start < seconds]
    return starts, [tonic * 2 ** (scale[degree] / 12) for degree in degrees[: len(starts)]]


def _note(
    voice: Voice, frequency: float, seconds: float, brightness: float, sample_rate: int, random: np.random.Generator
) -> np.ndarray:
    """One note of `voice`, float32, about 1 in level; `brightness` lifts the upper partials."""
    frequency *= 2 ** (random.normal(0, 4) / 1200)
    ratios = np.array([ratio for ratio in voice.ratios if ratio * frequency < HIGHEST_HZ])
    order = np.arange(len(ratios))
    level = (order + 1.0) ** (brightness - voice.slope)
    if voice.comb:
        level *= np.abs(np.sin(np.pi * ratios * voice.comb))
    level /= np.sqrt((level**2).sum())
    time = np.arange(round((seconds + voice.release) * sample_rate)) / sample_rate
    exponents = 2j * np.pi * ratios * frequency - voice.decay - voice.decay_step * order
    rise = 1 / (voice.attack + voice.attack_step * order)
    level = level * np.exp(2j * np.pi * random.random(len(ratios)))
    # A partial's envelope, exp(-decay t) (1 - exp(-rise t)), is the difference of two exponentials.
    note = _exponentials(np.append(exponents, exponents - rise), np.append(level, -level), len(time), sample_rate)
    if voice.vibrato:
        rate, depth = random.uniform(5, 6), voice.vibrato * np.minimum(time / 0.3, 1.0)
        note = np.interp(time + depth / (2 * np.pi * rate) * np.sin(2 * np.pi * rate * time), time, note)
    note += _breath(voice, time, sample_rate, random)
    note *= np.clip((seconds + voice.release - time) / voice.release, 0, 1) * 10 ** (random.uniform(-2, 0) / 20)
    return note.astype(np.float32)


def _exponentials(exponents: np.ndarray, levels: np.ndarray, samples: int, sample_rate: int) -> np.ndarray:
    """Imaginary part of the sum of `levels × exp(exponents × time)`, float64 `[samples]`.

    Within a block an exponential is its value at the block's start times one row that all blocks share, so the whole
    sum is one matrix product.
    """
    block = 64
    starts = np.arange(-(-samples // block)) * block / sample_rate
    rows = np.exp(np.outer(exponents, np.arange(block) / sample_rate))
    return ((levels * np.exp(np.outer(starts, exponents))) @ rows).imag.ravel()[:samples]


def _breath(voice: Voice, time: np.ndarray, sample_rate: int, random: np.random.Generator) -> np.ndarray | float:
    """The noisy part of a note: steady breath that comes in with the tone, or the short noise of a plectrum."""
    if voice.breath:
        return voice.breath * _noise(len(time), sample_rate, random) * (1 - np.exp(-time / voice.attack))
    if voice.pick:
        return voice.pick * _noise(len(time), sample_rate, random) * np.exp(-time / 0.008)
    return 0.0


def _noise(samples: int, sample_rate: int, random: np.random.Generator) -> np.ndarray:
    """White noise of unit variance below HIGHEST_HZ at any sample rate: held values, so that it sounds alike."""
    hold = max(1, round(sample_rate / (2 * HIGHEST_HZ)))
    return np.repeat(random.standard_normal(-(-samples // hold), dtype=np.float32), hold)[:samples]


def _add_drums(wave: np.ndarray, beat: float, seconds: float, sample_rate: int, random: np.random.Generator) -> None:
    """Kick on the odd beats, snare on the even ones, a hi-hat on every beat and a soft one between."""
    time = np.arange(round(0.3 * sample_rate)) / sample_rate
    noise = _noise(len(time), sample_rate, random)
    pitch = random.uniform(0.9, 1.1)
    sweep = 50 * pitch * time + 100 * pitch * 0.03 * (1 - np.exp(-time / 0.03))  # from 150 Hz down to 50 Hz
    kick = 0.9 * np.sin(2 * np.pi * sweep) * np.exp(-time / 0.09)
    snare = 0.35 * noise * np.exp(-time / 0.06) + 0.4 * np.sin(2 * np.pi * 190 * pitch * time) * np.exp(-time / 0.05)
    hat = 0.16 * np.diff(noise, prepend=0) * np.exp(-time / 0.025)
    hits = {"kick": kick, "snare": snare, "hat": hat, "soft hat": 0.4 * hat}
    gain = 10 ** (random.uniform(-2, 2) / 20)
    for number in range(int(np.ceil(seconds / beat - 1e-6))):
        for name, shift in (("snare" if number % 2 else "kick", 0.0), ("hat", 0.0), ("soft hat", 0.5)):
            _add(wave, (number + shift) * beat, (gain * hits[name]).astype(np.float32), sample_rate)


def _add(wave: np.ndarray, start: float, sound: np.ndarray, sample_rate: int) -> None:
    """Mixes `sound` into `wave` from `start` seconds on; what reaches beyond the end is cut."""
    first = round(start * sample_rate)
    stop = min(len(wave), first + len(sound))
    wave[first:stop] += sound[: max(0, stop - first)]
