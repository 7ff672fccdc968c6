"""What training withholds is drawn by a number of each window alone, as often as the recipe says."""

from __future__ import annotations

import hashlib

import pytest
import torch
from helpers import coarse_config
from torch import Tensor

from model.dropping import Dropped, draw_dropped
from model.fields import CONDITIONING

FRAMES, QUANTIZERS = 10, 2


def config(everything=0.2, conditioning=0.5, masking=0.6):
    """Of the two conditions the first, the conditioning, is also dropped alone."""
    plain = coarse_config(condition_dropout=everything, forgetful_masking=masking)
    alone = {CONDITIONING: conditioning}
    conditions = [part.model_copy(update={"dropout": alone.get(part.field, 0.0)}) for part in plain.conditions]
    return plain.model_copy(update={"conditions": conditions})


def draws(count: int, first: int = 0) -> Tensor:
    """Numbers of 63 bits, as digests of clip ids are."""
    digests = [hashlib.blake2b(b"%d" % number, digest_size=8).digest() for number in range(first, first + count)]
    return torch.tensor([int.from_bytes(digest, "little") >> 1 for digest in digests])


def drawn(draws_B: Tensor, frames: int = FRAMES, **settings) -> Dropped:
    return draw_dropped(config(**settings), draws_B, frames, QUANTIZERS)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack([a.flatten().double(), b.flatten().double()]))[0, 1].item()


def test_what_is_dropped_follows_the_recipe():
    dropped = drawn(draws(4000))
    conditioning, semantic = dropped.conditions_BN.float().mean(0).tolist()
    assert conditioning == pytest.approx(0.2 + 0.8 * 0.5, abs=0.03)
    assert semantic == pytest.approx(0.2, abs=0.03)
    shares = dropped.codes_BTQ.float().mean(dim=(1, 2))
    assert shares.mean().item() == pytest.approx(0.3, abs=0.02)
    assert shares.max() <= 0.95
    assert shares.std() > 0.15  # each window has a share of its own
    # Whichever condition loses a window alone, all of them lose it together.
    assert dropped.conditions_BN[:, 0][dropped.conditions_BN[:, 1]].all()


def test_nothing_is_dropped_that_the_recipe_keeps():
    dropped = drawn(draws(500), everything=0.0, conditioning=0.0, masking=0.0)
    assert not dropped.conditions_BN.any()
    assert dropped.codes_BTQ is None


def test_every_place_is_forgotten_alike_and_for_itself():
    codes = drawn(draws(4000), masking=0.5).codes_BTQ.double()
    assert (codes.mean(0) - 0.25).abs().max() < 0.035  # five standard errors
    # With the share of the window taken out, neighbours in time, quantizer and batch know nothing of each other.
    rest = codes - codes.mean(dim=(1, 2), keepdim=True)
    expected = -1 / (FRAMES * QUANTIZERS - 1)  # of places whose sum is fixed
    assert correlation(rest[:, 1:], rest[:, :-1]) == pytest.approx(expected, abs=0.02)
    assert correlation(rest[..., 1], rest[..., 0]) == pytest.approx(expected, abs=0.02)
    assert correlation(rest[1:], rest[:-1]) == pytest.approx(0, abs=0.02)


def test_numbers_that_follow_each_other_draw_independently():
    dropped = drawn(torch.arange(4000), everything=0.5, conditioning=0.0)
    everything = dropped.conditions_BN[:, 1]
    assert everything.double().mean().item() == pytest.approx(0.5, abs=0.04)
    assert abs(correlation(everything[1:], everything[:-1])) < 0.06
    shares = dropped.codes_BTQ.double().mean(dim=(1, 2))
    assert abs(correlation(shares[1:], shares[:-1])) < 0.06
    assert abs(correlation(shares, everything)) < 0.06


def test_a_window_draws_alike_in_any_batch_and_at_any_length():
    many = draws(6)
    together = drawn(many)
    assert len({tuple(row.flatten().tolist()) for row in together.codes_BTQ}) == 6
    for number in range(6):
        alone = drawn(many[number : number + 1], frames=4)
        assert torch.equal(alone.conditions_BN[0], together.conditions_BN[number])
        assert torch.equal(alone.codes_BTQ[0], together.codes_BTQ[number, :4])


def test_draws_are_the_same_on_every_machine():
    dropped = drawn(torch.tensor([0, 1, 2**63 - 1, 2**62]), frames=3)
    text = str((dropped.conditions_BN.int().tolist(), dropped.codes_BTQ.int().tolist()))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "709b41a9e074385e"
