from __future__ import annotations

import io
import subprocess
import sys

import pytest
from helpers import ROOT
from rich.console import Console

from launcher.plan import SEMANTIC_DIMS, notes, plan_stages, print_plan, shard_bytes_a_second, stage_memory
from launcher.recipe import load_recipe
from trainer.config import TrainConfig


def shown(name: str, *overrides: str, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_plan(load_recipe(name, overrides), console)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["quickstart", "musiclm_small", "musiclm_large"])
def test_a_plan_fits_80_columns_and_cuts_nothing(name: str) -> None:
    text = shown(name)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for stage in (
        "corpus",
        "codec",
        "embedding",
        "quantizers",
        "tokens",
        "semantic",
        "coarse",
        "fine",
        "bundle",
        "samples",
    ):
        assert f"\n {stage} " in text


@pytest.mark.parametrize(
    ("name", "shape", "windows", "positions"),
    [
        ("musiclm_small", (1024, 6, 8), (10, 4, 2), [(12, 500), (12 + 200, 900), (12 + 450, 750)]),
        ("musiclm_large", (1024, 24, 16), (30, 10, 3), [(12, 1500), (12 + 500, 2250), (12 + 675, 1125)]),
    ],
)
def test_musiclm_recipes_have_the_published_shapes(
    name: str, shape: tuple[int, ...], windows: tuple[int, ...], positions: list[tuple[int, int]]
) -> None:
    recipe = load_recipe(name)
    plans = plan_stages(recipe)
    for plan in plans:
        transformer = plan.config.model.transformer
        assert (transformer.dim, transformer.layers, transformer.heads) == shape
    assert tuple(plan.config.model.window_seconds for plan in plans) == windows
    assert [(plan.count.prefix, plan.count.steps) for plan in plans] == positions
    conditioning, codec, semantic = recipe.quantizers.conditioning, recipe.encoders.codec, recipe.encoders.semantic
    assert (conditioning.levels, conditioning.codebook_size) == (12, 1024)
    assert (codec.kind, codec.sample_rate, codec.quantizers, codec.codebook_size) == ("encodec", 24_000, 8, 1024)
    assert (semantic.kind, semantic.layer, semantic.frame_rate, semantic.sample_rate) == ("mert", 7, 50, 16_000)
    assert recipe.quantizers.semantic.codebook_size == 1024
    assert (plans[1].config.model.last, plans[2].config.model.first) == (3, 3)
    assert not list(notes(recipe, plans))


def test_flops_and_times_follow_from_parameters_tokens_and_steps() -> None:
    plan = plan_stages(load_recipe("musiclm_large"))[0]
    # Six FLOPs a parameter and position is the usual rule; the rest is attention, and the table of embeddings is not
    # multiplied.
    multiplied = plan.count.parameters - plan.count.embedding_parameters
    assert plan.step_flops / (6 * multiplied * plan.count.positions * 256) == pytest.approx(1.1, abs=0.1)
    assert plan.seconds(1e12) == pytest.approx(plan.flops / 8e12)
    assert plan.windows == 200_000 * 256


def test_zero_stages_share_more_and_more() -> None:
    def memory(zero: str, ranks: int = 8):
        return stage_memory(10**9, 0, TrainConfig(ranks=ranks, global_batch=8, zero=zero))

    none, first, second, third = (memory(f"zero{stage}") for stage in range(4))
    assert (none.weights, none.optimizer) == (2e9, 12e9)
    assert (first.weights, first.optimizer) == (2e9, 1.5e9)
    assert second.gradients == pytest.approx(first.gradients - 2e9 * 7 / 8)
    assert third.optimizer == second.optimizer
    assert none.total > first.total > second.total
    assert memory("zero2", ranks=1).gradients == none.gradients


def test_shards_hold_two_bytes_a_code() -> None:
    # 25 semantic and 25 × 8 acoustic codes a second, and 16 of the one embedding of a clip of 5 s.
    assert shard_bytes_a_second(load_recipe("quickstart")) == 2 * (25 + 200 + 16 / 5)
    # Embeddings of 10 s every second of a clip of 30 s: 21 of 12 codes.
    assert shard_bytes_a_second(load_recipe("musiclm_small")) == 2 * (50 + 600 + 21 * 12 / 30)


def test_a_plan_points_out_what_will_not_fit() -> None:
    text = shown("musiclm_large", "stages.coarse.train.micro_batch=32", width=200)
    assert "Note: coarse needs" in text
    assert "stages.coarse.train.micro_batch" in text


def test_own_audio_is_named_and_its_brackets_kept(tmp_path) -> None:
    folder = tmp_path / "my [live] takes"
    folder.mkdir()
    text = shown("quickstart", f"data.audio={folder}", width=200)
    assert "my [live] takes" in text
    assert "for this corpus" not in text  # nobody has counted its hours yet


def test_centroids_have_the_width_of_the_encoders_features() -> None:
    from model.encoders.chroma import MelChroma

    assert SEMANTIC_DIMS["mel_chroma"] == MelChroma.dim


def test_what_the_command_line_shows_waits_neither_for_torch_nor_for_pictures() -> None:
    modules = "launcher.plan, launcher.status, launcher.inspect, launcher.report"
    code = f"import sys, {modules}; print({{'torch', 'matplotlib', 'jinja2', 'deepspeed'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
