"""What a cache job takes: rows and their widths, the model, buffers, the store's bytes, time."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch

from ..activations.harvest import geometry_of
from ..activations.language_model import (
    LanguageModel,
    model_without_weights,
    resolve_hookpoints,
    tapped,
    weights_dtype,
)
from ..activations.pipeline import num_buffers
from ..activations.placement import own_quantization
from ..activations.records import COMPLETE, Records
from ..activations.store import Shape
from ..activations.stored_rows import float_dtype
from ..config.base import ConfigError, UserError, check_hookpoint
from ..config.data import CacheConfig
from ..config.run import RunConfig
from ..parallel import agree
from ..training.host_memory import free_bytes
from .devices import GIB, Launch, launch_here, memory_of
from .timing import FORWARD

logger = logging.getLogger(__name__)
# Of a bare forward pass's rate: 246,000 of 266,000 tokens/s (docs/performance.md).
_CACHED = 0.89
_START_S = 20.0
# Below it cache.memory_gib makes shards too small to read well.
_LEAST_GIB = 0.5
# GB/s that a process writes: what was seen, not its limit.
_WRITE_GB_S = 2.0
# What a pass holds of each token beside the weights, in rows of the residual stream, of a Llama
# whose blocks widen it four times: an estimate, for which `cache` refuses nothing.
_PASS, _PASS_ROWS = "a forward pass", 16


class Rows(NamedTuple):
    """A store that is there, or that `cache` would make."""

    shape: Shape
    is_there: bool
    is_local: bool

    @property
    def bytes(self) -> int:
        """On the disk, without the table of the text."""
        geometry, total = self.shape.geometry, 0
        for name in self.shape.arrays():
            each = self.shape.row_bytes(name)
            total += (geometry.num_shards - 1) * geometry.file_bytes(0, each)
            total += geometry.file_bytes(geometry.num_shards - 1, each)
        return total

    @property
    def widths(self) -> dict[str, int]:
        """Of the hookpoints."""
        return self.shape.widths

    @property
    def dtype(self) -> str:
        """Of the rows."""
        return self.shape.dtype

    @property
    def itemsize(self) -> int:
        """Bytes of an element of a batch."""
        return float_dtype(self.shape.dtype).itemsize


class ModelShape(NamedTuple):
    """A language model as its config alone tells it."""

    parameters: int
    widths: dict[str, int]  # of the hookpoints
    flops: float  # a token, up to the last hookpoint
    is_quantized: bool  # as it is stored


class CachePlan(NamedTuple):
    """What `cache` takes of each process, and in all."""

    rows: Rows
    model: ModelShape | None
    device: dict[str, int]  # bytes of a process on its device
    host: dict[str, int]  # bytes of a process on its host
    seconds: float | None
    left_out: str  # why there is no figure of the model


def model_shape(config: RunConfig) -> ModelShape:
    """Parameters, widths and flops of a model, by a pass without data. Raises ConfigError where its
    config is not at hand, a hookpoint is none of its modules, or it does not run without data.
    """
    assert config.model is not None
    assert config.cache is not None
    from torch._subclasses.fake_tensor import FakeTensorMode

    # Its own account of what it cannot run, which ends as a ConfigError here.
    told = logging.getLogger("torch._subclasses.fake_tensor")
    before = told.level
    told.setLevel(logging.CRITICAL)
    try:
        with FakeTensorMode():
            lm = model_without_weights(config.model)
            hookpoints = resolve_hookpoints(lm.model, config.cache.hookpoints)
            widths, flops = _pass(lm, hookpoints, config.cache.context_length)
    finally:
        told.setLevel(before)
    parameters = sum(p.numel() for p in lm.model.parameters())
    return ModelShape(parameters, widths, flops, own_quantization(lm.model.config) is not None)


def _pass(lm: LanguageModel, hookpoints: list[str], length: int) -> tuple[dict[str, int], float]:
    """Widths, and flops a token, of one sequence without data."""
    from torch.utils.flop_counter import FlopCounterMode

    widths: dict[str, int] = {}
    ids, counter = torch.zeros((1, length), dtype=torch.int64), FlopCounterMode(display=False)
    try:
        with tapped(lm, hookpoints, lambda h, x: widths.update({h: x.shape[-1]})) as run, counter:
            run(ids, torch.ones_like(ids, dtype=torch.bool))
    except UserError:
        raise
    except Exception as e:  # models look at their data, each in its way
        told = " ".join(str(e).split())
        raise ConfigError(
            f"model.name: the model does not run without data ({told[:120]} ...)"
        ) from e
    return {name: widths[name] for name in hookpoints}, counter.get_total_flops() / length


def rows_there(path: str) -> Rows | None:
    """A store that lies at a path; one that was only begun is not there."""
    records = Records(path)
    shape = Shape.read(records)
    if shape is None:
        return None
    return Rows(shape, records.read(COMPLETE) is not None, records.local)


def rows_to_be(cfg: CacheConfig, widths: dict[str, int]) -> Rows:
    """The store that `cache` would make of a text that is long enough."""
    geometry = geometry_of(cfg, widths, cfg.rows_to_store())
    return Rows(Shape(geometry, cfg.dtype, widths), False, Records(cfg.path()).local)


def named_widths(cfg: CacheConfig, width: int) -> dict[str, int]:
    """Hookpoints that are written out, all of one width. Raises ConfigError for a pattern, which
    takes the model to know.
    """
    for name in cfg.hookpoints:
        try:
            check_hookpoint(name)
            if set("*?[") & set(name):
                raise ValueError(f"{name!r} is a pattern")
        except ValueError as e:
            raise ConfigError(
                f"cache.hookpoints: {e}: without the model's config, write the names out"
            ) from e
    return dict.fromkeys(cfg.hookpoints, width)


def cache_plan(config: RunConfig, launch: Launch, width: int | None = None) -> CachePlan:
    """What `cache` takes; a width stands in for a model whose config is not at hand. Raises
    ConfigError where neither tells the hookpoints.
    """
    config.need("model", "cache", verb="cache")
    assert config.cache is not None
    model, left_out = None, ""
    try:
        model = model_shape(config)
        widths = model.widths
    except ConfigError as e:
        if width is None:
            raise
        left_out, widths = f"{e}: the model's memory and time are left out", {}
        widths = named_widths(config.cache, width)
    rows = rows_to_be(config.cache, widths)
    device, host = _buffers(config.cache, rows, launch.on_gpu)
    seconds = None
    if model is not None:
        device["model"] = weight_bytes(config, model, launch.on_gpu)
        device[_PASS] = pass_bytes(config.cache, widths)
        rate = FORWARD * _CACHED * 1e12 * launch.gpu.matmul_tflops / max(1, model.flops)
        written = _WRITE_GB_S * launch.local
        if launch.store_gb_s is not None:
            written = min(written, launch.store_gb_s)
        seconds = _START_S + max(
            config.cache.rows_to_store() / (rate * launch.processes),
            rows.bytes / (1e9 * written * launch.hosts),
        )
    if not launch.on_gpu:
        device, host = {}, host | device
    return CachePlan(rows, model, device, host, seconds, left_out)


def check_launch(config: RunConfig, device: torch.device, processes: int) -> None:
    """Raises ConfigError on all processes where `cache` would not fit, before anything is loaded.

    What is left of a store that is whole takes nothing. A model whose config alone does not tell
    its shape is not looked at, nor one in GGUF form, whose config takes its whole file.
    Collective over all processes.
    """
    launch = launch_here(device, processes, min(agree.from_all(memory_of(device))))

    def check() -> None:
        assert config.model is not None
        assert config.cache is not None
        whole = Records(config.cache.path()).read(COMPLETE) is not None
        if whole or config.model.gguf_file is not None:
            return
        try:
            plan = cache_plan(config, launch)
        except ConfigError as e:
            logger.info("memory is not planned before: %s", e)
            return
        check_cache(plan, config, launch, free_bytes())

    agree.first_checks(check)


def _buffers(cfg: CacheConfig, rows: Rows, on_gpu: bool) -> tuple[dict[str, int], dict[str, int]]:
    geometry, widths = rows.shape.geometry, rows.shape.widths
    shard_bytes = sum(widths.values()) * rows.itemsize * geometry.shard_rows
    on_host, on_device = num_buffers(cfg, geometry.shard_rows, shard_bytes, not on_gpu)
    device = {"shards that are filled": on_device * shard_bytes} if on_device else {}
    return device, {"shards on their way to the disk": on_host * shard_bytes}


def pass_bytes(cfg: CacheConfig, widths: dict[str, int]) -> int:
    """What a forward pass holds beside the weights."""
    tokens = cfg.batch_sequences * cfg.context_length
    return tokens * max(widths.values()) * _PASS_ROWS * 2


def weight_bytes(config: RunConfig, model: ModelShape, on_gpu: bool) -> int:
    """Weights as they are loaded; quantised ones with a little of what is not."""
    assert config.model is not None
    kind = config.model.quantization or ("4bit" if model.is_quantized else None)
    if kind is not None:
        return int(model.parameters * {"8bit": 1.1, "4bit": 0.6}[kind])
    device = torch.device("cuda" if on_gpu else "cpu")
    return model.parameters * weights_dtype(config.model.dtype, device).itemsize


def check_cache(plan: CachePlan, config: RunConfig, launch: Launch, free_host: int | None) -> None:
    """Raises ConfigError where a process's device or a host has not the memory that `cache` takes,
    in a sentence that names what to change. Without free_host, its free memory, that is not looked
    at.
    """
    assert config.cache is not None
    assert config.model is not None
    device, host = (
        sum(size for what, size in parts.items() if what != _PASS)
        for parts in (plan.device, plan.host)
    )
    if launch.on_gpu and device > launch.memory and config.model.device_map is None:
        model = plan.device.get("model", 0)
        cure = _model_cure(config, model, launch)
        raise ConfigError(
            f"model.name={config.model.name!r} takes {device / GIB:,.1f} GiB of a process's GPU "
            f"(weights {model / GIB:,.1f}), but the {launch.gpu.name} has "
            f"{launch.memory / GIB:,.1f} GiB free; set {cure}"
        )
    if free_host is not None and host * launch.local > free_host:
        shards, model = plan.host["shards on their way to the disk"], plan.host.get("model", 0)
        count = f"{launch.local} process{'es' * (launch.local > 1)} a host"
        if model > host / 2:
            raise ConfigError(
                f"model.name={config.model.name!r}: the weights take {model / GIB:,.1f} GiB in "
                f"each of {count}, of whose memory {free_host / GIB:,.1f} GiB are free; start "
                "fewer, set model.dtype=bfloat16 where it is float32, or take a smaller model"
            )
        raise ConfigError(
            f"cache.memory_gib={config.cache.memory_gib:g}: {count} take "
            f"{host * launch.local / GIB:,.1f} GiB of its memory (shards of all hookpoints "
            f"{shards * launch.local / GIB:,.1f}), of which {free_host / GIB:,.1f} GiB are free; "
            "lower cache.memory_gib or cache.batch_sequences, or start fewer processes a host"
        )


def _model_cure(config: RunConfig, weights: int, launch: Launch) -> str:
    assert config.model is not None
    wide = config.model.dtype == "float32" and config.model.quantization is None
    cures = ["model.dtype=bfloat16"] if wide else []
    # Shards on the device take no more than cache.memory_gib.
    if (room := (launch.memory - weights) / GIB) > _LEAST_GIB:
        cures.append(f"cache.memory_gib={math.floor(10 * room) / 10:g}")
    cures.append("model.quantization=4bit")
    return ", or ".join([*cures, "model.device_map=auto with several GPUs a process"])
