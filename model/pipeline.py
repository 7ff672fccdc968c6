"""From a bundle to music: no DeepSpeed, no shards, no run folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.bundle import CODEC, JOINT, QUANTIZERS, load_stage, open_bundle, read_fields, read_tensors, refusing_others
from model.config import STAGES, EncodersConfig, ExecutionConfig, SamplingConfig, StageName
from model.encoders import load_codec, load_joint_embedder
from model.encoders.base import Codec, JointEmbedder, within_full_scale
from model.encoders.pretrained import SECTIONS
from model.errors import UserError
from model.fields import ACOUSTIC, CONDITIONING, TokenField
from model.generation import GenerationConfig
from model.kmeans import ResidualKMeans
from model.sampling import Sampler, generate_stage
from model.stage import StageTransformer

BATCH = 32
"""Clips generated together: guidance doubles it, and every clip keeps a key/value cache."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PerStage = Mapping[StageName, Any]
OnStep = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Samples:
    """Generated music, clip after clip, with what it was made of. All tensors are on the CPU."""

    waveform: Tensor
    """float32 `[clips, samples]` in [-1, 1], of a stereo codec `[clips, 2, samples]`."""
    sample_rate: int
    codes: dict[StageName, Tensor]
    """What each stage drew, int64 `[clips, frames, quantizers]`; the codec decodes those of coarse and fine, side by
    side."""
    scores: dict[StageName, Tensor]
    """Mean log-probability of these codes in nats, float64 `[clips]`: of each code given those before it and the clip's
    conditions, by the stage as it was trained. Guidance, temperature, top-k and top-p, which change what is drawn, do
    not enter, so that clips compare however they were drawn. The nearer to 0, the likelier the stage takes the clip."""
    conditioning: Tensor
    """The codes of what each clip follows, int64 `[clips, 1, quantizers]`."""
    prompts: tuple[str | None, ...]
    """The words each clip follows; None where it follows a recording."""
    seeds: tuple[int, ...]
    """Of each clip: its prompt and this seed alone make it again."""


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
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: str = "auto",
        *,
        verify: bool = True,
        weights: Mapping[str, str] | None = None,
    ) -> MusicPipeline:
        """The bundle at `path`, its stages on `device` (a GPU where there is one) with weights of `dtype`.

        `dtype` is fp32, bf16 or fp16; `auto` is fp32 on a CPU and bf16 on a GPU, whatever the bundle was
        exported in. Encoders, codec and quantizers stay in fp32 on the CPU. With `verify` the digest of every file is
        compared first, which takes a second or so for a gigabyte. `weights` says where those of pretrained encoders
        are on this machine, as a recipe would (docs/encoders.md), under "codec" and "joint". Raises UserError where
        `path` is no bundle, a file of it is missing, cut short, changed or no safetensors, or there is no such device
        or dtype.
        """
        device = choose_device(device)
        chosen = choose_dtype(dtype, device)
        bundle = open_bundle(Path(path), verify)
        folder, info = bundle.path, bundle.info
        quantizers = read_tensors(folder / QUANTIZERS)
        encoders = with_weights(EncodersConfig.model_validate(info["encoders"]), weights or {})
        stages = {name: ready(load_stage(folder, info, name, quantizers), device, chosen) for name in STAGES}
        with refusing_others(folder / JOINT):
            embedder = load_joint_embedder(folder / JOINT, encoders.joint)
        with refusing_others(folder / CODEC):
            codec = load_codec(folder / CODEC, encoders.codec)
        return cls(
            stages,
            read_fields(info),
            ResidualKMeans.from_centroids(quantizers[CONDITIONING]),
            embedder,
            codec,
            SamplingConfig.model_validate(info["sampling"]),
            info["captions"],
        )

    def generate(
        self,
        prompts: str | list[str] | None = None,
        *,
        like: Tensor | None = None,
        samples: int = 1,
        seconds: float | None = None,
        seed: int = 0,
        temperature: float | PerStage | None = None,
        top_k: int | PerStage | None = None,
        top_p: float | PerStage | None = None,
        cfg: float | PerStage | None = None,
        overlap: float = 0.5,
        on_step: OnStep = lambda stage, done, total: None,
    ) -> Samples:
        """Music for each of `prompts`, or in the manner of each wave of `like [waves, time]` at the embedder's rate.

        Each gives `samples` clips, one after another: clip i is of prompt i // samples, and a function of that prompt
        and `seed + i` alone. `seconds` is the semantic stage's window when not given; longer music is made by windows
        that slide, each taking up a share `overlap` of the one before. A number for `temperature`, `top_k`, `top_p` or
        `cfg` holds for all stages, a mapping for those it names, and the bundle's own values for the rest.
        `on_step(stage, done, total)` reports. Raises UserError for values out of bounds (model/generation.py), and for
        text where the bundle was trained without captions.
        """
        prompts = [prompts] if isinstance(prompts, str) else prompts
        options = {"samples": samples, "seconds": seconds, "seed": seed, "overlap": overlap}
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "cfg": cfg}
        config = GenerationConfig.of({**options, **sampling})
        seconds = self.window_seconds if config.seconds is None else config.seconds
        self._check_frames(seconds)
        conditioning = self.quantizer.encode(self._embed(prompts, like).cpu())[:, None]
        conditioning = conditioning.repeat_interleave(config.samples, dim=0)
        waves, made, scores = [], [], []
        for number, rows in enumerate(conditioning.split(BATCH)):
            step = _of_batch(on_step, number, -(-len(conditioning) // BATCH))
            codes, score = self._generate_batch(rows, config.seed + number * BATCH, seconds, config, step)
            waves.append(self.codec.decode(codes[ACOUSTIC]))
            made.append(codes)
            scores.append(score)
        whole = {name: torch.cat([codes[name] for codes in made]) for name in made[0]}
        words: Sequence[str | None] = prompts or [None] * len(conditioning)
        parts = self.stages.items()
        return Samples(
            within_full_scale(torch.cat(waves)),
            self.codec.sample_rate,
            {name: whole[s.target.name][..., s.quantizers.start : s.quantizers.stop] for name, s in parts},
            {name: torch.cat([score[name] for score in scores]) for name in self.stages},
            conditioning,
            tuple(words[clip // config.samples] for clip in range(len(conditioning))),
            tuple(range(config.seed, config.seed + len(conditioning))),
        )

    def _embed(self, prompts: list[str] | None, like: Tensor | None) -> Tensor:
        """Unit vectors `[prompts or waves, dim]` of what the music is to follow."""
        if prompts and like is None:
            if not self.captions:
                raise UserError(
                    "This bundle was trained without captions, so it cannot follow words: give it a recording to "
                    "resemble (`stretto generate BUNDLE --like A.wav`)."
                )
            return self.embedder.embed_text(prompts)
        if like is not None and not prompts:
            return self.embedder.embed_audio(like)
        raise ValueError("give either prompts or like")

    def _check_frames(self, seconds: float) -> None:
        """Raises UserError where some stage would not have one frame to make."""
        fields = [stage.target for stage in self.stages.values()]
        if not all(field.frames(seconds) for field in fields):
            shortest = max(float(1 / field.rate) for field in fields)
            raise UserError(f"seconds is {seconds:g}: it must be at least {shortest:g}, one frame of every stage.")

    @property
    def window_seconds(self) -> float:
        """Seconds of music the semantic stage sees at once."""
        return self.stages["semantic"].config.window_seconds

    def _samplers(self, asked: SamplingConfig) -> dict[StageName, Sampler]:
        """One sampler a stage: what the caller asks for, then what the bundle says, then the plain value."""
        chosen = {name: getattr(self.sampling, name) | getattr(asked, name) for name in SamplingConfig.model_fields}
        return samplers(SamplingConfig(**chosen))

    def _generate_batch(
        self, conditioning: Tensor, seed: int, seconds: float, config: GenerationConfig, on_step: OnStep
    ) -> tuple[dict[str, Tensor], dict[StageName, Tensor]]:
        """The codes of every field, whole-size `[clips, frames, quantizers]`, and each stage's mean log-probability of
        its own, `[clips]`: of the clips that follow `conditioning`, the first with `seed`."""
        samplers, clips = self._samplers(config), len(conditioning)
        codes = {CONDITIONING: conditioning.to(self._device)}
        scores = {}
        for index, (name, stage) in enumerate(self.stages.items()):
            field = stage.target
            # Whole-size from the start: the coarse and the fine stage fill in their own quantizers.
            shape = (clips, field.frames(seconds), field.quantizers)
            whole = codes.setdefault(field.name, torch.zeros(shape, dtype=torch.long, device=self._device))
            # No two stages draw the same random numbers.
            seeds = [(seed + clip) * len(self.stages) + index for clip in range(clips)]
            total = torch.zeros(clips, dtype=torch.float64, device=self._device)
            report = partial(on_step, name)
            made = generate_stage(stage, codes, seconds, samplers[name], seeds, config.overlap, report, scores=total)
            whole[..., stage.quantizers.start : stage.quantizers.stop] = made
            scores[name] = (total / made[0].numel()).cpu()
        return {name: made.cpu() for name, made in codes.items()}, scores

    @property
    def _device(self) -> torch.device:
        return self.stages["semantic"].embedding.weight.device


def _of_batch(on_step: OnStep, number: int, batches: int) -> OnStep:
    """What reports a step of the batch `number` as one of all `batches`."""
    return lambda stage, done, total: on_step(stage, number * total + done, batches * total)


def with_weights(encoders: EncodersConfig, weights: Mapping[str, str]) -> EncodersConfig:
    """`encoders` with the `weights` of codec and joint embedder read from elsewhere."""
    for part in weights:
        if part not in ("codec", "joint"):
            raise UserError(f"weights: there is no encoder {part!r} to generate with. Choose codec, joint.")
        kind = getattr(encoders, part).kind
        if kind not in SECTIONS:
            raise UserError(f"weights: the {part} of this bundle is {kind}, whose weights are in it.")
    changed = {part: getattr(encoders, part).model_copy(update={"weights": place}) for part, place in weights.items()}
    return encoders.model_copy(update=changed)


def ready(stage: StageTransformer, device: torch.device, dtype: torch.dtype) -> StageTransformer:
    """`stage`, moved, to make music on `device` with weights of `dtype`."""
    stage.to(device).eval()
    for weight in stage.parameters():  # as in training, the centroids of summed conditions stay in fp32
        weight.data = weight.data.to(dtype)
    stage.configure(ExecutionConfig())  # last: it looks at the weights' device and type
    return stage


def samplers(config: SamplingConfig) -> dict[StageName, Sampler]:
    """How each stage draws."""
    chosen = {name: getattr(config, name) for name in SamplingConfig.model_fields}
    return {
        stage: Sampler(**{name: values[stage] for name, values in chosen.items() if stage in values})
        for stage in STAGES
    }


def choose_device(name: torch.device | str | None) -> torch.device:
    """The device to make music on: a GPU where there is one, unless named. Raises UserError where it is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device is {name!r}: it must be cpu or cuda.") from None
    if device.type not in ("cpu", "cuda"):  # others have no fp64, in which codes are drawn
        raise UserError(f"device is {str(name)!r}: it must be cpu or cuda.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device is {str(name)!r}: torch finds {torch.cuda.device_count()} GPUs here. Choose cpu.")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of the stages' weights. Raises UserError for a name that is not known."""
    if name == "auto":
        return DTYPES["bf16" if device.type == "cuda" else "fp32"]
    if name not in DTYPES:
        raise UserError(f"dtype is {name!r}: it must be auto, {', '.join(DTYPES)}.")
    return DTYPES[name]
