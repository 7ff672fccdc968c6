"""Measures `stretto convert --to fp32` beside DeepSpeed's own zero_to_fp32 on the same checkpoint of ZeRO-3.

    python benchmarks/convert.py benchmarks/records/convert.json

The checkpoint is of 1 B parameters and 4 ranks, with random weights and moments: 12 GB. It is built rank by rank
without an engine, in the files, keys, classes and order of DeepSpeed 0.19's ZeRO-3 engine: of each parameter a rank has
an equal part, padded, and all its parts lie end to end. That both read it, and to the same weights, is checked.

Each conversion is a command in a process of its own, which reads files that are not in the system's cache and writes
to the same disk. They take turns. Peak memory is the kernel's count of the process (VmHWM), libraries included; pages
of files that a process has mapped count in it, so its own (anonymous) memory is told apart, both looked at every 20 ms.
The time is that of the whole command, and then again until what it wrote is on the disk: ours is when it ends, since it
syncs, reads back and digests all it writes. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import gib, origin, ratio_table, ratios, summary, write
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

LIBRARIES = ("torch", "deepspeed", "safetensors", "numpy")
OURS, PEER, PEER_PLAIN = CONTESTANTS = ("stretto convert", "zero_to_fp32, safetensors", "zero_to_fp32")
AIMS = {"memory": 0.5, "time": 1.0}
"""At most so much of the peer's peak memory, and at least so many times its speed."""
TAG = "global_step1000"
POLL_SECONDS = 0.02
Shapes = OrderedDict[str, torch.Size]


def main() -> None:
    arguments = parse()
    console = Console(width=120)
    record = origin(LIBRARIES)
    record["settings"] = {name: value for name, value in vars(arguments).items() if name not in ("record", "folder")}
    shapes = shapes_of(arguments)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTESTANTS}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        make(folder / "checkpoint", shapes, arguments)
        files = sorted(path for path in (folder / "checkpoint").rglob("*") if path.is_file())
        for number in range(arguments.rounds):
            for contestant in CONTESTANTS if number % 2 == 0 else CONTESTANTS[::-1]:
                forget(files)
                runs[contestant].append(measured(command(contestant, folder), folder / contestant))
                console.print(f"{contestant}: {runs[contestant][-1]}", highlight=False)
            if number == 0:
                check_alike(folder / OURS, folder / PEER, shapes)
            for contestant in CONTESTANTS:
                shutil.rmtree(folder / contestant)
        record["checkpoint_bytes"] = sum(path.stat().st_size for path in files)
    record["parameters"] = sum(map(math.prod, shapes.values()))
    record["largest_parameter_gib"] = gib(max(4 * math.prod(shape) for shape in shapes.values()))
    record["results"] = {name: result(own) for name, own in runs.items()}
    record["ratios"] = ratios([(OURS, PEER, AIMS["time"]), (OURS, PEER_PLAIN, None)], times(record, "command"))
    record["ratios_on_disk"] = ratios([(OURS, PEER, None), (OURS, PEER_PLAIN, None)], times(record, "until_on_disk"))
    ours, peer = (record["results"][name]["peak_memory_gib"] for name in (OURS, PEER))
    record["memory_share"] = {"of": PEER, "share": round(ours / peer, 3), "aim": AIMS["memory"]}
    console.print(table(record))
    console.print(ratio_table(record["ratios"]))
    if arguments.record:
        write(arguments.record, record)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--layers", type=int, default=19)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3, help="conversions by each")
    parser.add_argument("--folder", type=Path, help="where all is written; a temporary one when not given")
    parser.add_argument("--small", action="store_true", help="a tiny model, once: to see that this works")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.layers, arguments.dim, arguments.rounds = 2, 64, 1
    return arguments


def shapes_of(arguments: argparse.Namespace) -> Shapes:
    """Of the parameters of a Llama."""
    dim = arguments.dim
    hidden = round(dim * 2.6875)
    shapes: Shapes = OrderedDict({"embedding.weight": torch.Size([9 * dim, dim])})
    for layer in range(arguments.layers):
        name = f"layers.{layer}"
        shapes |= {f"{name}.attention.{part}.weight": torch.Size([dim, dim]) for part in "qkvo"}
        shapes |= {f"{name}.feed_forward.{part}.weight": torch.Size([hidden, dim]) for part in ("gate", "up")}
        shapes[f"{name}.feed_forward.down.weight"] = torch.Size([dim, hidden])
        shapes |= {f"{name}.{part}_norm.weight": torch.Size([dim]) for part in ("attention", "feed_forward")}
    shapes["norm.weight"] = torch.Size([dim])
    return shapes


