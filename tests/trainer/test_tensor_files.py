"""Files of tensors on disks of several kinds."""

from __future__ import annotations

import errno
import json
import logging
import os

import pytest
import torch
from safetensors.torch import load_file

from model import artifact
from model.errors import UserError
from trainer import large_file, tensor_files
from trainer.tensor_files import stretches, write_tensors

BLOCK_BYTES = 1 << 16


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", BLOCK_BYTES)
    large_file._say_cached.cache_clear()


def check(path, count=3 * BLOCK_BYTES):
    tensors = {
        "a": torch.rand(count // 4),
        "none": torch.empty(0),
        "b": torch.arange(5),
        "c": torch.rand(7, 3).T,
        "d": torch.rand(2, dtype=torch.float64),
    }
    described = write_tensors(path, tensors)
    assert described == {"bytes": path.stat().st_size, "sha256": artifact.file_digest(path)}
    found = load_file(path)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("count", [0, 4, BLOCK_BYTES, 3 * BLOCK_BYTES, 5 * BLOCK_BYTES + 12])
def test_a_file_of_any_length_holds_what_was_written(tmp_path, count):
    check(tmp_path / "a.safetensors", count)


def test_a_longer_file_in_its_place_is_cut_off(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(bytes(10 * BLOCK_BYTES))
    check(tmp_path / "a.safetensors")


def test_a_file_whose_length_is_whole_blocks(tmp_path, monkeypatch):
    """The end is seen without a shorter block."""
    path = tmp_path / "a.safetensors"
    size = write_tensors(path, {"a": torch.zeros(1000)})["bytes"]
    monkeypatch.setattr(tensor_files, "BLOCK_BYTES", size // 8)
    assert write_tensors(path, {"a": torch.zeros(1000)})["bytes"] == size


@pytest.mark.parametrize(
    "said",
    [
        {"shape": [12, 2], "data_offsets": [0, 256]},  # smaller than what is said of its place
        {"shape": [32, 2], "data_offsets": [4, 260]},
        {"shape": [32, 2], "data_offsets": [0, 128]},
    ],
)
def test_a_header_that_does_not_agree_with_itself_is_refused(tmp_path, said):
    """What follows would be read from another place."""
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.rand(32, 2), "b": torch.rand(3)})
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["a"].update(said)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    with pytest.raises(UserError, match="is no safetensors file, or its start is damaged"):
        stretches(path)


@pytest.mark.parametrize(("change", "what"), [(b"", "truncated"), (b"more than" * 50, "damaged")])
def test_a_file_of_another_length_is_refused(tmp_path, change, what):
    path = tmp_path / "file.safetensors"
    write_tensors(path, {"a": torch.rand(32, 2)})
    path.write_bytes(path.read_bytes()[:-1] + change)
    with pytest.raises(UserError, match=f"should be: it is {what}"):
        stretches(path)


def test_a_disk_without_direct_writes_is_said_once(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    original = os.open

    def without(path, flags, *arguments, **named):
        if flags & large_file.DIRECT:
            raise OSError(errno.EINVAL, "no direct writes")
        return original(path, flags, *arguments, **named)

    monkeypatch.setattr(large_file, "DIRECT", os.O_DIRECT)
    monkeypatch.setattr(os, "open", without)
    for folder in (tmp_path / "first", tmp_path / "second"):
        folder.mkdir()
        check(folder / "a.safetensors")
    assert caplog.text.count("without direct writes") == 1


def test_what_a_disk_takes_in_pieces_is_written_whole(tmp_path, monkeypatch):
    """Of which a disk that writes directly would refuse the next."""
    write, read = os.write, os.readv
    monkeypatch.setattr(os, "write", lambda handle, block: write(handle, block[:1000]))
    monkeypatch.setattr(os, "readv", lambda handle, blocks: read(handle, [block[:1000] for block in blocks]))
    check(tmp_path / "a.safetensors")


@pytest.mark.parametrize("end", [-1, 1])
def test_a_file_that_is_shorter_or_longer_than_what_was_written_is_found_out(tmp_path, monkeypatch, end):
    path = tmp_path / "a.safetensors"
    sync = tensor_files.LargeFile.sync

    def torn(self):
        sync(self)
        os.truncate(self.path, self.path.stat().st_size + end)

    monkeypatch.setattr(tensor_files.LargeFile, "sync", torn)
    with pytest.raises(OSError, match="not to be trusted"):
        check(path)
