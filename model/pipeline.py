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
from model.encoders.base import Codec, JointEmbedder, within_full_scale
from model.errors import UserError
from model.fields import ACOUSTIC, CONDITIONING, TokenField
from model.generation import GenerationConfig
from model.kmeans import ResidualKMeans
from model.sampling import Sampler, generate_stage
from model.stage import StageTransformer, build_stage

KIND = "bundle"
QUANTIZERS = "quantizers.safetensors"
CODEC = Path("encoders/codec")
JOINT = Path("encoders/joint")
BATCH = 32
"""Clips generated together: guidance doubles it, and every clip keeps a key/value cache."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PerStage = Mapping[StageName, Any]


@dataclass(frozen=True)
class Samples:
    """Generated music: `waveform` is float32 `[clips, samples]` in [-1, 1], of a stereo codec `[clips, 2, samples]`."""

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
    def load(cls, path: str | Path, device: torch.device | str | None = None, dtype: str = "auto") -> MusicPipeline:
        """The bundle at `path`, its stages on `device` (a GPU where there is one) with weights of `dtype`.

        `auto` is fp32 on a CPU and bf16 on a GPU. Encoders, codec and quantizers stay in fp32 on the CPU. Raises
        UserError where `path` is no bundle, a file of it is missing or cut short, or there is no such device or dtype.
        """
        device = choose_device(device)
        weights = choose_dtype(dtype, device)
        bundle = artifact.read(Path(path), KIND)
        incomplete = artifact.problems(bundle, digests=False)
        if incomplete:
            raise UserError(f"The bundle {path} is not whole: {incomplete[0]}. Export it again.")
        info = bundle.info
        fields = {name: TokenField.from_json(value) for name, value in info["fields"].items()}
        quantizers = load_file(bundle.path / QUANTIZERS)
        encoders = EncodersConfig.model_validate(info["encoders"])
        stages: dict[StageName, StageTransformer] = {}
        for name in STAGES:
            stage = build_stage(StageModelConfig.model_validate(info["stages"][name]), fields, quantizers)
            stage.load_state_dict(load_file(bundle.path / f"{name}.safetensors"))
            stages[name] = ready(stage, device, weights)
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
        samples: int = 1,
        seconds: float | None = None,
        seed: int = 0,
        temperature: float | PerStage | None = None,
        top_k: int | PerStage | None = None,
        top_p: float | PerStage | None = None,
        cfg: float | PerStage | None = None,
        overlap: float = 0.5,
        on_step: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> Samples:
        """Music for each of `prompts`, or in the manner of each wave of `like [waves, time]` at the embedder's rate.

        Each gives `samples` clips, one after another: clip i is of prompt i // samples, and a function of that prompt
        and `seed + i` alone. `seconds` is the semantic stage's window when not given; longer music is made by windows
        that slide, each taking up a share `overlap` of the one before. A number for `temperature`, `top_k`, `top_p` or
        `cfg` holds for all stages, a mapping for those it names, and the bundle's own values for the rest.
        `on_step(stage, done, total)` reports. Raises UserError for values out of bounds (model/generation.py), and for
        text where the bundle was trained without captions.
        """
        options = {"samples": samples, "seconds": seconds, "seed": seed, "overlap": overlap}
        sampling = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "cfg": cfg}
        config = GenerationConfig.of({**options, **sampling})
        seconds = self.window_seconds if config.seconds is None else config.seconds
        self._check_frames(seconds)
        conditioning = self.quantizer.encode(self._embed(prompts, like).cpu())[:, None]
        conditioning = conditioning.repeat_interleave(config.samples, dim=0)
        waves = [
            self.codec.decode(codes.cpu()) for codes in self._acoustic_codes(conditioning, seconds, config, on_step)
        ]
        return Samples(within_full_scale(torch.cat(waves)), self.codec.sample_rate)

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

    def _acoustic_codes(
        self,
        conditioning: Tensor,
        seconds: float,
        config: GenerationConfig,
        on_step: Callable[[str, int, int], None],
    ) -> Iterator[Tensor]:
        """The codes that the codec decodes, `[clips, frames, quantizers]`, a batch of clips at a time."""
        samplers = self._samplers(config)
        batches = conditioning.split(BATCH)
        for number, rows in enumerate(batches):
            first = config.seed + number * BATCH
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

                made = generate_stage(stage, codes, seconds, samplers[name], seeds, config.overlap, report)
                whole[..., stage.quantizers.start : stage.quantizers.stop] = made
            yield codes[ACOUSTIC]

    @property
    def _device(self) -> torch.device:
        return self.stages["semantic"].embedding.weight.device


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
        raise UserError(f"dtype is {name!r}: it must be auto, fp32 or bf16.")
    return DTYPES[name]