def make(folder: Path, shapes: Shapes, arguments: argparse.Namespace) -> None:
    """Writes what the engines of all ranks would."""
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum

    made_by = version("deepspeed")

    (folder / TAG).mkdir(parents=True)
    (folder / "latest").write_text(TAG)
    settings = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": True}, "train_micro_batch_size_per_gpu": 1}
    count = sum(math.ceil(math.prod(shape) / arguments.ranks) for shape in shapes.values())
    group = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "params": [0]}
    for rank in range(arguments.ranks):
        generator = torch.Generator().manual_seed(rank)
        flat, first, second = (torch.empty(count).normal_(generator=generator) for _ in range(3))
        optimizer = {
            "zero_stage": ZeroStageEnum.weights,
            "loss_scaler": LossScaler(scale=1.0),
            "dynamic_loss_scale": False,
            "overflow": False,
            "partition_count": arguments.ranks,
            "optimizer_state_dict": {
                "state": {0: {"step": torch.tensor(1000.0), "exp_avg": first, "exp_avg_sq": second.square_()}},
                "param_groups": [group],
            },
            "fp32_flat_groups": [flat],
        }
        name = f"zero_pp_rank_{rank}_mp_rank_00"
        state = {"optimizer_state_dict": optimizer, "ds_config": settings, "ds_version": made_by}
        torch.save(state, folder / TAG / f"bf16_{name}_optim_states.pt")
        torch.save(model_state(shapes, settings, arguments.ranks, made_by), folder / TAG / f"{name}_model_states.pt")
    os.sync()


def model_state(shapes: Shapes, settings: dict[str, Any], ranks: int, made_by: str) -> dict[str, Any]:
    """The same on all ranks: the parameters are elsewhere."""
    nothing = ("optimizer", "lr_scheduler", "data_sampler", "random_ltd")
    return {
        "module": OrderedDict((name, torch.empty(0, dtype=torch.bfloat16)) for name in shapes),
        "buffer_names": [],
        "param_shapes": [shapes],
        "frozen_param_shapes": OrderedDict(),
        "frozen_param_fragments": OrderedDict(),
        "shared_params": {},
        **dict.fromkeys(nothing),
        "skipped_steps": 0,
        "global_steps": 1000,
        "global_samples": 1000 * ranks,
        "dp_world_size": ranks,
        "mp_world_size": 1,
        "ds_config": settings,
        "ds_version": made_by,
    }


def command(contestant: str, folder: Path) -> list[str]:
    paths = [str(folder / "checkpoint"), str(folder / contestant)]
    if contestant == OURS:
        return [sys.executable, "-m", "launcher", "convert", *paths, "--to", "fp32"]
    safe = ["--safe_serialization"] if contestant == PEER else []
    return [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", *paths, *safe]


def forget(files: list[Path]) -> None:
    """Takes files out of the system's cache."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def measured(arguments: list[str], output: Path) -> dict[str, Any]:
    """Runs a command; seconds, and bytes that it held at most."""
    started = time.perf_counter()
    peak, anonymous, log = 0, 0, output.with_name(f"{output.name}.txt")
    with log.open("w") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=file)
    while True:
        held = memory(process.pid)
        # What wait4 tells would count what this process held when it started the command.
        peak, anonymous = max(peak, held.get("VmHWM", 0)), max(anonymous, held.get("RssAnon", 0))
        if process.poll() is not None:
            break
        time.sleep(POLL_SECONDS)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise SystemExit(f"{arguments} failed:\n{log.read_text()}")
    for path in output.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
    on_disk = time.perf_counter() - started
    return {
        "seconds": round(seconds, 3),
        "on_disk": round(on_disk, 3),
        "peak_memory": peak,
        "anonymous": anonymous,
    }


def memory(pid: int) -> dict[str, int]:
    """Bytes that a process holds, as the kernel tells them apart; nothing of one that has ended."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    pairs = (line.split(":") for line in lines if line.startswith(("VmHWM:", "RssAnon:")))
    return {name: int(value.split()[0]) * 1024 for name, value in pairs}


def check_alike(ours: Path, peer: Path, shapes: Shapes) -> None:
    """Both have made the same weights."""
    found: list[dict[str, Any]] = []
    for folder in (ours, peer):
        opened = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
        found.append({name: file for file in opened for name in file.keys()})  # noqa: SIM118 (it is not a mapping)
    assert found[0].keys() == found[1].keys() == shapes.keys()
    for name in shapes:
        assert torch.equal(*(files[name].get_tensor(name) for files in found)), name


def result(runs: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "command": summary([run["seconds"] for run in runs]),
        "until_on_disk": summary([run["on_disk"] for run in runs]),
        "peak_memory_gib": gib(median(run["peak_memory"] for run in runs)),
        "anonymous_gib": gib(median(run["anonymous"] for run in runs)),
    }


def times(record: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    return {name: own[key] for name, own in record["results"].items()}


def table(record: dict[str, Any]) -> Table:
    millions, share = record["parameters"] / 1e6, record["memory_share"]
    met = "met" if share["share"] <= share["aim"] else "not met"
    found = Table(
        title=f"{millions:,.1f} M parameters, {record['checkpoint_bytes'] / 1e9:.2f} GB in all",
        caption=f"peak memory {share['share']:.2f} of {share['of']}'s, aim at most {share['aim']}: {met}",
        title_justify="left",
        caption_justify="left",
    )
    found.add_column("")
    for heading in ("median s", "best s", "until on disk s", "peak GiB", "of which not files"):
        found.add_column(heading, justify="right")
    for name, own in record["results"].items():
        seconds = [own["command"]["median"], own["command"]["best"], own["until_on_disk"]["median"]]
        memory = [own["peak_memory_gib"], own["anonymous_gib"]]
        found.add_row(name, *(f"{value:.2f}" for value in [*seconds, *memory]))
    return found


if __name__ == "__main__":
    main()
