from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from model.fields import TokenField, common_period


def field(rate: float) -> TokenField:
    return TokenField("acoustic", rate, 8, 256)


def test_fields_of_different_rates_start_together_on_the_common_period():
    assert common_period([field(50), field(75)]) == Fraction(1, 25)
    assert common_period([field(25)]) == Fraction(1, 25)
    assert common_period([field(25), field(0.2)]) == 5


@given(st.lists(st.sampled_from([12.5, 25, 40, 50, 75, 86.1328125]), min_size=1, max_size=3))
def test_every_field_has_whole_frames_in_the_common_period(rates):
    period = common_period([field(rate) for rate in rates])
    assert all((period * field(rate).rate).denominator == 1 for rate in rates)


def test_a_field_survives_the_manifest():
    assert TokenField.from_json(field(12.5).to_json()) == field(12.5)


def test_frames_are_whole_and_exact():
    assert field(75).frames(0.04) == 3
    assert field(50).frames(1 / 3) == 16
