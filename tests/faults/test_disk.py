"""A disk that is full, cannot be written, or hangs."""

from __future__ import annotations

import os
import shutil
import subprocess
import time

import pytest
from faults.matrix import FILES, all_say, attempt, finish, good_steps, same
from training_runs import checkpoints, job

from trainer.checkpoint_folder import step_name, steps_in
from trainer.exit_codes import FAULT, HUNG


def hanging_writer(run, rank):
    """A job in which `rank` never finishes writing its first checkpoint."""
    from trainer import checkpoint

    if os.environ["RANK"] == str(rank):
        checkpoint.write_tensors = lambda *_: time.sleep(3600)
    return job(run)


@pytest.fixture
def small_disk():
    """Mounts a tmpfs over the checkpoints of a run."""
    mounted = []

    def mount(run, size):
        folder = checkpoints(run)
        kept = shutil.copytree(folder, run / "kept")
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("a tmpfs may not be mounted here")
        mounted.append(folder)
        shutil.copytree(kept, folder, dirs_exist_ok=True)

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(run, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(checkpoints(run))], check=True)


def on_disk(path):
    """Bytes of whole pages."""
    return -(-path.stat().st_size // 4096) * 4096


def full(started, alone, small_disk, table, room, asynchronous):
    """`room` says what of the third checkpoint still finds room beside the two that are kept."""
    run = started(12, checkpoint_async=asynchronous)
    sizes = {name: on_disk(checkpoints(run) / step_name(6) / name) for name in FILES}
    size = 2 * sum(sizes.values()) + sum(sizes[name] for name in room)
    small_disk(run, size)
    kind = f"disk full, {len(room)} files of a checkpoint written"
    table.tried(kind)
    begun = time.monotonic()
    codes, output = attempt(job, 2, run)
    assert time.monotonic() - begun < 60
    all_say(codes, output, "is full: make room, then run the same command again")
    assert good_steps(run) == steps_in(checkpoints(run)) == [6, 4]
    remount(run, "size=100m")
    lost = finish(run)
    same(run, alone(12))
    table.survived(kind, lost)


def test_a_full_disk(started, alone, small_disk, table):
    full(started, alone, small_disk, table, (), True)


@pytest.mark.faults
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("room", [(), FILES[:1], FILES[:2]], ids=["nothing", "one rank's file", "all ranks' files"])
def test_a_full_disk_at_every_stage(started, alone, small_disk, table, room, asynchronous):
    full(started, alone, small_disk, table, room, asynchronous)


@pytest.mark.faults
def test_a_disk_that_cannot_be_written(started, alone, small_disk, table):
    run = started(12)
    small_disk(run, "100m")
    remount(run, "ro")
    table.tried("checkpoints on a read-only disk")
    codes, output = attempt(job, 2, run)
    all_say(codes, output, "Read-only file system")
    remount(run, "rw")
    lost = finish(run)
    same(run, alone(12))
    table.survived("checkpoints on a read-only disk", lost)


@pytest.mark.faults
@pytest.mark.parametrize("asynchronous", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_writer_that_hangs(started, alone, table, rank, asynchronous):
    """The watchdog ends the job; then it goes on."""
    run = started(12, hang_timeout=4.0, checkpoint_async=asynchronous)
    kind = "a write that hangs on one rank"
    table.tried(kind)
    codes, output = attempt(hanging_writer, 2, run, rank, timeout=60)
    assert HUNG in codes, output
    assert set(codes) <= {HUNG, FAULT}, output
    assert good_steps(run) == [6, 4]
    lost = finish(run)
    same(run, alone(12))
    table.survived(kind, lost)
