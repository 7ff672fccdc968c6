"""A small corpus with encoders fitted to noise, and the job that tokenises it as one of several ranks."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from safetensors.torch import save_file

import data.tokeniser
from data.config import TokensConfig
from data.corpus import Clip, write_clips
from data.progress import Progress
from data.ranks import Ranks
from data.tokenise import tokenise
from model import artifact
from model.config import EncodersConfig
from model.encoders.chroma import MelChroma
from model.encoders.mel import MelCodec

CONFIG = EncodersConfig.model_validate({
    "codec": {"quantizers": 4, "codebook_size": 16, "frame_rate": 25, "mel_bands": 20},
    "semantic": {"frame_rate": 50, "sample_rate": 16_000},
    "joint": {"window_seconds": 1.0, "hop_seconds": 0.5, "sample_rate": 8000, "dim": 2},
})  # fmt: skip
SECONDS = 2.0


class Embedder:
    """A stand-in at a rate of its own: the loudness and the share of positive samples; of a text, its letters."""

    sample_rate, dim, fitted = 8000, 2, True

    def embed_audio(self, wave: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.stack([wave.square().mean(1), (wave > 0).float().mean(1)], 1))

    def embed_text(self, texts: list[str]) -> torch.Tensor:
        return torch.nn.functional.normalize(torch.tensor([[len(text), text.count("a")] for text in texts]).float())


def fit(folder: Path) -> None:
    """Leaves a codec and quantizers in `folder`."""
    torch.manual_seed(0)
    codec = MelCodec(CONFIG.codec)
    codec.quantizer.fit([torch.randn(200, codec.dim)])
    codec.save(folder)
    tensors = {"conditioning": torch.randn(3, 8, 2), "semantic": torch.randn(1, 16, MelChroma.dim)}
    save_file(tensors, folder / "quantizers.safetensors")


def make_corpus(folder: Path, clips: int) -> Path:
    """`clips` clips of noise, a tenth of them for validation, some shorter than the others."""
    corpus = folder / "corpus"
    corpus.mkdir(parents=True)
    fit(folder)
    rows = []
    for number in range(clips):
        wave = np.random.default_rng(number).uniform(-0.5, 0.5, round(2.5 * 16_000))
        soundfile.write(corpus / f"{number}.wav", wave, 16_000)
        seconds = SECONDS if number % 7 else 1.2
        split = "train" if number % 10 else "validation"
        rows.append(Clip(f"clip-{number}", f"{number}.wav", 0.25, seconds, (f"noise {number}",), split))
    write_clips(corpus, rows)
    return corpus


def job(corpus: Path, path: Path, settings: dict[str, Any], slow: float = 0.0) -> None:
    """Makes the token artifact `path` as one of the ranks; each batch takes `slow` seconds more."""
    data.tokeniser.load_joint_embedder = lambda folder, config: Embedder()
    records = data.tokeniser.Tokeniser.records

    def slowly(self: Any, batch: Any) -> Any:
        time.sleep(slow)
        return records(self, batch)

    data.tokeniser.Tokeniser.records = slowly
    fitted, config = corpus.parent, TokensConfig(**settings)
    with Ranks.joined() as ranks:
        if ranks.leads:
            with artifact.resume(path, "tokens", "made") as (folder, info, files):
                ranks.broadcast(str(folder))
                progress = Progress(path.parent / "progress.json")
                found, digests = tokenise(
                    corpus, fitted, fitted, fitted, CONFIG, config, folder, progress, ranks, workers=1
                )
                info.update(found)
                files.update(digests)
        else:
            folder = Path(ranks.broadcast(None))
            tokenise(corpus, fitted, fitted, fitted, CONFIG, config, folder, Progress(), ranks, workers=1)


def contents(path: Path) -> dict[str, bytes]:
    """Every file of an artifact but its manifest, whose digests are compared with them first."""
    assert artifact.problems(artifact.read(path, "tokens")) == []
    files = {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    assert manifest["files"].keys() == files.keys()
    return files
