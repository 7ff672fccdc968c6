"""Fixtures of several tests of this folder."""

from __future__ import annotations

import os

import pytest
from collecting import LIMITS, write
from web import serving

from data.collect.collector import collect
from data.collect.limits import Limits
from data.progress import Progress


@pytest.fixture
def web():
    with serving() as web:
        yield web


@pytest.fixture
def gather(tmp_path):
    """Collects rows, given as addresses or as columns, into the folder `out`."""

    def call(*rows: str | dict, limits: Limits = LIMITS):
        return collect(write(tmp_path / "manifest.jsonl", rows), tmp_path / "out", limits, Progress())

    return call


@pytest.fixture
def one_process(monkeypatch):
    """So few files are read before another process has started."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
