"""Waiting for the jobs of a cluster that starts them itself."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from launcher.batch import POLL_SECONDS, SILENCE_SECONDS, wait_for
from launcher.restarts import Ended
from model.errors import UserError
from trainer.exit_codes import SAVED

SILENT = UserError("squeue: Unable to contact slurm controller")


class Cluster:
    """Gives each answer once, and the last for ever."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def poll(self, handle):
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, UserError):
            raise answer
        return answer


@pytest.fixture
def wait(tmp_path, monkeypatch):
    """Waits for two jobs, by a clock that only sleeping moves: exit code, or error, what was printed, and how long it
    took."""
    clock, printed = [0.0], io.StringIO()
    monkeypatch.setattr("launcher.batch.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("launcher.batch.time.sleep", lambda seconds: clock.append(clock.pop() + seconds))
    stages = {name: {"state": "waiting"} for name in ("corpus", "codec")}
    (tmp_path / "state.json").write_text(json.dumps({"format_version": 1, "stages": stages}))

    def call(*answers):
        console = Console(file=printed, width=80)
        try:
            ended = wait_for(tmp_path, Cluster(*answers), {"corpus": "1", "codec": "2"}, console)
        except UserError as error:
            ended = error
        return ended, printed.getvalue(), clock[0]

    return call


def test_a_cluster_that_is_silent_for_a_while_is_waited_for(wait):
    often = [*[SILENT] * 100, None, *[SILENT] * 100]  # together more than it may be silent at a time
    assert 200 * POLL_SECONDS > SILENCE_SECONDS
    code, printed, seconds = wait(*often, Ended(0), Ended(SAVED))
    assert (code, seconds) == (130, 200 * POLL_SECONDS)
    assert printed.count(f"{SILENT}\nIt is asked again; the jobs go on.\n") == 2
    assert printed.endswith("corpus: done\ncodec: not done\n")


def test_a_cluster_that_stays_silent_is_given_up(wait):
    error, _, seconds = wait(None, SILENT)
    assert error is SILENT
    assert seconds == SILENCE_SECONDS + POLL_SECONDS
