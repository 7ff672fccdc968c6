"""Small stages and processes with a time limit, shared by the tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import torch

from model.config import ConditionConfig, StageModelConfig, TransformerConfig
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC, TokenField

FIELDS = {
    CONDITIONING: TokenField(CONDITIONING, 0.2, 4, 16),
    SEMANTIC: TokenField(SEMANTIC, 10, 1, 64),
    ACOUSTIC: TokenField(ACOUSTIC, 20, 4, 256),
}
CENTROID_DIM = 8
SMALL = TransformerConfig(dim=64, layers=2, heads=2)
ROOT = Path(__file__).parents[1]
CONVERSIONS = "conversions"
"""The property by which tests record by how much logits differ after a conversion, for the table at the end."""


def quantizers() -> dict[str, torch.Tensor]:
    """Centroids of the conditioning and semantic fields."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(FIELDS[name].quantizers, FIELDS[name].codebook_size, CENTROID_DIM, generator=generator)
        for name in (CONDITIONING, SEMANTIC)
    }


def coarse_config(**changes: object) -> StageModelConfig:
    """A stage that uses every path: two quantizers of the acoustic field from conditioning and semantic codes."""
    settings: dict = {
        "field": ACOUSTIC,
        "last": 2,
        "conditions": [
            ConditionConfig(field=CONDITIONING, paths=["prefix", "summed"]),
            ConditionConfig(field=SEMANTIC, paths=["prefix", "aligned"]),
        ],
        "window_seconds": 2.0,
        "transformer": SMALL,
        **changes,
    }
    return StageModelConfig(**settings)


def fine_config(**changes: object) -> StageModelConfig:
    """A stage that predicts some quantizers of a field from others of the same field."""
    conditions = [ConditionConfig(field=ACOUSTIC, last=2, paths=["aligned"])]
    return coarse_config(first=2, last=None, conditions=conditions, **changes)


def random_batch(seconds: float = 2.0, batch: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Codes of every field for `seconds`; one row of conditioning."""
    generator = torch.Generator().manual_seed(seed)

    def codes(field: TokenField, frames: int) -> torch.Tensor:
        return torch.randint(field.codebook_size, (batch, frames, field.quantizers), generator=generator)

    return {name: codes(field, 1 if name == CONDITIONING else field.frames(seconds)) for name, field in FIELDS.items()}


def run_command(arguments: list[str], timeout: float = 120, **settings) -> subprocess.CompletedProcess[str]:
    """Runs `python -m …`; when `timeout` (seconds) passes, its whole process group is killed and the test fails."""
    with subprocess.Popen(
        [sys.executable, "-m", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=settings.pop("cwd", ROOT),
        start_new_session=True,
        **settings,
    ) as process:
        try:
            out, error = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            out, error = process.communicate()
            raise AssertionError(f"{arguments} hung for {timeout} s\n{out}\n{error}") from None
    return subprocess.CompletedProcess(arguments, process.returncode, out, error)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
