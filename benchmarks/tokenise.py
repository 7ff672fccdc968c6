"""Measures what tokenising takes beyond the encoders: reading, decoding, resampling, writing, digests, coordination.

    python benchmarks/tokenise.py benchmarks/records/tokenise.json

The encoders have the true shapes of `musiclm_small` and random weights. They run alone, on waves that lie in memory,
and in `data.tokenise` on FLAC files at 44.1 kHz in stereo, both on all cores; the two take turns. Nothing else should
run meanwhile.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from common import origin, summary, write
from random_encoders import make_encoders
from rich.console import Console
from safetensors.torch import save_file

import data.tokenise
from data.config import TokensConfig
from data.corpus import TRAIN, VALIDATION, Clip, write_clips
from data.parts import batches
from data.progress import Progress
from data.synthesis import combinations, render
from data.tokenise import over_threads, tokenise
from data.tokeniser import Tokeniser
from data.waves import Reader
from model.config import EncodersConfig

LIBRARIES = ("torch", "transformers", "soundfile", "soxr", "mosaicml-streaming", "numpy")
RATE = 44_100
CLIP_SECONDS = 30.0
AIM = 0.10
"""Most of the time that may pass outside the encoders."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("record", type=Path)
    parser.add_argument("--clips", type=int, default=16, help="of 30 s each")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="processes that decode")
    arguments = parser.parse_args()
    console, found = Console(width=110), origin(LIBRARIES)
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        encoders = make_encoders(folder)
        make_quantizers(folder)
        clips = make_corpus(folder / "corpus", arguments.clips)
        tokeniser = Tokeniser(folder, folder, folder, encoders)
        data.tokenise.Tokeniser = lambda *artifacts: tokeniser  # loaded once: that is in neither of the two times
        config, threads = TokensConfig(batch_seconds=CLIP_SECONDS), torch.get_num_threads()
        groups = batches(tuple(clips), config.batch_seconds)
        reader = Reader(folder / "corpus", groups, tokeniser.kinds)
        waves = [reader[index] for index in range(len(groups))]
        alone, whole = [], []
        for number in range(arguments.rounds + 1):
            started = time.perf_counter()
            for _ in over_threads(tokeniser.records, waves, threads):
                pass
            middle = time.perf_counter()
            run(folder, encoders, config, arguments.workers)
            if number:  # the first round warms up
                alone.append(middle - started)
                whole.append(time.perf_counter() - middle)
                console.print(f"round {number}: encoders {alone[-1]:.1f} s, tokenising {whole[-1]:.1f} s")
    seconds = arguments.clips * CLIP_SECONDS
    outside = [1 - one / other for one, other in zip(alone, whole, strict=True)]
    record = {
        **found,
        "what": "seconds to encode the audio, and to tokenise it from files; the encoders' loading is in neither",
        "audio_seconds": seconds,
        "workers": arguments.workers,
        "threads": threads,
        "encoders_alone": summary(alone),
        "tokenise": summary(whole),
        "outside_the_encoders": summary(outside),
        "aim": AIM,
        "audio_hours_an_hour": round(seconds / summary(whole)["median"], 2),
    }
    write(arguments.record, record)
    console.print(f"outside the encoders: {record['outside_the_encoders']['median']:.1%} (aim {AIM:.0%})")


def run(folder: Path, encoders: EncodersConfig, config: TokensConfig, workers: int) -> None:
    tokens = folder / "tokens"
    tokenise(folder / "corpus", folder, folder, folder, encoders, config, tokens, Progress(), workers=workers)
    shutil.rmtree(tokens)


def make_quantizers(folder: Path) -> None:
    tensors = {"conditioning": torch.randn(12, 1024, 512) / 20, "semantic": torch.randn(1, 1024, 768)}
    save_file(tensors, folder / "quantizers.safetensors")


def make_corpus(folder: Path, count: int) -> list[Clip]:
    """Clips of synthesised music, two to a file; returns those of training, which is all but one."""
    folder.mkdir()
    clips = []
    for number in range(count):
        wave = render({**combinations()[number % 60], "mode": "major"}, 0, number, CLIP_SECONDS, RATE)
        soundfile.write(folder / f"{number}.flac", np.stack([wave, wave[::-1]], 1), RATE)
        split = TRAIN if number else VALIDATION
        clips.append(Clip(f"{number}", f"{number}.flac", 0.0, CLIP_SECONDS, ("a tune", "music"), split))
    write_clips(folder, clips)
    return clips


if __name__ == "__main__":
    main()
