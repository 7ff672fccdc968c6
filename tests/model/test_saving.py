"""Tensors that the system does not take."""

from __future__ import annotations

import errno
import resource
import signal

import pytest
import torch

from model.saving import save_tensors
from model.stock.weights import save_tensors as save_checkpoint


@pytest.fixture
def small_files():
    """The system takes no file above a kilobyte, as if the disk were full."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(("save", "name"), [(save_tensors, "a.safetensors"), (save_checkpoint, "")])
def test_what_the_system_refuses_is_its_own_error(tmp_path, save, name):
    """By which commands tell of a full disk in a plain line."""
    with pytest.raises(OSError, match="File too large") as caught:
        save({"weights": torch.zeros(1000)}, tmp_path / name)
    assert caught.value.errno == errno.EFBIG
    assert str(tmp_path) in caught.value.filename
