"""Whether the music does what the words say: every prompt generated once, and judged by ear's arithmetic alone.

The judge is plain signal processing that never sees a model. It is calibrated on training clips, clean and through the
codec, so that what it says of generated music has a yardstick: what it scores on real clips, and on real clips through
the codec, which no model can be expected to beat.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import soundfile
import torch
import yaml

from data.corpus import (
    HELD_OUT,
    TEST,
    TRAIN,
    VALIDATION,
    Clip,
    Prompt,
    load_clip,
    read_clips,
    read_prompts,
    write_jsonl,
)
from data.progress import Progress
from model import artifact
from model.encoders.base import Codec, with_channels, within_full_scale
from model.pipeline import MusicPipeline
from trainer.judge import JUDGED, Judge

CALIBRATION_CLIPS = 150
REAL_CLIPS = 120
REAL_KEPT = 8
"""Real clips kept beside the generated ones, to listen to."""
Attributes = dict[str, str]


def make_samples(run: Path, folder: Path, progress: Progress) -> dict[str, Any]:
    """Generates the evaluation prompts of `run` into `folder`, judges them and returns the figures.

    A corpus without captions has no prompts: music is then made in the manner of its validation clips. One
    without known attributes has nothing to judge by: `adherence` is None.
    """
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    seconds, count = recipe["evaluation"]["seconds"], recipe["evaluation"]["prompts"]
    corpus = artifact.read(run / "corpus", "corpus").path
    pipeline = MusicPipeline.load(run / "bundle")
    rate = pipeline.codec.sample_rate
    real = read_clips(corpus, HELD_OUT) or read_clips(corpus, TEST) or read_clips(corpus, VALIDATION)
    prompts, waves = _generate(pipeline, corpus, real, count, seconds, recipe["seed"], progress)
    judge = _calibrate(pipeline.codec, corpus, recipe["seed"]) if real[0].attributes else None

    judged = [judge.judge(_mono(wave)) if judge else None for wave in waves]
    _write_waves(folder / "wav", [f"{number:02d}" for number in range(len(waves))], waves, rate)
    write_jsonl(
        folder / "samples.jsonl",
        [
            {"prompt": prompt.prompt, "wav": f"wav/{number:02d}.wav", "attributes": prompt.attributes, "judged": found}
            for number, (prompt, found) in enumerate(zip(prompts, judged, strict=True))
        ],
    )
    _write_real(corpus, real[:REAL_KEPT], rate, folder)
    adherence = None
    if judge:
        adherence = _adherence(judge, pipeline.codec, corpus, real[:REAL_CLIPS], prompts, judged)
    return {"prompts": len(prompts), "seconds": seconds, "captions": pipeline.captions, "adherence": adherence}


def _generate(
    pipeline: MusicPipeline,
    corpus: Path,
    real: Sequence[Clip],
    count: int,
    seconds: float,
    seed: int,
    progress: Progress,
) -> tuple[list[Prompt], list[np.ndarray]]:
    """The prompts, each with its music; without captions, the clips it was made to resemble stand for prompts."""

    def on_step(stage: str, done: int, total: int) -> None:
        progress.update(done, total, f"generating: {stage}")

    if pipeline.captions:
        prompts = read_prompts(corpus)[:count]
        samples = pipeline.generate([prompt.prompt for prompt in prompts], seconds=seconds, seed=seed, on_step=on_step)
    else:
        chosen = real[:count]
        prompts = [Prompt(f"like {clip.id}", clip.attributes) for clip in chosen]
        like = _load(corpus, chosen, pipeline.embedder.sample_rate)
        samples = pipeline.generate(like=like, seconds=seconds, seed=seed, on_step=on_step)
    return prompts, list(samples.waveform.numpy())


def _load(corpus: Path, clips: Sequence[Clip], rate: int) -> torch.Tensor:
    return torch.from_numpy(np.stack([load_clip(corpus, clip, rate) for clip in clips]))


def _through(codec: Codec, waves: np.ndarray) -> np.ndarray:
    """`waves [clips, samples]` encoded and decoded again, mixed to mono."""
    coded = codec.decode(codec.encode(with_channels(torch.from_numpy(waves), codec.channels)))
    return with_channels(within_full_scale(coded), 1).numpy()


def _mono(wave: np.ndarray) -> np.ndarray:
    """`[samples]` of `[samples]` or `[2, samples]`."""
    return np.atleast_2d(wave).mean(0)


def _clean_and_coded(
    codec: Codec, corpus: Path, clips: Sequence[Clip]
) -> Iterator[tuple[Clip, np.ndarray, np.ndarray]]:
    """Each clip with its waveform, and with the same through the codec."""
    for start in range(0, len(clips), 32):
        part = clips[start : start + 32]
        waves = _load(corpus, part, codec.sample_rate).numpy()
        yield from zip(part, waves, _through(codec, waves), strict=True)


def _calibrate(codec: Codec, corpus: Path, seed: int) -> Judge:
    """A judge fitted on training clips, clean and through the codec."""
    clips = read_clips(corpus, TRAIN)
    chosen = np.random.default_rng(seed).permutation(len(clips))[:CALIBRATION_CLIPS]
    examples: list[tuple[np.ndarray, Attributes]] = []
    for clip, clean, coded in _clean_and_coded(codec, corpus, [clips[index] for index in chosen]):
        assert clip.attributes is not None
        examples += [(clean, clip.attributes), (coded, clip.attributes)]
    return Judge.fit(examples, codec.sample_rate)


def _adherence(
    judge: Judge,
    codec: Codec,
    corpus: Path,
    real: Sequence[Clip],
    prompts: Sequence[Prompt],
    judged: Sequence[Attributes | None],
) -> dict[str, dict[str, float]]:
    """Share of right attributes: of generated music by its own prompt, by the other prompts, and the yardsticks."""
    wanted = [prompt.attributes or {} for prompt in prompts]
    found = [attributes or {} for attributes in judged]
    clean, coded, truth = [], [], []
    for clip, wave, through in _clean_and_coded(codec, corpus, real):
        clean.append(judge.judge(wave))
        coded.append(judge.judge(through))
        truth.append(clip.attributes or {})
    others = [(one, other) for one in range(len(found)) for other in range(len(wanted)) if one != other]
    chance = {name: 1 / len({attributes[name] for attributes in truth}) for name in JUDGED}
    return {
        "generated": _shares(found, wanted),
        # All the wrong pairs, not one random pairing: the same figure without its luck.
        "shuffled": _shares([found[one] for one, _ in others], [wanted[other] for _, other in others]),
        "chance": {**chance, "mean": mean(chance.values())},
        "ceiling": _shares(coded, truth),
        "real": _shares(clean, truth),
    }


def _shares(found: Sequence[Attributes], wanted: Sequence[Attributes]) -> dict[str, float]:
    """Share of equal values for each judged attribute, and their mean."""
    pairs = list(zip(found, wanted, strict=True))
    shares = {name: mean(one[name] == other[name] for one, other in pairs) for name in JUDGED}
    return {**shares, "mean": mean(shares.values())}


def _write_waves(folder: Path, names: Sequence[str], waves: Sequence[np.ndarray], rate: int) -> None:
    folder.mkdir()
    for name, wave in zip(names, waves, strict=True):
        soundfile.write(folder / f"{name}.wav", wave.T, rate, subtype="PCM_16")


def _write_real(corpus: Path, clips: Sequence[Clip], rate: int, folder: Path) -> None:
    names = [f"{number:02d}" for number in range(len(clips))]
    _write_waves(folder / "real", names, [load_clip(corpus, clip, rate) for clip in clips], rate)
    rows = [
        {"id": clip.id, "wav": f"real/{name}.wav", "captions": clip.captions, "attributes": clip.attributes}
        for name, clip in zip(names, clips, strict=True)
    ]
    write_jsonl(folder / "real.jsonl", rows)
