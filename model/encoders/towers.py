"""The built-in joint embedding: an audio tower and a text tower, trained in the run on the corpus's own captions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from typing_extensions import Self

from model.config import JointEmbedderConfig
from model.encoders.spectrum import LogMel, window_length
from model.errors import UserError
from model.saving import save_tensors

MEL_HZ = 50
BANDS = 64
FLOOR = 1e-5
"""Mel power taken for silence, 50 dB below a full-scale sine: what lies deeper says nothing of the music."""
# Rhythm: onset strength in this many groups of bands, compared with itself at lags up to LONGEST_LAG seconds.
ONSET_GROUPS = 4
LONGEST_LAG = 2.0
TEXT_LAYERS = 1
LONGEST_TEXT = 128
"""Tokens of a text beyond these are cut off."""
PADDING = "[PAD]"
START = "[CLS]"
FILES = ("joint.safetensors", "tokenizer.json")
# Embeddings are made for this many waves or texts at a time.
CHUNK = 64


class TwoTowers(nn.Module):
    """Audio and text → unit vectors `[batch, dim]`, close where the text describes the audio.

    `scale` is the learnt inverse temperature of the contrastive loss, as its logarithm.
    """

    fitted = True

    def __init__(self, config: JointEmbedderConfig, tokenizer: Tokenizer) -> None:
        """Fresh weights from torch's global generator; `tokenizer` is one that `fit_tokenizer` made."""
        super().__init__()
        if config.sample_rate % MEL_HZ:
            raise UserError(f"encoders.joint.sample_rate {config.sample_rate} must be a multiple of {MEL_HZ}.")
        self.sample_rate = config.sample_rate
        self.dim = config.dim
        self.tokenizer = tokenizer
        window = window_length(config.sample_rate, 0.064)
        self.log_mel = LogMel(BANDS, config.sample_rate, window, config.sample_rate // MEL_HZ, FLOOR)
        self.audio = AudioTower(config.width, config.dim)
        self.text = TextTower(self.tokenizer.get_vocab_size(), config.width, config.dim)
        self.scale = nn.Parameter(torch.tensor(10.0).log())

    def features(self, wave: Tensor) -> Tensor:
        """What the audio tower sees: log-mel `[batch, samples // hop, BANDS]` of `wave` `[batch, samples]`."""
        return self.log_mel(wave)

    def tokens(self, texts: list[str]) -> Tensor:
        """Token ids int64 `[len(texts), longest]`; shorter texts end in padding, whose id is 0."""
        ids = [encoding.ids for encoding in self.tokenizer.encode_batch(texts)]
        return torch.tensor(ids, device=self.scale.device)

    @torch.no_grad()
    def embed_audio(self, wave: Tensor) -> Tensor:
        """Unit vectors float32 `[batch, dim]`, one for each whole wave of `[batch, samples]`."""
        return torch.cat([self.audio(self.features(part)) for part in wave.split(CHUNK)])

    @torch.no_grad()
    def embed_text(self, texts: list[str]) -> Tensor:
        """Unit vectors float32 `[len(texts), dim]`."""
        parts = [texts[start : start + CHUNK] for start in range(0, len(texts), CHUNK)]
        return torch.cat([self.text(self.tokens(part)) for part in parts]) if parts else torch.zeros(0, self.dim)

    def save(self, folder: Path) -> None:
        weights, vocabulary = (folder / name for name in FILES)
        save_tensors(self.state_dict(), weights)
        self.tokenizer.save(str(vocabulary))

    @classmethod
    def load(cls, folder: Path, config: JointEmbedderConfig) -> Self:
        weights, vocabulary = (folder / name for name in FILES)
        towers = cls(config, Tokenizer.from_file(str(vocabulary)))
        towers.load_state_dict(load_file(weights))
        return towers.eval().requires_grad_(False)


class AudioTower(nn.Module):
    """Log-mel → unit vector: convolutions for what sounds, and the autocorrelation of its onsets for how fast."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.sound = nn.ModuleList(
            [nn.Conv1d(BANDS, width, 5, 2, 2), nn.Conv1d(width, width, 5, 2, 2), nn.Conv1d(width, width, 3, 1, 1)]
        )
        self.rhythm = nn.Sequential(
            nn.Linear(ONSET_GROUPS * round(LONGEST_LAG * MEL_HZ), width), nn.GELU(), nn.Linear(width, width)
        )
        self.norm = nn.LayerNorm(4 * width)
        self.head = nn.Sequential(nn.Linear(4 * width, 2 * width), nn.GELU(), nn.Linear(2 * width, dim))

    def forward(self, mel: Tensor) -> Tensor:
        """`[batch, frames, BANDS]` → `[batch, dim]`. The level of the whole wave does not matter."""
        x = ((mel - mel.mean((1, 2), keepdim=True)) / 4).transpose(1, 2)
        for index, layer in enumerate(self.sound):
            x = F.gelu(layer(x)) + (x if index == 2 else 0)
        pooled = [x.mean(-1), x.amax(-1), x.std(-1, correction=0)]
        x = self.norm(torch.cat([*pooled, self.rhythm(rhythm(mel))], -1))
        return F.normalize(self.head(x).float(), dim=-1)


class TextTower(nn.Module):
    """Tokens → unit vector: a small transformer, the mean over its positions, and a small MLP."""

    def __init__(self, vocabulary: int, width: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(LONGEST_TEXT, width) * 0.02)
        self.layers = nn.ModuleList(
            [
                nn.TransformerEncoderLayer(
                    width, max(1, width // 64), 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
                )
                for _ in range(TEXT_LAYERS)
            ]
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        """`[batch, length]` → `[batch, dim]`."""
        padding = tokens == 0
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=padding)
        weight = (~padding).to(x.dtype)[..., None]
        x = self.norm((x * weight).sum(1) / weight.sum(1))
        return F.normalize(self.head(x).float(), dim=-1)


@torch.no_grad()
def rhythm(mel: Tensor) -> Tensor:
    """How alike the onsets are to themselves a while later: `[batch, frames, BANDS]` → `[batch, ONSET_GROUPS × lags]`.

    Convolutions of a few hundred milliseconds cannot see a beat of 0.8 s; its period stands out here.
    """
    lags = round(LONGEST_LAG * MEL_HZ)
    rise = mel.float().diff(dim=1).clamp_min(0)
    onset = rise.unflatten(2, (ONSET_GROUPS, -1)).mean(-1).transpose(1, 2)
    onset = onset - onset.mean(-1, keepdim=True)
    # Padded to twice the length, so that the end does not meet the beginning.
    power = torch.fft.rfft(onset, n=2 * max(onset.shape[-1], lags + 1)).abs().square()
    correlation = torch.fft.irfft(power)
    return (correlation[..., 1 : lags + 1] / correlation[..., :1].clamp_min(1e-3)).flatten(1)


def fit_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
    """A byte-pair encoding of at most `vocabulary` tokens, learnt from `texts`.

    Case and accents do not matter, characters that no text held are left out, and every text gets a START token, so
    that none is empty. Padding has id 0.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [PADDING, START]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", special_tokens=[(START, special.index(START))]
    )
    tokenizer.enable_padding(pad_id=special.index(PADDING), pad_token=PADDING)
    tokenizer.enable_truncation(LONGEST_TEXT)
    return tokenizer
