"""A run folder as a finished quickstart leaves it, made in a second: its figures are invented, its files are real."""

from __future__ import annotations

import json
import math
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from safetensors.numpy import save_file

from data.corpus import Clip, write_clips, write_jsonl
from data.shard_writer import write_records
from data.synthesis import combinations, render
from launcher.recipe import dump_recipe, load_recipe
from model import artifact
from model.counting import token_fields

RATE = 16_000
TIMES = {
    "corpus": 22.0, "codec": 9.0, "embedding": 41.0, "quantizers": 6.0, "tokens": 15.0,
    "semantic": 110.0, "coarse": 121.0, "fine": 64.0, "bundle": 2.0, "samples": 38.0,
}  # fmt: skip
ADHERENCE = {
    "generated": {"instrument": 0.75, "register": 1.0, "tempo": 0.59, "drums": 0.81, "mean": 0.79},
    "shuffled": {"instrument": 0.19, "register": 0.5, "tempo": 0.34, "drums": 0.5, "mean": 0.38},
    "chance": {"instrument": 0.2, "register": 0.5, "tempo": 0.33, "drums": 0.5, "mean": 0.38},
    "ceiling": {"instrument": 0.98, "register": 1.0, "tempo": 0.96, "drums": 1.0, "mean": 0.985},
    "real": {"instrument": 1.0, "register": 1.0, "tempo": 0.98, "drums": 1.0, "mean": 0.995},
}
QUANTIZERS = {
    "conditioning": {
        "codebook_size": 8,
        "measured": {
            "audio": {
                "train": {"vectors": 1256, "variance_left": [0.62, 0.2], "usage": [1, 0.5], "perplexity": [7, 4]},
                "validation": {"vectors": 100, "variance_left": [0.64, 0.3], "usage": [1, 0.5], "perplexity": [7, 4]},
            },
        },
    },
    "semantic": {"codebook_size": 256, "measured": {}},
}
SKIPPED = [
    {"file": "take <2>.wav", "reason": "silent", "detail": "its loudest 50 ms stay below -60 dB", "clips": 0},
    {"file": "notes.mp3", "reason": "unreadable", "detail": "not an audio file", "clips": 0},
]


def make_run(
    run: Path, *, captions: bool = True, attributes: bool = True, samples: int = 14, overrides: tuple[str, ...] = ()
) -> Path:
    """Fills the folder `run`. Without `attributes` it is that of a user's own corpus."""
    # Its own numbers: the recipe is tuned now and then.
    steps = [
        f"stages.{name}.train.steps={count}" for name, count in (("semantic", 600), ("coarse", 600), ("fine", 300))
    ]
    recipe = load_recipe(
        "quickstart", [*steps, "stage_defaults.model.transformer={dim: 256, layers: 4, heads: 4}", *overrides]
    )
    run.mkdir(parents=True)
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    fields = {name: field.to_json() for name, field in token_fields(recipe.encoders, recipe.quantizers).items()}
    _corpus(run, captions, attributes)
    with artifact.create(run / "quantizers", "quantizers", "4" * 16) as (_, info):
        info.update(QUANTIZERS)
    with artifact.create(run / "tokens", "tokens", "5" * 16) as (folder, info):
        for split in ("train", "validation"):
            make_shards(folder / split, fields)
        info.update(fields=fields, clip_seconds=5.0, captions=captions, records={"train": 5, "validation": 5})
    for number, (name, stage) in enumerate(recipe.stages):
        make_stage(run / name, name, 256, stage.train.steps, listens=name != "coarse", fingerprint=str(number) * 16)
    with artifact.create(run / "bundle", "bundle", "b" * 16, {"semantic": "0" * 16}) as (folder, info):
        save_file({"embedding.weight": np.zeros((16, 8), np.float32)}, folder / "semantic.safetensors")
        (folder / "README.md").write_text("# A model")
        info.update(recipe=recipe.name, captions=captions, fields=fields)
    _samples(run, captions, attributes, samples)
    stages = {
        name: {"state": "done", "started": 0.0, "finished": seconds, "seconds": seconds, "reused": False, "error": None}
        for name, seconds in TIMES.items()
    }
    write_state(run, stages)
    return run


def write_state(run: Path, stages: dict[str, Any]) -> None:
    (run / "state.json").write_text(json.dumps({"format_version": 1, "recipe": "quickstart", "stages": stages}))


def make_shards(folder: Path, fields: dict[str, Any]) -> None:
    """Five records of random codes."""
    random = np.random.default_rng(0)

    def codes(name: str) -> np.ndarray:
        field = fields[name]
        shape = (round(5 * field["rate_hz"]), field["quantizers"])
        return random.integers(field["codebook_size"], size=shape).astype(np.uint16)

    records = [
        {"id": f"clip-{number}", "captions": '["a tune"]', "text_conditioning": codes("conditioning")}
        | {name: codes(name) for name in fields}
        for number in range(5)
    ]
    write_records(folder, records, [{"seconds": 5.0}] * 5)


