"""EnCodec (Defossez et al. 2022), 24 kHz mono and 48 kHz stereo, run by transformers.

Weights come as transformers save them, or as the `encodec` library's own checkpoints (`encodec_24khz-d7cc33bc.th`): the
codes are the same.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.config import CodecConfig
from model.encoders.checkpoint import fill, read_tensors
from model.encoders.encodec_waves import Continuous, Segmented
from model.encoders.pretrained import check_note, find_weights, load_pretrained, save_note, weights_key
from model.errors import UserError
from model.fields import ACOUSTIC, TokenField

# The library's names → transformers'.
RENAMED = (
    (r"\.model\.", ".layers."),
    (r"\.conv\.(conv|norm)\.", lambda found: ".conv." if found[1] == "conv" else ".norm."),
    (r"\.convtr\.(convtr|norm)\.", lambda found: ".conv." if found[1] == "convtr" else ".norm."),
    (r"\.weight_g$", ".parametrizations.weight.original0"),
    (r"\.weight_v$", ".parametrizations.weight.original1"),
    (r"^quantizer\.vq\.", "quantizer."),
    (r"\._codebook\.", ".codebook."),
)
# What the library builds its two models with, where transformers' defaults differ.
ARCHITECTURES: dict[int, dict[str, Any]] = {
    1: {},
    2: {
        "target_bandwidths": [3.0, 6.0, 12.0, 24.0], "sampling_rate": 48_000, "audio_channels": 2, "normalize": True,
        "chunk_length_s": 1.0, "overlap": 0.01, "use_causal_conv": False, "norm_type": "time_group_norm",
    },
}  # fmt: skip


class EncodecCodec:
    """EnCodec at the bandwidth with the codebooks that `config.quantizers` asks for.

    The model of 24 kHz takes a wave of any length as one (`Continuous`). That of 48 kHz takes seconds of it, each
    scaled to one loudness, which is then one more code of a frame, the first (`Segmented`): its `config.quantizers` is
    one more than its codebooks. Always in fp32: bf16 changes most codes (83 % of the first codebook's).
    """

    fitted = False

    def __init__(self, config: CodecConfig) -> None:
        """Raises UserError where there are no weights, or where they are not what `config` says."""
        source = find_weights(config)
        self.model = _from_file(config, source) if source.is_file() else _from_folder(config, source)
        if self.model.device.type == "cuda":
            # TF32, torch's choice for convolutions in fp32, has as few digits as fp16. There is no switch of one model.
            torch.backends.cudnn.allow_tf32 = False
        self.config = config
        self.sample_rate = config.sample_rate
        self.channels = self.model.config.audio_channels
        self.field = TokenField(ACOUSTIC, config.frame_rate, config.quantizers, config.codebook_size)
        coder = Segmented if self.model.config.normalize else Continuous
        self._coder = coder(self.model, _bandwidths(self.model.config)[config.quantizers])

    @torch.no_grad()
    def encode(self, wave: Tensor) -> Tensor:
        """Codes int64 `[batch, samples // hop, quantizers]` of `wave`, `[batch, samples]` or `[batch, 2, samples]`.

        Long waves are done in chunks (`Continuous`) or segments (`Segmented`).
        """
        wave = wave[:, None] if self.channels == 1 else wave
        whole = wave.shape[-1] // self._coder.hop * self._coder.hop
        if not whole:
            return torch.zeros(len(wave), 0, self.field.quantizers, dtype=torch.int64)
        return self._coder.encode(wave[..., :whole])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """A wave, `[batch, frames × hop]` or `[batch, 2, frames × hop]`; the first few quantizers will do."""
        wave = self._coder.decode(codes.long()) if codes.shape[1] else torch.zeros(len(codes), self.channels, 0)
        return wave[:, 0] if self.channels == 1 else wave

    def save(self, folder: Path) -> None:
        """Writes a note of which weights these are."""
        save_note(folder, self.config)

    @classmethod
    def load(cls, folder: Path, config: CodecConfig) -> EncodecCodec:
        check_note(folder, config)
        return cls(config)


def _from_folder(config: CodecConfig, folder: Path) -> Any:
    from transformers import EncodecConfig, EncodecModel

    found = EncodecConfig.from_pretrained(folder, local_files_only=True)
    _check(found, config)
    return load_pretrained(EncodecModel, "encodec", folder, found)


def _from_file(config: CodecConfig, file: Path) -> Any:
    from transformers import EncodecConfig, EncodecModel

    tensors = {_renamed(name): value for name, value in read_tensors("encodec", file).items()}
    stereo = any(name == "encoder.layers.0.conv.weight" and value.shape[1] == 2 for name, value in tensors.items())
    found = EncodecConfig(**ARCHITECTURES[2 if stereo else 1])
    _check(found, config)
    return fill(EncodecModel(found), tensors, "encodec", file)


def _renamed(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def _check(found: Any, config: CodecConfig) -> None:
    """Raises UserError where the recipe and the weights do not fit."""
    if (found.audio_channels, found.normalize, found.chunk_length_s) not in ((1, False, None), (2, True, 1.0)):
        raise UserError(
            f"{weights_key('encodec')}: EnCodec of 24 kHz (mono, whole waves) and of 48 kHz (stereo, normalised "
            "seconds) work; these weights are neither."
        )
    for key, value, wanted in (
        ("sample_rate", config.sample_rate, found.sampling_rate),
        ("frame_rate", config.frame_rate, found.sampling_rate / found.hop_length),
        ("codebook_size", config.codebook_size, found.codebook_size),
    ):
        if value != wanted:
            raise UserError(f"encoders.codec.{key} is {value}, but these EnCodec weights have {wanted:g}.")
    choices = _bandwidths(found)
    if config.quantizers not in choices:
        raise UserError(
            f"encoders.codec.quantizers is {config.quantizers}: at its bandwidths these EnCodec weights have "
            f"{', '.join(map(str, choices))}{' (the first is the loudness)' if found.normalize else ''}."
        )


def _bandwidths(found: Any) -> dict[int, float]:
    """The bandwidth (kbps) that gives each possible number of codes a frame."""
    bits = found.codebook_size.bit_length() - 1
    a_second = found.sampling_rate / found.hop_length * bits
    return {int(1000 * kbps // a_second) + found.normalize: kbps for kbps in found.target_bandwidths}
