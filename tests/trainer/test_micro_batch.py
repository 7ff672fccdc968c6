"""`micro_batch: auto`: trial steps find what fits, leave no trace, and what they found is written down and kept."""

from __future__ import annotations

import gc
import json
import resource
import weakref
from pathlib import Path

import pytest
from ranks import run_ranks, start_ranks
from training_runs import make_run, rows, weights_digest

from trainer import memory
from trainer.micro_batch import FOUND, Trial, search

MIB = 1 << 20
WIDE = {"transformer": {"dim": 256, "layers": 2, "heads": 4}}
SETTINGS = {"steps": 2, "warmup_steps": 1, "log_every": 1, "global_batch": 48, "validate_every": 99}
ROOM = 190 * MIB
"""Enough for the libraries that a first step loads, and for some of the windows."""


def searched(candidates, limit, at_rest=None, peak=lambda windows: 100 + 10 * windows, ends_at=10**9):
    """The micro batches that were tried, and those that fit; more than `ends_at` bytes are not to be had."""

    def trial(windows):
        bytes_ = peak(windows)
        return Trial(windows, bytes_ <= min(limit, ends_at), bytes_ if bytes_ <= ends_at else None)

    trials = search(candidates, trial, limit, at_rest)
    return [one.micro_batch for one in trials], [one.micro_batch for one in trials if one.fits]


DIVISORS = [1, 2, 3, 4, 6, 8, 12, 16, 24, 48]


def test_few_trials_find_the_largest():
    assert searched(DIVISORS, 230) == ([1, 2, 12], [1, 2, 12])
    assert searched(DIVISORS, 10_000) == ([1, 2, 48], [1, 2, 48])
    assert searched(DIVISORS, 230, at_rest=90) == ([1, 6, 12], [1, 6, 12])
    assert searched(DIVISORS, 115) == ([1, 2], [1])
    assert searched(DIVISORS, 100) == ([1], [])
    assert searched([1], 230) == ([1], [1])


def test_nothing_is_tried_that_is_known_not_to_fit():
    assert searched(DIVISORS, 119, at_rest=100) == ([1], [1])


def test_where_memory_ends_before_the_line_says_so_the_next_smaller_one_is_tried():
    assert searched(DIVISORS, 230, ends_at=200)[1][-1] == 8
    assert searched(DIVISORS, 230, ends_at=115) == ([1, 2], [1])


def job(run, room=None, cap=None):
    """Trains with `room` bytes free for each rank; no more than `cap` bytes beyond what is held are to be had in the
    trials."""
    from trainer import micro_batch
    from trainer.__main__ import train

    if room is not None:
        micro_batch.USABLE, micro_batch.free_memory = 1.0, lambda: room
    if cap is not None:
        held, find = micro_batch.held_memory, micro_batch.with_micro_batch

        def limited():
            data = 1024 * int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0])
            resource.setrlimit(resource.RLIMIT_DATA, (data + cap, resource.RLIM_INFINITY))
            return held()

        def limited_find(*arguments):
            setup = find(*arguments)
            resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            return setup

        micro_batch.held_memory, micro_batch.with_micro_batch = limited, limited_find
    return train(run, "coarse")


def found(run):
    return json.loads((run / "coarse" / FOUND).read_text())


@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_what_fits_is_found_and_trained_with_as_if_the_recipe_had_said_it(tmp_path, zero):
    settings = {**SETTINGS, "zero": zero, "ema_decay": 0.9}
    run = make_run(tmp_path / "auto", WIDE, micro_batch="auto", **settings)
    run_ranks(job, 2, tmp_path / "log", run, ROOM)
    finding = found(run)
    number = finding["micro_batch"]
    assert 1 <= number < 24
    assert finding["accumulation"] * number * 2 == 48
    fitting = [trial for trial in finding["trials"] if trial["fits"]]
    assert fitting[-1]["micro_batch"] == number
    assert fitting[-1]["peak"] <= finding["limit"]
    said = make_run(tmp_path / "said", WIDE, micro_batch=number, **settings)
    run_ranks(job, 2, tmp_path / "log", said)
    assert weights_digest(run) == weights_digest(said)
    assert [row["loss"] for row in rows(run, "train")] == [row["loss"] for row in rows(said, "train")]


def test_what_was_found_is_kept_for_the_same_ranks_and_sought_again_for_others(tmp_path):
    run = make_run(tmp_path / "run", WIDE, micro_batch="auto", **SETTINGS)
    run_ranks(job, 2, tmp_path / "log", run, ROOM)
    first = found(run)
    run_ranks(job, 2, tmp_path / "log", run, 6000 * MIB)
    assert found(run) == first
    run_ranks(job, 1, tmp_path / "log", run, 6000 * MIB)
    assert (found(run)["micro_batch"], found(run)["for"]["ranks"]) == (48, 1)


def test_memory_that_runs_out_in_a_trial_ends_that_trial_alone(tmp_path):
    run = make_run(tmp_path / "run", WIDE, micro_batch="auto", precision="fp32", **{**SETTINGS, "global_batch": 192})
    run_ranks(job, 1, tmp_path / "log", run, 100_000 * MIB, 600 * MIB)
    assert next(trial["peak"] for trial in found(run)["trials"] if not trial["fits"]) is None
    assert 1 <= found(run)["micro_batch"] < 192
    assert [row["step"] for row in rows(run, "train")] == [1, 2]


def test_where_not_even_one_window_fits_all_ranks_say_so(tmp_path):
    run = make_run(tmp_path / "run", WIDE, micro_batch="auto", **SETTINGS)
    ranks = start_ranks(job, 2, tmp_path / "log", run, 0)
    assert ranks.wait(60) == [2, 2]
    assert ranks.output().count("not even one window at a time fits into the") == 2


def kept_after_a_trial(run):
    """What of a trial's weights is still there after it."""
    from trainer import micro_batch
    from trainer.engine import Engine, start_process_group
    from trainer.setup import StageSetup

    start_process_group()
    weights = []

    class Watched(Engine):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            weights.extend(weakref.ref(parameter) for parameter in self.module.parameters())
            weights.extend(weakref.ref(value) for part in self.held() for value in part.tensors.values())

    micro_batch.Engine = Watched
    micro_batch.with_micro_batch(StageSetup.read(run, "coarse"), lambda _: None)
    gc.collect()
    assert weights
    assert [kept().shape for kept in weights if kept() is not None] == []


@pytest.mark.parametrize(
    ("zero", "precision"),
    [
        ("zero0", "fp32"),
        ("zero0", "bf16"),
        ("zero1", "fp32"),
        ("zero2", "bf16"),
        ("zero3", "bf16"),
        ("zero3_offload", "fp32"),
    ],
)
def test_a_trial_gives_its_memory_back(tmp_path, zero, precision):
    run = make_run(tmp_path / "run", micro_batch="auto", precision=precision, zero=zero)
    run_ranks(kept_after_a_trial, 1, tmp_path / "log", run)


def test_a_control_group_limits_what_is_free(tmp_path, monkeypatch):
    own = tmp_path / "job" / "step"
    own.mkdir(parents=True)
    for folder, most in ((own, "max"), (tmp_path / "job", f"{1000 * MIB}")):
        (folder / "memory.max").write_text(most + "\n")
        (folder / "memory.current").write_text(f"{700 * MIB}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {100 * MIB}\n")
    monkeypatch.setattr(memory, "_own_group", lambda: "job/step")
    assert memory._left_in_groups(tmp_path) == [400 * MIB]
