from __future__ import annotations

import base64
import io
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import soundfile
from rich.console import Console
from synthetic_run import make_run

from launcher.pictures import BANDS, RANGE_DB, log_mel, mel
from launcher.report import beside, print_summary, write_report

VOID = {"meta", "img", "source", "br"}


class Page(HTMLParser):
    """Collects the text and every address of a page; fails where tags do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(html)
        assert not self.open
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} " if self.open[-1:] != ["style"] else ""


def made(run: Path, **settings: bool) -> Page:
    make_run(run, samples=2, **settings)
    return Page(write_report(run).read_text())


def summary(run: Path) -> str:
    console = Console(file=io.StringIO(), width=100)
    print_summary(run, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("report") / "run"
    make_run(run)
    write_report(run)
    return run


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text())


def test_the_page_needs_nothing_from_elsewhere(run: Path, page: Page) -> None:
    for address in page.addresses:
        assert address.startswith("data:") or (run / address).exists(), address
    assert str(run) not in page.text


def test_adherence_is_shown_beside_chance_shuffled_prompts_and_ceiling(page: Page) -> None:
    assert "instrument 75% 19% 20% 100% 98% 77%" in page.text
    assert "mean 79% 38% 38% 100% 98% 80%" in page.text


def test_a_dozen_clips_can_be_played_and_all_are_listed(run: Path, page: Page) -> None:
    sounds = [address for address in page.addresses if address.startswith("data:audio")]
    assert len(sounds) == 12 + 4
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(sounds[0].partition(",")[2])))
    expected, _ = soundfile.read(run / "samples" / "wav" / "00.wav")
    assert rate == 16_000
    assert np.array_equal(wave, expected)
    for number in range(14):
        assert f"samples/wav/{number:02d}.wav" in page.text


def test_prompts_and_captions_are_escaped_and_judgements_marked(page: Page) -> None:
    assert "a slow <i>plucked string</i> & low notes, drums" in page.text
    assert "✓ slow" in page.text
    assert "✗ slow (asked: medium)" in page.text


def test_pictures_come_for_light_and_dark_pages(page: Page) -> None:
    pictures = [address for address in page.addresses if address.startswith("data:image/png")]
    assert len(pictures) == 4
    assert all(base64.b64decode(one.partition(",")[2]).startswith(b"\x89PNG") for one in pictures)


def test_an_ignored_condition_is_pointed_out(run: Path, page: Page) -> None:
    assert page.text.count("ignores its condition") == 1
    assert "the coarse stage ignores its conditioning condition" in summary(run)


def test_what_the_quantizers_leave_and_use_is_shown(page: Page) -> None:
    assert "conditioning audio train 1,256 62% 20% 75% 5.5 of 8" in page.text
    assert "conditioning audio validation 100 64% 30% 75% 5.5 of 8" in page.text


def test_json_has_the_same_figures(run: Path) -> None:
    figures = json.loads((run / "report.json").read_text())
    assert figures["adherence"]["generated"]["mean"] == 0.79
    assert figures["share_of_ceiling"]["instrument"] == pytest.approx(0.75 / 0.98)
    assert figures["seconds"]["coarse"] == 121.0
    coarse = figures["stages"]["coarse"]
    assert coarse["first_loss"] == pytest.approx(coarse["ln_codebook"], rel=0.05)
    assert coarse["conditions"]["conditioning"]["ignored"]
    assert not coarse["conditions"]["semantic"]["ignored"]
    assert figures["samples"][0]["right"] == {"instrument": True, "register": True, "tempo": True, "drums": True}
    assert {"python", "torch", "deepspeed"} <= set(figures["versions"])
    assert figures["machine"]["cores"] >= 1


def test_the_summary_says_where_things_are_and_how_to_go_on(run: Path) -> None:
    text = summary(run)
    assert "coarse 2 min 1 s" in text
    assert f"stretto generate {run}/bundle 'a slow <i>plucked string</i>" in text
    assert str(run / "report.html") in text


def test_own_audio_without_attributes_says_why_nothing_is_judged(tmp_path: Path) -> None:
    page = made(tmp_path / "run", attributes=False)
    assert "It is not known which instrument" in page.text
    assert "share of ceiling" not in page.text
    assert "2,040 from 12 files" in page.text
    assert "take <2>.wav silent its loudest 50 ms stay below -60 dB" in page.text
    assert "✓" not in page.text


def test_audio_without_captions_says_what_that_means_for_prompts(tmp_path: Path) -> None:
    page = made(tmp_path / "run", attributes=False, captions=False)
    assert "words mean nothing to it" in page.text
    assert "--like RECORDING" in page.text
    assert "made to resemble" in page.text
    assert "words mean nothing to it" in " ".join(summary(tmp_path / "run").split())


@pytest.mark.parametrize(
    "missing", [["samples"], ["samples", "bundle", "fine", "coarse"], ["corpus", "tokens"], ["samples/wav"]]
)
def test_a_report_is_made_of_what_there_is(tmp_path: Path, missing: list[str]) -> None:
    run = make_run(tmp_path / "run", samples=2)
    for place in missing:
        shutil.rmtree(run / place)
    Page(write_report(run).read_text())
    summary(run)


def test_a_run_that_has_only_begun_has_a_report_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("name: new\n")
    page = Page(write_report(tmp_path).read_text())
    assert "Not finished: corpus" in page.text
    summary(tmp_path)


def test_generated_clips_stand_beside_real_ones_that_are_alike() -> None:
    low, high = {"register": "low"}, {"register": "high"}
    samples = [{"wav": "a", "attributes": high}, {"wav": "b", "attributes": low}]
    real = [{"wav": "c", "attributes": low}, {"wav": "d", "attributes": {**high, "mode": "major"}}]
    assert [(one["wav"], other["wav"]) for one, other in beside(samples, real)] == [("a", "d"), ("b", "c")]


def test_a_spectrogram_puts_a_tone_where_it_sounds_and_shows_silence_dark() -> None:
    time = np.arange(16_000) / 16_000
    level = log_mel(np.sin(2 * np.pi * 1_000 * time).astype(np.float32), 16_000)
    band = int(level[:, level.shape[1] // 2].argmax())
    assert band / BANDS == pytest.approx(float(mel(1_000) / mel(8_000)), abs=0.02)
    assert level.max() == 0
    assert log_mel(np.zeros(16_000, np.float32), 16_000).max() == -RANGE_DB


def test_titles_with_dollars_and_other_scripts_are_drawn_as_they_are(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    from launcher.pictures import spectrograms

    soundfile.write(tmp_path / "a.wav", np.zeros(1600), 16_000)
    spectrograms([("$5 for $x^{", tmp_path / "a.wav", "古琴", tmp_path / "a.wav")])
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_a_page_without_words_for_jinja_shows_braces_as_they_are(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", samples=1)
    row = json.loads((run / "samples" / "samples.jsonl").read_text())
    (run / "samples" / "samples.jsonl").write_text(json.dumps({**row, "prompt": "{{ 7 * 7 }}"}) + "\n")
    assert re.search(r"\{\{ 7 \* 7 \}\}", Page(write_report(run).read_text()).text)
