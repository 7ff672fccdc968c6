"""Vectors on the disk: what is written comes back, and a disk that is too small is named before anything is written."""

from __future__ import annotations

import pytest
import torch

from data.vector_file import VectorFile, check_room
from model.errors import UserError


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float16, 2)])
def test_blocks_come_back_and_can_be_replaced(tmp_path, dtype, size):
    blocks = [torch.randn(rows, 3).half().float() for rows in (4, 0, 7, 1)]
    with (tmp_path / "vectors").open("w+b") as file:
        vectors = VectorFile(file, 3, dtype)
        for block in blocks:
            vectors.append(block)
        assert (len(vectors), vectors.vectors) == (4, 12)
        vectors[2] = blocks[2] * 2
        for index in (3, 0, 1):
            assert torch.equal(vectors[index], blocks[index])
        assert torch.equal(vectors[2], blocks[2] * 2)
        with pytest.raises(ValueError, match="block 0"):
            vectors[0] = blocks[2]
    assert (tmp_path / "vectors").stat().st_size == 12 * 3 * size


def test_a_file_that_is_there_is_read_in_blocks(tmp_path):
    x = torch.randn(1000, 2)
    x.numpy().tofile(tmp_path / "vectors")
    with (tmp_path / "vectors").open("rb") as file:
        vectors = VectorFile(file, 2, sizes=[300, 700])
        assert torch.equal(torch.cat([vectors[0], vectors[1]]), x)
        with pytest.raises(IndexError):
            vectors[2]


def test_too_little_room_is_said_in_words(tmp_path):
    check_room(tmp_path, 1000, 8, "the fit", "quantizers.semantic.fit_vectors")
    with pytest.raises(
        UserError, match=r"the fit keeps .* GB are free.*lower quantizers.semantic.fit_vectors"
    ) as error:
        check_room(tmp_path, 10**12, 768, "the fit", "quantizers.semantic.fit_vectors")
    assert "1,000,000,000,000 vectors of 768 numbers, 3072000.0 GB" in str(error.value)
