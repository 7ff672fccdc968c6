"""CLAP (Wu et al. 2023) without fusion, run by transformers.

Weights come as transformers save them, or as LAION's own checkpoints (`music_audioset_epoch_15_esc_90.14.pt`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.config import JointEmbedderConfig
from model.encoders.laion import load_laion
from model.encoders.precision import computing_in
from model.encoders.pretrained import (
    PREPROCESSOR,
    check_note,
    find_weights,
    load_pretrained,
    read_json,
    save_note,
    weights_key,
)
from model.errors import UserError

BATCH = 64


class ClapEmbedder:
    """Up to 10 s of audio at 48 kHz, or text → unit vectors."""

    fitted = False

    def __init__(self, config: JointEmbedderConfig) -> None:
        """Raises UserError where there are no weights, or where they are not what `config` says or are damaged."""
        source = find_weights(config)
        if source.is_file():
            self.model, extractor, self.tokenizer = load_laion(config, source)
            _check(self.model.config, config, extractor)
        else:
            self.model, extractor, self.tokenizer = _from_folder(config, source)
        self.config = config
        self.sample_rate = config.sample_rate
        self.dim = config.dim
        self.spectrogram = Spectrogram(extractor, self.model.device)

    @torch.no_grad()
    def embed_audio(self, wave: Tensor) -> Tensor:
        """Unit vectors float32 `[batch, dim]` of `wave` `[batch, samples]`; of more than 10 s the middle counts.

        Shorter waves are repeated to 10 s, as in CLAP's training.
        """
        # CLAP crops longer waves at random.
        extra = max(0, wave.shape[-1] - self.spectrogram.samples)
        wave = wave[:, extra // 2 : wave.shape[-1] - (extra - extra // 2)]
        parts = []
        for part in wave.split(BATCH):
            mel = self.spectrogram(part.to(self.model.device))
            with computing_in(self.config.dtype, self.model.device):
                parts.append(self.model.get_audio_features(input_features=mel))
        return _unit(parts, self.dim)

    @torch.no_grad()
    def embed_text(self, texts: list[str]) -> Tensor:
        """Unit vectors float32 `[len(texts), dim]`; a text's tokens beyond what the model reads are cut off."""
        parts = []
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenizer(texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt")
            tokens = tokens.to(self.model.device)
            with computing_in(self.config.dtype, self.model.device):
                features = self.model.get_text_features(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                )
            parts.append(features)
        return _unit(parts, self.dim)

    def save(self, folder: Path) -> None:
        """Writes a note of which weights these are."""
        save_note(folder, self.config)

    @classmethod
    def load(cls, folder: Path, config: JointEmbedderConfig) -> ClapEmbedder:
        check_note(folder, config)
        return cls(config)


class Spectrogram:
    """What CLAP's audio tower sees: log-mel in dB `[batch, 1, frames, bands]`, the same as `ClapFeatureExtractor` makes
    of one wave after another in numpy, but of a whole batch and on the GPU."""

    def __init__(self, extractor: Any, device: torch.device) -> None:
        self.samples = extractor.nb_max_samples
        self.hop = extractor.hop_length
        self.window = torch.hann_window(extractor.fft_window_size, device=device)
        self.filters = torch.from_numpy(extractor.mel_filters_slaney).float().to(device)

    def __call__(self, wave: Tensor) -> Tensor:
        """Of `wave` `[batch, samples]`, at most 10 s: shorter ones are repeated, then padded with silence."""
        wave = (wave.clamp(-1, 1) * 32767).trunc() / 32767  # CLAP was trained on audio of 16 bits
        wave = wave.repeat(1, self.samples // max(1, wave.shape[1]))
        wave = F.pad(wave, (0, self.samples - wave.shape[1]))
        spectrum = torch.stft(wave, len(self.window), self.hop, window=self.window, return_complex=True)
        power = (spectrum.real.square() + spectrum.imag.square()).transpose(1, 2)
        return 10 * (power @ self.filters).clamp_min(1e-10).log10()[:, None]


def _unit(parts: list[Tensor], dim: int) -> Tensor:
    """Unit vectors again, whatever number type they were made in."""
    return F.normalize(torch.cat([part.float().cpu() for part in parts]), dim=-1) if parts else torch.zeros(0, dim)


def _from_folder(config: JointEmbedderConfig, folder: Path) -> tuple[Any, Any, Any]:
    """The model, the feature extractor and the tokenizer of a folder."""
    from transformers import AutoTokenizer, ClapConfig, ClapFeatureExtractor, ClapModel

    found = ClapConfig.from_pretrained(folder, local_files_only=True)
    read_json("clap", folder, PREPROCESSOR)
    extractor = ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)
    _check(found, config, extractor)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{weights_key('clap')}: the tokenizer in {folder} does not load: {reason}") from None
    return load_pretrained(ClapModel, "clap", folder, found), extractor, tokenizer


def _check(found: Any, config: JointEmbedderConfig, extractor: Any) -> None:
    """Raises UserError where the recipe and the weights do not fit."""
    if found.audio_config.enable_fusion:
        raise UserError(f"{weights_key('clap')}: CLAP with fusion is not supported: choose an unfused checkpoint.")
    if extractor.padding != "repeatpad":
        raise UserError(f"{weights_key('clap')}: padding {extractor.padding!r} is not supported: CLAP has 'repeatpad'.")
    rate, longest = extractor.sampling_rate, extractor.max_length_s
    if config.sample_rate != rate:
        raise UserError(f"encoders.joint.sample_rate is {config.sample_rate}, but these CLAP weights want {rate}.")
    if config.dim != found.projection_dim:
        raise UserError(f"encoders.joint.dim is {config.dim}, but these CLAP weights give {found.projection_dim}.")
    if config.window_seconds > longest:
        raise UserError(
            f"encoders.joint.window_seconds is {config.window_seconds:g}, but CLAP hears {longest} s at most."
        )
