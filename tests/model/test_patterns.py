import pytest
from hypothesis import given
from hypothesis import strategies as st

from model.patterns import Pattern

patterns = st.builds(
    Pattern.of, st.sampled_from(["flat", "delay"]), frames=st.integers(1, 40), quantizers=st.integers(1, 8)
)


@given(patterns)
def test_every_code_lies_at_exactly_one_step(pattern):
    placed = [code for step in range(pattern.steps) for code in pattern.codes_at(step)]
    assert sorted(placed) == [(frame, q) for frame in range(pattern.frames) for q in range(pattern.quantizers)]


@given(patterns)
def test_the_slice_of_a_quantizer_names_the_steps_of_its_codes(pattern):
    for quantizer in range(pattern.quantizers):
        steps = range(pattern.steps)[pattern.steps_of(quantizer)]
        assert [(frame, quantizer) in pattern.codes_at(step) for frame, step in enumerate(steps)] == [True] * len(steps)
        assert len(steps) == pattern.frames


@given(patterns)
def test_no_code_comes_before_what_it_follows(pattern):
    step_of = {code: step for step in range(pattern.steps) for code in pattern.codes_at(step)}
    for (frame, quantizer), step in step_of.items():
        if frame:
            assert step_of[frame - 1, quantizer] < step
        if quantizer:
            assert step_of[frame, quantizer - 1] < step


@pytest.mark.parametrize(("kind", "steps"), [("flat", 30), ("delay", 12)])
def test_number_of_steps(kind, steps):
    assert Pattern.of(kind, frames=10, quantizers=3).steps == steps
