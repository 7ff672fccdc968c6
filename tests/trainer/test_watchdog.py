"""Ranks that hang, fail, vanish or are told to stop: the job ends within its time, with words and a code that help."""

from __future__ import annotations

import ctypes
import io
import json
import os
import signal
import sys
import threading
import time
from types import SimpleNamespace

import pytest
from ranks import start_ranks
from rich.console import Console
from training_runs import log_of, make_run

from launcher.backends.direct import Direct
from launcher.execution import Execution
from launcher.graph import Origin, StageState
from launcher.restarts import RestartsConfig
from launcher.room import LocalRoom
from launcher.run_folder import RunFolder
from launcher.stage import Stage, picked
from trainer.config import TrainConfig
from trainer.exit_codes import FAULT, HUNG, SAVED

QUIET = {"validate_every": 99, "log_every": 1, "checkpoint_every": 2, "checkpoint_async": False}
IMPATIENT = {**QUIET, "hang_timeout": 2.0, "startup_timeout": 60.0}
PATIENT = {**QUIET, "hang_timeout": 60.0}


def oversleep():
    time.sleep(600)


def hold_the_interpreter():
    ctypes.PyDLL(None).sleep(600)


def fail():
    raise ValueError("rank 1 broke here")


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def stop():
    os.kill(os.getpid(), signal.SIGSTOP)


def tell_term():
    os.kill(os.getpid(), signal.SIGTERM)


def tell_usr1():
    os.kill(os.getpid(), signal.SIGUSR1)


def main(run):
    from trainer.__main__ import main

    sys.argv = ["trainer", "--run", str(run), "--stage", "coarse"]
    return main()


def job(run, fault, place, call):
    """Trains; on rank 1 `fault` happens in the given call of the method `place`, which goes on if it can."""
    from trainer.engine import Engine
    from trainer.setup import StageSetup
    from trainer.spikes import SpikeGuard

    places = {"step": (SpikeGuard, "judge"), "validation": (Engine, "evaluate"), "startup": (StageSetup, "build_model")}
    owner, name = places[place]
    method, calls = getattr(owner, name), []

    def faulty(*arguments):
        calls.append(place)
        if len(calls) == call:
            fault()
        return method(*arguments)

    if os.environ["RANK"] == "1":
        setattr(owner, name, faulty)
    return main(run)


def start(tmp_path, settings, *arguments):
    run = make_run(tmp_path / "run", **settings)
    return run, start_ranks(job, 2, tmp_path / "ranks", run, *arguments)


def test_a_rank_that_hangs_in_a_step_ends_the_job_and_every_stack_is_written(tmp_path):
    run, ranks = start(tmp_path, IMPATIENT, oversleep, "step", 4)
    assert ranks.wait() == [HUNG, HUNG]
    assert " in oversleep" in log_of(run, 1)
    assert " in all_reduce" in log_of(run, 0)
    assert "error: the job hung. Rank " in ranks.output()
    assert "after 3 steps, in the training step, and so did all others" in log_of(run, 0)
    seen = json.loads((run / "coarse" / "heartbeat" / "rank-0001.json").read_text())
    assert (seen["step"], seen["what"]) == (3, "the training step")


def test_a_rank_whose_interpreter_is_held_up_still_writes_its_stack_and_ends(tmp_path):
    run, ranks = start(tmp_path, IMPATIENT, hold_the_interpreter, "step", 4)
    assert ranks.wait() == [HUNG, FAULT]
    assert " in hold_the_interpreter" in log_of(run, 1)
    assert "Rank 1 (process" in log_of(run, 0)


def test_a_stopped_rank_is_named_by_the_others(tmp_path):
    run, ranks = start(tmp_path, IMPATIENT, stop, "step", 4)
    ranks.processes[0].join(60)
    ranks.send(signal.SIGKILL, 1)
    assert ranks.wait() == [HUNG, -signal.SIGKILL]
    assert f"Rank 1 (process {ranks.processes[1].pid} on" in log_of(run, 0)
    assert "its process is stopped or lost" in ranks.output()


def test_a_rank_that_fails_in_a_step_is_heard_first(tmp_path):
    run, ranks = start(tmp_path, PATIENT, fail, "step", 4)
    assert ranks.wait(30) == [FAULT, FAULT]
    assert ranks.output().count("rank 1 broke here\n") == 1
    assert "ValueError: rank 1 broke here" in log_of(run, 1)
    assert "lost another rank after 3 steps, in the training step" in log_of(run, 0)
    assert "Traceback" not in log_of(run, 0)


@pytest.mark.parametrize(
    ("fault", "place", "call", "step"),
    [
        (tell_term, "step", 3, 3),
        (tell_usr1, "step", 3, 3),
        (tell_usr1, "validation", 9, 4),
        (tell_term, "startup", 1, 0),
    ],
)
def test_a_signal_to_one_rank_makes_all_save_at_the_same_step(tmp_path, fault, place, call, step):
    run, ranks = start(tmp_path, {**PATIENT, "checkpoint_every": 99, "validate_every": 4}, fault, place, call)
    assert ranks.wait() == [SAVED, SAVED], ranks.output()
    for rank in range(2):
        assert f"stopped at step {step} of 60" in log_of(run, rank)
    saved = [path.name for path in (run / "coarse" / "checkpoints").glob("step-*")]
    assert saved == ([f"step-{step:08d}"] if step else [])


def when_trained(run, step, action):
    """A thread that does `action` with the process of rank 1 once that has done `step` steps."""

    def watch():
        path, deadline = run / "coarse" / "heartbeat" / "rank-0001.json", time.monotonic() + 120
        while not path.exists() or json.loads(path.read_text())["step"] < step:
            assert time.monotonic() < deadline, "rank 1 never came so far"
            time.sleep(0.05)
        action(json.loads(path.read_text())["pid"])

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def test_the_launcher_says_what_became_of_a_lost_rank_and_from_where_it_goes_on(tmp_path):
    """Under the real `deepspeed` command: rank 0 sees but a broken connection, and would end with a code of its own."""
    settings = {**QUIET, "steps": 5000, "hang_timeout": 20.0}
    run, console = make_run(tmp_path / "run", **settings), Console(file=io.StringIO(), width=500)
    stage, origin = Stage("coarse", (), picked(), 1, None), Origin("coarse", 1, {}, {})
    trains = SimpleNamespace(coarse=SimpleNamespace(train=TrainConfig(ranks=2)))
    recipe = SimpleNamespace(parallel=1, stages=trains, restarts=RestartsConfig(limit=0))
    folder = RunFolder(run)
    folder.state = {"stages": {}}
    killer = when_trained(run, 6, lambda pid: os.kill(pid, signal.SIGKILL))
    started = {"coarse": StageState("coarse", "missing")}
    backend, room = Direct(folder.path), LocalRoom(recipe)
    code = Execution(folder, recipe, {"coarse": origin}, started, [stage], console, backend, room).run()
    killer.join()
    said = console.file.getvalue()
    assert code == 1, said
    assert "coarse failed: it was killed, most often because the machine ran out of memory" in said
    newest = max(path.name for path in (run / "coarse" / "checkpoints").glob("step-*"))
    assert f"the same command goes on from step {int(newest.removeprefix('step-'))}." in said
    # It waits for rank 1 at a connection that breaks or, at the start of an epoch, in shared memory.
    assert any(words in log_of(run, 0) for words in ("lost another rank after", "its process is stopped or lost"))
