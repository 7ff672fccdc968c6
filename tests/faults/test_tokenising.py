"""SIGKILL while a corpus is tokenised: the same command goes on, on more ranks or fewer, and every clip is there once,
byte for byte as if nothing had happened."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import time

import pytest
from ranks import run_ranks, start_ranks
from tokenising import contents, job, make_corpus

import data.shard_writer
from model import artifact

SETTINGS = {"batch_seconds": 4.0}
SLOW = 0.03
"""Seconds that each batch takes more, so that there is time to be killed in."""
LONGEST = 3.0


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A corpus, and what one rank that was left alone makes of it."""
    folder = tmp_path_factory.mktemp("tokens")
    corpus = make_corpus(folder / "made", clips=60)
    run_ranks(job, 1, folder / "log", corpus, folder / "tokens", SETTINGS)
    return corpus, contents(folder / "tokens")


def commits(path):
    return len(list(artifact.unfinished(path).glob(f"{artifact.WORK}/*/*.json")))


def killed_at_random(made, folder, table, moments):
    kind = "SIGKILL while tokenising, gone on with on another number of ranks"
    corpus, expected = made
    numbers = random.Random(5)
    for number in range(moments):
        path, ranks = folder / f"tokens-{number}", numbers.choice([1, 2, 3])
        table.tried(kind)
        while not path.exists():
            before = commits(path)
            killed = start_ranks(job, ranks, folder / "log", corpus, path, SETTINGS, SLOW)
            time.sleep(numbers.uniform(0.2, LONGEST))
            killed.send(signal.SIGKILL)
            killed.wait()
            assert commits(path) >= before or path.exists()
            if numbers.random() < 0.5:
                run_ranks(job, numbers.choice([1, 2, 3]), folder / "log", corpus, path, SETTINGS)
        assert contents(path) == expected
        table.survived(kind)
        shutil.rmtree(path)


def killed_before_write(corpus, path, point):
    """A job of one rank that is killed before its write number `point` of a commit record, an index or a manifest."""
    usual, calls = artifact.write_json, itertools.count()

    def counted(*arguments):
        if next(calls) == point:
            os.kill(os.getpid(), signal.SIGKILL)
        usual(*arguments)

    artifact.write_json = data.shard_writer.artifact.write_json = counted
    job(corpus, path, SETTINGS)


def killed_before_writes(made, folder, table, points):
    kind = "SIGKILL of a tokenising rank before each file that counts"
    corpus, expected = made
    for point in points:
        path = folder / f"tokens-{point}"
        if start_ranks(killed_before_write, 1, folder / "log", corpus, path, point).wait() == [0]:
            break
        table.tried(kind)
        assert not path.exists()
        run_ranks(job, 2, folder / "log", corpus, path, SETTINGS)
        assert contents(path) == expected
        table.survived(kind)
        shutil.rmtree(path)


def test_killed_at_random_moments(made, tmp_path, table):
    killed_at_random(made, tmp_path, table, 2)


def test_killed_before_a_commit_and_before_the_end(made, tmp_path, table):
    killed_before_writes(made, tmp_path, table, [3, 34])


@pytest.mark.faults
def test_killed_at_twenty_random_moments(made, tmp_path, table):
    killed_at_random(made, tmp_path, table, 20)


@pytest.mark.faults
def test_killed_before_every_file(made, tmp_path, table):
    killed_before_writes(made, tmp_path, table, itertools.count())
