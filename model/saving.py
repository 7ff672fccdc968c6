"""Writing tensors to safetensors files."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

SYSTEM_ERROR = re.compile(r"os error (\d+)")


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raises OSError where the system does not write it, such as on a full disk."""
    with system_errors(path):
        save_file({name: value.contiguous() for name, value in tensors.items()}, path)


@contextlib.contextmanager
def system_errors(path: Path) -> Iterator[None]:
    """What the system refuses while `path` is written is an OSError, of which safetensors makes an error of its own."""
    try:
        yield
    except SafetensorError as error:
        number = SYSTEM_ERROR.search(str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
