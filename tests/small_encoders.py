"""The pretrained encoders at small size with random weights, saved as transformers save them."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from benchmarks.random_encoders import make_clap, make_mert
from model.encoders.encodec import ARCHITECTURES

CODEC = {"kind": "encodec", "sample_rate": 24_000, "frame_rate": 75, "quantizers": 4, "codebook_size": 64}
STEREO = {"kind": "encodec", "sample_rate": 48_000, "frame_rate": 150, "quantizers": 3, "codebook_size": 256}
MERT = {"kind": "mert", "sample_rate": 16_000, "frame_rate": 50, "layer": 2}
CLAP = {"kind": "clap", "sample_rate": 48_000, "window_seconds": 10.0, "dim": 32}


def save_encodec(folder: Path, stereo: bool = False) -> Path:
    from transformers import EncodecConfig, EncodecModel

    folder.mkdir(exist_ok=True)
    torch.manual_seed(0)
    shape = {"num_filters": 4, "hidden_size": 16, "codebook_size": 64, "num_lstm_layers": 1}
    # 6 bits a code: at 75 Hz 0.45 kbps a codebook, at 150 Hz 0.9.
    config = EncodecConfig(**shape, target_bandwidths=[0.9, 1.8])
    if stereo:
        config = EncodecConfig(**ARCHITECTURES[2] | {**shape, "codebook_size": 256, "target_bandwidths": [2.4, 4.8]})
    model = EncodecModel(config)
    fill_codebooks(model)
    model.save_pretrained(folder)
    return folder


def fill_codebooks(model) -> None:
    """Codebooks that tell sounds apart: new ones are zeros, so that every code would be 0."""
    with torch.no_grad():
        latent = model.encoder(noise(24_000, 1.0)[:1, None].expand(-1, model.config.audio_channels, -1))[0].T
    first, *others = (layer.codebook.embed for layer in model.quantizer.layers)
    first.copy_(latent[torch.arange(len(first)) % len(latent)])
    for embed in others:
        embed.normal_().mul_(latent.std(0).mean() / 2)


def save_mert(folder: Path) -> Path:
    torch.manual_seed(0)
    make_mert(
        folder, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64, conv_dim=[16] * 7,
        num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return folder


def save_clap(folder: Path) -> Path:
    torch.manual_seed(0)
    tower = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "projection_dim": 32}
    make_clap(
        folder,
        text_config={"vocab_size": 300, "hidden_size": 32, "max_position_embeddings": 64, "pad_token_id": 1, **tower},
        audio_config={
            "patch_embeds_hidden_size": 8, "hidden_size": 64, "depths": [1, 1, 1, 1], "projection_dim": 32,
            "num_attention_heads": [1, 1, 1, 1],
        },
        projection_dim=32,
    )  # fmt: skip
    return folder


def noise(rate: int, seconds: float, batch: int = 2) -> torch.Tensor:
    return 0.3 * torch.randn(batch, round(seconds * rate), generator=torch.Generator().manual_seed(1)).clamp(-3, 3) / 3


class Evil:
    """Makes the folder `target` when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)
