from dataclasses import dataclass, field
from fractions import Fraction

import pytest
import torch
from helpers import FIELDS, coarse_config, fine_config, quantizers, random_batch

from model.decoder import Decoder
from model.dropping import Dropped
from model.errors import UserError
from model.fields import ACOUSTIC, SEMANTIC
from model.prepacked import linear, prepacked
from model.sampling import Sampler, generate_stage, generate_window, window_starts
from model.stage import build_stage

VARIANTS = [
    pytest.param({"pattern": pattern, "positions": positions}, id=f"{pattern}-{positions}")
    for pattern in ("flat", "delay")
    for positions in ("time", "index")
]


def build(config):
    torch.manual_seed(0)
    stage = build_stage(config, FIELDS, quantizers()).eval()
    for parameter in stage.parameters():  # sharp enough for every path to matter
        torch.nn.init.normal_(parameter, std=0.1)
    return stage


@dataclass(frozen=True)
class Recorder(Sampler):
    """Keeps the logits it is given and answers with the codes it was told to."""

    answers: list = field(default_factory=list)
    logits: list = field(default_factory=list)

    def draw(self, logits, uniform):
        self.logits.append(logits)
        return self.answers[len(self.logits) - 1]


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("make", [coarse_config, fine_config])
@pytest.mark.parametrize("known", [0, 1, 15])
def test_generation_and_training_give_the_same_logits(make, settings, known):
    """The key/value cache, the prefix and the known frames change nothing: 1e-4 in fp32."""
    stage = build(make(**settings))
    batch = random_batch()
    codes = batch[ACOUSTIC][..., stage.quantizers.start : stage.quantizers.stop]
    pattern = stage.pattern(codes.shape[1])
    order = [(frame, q) for step in range(pattern.steps) for frame, q in pattern.codes_at(step) if frame >= known]
    recorder = Recorder(answers=[codes[:, frame, q] for frame, q in order])
    uniform = torch.zeros(codes.shape)
    made = generate_window(stage, batch, codes.shape[1], recorder, uniform, codes[:, :known] if known else None)
    assert torch.equal(made, codes)
    expected = stage.logits(batch)
    difference = max(
        (got - expected[:, frame, q]).abs().max().item() for (frame, q), got in zip(order, recorder.logits, strict=True)
    )
    assert difference < 1e-4


def test_guidance_mixes_the_conditioned_and_the_free_logits():
    stage = build(coarse_config())
    batch = random_batch()
    recorder = Recorder(cfg=3.0, answers=[torch.zeros(3, dtype=torch.long)] * 100)
    generate_window(stage, batch, 40, recorder, torch.zeros(3, 40, 2))
    start = {**batch, ACOUSTIC: torch.zeros_like(batch[ACOUSTIC])}
    conditioned = stage.logits(start)[:, 0, 0]
    free = stage.logits(start, Dropped(torch.ones(3, 2, dtype=torch.bool)))[:, 0, 0]
    assert torch.allclose(recorder.logits[0], free + 3 * (conditioned - free), atol=1e-4)


def test_a_sample_is_its_seeds_alone():
    stage = build(coarse_config(pattern="delay"))
    batch = random_batch(batch=3)
    sampler = Sampler(temperature=1.0, cfg=2.0)
    together = generate_stage(stage, batch, 2.0, sampler, seeds=[5, 6, 7])
    alone = generate_stage(stage, {name: codes[1:2] for name, codes in batch.items()}, 2.0, sampler, seeds=[6])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(together, generate_stage(stage, batch, 2.0, sampler, seeds=[8, 9, 10]))


@pytest.mark.parametrize("seconds", [1.0, 2.0, 3.3, 7.0])
def test_music_of_any_length(seconds):
    stage = build(coarse_config(pattern="delay"))
    batch = random_batch(seconds=8.0, batch=2)
    codes = generate_stage(stage, batch, seconds, Sampler(), seeds=[0, 1])
    assert codes.shape == (2, FIELDS[ACOUSTIC].frames(seconds), 2)


def test_a_sliding_window_goes_on_from_what_was_made():
    """What a later window is given of the past is what the one before drew, at the same moment of every field."""
    stage = build(coarse_config(pattern="delay"))
    seconds = 3.0
    batch = random_batch(seconds=seconds, batch=1)
    codes = generate_stage(stage, batch, seconds, Sampler(temperature=0), seeds=[0])
    cut = {**batch, SEMANTIC: batch[SEMANTIC][:, 10:30], ACOUSTIC: codes.new_zeros(1, 40, 4)}
    cut[ACOUSTIC][..., :2] = codes[:, 20:60]
    assert torch.equal(stage.logits(cut).argmax(-1)[:, 20:], codes[:, 40:60])


