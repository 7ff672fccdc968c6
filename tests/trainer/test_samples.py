"""Music from a stage in training: what is written, with which other stages, and that the training does not notice."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
import yaml
from helpers import FIELDS, coarse_config, fine_config, random_batch
from ranks import run_ranks
from safetensors.torch import save_file
from small_encoders import STEREO, save_encodec
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from training_runs import make_run, weights_digest

from model import artifact
from model.config import CodecConfig, ConditionConfig, EncodersConfig
from model.encoders.mel import MelCodec
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC
from model.kmeans import ResidualKMeans
from model.sampling import Sampler, generate_stage
from model.stage import StageTransformer
from trainer.config import StageConfig, TrainConfig
from trainer.samples import read_clips
from trainer.setup import WEIGHTS, StageSetup
from trainer.trained_stage import trained_stage
from trainer.weights_kinds import STAGE

SCHEDULE = {"steps": 4, "warmup_steps": 1, "validate_every": 4, "checkpoint_every": 2, "sample_every": 2}
CODEC = CodecConfig(sample_rate=8000, frame_rate=20, quantizers=4, codebook_size=256, mel_bands=40)
SECONDS = 2.0
LABELS = {"prompted", "unprompted", "real"}


def make_whole_run(folder, **train):
    """A run folder with a codec and all three stages ready to be trained."""
    train = {**SCHEDULE, **train}
    make_run(folder, **train)
    described = ConditionConfig(field=CONDITIONING, paths=["prefix", "summed"])
    models = {
        "semantic": coarse_config(field=SEMANTIC, last=None, conditions=[described]),
        "fine": fine_config(pattern="delay"),
    }
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    for name, model in models.items():
        config = StageConfig(model=model, train=TrainConfig(global_batch=8, **train))
        recipe["stages"][name] = config.model_dump(mode="json")
        (folder / name).mkdir()
        (folder / name / "stage.json").write_text('{"fingerprint": "fedcba9876543210"}')
    recipe["encoders"] = EncodersConfig(codec=CODEC).model_dump(mode="json")
    recipe["sampling"] = {"cfg": {"coarse": 2.0}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with artifact.create(folder / "codec", "codec", "c") as (path, _):
        centroids = torch.randn(4, 256, MelCodec(CODEC).dim, generator=torch.Generator().manual_seed(0))
        centroids *= torch.tensor([2.0, 0.5, 0.5, 0.5])[:, None, None]
        centroids[0] -= 8
        MelCodec(CODEC, ResidualKMeans.from_centroids(centroids)).save(path)
    return folder


def finish(run, name):
    """Leaves what a finished training of the stage `name` leaves."""
    setup = StageSetup.read(run, name)
    save_file(setup.build_model().state_dict(), setup.folder / WEIGHTS)
    info = {"model": setup.config.model.model_dump(mode="json")}
    artifact.write_manifest(setup.folder, STAGE, setup.fingerprint, setup.identity, info, [WEIGHTS])


def train(*jobs):
    """For `run_ranks`: trains each (run, stage), one after another."""
    import trainer.__main__ as entry
    from trainer.engine import Engine, start_process_group
    from trainer.training import Training

    start_process_group()
    for run, stage in jobs:
        setup = StageSetup.read(run, stage)
        entry.log_to(setup.folder / "log.txt", quiet=True)
        Training(setup, Engine(setup.build_model(), setup.config.train)).run()
    torch.distributed.destroy_process_group()


def in_stereo(run, weights):
    """Gives the run a codec of two channels."""
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["encoders"]["codec"] = {**STEREO, "quantizers": 5, "weights": str(save_encodec(weights, stereo=True))}
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def sounds(run, stage, step, sample_rate=CODEC.sample_rate):
    """Name → wave of the samples of a step."""
    folder = run / stage / "samples" / f"step-{step:08d}"
    found = {}
    for path in folder.glob("*.wav"):
        found[path.stem], rate = soundfile.read(path)
        assert rate == sample_rate
    return found


def events(run, stage):
    found = EventAccumulator(str(run / stage / "tensorboard" / "samples"), size_guidance={"audio": 0, "images": 0})
    return found.Reload()


def test_a_stage_in_training_is_heard_and_does_not_notice(tmp_path):
    """The fine stage completes its codes, from its newest checkpoint; two ranks, ZeRO-3, an average of the weights."""
    settings = {"zero": "zero3", "ema_decay": 0.9}
    heard = make_whole_run(tmp_path / "heard", **settings)
    silent = make_whole_run(tmp_path / "silent", **{**settings, "sample_every": None})
    fine_alone = {"zero": "zero2", "sample_every": None}
    other = make_whole_run(tmp_path / "other", **fine_alone)
    run_ranks(train, 1, tmp_path / "fine log", [other, "fine"])
    (other / "fine" / "checkpoints").rename(heard / "fine" / "checkpoints")
    run_ranks(train, 2, tmp_path / "log", [heard, "coarse"], [silent, "coarse"])
    assert weights_digest(heard) == weights_digest(silent)
    assert not (silent / "coarse" / "samples").exists()
    for step in (2, 4):
        waves = sounds(heard, "coarse", step)
        assert set(waves) == {f"{label}-{number}" for label in LABELS for number in (0, 1)}
        for wave in waves.values():
            assert wave.shape == (SECONDS * CODEC.sample_rate,)
            assert np.isfinite(wave).all()
            assert np.abs(wave).max() > 0.001
        for number in (0, 1):
            made = [waves[f"{label}-{number}"] for label in ("prompted", "unprompted", "real")]
            assert not any(np.array_equal(one, two) for one, two in zip(made, [*made[1:], made[0]], strict=True))
    assert np.array_equal(sounds(heard, "coarse", 2)["real-0"], sounds(heard, "coarse", 4)["real-0"])
    board = events(heard, "coarse")
    assert set(board.Tags()["audio"]) == {f"{label}/{number}" for label in LABELS for number in (0, 1)}
    assert set(board.Tags()["images"]) == {"spectrograms/0", "spectrograms/1"}
    assert [event.step for event in board.Audio("prompted/0")] == [2, 4]
    assert board.Audio("prompted/0")[0].sample_rate == CODEC.sample_rate
    picture = board.Images("spectrograms/0")[0]
    assert picture.width > 800
    assert picture.height > 200
    histograms = set(board.Tags()["histograms"])
    assert {f"codes of acoustic {quantizer}/prompted/0" for quantizer in (0, 1)} <= histograms
    assert "until stage" not in (heard / "coarse" / "log.txt").read_text()


def test_what_can_be_heard_depends_on_the_stages_there_are(tmp_path):
    """Semantic codes need a coarse stage to be heard; without a fine one there are the first codebooks; and a codec of
    two channels is heard in stereo."""
    names = ("semantic alone", "semantic and coarse", "all", "coarse alone", "fine", "fine in stereo")
    runs = {name: make_whole_run(tmp_path / name) for name in names}
    in_stereo(runs["fine in stereo"], tmp_path / "stereo codec")
    for name, stages in (("semantic and coarse", ["coarse"]), ("all", ["coarse", "fine"])):
        for stage in stages:
            finish(runs[name], stage)
    trained = {name: name.split()[0].replace("all", "semantic") for name in names}
    run_ranks(train, 1, tmp_path / "log", *([runs[name], stage] for name, stage in trained.items()))
    rates = {"fine in stereo": STEREO["sample_rate"]}
    heard = {name: sounds(runs[name], stage, 4, rates.get(name, CODEC.sample_rate)) for name, stage in trained.items()}
    said = {name: (runs[name] / stage / "log.txt").read_text() for name, stage in trained.items()}
    assert not heard["semantic alone"]
    assert said["semantic alone"].count("samples have codes but no sound until stage 'coarse'") == 1
    assert "codes of semantic 0/unprompted/1" in events(runs["semantic alone"], "semantic").Tags()["histograms"]
    for name in ("semantic and coarse", "coarse alone"):
        assert said[name].count("samples have the first codebooks only until stage 'fine'") == 1
    for name in names[1:]:
        assert len(heard[name]) == 6
    assert "until stage" not in said["all"] + said["fine"]
    # The same clip, of two codebooks and of all.
    assert not np.array_equal(heard["semantic and coarse"]["real-0"], heard["all"]["real-0"])
    assert np.array_equal(heard["fine"]["real-0"], heard["all"]["real-0"])
    assert all(wave.shape[1] == 2 for wave in heard["fine in stereo"].values())
    assert len(events(runs["fine in stereo"], "fine").Tags()["audio"]) == 6


def test_only_weights_that_fit_the_run_are_used(tmp_path):
    run = make_whole_run(tmp_path / "run")
    assert trained_stage(run, "fine") is None
    finish(run, "fine")
    assert isinstance(trained_stage(run, "fine"), StageTransformer)
    manifest = (run / "tokens" / artifact.MANIFEST).read_text()
    (run / "tokens" / artifact.MANIFEST).write_text(manifest.replace('"fingerprint": "t"', '"fingerprint": "new"'))
    assert trained_stage(run, "fine") is None


def test_what_prompts_a_clip_is_said(tmp_path):
    run = make_whole_run(tmp_path / "run")
    clips = {stage: read_clips(StageSetup.read(run, stage), 2) for stage in ("semantic", "coarse", "fine")}
    assert {stage: found[0].prompt for stage, found in clips.items()} == {
        "semantic": "“a tune”",
        "coarse": "“a tune” and its semantic codes",
        "fine": "its acoustic codes",
    }
    clip = clips["coarse"][1]
    assert {name: tuple(codes.shape) for name, codes in clip.codes.items()} == {
        CONDITIONING: (1, 1, 4),
        SEMANTIC: (1, 20, 1),
        ACOUSTIC: (1, 40, 4),
    }


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_row_without_a_condition_does_not_depend_on_it(cfg):
    torch.manual_seed(0)
    stage = StageTransformer(coarse_config(), FIELDS, {CONDITIONING: 8})
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    dropped = torch.tensor([[False, False], [True, False], [True, True]])
    one, two = random_batch(seed=1), random_batch(seed=2)

    def made(**changed):
        given = {**one, **changed}
        return generate_stage(stage, given, 1.0, Sampler(cfg=cfg), [0, 0, 0], dropped=dropped)

    usual, other, another = made(), made(conditioning=two[CONDITIONING]), made(semantic=two[SEMANTIC])
    assert [torch.equal(*pair) for pair in zip(usual, other, strict=True)] == [False, True, True]
    assert [torch.equal(*pair) for pair in zip(usual, another, strict=True)] == [False, False, True]