def metrics(name: str, codes: int, steps: int, listens: bool) -> list[dict[str, Any]]:
    """Rows as training writes them; a stage that does not listen loses nothing by shuffled conditions."""
    fields = {
        "semantic": ["conditioning"],
        "coarse": ["conditioning", "semantic"],
        "fine": ["conditioning", "acoustic"],
    }
    rows = []
    for step in range(0, steps + 1, 10):
        loss, now = 1.8 + (math.log(codes) - 1.8) * math.exp(-step / 120), 1e9 + step / 5
        if step:
            speeds = {"windows_per_second": 160.0, "tokens_per_second": 20_000.0}
            figures = {"loss": loss + 0.03 * math.sin(step), "learning_rate": 1e-3, "gradient_norm": 0.7}
            rows.append({"kind": "train", "step": step, "time": now, **figures, **speeds})
        if step % 100 == 0:
            rise = step / steps * 0.9
            shuffled = {field: loss + (rise if listens or field != "conditioning" else 0.001) for field in fields[name]}
            row = {"kind": "validation", "step": step, "time": now, "loss": loss + 0.05, "quantizers": [loss]}
            rows.append({**row, "shuffled": {field: value + 0.05 for field, value in shuffled.items()}, "text": loss})
    return rows


def make_stage(folder: Path, name: str, codes: int, steps: int, listens: bool, fingerprint: str) -> None:
    """A trained stage: metrics, weights and manifest."""
    folder.mkdir()
    write_jsonl(folder / "metrics.jsonl", metrics(name, codes, steps, listens))
    save_file({"heads": np.zeros((3, codes, 8), np.float32)}, folder / "model.safetensors")
    info = {
        "steps": steps, "parameters": 3_772_160,
        "model": {"field": "semantic" if name == "semantic" else "acoustic"},
    }  # fmt: skip
    artifact.write_manifest(folder, "stage", fingerprint, info=info, names=["model.safetensors"])


def _corpus(run: Path, captions: bool, attributes: bool) -> None:
    with artifact.create(run / "corpus", "corpus", "c" * 16) as (folder, info):
        words = ("a <b>slow</b> flute & drums",) if captions else ()
        write_clips(folder, [Clip("clip-00000", "audio/clip-00000.flac", 0.0, 5.0, words, "train")])
        write_jsonl(folder / "skipped.jsonl", [] if attributes else SKIPPED)
        info.update(clips=2040, splits={"train": 1900, "validation": 100, "held_out": 40}, captions=captions, skipped=0)
        info["held_out_combinations"] = combinations()[:2] if attributes else []
        if not attributes:
            reasons = {row["reason"]: 1 for row in SKIPPED}
            info.update(files=12, seconds=10_200.0, captioned=2040 * captions, skipped=2, skipped_reasons=reasons)


def _samples(run: Path, captions: bool, attributes: bool, count: int) -> None:
    every = combinations()
    with artifact.create(run / "samples", "samples", "a" * 16) as (folder, info):
        made, real = [], []
        for kind, number, rows in (("wav", count, made), ("real", 4, real)):
            (folder / kind).mkdir()
            for index in range(number):
                asked = every[7 * index % len(every)]
                wave = render({**asked, "mode": "major"}, kind == "real", index, 2.0, RATE)
                soundfile.write(folder / kind / f"{index:02d}.wav", wave, RATE, subtype="PCM_16")
                text = f"a {asked['tempo']} <i>{asked['instrument']}</i> & {asked['register']} notes, {asked['drums']}"
                row = {"wav": f"{kind}/{index:02d}.wav", "attributes": asked if attributes else None}
                if kind == "wav":
                    judged = {**asked, "tempo": "slow"} if attributes else None
                    rows.append({"prompt": text if captions else f"like clip-{index}", "judged": judged, **row})
                else:
                    rows.append({"id": f"clip-{index:05d}", "captions": [text] if captions else [], **row})
        write_jsonl(folder / "samples.jsonl", made)
        write_jsonl(folder / "real.jsonl", real)
        info.update(prompts=count, seconds=2.0, captions=captions, adherence=ADHERENCE if attributes else None)


def running(run: Path, stage: str, pid: int) -> None:
    """Makes `run` look as if the launcher `pid` were at `stage`, and nothing later had been made."""
    record = json.loads((run / "state.json").read_text())["stages"]
    names = list(TIMES)
    for name in names[names.index(stage) :]:
        record[name] = {"state": "running" if name == stage else "waiting", "reused": False, "error": None}
        (run / name / "manifest.json").unlink(missing_ok=True)
    record[stage]["started"] = time.time() - 30
    write_state(run, record)
    (run / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": pid, "since": time.time()}))
