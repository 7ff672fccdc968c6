"""CLAP (Wu et al. 2023), as transformers load it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from model.config import JointEmbedderConfig
from model.encoders.pretrained import PREPROCESSOR, load_pretrained, read_json, save_note, weights_folder, weights_key
from model.errors import UserError

BATCH = 64
# Texts that have nothing in common. The embeddings of an untrained or wrongly loaded text tower are all alike.
UNRELATED = (
    "a slow piano ballad", "heavy metal drums", "birds singing at dawn", "a woman speaking", "a fast techno beat",
    "the noise of a passing train", "a church bell", "a solo violin",
)  # fmt: skip
COLLAPSED = 0.9
"""Mean cosine between UNRELATED from which a text tower is taken for collapsed."""


class ClapEmbedder:
    """Unfused CLAP: up to 10 s of audio at 48 kHz, or text → unit vectors."""

    def __init__(self, config: JointEmbedderConfig) -> None:
        """Raises UserError where there are no weights, or where they are not what `config` says or are damaged."""
        from transformers import AutoTokenizer, ClapConfig, ClapFeatureExtractor, ClapModel

        folder = weights_folder("clap", config.weights)
        found = ClapConfig.from_pretrained(folder, local_files_only=True)
        read_json("clap", folder, PREPROCESSOR)
        self.extractor = ClapFeatureExtractor.from_pretrained(folder, local_files_only=True)
        _check(found, config, self.extractor)
        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = load_pretrained(ClapModel, "clap", folder, found)
        self.weights = config.weights
        self.sample_rate = config.sample_rate
        self.dim = config.dim
        alike = self.embed_text(list(UNRELATED))
        cosine = float((alike @ alike.T).sum() - len(alike)) / (len(alike) * (len(alike) - 1))
        if cosine > COLLAPSED:
            raise UserError(
                f"{weights_key('clap')}: the text tower in {folder} takes unrelated texts for alike (mean cosine "
                f"{cosine:.3f}), so prompts would mean nothing. These weights are damaged or untrained."
            )

    @torch.no_grad()
    def embed_audio(self, wave: Tensor) -> Tensor:
        """Unit vectors float32 `[batch, dim]` of `wave` `[batch, samples]`; of more than 10 s the middle counts.

        Shorter waves are repeated to 10 s, as in CLAP's training.
        """
        # CLAP crops longer waves at random and was trained on audio of 16 bits.
        extra = max(0, wave.shape[-1] - self.extractor.nb_max_samples)
        wave = wave[:, extra // 2 : wave.shape[-1] - (extra - extra // 2)]
        wave = (wave.clamp(-1, 1) * 32767).trunc() / 32767
        parts = []
        for part in wave.split(BATCH):
            inputs = self.extractor(
                list(part.double().numpy()),
                sampling_rate=self.sample_rate,
                truncation="rand_trunc",
                return_tensors="pt",
            )
            mel = inputs["input_features"].float().to(self.model.device)
            parts.append(self.model.get_audio_features(input_features=mel).cpu())
        return torch.cat(parts)

    @torch.no_grad()
    def embed_text(self, texts: list[str]) -> Tensor:
        """Unit vectors float32 `[len(texts), dim]`; a text's tokens beyond what the model reads are cut off."""
        parts = [torch.zeros(0, self.dim)]
        for start in range(0, len(texts), BATCH):
            tokens = self.tokenizer(texts[start : start + BATCH], padding=True, truncation=True, return_tensors="pt")
            tokens = tokens.to(self.model.device)
            parts.append(
                self.model.get_text_features(
                    input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]
                ).cpu()
            )
        return torch.cat(parts)

    def save(self, folder: Path) -> None:
        """Writes a note of which weights these are."""
        save_note(folder, "clap", self.weights)

    @classmethod
    def load(cls, folder: Path, config: JointEmbedderConfig) -> ClapEmbedder:
        return cls(config)


def _check(found, config: JointEmbedderConfig, extractor) -> None:
    """Raises UserError where the recipe and the weights do not fit."""
    if found.audio_config.enable_fusion:
        raise UserError(f"{weights_key('clap')}: CLAP with fusion is not supported: choose an unfused checkpoint.")
    rate, longest = extractor.sampling_rate, extractor.max_length_s
    if config.sample_rate != rate:
        raise UserError(f"encoders.joint.sample_rate is {config.sample_rate}, but these CLAP weights want {rate}.")
    if config.dim != found.projection_dim:
        raise UserError(f"encoders.joint.dim is {config.dim}, but these CLAP weights give {found.projection_dim}.")
    if config.window_seconds > longest:
        raise UserError(
            f"encoders.joint.window_seconds is {config.window_seconds:g}, but CLAP hears {longest} s at most."
        )
