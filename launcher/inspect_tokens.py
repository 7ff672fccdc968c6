"""What `stretto inspect` says of token shards beyond their files: their codes, and how a record sounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.progress import Progress
from launcher.generate import check_output
from launcher.recipe import read_run_recipe
from launcher.units import duration
from model import artifact
from model.errors import UserError

if TYPE_CHECKING:
    from data.token_statistics import SplitStatistics

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 16
"""Bars of a histogram; each stands for neighbouring codes."""
COLUMNS = ("codes of", "used", "perplexity", "range", "most frequent", "histogram")


def histogram(counts: Any) -> str:
    """How often codes occur, from the first to the last, in at most WIDTH bars; the highest is the largest count."""
    import numpy as np

    heights = np.array([part.max() for part in np.array_split(counts, min(WIDTH, len(counts)))], dtype=float)
    scaled = np.ceil(heights / max(heights.max(), 1) * (len(BARS) - 1)).astype(int)
    return "".join(BARS[height] if count else " " for height, count in zip(scaled, heights, strict=True))


def rows(found: SplitStatistics) -> Iterator[tuple[str, ...]]:
    """One row for each quantizer of each field, under COLUMNS."""
    for name, field in found.fields.items():
        used, perplexity = field.used(), field.perplexity()
        for quantizer, counts in enumerate(field.counts):
            codes = counts.nonzero()[0]
            if not len(codes):
                continue
            most = counts.argmax()
            yield (
                f"{name} {quantizer}",
                f"{used[quantizer]:.0%}",
                f"{perplexity[quantizer]:.1f}",
                f"{codes[0]}–{codes[-1]}",
                f"{most} ({counts[most] / counts.sum():.1%})",
                histogram(counts),
            )


def facts(tokens: artifact.Artifact, split: str, found: SplitStatistics) -> dict[str, str]:
    """Lines of name and value about one split."""
    lengths = {
        name: f"{field.shortest:,} to {field.longest:,} frames a record, {field.frames:,} in all"
        for name, field in found.fields.items()
        if field.shortest is not None
    }
    said = {"records": f"{found.records:,}, {found.captioned:,} of them with captions"}
    if "acoustic" in found.fields:
        said["audio"] = duration(found.fields["acoustic"].frames / tokens.info["fields"]["acoustic"]["rate_hz"])
    return said | lengths


def problems(tokens: artifact.Artifact, split: str, found: SplitStatistics) -> list[str]:
    """What is wrong with the records of a split, in words."""
    wrong = list(found.problems)
    expected = tokens.info["records"].get(split)
    if not found.problems and found.records != expected:
        wrong.append(f"{tokens.path / split} holds {found.records} records, {expected} expected")
    wrong += [
        f"{tokens.path / split}: {field.outside} codes of {name} are not in its codebook"
        for name, field in found.fields.items()
        if field.outside
    ]
    return wrong


def statistics(tokens: artifact.Artifact, split: str, progress: Progress | None) -> SplitStatistics:
    from data.token_statistics import token_statistics

    return token_statistics(tokens, split, progress)


def decode_record(path: Path, wanted: str, run: Path | None, output: Path) -> str:
    """Writes the music of one record of the token artifact `path` as a WAV file, by the codec of its run.

    Returns its id, captions and length in words. Raises UserError where there is no such record or no such run.
    """
    import json

    import soundfile
    import torch

    from data.token_statistics import find_record
    from model.encoders import load_codec
    from model.encoders.base import within_full_scale

    check_output(output)
    tokens = artifact.read(path, "tokens")
    run = run or path.absolute().parent
    try:
        recipe = read_run_recipe(run)
    except UserError:
        raise UserError(f"{path} does not lie in a run folder: say with --run which run made its codec.") from None
    codec = artifact.read(run / "codec", "codec")
    if tokens.manifest["inputs"].get("codec") not in (None, codec.fingerprint):
        raise UserError(f"{path} was not made with the codec of {run}: name another with --run.")
    record = find_record(tokens, wanted)
    decoder = load_codec(codec.path, recipe.encoders.codec)
    codes = torch.from_numpy(record["acoustic"].astype("int64"))
    wave = within_full_scale(decoder.decode(codes[None]))[0]
    soundfile.write(output, wave.numpy().T, decoder.sample_rate, subtype="PCM_16")
    captions = json.loads(record["captions"])
    told = f": {captions[0]}" if captions else ""
    return f"{record['id']}, {duration(wave.shape[-1] / decoder.sample_rate)}{told}"
