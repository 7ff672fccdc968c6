from __future__ import annotations

import io
import json
import os
import time
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_run import make_run, running

from launcher.figures import stage_figures
from launcher.inspect import inspect
from launcher.status import print_status, read_status
from model.errors import UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "a [nice] run", samples=2)


def shown(run: Path, as_json: bool = False) -> str:
    console = Console(file=io.StringIO(), width=80)
    print_status(run, as_json, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def states(run: Path) -> dict[str, str]:
    return {stage.name: stage.state for stage in read_status(run).stages}


def test_a_finished_run_is_done_with_its_losses_and_times(run: Path) -> None:
    status = read_status(run)
    assert status.state == "done"
    assert set(states(run).values()) == {"done"}
    semantic = next(stage for stage in status.stages if stage.name == "semantic")
    assert (semantic.done, semantic.total, semantic.seconds) == (600, 600, 110.0)
    assert semantic.loss == pytest.approx(1.83, abs=0.05)
    assert semantic.validation_loss is not None
    text = shown(run)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    assert "a [nice] run" in " ".join(text.split())  # however long the folder's name is


def test_a_running_stage_shows_its_step_speed_log_and_time_left(run: Path) -> None:
    running(run, "coarse", os.getpid())
    rows = (run / "coarse" / "metrics.jsonl").read_text().splitlines()
    half = [row for row in rows if json.loads(row)["step"] <= 300]
    (run / "coarse" / "metrics.jsonl").write_text("\n".join(half) + '\n{"kind": "tra')
    (run / "logs").mkdir()
    (run / "logs" / "coarse.log").write_text("")
    status = read_status(run)
    coarse = next(stage for stage in status.stages if stage.name == "coarse")
    assert (status.state, coarse.state, coarse.done, coarse.total) == ("running", "running", 300, 600)
    assert coarse.seconds_left == pytest.approx(300 * 32 / 160)
    assert coarse.seconds == pytest.approx(30, abs=5)
    assert states(run)["fine"] == "waiting"
    text = shown(run)
    assert "300 / 600" in text
    assert "1 min left" in text
    assert "logs/coarse.log" in text.replace("\n", "")


def change_last_row(run: Path, **figures: object) -> None:
    """Adds figures to the last training row of the coarse stage, or changes them."""
    path = run / "coarse" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    [row for row in rows if row["kind"] == "train"][-1].update(figures)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_stage_shows_how_well_it_uses_the_machine(run: Path) -> None:
    change_last_row(run, mfu=0.4217, data_wait=0.031, skipped=3)
    text = shown(run)
    assert "coarse: 20 k tokens/s, MFU 42.2%, 3% waiting for data, 3 steps left out" in text
    assert "semantic: 20 k tokens/s\n" in text
    coarse = next(stage for stage in json.loads(shown(run, as_json=True))["stages"] if stage["name"] == "coarse")
    assert (coarse["mfu"], coarse["data_wait"], coarse["skipped"]) == (0.4217, 0.031, 3)


def test_a_loss_that_was_not_finite_is_a_gap_and_no_error(run: Path) -> None:
    change_last_row(run, loss=None, finite=False)
    assert "600 / 600" in shown(run)
    curve = stage_figures(run, "coarse", None)["train"]  # type: ignore[index]
    assert [step for step, loss in curve][-2:] == [580, 590]
    assert "steps 10 to 590" in inspect(run / "coarse" / "metrics.jsonl").facts["train"]


def test_progress_of_other_stages_comes_from_their_progress_file(run: Path) -> None:
    running(run, "tokens", os.getpid())
    (run / "progress").mkdir()
    now = time.time()
    row = {"done": 25, "total": 100, "message": "encoding", "figures": {}, "started": now - 10, "time": now}
    (run / "progress" / "tokens.json").write_text(json.dumps(row))
    tokens = next(stage for stage in read_status(run).stages if stage.name == "tokens")
    assert (tokens.done, tokens.total, tokens.message) == (25, 100, "encoding")
    assert tokens.seconds_left == pytest.approx(30)


def test_a_stage_whose_launcher_died_is_interrupted(run: Path) -> None:
    running(run, "coarse", pid=2**22 + 1)  # above the largest process number
    assert states(run)["coarse"] == "interrupted"
    assert read_status(run).state == "interrupted"
    assert "same `stretto run` command" in shown(run)


def test_a_failed_stage_shows_why(run: Path) -> None:
    state = json.loads((run / "state.json").read_text())
    state["stages"]["fine"] |= {"state": "failed", "error": "RuntimeError: [enforce fail] no memory"}
    (run / "state.json").write_text(json.dumps(state))
    text = shown(run)
    assert read_status(run).state == "failed"
    assert "RuntimeError: [enforce fail] no memory" in text


def test_json_says_the_same(run: Path) -> None:
    status = json.loads(shown(run, as_json=True))
    assert (status["format_version"], status["recipe"], status["state"]) == (1, "quickstart", "done")
    assert [stage["name"] for stage in status["stages"]][:2] == ["corpus", "codec"]
    assert {"loss", "validation_loss", "tokens_per_second", "seconds_left", "log"} <= set(status["stages"][5])


def test_a_run_that_has_not_started_waits(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: new\n")
    assert read_status(tmp_path).state == "waiting"
    assert set(states(tmp_path).values()) == {"waiting"}


@pytest.mark.parametrize("name", ["nothing there", "a file", "another folder"])
def test_what_is_no_run_folder_is_said_plainly(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a file":
        path.write_text("")
    elif name == "another folder":
        path.mkdir()
    with pytest.raises(UserError, match="is not a run folder"):
        read_status(path)
