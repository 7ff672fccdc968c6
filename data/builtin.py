"""The built-in corpus: synthesised clips with captions and true attributes, the same for a seed on every machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations as pairs
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from data.captions import HELD_OUT_TEMPLATES, captions, fill
from data.config import DataConfig
from data.corpus import (
    HELD_OUT,
    SKIPPED,
    TRAIN,
    VALIDATION,
    Clip,
    Prompt,
    write_clips,
    write_jsonl,
    write_prompts,
)
from data.pool import over_processes
from data.progress import Progress
from data.synthesis import ATTRIBUTES, combinations, render
from model.errors import UserError

AUDIO = "audio"
SMALLEST = 8
"""Clips below which a split would be empty."""
LOWEST_RATE = 16_000
HELD_OUT_COMBINATIONS = 8
PROMPTS = 64


def write_corpus(folder: Path, config: DataConfig, seed: int, progress: Progress) -> dict[str, Any]:
    """Fills `folder` with `config.clips` clips (16-bit FLAC), their captions and attributes, and evaluation prompts.

    Some attribute combinations are held out of training: their clips form the split "held_out", and the prompts ask
    for them in phrasings that no training caption uses. The result depends on `config` and `seed` alone, not on the
    number of processes. Returns what the artifact's manifest says of it. Raises UserError for too few clips or a sample
    rate too low for the instruments.
    """
    if config.clips < SMALLEST:
        raise UserError(f"data.clips is {config.clips}: the built-in corpus needs at least {SMALLEST} clips.")
    if config.sample_rate < LOWEST_RATE:
        raise UserError(f"data.sample_rate is {config.sample_rate}: the built-in corpus needs at least {LOWEST_RATE}.")
    (folder / AUDIO).mkdir(parents=True)
    held_out = held_out_combinations(seed)
    clips = _clips(config, held_out, seed)
    for done in _render_all(folder, clips, config.sample_rate, seed):
        progress.update(done, len(clips), "synthesising")
    write_clips(folder, clips)
    write_jsonl(folder / SKIPPED, [])
    write_prompts(folder, _prompts(held_out, seed))
    return {
        "clips": len(clips),
        "splits": dict(Counter(clip.split for clip in clips)),
        "held_out_combinations": held_out,
        "skipped": 0,
        "captions": True,
    }


def held_out_combinations(seed: int) -> list[dict[str, str]]:
    """The eight combinations of instrument, register, tempo and drums that are kept out of training, chosen by `seed`.

    The values of each attribute are spread over them as evenly as eight allow, registers and drums also in pairs. Any
    two differ in two attributes or more, so that each has all its nearest neighbours in training.
    """
    random = _random(seed, "held out")
    names = tuple(combinations()[0])
    while True:
        columns = [_spread(ATTRIBUTES[name], HELD_OUT_COMBINATIONS, random) for name in names]
        chosen = [dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)]
        apart = all(sum(one[name] != other[name] for name in names) > 1 for one, other in pairs(chosen, 2))
        counts = Counter((one["register"], one["drums"]) for one in chosen)
        if apart and set(counts.values()) == {HELD_OUT_COMBINATIONS // 4}:
            return chosen


def _random(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """Independent random numbers for each purpose and clip."""
    return np.random.default_rng((seed, index, *purpose.encode()))


def _spread(values: Sequence[str], number: int, random: np.random.Generator) -> list[str]:
    """`number` values in random order, each as often as the others, give or take one."""
    repeated = [*random.permutation(len(values))] * -(-number // len(values))
    return [values[index] for index in random.permutation(repeated[:number])]


def _clips(config: DataConfig, held_out: list[dict[str, str]], seed: int) -> list[Clip]:
    """The clips to render: held-out ones, then validation, then training, each going round its combinations."""
    rest = [combination for combination in combinations() if combination not in held_out]
    rest = [rest[index] for index in _random(seed, "order").permutation(len(rest))]
    held_out_clips = max(round(0.06 * config.clips), min(32, config.clips // 8))
    others = config.clips - held_out_clips
    validation_clips = min(max(1, round(config.validation * others)), others - 1)
    plan = [(HELD_OUT, held_out[number % len(held_out)]) for number in range(held_out_clips)]
    plan += [(VALIDATION if number < validation_clips else TRAIN, rest[number % len(rest)]) for number in range(others)]
    clips = []
    for index, (split, combination) in enumerate(plan):
        random = _random(seed, "captions", index)
        attributes = {**combination, "mode": str(random.choice(ATTRIBUTES["mode"]))}
        name = f"clip-{index:05d}"
        words = tuple(captions(attributes, random))
        clips.append(Clip(name, f"{AUDIO}/{name}.flac", 0.0, config.clip_seconds, words, split, attributes))
    return clips


def _prompts(held_out: list[dict[str, str]], seed: int) -> list[Prompt]:
    """Prompts that go round the held-out combinations, and round the held-out templates shifted by one each time."""
    random = _random(seed, "prompts")
    prompts = []
    for number in range(PROMPTS):
        lap, place = divmod(number, len(held_out))
        template = HELD_OUT_TEMPLATES[(place + lap) % len(HELD_OUT_TEMPLATES)]
        prompts.append(Prompt(fill(template, held_out[place], random), held_out[place]))
    return prompts


def _render_all(folder: Path, clips: list[Clip], sample_rate: int, seed: int) -> Iterator[int]:
    """Writes the audio of all `clips` and yields how many are done, on as many processes as there are cores."""
    tasks = [(folder / clip.path, clip, index, sample_rate, seed) for index, clip in enumerate(clips)]
    for done, _ in enumerate(over_processes(_render_one, tasks), start=1):
        yield done


def _render_one(task: tuple[Path, Clip, int, int, int]) -> None:
    path, clip, index, sample_rate, seed = task
    assert clip.attributes is not None
    wave = render(clip.attributes, seed, index, clip.seconds, sample_rate)
    soundfile.write(path, wave, sample_rate, subtype="PCM_16")
