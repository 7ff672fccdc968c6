"""Fixtures of the tests of faults, and one table of them all at the end of the session."""

from __future__ import annotations

import shutil

import pytest
from faults.matrix import EVERY, SETTINGS, Table
from ranks import run_ranks
from training_runs import change, job, make_run

TABLE = Table()


def pytest_terminal_summary(terminalreporter):
    if TABLE.records:
        terminalreporter.section("faults")
        for line in TABLE.lines():
            terminalreporter.write_line(line)


@pytest.fixture
def table():
    """Where a test counts what it tries."""
    return Table()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if call.when == "call" and "table" in item.funcargs:
        TABLE.add(item.funcargs["table"], report.passed)
    return report


@pytest.fixture(scope="session")
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
