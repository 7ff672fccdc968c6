"""What holds a step up: a slow rank is named, no step waits for the device, garbage is collected when all ranks do."""

from __future__ import annotations

import gc
import json
import logging
import re
import socket
import time
import traceback
from itertools import product

import pytest
import torch
from ranks import run_ranks
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import job, log_of, make_run, rows

from trainer.callback import Callback
from trainer.stragglers import Stragglers

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
