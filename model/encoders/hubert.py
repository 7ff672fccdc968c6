"""HuBERT (Hsu et al. 2021) and MERT (Li et al. 2023) up to one of their layers: transformers' HuBERT runs both."""

from __future__ import annotations

from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.config import SemanticEncoderConfig
from model.encoders.chunks import by_rows, in_chunks
from model.encoders.precision import computing_in
from model.encoders.pretrained import PREPROCESSOR, find_weights, load_pretrained, read_json, weights_key
from model.errors import UserError

# What MERT's own code does beyond HuBERT, by the keys of its configuration: such weights need that code.
BEYOND_HUBERT = ("feature_extractor_cqt", "deepnorm")
CHUNK_SECONDS = 60.0
CONTEXT_SECONDS = 5.0


class HubertEncoder:
    """The output of layer `config.layer`, one vector a frame of about 400 samples every 320.

    A frame's samples are centred on its interval: the wave gets half of what a frame reaches beyond it on either side.

    Waves beyond CHUNK_SECONDS are scaled as a whole and then cut into chunks with CONTEXT_SECONDS on both sides.
    Attention reaches over the whole wave, so features of chunks are not those of the whole: with random weights, whose
    attention is spread evenly, the mean cosine is above 0.998 and 95 % of k-means codes (64) are equal.
    """

    def __init__(self, config: SemanticEncoderConfig) -> None:
        """Raises UserError where there are no weights, or where they are not what `config` says."""
        from transformers import HubertConfig, HubertModel

        folder = find_weights(config)
        found = HubertConfig.from_pretrained(folder, local_files_only=True)
        preprocessor = read_json(config.kind, folder, PREPROCESSOR)
        self.hop = prod(found.conv_stride)
        _check(found, config, preprocessor["sampling_rate"], self.hop)
        # Later layers are neither loaded nor run: the output of `layer` does not depend on them.
        found.num_hidden_layers = config.layer
        self.model = load_pretrained(HubertModel, config.kind, folder, found)
        if found.do_stable_layer_norm:
            self.model.encoder.layer_norm = nn.Identity()  # it belongs after the last layer of all
        self.normalise = preprocessor["do_normalize"]
        self.margin = _receptive_field(found.conv_kernel, found.conv_stride) - self.hop
        self.sample_rate = config.sample_rate
        self.rate_hz = config.sample_rate / self.hop
        self.dim = found.hidden_size
        self.dtype = config.dtype

    @staticmethod
    def feature_dim(config: SemanticEncoderConfig) -> int:
        from transformers import HubertConfig

        return HubertConfig.from_pretrained(find_weights(config), local_files_only=True).hidden_size

    @torch.no_grad()
    def features(self, wave: Tensor) -> Tensor:
        """Float32 `[batch, samples // hop, dim]` of `wave` `[batch, samples]`."""
        frames = wave.shape[-1] // self.hop
        if not frames:
            return torch.zeros(len(wave), 0, self.dim)
        size, context = (round(seconds * self.rate_hz) for seconds in (CHUNK_SECONDS, CONTEXT_SECONDS))

        def rows(wave: Tensor) -> Tensor:
            if self.normalise:
                variance, mean = torch.var_mean(wave, 1, correction=0, keepdim=True)
                wave = (wave - mean) / (variance + 1e-7).sqrt()
            wave = F.pad(wave, (self.margin // 2, self.margin - self.margin // 2))
            return in_chunks(lambda first, last: self._chunk(wave, first, last), frames, size, context, context)

        return by_rows(rows, wave[:, : frames * self.hop], min(frames, size + 2 * context) / self.rate_hz)

    def _chunk(self, wave: Tensor, first: int, last: int) -> Tensor:
        """Frames [first, last) of a padded wave."""
        piece = wave[:, first * self.hop : last * self.hop + self.margin].to(self.model.device)
        with computing_in(self.dtype, self.model.device):
            return self.model(piece).last_hidden_state.float().cpu()


def _check(found, config: SemanticEncoderConfig, sample_rate: int, hop: int) -> None:
    """Raises UserError where the recipe and the weights do not fit."""
    beyond = [key for key in BEYOND_HUBERT if getattr(found, key, False)]
    if beyond:
        raise UserError(
            f"{weights_key(config.kind)}: these weights have {' and '.join(beyond)} on, which needs code of their own "
            "that Stretto does not run. MERT-v0 and MERT-v1-95M work."
        )
    if config.sample_rate != sample_rate:
        raise UserError(f"encoders.semantic.sample_rate is {config.sample_rate}, but these weights want {sample_rate}.")
    if config.frame_rate * hop != sample_rate:
        raise UserError(
            f"encoders.semantic.frame_rate is {config.frame_rate}, but these weights give {sample_rate / hop:g} frames "
            "a second."
        )
    if not 1 <= config.layer <= found.num_hidden_layers:
        raise UserError(f"encoders.semantic.layer is {config.layer}: there are layers 1 to {found.num_hidden_layers}.")


def _receptive_field(kernels: list[int], strides: list[int]) -> int:
    """Samples that one output of a stack of convolutions sees."""
    field, step = 1, 1
    for kernel, stride in zip(kernels, strides, strict=True):
        field += (kernel - 1) * step
        step *= stride
    return field
