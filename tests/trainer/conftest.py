"""Fixtures of several tests of this folder, and the table of what conversions give at the end of the session."""

from __future__ import annotations

import pytest
from conversions import MATRIX, RANKS, make_cells, train_and_save
from ranks import run_ranks


def pytest_terminal_summary(terminalreporter):
    if MATRIX:
        terminalreporter.section("largest difference of a logit from the training engine's")
        columns = list(next(iter(MATRIX.values())))
        terminalreporter.write_line(f"{'trained with':<16}" + "".join(f"{name:>14}" for name in columns))
        for cell, differences in MATRIX.items():
            figures = "".join(f"{differences[name]:>14.1e}" for name in columns)
            terminalreporter.write_line(f"{cell:<16}{figures}")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Run folders of all cells, each with a checkpoint of Stretto's and one of DeepSpeed's."""
    folder = tmp_path_factory.mktemp("cells")
    for ranks in RANKS:
        run_ranks(train_and_save, ranks, folder / "log", *make_cells(folder, ranks), timeout=300)
    return folder