def test_scores_are_what_each_window_thinks_of_the_codes_it_drew():
    """Every code counts once; guidance changes what is drawn and not how it is judged."""
    stage = build(coarse_config(pattern="delay"))
    batch = random_batch(seconds=3.0, batch=2)
    scores = torch.zeros(2, dtype=torch.float64)
    codes = generate_stage(stage, batch, 3.0, Sampler(cfg=3.0, top_k=20), seeds=[0, 1], scores=scores)
    expected = torch.zeros(2)
    for start, new in ((0, 0), (20, 20)):  # windows of 2 s, half of the second one known
        cut = {
            **batch,
            SEMANTIC: batch[SEMANTIC][:, start // 2 : start // 2 + 20],
            ACOUSTIC: torch.zeros(2, 40, 4).long(),
        }
        cut[ACOUSTIC][..., :2] = codes[:, start : start + 40]
        found = stage.logits(cut).log_softmax(-1).gather(-1, cut[ACOUSTIC][..., :2, None])[..., 0]
        expected += found[:, new:].sum(dim=(1, 2))
    assert torch.allclose(scores.float(), expected, atol=1e-3)


def test_windows_cover_the_whole_on_the_grid():
    starts = window_starts(Fraction(10), Fraction(4), Fraction(2), Fraction(1, 25))
    assert starts == [0, 2, 4, 6]
    odd = window_starts(Fraction(5), Fraction(1), Fraction(1, 3), Fraction(1, 25))
    assert all((start * 25).denominator == 1 for start in odd)
    assert odd[-1] + 1 >= 5


def test_drawing_follows_the_distribution_and_its_options():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log().repeat(10_000, 1)
    uniform = torch.rand(10_000, generator=torch.Generator().manual_seed(0))
    shares = Sampler().draw(logits, uniform).bincount(minlength=4) / 10_000
    assert torch.allclose(shares, torch.tensor([0.1, 0.2, 0.3, 0.4]), atol=0.02)
    top = Sampler(top_k=2).draw(logits, uniform).bincount(minlength=4) / 10_000
    assert torch.allclose(top, torch.tensor([0, 0, 3 / 7, 4 / 7]), atol=0.02)
    nucleus = Sampler(top_p=0.65).draw(logits, uniform).bincount(minlength=4) / 10_000
    assert torch.allclose(nucleus, torch.tensor([0, 0, 3 / 7, 4 / 7]), atol=0.02)  # 0.4 does not reach 0.65; 0.7 does
    assert Sampler(top_p=1e-6).draw(logits, uniform).eq(3).all()
    assert Sampler(top_k=3, top_p=0.4).draw(logits, uniform).eq(3).all()  # of what top_k leaves, 0.4 / 0.9 is enough
    assert Sampler(temperature=0).draw(logits, uniform).eq(3).all()
    cold = Sampler(temperature=0.25).draw(logits, uniform).bincount(minlength=4) / 10_000
    assert cold[3] > 0.7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_is_the_same_in_a_batch_of_any_size(dtype):
    stage = build(coarse_config()).to(dtype)
    batch = random_batch(batch=8)
    sampler = Sampler(temperature=0.9, top_p=0.95, cfg=2.0)
    whole = generate_stage(stage, batch, 2.0, sampler, seeds=list(range(8)))
    for first, last in ((0, 1), (1, 3), (3, 8)):
        part = {name: codes[first:last] for name, codes in batch.items()}
        assert torch.equal(generate_stage(stage, part, 2.0, sampler, seeds=list(range(first, last))), whole[first:last])


def test_a_stage_can_be_trained_after_it_has_sampled():
    stage = build(fine_config(pattern="delay", window_seconds=1.7))
    batch = random_batch(seconds=1.7)
    generate_stage(stage, batch, 1.7, Sampler(), seeds=[0, 1, 2])
    stage(batch).mean().backward()


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_damaged_weights_are_named_and_not_sampled_from(temperature):
    stage = build(coarse_config())
    with torch.no_grad():
        stage.heads[1, 7] = float("nan")
    with pytest.raises(UserError, match="'acoustic' are not finite from step 1 of 80 on"):
        generate_window(stage, random_batch(), 40, Sampler(temperature=temperature), torch.rand(3, 40, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_a_hidden_state_is_the_same_bits_in_a_batch_of_any_size(dtype):
    """Rounding that depended on the batch would sooner or later draw another code, and then another piece."""
    stage = build(coarse_config(transformer={"dim": 256, "layers": 2, "heads": 4})).to(dtype)
    stage = prepacked(stage)
    found = set()
    for size in (1, 2, 3, 16, 33):
        batch = {name: codes[:1].expand(size, -1, -1) for name, codes in random_batch(batch=1).items()}
        embedded, rotary, _ = stage.embed(batch, None)
        steps = Decoder(stage.transformer, rotary, stage.new_cache(size, embedded.shape[1]))
        states = [steps.feed(part)[0] for part in (embedded[:, :30], *embedded[:, 30:40].split(1, dim=1))]
        found.add(tuple(torch.cat([linear(head)(state[None])[0] for state in states for head in stage.heads]).tolist()))
    assert len(found) == 1
