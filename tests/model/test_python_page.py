"""The code of docs/python.md runs, with shorter music."""

from __future__ import annotations

import re
from pathlib import Path

import soundfile
import torch
from small_bundle import make_bundle

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def test_the_page_on_python_runs(tmp_path, monkeypatch):
    make_bundle(tmp_path / "runs" / "quickstart" / "bundle")
    monkeypatch.chdir(tmp_path)
    page = PAGE.read_text().replace("seconds=10", "seconds=0.4")
    lines = [line[4:] for line in page.splitlines() if re.match(r" {4}|$", line)]
    cells: dict = {}
    exec(compile("\n".join(lines), str(PAGE), "exec"), cells)
    assert len(list(tmp_path.glob("*.wav"))) == 4
    wave, rate = soundfile.read("3 a fast bell with drums.wav")
    assert len(wave) == 0.4 * rate
    assert torch.isfinite(cells["alike"].waveform).all()
    assert cells["rough"].shape == cells["whole"].shape == cells["music"].waveform.shape
    assert cells["likeliest"].shape == (2,)
