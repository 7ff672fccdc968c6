"""Metrics of a training that goes on, in its files and in Weights & Biases."""

from __future__ import annotations

import json
import os
import signal
import sys
from types import ModuleType

import pytest
from ranks import run_ranks, start_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import job, make_run, rows

from trainer.callback import Callback
from trainer.exit_codes import SAVED

TOKENS = 2 * 20 * 2
"""Of a window: seconds, frames a second, codes a frame."""


class FakeWandb(ModuleType):
    """Stands for the wandb package: writes down what it is told, a line a call."""

    class Error(Exception):
        pass

    def __init__(self, path):
        super().__init__("wandb")
        self.path = path

    def tell(self, call, **values):
        with self.path.open("a") as file:
            file.write(json.dumps({"call": call, "rank": os.environ["RANK"], **values}) + "\n")

    def init(self, **settings):
        if os.environ.get("WANDB_FAILS"):
            raise self.Error("api_key not configured (no-tty)")
        self.tell("init", **{name: value for name, value in settings.items() if name != "settings"})
        return self

    def Settings(self, **settings):
        return settings

    def define_metric(self, name, step_metric):
        self.tell("define_metric", name=name, step_metric=step_metric)

    def log(self, values):
        self.tell("log", values=values)

    def finish(self):
        self.tell("finish")


def with_wandb(run, stop_at=None):
    class Stop(Callback):
        def after_step(self, training, losses):
            if training.step == stop_at and training.engine.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    sys.modules["wandb"] = FakeWandb(run / "wandb.jsonl")
    return job(run, Stop())


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A training that was stopped at step 5 of 9; two rows and a torn one after that step were left behind."""
    folder = tmp_path_factory.mktemp("resumed")
    run = make_run(folder / "run", steps=9, log_every=1, validate_every=9, checkpoint_every=100, wandb="tunes")
    ranks = start_ranks(with_wandb, 2, folder / "first", run, 5, WANDB_API_KEY="a-secret-key")
    assert ranks.wait() == [SAVED, SAVED], ranks.output()
    with (run / "coarse" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 6, "loss": 99.0}\n{"kind": "train", "step": 7, "loss": 99.0}\n{"kind')
    run_ranks(with_wandb, 2, folder / "second", run, WANDB_API_KEY="a-secret-key")
    return run


def test_what_was_consumed_goes_on_over_a_resume(resumed):
    assert [row["consumed"]["windows"] for row in rows(resumed, "train")] == [8 * step for step in range(1, 10)]
    assert rows(resumed, "train")[-1]["consumed"]["tokens"] == 9 * 8 * TOKENS
    manifest = json.loads((resumed / "coarse" / "checkpoints" / "step-00000009" / "manifest.json").read_text())
    assert manifest["info"]["consumed"] == {"windows": 9 * 8, "tokens": 9 * 8 * TOKENS}


def test_rows_after_the_step_that_training_goes_on_from_are_dropped(resumed):
    assert [row["step"] for row in rows(resumed, "train")] == list(range(1, 10))
    assert all(row["loss"] < 20 for row in rows(resumed, "train"))
    assert [row["step"] for row in rows(resumed, "validation")] == [0, 9]
    board = EventAccumulator(str(resumed / "coarse" / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 10))


def test_weights_and_biases_has_one_run_of_both_halves(resumed):
    calls = [json.loads(line) for line in (resumed / "wandb.jsonl").read_text().splitlines()]
    assert {call["rank"] for call in calls} == {"0"}
    first, second = (call for call in calls if call["call"] == "init")
    assert first["id"] == second["id"]
    assert (first["project"], first["resume"]) == ("tunes", "allow")
    assert first["config"]["train"]["global_batch"] == 8
    logged = [call["values"] for call in calls if call["call"] == "log" and "train/loss" in call["values"]]
    assert [values["step"] for values in logged] == list(range(1, 10))
    assert logged[0]["train/loss"] == pytest.approx(rows(resumed, "train")[0]["loss"])
    assert [call["call"] for call in calls].count("finish") == 2


def test_no_key_is_written_anywhere(resumed):
    files = [path for path in resumed.parent.rglob("*") if path.is_file()]
    assert not [path for path in files if b"a-secret-key" in path.read_bytes()]


def without_wandb(run):
    sys.modules["wandb"] = None  # as import finds it where it is not installed
    return job(run)


@pytest.mark.parametrize(
    ("rank_function", "env", "advice"),
    [(without_wandb, {}, "pip install 'stretto[wandb]'"), (with_wandb, {"WANDB_FAILS": "1"}, "wandb login")],
    ids=["missing", "no key"],
)
def test_weights_and_biases_that_does_not_work_ends_every_rank_with_advice(tmp_path, rank_function, env, advice):
    run = make_run(tmp_path / "run", steps=5, wandb="tunes")
    ranks = start_ranks(rank_function, 2, tmp_path / "ranks", run, **env)
    assert ranks.wait() == [2, 2], ranks.output()
    for path in (tmp_path / "ranks").iterdir():
        assert advice in path.read_text()
        assert "Traceback" not in path.read_text()
