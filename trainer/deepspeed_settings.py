"""What DeepSpeed is told: the file a recipe names, with what the recipe decides filled in. Imports neither torch nor
DeepSpeed."""

from __future__ import annotations

from typing import Any

import ds_configs
from trainer.config import TrainConfig


def deepspeed_config(config: TrainConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed file a recipe names, with what the recipe decides filled in."""
    micro_batch = config.micro_batch or config.global_batch // world_size
    return {
        **ds_configs.read(config.zero),
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.global_batch // (micro_batch * world_size),
        "gradient_clipping": config.clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 1_000_000_000,
        # The optimizer is ours and handed over as an object: no `optimizer` section.
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }
