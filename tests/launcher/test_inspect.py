from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from synthetic_run import make_run

from launcher.inspect import print_inspection
from model import artifact
from model.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("inspect") / "run", samples=2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", samples=2)


def shown(path: Path) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    whole = print_inspection(path, console)
    return whole, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("", ["run folder", "tokens", "5555555555555555"]),
        ("corpus", ["clips: 2040", "train 1900"]),
        ("tokens", ["acoustic", "8 × 256", "5 samples in 1 MDS shard", "records: train 5"]),
        ("tokens/train", ["shard.00000.mds", "acoustic (ndarray:uint16)"]),
        ("semantic", ["trained stage", "steps: 600", "heads", "3 × 256 × 8"]),
        ("bundle", ["bundle", "made from: semantic 0000000000000000", "embedding.weight", "16 × 8"]),
        ("bundle/semantic.safetensors", ["1 tensor", "128 numbers", "F32"]),
        ("semantic/metrics.jsonl", ["steps 10 to 600", "validation: 7 rows"]),
        ("samples", ["wav/00.wav", "real/00.wav", "prompts: 2"]),
    ],
)
def test_what_a_path_holds(made: Path, place: str, says: list[str]) -> None:
    whole, text = shown(made / place)
    assert whole
    assert "whole" in text
    for words in says:
        assert words in text


def test_a_checkpoint_and_a_run_that_has_one(run: Path) -> None:
    folder = run / "fine" / "checkpoints" / "step-00000200"
    with artifact.create(folder, "checkpoint", "2" * 16) as (partial, info):
        (partial / "engine").mkdir()
        (partial / "engine" / "states.pt").write_bytes(bytes(10))
        info.update(step=200)
    assert "step: 200" in shown(folder)[1]
    assert "fine/checkpoints/step-00000200" in shown(run)[1]


def test_a_changed_file_is_named(run: Path) -> None:
    clips = run / "corpus" / "clips.jsonl"
    clips.write_text(clips.read_text().replace("slow", "fast"))
    for path in (run, run / "corpus"):
        whole, text = shown(path)
        assert not whole
        assert f"damaged: {clips} has changed" in text


@pytest.mark.parametrize("length", [4, 40, 5_000])
def test_a_cut_safetensors_file_is_damaged(run: Path, length: int) -> None:
    weights = run / "semantic" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:length])
    whole, text = shown(run / "semantic")  # its manifest knows
    assert not whole
    assert "bytes" in text
    if length == 5_000:  # the header is there: what it says differs from the file
        assert not shown(weights)[0]
    else:
        with pytest.raises(UserError, match="damaged"):
            shown(weights)


def test_a_missing_shard_is_named(run: Path) -> None:
    (run / "tokens" / "train" / "shard.00000.mds").unlink()
    whole, text = shown(run / "tokens" / "train")
    assert not whole
    assert "shard.00000.mds is missing" in text


def test_a_damaged_manifest_in_a_run_does_not_hide_the_rest(run: Path) -> None:
    (run / "codec").mkdir()
    (run / "codec" / "manifest.json").write_text("{")
    whole, text = shown(run)
    assert not whole
    assert "bundle" in text


def test_a_torn_last_line_of_metrics_is_no_damage_and_another_is(run: Path) -> None:
    path = run / "coarse" / "metrics.jsonl"
    path.write_text(path.read_text() + '{"kind": "tr')
    whole, text = shown(path)
    assert whole
    assert "last line" in text
    path.write_text('{"kind"\n' + path.read_text())
    assert not shown(path)[0]


@pytest.mark.parametrize("name", ["absent", "text.txt", "folder"])
def test_what_is_not_ours_is_said_plainly(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "text.txt":
        path.write_text("hello")
    elif name == "folder":
        path.mkdir()
    with pytest.raises(UserError):
        shown(path)
