"""Hears instrument, register, tempo and drums in a clip by plain signal processing that never sees a model.

A clip becomes a few dozen numbers that each mean something to a musician: how loud the octaves are and how quickly they
rise and fade, the pitch, the strength and decay of the harmonics, and how well the onsets repeat after each candidate
beat. What value of an attribute they speak for is decided by linear discriminants (R. A. Fisher, 1936), calibrated on
real clips; to judge audio that came through a codec, calibrate on clips through the codec as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from data.synthesis import BEAT_SECONDS, HIGHEST_HZ

JUDGED = ("instrument", "register", "tempo", "drums")
"""The attributes a judge hears."""
FEATURES = {
    "instrument": ("harmonics", "decay", "levels", "pitch"),
    "register": ("pitch",),
    "tempo": ("rhythm",),
    "drums": ("levels", "changes"),
}
"""Groups of features (see `features`) that each attribute is judged by."""
CELLS = {
    "instrument": ("instrument", "register", "drums"),
    "register": ("instrument", "register", "drums"),
    "tempo": ("tempo", "drums"),
    "drums": ("instrument", "register", "drums"),
}
"""Attributes that change the features in question. Each combination of theirs that occurs is a class of its own: a low
flute with drums is not the mean of low clips, flutes and drums. The answer sums over the others."""

WINDOW_SECONDS, HOP_SECONDS = 0.064, 0.01
SHORTEST_SECONDS = 3.0
"""Shorter clips are extended with silence, so that the longest lag of the rhythm fits."""
FLOOR = 1e-5
"""Power, relative to the loud moments, that counts as silence (-50 dB): below it a codec leaves nothing to hear."""

OCTAVE_EDGES = (30, 120, 250, 500, 1000, 2000, 4500, HIGHEST_HZ)
"""Hz; the first band holds the kick drum, the last the hi-hat."""
CHANGE_FRAMES = 8
"""Levels are compared over 80 ms: long enough for a codec of 25 frames a second to follow."""

PITCHES = 85 * 2 ** (np.arange(100) / 24)
"""Candidate fundamentals in quarter tones, Hz, up to 1.5 kHz."""
REGISTER_HZ = 355.0
"""Between the low and the high register."""
COMB_HARMONICS = 8
HARMONIC_WEIGHT = 0.84
"""Of each harmonic in the salience of a fundamental, relative to the one below it."""
WHITEN_HZ = 125.0
"""A spectral peak is what rises above the mean this far to either side, which drums and breath do not."""
RATIOS = np.array([0.5, 1, 1.5, 2, 2.5, 2.76, 3, 3.5, 4, 4.07, 4.5, 5, 5.4, 6, 7, 8, 9, 10, 12])
"""Multiples of the fundamental whose level is measured: harmonics, gaps between them, and the partials of a bell."""
DECAY_RATIOS = (1, 3, 6, 8)
"""Positions in RATIOS of the partials whose decay is measured: the first four harmonics."""
DECAY_FRAMES = 6

ONSET_BANDS = 40
RISE_FRAMES = 5
"""An onset is a rise within 50 ms, so that one smeared over a codec's frame counts in full."""
LONGEST_LAG = 2.4
LAGS = sorted({lag for beat in BEAT_SECONDS.values() for n in (0.5, 1, 1.5, 2, 3) if (lag := beat * n) <= LONGEST_LAG})
"""Seconds after which the onsets are compared with themselves: the candidate beats, their halves and multiples, which
tell apart tempos whose half-beats and beats come close."""

SHRINKAGE = 0.1
"""How far a covariance is drawn towards a multiple of the identity: less trust in directions seldom seen."""


