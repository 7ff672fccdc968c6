"""From a bundle to music: no DeepSpeed, no shards, no run folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from model import artifact
from model.config import STAGES, EncodersConfig, ExecutionConfig, SamplingConfig, StageModelConfig, StageName
from model.encoders import load_codec, load_joint_embedder
from model.encoders.base import Codec, JointEmbedder
from model.errors import UserError
from model.fields import ACOUSTIC, CONDITIONING, TokenField
from model.kmeans import ResidualKMeans
from model.sampling import Sampler, generate_stage
from model.stage import StageTransformer, build_stage

KIND = "bundle"
QUANTIZERS = "quantizers.safetensors"
CODEC = Path("encoders/codec")
JOINT = Path("encoders/joint")
BATCH = 32
"""Clips generated together: guidance doubles it, and every clip keeps a key/value cache."""

PerStage = Mapping[StageName, Any]


@dataclass(frozen=True)
class Samples:
    """Generated music: `waveform` is float32 `[clips, samples]` in [-1, 1]."""

    waveform: Tensor
    sample_rate: int


class MusicPipeline:
    """A bundle in memory: `MusicPipeline.load("RUN/bundle").generate(["a slow flute"], seconds=5)`."""

    def __init__(
        self,
        stages: dict[StageName, StageTransformer],
        fields: dict[str, TokenField],
        quantizer: ResidualKMeans,
        embedder: JointEmbedder,
        codec: Codec,
        sampling: SamplingConfig,
        captions: bool,
    ) -> None:
        self.stages = stages
        self.fields = fields
        self.quantizer = quantizer
        self.embedder = embedder
        self.codec = codec
        self.sampling = sampling
        self.captions = captions
        """Whether the models were trained with captions, without which words mean nothing to them."""

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str | None = None) -> MusicPipeline:
        """The bundle at `path`, its stages on `device` (a GPU where there is one).

        Raises UserError where `path` is no bundle, or a file of it is missing or cut short.
        """
        bundle = artifact.read(Path(path), KIND)
        incomplete = artifact.problems(bundle, digests=False)
        if incomplete:
            raise UserError(f"The bundle {path} is not whole: {incomplete[0]}. Export it again.")
        info = bundle.info
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        fields = {name: TokenField.from_json(value) for name, value in info["fields"].items()}
        quantizers = load_file(bundle.path / QUANTIZERS)
        encoders = EncodersConfig.model_validate(info["encoders"])
        stages: dict[StageName, StageTransformer] = {}
        for name in STAGES:
            stage = build_stage(StageModelConfig.model_validate(info["stages"][name]), fields, quantizers)
            stage.load_state_dict(load_file(bundle.path / f"{name}.safetensors"))
            stages[name] = stage.to(device).eval()
            stages[name].configure(ExecutionConfig())
        return cls(
            stages,
            fields,
            ResidualKMeans.from_centroids(quantizers[CONDITIONING]),
            load_joint_embedder(bundle.path / JOINT, encoders.joint),
            load_codec(bundle.path / CODEC, encoders.codec),
            SamplingConfig.model_validate(info["sampling"]),
            info["captions"],
        )

    def generate(
        self,
        prompts: list[str] | None = None,
        *,
        like: Tensor | None = None,
        seconds: float | None = None,
        seed: int = 0,
        temperature: float | PerStage | None = None,
        top_k: int | PerStage | None = None,
        cfg: float | PerStage | None = None,
        on_step: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> Samples:
        """Music for each of `prompts`, or in the manner of each wave of `like [clips, samples]` at the embedder's rate.

        `seconds` is the semantic stage's window when not given; longer music is made by windows that slide. A number
        for `temperature`, `top_k` or `cfg` holds for all stages, a mapping for those it names, and the bundle's own
        values for the rest. Clip i is a function of its prompt and `seed + i` alone. `on_step(stage, done, total)`
        reports. Raises UserError for text where the bundle was trained without captions.
        """
        conditioning = self.quantizer.encode(self._embed(prompts, like).cpu())[:, None]
        seconds = self.window_seconds if seconds is None else seconds
        samplers = self._samplers(temperature, top_k, cfg)
        waves = [
            self.codec.decode(codes.cpu())
            for codes in self._acoustic_codes(conditioning, seconds, seed, samplers, on_step)
        ]
        return Samples(torch.cat(waves).clamp(-1, 1), self.codec.sample_rate)

    def _embed(self, prompts: list[str] | None, like: Tensor | None) -> Tensor:
        """Unit vectors `[clips, dim]` of what the music is to follow."""
        if prompts is not None and like is None:
            if not self.captions:
                raise UserError(
                    "This bundle was trained without captions, so it cannot follow words: give it a recording to "
                    "resemble (`stretto generate BUNDLE --like A.wav`)."
                )
            return self.embedder.embed_text(prompts)
        if like is not None and prompts is None:
            return self.embedder.embed_audio(like)
        raise ValueError("give either prompts or like")

    @property
    def window_seconds(self) -> float:
        """Seconds of music the semantic stage sees at once."""
        return self.stages["semantic"].config.window_seconds

    def _samplers(self, temperature: Any, top_k: Any, cfg: Any) -> dict[StageName, Sampler]:
        """One sampler a stage: what the caller asks for, then what the bundle says, then the plain value."""

        def choose(asked: Any, own: PerStage, stage: StageName, plain: Any) -> Any:
            if asked is not None and not isinstance(asked, Mapping):
                return asked
            return (asked or {}).get(stage, own.get(stage, plain))

        own = self.sampling
        return {
            stage: Sampler(
                temperature=choose(temperature, own.temperature, stage, 1.0),
                top_k=choose(top_k, own.top_k, stage, None),
                cfg=choose(cfg, own.cfg, stage, 1.0),
            )
            for stage in self.stages
        }

    def _acoustic_codes(
        self,
        conditioning: Tensor,
        seconds: float,
        seed: int,
        samplers: dict[StageName, Sampler],
        on_step: Callable[[str, int, int], None],
    ) -> Iterator[Tensor]:
        """The codes that the codec decodes, `[clips, frames, quantizers]`, a batch of clips at a time."""
        batches = conditioning.split(BATCH)
        for number, rows in enumerate(batches):
            first = seed + number * BATCH
            codes = {CONDITIONING: rows.to(self._device)}
            for index, (name, stage) in enumerate(self.stages.items()):
                field = stage.target
                # Whole-size from the start: the coarse and the fine stage fill in their own quantizers.
                shape = (len(rows), field.frames(seconds), field.quantizers)
                whole = codes.setdefault(field.name, torch.zeros(shape, dtype=torch.long, device=self._device))
                # No two stages draw the same random numbers.
                seeds = [(first + clip) * len(self.stages) + index for clip in range(len(rows))]

                def report(done: int, total: int, name: str = name, number: int = number) -> None:
                    on_step(name, number * total + done, len(batches) * total)

                made = generate_stage(stage, codes, seconds, samplers[name], seeds, on_step=report)
                whole[..., stage.quantizers.start : stage.quantizers.stop] = made
            yield codes[ACOUSTIC]

    @property
    def _device(self) -> torch.device:
        return self.stages["semantic"].embedding.weight.device
