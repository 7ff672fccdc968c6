"""What a caller asks of a bundle reaches the codes, and what cannot be asked is refused in words."""

from __future__ import annotations

import pytest
import torch
from small_bundle import PROMPTS, WINDOW_SECONDS, make_bundle

from model import MusicPipeline
from model.config import STAGES, SamplingConfig
from model.encoders.base import within_full_scale
from model.errors import UserError
from model.generation import ALLOWED, GenerationConfig

GREEDY = {"temperature": 0.0}
TINY = 1e-9


class Frozen:
    """A codec that shows the codes it is given as a wave, `[clips, frames × quantizers]`."""

    sample_rate = 75

    def decode(self, codes):
        return codes.flatten(1) / 32


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


@pytest.fixture
def pipeline(bundle):
    return MusicPipeline.load(bundle, "cpu")


@pytest.fixture
def codes(pipeline):
    """Makes music and returns its acoustic codes, `[clips, frames, quantizers]`."""

    def make(prompts=PROMPTS, seconds=0.2, **options):
        pipeline.codec = Frozen()
        made = pipeline.generate(prompts, seconds=seconds, **options).waveform
        return (made * 32).round().long().unflatten(1, (-1, 3))

    return make


def test_a_piece_is_its_prompt_and_its_seed_alone(codes):
    """Prompt by prompt, each with its samples; row i has the seed + i."""
    together = codes(samples=3, seed=5)
    assert len(together) == 6
    for row, made in enumerate(together):
        assert torch.equal(codes([PROMPTS[row // 3]], seed=5 + row)[0], made)
    assert len(torch.unique(together, dim=0)) == 6
    assert not torch.equal(codes([PROMPTS[1]], seed=5)[0], together[0])  # the prompt matters


@pytest.mark.parametrize("shape", [(8,), (2, 8)])
def test_music_that_is_too_loud_is_made_quieter_as_a_whole(pipeline, shape):
    """And not cut off, which distorts; what is not too loud stays as it is."""
    wave = torch.linspace(-1, 0.5, 8).expand(shape)
    loudness = torch.tensor([3.0, 0.5]).view(2, *[1] * len(shape))

    class Loud(Frozen):
        def decode(self, codes):
            return loudness * wave

    pipeline.codec = Loud()
    made = pipeline.generate(PROMPTS, seconds=0.2).waveform[:2]
    assert torch.allclose(made, torch.stack([wave, 0.5 * wave]))


def test_a_recording_gives_samples_too(codes):
    waves = torch.randn(2, 16_000, generator=torch.Generator().manual_seed(0))
    together = codes(None, like=waves, samples=2)
    assert len(together) == 4
    assert torch.equal(codes(None, like=waves[1:], seed=3)[0], together[3])


def test_top_p_reaches_every_stage_or_the_one_it_names(codes):
    drawn, likeliest = codes(), codes(**GREEDY)
    assert torch.equal(codes(top_p=TINY), likeliest)
    assert torch.equal(codes(top_p=1.0), drawn)
    only_fine = codes(top_p={"fine": TINY})
    assert torch.equal(only_fine[..., :1], drawn[..., :1])
    assert torch.equal(only_fine, codes(temperature={"fine": 0}))
    assert not torch.equal(only_fine, drawn)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": 1}, {"top_p": TINY}])
def test_what_the_caller_says_comes_before_what_the_bundle_says(codes, pipeline, options):
    ((name, value),) = options.items()
    likeliest, drawn = codes(**GREEDY), codes()
    pipeline.sampling = SamplingConfig(**{name: dict.fromkeys(STAGES, value)})
    assert torch.equal(codes(), likeliest)
    plain = {"temperature": 1.0, "top_k": 1000, "top_p": 1.0}[name]
    assert torch.equal(codes(**{name: plain}), drawn)
    assert not torch.equal(codes(**{name: {"fine": plain}}), likeliest)
    assert torch.equal(codes(**{name: {"fine": plain}})[..., :1], likeliest[..., :1])


def test_guidance_of_one_stage_changes_that_stage(codes):
    plain, guided = codes(), codes(cfg={"coarse": 5.0})
    assert not torch.equal(plain[..., 0], guided[..., 0])
    assert not torch.equal(codes(cfg={"semantic": 5.0}), plain)


def test_overlap_says_how_much_of_the_past_a_window_sees(codes):
    half, none, most = (codes(seconds=1.6, overlap=overlap) for overlap in (0.5, 0.0, 0.7))
    window = round(WINDOW_SECONDS * 25)
    for other in (none, most):
        assert other.shape == half.shape
        assert torch.equal(other[:, :window], half[:, :window])
        assert not torch.equal(other[:, window:], half[:, window:])


@pytest.mark.parametrize(
    ("dtype", "expected"), [("auto", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_the_stages_have_the_type_asked_for_and_the_rest_stays(bundle, dtype, expected):
    pipeline = MusicPipeline.load(bundle, "cpu", dtype=dtype)
    weights = [weight for stage in pipeline.stages.values() for weight in stage.parameters()]
    assert {weight.dtype for weight in weights} == {expected}
    assert {weight.dtype for weight in pipeline.embedder.parameters()} == {torch.float32}
    assert pipeline.stages["semantic"].conditions[0].centroids.dtype == torch.float32  # as DeepSpeed trains with them
    made = pipeline.generate(PROMPTS, seconds=0.8, cfg=2.0).waveform
    assert made.dtype == torch.float32
    assert made.shape == (2, 12_800)
    assert made.isfinite().all()
    assert made.abs().max() > 0.01


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1: it must be a number that is 0 or more."),
        ({"temperature": float("nan")}, "temperature is nan: it must be a number that is 0 or more."),
        ({"top_k": 0}, "top_k is 0: it must be a whole number that is 1 or more."),
        ({"top_k": {"fine": 2.5}}, "top_k of fine is 2.5: it must be a whole number that is 1 or more."),
        ({"top_p": 0.0}, "top_p is 0.0: it must be a number that is more than 0 and at most 1."),
        ({"top_p": {"coarse": 1.1}}, "top_p of coarse is 1.1: it must be a number that is more than 0 and at most 1."),
        ({"cfg": -1}, "cfg is -1: it must be a number that is 0 or more."),
        ({"cfg": "much"}, "cfg is 'much': it must be a number that is 0 or more."),
        ({"cfg": {"corse": 2}}, "cfg: there is no stage 'corse'. Did you mean coarse? Choose semantic, coarse, fine."),
        ({"seconds": 0}, "seconds is 0: it must be a number that is more than 0."),
        ({"seconds": float("inf")}, "seconds is inf: it must be a number that is more than 0."),
        ({"seconds": 0.01}, "seconds is 0.01: it must be at least 0.04, one frame of every stage."),
        ({"samples": 0}, "samples is 0: it must be a whole number that is 1 or more."),
        ({"seed": -1}, "seed is -1: it must be a whole number that is 0 or more and less than 2^62."),
        ({"seed": 2**62}, f"seed is {2**62}: it must be a whole number that is 0 or more and less than 2^62."),
        ({"overlap": 1}, "overlap is 1: it must be a number that is 0 or more and less than 1."),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name_and_value(pipeline, options, words):
    with pytest.raises(UserError) as caught:
        pipeline.generate(PROMPTS, **options)
    assert str(caught.value) == words


def test_the_largest_seed_works(codes):
    assert codes(PROMPTS, seed=2**62 - 1, samples=2).shape == (4, 5, 3)


def test_every_bound_has_its_words():
    assert set(ALLOWED) == set(GenerationConfig.model_fields)


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"device": "gpu"}, "device is 'gpu': it must be cpu or cuda."),
        ({"device": "meta"}, "device is 'meta': it must be cpu or cuda."),
        ({"device": "cuda:99"}, r"device is 'cuda:99': torch finds \d+ GPUs here. Choose cpu."),
        ({"dtype": "int8"}, "dtype is 'int8': it must be auto, fp32, bf16, fp16."),
        ({"weights": {"codec": "x"}}, "weights: the codec of this bundle is mel, whose weights are in it."),
        ({"weights": {"semantic": "x"}}, "weights: there is no encoder 'semantic' to generate with."),
    ],
)
def test_a_device_type_or_encoder_that_is_not_there_is_refused(bundle, where, words):
    with pytest.raises(UserError, match=words):
        MusicPipeline.load(bundle, **where)


def test_the_music_comes_with_the_codes_it_was_made_of(pipeline):
    """Of each stage; a stage, given them, finds them as likely as their scores say, however they were drawn."""
    made = pipeline.generate(PROMPTS, samples=2, seconds=0.8, seed=3, cfg=2.0, temperature=0.7, top_k=9)
    assert {name: codes.shape for name, codes in made.codes.items()} == {
        "semantic": (4, 20, 1), "coarse": (4, 20, 1), "fine": (4, 20, 2),
    }  # fmt: skip
    assert made.prompts == (PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1])
    assert made.seeds == (3, 4, 5, 6)
    acoustic = torch.cat([made.codes["coarse"], made.codes["fine"]], dim=-1)
    assert torch.allclose(within_full_scale(pipeline.codec.decode(acoustic)), made.waveform)
    batch = {"conditioning": made.conditioning, "semantic": made.codes["semantic"], "acoustic": acoustic}
    for name, stage in pipeline.stages.items():
        own = stage.own_codes(batch)
        with torch.no_grad():
            logits = stage.logits(batch).log_softmax(-1)
        expected = logits.gather(-1, own[..., None]).mean(dim=(1, 2, 3))
        assert torch.allclose(made.scores[name].float(), expected, atol=1e-4), name


def test_a_recording_stands_for_the_prompt(pipeline):
    made = pipeline.generate(like=torch.randn(2, 16_000), seconds=0.2)
    assert made.prompts == (None, None)
