"""Whole runs of the quickstart recipe, shrunk until they take seconds, and folders of audio to run them on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import soundfile

SMALL = [
    "encoders.codec.fit_clips=20",
    "encoders.codec.quantizers=4",
    "encoders.codec.codebook_size=16",
    "encoders.joint.steps=4",
    "encoders.joint.batch=16",
    "quantizers.conditioning.levels=2",
    "quantizers.conditioning.iterations=2",
    "quantizers.semantic.codebook_size=16",
    "quantizers.semantic.iterations=2",
    "stage_defaults.model.transformer.dim=32",
    "stage_defaults.model.transformer.layers=1",
    "stage_defaults.model.transformer.heads=1",
    "stage_defaults.train.global_batch=4",
    "stage_defaults.train.warmup_steps=1",
    "stage_defaults.train.steps=6",
    "stage_defaults.train.checkpoint_every=2",
    "stage_defaults.train.validate_every=6",
    "stage_defaults.train.log_every=2",
    "evaluation.prompts=3",
    "evaluation.seconds=2",
]
CLIP = ["data.clip_seconds=2", "stage_defaults.model.window_seconds=2", "encoders.joint.window_seconds=2"]


def melody(seconds: float, rate: int, seed: int, channels: int = 1) -> np.ndarray:
    """A few plucked notes, `[samples, channels]`."""
    random = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    wave = np.zeros_like(time)
    for start in np.arange(0, seconds, 0.4):
        later = np.clip(time - start, 0, None)
        wave += np.sin(2 * np.pi * random.uniform(200, 900) * later) * np.exp(-6 * later) * (time >= start)
    return np.repeat(0.2 * wave[:, None], channels, axis=1).astype(np.float32)


def music_folder(folder: Path) -> Path:
    """A folder of WAV, FLAC, OGG and MP3 with different rates and channels, and some files that are of no use."""
    (folder / "deep" / "er").mkdir(parents=True)
    forms = [("wav", 44_100, 2), ("flac", 16_000, 1), ("ogg", 48_000, 2), ("mp3", 22_050, 1)]
    for number, (suffix, rate, channels) in enumerate(forms * 2):
        place = folder / "deep" / "er" if number % 3 == 0 else folder
        soundfile.write(place / f"tune {number}.{suffix}", melody(6.5, rate, number, channels), rate)
    soundfile.write(folder / "silent.wav", np.zeros(32_000, dtype=np.float32), 8_000)
    soundfile.write(folder / "short.wav", melody(0.5, 16_000, 99), 16_000)
    (folder / "empty.wav").touch()
    (folder / "noise.mp3").write_bytes(bytes(range(256)) * 40)
    (folder / "cover.jpg").write_bytes(b"not audio")
    return folder


def caption_everything(folder: Path) -> Path:
    """Captions for every tune, and one for a file that is not there."""
    rows = [
        {"file": path.relative_to(folder).as_posix(), "caption": f"a tune number {index}, plucked and calm"}
        for index, path in enumerate(sorted(folder.rglob("tune*")))
    ]
    rows.append({"file": "gone.wav", "caption": "a tune that was lost"})
    (folder / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
