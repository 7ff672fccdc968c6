"""Are the encoders what they should be? A look at each, made of a few sounds and words, before hours are spent on them.

It is after what is broken: damaged, untrained or wrongly loaded weights. Encoders that a run fits itself know only its
corpus, where a tone may be as foreign as birdsong is to captions of drums: of those, only what holds for any corpus is
asked.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.encoders.base import Codec, JointEmbedder, SemanticEncoder, with_channels
from model.errors import UserError

SECONDS = 2.0
LEVEL = 0.3
TONES_HZ = (330.0, 1320.0)
"""Two octaves apart, where music lies and any codec has to follow."""
NEAR = 2**0.5
"""Within half an octave of a tone is near it: rough codecs miss notes, broken ones registers."""
CONTRAST = 2.0
"""How many times more of its power a tone has near its own pitch, after a codec, than the other tone has there."""
QUIETEST = 0.1
"""Least share of a tone's amplitude that is left after a codec (-20 dB)."""
ALIKE = 0.9999
"""Mean cosine from which what an encoder makes of unlike sounds is the same thing."""
COLLAPSED = 0.9
"""Mean cosine from which the embeddings of unrelated texts are the same thing: it is near 1 in an untrained tower."""
UNRELATED = (
    "a slow piano ballad", "heavy metal drums", "birds singing at dawn", "a woman speaking", "a fast techno beat",
    "the noise of a passing train", "a church bell", "a solo violin",
)  # fmt: skip


def check_encoders(codec: Codec, semantic: SemanticEncoder, joint: JointEmbedder) -> None:
    """Raises UserError, which names the section of the recipe, for an encoder that cannot be right.

    * A low and a high tone come back from the codec finite, not silent, and each with its own pitch; from one fitted in
      the run, finite, and not everything has the same codes.
    * Semantic features and audio embeddings of tones, noise and silence are finite and not all alike.
    * The embeddings of UNRELATED texts are not all alike, where the embedder was not trained in the run.
    """
    check_codec(codec)
    check_semantic(semantic)
    check_joint(joint)


@torch.no_grad()
def check_codec(codec: Codec) -> None:
    """Raises UserError where a round trip fails."""
    sounds = _sounds(codec.sample_rate)
    codes = codec.encode(with_channels(sounds, codec.channels))
    heard = with_channels(codec.decode(codes), 1)
    if not heard.isfinite().all():
        raise _broken("codec", "does not decode a tone to finite samples")
    if (codes == codes[:1]).all():
        raise _broken("codec", "gives tones, noise and silence the same codes")
    if not codec.fitted:
        _check_tones(sounds, heard, codec.sample_rate)


def _check_tones(sounds: Tensor, heard: Tensor, sample_rate: int) -> None:
    """Raises UserError where the tones are lost in what is `heard` of `sounds`."""
    count = len(TONES_HZ)
    left = heard[:count].square().mean(1).sqrt() / sounds[:count].square().mean(1).sqrt()
    if left.min() < QUIETEST:
        raise _broken("codec", f"decodes a tone to silence: {float(left.min()):.0e} of its amplitude is left")
    near = torch.stack([_share_near(heard[:count], hz, sample_rate) for hz in TONES_HZ])
    for tone, hz in enumerate(TONES_HZ):
        own, other = float(near[tone, tone]), float(near[tone, 1 - tone])
        if own <= CONTRAST * other:
            raise _broken(
                "codec",
                f"does not keep a tone of {hz:g} Hz: {100 * own:.0f} % of what comes back lies within half an octave "
                f"of it, and so does {100 * other:.0f} % of what comes back of another tone",
            )


@torch.no_grad()
def check_semantic(encoder: SemanticEncoder) -> None:
    """Raises UserError where features say nothing."""
    features = encoder.features(_sounds(encoder.sample_rate))
    if not features.isfinite().all():
        raise _broken("semantic", "gives features that are not finite")
    if (cosine := mean_cosine(features.mean(1))) > ALIKE:
        raise _broken("semantic", f"gives tones, noise and silence the same features (mean cosine {cosine:.5f})")


@torch.no_grad()
def check_joint(embedder: JointEmbedder) -> None:
    """Raises UserError where embeddings of audio or of texts say nothing."""
    audio = embedder.embed_audio(_sounds(embedder.sample_rate))
    if not audio.isfinite().all():
        raise _broken("joint", "gives embeddings that are not finite")
    if (cosine := mean_cosine(audio)) > ALIKE:
        raise _broken("joint", f"gives tones, noise and silence the same embedding (mean cosine {cosine:.5f})")
    if embedder.fitted:
        return
    cosine = mean_cosine(embedder.embed_text(list(UNRELATED)))
    if not cosine <= COLLAPSED:  # not a number is none either
        raise _broken(
            "joint", f"takes unrelated texts for alike (mean cosine {cosine:.3f}), so that prompts would mean nothing"
        )


def mean_cosine(vectors: Tensor) -> float:
    """Mean cosine between each two of `vectors` `[n, dim]`."""
    unit = torch.nn.functional.normalize(vectors.double(), dim=1)
    return float((unit @ unit.T).sum() - len(unit)) / (len(unit) * (len(unit) - 1))


def _sounds(sample_rate: int) -> Tensor:
    """A low tone, a high tone, noise and silence, `[4, samples]`."""
    time = torch.arange(round(SECONDS * sample_rate)) / sample_rate
    tones = [(2 * torch.pi * hz * time).sin() for hz in TONES_HZ]
    noise = torch.randn(len(time), generator=torch.Generator().manual_seed(0)) / 3
    return LEVEL * torch.stack([*tones, noise, torch.zeros(len(time))]).clamp(-1, 1)


def _share_near(waves: Tensor, hz: float, sample_rate: int) -> Tensor:
    """The share `[batch]` of the power of `waves` within half an octave of `hz`."""
    power = torch.fft.rfft(waves * torch.hann_window(waves.shape[1])).abs().square()
    frequency = torch.fft.rfftfreq(waves.shape[1], 1 / sample_rate)
    near = (frequency > hz / NEAR) & (frequency < hz * NEAR)
    return power[:, near].sum(1) / power.sum(1)


def _broken(section: str, what: str) -> UserError:
    return UserError(
        f"encoders.{section}: this encoder {what}. Its weights are damaged, untrained or not of this kind.\n"
        f"Fetch them again or choose others; encoders.check=false runs it all the same."
    )
