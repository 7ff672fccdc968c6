"""What a killed run leaves in shared memory is in no later run's way, and does not stay."""

from __future__ import annotations

import fcntl
import signal
import tempfile
import time
from pathlib import Path

import psutil
import pytest
from faults.matrix import STEPS, finish, good_steps, last_step, same
from ranks import start_ranks
from training_runs import job

from data.shards import Shards
from data.shared_names import JOB_NAME, LOCK, SHARED_MEMORY

FOLDERS = (SHARED_MEMORY, Path(tempfile.gettempdir()))


def left_by(pid):
    """What lies in shared memory and among temporary files of the job whose rank 0 was that process."""
    names = (f"{JOB_NAME}{pid}-*", f"torch_{pid}_*")
    return [path for folder in FOLDERS for name in names for path in folder.glob(name)]


def killed(run, step):
    """Kills all ranks once `step` is logged, and returns the process of rank 0.

    Leaves names as well that streaming would have made next. Meanwhile it holds the job's lock: as soon as that is free
    any other job of ours may remove what is left.
    """
    running, deadline = start_ranks(job, 2, run.parent / "killed", run), time.monotonic() + 60
    while last_step(run) < step:
        assert running.alive(), running.output()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    pid, workers = running.processes[0].pid, workers_of(running)
    assert len(workers) == 4
    (path,) = SHARED_MEMORY.glob(f"{JOB_NAME}{pid}-*{LOCK}")
    with path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        running.send(signal.SIGKILL)
        running.wait()
        assert psutil.wait_procs(workers, timeout=10)[1] == []
        assert len(left_by(pid)) > 2
        for number in range(20, 24):
            (SHARED_MEMORY / f"{path.name.removesuffix(LOCK)}-{number:06}_locals").write_bytes(b"")
    return pid


def workers_of(running):
    """The two loader processes of each of two ranks."""
    ranks = {process.pid for process in running.processes}
    processes = psutil.process_iter(["name", "ppid"])
    return [one for one in processes if one.info["ppid"] in ranks and one.info["name"] == "pt_data_worker"]


def held_up(run):
    """A job whose loader processes wait, as for each other where an epoch begins, and do not end by themselves."""
    Shards.__iter__ = lambda self: time.sleep(600)
    return job(run)


def test_loader_processes_end_with_a_killed_rank(started, table):
    kind = "SIGKILL while loader processes wait for each other"
    run = started(STEPS, workers=2)
    table.tried(kind)
    running, deadline = start_ranks(held_up, 2, run.parent / "log", run), time.monotonic() + 60
    while len(workers := workers_of(running)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.5)
    running.send(signal.SIGKILL)
    running.wait()
    assert len(workers) == 4
    assert psutil.wait_procs(workers, timeout=10)[1] == []
    table.survived(kind)


@pytest.fixture
def strangers():
    """Names that streaming would choose by itself, as another program, killed, has left them."""
    paths = [SHARED_MEMORY / f"{number:06}_{name}" for number in range(4) for name in ("locals", "barrier", "shuffle")]
    paths += [FOLDERS[1] / f"{number:06}_barrier_filelock" for number in range(4)]
    made = [path for path in paths if not path.exists()]
    for path in made:
        path.write_bytes(b"not yours")
    yield made
    for path in made:
        path.unlink(missing_ok=True)


def test_leftovers_of_a_killed_run(started, alone, tmp_path, strangers, table):
    kind = "shared memory left by a killed run"
    run = started(STEPS, workers=2)
    table.tried(kind)
    pid = killed(run, 8)
    lost = last_step(run) - max(good_steps(run))
    running = start_ranks(job, 2, tmp_path / "log", run)
    assert running.wait() == [0, 0], running.output()
    same(run, alone(STEPS))
    for number in (pid, running.processes[0].pid):
        assert left_by(number) == []
    assert all(path.read_bytes() == b"not yours" for path in strangers)
    table.survived(kind, lost)


@pytest.mark.faults
def test_leftovers_of_ten_killed_runs(started, alone, table):
    kind = "shared memory left by a killed run"
    run = started(STEPS, workers=2)
    pids = []
    for step in range(8, 28, 2):
        table.tried(kind)
        pids.append(killed(run, step))
        table.survived(kind, last_step(run) - max(good_steps(run)))
    finish(run)
    same(run, alone(STEPS))
    assert [path for pid in pids for path in left_by(pid)] == []
