"""Kills at every operation of a save, at random moments, while a checkpoint is read; damaged files; a full disk.

After each the same command goes on, from the newest good checkpoint, and ends with the weights and the losses of the
run that was left alone. Nothing in the product is made for it: the ranks of a test count what Python tells its audit
hooks about files, and kill themselves.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from ranks import run_ranks, start_ranks
from training_runs import make_run, rows, weights_digest

from trainer.checkpoint_folder import problems, step_name, steps_in
from trainer.exit_codes import FAULT, HUNG

STEPS, EVERY = 40, 2
SETTINGS = {
    "warmup_steps": 2,
    "log_every": 1,
    "validate_every": 99,
    "checkpoint_every": EVERY,
    "global_batch": 6,
    "schedule": "constant",  # so that a longer run begins as a shorter one
}
KILLED = -signal.SIGKILL
BLOCK_BYTES = 1 << 10
"""What is written at once here, so that kills hit the inside of a file too."""
BLOCKS_A_POINT = 400
"""Every so many blocks are a point at which to kill."""


def job(run):
    from trainer.__main__ import train

    return train(run, "coarse")


class Operations:
    """Counts what this process does to files below `folder`, and kills it before number `last`."""

    def __init__(self, folder: Path, last: int, reading: bool = False) -> None:
        self.folder, self.last, self.reading = str(folder), last, reading
        """Whether opening a file to read it counts too."""
        self.count = 0
        sys.addaudithook(self.heard)

    def heard(self, event: str, arguments: tuple) -> None:
        if event == "open":
            path, _, flags = arguments
            if not isinstance(path, int) and (self.reading or flags & (os.O_WRONLY | os.O_RDWR)):
                self.passed(os.fsdecode(path))
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

    def blocks(tensors):
        for number, block in enumerate(original_blocks(tensors)):
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
    from trainer import tensor_files
    from trainer.training import Training

    if os.environ["RANK"] != str(rank):
        return job(run)
    operations = Operations(run / "coarse" / "checkpoints", point, reading=True)

    def safe_open(path, **settings):  # which opens files without Python
        operations.passed(str(path))
        return original_open(path, **settings)

    def call(self, event, *arguments):
        if event == "on_start":  # it is loaded
            operations.stop()
        original_call(self, event, *arguments)

    original_open, tensor_files.safe_open = tensor_files.safe_open, safe_open
    original_call, Training._call = Training._call, call
    return job(run)


def hanging_writer(run, rank):
    """A job in which `rank` never finishes writing its first checkpoint."""
    from trainer import checkpoint

    if os.environ["RANK"] == str(rank):
        checkpoint.write_tensors = lambda *_: time.sleep(3600)
    return job(run)


def checkpoints(run):
    return run / "coarse" / "checkpoints"


def good_steps(run):
    return [step for step in steps_in(checkpoints(run)) if not problems(checkpoints(run) / step_name(step))]


def last_step(run):
    return max((row["step"] for row in rows(run, "train")), default=0)


def resumptions(run):
    """From which steps the jobs of a run went on."""
    log = run / "coarse" / "logs" / "rank-0000.log"
    lines = log.read_text().splitlines() if log.exists() else []
    return [int(line.split("resumed at step ")[1].split()[0]) for line in lines if "resumed at step" in line]


def change(run, **train):
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["stages"]["coarse"]["train"].update(train)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@dataclass
class Record:
    """What came of one kind of fault."""

    tried: int = 0
    survived: int = 0
    lost: int = 0
    """Steps that were done and had to be done again."""
    most: int = 0


class Table:
    """What came of every kind."""

    def __init__(self) -> None:
        self.records: dict[str, Record] = defaultdict(Record)

    def tried(self, kind: str) -> None:
        self.records[kind].tried += 1

    def survived(self, kind: str, lost: int = 0) -> None:
        record = self.records[kind]
        record.survived += 1
        record.lost += lost
        record.most = max(record.most, lost)

    def lines(self):
        yield f"{'fault':<52} {'tried':>6} {'survived':>9} {'lost steps':>11} {'at most':>8}"
        for kind, record in self.records.items():
            yield f"{kind:<52} {record.tried:>6} {record.survived:>9} {record.lost:>11} {record.most:>8}"


@pytest.fixture(scope="module")
def table(request):
    made = Table()
    yield made
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *made.lines(), sep="\n")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Runs that were left alone, by their steps; made when asked for."""
    made = {}

    def get(steps):
        if steps not in made:
            folder = tmp_path_factory.mktemp(f"alone-{steps}")
            made[steps] = make_run(folder / "run", steps=steps, **SETTINGS)
            run_ranks(job, 2, folder / "log", made[steps])
        return made[steps]

    return get


