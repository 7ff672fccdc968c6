"""What a DeepSpeed file may say, and what the recipe fills in."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import ds_configs
from ds_configs.schema import REFUSED, Aio, Bf16, DeepSpeedFile, OffloadOptimizer, OffloadParam, ZeroOptimization
from model.errors import UserError
from trainer.config import TrainConfig
from trainer.deepspeed_settings import check_deepspeed, check_precision, deepspeed_config

ZERO = {"stage": 2}


def write(folder, settings=None, **sections):
    """A DeepSpeed file with these sections, or with this text."""
    path = folder / "mine.json"
    path.write_text(settings if settings is not None else json.dumps({"zero_optimization": ZERO, **sections}))
    return str(path)


def config(zero="zero2", **changes):
    return TrainConfig(**{"zero": zero, "global_batch": 16, "ranks": 2, **changes})


def test_the_recipe_fills_in_what_it_decides(tmp_path):
    zero = write(tmp_path, zero_optimization={**ZERO, "reduce_bucket_size": 5e6, "allgather_bucket_size": "auto"})
    settings = deepspeed_config(config(zero, micro_batch=2), world_size=4)
    assert settings["zero_optimization"] == {"stage": 2, "reduce_bucket_size": 5_000_000}
    assert settings["train_batch_size"] == 16
    assert settings["train_micro_batch_size_per_gpu"] == 2
    assert settings["gradient_accumulation_steps"] == 2
    assert settings["bf16"]["enabled"]
    assert not deepspeed_config(config(precision="fp32"), 2)["bf16"]["enabled"]


def test_a_file_may_repeat_what_the_recipe_says_or_leave_it_open(tmp_path):
    zero = write(
        tmp_path,
        train_batch_size=16,
        train_micro_batch_size_per_gpu="auto",
        gradient_clipping=1.0,
        steps_per_print=10,
        bf16={"enabled": "auto"},
        fp16={"enabled": False, "loss_scale": 0},
        wall_clock_breakdown=False,
        zero_allow_untested_optimizer=True,
    )
    assert deepspeed_config(config(zero), 2)["train_micro_batch_size_per_gpu"] == 8


@pytest.mark.parametrize(
    ("sections", "changes", "words"),
    [
        ({"train_batch_size": 32}, {}, ["train_batch_size is 32", "says 16", "train.global_batch"]),
        ({"train_micro_batch_size_per_gpu": 8}, {"micro_batch": "auto"}, ["size_per_gpu is 8", "says auto"]),
        ({"train_micro_batch_size_per_gpu": 4}, {}, ["train_micro_batch_size_per_gpu is 4", "8", "train.micro_batch"]),
        ({"gradient_accumulation_steps": 4}, {}, ["gradient_accumulation_steps is 4", "1", "train.micro_batch"]),
        ({"gradient_clipping": 0.5}, {}, ["gradient_clipping is 0.5", "1.0", "train.clip"]),
        ({"steps_per_print": 7}, {}, ["steps_per_print is 7", "10", "train.log_every"]),
        ({"bf16": {"enabled": False}}, {}, ["bf16.enabled is false", "true", "train.precision"]),
        ({"bf16": {"enabled": True}}, {"precision": "fp32"}, ["bf16.enabled is true", "false", "train.precision"]),
    ],
)
def test_a_file_that_contradicts_the_recipe_is_refused(sections, changes, words, tmp_path):
    zero = write(tmp_path, **sections)
    with pytest.raises(UserError) as refused:
        deepspeed_config(config(zero, **changes), 2)
    for word in [zero, *words]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"gradient_cliping": 1.0}, ["gradient_cliping", "Did you mean gradient_clipping?"]),
        ({"zero_optimization": {"stge": 1}}, ["zero_optimization.stge", "Did you mean stage?"]),
        (
            {"zero_optimization": {**ZERO, "offload_optimizer": {"devise": "cpu"}}},
            ["zero_optimization.offload_optimizer.devise", "Did you mean device?"],
        ),
        ({"aio": {"thread_count": 1}}, ["aio.thread_count", "intra_op_parallelism"]),
        ({"aio": {"queue_depth": "deep"}}, ["aio.queue_depth is 'deep'"]),
        ({"zero_optimization": {"stage": 4}}, ["zero_optimization.stage is 4", "0, 1, 2 or 3"]),
        ({"zero_optimization": {}}, ["zero_optimization.stage is missing"]),
        ({"zero_optimization": True}, ["zero_optimization is True"]),
        ({"zero_optimization": {**ZERO, "offload_param": {"device": "cpu"}}}, ["offload_param needs stage 3"]),
        ({"zero_optimization": {**ZERO, "offload_optimizer": {"device": "nvme"}}}, ["nvme needs stage 3"]),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}, "zero_hpz_partition_size": 2}},
            ["do not go together"],
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            ["offload_optimizer needs stage 1"],
        ),
        ({"optimizer": {"type": "Adam"}}, ["optimizer: Stretto", "train.learning_rate"]),
        ({"scheduler": {"type": "WarmupLR"}}, ["scheduler: Stretto", "train.schedule"]),
        ({"fp16": {"enabled": True}}, ["fp16: Stretto", "train.precision"]),
        ({"activation_checkpointing": {"cpu_checkpointing": True}}, ["activation_checkpointing", "train.recompute"]),
        ({"zero_optimization": {**ZERO, "zenflow": {"topk_ratio": 0.1}}}, ["zero_optimization.zenflow"]),
    ],
)
def test_a_key_that_is_unknown_wrong_or_not_for_a_file_is_named(sections, words, tmp_path):
    zero = write(tmp_path, **sections)
    with pytest.raises(UserError) as refused:
        ds_configs.read(zero)
    for word in [zero, *words]:
        assert word in str(refused.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"zero_optimization": {"stage": 1, "stage": 2}}', "stage is there twice"),
        ("{", "does not read as JSON"),
        ("[]", "it must be an object"),
    ],
)
def test_what_is_not_one_clear_object_is_refused(text, words, tmp_path):
    with pytest.raises(UserError, match=words):
        ds_configs.read(write(tmp_path, text))


def test_a_batch_that_does_not_divide_over_the_ranks_is_refused():
    with pytest.raises(UserError, match=r"train\.global_batch 16 does not divide over 3 ranks .* multiple of 15"):
        check_deepspeed(config(), world_size=3)


def test_nvme_is_given_a_folder_and_buffers_enough(tmp_path):
    zero = deepspeed_config(config("zero3_nvme"), 2, tmp_path / "swap")["zero_optimization"]
    assert zero["offload_optimizer"]["buffer_count"] == 4
    assert zero["offload_optimizer"]["nvme_path"] == zero["offload_param"]["nvme_path"] == str(tmp_path / "swap")
    with pytest.raises(UserError, match=r"offload_optimizer\.nvme_path is missing"):
        deepspeed_config(config("zero3_nvme"), 2)

    own = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/fast", "buffer_count": 4}}
    file = write(tmp_path, zero_optimization=own)
    paths = {
        deepspeed_config(config(file), 2, tmp_path / stage)["zero_optimization"]["offload_optimizer"]["nvme_path"]
        for stage in ("coarse", "fine")
    }
    assert len(paths) == 2
    assert all(path.startswith("/fast/stretto-") for path in paths)
    with pytest.raises(UserError, match=r"buffer_count is 4: this recipe needs 5"):
        deepspeed_config(config(file, ema_decay=0.9), 2, tmp_path)
    own["offload_optimizer"]["pipeline_read"] = True
    with pytest.raises(UserError, match=r"buffer_count is 4: this recipe needs 8"):
        deepspeed_config(config(write(tmp_path, zero_optimization=own)), 2, tmp_path)


def test_bf16_is_refused_where_there_is_none():
    check_precision(config(), None)
    check_precision(config(), (8, 0))
    check_precision(config(precision="fp32"), (7, 5))
    with pytest.raises(UserError, match=r"7\.5 does not have .* train\.precision=fp32"):
        check_precision(config(), (7, 5))


def test_the_checks_are_quick():
    """The command line makes them before anything starts."""
    program = "import sys, trainer.deepspeed_settings; sys.exit('torch' in sys.modules or 'deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


class Asked(dict):
    """A DeepSpeed file that remembers which keys were looked for."""

    def __init__(self, *values, **keys):
        super().__init__(*values, **keys)
        self.asked = set()

    def __copy__(self):
        return self

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def keys(self):
        return self


def test_the_keys_are_those_of_the_installed_deepspeed(monkeypatch):
    """A new DeepSpeed that reads other keys shows here: put them where they belong in ds_configs/schema.py."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.config import _REMOVED_TOP_LEVEL_CONFIG_KEYS, DeepSpeedConfig

    file = Asked(train_batch_size=1)
    DeepSpeedConfig(file)
    assert known(DeepSpeedFile, "") == file.asked - set(_REMOVED_TOP_LEVEL_CONFIG_KEYS)


def test_the_keys_of_a_section_are_those_of_the_installed_deepspeed():
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.swap_tensor.aio_config import AIO_DEFAULT_DICT
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import (
        DeepSpeedZeroOffloadOptimizerConfig,
        DeepSpeedZeroOffloadParamConfig,
    )

    path = "zero_optimization."
    assert known(ZeroOptimization, path) == fields(DeepSpeedZeroConfig)
    assert known(OffloadOptimizer, f"{path}offload_optimizer.") == fields(DeepSpeedZeroOffloadOptimizerConfig)
    assert known(OffloadParam, f"{path}offload_param.") == fields(DeepSpeedZeroOffloadParamConfig)
    assert known(Bf16, "bf16.") == fields(DeepSpeedBF16Config)
    assert known(Aio, "aio.") == set(AIO_DEFAULT_DICT)


def known(section, path):
    """The keys of `section` that may be there, and those that are refused with a reason."""
    refused = {key.removeprefix(path) for key in REFUSED if key.startswith(path)}
    return set(section.model_fields) | {key for key in refused if "." not in key}


def fields(section):
    return {field.alias or name for name, field in section.model_fields.items()}
