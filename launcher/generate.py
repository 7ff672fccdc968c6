"""`stretto generate`: from a bundle and words, or a recording, to WAV files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from launcher.display import ConsoleProgress
from model import artifact
from model.errors import UserError
from model.generation import GenerationConfig


@dataclass(frozen=True)
class Request:
    """What to make, and how."""

    prompts: list[str]
    like: Path | None
    options: GenerationConfig
    """What is not set is as the bundle says."""
    device: str | None = None
    """A GPU where there is one, when None."""
    dtype: str = "auto"
    weights: Mapping[str, str] = field(default_factory=dict)
    """Where those of pretrained encoders are."""


def read_places(texts: Sequence[str]) -> dict[str, str]:
    """`codec=/models/encodec_24khz` and so on as a mapping. Raises UserError for what has no such form."""
    found = {}
    for text in texts:
        part, equals, place = text.partition("=")
        if not (equals and place):
            raise UserError(f"--weights is {text!r}: give codec=PLACE or joint=PLACE.")
        found[part] = place
    return found


def read_options(by_stage: dict[str, str | None], **others: Any) -> GenerationConfig:
    """Options of the command line by their names in Python; what is None is as the bundle says.

    Those of `by_stage` are text: `0.9` for all stages, or `semantic=0.8,coarse=0.5`. Raises UserError for values that
    are not allowed.
    """
    values = {name: text if text is None else _by_stage(name, text) for name, text in by_stage.items()}
    return GenerationConfig.of({**values, **others}, _flag)


def _by_stage(name: str, text: str) -> str | dict[str, str]:
    if "=" not in text:
        return text
    found: dict[str, str] = {}
    for part in text.split(","):
        stage, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals:
            raise UserError(f"{_flag(name)} is {text!r}: give one number, or STAGE=NUMBER for each stage and commas.")
        if stage in found:
            raise UserError(f"{_flag(name)} is {text!r}: it names {stage} twice.")
        found[stage] = value
    return found


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def generate_files(bundle: Path, request: Request, output: Path, console: Console) -> Iterator[tuple[Path, str]]:
    """Makes the music and yields each file written and what it is.

    Several pieces are named `out-1.wav`, `out-2.wav` ... . Raises UserError where the bundle or the recording does not
    read, or `output` cannot be written.
    """
    if bool(request.prompts) == (request.like is not None):
        raise UserError('name what to play, such as "a slow flute with drums", or a recording with --like; not both.')
    check_output(output)
    path = find_bundle(bundle)

    from model.pipeline import MusicPipeline

    with ConsoleProgress(console) as progress:
        pipeline = MusicPipeline.load(path, request.device, request.dtype, weights=request.weights)
        samples = pipeline.generate(
            request.prompts or None,
            like=_recording(request.like, pipeline.embedder.sample_rate) if request.like else None,
            **request.options.model_dump(exclude_unset=True),
            on_step=lambda stage, done, total: progress.update(done, total, stage),
        )
    import soundfile

    words = [text for text in request.prompts or [f"like {request.like}"] for _ in range(request.options.samples)]
    for number, (text, wave) in enumerate(zip(words, samples.waveform.cpu().numpy(), strict=True), start=1):
        file = output if len(words) == 1 else output.with_name(f"{output.stem}-{number}{output.suffix}")
        soundfile.write(file, wave.T, samples.sample_rate, subtype="PCM_16")
        yield file, text


def check_output(path: Path) -> None:
    """Raises UserError unless `path` can be the name of a WAV file."""
    if path.suffix.lower() != ".wav":
        raise UserError(f"{path}: name a file that ends in .wav with -o.")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder: make it first, or choose another with -o.")


def find_bundle(path: Path) -> Path:
    """`path`, or the bundle in it where it is a run folder. Raises UserError where that has none yet."""
    if (path / artifact.MANIFEST).exists() or not (path / "recipe.yaml").exists():
        return path
    if not (path / "bundle" / artifact.MANIFEST).exists():
        raise UserError(f"{path} has no bundle yet: `stretto status {path}` shows how far the run is.")
    return path / "bundle"


def _recording(path: Path, sample_rate: int) -> Any:
    """The recording, mono float32 `[1, time]` at `sample_rate`."""
    import torch

    from data.audio import AudioError, probe, read_mono

    try:
        return torch.from_numpy(read_mono(path, 0.0, probe(path).seconds, sample_rate))[None]
    except AudioError as error:
        raise UserError(f"{path} cannot be used: {error}") from None
