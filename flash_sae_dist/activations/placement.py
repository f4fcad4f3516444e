"""How a language model's weights are loaded beside their plain form: quantised, over several GPUs,
with an adapter merged into them.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from typing import Any

import torch
from torch import nn

from ..config.base import ConfigError, nearest_name
from ..config.data import ModelConfig

logger = logging.getLogger(__name__)
_BITSANDBYTES = {
    "8bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "4bit": {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": "bfloat16",
    },
}


def own_quantization(config: Any) -> str | None:
    """How a model's files hold its weights, such as `gptq`; None for plain ones."""
    about = getattr(config, "quantization_config", None)
    if about is None:
        return None
    kind = about.get("quant_method") if isinstance(about, dict) else about.quant_method
    return str(getattr(kind, "value", kind))


def loading_options(cfg: ModelConfig, config: Any, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is told of quantisation and devices; nothing for a plain model on one
    device, which is moved there afterwards. Raises ConfigError for what cannot be here.
    """
    own = own_quantization(config)
    _check_quantization(cfg, own, device)
    options: dict[str, Any] = {}
    if cfg.quantization is not None:
        options["quantization_config"] = dict(_BITSANDBYTES[cfg.quantization])
    if isinstance(cfg.device_map, dict):
        options["device_map"] = cfg.device_map
    elif cfg.device_map is not None and device.type == "cuda":
        options |= {"device_map": cfg.device_map, "max_memory": _memory_of_own_gpus(device)}
    elif cfg.quantization or own:
        # Quantised weights are laid out for the device that they are loaded to.
        options["device_map"] = {"": str(device)}
    return options


def _check_quantization(cfg: ModelConfig, own: str | None, device: torch.device) -> None:
    told = f"model.quantization={cfg.quantization!r}"
    if cfg.adapter is not None and (cfg.quantization or own):
        raise ConfigError(
            f"model.adapter={cfg.adapter!r} cannot be merged into {cfg.quantization or own} "
            "weights without changing them; name a model whose weights are not quantised"
        )
    if cfg.quantization is None:
        return
    if own is not None:
        raise ConfigError(f"{told}: the model's weights are {own} already; leave that key out")
    if device.type != "cuda":
        raise ConfigError(f"{told} needs a CUDA GPU, and there is none here; leave that key out")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"{told} needs a package that is not installed; pip install bitsandbytes")


def own_gpus(device: int, count: int, rank: int, world: int) -> list[int]:
    """The GPUs of one of `world` processes of a host, its own device first: every world-th."""
    mine = list(range(rank % world, count, world))
    return [device, *(gpu for gpu in mine if gpu != device)]


def _memory_of_own_gpus(device: torch.device) -> dict[int | str, int]:
    """Free bytes of each GPU that this process may fill, in the order in which it does."""
    from accelerate.utils import get_max_memory

    rank, world = (
        int(os.environ.get(f"LOCAL_{key}", d)) for key, d in (("RANK", 0), ("WORLD_SIZE", 1))
    )
    index = torch.cuda.current_device() if device.index is None else device.index
    free = get_max_memory()
    return {gpu: free[gpu] for gpu in own_gpus(index, torch.cuda.device_count(), rank, world)}


def first_device(cfg: ModelConfig, model: nn.Module, device: torch.device) -> torch.device:
    """The device that token ids go to. Raises ConfigError where a part of the model has no device,
    or is kept out of the GPUs, to be copied there at each pass.
    """
    if isinstance(cfg.device_map, dict):
        _check_places(cfg.device_map, model)
    places = getattr(model, "hf_device_map", None)
    if cfg.device_map is None or not places:
        return device
    away = [name for name, place in places.items() if str(place) in ("cpu", "disk")]
    if away and len(away) < len(places):
        raise ConfigError(
            f"model.device_map={cfg.device_map!r} puts {len(away)} of {len(places)} parts of the "
            f"model out of the GPUs ({away[0] or 'all of it'} first); use more GPUs, a smaller "
            "model.dtype or model.quantization"
        )
    try:
        found: torch.device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = next(model.parameters()).device
    return found


def _check_places(places: dict[str, int | str], model: nn.Module) -> None:
    """Raises ConfigError where a map names no module, or leaves a weight out."""
    modules = [name for name, _ in model.named_modules()]
    for name in places:
        if name not in modules and name not in dict(model.named_parameters()):
            raise ConfigError(
                f"model.device_map: {name!r} is no module of the model{nearest_name(name, modules)}"
            )
    for name, _ in model.named_parameters():
        if not any(part in ("", name) or name.startswith(f"{part}.") for part in places):
            raise ConfigError(
                f"model.device_map gives no device for {name}; add its module, or '' for the rest"
            )


def merge_adapter(cfg: ModelConfig, model: nn.Module, source: str) -> nn.Module:
    """The model with a LoRA adapter's weights added to its own. Raises ConfigError where peft is
    missing, or the adapter is not one of this model.
    """
    told = f"model.adapter={cfg.adapter!r}"
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(f"{told} needs a package that is not installed; pip install peft")
    import peft

    try:
        with warnings.catch_warnings():
            # It goes on with random weights in their place.
            warnings.filterwarnings("error", message=".*missing adapter keys.*")
            adapted = peft.PeftModel.from_pretrained(model, source)
        kinds = {str(about.peft_type) for about in adapted.peft_config.values()}
        named = {about.base_model_name_or_path for about in adapted.peft_config.values()}
        merged: nn.Module = adapted.merge_and_unload(safe_merge=True)
    except torch.OutOfMemoryError:
        raise
    except Exception as e:  # adapters of each kind have errors of their own
        raise ConfigError(
            f"{told} cannot be merged into model.name={cfg.name!r}: {type(e).__name__}: "
            f"{' '.join(str(e).split())[:300]}; check that it is a LoRA adapter of this model"
        ) from e
    logger.info(
        "merged %s (%s, trained on %s)", cfg.adapter, *sorted(kinds), *sorted(map(str, named))
    )
    return merged