@pytest.fixture
def started(alone, tmp_path):
    """A run with checkpoints of steps 4 and 6, that is to go on to `steps`."""

    def get(steps, **train):
        run = shutil.copytree(alone(3 * EVERY), tmp_path / "run")
        change(run, steps=steps, **train)
        return run

    return get


def attempt(function, ranks, run, *arguments, timeout=120):
    """Exit codes of a job that goes on from the newest good checkpoint, and what it prints. When a rank fails the
    others are told to stop, as the launcher does."""
    expected, before = max(good_steps(run), default=0), resumptions(run)
    log = run.parent / f"log-{len(list(run.parent.glob('log-*')))}"
    running = start_ranks(function, ranks, log, run, *arguments)
    while running.alive():
        if any(process.exitcode for process in running.processes):
            running.send(signal.SIGTERM)
            break
        time.sleep(0.01)
    codes = running.wait(timeout)
    assert resumptions(run)[len(before) :] in ([], [expected])
    return codes, running.output()


def finish(run, ranks=2):
    """The same command, to the end; returns how many steps it did again."""
    lost = last_step(run) - max(good_steps(run), default=0)
    codes, output = attempt(job, ranks, run)
    assert codes == [0] * ranks, output
    return lost


def same(run, other):
    """The run ended as the other did: weights and losses, bit for bit."""
    losses = [{row["step"]: row["loss"] for row in rows(folder, "train")} for folder in (run, other)]
    assert losses[0] == losses[1]
    assert weights_digest(run) == weights_digest(other)


# Kills


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
@pytest.mark.parametrize(("rank", "least"), [(0, 25), (1, 6)])
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
    assert killed_while_resuming(run, rank, ranks, kind, table, itertools.count()) >= 6
    same(run, unkilled)


def killed_at_random(run, moments, longest, table, kind):
    """Kills one job after another some time after its start: one rank, or both."""
    drawn = random.Random(1)
    for _ in range(moments):
        running = start_ranks(job, 2, run.parent / "log", run)
        time.sleep(drawn.uniform(0, longest))
        running.send(signal.SIGKILL, drawn.choice([0, 1, None]))
        running.send(signal.SIGTERM)
        codes = running.wait()
        if KILLED not in codes:
            assert codes == [0, 0], running.output()
            return
        table.tried(kind)
        newest = good_steps(run)
        assert newest == steps_in(checkpoints(run))
        table.survived(kind, last_step(run) - max(newest, default=0))
    finish(run)


@pytest.mark.faults
def test_killed_at_forty_random_moments(alone, tmp_path, table):
    """Of a run from its start; where it ended before the kill, of another one."""
    kind = "SIGKILL at a random moment"
    begun = time.monotonic()
    expected = alone(STEPS)
    longest = min(4.0, max(2.0, time.monotonic() - begun))
    number = 0
    while table.records[kind].tried < 40:
        run = make_run(tmp_path / f"{number}" / "run", steps=STEPS, **SETTINGS)
        killed_at_random(run, 40 - table.records[kind].tried, longest, table, kind)
        same(run, expected)
        number += 1


# Damaged files


def damage(run, name, how):
    path = checkpoints(run) / step_name(6) / name
    if how == "folder gone":
        shutil.rmtree(path)
    elif how == "deleted":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    elif how == "emptied":
        path.write_bytes(b"")
    elif how == "one byte flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)


FILES = ("rank-0000.safetensors", "rank-0001.safetensors", "state.json", "manifest.json")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("how", "name"),
    [*itertools.product(["deleted", "truncated", "emptied", "one byte flipped"], FILES), ("folder gone", "")],
)
def test_damaged(started, alone, table, how, name):
    run = started(8)
    damage(run, name, how)
    table.tried(f"checkpoint: {how}")
    lost = finish(run)
    assert resumptions(run)[-1] == 4
    same(run, alone(8))
    table.survived(f"checkpoint: {how}", lost)


# A disk that is full, cannot be written, or hangs


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


def all_say(codes, output, words):
    """Every rank ended with code 2 and the same message."""
    assert codes == [2] * len(codes), output
    said = [part.partition("error: ")[2] for part in output.split("--- rank-")[1:]]
    assert words in " ".join(said[0].split()), output
    assert len({" ".join(text.split()) for text in said}) == 1, output


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
