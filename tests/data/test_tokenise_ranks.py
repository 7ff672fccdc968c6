"""Tokenising by several ranks: always the same shards, byte for byte. Kills are in tests/faults/test_tokenising.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ranks import run_ranks
from tokenising import contents, job, make_corpus

from data.shards import first_records

CLIPS = 60
SETTINGS = {"batch_seconds": 4.0}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, dict[str, bytes]]:
    """A corpus, and what one rank makes of it."""
    folder = tmp_path_factory.mktemp("tokens")
    corpus = make_corpus(folder / "made", CLIPS)
    run_ranks(job, 1, folder / "log", corpus, folder / "tokens", SETTINGS)
    return corpus, contents(folder / "tokens")


def test_every_clip_is_there_once_in_its_order(made, tmp_path):
    _, files = made
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    ids = {split: [row["id"] for row in first_records(tmp_path / split, CLIPS)] for split in ("train", "validation")}
    assert ids["train"] == [f"clip-{number}" for number in range(CLIPS) if number % 10]
    assert ids["validation"] == [f"clip-{number}" for number in range(0, CLIPS, 10)]
    lengths = json.loads(files["train/columns.json"])["seconds"]
    assert [round(seconds, 2) for seconds in lengths[5:8]] == [2.0, 1.2, 2.0]


@pytest.mark.parametrize("ranks", [2, 4])
def test_the_number_of_ranks_changes_no_byte(made, tmp_path, ranks):
    corpus, expected = made
    run_ranks(job, ranks, tmp_path / "log", corpus, tmp_path / "tokens", SETTINGS)
    assert contents(tmp_path / "tokens") == expected
