"""One job at a time trains a stage."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

from ranks import start_ranks
from training_runs import make_run

from trainer.exit_codes import SAVED

PATIENCE = 60


def main(run):
    from trainer.__main__ import main

    sys.argv = ["trainer", "--run", str(run), "--stage", "coarse"]
    return main()


def main_without_rights(run):
    """As a user whom the folder's permissions bind: root, in most containers, is bound by none."""
    if os.geteuid() == 0:
        libc = ctypes.CDLL(None, use_errno=True)
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        assert libc.capget(header, sets) == 0
        sets[0] &= ~0b110  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, effective
        assert libc.capset(header, sets) == 0
    return main(run)


def wait_for(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def test_a_second_job_on_a_stage_is_refused_on_all_its_ranks_and_changes_nothing(tmp_path):
    run = make_run(tmp_path / "run", steps=5000, checkpoint_every=9999)
    first = start_ranks(main, 2, tmp_path / "first", run)
    wait_for((run / "coarse" / "heartbeat" / "rank-0001.json").exists)
    log = run / "coarse" / "logs" / "rank-0000.log"
    second = start_ranks(main, 2, tmp_path / "second", run)
    assert second.wait() == [2, 2]
    assert second.output().count(f"error: {run / 'coarse'} is in use by process {first.processes[0].pid} since") == 2
    assert "Traceback" not in second.output()
    assert "in use" not in log.read_text()
    first.send(signal.SIGTERM, 0)
    assert first.wait() == [SAVED, SAVED]


def test_a_run_folder_that_cannot_be_written_is_said_in_one_line_by_all_ranks(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "coarse").chmod(0o555)
    ranks = start_ranks(main_without_rights, 2, tmp_path / "ranks", run)
    codes = ranks.wait()
    (run / "coarse").chmod(0o755)
    assert codes == [2, 2], ranks.output()
    assert ranks.output().count(f"error: {run / 'coarse'} cannot be written: Permission denied.") == 2
    assert "Traceback" not in ranks.output()
