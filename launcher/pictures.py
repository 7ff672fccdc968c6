"""The pictures and sounds of a report, as text that a single HTML file can hold."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import soundfile
from matplotlib.axes import Axes
from matplotlib.figure import Figure

THEMES = {
    "light": {"back": "#ffffff", "text": "#1f2328", "faint": "#d0d7de"},
    "dark": {"back": "#15181d", "text": "#d7dde4", "faint": "#3a424d"},
}
COLOURS = {
    "train": "#8b98a8",
    "validation": "#2f7fd1",
    "conditioning": "#e07b28",
    "semantic": "#2d9d6a",
    "acoustic": "#a15fc7",
}
"""One colour a curve in every picture, legible on light and on dark."""
DPI = 110
BANDS = 96
RANGE_DB = 60
"""What a spectrogram shows below its loudest point."""
SILENCE = 1e-10
TICKS_HZ = (100, 500, 1000, 2000, 4000, 8000)


def both_themes(draw: Callable[[Figure], None], width: float, height: float) -> dict[str, str]:
    """A picture of `width` × `height` inches as PNG data URLs, one for a light page and one for a dark page."""
    pictures = {}
    for name, theme in THEMES.items():
        style: Any = {
            "text.color": theme["text"],
            "axes.labelcolor": theme["text"],
            "axes.titlecolor": theme["text"],
            "axes.edgecolor": theme["faint"],
            "axes.facecolor": theme["back"],
            "axes.spines.top": False,
            "axes.spines.right": False,
            "xtick.color": theme["text"],
            "ytick.color": theme["text"],
            "grid.color": theme["faint"],
            "grid.linewidth": 0.5,
            "font.size": 9,
            "axes.titlesize": 9,
        }
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(width, height), dpi=DPI, facecolor=theme["back"], layout="constrained")
            draw(figure)
            buffer = io.BytesIO()
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Glyph .* missing")  # captions may be in any script
                figure.savefig(buffer, format="png")
        pictures[name] = data_url("image/png", buffer.getvalue())
    return pictures


def data_url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def loss_curves(stages: dict[str, dict[str, Any]]) -> dict[str, str]:
    """A panel for each stage: training and validation loss, the same with shuffled conditions, and ln(codebook)."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(stages), squeeze=False)[0]
        for panel, (name, stage) in zip(panels, stages.items(), strict=True):
            _loss_panel(panel, name, stage)
        panels[0].set_ylabel("loss, nats a token")
        named = {
            label: line for panel in panels for line, label in zip(*panel.get_legend_handles_labels(), strict=True)
        }
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=3, frameon=False)

    return both_themes(draw, 3.3 * len(stages) + 0.4, 3.4)


def _loss_panel(panel: Axes, name: str, stage: dict[str, Any]) -> None:
    def curve(points: list[list[float]], label: str, **style: Any) -> None:
        if points:
            steps, losses = zip(*points, strict=True)
            panel.plot(steps, losses, label=label, **style)

    curve(stage["train"], "training", color=COLOURS["train"], linewidth=1)
    curve(stage["validation"], "validation", color=COLOURS["validation"], linewidth=1.6, marker=".")
    # On top: a condition that is ignored shows as dashes on the curve itself.
    for field, points in stage["shuffled"].items():
        curve(points, f"validation, {field} shuffled", color=COLOURS[field], linewidth=1.2, linestyle="--", marker=".")
    if stage["ln_codebook"]:
        panel.axhline(
            stage["ln_codebook"], label="ln(codebook): knowing nothing", color=COLOURS["train"], linestyle=":"
        )
    panel.set_title(name)
    panel.set_xlabel("step")
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    panel.grid(True)


def mel(hertz: Any) -> Any:
    """The mel scale (O'Shaughnessy 1987)."""
    return 2595 * np.log10(1 + np.asarray(hertz) / 700)


def log_mel(wave: np.ndarray, sample_rate: int) -> np.ndarray:
    """Level in dB relative to the loudest point, `[BANDS, frames]`, a frame every 16 ms; at most RANGE_DB down."""
    window, hop = 2 ** round(np.log2(0.1 * sample_rate)), round(0.016 * sample_rate)
    padded = np.pad(wave, (window // 2, window - window // 2))
    frames = np.lib.stride_tricks.sliding_window_view(padded, window)[::hop]
    power = np.abs(np.fft.rfft(frames * np.hanning(window))) ** 2
    edges = np.linspace(0, mel(sample_rate / 2), BANDS + 2)
    place = mel(np.fft.rfftfreq(window, 1 / sample_rate))
    rise = (place - edges[:-2, None]) / np.diff(edges)[:-1, None]
    fall = (edges[2:, None] - place) / np.diff(edges)[1:, None]
    level = 10 * np.log10(np.maximum(np.clip(np.minimum(rise, fall), 0, None) @ power.T, SILENCE))
    # Silence is dark, not evenly loud.
    loudest = max(level.max(), 10 * np.log10(SILENCE) + RANGE_DB)
    return np.maximum(level - loudest, -RANGE_DB)


def spectrograms(pairs: Sequence[tuple[str, Path, str, Path]]) -> dict[str, str]:
    """Generated music on the left and real music beside it: `(title, WAV, title, WAV)` for each row."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(len(pairs), 2, squeeze=False, sharey="row")
        for row, pair in zip(panels, pairs, strict=True):
            for panel, kind, title, path in zip(row, ("generated", "real"), pair[::2], pair[1::2], strict=True):
                _spectrogram(panel, path)
                panel.set_title(f"{kind}: {shortened(title)}", loc="left", fontsize=8, parse_math=False)
            row[0].set_ylabel("kHz (mel scale)")
        for panel in panels[-1]:
            panel.set_xlabel("seconds")
        figure.colorbar(
            panels[0, 0].images[0], ax=panels, label="dB relative to the loudest point", aspect=40, pad=0.01
        )

    return both_themes(draw, 10.3, 0.4 + 1.9 * len(pairs))


def _spectrogram(panel: Axes, path: Path) -> None:
    wave, rate = soundfile.read(path, dtype="float32", always_2d=True)
    level, top = log_mel(wave.mean(axis=1), rate), float(mel(rate / 2))
    panel.imshow(
        level,
        origin="lower",
        aspect="auto",
        extent=(0, len(wave) / rate, 0, top),
        cmap="magma",
        vmin=-RANGE_DB,
        vmax=0,
        interpolation="nearest",
    )
    ticks = [hertz for hertz in TICKS_HZ if hertz <= rate / 2]
    panel.set_yticks([float(mel(hertz)) for hertz in ticks], [f"{hertz / 1000:g}" for hertz in ticks])


def shortened(text: str, length: int = 56) -> str:
    return text if len(text) <= length else f"{text[: length - 1].rstrip()}…"


def audio_url(path: Path) -> str:
    """A WAV as 16-bit FLAC, which every browser plays and takes about half the space."""
    wave, rate = soundfile.read(path, dtype="int16", always_2d=True)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, rate, format="FLAC", subtype="PCM_16")
    return data_url("audio/flac", buffer.getvalue())
