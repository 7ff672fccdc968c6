"""One job at a time works in a folder, and one that ended in any way holds up nobody."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import threading
import time

import pytest

from data.lock import LOCK, locked
from model.errors import UserError

PATIENCE = 60


def hold_with_a_child(folder, ready, child):
    with locked(folder):
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(PATIENCE,))
        worker.start()
        child.value = worker.pid
        ready.set()
        time.sleep(PATIENCE)


@contextlib.contextmanager
def held_by_another(folder):
    """The process that holds the lock of `folder`; one that it has forked lives on when it is killed."""
    context = multiprocessing.get_context("spawn")
    ready, child = context.Event(), context.Value("i")
    holder = context.Process(target=hold_with_a_child, args=(folder, ready, child))
    holder.start()
    assert ready.wait(PATIENCE)
    yield holder
    os.kill(child.value, signal.SIGKILL)  # it must still be there


def test_a_second_holder_is_told_who_holds_it(tmp_path):
    with locked(tmp_path), pytest.raises(UserError, match=rf"is in use by process {os.getpid()} since .*`kill"):
        locked(tmp_path).__enter__()
    (tmp_path / LOCK).write_text('{"host": "elsewhere", "pid": 7, "since": 0}')
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_named(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(UserError, match=rf"the disk of {tmp_path} has no file locks: .* with -o\.$"):
        locked(tmp_path).__enter__()


def test_a_lock_can_be_waited_for(tmp_path):
    """As by a training that is started again when its host was lost."""
    with held_by_another(tmp_path) as holder:
        threading.Timer(0.5, holder.kill).start()
        with locked(tmp_path, patience=PATIENCE):
            pass


def test_a_killed_holder_holds_nobody_up_though_a_process_it_forked_lives_on(tmp_path):
    with held_by_another(tmp_path) as holder:
        with pytest.raises(UserError, match=f"by process {holder.pid} since"):
            locked(tmp_path).__enter__()
        holder.kill()
        holder.join()
        with locked(tmp_path):
            pass
