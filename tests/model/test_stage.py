import math

import pytest
import torch
from helpers import FIELDS, coarse_config, fine_config, quantizers, random_batch

from model.config import ConditionConfig
from model.dropping import Dropped
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC
from model.stage import build_stage


def build(config, seed=0):
    torch.manual_seed(seed)
    return build_stage(config, FIELDS, quantizers()).eval()


VARIANTS = [
    pytest.param({"pattern": pattern, "positions": positions}, id=f"{pattern}-{positions}")
    for pattern in ("flat", "delay")
    for positions in ("time", "index")
]


@pytest.mark.parametrize("settings", VARIANTS)
@pytest.mark.parametrize("make", [coarse_config, fine_config])
def test_the_first_loss_is_that_of_a_guess(make, settings):
    config = make(**settings)
    stage = build(config)
    losses = stage(random_batch(batch=8))
    assert losses.shape == (2,)
    for loss in losses.tolist():
        assert loss == pytest.approx(math.log(FIELDS[ACOUSTIC].codebook_size), rel=0.05)


def test_the_first_loss_of_a_semantic_stage():
    condition = ConditionConfig(field=CONDITIONING, paths=["summed"])
    stage = build(coarse_config(field=SEMANTIC, last=None, conditions=[condition]))
    assert stage(random_batch(batch=8)).mean().item() == pytest.approx(math.log(64), rel=0.05)


@pytest.mark.parametrize("make", [coarse_config, fine_config])
def test_no_two_tokens_share_an_embedding_row(make):
    """Every (field, quantizer, code), the start and each condition's absence: one row each, and no row unused."""
    stage = build(make())
    owners: dict[int, str] = {0: "start"}

    def claim(row: int, owner: str) -> None:
        assert owners.setdefault(row, owner) == owner, f"{owner} shares row {row} with {owners[row]}"

    for quantizer, offset in zip(stage.quantizers, stage.offsets, strict=True):
        for code in range(stage.target.codebook_size):
            claim(offset + code, f"{stage.target.name}/{quantizer}/{code}")
    for number, condition in enumerate(stage.conditions):
        claim(condition.null_id, f"no condition {number}")
        for quantizer, offset in zip(condition.quantizers, condition.offsets, strict=True):
            for code in range(condition.field.codebook_size):
                claim(offset + code, f"{condition.field.name}/{quantizer}/{code}")
    assert sorted(owners) == list(range(stage.embedding.num_embeddings))


@pytest.mark.parametrize("settings", VARIANTS)
def test_no_logit_sees_its_own_code_or_a_later_one(settings):
    stage = build(coarse_config(**settings))
    batch = random_batch(batch=1)
    before = stage.logits(batch)
    changed = {**batch, ACOUSTIC: batch[ACOUSTIC].clone()}
    frame = 17
    changed[ACOUSTIC][:, frame:] = (changed[ACOUSTIC][:, frame:] + 1) % 256
    after = stage.logits(changed)
    assert torch.equal(before[:, : frame + 1, 0], after[:, : frame + 1, 0])
    assert torch.equal(before[:, :frame], after[:, :frame])
    assert not torch.equal(before[:, frame + 1 :], after[:, frame + 1 :])


@pytest.mark.parametrize("field", [CONDITIONING, SEMANTIC])
@pytest.mark.parametrize("path", ["prefix", "aligned", "summed"])
def test_every_path_brings_its_condition_in(field, path):
    stage = build(coarse_config(conditions=[ConditionConfig(field=field, paths=[path])]))
    for parameter in stage.parameters():  # at its first step the summed path is nearly silent
        torch.nn.init.normal_(parameter, std=0.1)
    batch = random_batch()
    other = {**batch, field: (batch[field] + 1) % FIELDS[field].codebook_size}
    assert not torch.allclose(stage.logits(batch), stage.logits(other), atol=1e-3)


def test_an_aligned_condition_reaches_only_its_own_moment_and_later():
    stage = build(coarse_config(pattern="delay", conditions=[ConditionConfig(field=SEMANTIC, paths=["aligned"])]))
    batch = random_batch(batch=1)
    other = {**batch, SEMANTIC: batch[SEMANTIC].clone()}
    other[SEMANTIC][:, 12] = (other[SEMANTIC][:, 12] + 1) % 64
    same = (stage.logits(batch) == stage.logits(other)).all(dim=-1)[0, :, 0]
    assert same.tolist() == [True] * 24 + [False] * 16  # semantic frame 12 sounds with acoustic frames 24 and 25


def test_a_dropped_condition_says_nothing():
    stage = build(coarse_config())
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    batch = random_batch(batch=2)
    dropped = torch.tensor([[True, True], [False, False]])
    other = {name: codes if name == ACOUSTIC else codes.flip(1) for name, codes in batch.items()}
    one, two = stage.logits(batch, Dropped(dropped)), stage.logits(other, Dropped(dropped))
    assert torch.equal(one[0], two[0])
    assert not torch.allclose(one[1], two[1])


def test_a_conditions_place_does_not_move_with_the_window():
    """Positions by time: a prefix token keeps its distance to the sound it describes, however long the window is."""
    stage = build(coarse_config(positions="time"))
    condition = stage.conditions[1]
    short, long = condition.positions(10, stage.target), condition.positions(20, stage.target)
    assert long[:10] == short
    own = [stage.pattern(20).time_of(step) for step in (0, 2, 4)]
    assert short[:3] == [0, 2, 4]  # at 10 Hz, in frames of 20 Hz
    assert own == [0, 1, 2]


def test_the_loss_is_that_of_the_logits():
    stage = build(coarse_config(pattern="delay"))
    batch = random_batch()
    logits = stage.logits(batch)
    by_hand = [
        torch.nn.functional.cross_entropy(logits[:, :, q].flatten(0, 1), batch[ACOUSTIC][..., q].flatten())
        for q in range(2)
    ]
    assert torch.allclose(stage(batch), torch.stack(by_hand), atol=1e-5)


def test_grouped_query_attention_and_norms_are_options():
    transformer = {"dim": 64, "layers": 1, "heads": 4, "kv_heads": 2, "qk_norm": False}
    stage = build(coarse_config(transformer=transformer))
    assert stage.logits(random_batch()).shape == (3, 40, 2, 256)
    assert not any("q_norm" in name for name, _ in stage.named_parameters())
