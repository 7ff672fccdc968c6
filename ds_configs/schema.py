"""The keys that a DeepSpeed file may have, and those that Stretto does itself. Imports neither torch nor DeepSpeed.

DeepSpeed ignores what it does not know at the top of a file, so a slip of the pen would go unseen. A test compares
these names with those that the installed DeepSpeed reads.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

TRAINER = "Stretto does that itself; remove it and set {} in the recipe"
UNUSED = "Stretto's transformers do not use it; remove it"
NOT_HERE = "it does not go with Stretto's optimizer and checkpoints; remove it"

REFUSED: dict[str, str] = {
    "optimizer": TRAINER.format("train.learning_rate, train.betas and train.weight_decay"),
    "scheduler": TRAINER.format("train.schedule and train.warmup_steps"),
    **dict.fromkeys(["fp16", "bfloat16", "torch_autocast"], TRAINER.format("train.precision (bf16 or fp32)")),
    "bf16.bf16_master_weights_and_grads": NOT_HERE,
    "bf16.bf16_optimizer_states": NOT_HERE,
    **dict.fromkeys(["checkpoint", "datastates_ckpt"], TRAINER.format("train.checkpoint_every")),
    **dict.fromkeys(["tensorboard", "csv_monitor", "comet"], "Stretto writes metrics itself; remove it"),
    "wandb": TRAINER.format("train.wandb"),
    **dict.fromkeys(
        ["comms_logger", "dump_state", "flops_profiler", "memory_breakdown", "timers", "wall_clock_breakdown"],
        TRAINER.format("train.profile"),
    ),
    "log_level": "Stretto has a log of its own; remove it",
    "activation_checkpointing": TRAINER.format("train.recompute"),
    "compile": TRAINER.format("train.compile"),
    "disable_python_gc": TRAINER.format("train.gc_every"),
    **dict.fromkeys(["data_efficiency", "dataloader_drop_last"], "Stretto reads its data itself; remove it"),
    "managed_gradient_accumulation": TRAINER.format("train.micro_batch"),
    **dict.fromkeys(
        [
            "autotuning",
            "disable_allgather",
            "expert_parallel",
            "hybrid_engine",
            "pipeline",
            "seq_parallel_communication_data_type",
            "tensor_parallel",
            "use_data_before_expert_parallelism",
            "vocabulary_size",
            "weight_quantization",
            "zero_optimization.leaf_module",
            "zero_optimization.save_muon_momentum_buffer_in_memory",
        ],
        UNUSED,
    ),
    **dict.fromkeys(
        [
            "zero_optimization.compute_grad_norm",
            "zero_optimization.elastic_checkpoint",
            "zero_optimization.legacy_stage1",
            "zero_optimization.load_from_fp32_weights",
            "zero_optimization.pipeline_loading_checkpoint",
            "zero_optimization.zenflow",
            "zero_optimization.offload_optimizer.cpuadam_cores_perc",
            "zero_optimization.offload_optimizer.ratio",
            "zero_optimization.offload_optimizer.super_offload",
        ],
        NOT_HERE,
    ),
    "zero_optimization.cpu_offload": "it is called offload_optimizer now",
    "zero_optimization.cpu_offload_use_pin_memory": "it is a key of offload_optimizer now, pin_memory",
    "zero_optimization.cpu_offload_param": "it is called offload_param now",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": NOT_HERE,
}
"""Keys of DeepSpeed that a file may not switch on, and what to do about each."""

Device = Literal["none", "cpu", "nvme"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class OffloadOptimizer(Section):
    device: Device = "none"
    nvme_path: str | None = None
    buffer_count: PositiveInt | None = None
    pin_memory: bool = True
    pipeline_read: bool = False
    pipeline_write: bool = False
    fast_init: bool = False


class OffloadParam(Section):
    device: Device = "none"
    nvme_path: str | None = None
    buffer_count: PositiveInt | None = None
    buffer_size: PositiveInt | None = None
    max_in_cpu: NonNegativeInt | None = None
    pin_memory: bool = True


class ZeroOptimization(Section):
    stage: Literal[0, 1, 2, 3]
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    reduce_bucket_size: PositiveInt | None = None
    use_multi_rank_bucket_allreduce: bool = True
    allgather_partitions: bool = True
    allgather_bucket_size: NonNegativeInt | None = None
    overlap_comm: bool | None = None
    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    offload_param: OffloadParam = OffloadParam()
    sub_group_size: PositiveInt | None = None
    stage3_prefetch_bucket_size: NonNegativeInt | None = None
    stage3_param_persistence_threshold: NonNegativeInt | None = None
    stage3_model_persistence_threshold: NonNegativeInt | None = None
    stage3_max_live_parameters: NonNegativeInt | None = None
    stage3_max_reuse_distance: NonNegativeInt | None = None
    stage3_gather_16bit_weights_on_model_save: bool = False
    stage3_module_granularity_threshold: NonNegativeInt | None = None
    stage3_use_all_reduce_for_fetch_params: bool = False
    stage3_allgather_sequential: bool = False
    ignore_unused_parameters: bool = True
    round_robin_gradients: bool = False
    parameter_alignment: bool = False
    zero_hpz_partition_size: NonNegativeInt | None = None
    zero_quantized_weights: bool = False
    zero_quantized_nontrainable_weights: bool = False
    zero_quantized_gradients: bool = False
    memory_efficient_linear: bool = True
    override_module_apply: bool = True
    log_trace_cache_warnings: bool = False
    enable_sanity_checks: bool = False

    @model_validator(mode="after")
    def _check(self) -> ZeroOptimization:
        """DeepSpeed would leave most of these out without a word."""
        if self.offload_param.device != "none" and self.stage != 3:
            raise ValueError(f"offload_param needs stage 3, and stage is {self.stage}")
        if self.offload_optimizer.device == "nvme" and self.stage != 3:
            raise ValueError(f"offload_optimizer to nvme needs stage 3, and stage is {self.stage}")
        if self.offload_optimizer.device != "none" and self.stage == 0:
            raise ValueError("offload_optimizer needs stage 1, 2 or 3, and stage is 0")
        if self.offload_param.device == "nvme" and (self.zero_hpz_partition_size or 1) > 1:
            raise ValueError("offload_param to nvme and zero_hpz_partition_size do not go together")
        return self


class Aio(Section):
    block_size: PositiveInt | None = None
    queue_depth: PositiveInt | None = None
    intra_op_parallelism: PositiveInt | None = None
    single_submit: bool = False
    overlap_events: bool = True
    use_gds: bool = False


class Bf16(Section):
    enabled: bool | None = None
    immediate_grad_update: bool = False
    check_grad_overflow: bool = False


class DataTypes(Section):
    grad_accum_dtype: Literal["fp32", "bf16"] | None = None


class DeepSpeedFile(Section):
    """A file, those of its keys that a recipe decides too included."""

    zero_optimization: ZeroOptimization
    aio: Aio = Aio()
    train_batch_size: PositiveInt | None = None
    train_micro_batch_size_per_gpu: PositiveInt | None = None
    gradient_accumulation_steps: PositiveInt | None = None
    gradient_clipping: Annotated[float, Field(ge=0)] | None = None
    steps_per_print: PositiveInt | None = None
    bf16: Bf16 = Bf16()
    data_types: DataTypes = DataTypes()
    communication_data_type: Literal["fp32", "bf16", "fp16"] | None = None
    prescale_gradients: bool = False
    gradient_predivide_factor: PositiveFloat | None = None
    gradient_allreduce_op: Literal["mean"] = "mean"
    zero_allow_untested_optimizer: Literal[True] = True
    zero_force_ds_cpu_optimizer: Literal[False] = False


def keys_of(section: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `path` of `section` may have; none where there is no section."""
    for part in path:
        field = section.model_fields.get(part)
        if field is None or not isinstance(field.annotation, type) or not issubclass(field.annotation, BaseModel):
            return []
        section = field.annotation
    return list(section.model_fields)
