"""Fixtures of several tests of this folder."""

from __future__ import annotations

import pytest
from conversions import RANKS, make_cells, train_and_save
from ranks import run_ranks


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """Run folders of all cells, each with a checkpoint of Stretto's and one of DeepSpeed's."""
    folder = tmp_path_factory.mktemp("cells")
    for ranks in RANKS:
        run_ranks(train_and_save, ranks, folder / "log", *make_cells(folder, ranks), timeout=300)
    return folder
