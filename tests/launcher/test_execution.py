"""What a launcher does with stages that run, by a room and a backend that only note what they are told."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from launcher.execution import Execution, Running
from launcher.graph import stage_named
from launcher.placement import parse_share
from launcher.recipe import load_recipe
from launcher.restarts import Ended
from launcher.run_folder import RunFolder
from trainer.exit_codes import SAVED

SHARE = parse_share("alpha:0-3", [])


class Room:
    """Has room for whoever asks; `taken` says who did, and whether that had begun."""

    def __init__(self):
        self.taken = []

    def take(self, stage, begun=False):
        self.taken.append((stage.name, begun))

    def release(self, share):
        pass

    def returned(self):
        return iter(())

    def could_grow(self, stage, share):
        return True


class Backend:
    """A job has saved when it was polled three times."""

    def __init__(self):
        self.cancelled, self.polled = [], 0

    def cancel(self, handle, now=False):
        self.cancelled.append((handle, now))

    def poll(self, handle):
        self.polled += 1
        return Ended(SAVED) if self.polled == 3 else None


@pytest.fixture
def execution(tmp_path):
    """One in which semantic and coarse run on fewer hosts than they asked for."""
    stages = [stage_named("semantic"), stage_named("coarse")]
    folder = RunFolder(tmp_path)
    folder.state = {"format_version": 1, "stages": {}}
    recipe, console = load_recipe("quickstart"), Console(file=io.StringIO())
    made = Execution(folder, recipe, {}, {}, stages, console, Backend(), Room())
    made.waiting = []
    for stage in stages:
        made.running.append(Running(stage, stage.name, SHARE, tmp_path / "log", 0, 0.0, None))
        made.tries[stage.name].attempts = 1
    return made


def test_stages_grow_one_after_the_other_and_not_into_the_room_of_one_that_pauses(execution):
    paused = execution.running.pop()
    execution.waiting = [paused.stage]
    execution._look_for_hosts()
    assert not execution.backend.cancelled
    execution.waiting, execution.running = [], [*execution.running, paused]
    for _ in range(2):
        execution._look_for_hosts()
    assert execution.backend.cancelled == [("semantic", False)]


def test_a_stage_that_has_begun_may_take_less_than_it_asked_for(execution):
    execution.waiting = [execution.running.pop().stage]
    execution._start_ready()
    assert execution.room.taken == [("coarse", True)]


def test_a_second_signal_counts_also_where_it_came_before_the_first_was_heeded(execution):
    execution.running.pop()
    execution.stops = 2
    execution._stop_all()
    assert execution.backend.cancelled == [("semantic", False), ("semantic", True)]
