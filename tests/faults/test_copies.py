"""SIGKILL while checkpoints go to S3 or come from there: a copy is whole or it is none."""

from __future__ import annotations

import itertools
import os
import shutil
import signal

import pytest
from buckets import BUCKET, environment, steps_there
from faults.matrix import KILLED, STEPS, attempt, finish, good_steps, last_step, same
from training_runs import change, checkpoints, job

from trainer.checkpoint_folder import problems, steps_in
from trainer.remote import Remote

UPLOAD = f"s3://{BUCKET}/copies"


def killed_in_transfer(run, names, point):
    """A job of which rank 0 is killed before call number `point` of those methods of the client."""
    usual, calls = Remote.__init__, itertools.count()

    def connect(self, *arguments):
        usual(self, *arguments)
        for name in names:
            setattr(self._client, name, counted(getattr(self._client, name)))

    def counted(method):
        def instead(*arguments, **named):
            if next(calls) == point:
                os.kill(os.getpid(), signal.SIGKILL)
            return method(*arguments, **named)

        return instead

    Remote.__init__ = connect
    return job(run)


def check_copies(folder):
    """What counts as a copy is one, to the last byte."""
    remote = Remote(UPLOAD, "coarse")
    for step in remote.whole():
        path = folder / f"{step}"
        path.mkdir(parents=True)
        remote.download(step, path)
        assert problems(path) == []
    shutil.rmtree(folder, ignore_errors=True)


def killed_in_uploads(run, expected, s3, folder, table, points):
    kind = "SIGKILL in an upload"
    for point in points:
        codes, output = attempt(killed_in_transfer, 2, run, ("upload_file", "delete_object"), point, **environment())
        if codes == [0, 0]:
            break
        table.tried(kind)
        assert codes[0] == KILLED, output
        check_copies(folder)
        table.survived(kind, last_step(run) - good_steps(run)[0])
    finish(run, **environment())
    same(run, expected)
    assert steps_there(s3) == steps_in(checkpoints(run))


def killed_in_restores(run, expected, table, points):
    """Of the copy of step 8; nothing is left here."""
    kind = "SIGKILL in a restore"
    change(run, steps=8)
    finish(run, **environment())
    change(run, steps=12)
    for point in points:
        shutil.rmtree(checkpoints(run))
        arguments = (run, ("download_file",), point)
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


def test_killed_with_copies_in_s3(started, alone, s3, tmp_path, table):
    run = started(12, upload=UPLOAD)
    killed_in_uploads(run, alone(12), s3, tmp_path / "copies", table, [2])


def test_killed_in_a_restore(started, alone, s3, table):
    killed_in_restores(started(12, upload=UPLOAD), alone(12), table, [2])


@pytest.mark.faults
def test_killed_at_every_operation_of_uploads(started, alone, s3, tmp_path, table):
    run = started(STEPS, upload=UPLOAD)
    killed_in_uploads(run, alone(STEPS), s3, tmp_path / "copies", table, itertools.count())


@pytest.mark.faults
def test_killed_before_every_file_of_a_restore(started, alone, s3, table):
    killed_in_restores(started(12, upload=UPLOAD), alone(12), table, itertools.count())
