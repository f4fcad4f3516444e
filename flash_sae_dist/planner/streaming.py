"""What a stream takes beside the SAEs' steps: the model, its passes, the rows that are mixed."""

from __future__ import annotations

from typing import NamedTuple

from ..activations.stored_rows import float_dtype
from ..activations.stream_order import BufferShape
from ..config.base import ConfigError
from ..config.data import CacheConfig
from ..config.run import RunConfig
from .caching import ModelShape, model_shape, named_widths, pass_bytes, weight_bytes
from .devices import Launch
from .memory import Streamed, Work


class StreamPlan(NamedTuple):
    """The model of a stream, on each process."""

    model: ModelShape | None
    widths: dict[str, int]  # of the hookpoints
    dtype: str  # of their rows
    weights: int  # bytes
    a_pass: int  # bytes
    left_out: str  # why there is no figure of the model

    def beside(self, work: Work, cfg: CacheConfig) -> Work:
        """A job's work with what the stream takes of its process. Raises ConfigError where its
        buffer does not hold a pass.
        """
        shape = BufferShape.of(work.train.buffer_tokens, cfg.batch_sequences, cfg.context_length)
        buffer = shape.rows * work.d_in * float_dtype(self.dtype).itemsize
        flops = 0.0 if self.model is None else self.model.flops
        return work._replace(stream=Streamed(self.weights, self.a_pass, buffer, flops))


def stream_plan(config: RunConfig, launch: Launch, width: int | None = None) -> StreamPlan:
    """What the model takes; a width stands in for one whose config is not at hand. Raises
    ConfigError where neither tells the hookpoints.
    """
    config.need("model", "text", "cache", verb="train.source=stream")
    assert config.cache is not None
    cfg = config.cache
    try:
        model = model_shape(config)
    except ConfigError as e:
        if width is None:
            raise
        told = f"{e}: the model's memory and time are left out"
        return StreamPlan(None, named_widths(cfg, width), cfg.dtype, 0, 0, told)
    weights, a_pass = weight_bytes(config, model, launch.on_gpu), pass_bytes(cfg, model.widths)
    return StreamPlan(model, model.widths, cfg.dtype, weights, a_pass, "")
