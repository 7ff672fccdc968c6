"""SIGKILL at every operation of a save, at random moments, while a checkpoint is read.

After each the same command goes on, from the newest good checkpoint, and ends with the weights and the losses of the
run that was left alone. The ranks count what Python tells its audit hooks about files, and kill themselves.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
from faults.matrix import KILLED, STEPS, at_random_moments, attempt, finish, good_steps, last_step, same
from training_runs import checkpoints, job

from trainer.checkpoint_folder import step_name, steps_in

BLOCK_BYTES = 1 << 10
"""What is written at once here, so that kills hit the inside of a file too."""
BLOCKS_A_POINT = 400
"""Every so many blocks are a point at which to kill."""


class Operations:
    """Counts what this process does to files below `folder`, and kills it before number `last`."""

    def __init__(self, folder: Path, last: int, reading: bool = False) -> None:
        self.folder, self.last, self.reading = str(folder), last, reading
        """Whether opening a file to read it counts too, for the first time: its pieces are read one by one."""
        self.count = 0
        self.read: set[str] = set()
        sys.addaudithook(self.heard)

    def heard(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int):
                return
            if flags & (os.O_WRONLY | os.O_RDWR):
                self.passed(os.fsdecode(path))
            elif self.reading and (name := os.fsdecode(path)) not in self.read:
                self.read.add(name)
                self.passed(name)
        elif event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            path, handle = os.fsdecode(arguments[0]), arguments[-1]
            if handle != -1 and not os.path.isabs(path):
                path = os.path.join(os.readlink(f"/proc/self/fd/{handle}"), path)
            self.passed(path)

    def passed(self, path: str) -> None:
        if not path.startswith(self.folder):
            return
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        self.count += 1

    def stop(self) -> None:
        self.last = -1


def killed_in_save(run, rank, point):
    """A job of which `rank` is killed before operation number `point` of its first save, if it has so many."""
    from trainer import checkpoint, tensor_files

    if os.environ["RANK"] != str(rank):
        return job(run)
    operations = None

    def save(self, *arguments):
        nonlocal operations
        if operations is None:
            operations = Operations(run / "coarse" / "checkpoints", point)
        else:
            operations.stop()
        original_save(self, *arguments)

    def fsync(handle):
        if operations:
            operations.passed(os.readlink(f"/proc/self/fd/{handle}"))
        original_fsync(handle)

    def blocks(parts):
        for number, block in enumerate(original_blocks(parts)):
            if number % BLOCKS_A_POINT == BLOCKS_A_POINT // 2:
                operations.passed(operations.folder)
            yield block

    tensor_files.BLOCK_BYTES = BLOCK_BYTES
    original_fsync, os.fsync = os.fsync, fsync
    original_blocks, tensor_files._blocks = tensor_files._blocks, blocks
    original_save, checkpoint.Checkpointer.save = checkpoint.Checkpointer.save, save
    return job(run)


def killed_in_load(run, rank, point):
    """A job of which `rank` is killed before operation number `point` of its resume: reading, passing over, removing
    what an earlier kill has left."""
    from trainer.training import Training

    if os.environ["RANK"] != str(rank):
        return job(run)
    operations = Operations(run / "coarse" / "checkpoints", point, reading=True)

    def call(self, event, *arguments):
        if event == "on_start":  # it is loaded
            operations.stop()
        original_call(self, event, *arguments)

    original_call, Training._call = Training._call, call
    return job(run)


def killed_at(points, function, run, rank, ranks, kind, table, prepare=lambda: None):
    """Kills one job after another, each at the next of `points`, until one has no such point and ends, or the points
    do; returns how many there were."""
    done = 0
    for point in points:
        prepare()
        codes, output = attempt(function, ranks, run, rank, point)
        if codes == [0] * ranks:
            return done
        table.tried(kind)
        assert codes[rank] == KILLED, (point, codes, output)
        newest = good_steps(run)
        assert len(newest) >= 2, point
        assert not set(steps_in(checkpoints(run))) - set(newest) - {DAMAGED}, point
        table.survived(kind, last_step(run) - newest[0])
        done += 1
    finish(run, ranks)
    return done


DAMAGED = 50
"""The step of a checkpoint that is planted to be passed over."""


@pytest.mark.parametrize(("rank", "asynchronous", "points"), [(0, True, [3, 10, 20]), (1, False, [3])])
def test_killed_in_a_save(started, alone, table, rank, asynchronous, points):
    run = started(16, checkpoint_async=asynchronous)
    killed_at(points, killed_in_save, run, rank, 2, "SIGKILL in a save, a sample", table)
    same(run, alone(16))


@pytest.mark.faults
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize(("rank", "least"), [(0, 20), (1, 6)])
def test_killed_at_every_operation_of_a_save(started, alone, table, rank, asynchronous, least):
    """Folders, files, the middle of a file, syncs, the manifest, the rename, the removal of what is too old."""
    run = started(STEPS, checkpoint_async=asynchronous)
    kind = f"SIGKILL of rank {rank} in a save, {'beside' if asynchronous else 'in'} the training"
    assert killed_at(itertools.count(), killed_in_save, run, rank, 2, kind, table) >= least
    same(run, alone(STEPS))


def leftovers(run):
    """What a save, a removal and a bad disk have left, before each start anew."""
    folder, good = checkpoints(run), checkpoints(run) / step_name(6)
    for name in (f".{step_name(8)}.partial", f".{step_name(2)}.removed", step_name(DAMAGED)):
        shutil.copytree(good, folder / name, dirs_exist_ok=True)
    (folder / step_name(DAMAGED) / "rank-0001.safetensors").write_bytes(b"")


def killed_while_resuming(run, rank, ranks, kind, table, points):
    return killed_at(points, killed_in_load, run, rank, ranks, kind, table, lambda: leftovers(run))


def test_killed_while_resuming(started, alone, table):
    run = started(8)
    killed_while_resuming(run, 0, 2, "SIGKILL in a resume, a sample", table, [4, 20])
    same(run, alone(8))


@pytest.mark.faults
@pytest.mark.parametrize(("rank", "least"), [(0, 25), (1, 5)])
def test_killed_at_every_operation_of_a_resume(started, alone, table, rank, least):
    run = started(8)
    kind = f"SIGKILL of rank {rank} in a resume"
    assert killed_while_resuming(run, rank, 2, kind, table, itertools.count()) >= least
    same(run, alone(8))


@pytest.mark.faults
@pytest.mark.parametrize(("ranks", "rank"), [(1, 0), (3, 0), (3, 2)])
def test_killed_at_every_operation_of_a_resume_by_other_ranks(started, tmp_path, table, ranks, rank):
    """As if the kills had not been: bit for bit what other ranks make of the same checkpoint."""
    run = started(8)
    unkilled = shutil.copytree(run, tmp_path / "unkilled" / "run")
    finish(unkilled, ranks)
    kind = f"SIGKILL of rank {rank} of {ranks} in a resume of 2"
    assert killed_while_resuming(run, rank, ranks, kind, table, itertools.count()) >= 4
    same(run, unkilled)


def kill(running, drawn):
    """One rank, or both; what is left of the job is told to stop, as the launcher does."""
    running.send(signal.SIGKILL, drawn.choice([0, 1, None]))
    running.send(signal.SIGTERM)


def lost_by_a_kill(run, codes, output):
    assert KILLED in codes, output
    newest = good_steps(run)
    assert newest == steps_in(checkpoints(run))
    return last_step(run) - max(newest, default=0)


@pytest.mark.faults
def test_killed_at_forty_random_moments(alone, tmp_path, table):
    at_random_moments(tmp_path, table, "SIGKILL at a random moment", 40, 1, alone(STEPS), kill, lost_by_a_kill)
