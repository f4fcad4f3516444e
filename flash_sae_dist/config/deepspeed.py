"""The JSON file of `train.deepspeed_config`: the keys of DeepSpeed's own that a run may choose."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ..files import parse_json
from .base import ConfigError, StrictModel, shown
from .file import parse
from .train import DeepSpeedTrainConfig


class OffloadOptimizer(StrictModel):
    """Where the master weights and Adam's moments live, and Adam runs."""

    device: Literal["none", "cpu"] = "none"
    pin_memory: bool = True


class ZeroOptimization(StrictModel):
    """What ZeRO splits over the replicas, and how it sends it; DeepSpeed's names and meanings."""

    stage: Literal[1, 2] = 1
    offload_optimizer: OffloadOptimizer = OffloadOptimizer()
    overlap_comm: bool = False
    contiguous_gradients: bool = True
    reduce_scatter: bool = True
    round_robin_gradients: bool = False
    # DeepSpeed's own are 2 GB of float32, made at each backward pass. A matrix that is larger is
    # reduced by itself, without a copy.
    reduce_bucket_size: int = Field(default=1 << 26, gt=0)
    allgather_bucket_size: int = Field(default=500_000_000, gt=0)


class DeepSpeedFile(StrictModel):
    """What a file may hold beside the keys that `train` has."""

    zero_optimization: ZeroOptimization = ZeroOptimization()
    wall_clock_breakdown: bool = False
    memory_breakdown: bool = False


# Keys of DeepSpeed's that keys of `train` decide, whatever their values.
_DECIDED_BY = {
    "optimizer": "train.lr, train.adam_betas and train.adam_eps",
    "scheduler": "train.warmup_steps and train.decay_fraction",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "amp": "train.precision",
    "torch_autocast": "train.precision",
    "data_types": "train.precision",
}


def zero_of(cfg: DeepSpeedTrainConfig) -> ZeroOptimization:
    """The section zero_optimization alone. Raises ConfigError as `read_deepspeed` does for it."""
    given, source = _read(cfg)
    known = {key: given[key] for key in given.keys() & DeepSpeedFile.model_fields.keys()}
    return parse(DeepSpeedFile, known, source).zero_optimization


def read_deepspeed(cfg: DeepSpeedTrainConfig, replicas: int) -> dict[str, Any]:
    """All that `deepspeed.initialize` is told: the file of a config, or ZeRO-1, completed by the
    keys of `train`. Raises ConfigError where the file cannot be read, contradicts one of those, or
    holds a key that is not for it.
    """
    ours = _decided(cfg, replicas)
    given, source = _read(cfg)
    for key in sorted(given.keys() & _DECIDED_BY.keys()):
        if given.pop(key) not in ("auto", {"enabled": False}):
            raise ConfigError(f"{source}: {key!r} is what {_DECIDED_BY[key]} says; drop it there")
    for key, (value, name) in ours.items():
        if (found := given.pop(key, "auto")) not in ("auto", value):
            raise ConfigError(
                f"{source}: {key}={shown(found)} contradicts {name}, by which it is "
                f"{shown(value)}; drop it there"
            )
    told = parse(DeepSpeedFile, given, source).model_dump(mode="json")
    told |= {key: value for key, (value, _) in ours.items()}
    # The timer waits for the device at each step.
    return told | {"timers": {"throughput": {"enabled": False}}}


def _decided(cfg: DeepSpeedTrainConfig, replicas: int) -> dict[str, tuple[Any, str]]:
    """Value and key of `train` of each of DeepSpeed's keys that it decides."""
    rows = -(-cfg.batch_tokens // replicas // cfg.micro_batches)
    parts = "train.batch_tokens, train.num_replicas and train.micro_batches"
    return {
        "train_batch_size": (rows * replicas * cfg.micro_batches, parts),
        "train_micro_batch_size_per_gpu": (rows, parts),
        "gradient_accumulation_steps": (cfg.micro_batches, "train.micro_batches"),
        "gradient_clipping": (cfg.grad_clip or 0.0, "train.grad_clip"),
        # torch.optim.Adam, on the host, too: its fused form needs no compiler there.
        "zero_allow_untested_optimizer": (True, "train.engine"),
        "zero_force_ds_cpu_optimizer": (False, "train.engine"),
    }


def _read(cfg: DeepSpeedTrainConfig) -> tuple[dict[str, Any], str]:
    """What the file holds, and its name; without one nothing."""
    path = cfg.deepspeed_config
    if path is None:
        return {}, "train.deepspeed_config"
    try:
        return parse_json(Path(path).read_bytes()), path
    except OSError as e:
        raise ConfigError(
            f"train.deepspeed_config={path!r}: {e.strerror}; name a file such as "
            "configs/deepspeed/zero2.json"
        ) from e
    except ValueError as e:
        raise ConfigError(
            f"train.deepspeed_config={path!r} is no JSON object ({e}); write one such as "
            "configs/deepspeed/zero2.json"
        ) from e
