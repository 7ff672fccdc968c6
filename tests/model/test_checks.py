"""What does not fit a stage is refused with the field and the numbers."""

from __future__ import annotations

import pytest
import torch
from helpers import FIELDS, coarse_config, quantizers, random_batch

from model.config import ConditionConfig
from model.errors import UserError
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC
from model.sampling import Sampler, generate_stage, generate_window
from model.stage import build_stage


@pytest.fixture(scope="module")
def stage():
    torch.manual_seed(0)
    return build_stage(coarse_config(), FIELDS, quantizers())


def refused(stage, batch, message):
    with pytest.raises(UserError, match=message):
        stage(batch)


@pytest.mark.parametrize(("field", "code", "codes"), [(ACOUSTIC, 256, 255), (SEMANTIC, -1, 63), (CONDITIONING, 16, 15)])
def test_codes_outside_their_codebook(stage, field, code, codes):
    batch = random_batch()
    batch[field][0, 0, 0] = code
    refused(stage, batch, f"field '{field}' holds codes from .*{code}.*codebook has 0 to {codes}")


def test_a_window_longer_than_the_stage_was_made_for(stage):
    message = "60 frames of field 'acoustic' was given; the stage was made for 1 to 40 .window_seconds=2 at 20 Hz"
    refused(stage, random_batch(seconds=3.0), message)
    with pytest.raises(UserError, match=message):
        generate_window(stage, random_batch(seconds=3.0), 60, Sampler(), torch.rand(3, 60, 2))


def test_fields_of_another_rate_or_time(stage):
    batch = random_batch()
    batch[SEMANTIC] = batch[SEMANTIC][:, :10]
    refused(stage, batch, "'semantic' has 10 frames at 10 Hz beside 40 frames of 'acoustic' at 20 Hz, which take 20")
    batch[SEMANTIC] = random_batch(seconds=6.0)[SEMANTIC]
    refused(stage, batch, "'semantic' has 60 frames at 10 Hz beside 40")


def test_a_field_that_is_missing(stage):
    batch = random_batch()
    del batch[SEMANTIC]
    refused(stage, batch, "field 'semantic' is missing.*given conditioning, acoustic")
    with pytest.raises(UserError, match="field 'semantic' is missing"):
        generate_stage(stage, batch, 2.0, Sampler(), seeds=[0, 1, 2])


def test_a_field_with_other_quantizers(stage):
    batch = random_batch()
    batch[ACOUSTIC] = batch[ACOUSTIC][..., :3]
    refused(stage, batch, r"'acoustic' have shape \[3, 40, 3\]; \[batch, frames, 4\] was expected")


def test_quantizers_and_fields_that_are_not_there():
    with pytest.raises(UserError, match="quantizers 0 up to 5 of field 'acoustic' were asked for, which has 4"):
        build_stage(coarse_config(last=5), FIELDS, quantizers())
    with pytest.raises(UserError, match="quantizers 4 up to 4 of field 'acoustic'"):
        build_stage(coarse_config(first=4, last=None), FIELDS, quantizers())
    known = {name: field for name, field in FIELDS.items() if name != SEMANTIC}
    with pytest.raises(UserError, match="no field 'semantic': the tokens hold conditioning, acoustic"):
        build_stage(coarse_config(), known, quantizers())
    one = [ConditionConfig(field=CONDITIONING, last=9)]
    with pytest.raises(UserError, match="quantizers 0 up to 9 of field 'conditioning' were asked for, which has 4"):
        build_stage(coarse_config(conditions=one), FIELDS, quantizers())
