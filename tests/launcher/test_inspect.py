from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from rich.console import Console
from synthetic_run import make_run

from data.shard_writer import write_records
from launcher.inspect import print_inspection
from launcher.inspect_tokens import decode_record
from launcher.recipe import read_run_recipe
from model import artifact
from model.encoders.mel import MelCodec
from model.errors import UserError


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("inspect") / "run", samples=2)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", samples=2)


def token_shards(folder: Path, codes: np.ndarray, remote: Path | None = None) -> Path:
    """A token artifact with one record, of two acoustic quantizers with 8 codes each."""
    fields = {"acoustic": {"name": "acoustic", "rate_hz": 2, "quantizers": 2, "codebook_size": 8}}
    none = np.zeros((1, 1), np.uint16)
    record = {"id": "a", "captions": "[]", "semantic": none, "conditioning": none, "text_conditioning": none}
    with artifact.create(folder / "tokens", "tokens", "t") as (path, info):
        write_records(path / "train", [{**record, "acoustic": codes}])
        if remote:
            (remote / "train").mkdir(parents=True)
            for shard in (path / "train").glob("*.mds"):
                shard.rename(remote / "train" / shard.name)
        info.update(fields=fields, records={"train": 1}, remote=str(remote) if remote else None)
    return folder / "tokens"


def codec_of(run: Path) -> None:
    """Gives the synthetic run a codec."""
    config = read_run_recipe(run).encoders.codec
    torch.manual_seed(0)
    codec = MelCodec(config)
    codec.quantizer.fit([torch.randn(300, codec.dim)])
    with artifact.create(run / "codec", "codec", "c") as (folder, _):
        codec.save(folder)


def shown(path: Path) -> tuple[bool, str]:
    console = Console(file=io.StringIO(), width=200)
    whole = print_inspection(path, console)
    return whole, console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("", ["run folder", "tokens", "5555555555555555"]),
        ("corpus", ["clips: 2040", "train 1900"]),
        ("tokens", ["acoustic", "8 × 256", "5 samples in 1 MDS shard", "records: train 5", "acoustic 7", "25 s"]),
        ("quantizers", ["conditioning audio train", "1,256", "62.0%", "20.0%", "75%", "5.5"]),
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
    assert ": \n" not in text
    assert "None" not in text


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


def test_codes_of_tokens_are_counted(tmp_path: Path) -> None:
    tokens = token_shards(tmp_path, np.array([[0, 5], [0, 5], [0, 6], [3, 6]], np.uint16))
    whole, text = shown(tokens)
    assert whole
    rows = {line.split()[0] + line.split()[1]: line for line in text.splitlines() if line.startswith(" acoustic ")}
    assert "25%" in rows["acoustic0"]  # 2 of 8 codes
    assert "0–3" in rows["acoustic0"]
    assert "0 (75.0%)" in rows["acoustic0"]
    assert "2.0" in rows["acoustic1"]  # two codes, evenly
    assert "4 to 4 frames a record" in text


def test_codes_that_no_codebook_has_are_damage(tmp_path: Path) -> None:
    whole, text = shown(token_shards(tmp_path, np.array([[0, 8]], np.uint16)))
    assert not whole
    assert "1 codes of acoustic are not in its codebook" in text


def test_shards_are_compared_with_their_index_where_there_is_no_manifest_of_them(tmp_path: Path) -> None:
    """As for shards at a remote, which is a folder here."""
    tokens = token_shards(tmp_path, np.array([[0, 7]], np.uint16), remote=tmp_path / "there")
    assert shown(tokens)[0]
    shard = tmp_path / "there" / "train" / "shard.00000.mds"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(bytes(content))
    whole, text = shown(tokens)
    assert not whole
    assert f"{shard} has changed" in text.replace("\n", "")


def test_a_record_becomes_sound(run: Path, tmp_path: Path) -> None:
    codec_of(run)
    said = decode_record(run / "tokens", "clip-3", None, tmp_path / "a.wav")
    assert said == "clip-3, 5.0 s: a tune"
    wave, rate = soundfile.read(tmp_path / "a.wav")
    assert (len(wave), rate) == (5 * 16_000, 16_000)
    assert abs(wave).max() > 0
    decode_record(run / "tokens", "8", None, tmp_path / "b.wav")
    with pytest.raises(UserError, match="no record 'clip-9': name an id, or a number from 0 to 9"):
        decode_record(run / "tokens", "clip-9", None, tmp_path / "c.wav")
    with pytest.raises(UserError, match="does not lie in a run folder: say with --run"):
        decode_record(token_shards(tmp_path, np.array([[0, 7]], np.uint16)), "0", None, tmp_path / "c.wav")


@pytest.mark.parametrize("name", ["absent", "text.txt", "folder"])
def test_what_is_not_ours_is_said_plainly(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "text.txt":
        path.write_text("hello")
    elif name == "folder":
        path.mkdir()
    with pytest.raises(UserError):
        shown(path)
