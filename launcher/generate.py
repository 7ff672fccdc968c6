"""`stretto generate`: from a bundle and words, or a recording, to WAV files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.display import ConsoleProgress
from model import artifact
from model.errors import UserError


@dataclass(frozen=True)
class Request:
    """What to make. What is None is as the bundle says."""

    prompts: list[str]
    like: Path | None
    seconds: float | None
    samples: int
    """Pieces for each prompt."""
    seed: int
    cfg: float | None
    temperature: float | None
    top_k: int | None


def generate_files(bundle: Path, request: Request, output: Path, console: Console) -> Iterator[tuple[Path, str]]:
    """Makes the music and yields each file written and what it is.

    Several pieces are named `out-1.wav`, `out-2.wav` ... . Raises UserError where the bundle or the recording does not
    read, or `output` cannot be written.
    """
    if bool(request.prompts) == (request.like is not None):
        raise UserError('name what to play, such as "a slow flute with drums", or a recording with --like; not both.')
    if output.suffix.lower() != ".wav":
        raise UserError(f"{output}: name a file that ends in .wav with -o.")
    if not output.parent.is_dir():
        raise UserError(f"{output.parent} is no folder: make it first, or choose another with -o.")
    path = find_bundle(bundle)

    from model.pipeline import MusicPipeline

    with ConsoleProgress(console) as progress:
        pipeline = MusicPipeline.load(path)
        samples = pipeline.generate(
            **_source(request, pipeline),
            seconds=request.seconds,
            seed=request.seed,
            cfg=request.cfg,
            temperature=request.temperature,
            top_k=request.top_k,
            on_step=lambda stage, done, total: progress.update(done, total, stage),
        )
    import soundfile

    words = [text for text in request.prompts or [f"like {request.like}"] for _ in range(request.samples)]
    for number, (text, wave) in enumerate(zip(words, samples.waveform.cpu().numpy(), strict=True), start=1):
        file = output if len(words) == 1 else output.with_name(f"{output.stem}-{number}{output.suffix}")
        soundfile.write(file, wave, samples.sample_rate, subtype="PCM_16")
        yield file, text


def find_bundle(path: Path) -> Path:
    """`path`, or the bundle in it where it is a run folder. Raises UserError where that has none yet."""
    if (path / artifact.MANIFEST).exists() or not (path / "recipe.yaml").exists():
        return path
    if not (path / "bundle" / artifact.MANIFEST).exists():
        raise UserError(f"{path} has no bundle yet: `stretto status {path}` shows how far the run is.")
    return path / "bundle"


def _source(request: Request, pipeline: Any) -> dict[str, Any]:
    """What the pipeline makes music from: each prompt, or the recording, once for each sample."""
    if request.like is None:
        return {"prompts": [text for text in request.prompts for _ in range(request.samples)]}
    import torch

    wave = _recording(request.like, pipeline.embedder.sample_rate)
    return {"like": torch.from_numpy(wave).expand(request.samples, -1)}


def _recording(path: Path, sample_rate: int) -> Any:
    """The recording, mono float32 `[samples]` at `sample_rate`."""
    from data.audio import AudioError, probe, read_mono

    try:
        return read_mono(path, 0.0, probe(path).seconds, sample_rate)
    except AudioError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
