"""SIGKILL while checkpoints go to S3 or come from there: a copy is whole or it is none."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
from buckets import BUCKET, environment, steps_there
from faults.matrix import KILLED, STEPS, attempt, finish, good_steps, last_step, same
from training_runs import change, checkpoints, job

from data import cloud
from trainer import remote
from trainer.checkpoint_folder import problems, steps_in
from trainer.remote import Remote

UPLOAD = f"s3://{BUCKET}/copies"


def killed_in_transfer(run, names, point):
    """A job of which rank 0 is killed before its copies are worked on for the `point`th time by one of those functions
    of `data.cloud`."""
    calls = itertools.count()

    def counted(function):
        def instead(*arguments, **named):
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **named)

        return instead

    remote.cloud = SimpleNamespace(**vars(cloud) | {name: counted(getattr(cloud, name)) for name in names})
    return job(run)


def check_copies(folder):
    """What counts as a copy is one, to the last byte."""
    copies = Remote(UPLOAD, "coarse")
    for step in copies.whole():
        path = folder / f"{step}"
        path.mkdir(parents=True)
        copies.download(step, path)
        assert problems(path) == []
    shutil.rmtree(folder, ignore_errors=True)


def killed_in_uploads(run, expected, bucket, folder, table, points):
    kind = "SIGKILL in an upload"
    for point in points:
        codes, output = attempt(killed_in_transfer, 2, run, ("store", "remove"), point, **environment())
        if codes == [0, 0]:
            break
        table.tried(kind)
        assert codes[0] == KILLED, output
        check_copies(folder)
        table.survived(kind, last_step(run) - good_steps(run)[0])
    finish(run, **environment())
    same(run, expected)
    assert steps_there(bucket) == steps_in(checkpoints(run))


def killed_in_restores(run, expected, table, points):
    """Of the copy of step 8; nothing is left here."""
    kind = "SIGKILL in a restore"
    change(run, steps=8)
    finish(run, **environment())
    change(run, steps=12)
    for point in points:
        shutil.rmtree(checkpoints(run))
        arguments = (run, ("fetch",), point)
        codes, output = attempt(killed_in_transfer, 2, *arguments, expected=8, **environment())
        if codes == [0, 0]:
            break
        table.tried(kind)
        assert codes[0] == KILLED, output
        assert steps_in(checkpoints(run)) == []
        table.survived(kind)
    codes, output = attempt(job, 2, run, expected=max(good_steps(run), default=8), **environment())
    assert codes == [0, 0], output
    same(run, expected)


def test_killed_with_copies_in_s3(started, alone, bucket, tmp_path, table):
    run = started(12, upload=UPLOAD)
    killed_in_uploads(run, alone(12), bucket, tmp_path / "copies", table, [2])


def test_killed_in_a_restore(started, alone, bucket, table):
    killed_in_restores(started(12, upload=UPLOAD), alone(12), table, [2])


@pytest.mark.faults
def test_killed_at_every_operation_of_uploads(started, alone, bucket, tmp_path, table):
    run = started(STEPS, upload=UPLOAD)
    killed_in_uploads(run, alone(STEPS), bucket, tmp_path / "copies", table, itertools.count())


@pytest.mark.faults
def test_killed_before_every_file_of_a_restore(started, alone, bucket, table):
    killed_in_restores(started(12, upload=UPLOAD), alone(12), table, itertools.count())
