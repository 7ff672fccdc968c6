from __future__ import annotations

import io
import json
import re
import subprocess
import sys

import pytest
from helpers import ROOT, run_command
from rich.console import Console

import ds_configs
from launcher.plan import SEMANTIC_DIMS, Cluster, StagePlan, divisors, plan_stages, shard_bytes_a_second
from launcher.plan_memory import Memory, checkpoint_bytes, model_memory
from launcher.plan_tables import print_plan
from launcher.recipe import load_recipe
from model.errors import UserError
from trainer.config import TrainConfig

H100 = Cluster.of("h100", None, 0.4)
WIDE = "stage_defaults.model.transformer={dim: 4096, layers: 24, heads: 32}"
"""About five billion parameters a stage."""


def shown(name: str, *overrides: str, width: int = 80, cluster: Cluster = H100) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_plan(load_recipe(name, overrides), cluster, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def coarse(*overrides: str, gpu: str = "h100", gpus: int | None = None, name: str = "musiclm_large") -> StagePlan:
    return plan_stages(load_recipe(name, overrides), Cluster.of(gpu, gpus, 0.4))[1]


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
    plans = plan_stages(recipe, H100)
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
    assert all(plan.choice(plan.train.zero).fits for plan in plans)


def test_flops_and_times_follow_from_parameters_tokens_and_steps() -> None:
    plan = plan_stages(load_recipe("musiclm_large"), H100)[0]
    # Six FLOPs a parameter and position is the usual rule; the rest is attention, and the table of embeddings is not
    # multiplied.
    multiplied = plan.count.parameters - plan.count.embedding_parameters
    assert plan.step_flops / (6 * multiplied * plan.count.positions * 256) == pytest.approx(1.1, abs=0.1)
    assert plan.seconds(1e12) == pytest.approx(plan.flops / 8e12)
    assert plan.windows == 200_000 * 256
    assert plan.tokens_per_step == 256 * 1_500
    assert plan.flops_per_token * plan.tokens_per_step == pytest.approx(plan.step_flops)


def test_days_are_flops_over_gpus_times_mfu_times_peak() -> None:
    recipe = load_recipe("musiclm_small")
    for gpus, mfu, gpu, peak in [(1, 0.5, "a100", 312e12), (256, 0.25, "h100-pcie", 756e12)]:
        plan = plan_stages(recipe, Cluster.of(gpu, gpus, mfu))[2]
        assert plan.gpu_seconds == pytest.approx(100_000 * plan.step_flops / (gpus * mfu * peak))
    recipe = load_recipe("musiclm_small", ["stage_defaults.train.precision=fp32"])
    plan = plan_stages(recipe, Cluster.of("v100", 1, 0.5))[2]
    assert plan.gpu_seconds == pytest.approx(plan.flops / (0.5 * 15.7e12))


def memory(zero: str, ranks: int = 8, accumulation: int = 1, **changes: object) -> Memory:
    """Of a billion parameters."""
    train = TrainConfig(ranks=ranks, global_batch=ranks, zero=zero, **changes)  # type: ignore[arg-type]
    return model_memory(10**9, train, ds_configs.read(zero)["zero_optimization"], ranks, accumulation)


def test_zero_stages_share_more_and_more() -> None:
    none, first, second, third = (memory(f"zero{stage}", accumulation=2) for stage in range(4))
    assert (none.weights, none.gradients, none.optimizer) == (2e9, 6e9, 12e9)
    assert (first.weights, first.gradients, first.optimizer) == (2e9, 2.25e9, 1.5e9)
    assert (second.weights, second.gradients, second.optimizer) == (2e9, 0.75e9, 1.5e9)
    assert (third.weights, third.gradients, third.optimizer) == (0.25e9, 0.75e9, 1.5e9)
    # Whole gradients are kept only on the way from one micro batch to the next.
    assert memory("zero1").gradients == second.gradients
    assert all(memory(f"zero{stage}", ranks=1).states == none.states for stage in range(4))


def test_fp32_without_zero_has_no_second_copy_of_the_weights() -> None:
    assert memory("zero0", precision="fp32").states == 16e9
    assert memory("zero2", precision="fp32").optimizer == 12e9 / 8


def test_an_average_of_the_weights_takes_four_bytes_more() -> None:
    for zero in ("zero0", "zero3"):
        more = memory(zero, ema_decay=0.999).optimizer - memory(zero).optimizer
        assert more == (4e9 if zero == "zero0" else 0.5e9)
    assert memory("zero2_offload", ema_decay=0.999).host - memory("zero2_offload").host == 0.5e9
    assert (checkpoint_bytes(TrainConfig()), checkpoint_bytes(TrainConfig(ema_decay=0.999))) == (12, 16)


def test_what_is_offloaded_leaves_the_gpu() -> None:
    second, third, nvme = memory("zero2_offload"), memory("zero3_offload"), memory("zero3_nvme")
    assert (second.weights, second.gradients, second.optimizer) == (2e9, 0, 0)
    assert third.states == nvme.states == 0
    # Optimizer states, gradients in bf16 and fp32, and of zero3_offload the weights too.
    assert (second.host, third.host) == (18e9 / 8, 20e9 / 8)
    assert memory("zero2_offload", accumulation=2).host == second.host + 2e9 / 8
    assert nvme.nvme == 18e9 / 8
    assert second.nvme == third.nvme == 0


@pytest.mark.parametrize("gpus", [1, 2, 8, 64, 512, 4096])
def test_any_number_of_gpus_that_divides_the_batch_has_a_plan(gpus: int) -> None:
    overrides = ["stage_defaults.train.global_batch=4096", "stage_defaults.train.micro_batch=8"]
    plan = coarse(*overrides, gpus=gpus)
    assert plan.micro_batch == min(8, 4096 // gpus)
    assert plan.accumulation * plan.micro_batch * gpus == 4096
    assert [choice.name for choice in plan.choices] == [
        "zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme",
    ]  # fmt: skip
    assert set(ds_configs.names()) == {choice.name for choice in plan.choices}


def test_a_batch_that_the_gpus_do_not_divide_says_which_numbers_do() -> None:
    numbers = "these numbers can: 1, 2, 4, 8, 16, 32, 64, 128, 256."
    with pytest.raises(UserError, match=rf"{numbers}\nOr set stage_defaults.train.global_batch to a multiple of 48"):
        coarse(gpus=48)
    six = ["stages.coarse.train.global_batch=6", "stages.coarse.train.micro_batch=1", "stages.coarse.train.ranks=2"]
    with pytest.raises(
        UserError, match=r"the 6 windows of a step of coarse .* 1, 2, 3, 6.\nOr set stages.coarse.train"
    ):
        coarse(*six, gpus=4)


def test_divisors_are_all_of_them_in_order() -> None:
    assert (divisors(1), divisors(36)) == ([1], [1, 2, 3, 4, 6, 9, 12, 18, 36])


def test_the_choice_with_the_least_traffic_that_fits_is_advised() -> None:
    def advised(*overrides: str, gpu: str = "h100", gpus: int | None = 8) -> tuple[str, int]:
        advice = coarse(*overrides, gpu=gpu, gpus=gpus).advice
        assert advice.choice is not None
        assert advice.choice.fits
        return advice.choice.name, advice.micro_batch

    assert advised() == ("zero1", 8)
    assert advised(gpus=1) == ("zero0", 8)
    # 5 billion parameters with whole gradients between the micro batches of a rank: too much for ZeRO-1.
    wide = [WIDE, "stage_defaults.train.micro_batch=4"]
    assert advised(*wide, gpu="h200") == ("zero1", 4)
    assert advised(*wide) == ("zero2", 4)
    # Rather smaller micro batches than the host's memory.
    assert advised(WIDE, "stage_defaults.train.micro_batch=16") == ("zero2", 4)
    assert advised(WIDE, gpu="rtx-4090", gpus=1) == ("zero2_offload", 1)


def test_recomputation_leaves_fewer_activations() -> None:
    none, selective, block = (
        coarse(f"stage_defaults.train.recompute={name}").choice("zero1").memory.activations
        for name in ("none", "selective", "block")
    )
    assert none > 1.5 * selective > 7 * block


def test_a_plan_says_what_to_change_in_the_recipe() -> None:
    cluster = Cluster.of("a100-40gb", 4, 0.4)
    text = shown("musiclm_large", "stages.coarse.train.micro_batch=32", width=200, cluster=cluster)
    assert "coarse on each of 4 GPUs, 8 windows at a time (32 do not fit)" in text
    wanted = ["stages.coarse.train.ranks=4", "stages.coarse.train.zero=zero1", "stages.coarse.train.micro_batch=8"]
    assert " ".join(wanted) in text
    assert "stages.coarse.train." not in shown("musiclm_large", *wanted, width=200, cluster=cluster)


def test_an_automatic_micro_batch_is_planned_as_the_largest_that_fits() -> None:
    cluster = Cluster.of("a100-40gb", 4, 0.4)
    text = shown("musiclm_large", "stages.coarse.train.micro_batch=auto", width=200, cluster=cluster)
    assert "coarse on each of 4 GPUs, 8 windows at a time" in text
    assert "do not fit" not in text
    assert "stages.coarse.train.micro_batch" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("h10", None, 0.4), "no GPU 'h10' in the table. Did you mean h100?"),
        (("h100", 0, 0.4), "--gpus is 0: name 1 or more."),
        (("h100", 8, 40), "--mfu is 40: name a share of the peak above 0 and at most 1"),
    ],
)
def test_a_cluster_that_makes_no_sense_is_a_plain_error(arguments, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        Cluster.of(*arguments)


def test_a_gpu_without_the_precision_is_a_plain_error() -> None:
    with pytest.raises(UserError, match=r"--gpu V100 has no bf16: set stage_defaults.train.precision=fp32"):
        coarse(gpu="v100")


def test_programs_read_the_same_figures() -> None:
    done = run_command(["launcher", "plan", "musiclm_large", "--gpus", "16", "--gpu", "h200", "--mfu", "0.5", "--json"])
    assert done.returncode == 0, done.stderr
    found, plan = json.loads(done.stdout), coarse(gpu="h200", gpus=16)
    stage = found["stages"]["coarse"]
    assert (found["gpu"]["name"], found["mfu"], stage["gpus"]) == ("H200", 0.5, 16)
    assert stage["parameters"] == plan.count.parameters
    assert stage["days"] == pytest.approx(plan.flops / (16 * 0.5 * 989e12) / 86_400)
    assert stage["choices"]["zero1"]["total"] == plan.choice("zero1").memory.total
    assert stage["recommended"]["zero"] == "zero1"


def test_where_nothing_fits_the_plan_says_so() -> None:
    giant = "stage_defaults.model.transformer={dim: 8192, layers: 48, heads: 64}"
    cluster = Cluster.of("l4", 1, 0.4)
    text = shown("musiclm_large", giant, width=200, cluster=cluster)
    assert "coarse: nothing fits: zero3_" in text
    assert "→" not in text
    assert coarse(giant, gpu="l4", gpus=1).as_json()["recommended"]["zero"] is None


def test_an_own_deepspeed_file_is_a_choice_too(tmp_path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": 1e8, "reduce_bucket_size": 1e6}}')
    plan = coarse(f"stage_defaults.train.zero={file}")
    (mine,) = (choice for choice in plan.choices if choice.name == str(file))
    assert mine.memory.buffers == 2 * (1e8 + 1e6)
    assert "mine.json" in shown("musiclm_large", f"stage_defaults.train.zero={file}")


def test_shards_hold_two_bytes_a_code() -> None:
    # 25 semantic and 25 × 8 acoustic codes a second, and 16 of the one embedding of a clip of 5 s.
    assert shard_bytes_a_second(load_recipe("quickstart")) == 2 * (25 + 200 + 16 / 5)
    # Embeddings of 10 s every second of a clip of 30 s: 21 of 12 codes.
    assert shard_bytes_a_second(load_recipe("musiclm_small")) == 2 * (50 + 600 + 21 * 12 / 30)


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
