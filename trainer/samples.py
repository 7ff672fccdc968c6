"""Music from a stage while it is trained, in TensorBoard and as WAV files, so that one hears how far it is."""

from __future__ import annotations

import io
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import soundfile
import torch
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from data.shards import first_records
from data.windows import Cut
from model import artifact
from model.config import STAGES, EncodersConfig, SamplingConfig, StageName
from model.encoders import load_codec
from model.encoders.base import Codec, with_channels, within_full_scale
from model.encoders.spectrum import LogMel, window_length
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC
from model.pipeline import ready, samplers
from model.sampling import generate_stage
from model.stage import StageTransformer
from trainer import random_state
from trainer.agreement import alone, raise_alike, said
from trainer.callback import Callback
from trainer.corpora import validation_corpus
from trainer.engine import Engine
from trainer.setup import StageSetup
from trainer.trained_stage import trained_stage
from trainer.training import Training

log = logging.getLogger(__name__)

CLIPS = 2
"""Recordings of the validation set that samples are made of."""
LABELS = ("prompted", "unprompted", "real")
BEAT_SECONDS = 1.0
"""How often the waiting ranks hear from the one that works."""
BANDS = 96
RANGE_DB = 60


@dataclass(frozen=True)
class Clip:
    """A window of a recording of the validation set."""

    codes: dict[str, Tensor]
    """Of every field, `[1, frames, quantizers]`; the conditioning is a caption's where there is one."""
    seconds: float
    prompt: str
    """What the conditions are, in words."""


def read_clips(setup: StageSetup, count: int) -> list[Clip]:
    """The first clips of the validation set, cut as the stage cuts them."""
    info = artifact.read(setup.tokens, "tokens").info
    fields, window = [CONDITIONING, SEMANTIC, ACOUSTIC], setup.config.model.window_seconds
    cut = Cut.of(info, fields, window, 0.0, setup.seed, fixed=True, short=setup.config.train.packing)
    clips = []
    for record in first_records(validation_corpus(setup).folder / "validation", count):
        arrays = cut(record, 0, record["id"])
        captions = json.loads(record["captions"])
        if captions:
            arrays[CONDITIONING] = record["text_conditioning"][:1]
        codes = {name: torch.from_numpy(arrays[name].astype(np.int64))[None] for name in fields}
        clips.append(Clip(codes, cut.length(record), prompt(setup, captions)))
    return clips


def prompt(setup: StageSetup, captions: list[str]) -> str:
    """What the stage is told of a clip."""
    parts = dict.fromkeys(part.field for part in setup.config.model.conditions)
    own = {CONDITIONING: f"“{captions[0]}”" if captions else "the embedding of its audio"}
    return " and ".join(own.get(name, f"its {name} codes") for name in parts) or "nothing"


