"""Folders that commands make for their users."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data.new_folder import making
from model import artifact
from model.errors import UserError


def test_two_that_make_one_folder_do_not_meet(tmp_path):
    out = tmp_path / "new" / "out"
    with making(out):
        with pytest.raises(UserError, match=f"is in use by process {os.getpid()}"), making(out):
            pass
        with artifact.create(out, "small", "f"):
            pass
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    with pytest.raises(UserError, match="is there already"), making(out):
        pass


def test_what_fails_leaves_nothing_and_can_be_tried_again(tmp_path):
    for _ in range(2):
        with (
            pytest.raises(ZeroDivisionError),
            making(tmp_path / "a/b/out"),
            artifact.create(tmp_path / "a/b/out", "small", "f"),
        ):
            raise ZeroDivisionError
        assert not any(tmp_path.iterdir())


def test_what_appears_meanwhile_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    made = artifact.create(out, "small", "f")
    made.__enter__()
    out.mkdir()
    (out / "another's").touch()
    with pytest.raises(UserError, match="was not there when this began"):
        made.__exit__(None, None, None)
    assert [path.name for path in out.iterdir()] == ["another's"]


def test_an_empty_folder_is_as_good_as_none(tmp_path):
    (tmp_path / "out").mkdir()
    with making(tmp_path / "out"), artifact.create(tmp_path / "out", "small", "f"):
        pass
    assert artifact.read(tmp_path / "out").kind == "small"


def test_an_empty_folder_that_is_worked_in_needs_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no name for a new folder"), making(Path()):
        pass
