"""What training writes of itself, and that it does so without holding itself up, in jobs of tiny stages."""

from __future__ import annotations

import gc
import json
import logging
import os
import re
import signal
import socket
import sys
import time
import traceback
from itertools import product
from types import ModuleType

import pytest
import torch
from helpers import FIELDS, SMALL, coarse_config, quantizers
from ranks import run_ranks, start_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import make_run, rows

from data.processes import plain_errors
from model.counting import count_stage
from model.initialisation import parameter_groups
from model.stage import build_stage
from trainer.callback import Callback
from trainer.exit_codes import SAVED
from trainer.flops import ModelFlops
from trainer.metrics_reader import TAIL_BYTES, last_metrics, read_metrics
from trainer.metrics_writer import JsonLines
from trainer.stragglers import Stragglers

PEAK = 1e12
WINDOW = 2.0
"""Seconds; of the coarse stage's two codes a frame, 20 frames a second."""
TOKENS = int(WINDOW * 20 * 2)


def job(run, *more):
    """A rank of the training, with more callbacks."""
    import trainer.training
    from trainer.__main__ import train

    usual = trainer.training.callbacks
    trainer.training.callbacks = lambda setup, engine: [*usual(setup, engine), *more]
    with plain_errors(run):
        return train(run, "coarse")


def log_of(run, rank=0):
    return (run / "coarse" / "logs" / f"rank-{rank:04d}.log").read_text()


def centroid_dims():
    return {name: value.shape[-1] for name, value in quantizers().items()}


# What the rows say


def on_a_known_device(run):
    import trainer.flops

    trainer.flops.peak_flops = lambda name, precision: PEAK
    return job(run)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("metrics")
    run = make_run(folder / "run", steps=12, log_every=4, validate_every=6, checkpoint_every=6, profile=(6, 7))
    run_ranks(on_a_known_device, 2, folder / "ranks", run)
    return run


def test_a_row_says_how_training_goes(trained):
    found = rows(trained, "train")
    assert [row["step"] for row in found] == [4, 8, 12]
    for row in found:
        assert row["loss"] == pytest.approx(sum(row["quantizers"]) / 2)
        assert row["consumed"] == {"windows": 8 * row["step"], "tokens": 8 * row["step"] * TOKENS}
        assert (row["updates"], row["skipped"]) == (row["step"], 0)
        assert row["windows_per_second"] == pytest.approx(8 / row["step_seconds"])
        assert row["tokens_per_second"] == pytest.approx(TOKENS * row["windows_per_second"])
        assert row["audio_seconds_per_second"] == pytest.approx(WINDOW * row["windows_per_second"])
        assert 0 < row["data_wait"] < 1
        assert 0 <= row["checkpoint_stall"] < 1
        assert row["memory"] > 50e6
        own = row["rank_seconds"]
        assert 0 < own["min"] <= own["median"] <= own["max"] < row["step_seconds"]
    assert found[1]["checkpoint_stall"] > found[0]["checkpoint_stall"] == 0


def test_mfu_is_the_formulas_flops_by_the_peak_of_all_devices(trained):
    flops = count_stage(coarse_config(pattern="delay"), FIELDS, centroid_dims()).training_flops
    for row in rows(trained, "train"):
        assert row["mfu"] == pytest.approx(row["windows_per_second"] * flops / (2 * PEAK))


def test_flops_of_packed_windows_go_by_their_own_lengths():
    model = build_stage(coarse_config(), FIELDS, quantizers())
    counted = [
        count_stage(coarse_config(window_seconds=seconds), FIELDS, centroid_dims()).training_flops
        for seconds in (2.0, 0.5)
    ]
    flops = ModelFlops(model, "bf16", torch.device("cpu"))
    assert flops.of({40: 3, 10: 2}) == 3 * counted[0] + 2 * counted[1]
    assert flops.peak is None


def test_tensorboard_has_the_same_figures(trained):
    board = EventAccumulator(str(trained / "coarse" / "tensorboard")).Reload()
    for name in ("loss", "mfu", "data_wait"):
        expected = {row["step"]: pytest.approx(row[name], rel=1e-5) for row in rows(trained, "train")}
        assert {event.step: event.value for event in board.Scalars(f"train/{name}")} == expected
    assert "train/quantizers/1" in board.Tags()["scalars"]