class Samples(Callback):
    """Every `sample_every` steps the stage predicts the codes of a few clips, the stages after it complete them, and
    the codec makes them sound: prompted by a clip's conditions, without any, and beside them the real clip.

    Rank 0 works with a copy of the weights, or of their average where one is kept, and with random numbers of its own,
    the same ones each time. The training does not notice; the other ranks wait.
    """

    def __init__(self, setup: StageSetup, engine: Engine) -> None:
        self.setup = setup
        self.engine = engine
        recipe = yaml.safe_load((setup.run / "recipe.yaml").read_text())
        self.encoders = EncodersConfig.model_validate(recipe["encoders"])
        self.samplers = samplers(SamplingConfig.model_validate(recipe["sampling"]))
        self._missing: str | None = None

    def on_start(self, training: Training) -> None:
        # A folder of its own: TensorBoard reads one file at a time of each.
        folder, start = self.setup.folder / "tensorboard" / "samples", training.step

        def prepare() -> None:
            self.board = SummaryWriter(str(folder), purge_step=start + 1 if start else 0)
            self.clips = read_clips(self.setup, CLIPS)

        alone(self.engine, prepare, folder)

    def after_step(self, training: Training, losses: Tensor) -> None:
        if not training.due(training.config.sample_every):
            return
        with training.aside():
            average = self.engine.averages
            weights = {name: value for name, value in self.engine.full_weights(average) if self.engine.rank == 0}
            self._alone(training, lambda beat: self._make(training.step, weights, beat))

    def on_end(self, training: Training) -> None:
        if self.engine.rank == 0:
            self.board.close()

    def _alone(self, training: Training, work: Callable[[Callable[[], None]], None]) -> None:
        """Does `work(beat)` on rank 0 while the others wait, in collectives that `beat` lets end soon: none of them
        runs into a time limit, however long the work takes. What `said` tells of is raised on all ranks."""
        problem = None
        if self.engine.rank == 0:
            problem = self._work(training, work)
            self.engine.most(1)
        else:
            while not self.engine.most(0)[0]:
                training.beat("waiting for samples")
        problem = self.engine.broadcast(problem)
        raise_alike([problem] if problem else [])

    def _work(self, training: Training, work: Callable[[Callable[[], None]], None]) -> str | None:
        last = time.monotonic()

        def beat() -> None:
            nonlocal last
            if time.monotonic() - last > BEAT_SECONDS:
                training.beat("making samples")
                self.engine.most(0)
                last = time.monotonic()

        with random_state.preserved():
            return said(lambda: work(beat), self.setup.folder / "samples")

    def _make(self, step: int, weights: dict[str, Tensor], beat: Callable[[], None]) -> None:
        stages = self._stages(weights, beat)
        audible = max((stage.quantizers.stop for stage in stages.values() if stage.target.name == ACOUSTIC), default=0)
        folder = self.setup.folder / "samples" / f"step-{step:08d}"
        for number, clip in enumerate(self.clips):
            codes = self._generate(stages, number, beat)
            self._count_codes(step, number, codes)
            if audible:
                beat()
                waves = within_full_scale(self.codec.decode(codes[ACOUSTIC][..., :audible]))
                mono = with_channels(waves, 1)  # for TensorBoard, which knows nothing else
                folder.mkdir(parents=True, exist_ok=True)
                for label, wave, mixed in zip(LABELS, waves, mono, strict=True):
                    sound = io.BytesIO()  # libsndfile itself does not say that a disk is full
                    soundfile.write(sound, wave.numpy().T, self.codec.sample_rate, format="WAV")
                    (folder / f"{label}-{number}.wav").write_bytes(sound.getvalue())
                    self.board.add_audio(f"{label}/{number}", mixed[None], step, self.codec.sample_rate)
                titles = (f"prompted by {clip.prompt}", "unprompted", "real")
                picture = spectrograms(mono, self.codec.sample_rate, titles)
                self.board.add_image(f"spectrograms/{number}", picture, step, dataformats="HWC")
        self.board.flush()

    @cached_property
    def codec(self) -> Codec:
        return load_codec(artifact.read(self.setup.run / "codec", "codec").path, self.encoders.codec)

    def _stages(self, weights: dict[str, Tensor], beat: Callable[[], None]) -> dict[StageName, StageTransformer]:
        """This stage with `weights` and, in order, those after it, up to the first that has none yet."""
        own = self.setup.build_model()
        own.load_state_dict(weights)
        found: dict[StageName, StageTransformer] = {}
        missing = None
        for name in STAGES[STAGES.index(self.setup.stage) :]:  # type: ignore[arg-type]
            beat()
            stage = own if name == self.setup.stage else trained_stage(self.setup.run, name)
            if stage is None:
                missing = name
                break
            found[name] = ready(stage, self.engine.device, self.engine.module.heads.dtype)
        if missing and missing != self._missing:
            some = any(stage.target.name == ACOUSTIC for stage in found.values())
            log.info(
                "samples have %s until stage %r has weights that fit this run",
                "the first codebooks only" if some else "codes but no sound",
                missing,
            )
        self._missing = missing
        return found

    def _generate(
        self, stages: dict[StageName, StageTransformer], number: int, beat: Callable[[], None]
    ) -> dict[str, Tensor]:
        """Codes `[3, frames, quantizers]` of each field that the stages predict: prompted, unprompted, real."""
        clip = self.clips[number]
        codes = {name: value.repeat(2, 1, 1).to(self.engine.device) for name, value in clip.codes.items()}
        for index, name in enumerate(STAGES):
            if name not in stages:
                continue
            stage = stages[name]
            dropped = stage.keep_all(2, self.engine.device)
            for place, condition in enumerate(stage.conditions):
                # The stages after this one see what it has made, and nothing of the prompt either.
                dropped[1, place] = name == self.setup.stage or condition.field.name == CONDITIONING
            made = generate_stage(
                stage,
                codes,
                clip.seconds,
                self.samplers[name],
                [number * len(STAGES) + index] * 2,
                on_step=lambda done, total: beat(),
                dropped=dropped,
            )
            codes[stage.target.name][..., stage.quantizers.start : stage.quantizers.stop] = made
        return {
            stage.target.name: torch.cat([codes[stage.target.name].cpu(), clip.codes[stage.target.name]])
            for stage in stages.values()
        }

    def _count_codes(self, step: int, number: int, codes: dict[str, Tensor]) -> None:
        """Histograms of the codes that this stage predicts: a collapsed one shows in a few tall bars."""
        model = self.engine.module
        size = model.target.codebook_size
        edges = np.linspace(0, size, min(size, 64) + 1)
        for label, row in zip(LABELS, codes[model.target.name], strict=True):
            for quantizer in model.quantizers:
                tag = f"codes of {model.target.name} {quantizer}/{label}/{number}"
                self.board.add_histogram(tag, row[:, quantizer], step, bins=edges)  # type: ignore[arg-type]


def spectrograms(waves: Tensor, sample_rate: int, titles: tuple[str, ...]) -> np.ndarray:
    """A picture `[height, width, 3]` (uint8) of the mel spectra of `waves [clips, samples]`, side by side, each in dB
    below the loudest point of all."""
    log_mel = LogMel(BANDS, sample_rate, window_length(sample_rate, 0.064), round(0.016 * sample_rate), 1e-7)
    levels = log_mel(waves) * (10 / np.log(10))
    figure = Figure(figsize=(4 * len(waves), 2.6), dpi=100, layout="constrained")
    panels = figure.subplots(1, len(waves), sharey=True)
    for panel, level, title in zip(panels, levels - levels.max(), titles, strict=True):
        panel.imshow(
            level.T,
            origin="lower",
            aspect="auto",
            extent=(0, waves.shape[1] / sample_rate, 0, BANDS),
            cmap="magma",
            vmin=-RANGE_DB,
            vmax=0,
        )
        panel.set_title(title, fontsize=8, wrap=True, parse_math=False)
        panel.set_xlabel("seconds")
    figure.axes[0].set_ylabel("mel band")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
