from __future__ import annotations

import io
import time

from rich.console import Console

from launcher import display
from launcher.display import ConsoleProgress


def test_work_in_this_process_shows_a_bar_with_figures_and_the_time_left(monkeypatch):
    monkeypatch.setattr(display, "DRAW_SECONDS", 0)
    shown = io.StringIO()
    with ConsoleProgress(Console(file=shown, force_terminal=True, width=120)) as progress:
        progress.update(1, 1000, "collecting", **{"bytes/s": 0.0})
        time.sleep(0.05)
        progress.update(2, 1000, "collecting [1]", **{"bytes/s": 1500.0})
    text = shown.getvalue()
    assert "collecting [1]" in text
    assert "2/1,000" in text
    assert "bytes/s 1.5 k" in text
    assert " left" in text


def test_where_there_is_no_terminal_a_line_is_printed_now_and_then(monkeypatch):
    shown = io.StringIO()
    with ConsoleProgress(Console(file=shown, width=120)) as progress:
        progress.update(1, 10, "collecting")
        assert shown.getvalue() == ""
        monkeypatch.setattr(display, "LINE_SECONDS", 0)
        progress.update(2, 10, "collecting")
    assert shown.getvalue().startswith("collecting: 2/10")
