"""EnCodec 24 kHz (Defossez et al. 2022), as transformers load it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.config import CodecConfig
from model.encoders.pretrained import load_pretrained, save_note, weights_folder, weights_key
from model.errors import UserError
from model.fields import ACOUSTIC, TokenField


class EncodecCodec:
    """Mono EnCodec at the bandwidth with `config.quantizers` codebooks; always in fp32, as bf16 changes most codes."""

    def __init__(self, config: CodecConfig) -> None:
        """Raises UserError where there are no weights, or where they are not what `config` says."""
        from transformers import EncodecConfig, EncodecModel

        folder = weights_folder("encodec", config.weights)
        found = EncodecConfig.from_pretrained(folder, local_files_only=True)
        self.bandwidth = _bandwidth(found, config)
        self.weights = config.weights
        self.sample_rate = config.sample_rate
        self.frame_samples = config.sample_rate // config.frame_rate
        self.field = TokenField(ACOUSTIC, config.frame_rate, config.quantizers, config.codebook_size)
        self.model = load_pretrained(EncodecModel, "encodec", folder, found)

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Codes int64 `[batch, samples // frame_samples, quantizers]` of `wave` `[batch, samples]`."""
        whole = wave.shape[-1] // self.frame_samples * self.frame_samples
        if not whole:
            return torch.zeros(len(wave), 0, self.field.quantizers, dtype=torch.int64)
        wave = wave[:, None, :whole].to(self.model.device)
        return self.model.encode(wave, bandwidth=self.bandwidth).audio_codes[0].transpose(1, 2).cpu()

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """A wave `[batch, frames × frame_samples]`."""
        if not codes.shape[1]:
            return torch.zeros(len(codes), 0)
        stacked = codes.long().transpose(1, 2)[None].to(self.model.device)
        wave = self.model.decode(stacked, [None]).audio_values[:, 0].cpu()
        return wave[:, : codes.shape[1] * self.frame_samples]

    def save(self, folder: Path) -> None:
        """Writes a note of which weights these are."""
        save_note(folder, "encodec", self.weights)

    @classmethod
    def load(cls, folder: Path, config: CodecConfig) -> EncodecCodec:
        return cls(config)


def _bandwidth(found, config: CodecConfig) -> float:
    """The bandwidth (kbps) with `config.quantizers` codebooks. Raises UserError where the recipe does not fit."""
    if found.audio_channels != 1 or found.normalize or found.chunk_length_s:
        raise UserError(
            f"{weights_key('encodec')}: only mono EnCodec without normalisation or chunks (24 kHz) is supported."
        )
    rate = found.sampling_rate / found.hop_length
    for key, value, wanted in (
        ("sample_rate", config.sample_rate, found.sampling_rate),
        ("frame_rate", config.frame_rate, rate),
        ("codebook_size", config.codebook_size, found.codebook_size),
    ):
        if value != wanted:
            raise UserError(f"encoders.codec.{key} is {value}, but these EnCodec weights have {wanted:g}.")
    bits = found.codebook_size.bit_length() - 1
    choices = {int(1000 * kbps // (rate * bits)): kbps for kbps in found.target_bandwidths}
    if config.quantizers not in choices:
        raise UserError(
            f"encoders.codec.quantizers is {config.quantizers}: at its bandwidths these EnCodec weights have "
            f"{', '.join(map(str, choices))}."
        )
    return choices[config.quantizers]
