"""The verbs as Python functions, for notebooks and scripts of one process.

Every function takes a `Config`, its plain data or a YAML file, and keywords for its sections and
keys, which are laid over it: a mapping replaces the keys that it names, a model of the config
(`ModelConfig`, `TopKSAE.Config`, ...) the whole section, None drops one. All raise `ConfigError`
before any work where a key or a value does not fit, and `UserError` where the work fails for
something that the caller can set right; both are ValueErrors. Run again, each goes on with what is
unfinished, as the verbs do.

    api.train(store="acts.zarr", output="runs/a", sae={"k": 32, "d_sae": 4096}, train={...})

Several processes are for the verbs: `accelerate launch -m flash_sae_dist.launch.train`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
import torch.distributed as dist
from accelerate import Accelerator
from pydantic import BaseModel

from .activations.harvest import run_cache
from .activations.store import ActivationStore
from .config.base import ConfigError, UserError
from .config.file import read_file
from .evaluation.finished import FinishedSAE
from .evaluation.runner import run_evaluation
from .exporting import ExportedSAE, run_export
from .features.folder import FeatureFolder
from .features.runner import run_features
from .grid.runner import run_jobs
from .grid.trackers import check_trackers
from .parallel.mesh import end_groups, with_index
from .planner.caching import check_launch
from .training.job import Config, parse_config, plain_data
from .training.records import Job, hookpoint_of

__all__ = [
    "Config",
    "ConfigError",
    "ExportedSAE",
    "FeatureFolder",
    "FinishedSAE",
    "Keys",
    "UserError",
    "cache",
    "config_of",
    "evaluate",
    "export",
    "features",
    "train",
    "train_grid",
]

Section = Mapping[str, Any] | BaseModel | None
# A config, its plain data, or the path of a YAML file.
ConfigLike = Config | Mapping[str, Any] | str | Path


class Keys(TypedDict, total=False):
    """The sections and keys of a config, as `flash-sae keys` lists them."""

    output: str | Path
    model: Section
    text: Section
    cache: Section
    sae: Section
    train: Section
    grid: Section
    evaluate: Section
    features: Section
    export: Section
    store: str | Path | None
    store_cache: Section
    trackers: list[str] | tuple[str, ...]


def config_of(config: ConfigLike | None = None, /, **keys: Unpack[Keys]) -> Config:
    """The config that the other functions make of their arguments. Raises ConfigError."""
    source = str(config) if isinstance(config, str | Path) else "config"
    if isinstance(config, str | Path):
        data = read_file(config)
    else:
        data = plain_data(config) if isinstance(config, Config) else _plain(config or {})
    for name, value in keys.items():
        before, given = data.get(name), _plain(value)
        if isinstance(value, Mapping) and isinstance(before, dict):
            given = before | given
        data[name] = given
    return parse_config(data, source)


def cache(config: ConfigLike | None = None, /, **keys: Unpack[Keys]) -> ActivationStore:
    """Runs text through a language model and stores its activations: sections model, text, cache.

    Returns the finished store, open for reading: `store.hookpoints`, `store.rows`,
    `store.width(hookpoint)` (d_in), and `store.tensor(hookpoint, start, stop)`, rows
    [stop - start, d_in] in the store's dtype. A finished store is opened, not made again.
    """
    cfg = config_of(config, **keys)
    cfg.need("model", "text", "cache", verb="cache")
    assert cfg.cache is not None
    with _alone(cfg) as accelerator:
        check_launch(cfg, with_index(accelerator.device), 1)
        run_cache(cfg, accelerator)
    # Of cache.store, which `store` may not be.
    return ActivationStore.open(cfg.cache.path())


def train(config: ConfigLike | None = None, /, **keys: Unpack[Keys]) -> FinishedSAE:
    """Trains one SAE on train.hookpoint of a store, or of the model itself (train.source: stream).

    Returns where it is: `load()` gives the SAE, with `W_enc` and `W_dec` [d_sae, d_in], `b_enc`
    [d_sae], `b_dec` [d_in] and, called on rows [n, d_in], `recon` [n, d_in] and `codes`;
    `metrics()` what was logged. One that is finished is not trained again. Raises JobsFailedError,
    a UserError, where training failed.
    """
    return _trained(config_of(config, **keys), grid=False)[0]


def train_grid(config: ConfigLike | None = None, /, **keys: Unpack[Keys]) -> list[FinishedSAE]:
    """Trains an SAE for each hookpoint of grid.hookpoints and each combination of grid.values.

    Returns them in the grid's order; report.html, results.csv and results.json lie in output. One
    SAE's failure leaves the others alone and is told at the end, by JobsFailedError, a UserError.
    """
    return _trained(config_of(config, **keys), grid=True)


def evaluate(config: ConfigLike | None = None, /, **keys: Unpack[Keys]) -> list[dict[str, Any]]:
    """Measures every finished SAE under output, on the rows that its training held out.

    Returns a record an SAE, in the order of their names, as its evaluation.json has it: `job`,
    `hookpoint`, `d_sae`, `tokens` (rows measured), `fvu`, `explained_variance`, `mse`, `cosine`,
    `l2_ratio`, `l0`, `never_fired_fraction` and, with the sections model, text and cache, `loss`
    (nats a token, and the shares recovered); None for what is no finite number. densities.npy
    beside it has each latent's density, [d_sae] float32. Raises ConfigError where there is no
    finished SAE, or the store holds rows of another model.
    """
    cfg = config_of(config, **keys)
    with _alone(cfg) as accelerator:
        return run_evaluation(cfg, accelerator)


def features(config: ConfigLike | None = None, /, **keys: Unpack[Keys]) -> list[FeatureFolder]:
    """Writes what each latent of the SAEs of features.saes stands for: examples, densities, output
    tokens, nearest latents.

    Returns a folder an SAE: `page` is its web page, `latents()` reads a dict a latent, the keys of
    which docs/features.md explains; an example's `tokens` and `values` are of one length, `values`
    None where no row was stored. Raises ConfigError for an SAE or a latent that is not there, or
    a model that is not the store's.
    """
    cfg = config_of(config, **keys)
    with _alone(cfg) as accelerator:
        return [FeatureFolder(folder) for folder in run_features(cfg, accelerator)]


def export(config: ConfigLike | None = None, /, **keys: Unpack[Keys]) -> list[ExportedSAE]:
    """Writes every finished SAE under output in the formats of export.formats.

    Returns what was written: `name` of the SAE, `format`, and `path`, the folder or the file that
    the other library loads. Raises ConfigError before anything is written where a format cannot
    hold one of the SAEs.
    """
    cfg = config_of(config, **keys)
    with _alone(cfg) as accelerator:
        return run_export(cfg, accelerator)


def _trained(config: Config, *, grid: bool) -> list[FinishedSAE]:
    with _alone(config, trackers=True) as accelerator:
        jobs = run_jobs(config, accelerator, grid=grid)
    return [_finished(job) for job in jobs]


def _finished(job: Job) -> FinishedSAE:
    assert job.config.train is not None
    return FinishedSAE(job.name, job.folder, hookpoint_of(job), job.config.train.target)


def _plain(value: Any) -> Any:
    """Paths as text and models as their data, at any depth."""
    if isinstance(value, BaseModel):
        data = value.model_dump(exclude_unset=True)
        # What chooses the model may be left to its default there.
        tags = type(value).model_fields.keys() & {"architecture", "engine"}
        return _plain(data | {tag: getattr(value, tag) for tag in tags})
    if isinstance(value, Mapping):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return str(value) if isinstance(value, os.PathLike) else value


@contextmanager
def _alone(config: Config, *, trackers: bool = False) -> Iterator[Accelerator]:
    """The accelerator of this process, whose trackers are ended whatever happens inside. Raises
    ConfigError where it is one of several.
    """
    grouped = dist.is_available() and dist.is_initialized()
    world = dist.get_world_size() if grouped else int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise ConfigError(
            f"flash_sae_dist.api works in one process, and this is one of {world}; start the verb "
            "with `accelerate launch -m flash_sae_dist.launch.VERB`"
        )
    if trackers:
        check_trackers(config.trackers)
    try:
        accelerator = Accelerator(
            cpu=not torch.cuda.is_available(),
            mixed_precision="no",
            log_with=(list(config.trackers) or None) if trackers else None,
            project_dir=config.output,
        )
    except ValueError as e:
        raise ConfigError(
            f"this process has an Accelerator with other settings ({' '.join(str(e).split())}); "
            "restart it, and make that one with mixed_precision='no'"
        ) from e
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        if not grouped:
            # DeepSpeed's engine makes one even here.
            end_groups()
