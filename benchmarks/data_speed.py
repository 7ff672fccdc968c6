"""How fast windows of token shards are, beside what a GPU eats and beside making the tokens from audio in the loop.

    python benchmarks/data_speed.py benchmarks/records/data_speed.json

Windows are those of `musiclm_small`'s coarse stage: 4 s of 30 s clips, of random codes in the sizes that its encoders
give. What one H200 eats is 50 % MFU / FLOPs of a window: 0.5 × 989 TFLOP/s (dense bf16) / (3 × forward FLOPs by
`model.counting`: matrix products and causal attention, a multiply-add as two). Shards are in the page cache. The
loaders with 0, 1 and 2 workers take turns. Raw audio: a random 4 s of a 30 s FLAC read by soundfile, and encoded by
EnCodec 24 kHz (random weights, the true architecture, 6 kbps) alone; semantic features and embeddings would come on
top. Resident memory is that of the process and its worker after each epoch. The start-up is from opening a loader on an
index of 1,000,000 records to its first batch; the shard files of that index are links to one. Nothing else should run
meanwhile.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import soundfile
import torch
from common import origin, summary, write
from rich.console import Console
from rich.table import Table

from data.shard_writer import write_records
from data.windows import WindowLoader, window_loader
from launcher.recipe import load_recipe
from model import artifact
from model.counting import count_stage, token_fields
from model.fields import CONDITIONING
from trainer.hardware import find

LIBRARIES = ("torch", "mosaicml-streaming", "numpy", "transformers", "soundfile")
RECIPE, STAGE = "musiclm_small", "coarse"
GPU, MFU = "H200", 0.5
AIM_GPUS, AIM_START = 2.0, 5.0
"""GPUs that one worker feeds; seconds."""
WORKERS = (0, 1, 2)
EPOCHS = 10
INDEXED = 1_000_000
WARM_UP = 4
"""Batches of a round that do not count."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--clips", type=int, default=4096)
    parser.add_argument("--indexed", type=int, default=INDEXED, help="records of the large index")
    parser.add_argument("--batches", type=int, default=96, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--encoded", type=int, default=16, help="windows of raw audio of a round")
    parser.add_argument("--small", action="store_true", help="little of everything: to see that this works")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.clips, arguments.indexed, arguments.batches = 256, 10_000, 8
        arguments.rounds, arguments.encoded = 2, 2
    console = Console(width=120)
    record = origin(LIBRARIES)
    record["settings"] = {name: value for name, value in vars(arguments).items() if name != "record"}
    with tempfile.TemporaryDirectory() as folder:
        record |= measured(Path(folder), arguments)
    show(record, console)
    if arguments.record:
        write(arguments.record, record)


def measured(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    recipe = load_recipe(RECIPE)
    stage, fields = recipe.stages.coarse, token_fields(recipe.encoders, recipe.quantizers)
    count = count_stage(stage.model, fields, {})
    gpu = find(GPU)
    assert gpu is not None
    assert gpu.bf16 is not None
    eaten = MFU * gpu.bf16 / count.training_flops
    batch = stage.train.windows_a_pass(stage.train.ranks)
    names = [stage.model.field, *(part.field for part in stage.model.conditions)]
    tokens = write_tokens(folder / "tokens", arguments.clips)

    def opened(path: Path, workers: int) -> WindowLoader:
        seconds = stage.model.window_seconds
        return window_loader(
            path,
            "train",
            names,
            seconds,
            batch=batch,
            seed=0,
            global_batch=batch,
            text_probability=0.5,
            workers=workers,
        )

    found: dict[str, Any] = {
        "window": {
            "records_of_a_batch": batch,
            "positions": count.positions,
            "training_flops": count.training_flops,
            "eaten_by_one_gpu": round(eaten, 1),
            "gpu": f"{GPU} at {MFU:.0%} of {gpu.bf16 / 1e12:g} TFLOP/s",
        },
        "loaders": loader_speeds(lambda workers: opened(tokens, workers), arguments, batch, count.positions, eaten),
        "memory": memory(lambda: opened(tokens, 1)),
        "raw_audio": raw_audio(folder, stage.model.window_seconds, arguments),
    }
    index = large_index(tokens, folder / "large", arguments.indexed)
    found["start"] = {
        "records": arguments.indexed,
        "aim_seconds": AIM_START,
        **{f"workers_{workers}": summary([start_up(opened, index, workers) for _ in range(3)]) for workers in (0, 1)},
    }
    return found


def write_tokens(path: Path, clips: int) -> Path:
    recipe = load_recipe(RECIPE)
    fields = token_fields(recipe.encoders, recipe.quantizers)
    seconds, joint, random = recipe.data.clip_seconds, recipe.encoders.joint, np.random.default_rng(0)
    rows = 1 + int((seconds - joint.window_seconds) / joint.hop_seconds)

    def record(number: int) -> dict[str, Any]:
        def codes(name: str, frames: int) -> np.ndarray:
            return random.integers(fields[name].codebook_size, size=(frames, fields[name].quantizers), dtype=np.uint16)

        timed = {name: codes(name, field.frames(seconds)) for name, field in fields.items() if name != CONDITIONING}
        caption = {"captions": '["a caption of the usual length, about so long"]'}
        text = codes(CONDITIONING, 1)
        return {"id": f"clip-{number:07d}", **caption, **timed, CONDITIONING: codes(CONDITIONING, rows)} | {
            "text_conditioning": text
        }

    with artifact.create(path, "tokens", "0" * 16) as (folder, info):
        write_records(folder / "train", map(record, range(clips)))
        info |= {
            "fields": {name: field.to_json() for name, field in fields.items()},
            "clip_seconds": seconds,
            "hop_seconds": joint.hop_seconds,
            "embedding_seconds": joint.window_seconds,
        }
    return path


def loader_speeds(
    opened: Callable[[int], WindowLoader], arguments: argparse.Namespace, batch: int, positions: int, eaten: float
) -> dict[str, Any]:
    seconds: dict[int, list[float]] = {workers: [] for workers in WORKERS}
    for _, workers in itertools.product(range(arguments.rounds), WORKERS):
        loader = opened(workers)
        batches = (one for _ in itertools.count() for one in loader)
        for _ in range(WARM_UP):
            next(batches)
        started = time.perf_counter()
        for _ in range(arguments.batches):
            next(batches)
        seconds[workers].append(time.perf_counter() - started)
        loader.close()
    results = {}
    for workers, times in seconds.items():
        result = summary(times)
        rate = arguments.batches * batch / result["median"]
        results[str(workers)] = {
            **result,
            "records_per_second": round(rate, 1),
            "tokens_per_second": round(rate * positions),
            "gpus_fed": round(rate / eaten, 2),
            "aim_gpus": AIM_GPUS if workers == 1 else None,
        }
    return results


def raw_audio(folder: Path, seconds: float, arguments: argparse.Namespace) -> dict[str, Any]:
    """Windows a second when they are cut from audio and encoded in the training loop, with all cores."""
    from transformers import EncodecConfig, EncodecModel

    torch.manual_seed(0)
    model = EncodecModel(EncodecConfig()).eval()
    rate, random = model.config.sampling_rate, np.random.default_rng(0)
    clip = folder / "clip.flac"
    soundfile.write(clip, random.normal(size=30 * rate) * 0.1, rate)

    def read() -> np.ndarray:
        first = int(random.integers(30 * rate - int(seconds * rate)))
        wave, _ = soundfile.read(clip, int(seconds * rate), first, dtype="float32")
        return wave

    timings: dict[str, list[float]] = {"reading": [], "reading_and_encoding": []}
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        waves = np.stack([read() for _ in range(arguments.encoded)])
        timings["reading"].append(time.perf_counter() - started)
        with torch.inference_mode():
            model.encode(torch.from_numpy(waves)[:, None], bandwidth=6.0)
        timings["reading_and_encoding"].append(time.perf_counter() - started)
    results = {}
    for name, times in timings.items():
        result = summary(times)
        results[name] = {**result, "records_per_second": round(arguments.encoded / result["median"], 1)}
    return results


def memory(opened: Callable[[], WindowLoader]) -> dict[str, Any]:
    """MiB that the process and its worker hold after each epoch."""
    loader, held = opened(), []
    for _ in range(EPOCHS):
        for _ in loader:
            pass
        processes = [psutil.Process(), *psutil.Process().children()]
        held.append(round(sum(process.memory_info().rss for process in processes) / 2**20, 1))
    loader.close()
    return {"resident_mib": held, "growth_mib": round(held[-1] - held[1], 1)}


def large_index(tokens: Path, path: Path, records: int) -> Path:
    """An artifact whose index has so many records, in shards that are links to the first of `tokens`."""
    (path / "train").mkdir(parents=True)
    (path / artifact.MANIFEST).write_bytes((tokens / artifact.MANIFEST).read_bytes())
    entry = json.loads((tokens / "train" / "index.json").read_text())["shards"][0]
    shards = []
    for number in range(-(-records // entry["samples"])):
        name = f"shard.{number:05}.mds"
        (path / "train" / name).symlink_to(tokens / "train" / entry["raw_data"]["basename"])
        shards.append({**entry, "raw_data": {**entry["raw_data"], "basename": name}})
    (path / "train" / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    return path


def start_up(opened: Callable[[Path, int], WindowLoader], path: Path, workers: int) -> float:
    started = time.perf_counter()
    loader = opened(path, workers)
    next(iter(loader))
    seconds = time.perf_counter() - started
    loader.close()
    return seconds


def show(record: dict[str, Any], console: Console) -> None:
    window = record["window"]
    console.print(f"One {window['gpu']} eats {window['eaten_by_one_gpu']:,} windows/s.", highlight=False)
    table = Table()
    for heading in ("windows from", "records/s", "tokens/s", "GPUs fed"):
        table.add_column(heading, justify="left" if heading == "windows from" else "right")
    for workers, result in record["loaders"].items():
        rates = (
            f"{result['records_per_second']:,.0f}",
            f"{result['tokens_per_second']:,}",
            f"{result['gpus_fed']:.2f}",
        )
        table.add_row(f"shards, {workers} workers", *rates)
    for name, result in record["raw_audio"].items():
        share = result["records_per_second"] / window["eaten_by_one_gpu"]
        rate = result["records_per_second"]
        table.add_row(
            f"audio, {name.replace('_', ' ')}", f"{rate:,.1f}", f"{rate * window['positions']:,.0f}", f"{share:.2f}"
        )
    console.print(table)
    fed, start = record["loaders"]["1"]["gpus_fed"], record["start"]
    console.print(
        f"One worker feeds {fed:g} GPUs ({AIM_GPUS:g} {'met' if fed >= AIM_GPUS else 'not met'}).", highlight=False
    )
    slowest = max(start[f"workers_{workers}"]["median"] for workers in (0, 1))
    met = "met" if slowest < AIM_START else "not met"
    console.print(
        f"First batch of {start['records']:,} records: {slowest:.2f} s (below {AIM_START:g} s {met}).", highlight=False
    )
    console.print(f"Resident MiB after each epoch: {record['memory']['resident_mib']}", highlight=False)


if __name__ == "__main__":
    main()
