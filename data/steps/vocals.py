"""Vocals taken out by Demucs (the extra `vocals`), so that the tokens are those of an instrumental."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np
import soxr
import torch
from demucs.apply import BagOfModels, apply_model
from demucs.states import load_model
from torch import Tensor

from data.steps.base import Step
from data.steps.demucs_weights import KEY, find_weights, read_package
from data.waves import Kind
from model.errors import UserError

VOCALS = "vocals"
CHANNELS = 2
SILENT = 1e-8


class Vocals(Step):
    """Every encoder, and every step after this one, hears the sum of all other sources that Demucs finds."""

    def __init__(self, model: str, weights: str | None) -> None:
        found = find_weights(model, weights)
        bag = BagOfModels([_load(path) for path in found.models], found.weights, found.segment)
        if VOCALS not in bag.sources or bag.audio_channels != CHANNELS:
            raise UserError(f"{KEY}: the model {model!r} is none that tells vocals in stereo from other sources.")
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = bag.eval().requires_grad_(False).to(self.device)
        self.others = [number for number, name in enumerate(bag.sources) if name != VOCALS]
        self.rate = bag.samplerate
        self.kinds = [(self.rate, CHANNELS)]

    def audio(self, waves: dict[Kind, Tensor]) -> dict[Kind, Tensor]:
        # One clip at a time: several take as many times the memory, and no less time.
        heard = [self.without_vocals(mix).numpy() for mix in waves[self.rate, CHANNELS]]
        return {
            kind: torch.from_numpy(np.stack([_resampled(wave, self.rate, kind, like.shape[-1]) for wave in heard]))
            for kind, like in waves.items()
        }

    def without_vocals(self, mix: Tensor) -> Tensor:
        """float32 `[2, samples]` of a mix of that shape, at the rate of `kinds`."""
        level, spread = mix.mean(), mix.mean(0).std() + SILENT
        # Without Demucs' random shifts: the same clip gives the same tokens.
        sources = apply_model(self.model, ((mix - level) / spread)[None], shifts=0, device=self.device)[0]
        return sources[self.others].sum(0).cpu() * spread + level


def _load(path: Any) -> Any:
    package = read_package(path)
    module, _, name = package["klass"].rpartition(".")
    package["klass"] = getattr(import_module(module), name)
    try:
        return load_model(package)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"{KEY}: the weights in {path} do not fit their model: {error}") from None


def _resampled(wave: np.ndarray, rate: int, kind: Kind, samples: int) -> np.ndarray:
    """`wave` `[2, samples at rate]` as `kind` wants it, of so many samples."""
    sample_rate, channels = kind
    mixed = wave.T if channels == CHANNELS else wave.mean(0)
    resampled = mixed if rate == sample_rate else soxr.resample(mixed, rate, sample_rate)
    out = np.zeros((samples, *mixed.shape[1:]), np.float32)
    out[: len(resampled)] = resampled[:samples]
    return np.clip(out, -1.0, 1.0).T
