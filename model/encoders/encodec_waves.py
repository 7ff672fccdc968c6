"""How each of the two EnCodec models takes a wave: as a whole, or second by second.

Waves are `[batch, channels, samples]` of whole frames, codes int64 `[batch, frames, quantizers]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from model.encoders.chunks import by_rows, in_chunks

CHUNK_SECONDS = 60.0
CONTEXT_SECONDS = 2.0
OVERLAP_FRAMES = 2
LEVEL_STEP_DB = 0.5
LEVEL_FLOOR_DB = -100.0


class Continuous:
    """The causal model of 24 kHz, and others that take a wave as one: one wave, one sequence of codes.

    Waves beyond CHUNK_SECONDS are cut into chunks, each with CONTEXT_SECONDS before it for the model's LSTM to settle,
    and after it where the model is not causal (MusicGen's, of 32 kHz).
    At least 99.9 % of the codes equal those of the whole wave (all of them, with random weights), and the wave decoded
    in chunks is that decoded at once to within 1e-3 of its peak.
    """

    def __init__(self, model: Any, bandwidth: float) -> None:
        self.model = model
        self.bandwidth = bandwidth
        self.hop = model.config.hop_length
        self._second = model.config.sampling_rate / self.hop

    def encode(self, wave: Tensor) -> Tensor:
        def chunk(rows: Tensor, first: int, last: int) -> Tensor:
            piece = rows[..., first * self.hop : last * self.hop].to(self.model.device)
            return self.model.encode(piece, bandwidth=self.bandwidth).audio_codes[0].transpose(1, 2).cpu()

        return self._chunked(chunk, wave, wave.shape[-1] // self.hop)

    def decode(self, codes: Tensor) -> Tensor:
        def chunk(rows: Tensor, first: int, last: int) -> Tensor:
            stacked = rows[:, first:last].transpose(1, 2)[None].to(self.model.device)
            wave = self.model.decode(stacked, [None]).audio_values[:, 0].cpu()
            return wave[:, : (last - first) * self.hop].unflatten(1, (-1, self.hop))

        return self._chunked(chunk, codes, codes.shape[1]).flatten(1)[:, None]

    def _chunked(self, chunk: Any, batch: Tensor, frames: int) -> Tensor:
        size, left = (round(seconds * self._second) for seconds in (CHUNK_SECONDS, CONTEXT_SECONDS))
        right = 0 if self.model.config.use_causal_conv else left

        def rows(part: Tensor) -> Tensor:
            return in_chunks(lambda first, last: chunk(part, first, last), frames, size, left, right)

        return by_rows(rows, batch, min(frames, size + left + right) / self._second)


class Segmented:
    """The model of 48 kHz: seconds of stereo, each scaled to one loudness and coded by itself.

    The library's segments overlap by 1 %, one frame and a half, so that their codes do not lie on one clock. Here they
    overlap by OVERLAP_FRAMES whole frames (1.3 %): a frame in two segments takes its codes from the one whose middle is
    nearer, and there are 150 frames a second. The last segment ends with the wave, however far it then overlaps.
    Decoding cuts segments in the same way from wherever the codes begin, and fades from each to the next.

    What the model takes out of a segment is its loudness (root mean square of the mono mix): its codes say nothing of
    it. It is kept as the first code of each frame, in steps of LEVEL_STEP_DB from LEVEL_FLOOR_DB up; the codebooks come
    after it. A decoded segment has the median of its frames' loudness, so that codes cut or made from anywhere know how
    loud they are. A wave of any length is done by a bounded number of segments at a time, with the same codes.
    """

    def __init__(self, model: Any, bandwidth: float) -> None:
        self.model = model
        self.bandwidth = bandwidth
        self.hop = model.config.hop_length
        self._frames = model.config.chunk_length // self.hop
        model.config.overlap = 0.0  # segments are cut here, and the model is given one at a time
        self._loudest = model.config.codebook_size - 1

    def encode(self, wave: Tensor) -> Tensor:
        frames = wave.shape[-1] // self.hop
        starts = self._starts(frames)
        length = min(self._frames, frames)
        pieces = wave.unfold(-1, length * self.hop, self.hop)[:, :, starts].transpose(1, 2)
        codes = by_rows(self._encode, pieces.flatten(0, 1), length * self.hop / self.model.config.sampling_rate)
        codes = codes.unflatten(0, (len(wave), len(starts)))
        frame = torch.arange(frames)
        middles = torch.tensor(starts) + (length - 1) / 2
        owner = (frame[:, None] - middles).abs().argmin(1)
        return codes[:, owner, frame - torch.tensor(starts)[owner]]

    def decode(self, codes: Tensor) -> Tensor:
        frames = codes.shape[1]
        starts = self._starts(frames)
        length = min(self._frames, frames)
        total = torch.zeros(len(codes), self.model.config.audio_channels, frames * self.hop)
        weights = torch.zeros(frames * self.hop)
        ramp = torch.arange(1, length * self.hop + 1, dtype=torch.float32)
        weight = torch.minimum(ramp, ramp.flip(0))
        for start in starts:
            here = slice(start * self.hop, (start + length) * self.hop)
            total[..., here] += weight * by_rows(self._decode, codes[:, start : start + length], 1.0)
            weights[here] += weight
        return total / weights

    def _starts(self, frames: int) -> list[int]:
        """First frames of the segments that cover `frames`."""
        last = max(0, frames - self._frames)
        return [*range(0, last, self._frames - OVERLAP_FRAMES), last]

    def _encode(self, segments: Tensor) -> Tensor:
        found = self.model.encode(segments.to(self.model.device), bandwidth=self.bandwidth)
        decibels = 20 * found.audio_scales[0].log10().cpu()
        level = ((decibels - LEVEL_FLOOR_DB) / LEVEL_STEP_DB).round().long().clamp(0, self._loudest)
        codes = found.audio_codes[0].transpose(1, 2).cpu()
        return torch.cat([level[:, None].expand(-1, codes.shape[1], 1), codes], 2)

    def _decode(self, codes: Tensor) -> Tensor:
        if codes.shape[2] == 1:  # a loudness, but of nothing
            return torch.zeros(len(codes), self.model.config.audio_channels, codes.shape[1] * self.hop)
        decibels = LEVEL_FLOOR_DB + LEVEL_STEP_DB * codes[..., 0].median(1).values
        scale = (10 ** (decibels / 20)).to(self.model.device)
        stacked = codes[..., 1:].transpose(1, 2)[None].to(self.model.device)
        return self.model.decode(stacked, [scale]).audio_values[..., : codes.shape[1] * self.hop].cpu()
