"""EnCodec 24 kHz, MERT-v0 (95 M) and CLAP (HTSAT-tiny) with random weights in their true shapes, as folders that a
recipe can name: what they say means nothing, what they cost is real. In other shapes they are small enough to test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from model.config import EncodersConfig


def make_encoders(folder: Path) -> EncodersConfig:
    """Writes the three below `folder` and returns the configuration that uses them, as in `musiclm_small`."""
    torch.manual_seed(0)
    make_encodec(folder / "encodec")
    make_mert(folder / "mert")
    make_clap(folder / "clap")
    return EncodersConfig.model_validate({
        "check": False,  # random weights are what it is after
        "codec": {
            "kind": "encodec", "weights": str(folder / "encodec"), "sample_rate": 24_000, "frame_rate": 75,
            "quantizers": 8, "codebook_size": 1024,
        },
        "semantic": {
            "kind": "mert", "weights": str(folder / "mert"), "layer": 7, "sample_rate": 16_000, "frame_rate": 50,
        },
        "joint": {
            "kind": "clap", "weights": str(folder / "clap"), "sample_rate": 48_000, "window_seconds": 10.0,
            "hop_seconds": 1.0, "dim": 512,
        },
    })  # fmt: skip


def make_encodec(folder: Path) -> None:
    from transformers import EncodecConfig, EncodecModel

    model = EncodecModel(EncodecConfig())
    for layer in model.quantizer.layers:
        layer.codebook.embed.normal_()  # they are made as zeros
    model.save_pretrained(folder)


def make_mert(folder: Path, **shape: Any) -> None:
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    HubertModel(HubertConfig(feature_extractor_cqt=False, deepnorm=False, **shape)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=16_000, do_normalize=True).save_pretrained(folder)


def make_clap(folder: Path, **shape: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel, PreTrainedTokenizerFast

    audio = {"enable_fusion": False, **shape.pop("audio_config", {})}
    config = ClapConfig(audio_config=audio, **shape)
    model = ClapModel(config)
    # Random towers take all texts for alike, which is refused; strong embeddings and layers pull them apart.
    for parameter in model.text_model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(15)
    model.save_pretrained(folder)
    ClapFeatureExtractor(frequency_min=50, truncation="rand_trunc").save_pretrained(folder)
    words = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    tokenizer = Tokenizer(models.BPE({**words, **{chr(33 + index): 4 + index for index in range(94)}}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    longest = config.text_config.max_position_embeddings - 2  # positions begin after that of <pad>
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", model_max_length=longest
    ).save_pretrained(folder)
