"""The synthesiser: the same clip for the same seed, clean at every sample rate, and attributes that plainly differ."""

from __future__ import annotations

import time

import numpy as np
import pytest

from data.synthesis import ATTRIBUTES, BEAT_SECONDS, HIGHEST_HZ, INSTRUMENTS, ROOT_HZ, combinations, render

RATE = 16_000
BASE = {"instrument": "bell", "register": "low", "tempo": "medium", "drums": "no drums", "mode": "major"}


def clip(index: int = 0, sample_rate: int = RATE, **attributes: str) -> np.ndarray:
    return render({**BASE, **attributes}, 7, index, sample_rate=sample_rate)


def spectrum(wave: np.ndarray, sample_rate: int = RATE) -> tuple[np.ndarray, np.ndarray]:
    return np.fft.rfftfreq(len(wave), 1 / sample_rate), np.abs(np.fft.rfft(wave * np.hanning(len(wave)))) ** 2


def decibels_above(wave: np.ndarray, hz: float, sample_rate: int = RATE) -> float:
    """Power above `hz` relative to all of it."""
    frequencies, power = spectrum(wave, sample_rate)
    return 10 * np.log10(power[frequencies > hz].sum() / power.sum())


def onset_strength(wave: np.ndarray) -> np.ndarray:
    """Rise of the level between neighbouring 10 ms, dB."""
    level = 10 * np.log10((wave[: len(wave) // 160 * 160].reshape(-1, 160) ** 2).mean(1) + 1e-6)
    return np.maximum(np.diff(level, prepend=-60), 0)


def test_every_combination_is_a_sound_clip() -> None:
    assert len(combinations()) == 60
    for index, attributes in enumerate(combinations()):
        wave = render({**attributes, "mode": "minor"}, 0, index)
        assert wave.dtype == np.float32
        assert wave.shape == (5 * RATE,)
        assert 10 ** (-8.1 / 20) < np.abs(wave).max() < 10 ** (-1.9 / 20)
        assert abs(wave.mean()) < 0.01


def test_a_clip_is_a_function_of_its_seed_and_index() -> None:
    assert np.array_equal(clip(3), clip(3))
    assert not np.array_equal(clip(3), clip(4))
    assert not np.array_equal(render(BASE, 1, 0), render(BASE, 2, 0))


@pytest.mark.parametrize("sample_rate", [16_000, 22_050, 44_100])
@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_no_tone_lies_near_half_the_lowest_rate(instrument: str, sample_rate: int) -> None:
    wave = clip(1, sample_rate, instrument=instrument, register="high")
    # Plectrum and breath noise reach higher, quietly.
    assert decibels_above(wave, HIGHEST_HZ * 1.01, sample_rate) < -18


@pytest.mark.parametrize("tempo", BEAT_SECONDS)
@pytest.mark.parametrize("drums", ATTRIBUTES["drums"])
def test_onsets_fall_on_the_beats(tempo: str, drums: str) -> None:
    strength = np.mean([onset_strength(clip(index, tempo=tempo, drums=drums)) for index in range(6)], axis=0)
    beats = np.round(np.arange(0, 4.9, BEAT_SECONDS[tempo]) / 0.01).astype(int)
    on_beat = np.mean([strength[max(0, beat - 2) : beat + 3].max() for beat in beats])
    assert on_beat > 6 * strength.mean()


@pytest.mark.parametrize("register", ROOT_HZ)
def test_melodies_keep_to_their_register(register: str) -> None:
    low, high = ROOT_HZ[register]
    for index in range(8):
        frequencies, power = spectrum(clip(index, instrument="flute", register=register))
        assert low * 0.98 < frequencies[power.argmax()] < 2 * high * 1.02


def test_drums_add_high_and_low_hits() -> None:
    for index in range(5):
        with_drums, without = (clip(index, instrument="flute", register="high", drums=d) for d in ATTRIBUTES["drums"])
        below = [1 - 10 ** (decibels_above(wave, 200) / 10) for wave in (with_drums, without)]
        assert below[0] > 0.05 > 5 * below[1]
        assert onset_strength(with_drums).sum() > onset_strength(without).sum()


def test_instruments_differ_in_brightness_decay_and_harmonics() -> None:
    def brightness(instrument: str) -> float:
        return float(np.mean([decibels_above(clip(i, instrument=instrument), 600) for i in range(6)]))

    def sustain(instrument: str) -> float:
        """Level late in the beats over the level early in them, dB."""
        beat = round(BEAT_SECONDS["medium"] * RATE)
        waves = [clip(index, instrument=instrument)[: 7 * beat].reshape(7, beat) ** 2 for index in range(6)]
        early, late = (np.mean([wave[:, a * beat // 100 : b * beat // 100].mean() for wave in waves])
                       for a, b in ((5, 15), (30, 42)))  # fmt: skip
        return float(10 * np.log10(late / early))

    assert brightness("brass") > brightness("flute") + 10
    assert brightness("brass") > brightness("bass") + 6
    assert sustain("plucked string") < sustain("bell") - 3
    assert sustain("plucked string") < sustain("flute") - 6
    # A bell's third partial is no harmonic: between the second and the fourth harmonic it is alone.
    frequencies, power = spectrum(clip(0, instrument="bell"))
    tonic = frequencies[power.argmax()]
    assert power[np.abs(frequencies - 2.76 * tonic) < 4].max() > 20 * power[np.abs(frequencies - 2.5 * tonic) < 4].max()


def test_a_clip_takes_little_time() -> None:
    clip()
    start = time.process_time()
    for index, attributes in enumerate(combinations()):
        render({**attributes, "mode": "major"}, 0, index)
    # 5 ms where it was written.
    assert (time.process_time() - start) / len(combinations()) < 0.05
