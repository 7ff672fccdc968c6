"""The sampling section of `gpu.py`: codes a second, and seconds of music a second, of one stage."""

from __future__ import annotations

import time
from typing import Any

import torch
from common import gib, summary
from gpu_session import Session, Size, failure_kept
from rich.table import Table
from stages import random_codes, synchronizer
from train_speed import parameters

from model.config import ExecutionConfig
from model.sampling import Sampler, generate_stage
from model.stage import StageTransformer

BATCHES = (1, 8, 32)


def sample(session: Session, name: str, size: Size) -> None:
    """One size: a window of the coarse stage, at several batches."""
    stage = session.new_stage(size.recipe(), ExecutionConfig()).eval()
    steps = stage.pattern(stage.target.frames(size.window_seconds)).steps
    entry = session.header() | {"parameters": parameters(stage), "window_seconds": size.window_seconds, "steps": steps}
    entry["results"] = results = {}
    for batch in BATCHES:
        if not session.time_is_up():
            results[f"batch {batch}"] = said = {}
            with failure_kept(said):
                said |= timed(session, size, stage, batch)
            session.say(f"sampling, {name}, batch {batch}: {said}")
            session.save("decode", name, entry)
    session.console.print(table(name, entry))


def timed(session: Session, size: Size, stage: StageTransformer, batch: int) -> dict[str, Any]:
    window, recipe = size.window_seconds, size.recipe()
    context = random_codes(recipe, window, batch, session.device)
    sampler = Sampler(cfg=session.arguments.cfg)
    synchronize = synchronizer(session.device)
    if session.on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(session.arguments.rounds + 1):
        synchronize()
        started = time.perf_counter()
        codes = generate_stage(stage, context, window, sampler, list(range(batch)))
        synchronize()
        seconds.append(time.perf_counter() - started)
    timing = summary(seconds[1:])  # the first one makes tables and takes memory
    return {
        **timing,
        "codes_per_second": round(codes.numel() / timing["median"], 1),
        "real_time_factor": round(batch * window / timing["median"], 3),
        **({"peak_memory_gib": gib(torch.cuda.max_memory_allocated())} if session.on_gpu else {}),
    }


def table(name: str, entry: dict[str, Any]) -> Table:
    made = Table(title=f"Sampling the coarse stage, {name}: {entry['steps']:,} steps a window", title_justify="left")
    made.add_column("")
    for heading in ("best s", "median s", "ms a step", "codes/s", "seconds of music/s"):
        made.add_column(heading, justify="right")
    for batch, result in entry["results"].items():
        if "failed" in result:
            made.add_row(batch, result["failed"])
            continue
        step = f"{1000 * result['median'] / entry['steps']:.2f}"
        rate = f"{result['codes_per_second']:,.0f}", f"{result['real_time_factor']:.2f}"
        made.add_row(batch, f"{result['best']:.2f}", f"{result['median']:.2f}", step, *rate)
    return made
