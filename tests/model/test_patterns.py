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


@given(patterns, st.randoms(use_true_random=False))
def test_codes_laid_out_and_read_back_are_the_codes(pattern, random):
    """What training slices out of the steps is what sampling finds step by step."""
    codes = [[random.randrange(1024) for _ in range(pattern.quantizers)] for _ in range(pattern.frames)]
    steps = [[None] * pattern.quantizers for _ in range(pattern.steps)]
    for quantizer in range(pattern.quantizers):
        for frame, step in enumerate(steps[pattern.steps_of(quantizer)]):
            step[quantizer] = codes[frame][quantizer]
    read = [[None] * pattern.quantizers for _ in range(pattern.frames)]
    for at, step in enumerate(steps):
        for frame, quantizer in pattern.codes_at(at):
            read[frame][quantizer] = step[quantizer]
    assert read == codes
    assert sum(code is not None for step in steps for code in step) == pattern.frames * pattern.quantizers


@given(patterns)
def test_a_step_lies_at_the_moment_of_the_first_code_it_predicts(pattern):
    for step in range(pattern.steps):
        frames = [frame for frame, _ in pattern.codes_at(step)]
        assert pattern.frame_of(step) == max(frames)
        assert max(frames) <= pattern.time_of(step) or max(frames) == pattern.frames - 1


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