class Ear:
    """Turns waves of one sample rate into features."""

    def __init__(self, sample_rate: int) -> None:
        self.hop = round(HOP_SECONDS * sample_rate)
        self.window = np.hanning(round(WINDOW_SECONDS * sample_rate)).astype(np.float32)
        self.shortest = round(SHORTEST_SECONDS * sample_rate)
        frequencies = np.fft.rfftfreq(len(self.window), 1 / sample_rate)
        self.frequencies = frequencies[frequencies < HIGHEST_HZ]
        self.bin_hz = sample_rate / len(self.window)
        edges = pairwise(OCTAVE_EDGES)
        self.octaves = np.stack([(self.frequencies >= low) & (self.frequencies < high) for low, high in edges], 1)
        self.onset_bands = _triangles(self.frequencies, ONSET_BANDS)
        self.comb = _comb(len(self.frequencies), self.bin_hz)

    def features(self, wave: np.ndarray) -> dict[str, np.ndarray]:
        """Groups of features of `wave` `[samples]`; none depends on its level, nor much on its length.

        "levels" and "changes" (dB, dB in 80 ms) by octave, "pitch" (octaves), "harmonics" and "decay" (dB against the
        fundamental, dB in 60 ms) and "rhythm" (correlation of the onsets with themselves).
        """
        power = self._power(wave)
        loud = max(float(np.quantile(power.sum(1), 0.95)), 1e-12)
        power /= loud
        octaves = 10 * np.log10(power @ self.octaves + FLOOR)
        # The spectrum's bins hold a small share of a frame's power each.
        spectrum = 10 * np.log10(power + FLOOR / 500)
        fundamental, salience = self._fundamental(power, spectrum)
        partials = self._partials(spectrum, fundamental)
        return {
            "levels": _quantiles(octaves, (0.2, 0.5, 0.8, 0.95)),
            "changes": _quantiles(octaves[CHANGE_FRAMES:] - octaves[:-CHANGE_FRAMES], (0.05, 0.2, 0.5, 0.8, 0.95)),
            "pitch": _pitch(fundamental, salience),
            "harmonics": _harmonics(partials, salience),
            "decay": _decay(partials, fundamental),
            "rhythm": self._rhythm(power),
        }

    def _power(self, wave: np.ndarray) -> np.ndarray:
        """Power spectra `[frames, bins]`."""
        wave = np.asarray(wave, dtype=np.float32)
        wave = np.pad(wave, (0, max(0, self.shortest - len(wave))))
        pieces = np.lib.stride_tricks.sliding_window_view(np.pad(wave, len(self.window) // 2), len(self.window))
        spectra = np.fft.rfft(pieces[:: self.hop] * self.window)[:, : len(self.frequencies)]
        return (spectra.real**2 + spectra.imag**2).astype(np.float32)

    def _fundamental(self, power: np.ndarray, spectrum: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The fundamental of each frame (Hz) and its weight, by summing the peaks at its harmonics.

        After D. J. Hermes, "Measurement of pitch by subharmonic summation" (1988).
        """
        peaks = np.maximum(spectrum - _moving_mean(spectrum, round(WHITEN_HZ / self.bin_hz)), 0)
        salience = (peaks * power.sum(1, keepdims=True) ** 0.25) @ self.comb
        weight = salience.max(1) + 1e-9
        return PITCHES[salience.argmax(1)], weight / weight.sum()

    def _partials(self, spectrum: np.ndarray, fundamental: np.ndarray) -> np.ndarray:
        """Level (dB) `[frames, ratios]` at each of RATIOS times the fundamental; silence above the highest bin."""
        place = fundamental[:, None] * RATIOS / self.bin_hz
        below = np.minimum(place.astype(int), spectrum.shape[1] - 2)
        share = np.minimum(place - below, 1)
        frames = np.arange(len(spectrum))[:, None]
        levels = spectrum[frames, below] * (1 - share) + spectrum[frames, below + 1] * share
        return np.where(place < spectrum.shape[1], levels, 10 * np.log10(FLOOR / 500))

    def _rhythm(self, power: np.ndarray) -> np.ndarray:
        """How well the strength of the onsets agrees with itself after each of LAGS: a correlation, 0 for none."""
        levels = 10 * np.log10(power @ self.onset_bands + 10 * FLOOR)
        # The root keeps a few strong hits from drowning the others.
        onsets = np.sqrt(np.maximum(levels[RISE_FRAMES:] - levels[:-RISE_FRAMES], 0).sum(1))
        onsets -= onsets.mean()
        spectrum = np.fft.rfft(onsets, 2 * len(onsets))
        repeats = np.fft.irfft(np.abs(spectrum) ** 2)[: len(onsets)] / np.arange(len(onsets), 0, -1)
        # Onsets a few frames early or late still count.
        slack = np.hanning(9)
        smooth = np.convolve(repeats, slack / slack.sum(), "same")
        return smooth[[round(lag / HOP_SECONDS) for lag in LAGS]] / max(repeats[0], 1e-9)


def _triangles(frequencies: np.ndarray, bands: int) -> np.ndarray:
    """Overlapping triangular bands `[bins, bands]` evenly spaced on the mel scale, none narrower than a bin."""
    highest = np.log1p(HIGHEST_HZ / 700)
    edges = 700 * np.expm1(np.linspace(np.log1p(30 / 700), highest, bands + 2))
    low, centre, high = edges[:-2], edges[1:-1], edges[2:]
    bin_hz = frequencies[1]
    rise = (frequencies[:, None] - low) / np.maximum(centre - low, bin_hz)
    fall = (high - frequencies[:, None]) / np.maximum(high - centre, bin_hz)
    return np.clip(np.minimum(rise, fall), 0, 1).astype(np.float32)


def _comb(bins: int, bin_hz: float) -> np.ndarray:
    """Weights `[bins, pitches]` at the harmonics of each candidate fundamental.

    Divided by the root of their sum, so that one whose upper harmonics lie beyond the spectrum is not put at a loss.
    """
    comb = np.zeros((bins, len(PITCHES)), dtype=np.float32)
    for harmonic in range(1, COMB_HARMONICS + 1):
        place = PITCHES * harmonic / bin_hz
        below = place.astype(int)
        for column in np.flatnonzero(below + 1 < bins):
            share = place[column] - below[column]
            weight = HARMONIC_WEIGHT ** (harmonic - 1)
            comb[below[column], column] += weight * (1 - share)
            comb[below[column] + 1, column] += weight * share
    return comb / np.sqrt(comb.sum(0))


def _moving_mean(x: np.ndarray, reach: int) -> np.ndarray:
    """Mean of each row of `x` over the `reach` values to either side; edges are repeated."""
    sums = np.cumsum(np.pad(x, ((0, 0), (reach + 1, reach)), mode="edge"), axis=1, dtype=np.float64)
    width = 2 * reach + 1
    return ((sums[:, width:] - sums[:, :-width]) / width).astype(np.float32)


def _quantiles(x: np.ndarray, shares: Sequence[float]) -> np.ndarray:
    """Quantiles of each column, as one row: unlike means they do not care about a few odd moments."""
    return np.quantile(x, shares, axis=0).ravel()


def _pitch(fundamental: np.ndarray, salience: np.ndarray) -> np.ndarray:
    """Lower quartile, median and upper quartile of the pitch in octaves, and the share of low frames, by salience."""
    octave = np.log2(fundamental)
    order = np.argsort(octave)
    places = np.searchsorted(np.cumsum(salience[order]), (0.25, 0.5, 0.75))
    low = salience[fundamental < REGISTER_HZ].sum()
    return np.append(octave[order][np.minimum(places, len(order) - 1)], low)


def _harmonics(partials: np.ndarray, salience: np.ndarray) -> np.ndarray:
    """Mean level of each partial by salience: of the fundamental as it is, of the others relative to it."""
    levels = salience @ partials
    relative = levels - levels[1]
    relative[1] = levels[1]
    return relative


def _decay(partials: np.ndarray, fundamental: np.ndarray) -> np.ndarray:
    """How fast the lowest harmonics change (dB in 60 ms) while the pitch holds: quantiles over the frames."""
    change = (partials[DECAY_FRAMES:] - partials[:-DECAY_FRAMES])[:, DECAY_RATIOS]
    held = np.abs(np.log2(fundamental[DECAY_FRAMES:] / fundamental[:-DECAY_FRAMES])) < 0.05
    change = np.clip(change[held], -17, 17) if held.sum() >= DECAY_FRAMES else np.zeros((1, len(DECAY_RATIOS)))
    return _quantiles(change, (0.2, 0.5, 0.8))


@dataclass(frozen=True)
class Discriminant:
    """Classes with a mean each and one common covariance; the nearest mean in whitened space is the likeliest."""

    classes: tuple[str, ...]
    """The value of the judged attribute that each mean stands for; several means may share one."""
    whiten: np.ndarray
    """`[features, features]`: takes features to where the classes are round and of unit variance."""
    means: np.ndarray
    """`[classes, features]`, whitened."""

    @classmethod
    def fit(cls, x: np.ndarray, cells: Sequence[tuple[str, ...]], place: int) -> Discriminant:
        """From features `[n, features]`, the cell of each row, and which entry of a cell is the judged attribute."""
        names = sorted(set(cells))
        index = np.array([names.index(cell) for cell in cells])
        means = np.stack([x[index == number].mean(0) for number in range(len(names))])
        scale = x.std(0) + 1e-6
        within = (x - means[index]) / scale
        covariance = within.T @ within / len(within)
        even = np.eye(len(covariance)) * max(np.trace(covariance) / len(covariance), 1e-6)
        covariance = (1 - SHRINKAGE) * covariance + SHRINKAGE * even
        whiten = np.linalg.cholesky(np.linalg.inv(covariance)) / scale[:, None]
        return cls(tuple(name[place] for name in names), whiten, means @ whiten)

    def probabilities(self, x: np.ndarray) -> dict[str, float]:
        """How likely each value is for features `x` `[features]`, all classes being equally likely beforehand."""
        log = -0.5 * ((x @ self.whiten - self.means) ** 2).sum(1)
        share = np.exp(log - log.max())
        share /= share.sum()
        return {value: float(share[np.array(self.classes) == value].sum()) for value in sorted(set(self.classes))}


class Judge:
    """Says what a clip of one sample rate sounds like; made by `fit` or `from_json`."""

    def __init__(self, sample_rate: int, discriminants: Mapping[str, Discriminant]) -> None:
        self.sample_rate = sample_rate
        self.ear = Ear(sample_rate)
        self.discriminants = dict(discriminants)

    @classmethod
    def fit(cls, examples: Iterable[tuple[np.ndarray, Mapping[str, str]]], sample_rate: int) -> Judge:
        """A judge calibrated on `examples`: waves `[samples]` and their true attributes.

        Raises ValueError when there are none. A value that no example has is never the answer.
        """
        ear = Ear(sample_rate)
        heard, truth = [], []
        for wave, attributes in examples:
            heard.append(ear.features(wave))
            truth.append(attributes)
        if not heard:
            raise ValueError("a judge needs examples to be calibrated on")
        discriminants = {}
        for name in JUDGED:
            x = np.stack([_select(features, name) for features in heard])
            cells = [tuple(attributes[part] for part in CELLS[name]) for attributes in truth]
            discriminants[name] = Discriminant.fit(x, cells, CELLS[name].index(name))
        return cls(sample_rate, discriminants)

    def probabilities(self, wave: np.ndarray) -> dict[str, dict[str, float]]:
        """For each judged attribute, how likely each of its values is in `wave` `[samples]`."""
        features = self.ear.features(wave)
        return {name: found.probabilities(_select(features, name)) for name, found in self.discriminants.items()}

    def judge(self, wave: np.ndarray) -> dict[str, str]:
        """The likeliest value of each judged attribute in `wave` `[samples]`."""
        return {name: max(shares, key=shares.__getitem__) for name, shares in self.probabilities(wave).items()}

    def to_json(self) -> dict[str, Any]:
        """All that was calibrated, as plain lists and numbers."""
        discriminants = {
            name: {"classes": found.classes, "whiten": found.whiten.tolist(), "means": found.means.tolist()}
            for name, found in self.discriminants.items()
        }
        return {"sample_rate": self.sample_rate, "discriminants": discriminants}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Judge:
        """The judge that `to_json` stored."""
        discriminants = {
            name: Discriminant(tuple(found["classes"]), np.array(found["whiten"]), np.array(found["means"]))
            for name, found in stored["discriminants"].items()
        }
        return cls(stored["sample_rate"], discriminants)


def _select(features: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """The features that attribute `name` is judged by, float64."""
    return np.concatenate([features[group] for group in FEATURES[name]]).astype(np.float64)
