"""LAION's own CLAP checkpoints: the same embeddings as laion-clap's, without it."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from small_encoders import Evil, noise
from torch.nn.functional import normalize

from model.config import JointEmbedderConfig
from model.encoders import encoder_fingerprint, load_joint_embedder
from model.errors import UserError

WORDS = 300
TEXTS = ["a flute", "loud drums and a bass", "bird song"]
# What a training script leaves beside the weights.
BESIDE = {"epoch": 15, "top": np.float64(90.14), "optimizer": {"state": {0: {"step": 3, "average": torch.ones(4)}}}}


def config(weights: Path, **changes) -> JointEmbedderConfig:
    settings = {"kind": "clap", "sample_rate": 48_000, "window_seconds": 10.0, "dim": 32, "weights": str(weights)}
    return JointEmbedderConfig(**{**settings, **changes})


def save_tokenizer(folder: Path, words: int = WORDS) -> Path:
    """Files as RoBERTa's, one word a character."""
    special = ("<s>", "<pad>", "</s>", "<unk>")
    letters = [chr(33 + index) for index in range(94)] + [chr(0x120 + index) for index in range(words - 99)]
    folder.mkdir(exist_ok=True)
    vocabulary = {word: index for index, word in enumerate([*special, *letters, "<mask>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


LAION_NAMES = (
    (r"^audio_model\.audio_encoder\.batch_norm\.", "audio_branch.bn0."),
    (r"^audio_model\.audio_encoder\.", "audio_branch."),
    (r"^text_model\.", "text_branch."),
    (r"^(audio_branch.*)\.attention\.output\.dense\.", r"\1.attn.proj."),
    (r"^(audio_branch.*)\.attention\.self\.query\.", r"\1.attn.qkv."),
    (r"^(audio_branch.*)\.attention\.self\.", r"\1.attn."),
    (r"^(audio_branch.*)\.intermediate\.dense\.", r"\1.mlp.fc1."),
    (r"^(audio_branch.*)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"_projection\.linear1\.", "_projection.0."),
    (r"_projection\.linear2\.", "_projection.2."),
)


def laion_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a ClapModel as LAION's training script would have saved them."""
    found = {}
    for name, value in state.items():
        own = name
        for pattern, replacement in LAION_NAMES:
            own = re.sub(pattern, replacement, own)
        if ".qkv." in own:
            value = torch.cat([state[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")])
        if not re.search(r"\.attn\.(key|value)\.", own):
            found[f"module.{own}"] = value
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small ClapModel, and the file with its weights as LAION would have named them."""
    from transformers import ClapConfig, ClapModel

    torch.manual_seed(0)
    text = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 1, "intermediate_size": 32}
    audio = {"patch_embeds_hidden_size": 8, "hidden_size": 64, "depths": [1, 1, 2, 1]}
    model = ClapModel(
        ClapConfig(
            text_config={**text, "vocab_size": WORDS, "max_position_embeddings": 90, "projection_dim": 32},
            audio_config={**audio, "num_attention_heads": [1, 1, 2, 4], "projection_dim": 32, "enable_fusion": False},
            projection_dim=32,
        )
    ).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(8)
    folder = save_tokenizer(tmp_path_factory.mktemp("laion"))
    torch.save({**BESIDE, "state_dict": laion_names(model.state_dict())}, folder / "music_small.pt")
    return model, folder / "music_small.pt"


def test_the_model_is_the_one_that_was_saved(small):
    model, file = small
    embedder = load_joint_embedder(file.parent, config(file))
    x = noise(48_000, 2.0)
    with torch.no_grad():
        audio = model.get_audio_features(input_features=embedder.spectrogram(x))
        tokens = embedder.tokenizer(TEXTS, padding=True, return_tensors="pt")
        text = model.get_text_features(**tokens)
    assert torch.allclose(embedder.embed_audio(x), audio, atol=1e-5)
    assert torch.allclose(embedder.embed_text(TEXTS), text, atol=1e-5)
    assert embedder.embed_text(["word " * 200]).shape == (1, 32)  # cut to what LAION's CLAP has read


def test_safetensors_of_the_same_names(small, tmp_path):
    from safetensors.torch import save_file

    _, file = small
    state = torch.load(file, weights_only=False)["state_dict"]  # a test's own file
    save_file({name: value.contiguous() for name, value in state.items()}, tmp_path / "music.safetensors")
    embedder = load_joint_embedder(tmp_path, config(tmp_path / "music.safetensors", tokenizer=str(file.parent)))
    assert torch.equal(embedder.embed_text(TEXTS), load_joint_embedder(file.parent, config(file)).embed_text(TEXTS))


def test_what_to_fetch_is_said(small, tmp_path, monkeypatch):
    _, file = small
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    alone = tmp_path / "music.pt"
    with pytest.raises(UserError, match=r"no file .*\n.*hf download lukewys/laion_clap"):
        load_joint_embedder(tmp_path, config(alone))
    alone.write_bytes(file.read_bytes())
    with pytest.raises(UserError, match=r"encoders\.joint\.tokenizer: .*\n.*hf download roberta-base"):
        load_joint_embedder(tmp_path, config(alone))
    with pytest.raises(UserError, match=r"encoders\.joint\.tokenizer: .* holds neither"):
        load_joint_embedder(tmp_path, config(alone, tokenizer=str(tmp_path)))
    with pytest.raises(UserError, match=r"has 200 words, but music\.pt has 300"):
        load_joint_embedder(tmp_path, config(alone, tokenizer=str(save_tokenizer(tmp_path / "words", 200))))


def test_the_hubs_tokenizer_is_found_in_the_cache(small, tmp_path, monkeypatch):
    _, file = small
    snapshot = tmp_path / "models--FacebookAI--roberta-base/snapshots/abc"
    snapshot.parent.mkdir(parents=True)
    save_tokenizer(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    (tmp_path / "music.pt").write_bytes(file.read_bytes())
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert load_joint_embedder(tmp_path, config(tmp_path / "music.pt")).embed_text(TEXTS).shape == (3, 32)


def test_files_that_cannot_be_used(small, tmp_path):
    _, file = small
    save_tokenizer(tmp_path)
    state = torch.load(file, weights_only=False)["state_dict"]  # a test's own file
    bad = tmp_path / "bad.pt"
    torch.save({"state_dict": {**state, "module.audio_branch.patch_embed.mel_conv2d.weight": torch.ones(1)}}, bad)
    with pytest.raises(UserError, match="CLAP with fusion, which is not supported"):
        load_joint_embedder(tmp_path, config(bad))
    torch.save({"state_dict": state, "arguments": Evil(tmp_path / "ran")}, bad)
    with pytest.raises(UserError, match="could run code: it was not loaded"):
        load_joint_embedder(tmp_path, config(bad))
    assert not (tmp_path / "ran").exists()
    torch.save({name: value for name, value in state.items() if "fc1.bias" not in name}, bad)
    with pytest.raises(UserError, match=r"5 of \d+ tensors are missing"):
        load_joint_embedder(tmp_path, config(bad))
    torch.save({"weight": torch.ones(3)}, bad)
    with pytest.raises(UserError, match="no CLAP of LAION"):
        load_joint_embedder(tmp_path, config(bad))
    with pytest.raises(UserError, match=r"encoders\.joint\.dim is 512"):
        load_joint_embedder(tmp_path, config(file, dim=512))


def test_fingerprint_is_of_weights_and_tokenizer(small, tmp_path):
    _, file = small
    words = save_tokenizer(tmp_path / "words")
    before = encoder_fingerprint(config(file, tokenizer=str(words)))
    assert before == encoder_fingerprint(config(file))  # the same files elsewhere
    (words / "merges.txt").write_text("#version: 0.2\na b\n")
    assert encoder_fingerprint(config(file, tokenizer=str(words))) != before
    other = tmp_path / "other.pt"
    torch.save({"weight": torch.ones(3)}, other)
    assert encoder_fingerprint(config(other, tokenizer=str(file.parent))) != before


def laion_model(audio: str) -> torch.nn.Module:
    """laion-clap's own CLAP with random weights. Its package fetches tokenizers from a hub when it is imported, so only
    its modules are, under another name; and its text tower is one of RoBERTa's layers in place of all."""
    from transformers import RobertaConfig, RobertaModel

    found = importlib.util.find_spec("laion_clap")
    assert found
    assert found.origin
    package = ModuleType("laion_clap_alone")
    package.__path__ = [str(Path(found.origin).parent / "clap_module")]
    sys.modules[package.__name__] = package
    module = import_module(f"{package.__name__}.model")
    small = RobertaConfig(
        vocab_size=WORDS, num_hidden_layers=1, intermediate_size=64, max_position_embeddings=90, type_vocab_size=1,
        pad_token_id=1,
    )  # fmt: skip
    module.RobertaModel = SimpleNamespace(from_pretrained=lambda name: RobertaModel(small))
    settings = {
        "audio_length": 1024, "clip_samples": 480_000, "mel_bins": 64, "sample_rate": 48_000, "window_size": 1024,
        "hop_size": 480, "fmin": 50, "fmax": 14_000, "class_num": 527, "model_type": "HTSAT", "model_name": audio,
    }  # fmt: skip
    text = {"context_length": 77, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1, "model_type": "roberta"}
    return module.CLAP({"tiny": 768, "base": 1024}[audio], settings, text).eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("audio", ["tiny", "base"])
def test_embeddings_are_those_of_laion_clap(tmp_path, audio):
    torch.manual_seed(0)
    theirs = laion_model(audio)
    for name, parameter in theirs.named_parameters():
        if parameter.ndim > 1 and "extractor" not in name:
            parameter.data.mul_(8 if name.startswith("text_branch") else 2)
    theirs.audio_branch.bn0.running_mean.normal_()
    save_tokenizer(tmp_path)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    torch.save({**BESIDE, "state_dict": state}, tmp_path / "music.pt")
    ours = load_joint_embedder(tmp_path, config(tmp_path / "music.pt", dim=512))
    x = torch.cat([noise(48_000, 10.0, 1), 0.5 * torch.linspace(0, 3e4, 480_000).square().sin()[None]])
    waveform = (x * 32767).to(torch.int16).float() / 32767
    with torch.no_grad():
        heard = theirs.encode_audio({"waveform": waveform}, device="cpu")["embedding"]
        audio_embeddings = normalize(theirs.audio_projection(heard), dim=-1)
        tokens = ours.tokenizer(TEXTS, padding="max_length", max_length=77, return_tensors="pt")
        text_embeddings = normalize(theirs.encode_text(tokens, "cpu"), dim=-1)
    assert (audio_embeddings[0] @ audio_embeddings[1]) < 0.99  # they say something
    assert (ours.embed_audio(x) * audio_embeddings).sum(1).min() > 0.9999
    assert (ours.embed_text(TEXTS) * text_embeddings).sum(1).min() > 0.9999