def test_a_few_steps_are_profiled_on_rank_0(trained):
    (trace,) = (trained / "coarse" / "profile").iterdir()
    names = [event["name"] for event in json.loads(trace.read_text())["traceEvents"]]
    groups = parameter_groups(build_stage(coarse_config(), FIELDS, quantizers()), SMALL, 1e-3, 0.1)
    assert names.count("aten::_fused_adamw_") == 2 * len(groups)  # once a step
    assert f"profile of steps 6 to 7: {trace}" in log_of(trained)
    assert "profile" not in log_of(trained, rank=1)


# Losses that are not numbers


def with_bad_losses(run):
    from model.stage import StageTransformer

    class Spoil(Callback):
        def before_step(self, training):
            if training.step == 4:
                forward = StageTransformer.forward
                StageTransformer.forward = lambda *given, **named: forward(*given, **named) * float("nan")

    return job(run, Spoil())


def test_a_loss_that_is_not_finite_is_null_and_counted(tmp_path):
    """Every line is plain JSON, which has no NaN."""
    run = make_run(tmp_path / "run", steps=6, log_every=2, validate_every=100, checkpoint_every=100)
    run_ranks(with_bad_losses, 1, tmp_path / "ranks", run)

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for line in (run / "coarse" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    *good, bad = rows(run, "train")
    assert all(row["loss"] > 0 and "finite" not in row for row in good)
    assert (bad["loss"], bad["quantizers"], bad["gradient_norm"], bad["finite"]) == (None, [None, None], None, False)
    assert (bad["skipped"], bad["updates"]) == (2, 4)


# Ranks that hold the others up


def with_a_slow_rank(run, what):
    """Rank 1 sleeps in steps 3 to 6."""
    from model.stage import StageTransformer
    from trainer.batches import TrainingBatches

    slow = []

    class Slow(Callback):
        def before_step(self, training):
            slow[:] = [1] if training.engine.rank == 1 and 2 <= training.step < 6 else []

    def slowed(usual):
        def instead(*given, **named):
            time.sleep(0.6 * len(slow))
            return usual(*given, **named)

        return instead

    if what == "data":
        TrainingBatches._with_dropped = slowed(TrainingBatches._with_dropped)
    else:
        StageTransformer.forward = slowed(StageTransformer.forward)
    return job(run, Slow())


@pytest.mark.parametrize(("what", "zero"), [("forward pass", "zero2"), ("data", "zero3")])
def test_a_slow_rank_is_named_once_with_its_host(tmp_path, what, zero):
    settings = {"steps": 8, "log_every": 2, "global_batch": 6, "validate_every": 100, "checkpoint_every": 100}
    run = make_run(tmp_path / "run", zero=zero, straggler_factor=4, **settings)
    run_ranks(with_a_slow_rank, 3, tmp_path / "ranks", run, what)
    first, *slow, last = rows(run, "train")
    assert [list(row["stragglers"]) for row in slow] == [["1"], ["1"]]
    assert all(row["rank_seconds"]["max"] > 0.6 > row["rank_seconds"]["median"] for row in slow)
    assert "stragglers" not in first
    assert "stragglers" not in last
    log = log_of(run)
    assert log.count("straggler: ") == 1
    assert log.count(f"straggler: rank 1 on host {socket.gethostname()} ") == 1
    assert log.count("rank 1 on host") == 2
    assert "keeps up again at step 8" in log


def test_each_slow_spell_of_each_rank_is_named_once(caplog):
    caplog.set_level(logging.INFO)
    watch = Stragglers(1.5, ["a", "b", "c"])
    for step, seconds in enumerate([(1, 1, 2), (1, 1, 2), (1, 1, 1), (1, 3, 1), (1, 1, 4)]):
        watch.observe(step, seconds)
    said = [re.search(r"rank (\d) on host (\w) (needs|keeps)", record.message) for record in caplog.records]
    expected = ["2cneeds", "2ckeeps", "1bneeds", "2cneeds", "1bkeeps"]
    assert ["".join(match.groups()) for match in said if match] == expected


# No step waits for the device


class Reads(TorchFunctionMode):
    """Collects where a tensor's value goes to the host: on a GPU each such place would wait for all that is queued."""

    NAMES = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__float__", "__int__", "__index__")
    ON_THE_HOST = ("take", "_check_codes", "most", "of_a_constant")
    """Functions whose tensors are in host memory wherever a stage is trained."""

    def __init__(self):
        super().__init__()
        self.places = set()
        self.inner = _Scalars(self)

    def note(self):
        stack = traceback.extract_stack()
        if not {frame.name for frame in stack} & {*self.ON_THE_HOST}:
            self.places.add("".join(traceback.format_list(stack[:-2][-6:])))

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in self.NAMES:
            self.note()
        return function(*args, **(kwargs or {}))


class _Scalars(TorchDispatchMode):
    """The same for what C++ reads."""

    def __init__(self, reads):
        super().__init__()
        self.reads = reads

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:
            self.reads.note()
        return function(*args, **(kwargs or {}))


def without_waiting(run):
    from deepspeed.runtime.zero import stage3

    def of_a_constant(norm):
        """ZeRO-3 looks at a norm at the end of each step: it must not be one that is still to be computed."""
        assert norm == 0
        return False

    stage3.is_invalid_grad_norm = of_a_constant
    reads = Reads()

    class Watch(Callback):
        watching = False

        def before_step(self, training):
            if self.watching:
                reads.inner.__exit__(None, None, None)
                reads.__exit__(None, None, None)
            # ZeRO-3 learns the order of the weights in its first steps.
            self.watching = training.step > 4 and (training.step + 1) % training.config.log_every > 0
            if self.watching:
                reads.__enter__()
                reads.inner.__enter__()

    code = job(run, Watch())
    print(*sorted(reads.places), sep="\n", flush=True)
    return code or len(reads.places)


@pytest.mark.parametrize(
    ("zero", "precision"), [("zero0", "fp32"), *product(("zero1", "zero2", "zero3"), ("bf16", "fp32"))]
)
def test_a_step_that_does_not_log_reads_no_tensor(tmp_path, zero, precision):
    settings = {"steps": 8, "log_every": 4, "validate_every": 8, "checkpoint_every": 8, "micro_batch": 2}
    run = make_run(tmp_path / "run", zero=zero, precision=precision, ema_decay=0.9, **settings)
    run_ranks(without_waiting, 2, tmp_path / "ranks", run)


# Garbage


def watching_garbage(run):
    """Rank 0 writes down at which steps garbage is collected, and whether loader processes collect theirs."""
    import data.windows

    collected, stacked = [], data.windows._stacked

    class Watch(Callback):
        def on_start(self, training):
            gc.callbacks.append(lambda phase, info: collected.append(training.step) if phase == "stop" else None)

        def on_end(self, training):
            state = {"steps": sorted(set(collected)), "enabled": gc.isenabled(), "frozen": gc.get_freeze_count()}
            if training.engine.rank == 0:
                (run / "garbage.json").write_text(json.dumps(state))

    def noting(windows):
        if torch.utils.data.get_worker_info():
            (run / "loader").write_text(str(gc.isenabled()))
        return stacked(windows)

    data.windows._stacked = noting
    gc.set_threshold(1)  # Python itself would collect at every step
    return job(run, Watch())


def test_garbage_is_collected_when_all_ranks_do_and_left_to_python_at_the_end(tmp_path):
    run = make_run(tmp_path / "run", steps=9, gc_every=4, workers=1, validate_every=100, checkpoint_every=100)
    run_ranks(watching_garbage, 1, tmp_path / "ranks", run)
    state = json.loads((run / "garbage.json").read_text())
    assert state["steps"][:2] == [4, 8]
    assert set(state["steps"]) <= {4, 8, 9}  # 9: once training is over
    assert state["enabled"]
    assert state["frozen"] == 0
    assert (run / "loader").read_text() == "True"


# Going on, and Weights & Biases


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


# Reading and writing


def test_a_kill_while_rows_are_dropped_loses_none(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    text = "".join(json.dumps({"kind": "train", "step": step}) + "\n" for step in range(1, 5))
    path.write_text(text)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        JsonLines(path, 2)
    assert path.read_text() == text
    monkeypatch.undo()
    JsonLines(path, 2).close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2]


def test_a_start_from_scratch_keeps_no_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "validation", "step": 0}\n')
    JsonLines(path, 0).close()
    assert read_metrics(path) == []


def test_the_last_row_of_a_rare_kind_is_found_far_from_the_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    train = json.dumps({"kind": "train", "step": 2, "figures": [0.5] * 100}) + "\n"
    path.write_text('{"kind": "checkpoint", "step": 1}\n' + train * (3 * TAIL_BYTES // len(train)))
    assert last_metrics(path, "checkpoint") == {"kind": "checkpoint", "step": 1}
    assert last_metrics(path, "validation") is None
