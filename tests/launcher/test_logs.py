"""`stretto logs`: the end of a log, and what comes."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
from synthetic_run import make_run, running

from launcher.logs import goes_on, log_of, read_log
from model.errors import UserError

LINES = [f"line {number} of the log, é\n" for number in range(5000)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = make_run(tmp_path / "run", samples=2)
    (folder / "logs").mkdir()
    for name in ("tokens", "semantic"):
        (folder / "logs" / f"{name}.log").write_text("".join(LINES))
    os.utime(folder / "logs" / "tokens.log", (1, 1))
    return folder


@pytest.mark.parametrize(("lines", "count"), [(1, 1), (50, 50), (4000, 4000), (9000, 5000), (0, 5000)])
def test_the_last_lines(run: Path, lines: int, count: int) -> None:
    assert "".join(read_log(log_of(run)[1], lines)) == "".join(LINES[-count:])


def test_a_last_line_without_an_end_counts(run: Path) -> None:
    _, path = log_of(run, "tokens")
    path.write_text("first\nsecond\nthird")
    assert "".join(read_log(path, 2)) == "second\nthird"
    path.write_text("")
    assert "".join(read_log(path, 2)) == ""


def test_which_log(run: Path) -> None:
    assert log_of(run) == ("semantic", run / "logs" / "semantic.log")
    assert log_of(run, "tokens") == ("tokens", run / "logs" / "tokens.log")
    (run / "semantic" / "logs").mkdir()
    (run / "semantic" / "logs" / "rank-0001.log").write_text("a rank\n")
    assert "".join(read_log(log_of(run, "semantic", 1)[1], 5)) == "a rank\n"
    for stage, rank, words in (
        ("semantic", 2, "semantic has not been started on that rank"),
        ("coarse", None, r"there is no .*coarse\.log: coarse has not been started"),
        ("corase", None, "there is no stage 'corase'. Did you mean coarse?"),
    ):
        with pytest.raises(UserError, match=words):
            log_of(run, stage, rank)
    with pytest.raises(UserError, match="is not a run folder"):
        log_of(run / "logs")


def test_what_comes_is_shown_until_the_stage_ends(run: Path) -> None:
    running(run, "semantic", os.getpid())
    name, path = log_of(run, "semantic")
    shown = read_log(path, 1, lambda: goes_on(run, name))
    assert next(shown) == LINES[-1]

    def end() -> None:
        with path.open("ab") as file:
            file.write("é, its last words\n".encode()[1:])
        (run / ".lock").write_text("")  # the launcher is gone

    with path.open("ab") as file:
        file.write("é".encode()[:1])  # half a letter is not shown yet
    threading.Timer(0.5, end).start()
    assert "".join(shown) == "é, its last words\n"
    assert not goes_on(run, name)
