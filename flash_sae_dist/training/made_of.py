"""What an SAE is made of: the keys that change what a step computes, and the rows that it saw.

It is kept thrice, in a job's folder, in each checkpoint and beside the finished weights, so that
none of them is taken for another's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from ..activations.stream import Rows
from ..config.base import ConfigError, section_models, sources_of
from ..config.sae import SAEConfig
from ..config.train import AutogradTrainConfig, TrainConfig
from ..files import read_json, write_json
from ..identity import (
    FREE_KEYS,
    Difference,
    difference,
    digest,
    plain,
    tell_other_versions,
    versions,
)
from ..models.jumprelu import JumpReLUConfig
from . import checkpoint
from .defaults import usual_lr, with_defaults
from .engine import choose_engine
from .initial import digest_of
from .job import Config
from .optim import lr_at, warmup_steps
from .records import DamagedRecordError, Job, read_job, read_store_config
from .step import resolve_precision

logger = logging.getLogger(__name__)
MADE_OF = "made_of.json"
# What jobs did that are older than a key whose default is another.
_BEFORE = {"train.holdout": 0.0, "train.encoder_scale": "unit"}


def step_values(config: Config, d_in: int, device: torch.device) -> dict[str, Any]:
    """The value of each key that changes what a step computes, resolved: what is left out stands
    for what it comes to here.
    """
    sae, train = config.sae, config.train
    assert sae is not None
    assert train is not None
    d_sae = sae.width(d_in)
    train = with_defaults(train, sae, d_in)
    flat = {f"sae.{key}": value for key, value in sae.model_dump(mode="json").items()}
    del flat["sae.expansion_factor"]
    flat |= {f"train.{key}": value for key, value in train.model_dump(mode="json").items()}
    flat |= {
        "sae.d_sae": d_sae,
        "train.k_aux": min(train.k_aux or max(1, d_in // 2), d_sae),
        "train.warmup_steps": warmup_steps(_steps(train), train),
        "train.engine": choose_engine(train, sae).engine,
        "train.precision": str(resolve_precision(train.precision, device)).removeprefix("torch."),
    }
    if isinstance(sae, JumpReLUConfig):
        # Older records are without it.
        flat["sae.initial_l0"] = "usual" if sae.initial_l0 is None else sae.initial_l0
        if sae.l0_at_start() is None:
            del flat["sae.initial_l0"]
    if train.init_from is not None:
        # The same weights under another path are the same.
        flat["train.init_from"] = digest_of(train.init_from)
    if train.source == "store":
        del flat["train.buffer_tokens"]
    return {key: plain(value) for key, value in flat.items() if key not in FREE_KEYS}


def _defaults() -> dict[str, Any]:
    """What a key stands for in a record that is older than the key."""
    found: dict[str, Any] = {}
    for section in ("sae", "train"):
        for model in section_models(Config, section):
            for name, field in model.model_fields.items():
                if not field.is_required():
                    found[f"{section}.{name}"] = plain(field.default)
    for resolved in ("sae.d_sae", "train.lr", "train.k_aux", "train.warmup_steps"):
        found.pop(resolved, None)
    # Those that an architecture decides were keys before it did.
    for resolved in ("train.adam_betas", "train.dead_latents", "sae.initial_l0"):
        found.pop(resolved, None)
    return found | _BEFORE


class _MadeOf(Protocol):
    def made_of(self, hookpoint: str) -> dict[str, Any]: ...


def rows_made_of(rows: _MadeOf, hookpoint: str) -> dict[str, Any]:
    """What the rows of a hookpoint are, as `ActivationStore.made_of`, or of all that it joins."""
    first, *others = [rows.made_of(name) for name in sources_of(hookpoint)]
    if not others:
        return first
    parts = first["parts"]
    if parts:
        named = [found["parts"]["hookpoints"] for found in (first, *others)]
        parts = parts | {"hookpoints": {name: w for of in named for name, w in of.items()}}
    sums = [found["rows"] for found in (first, *others)]
    return first | {"parts": parts, "rows": None if None in sums else digest(sums)}


def made_of(
    config: Config, rows: Rows, device: torch.device, begun_tokens: int | None = None
) -> dict[str, Any]:
    """What an SAE of a config and of the rows that it is trained on is made of. begun_tokens: see
    Job.
    """
    assert config.train is not None
    hookpoint = str(config.train.hookpoint)
    names = sources_of(hookpoint)
    train, found = config.train, rows_made_of(rows, hookpoint)
    step = step_values(config, sum(rows.width(name) for name in names), device)
    record: dict[str, Any] = {
        "step": step,
        "store": {"parts": found["parts"], "rows": found["rows"], "names": rows.config},
    }
    if train.target is not None:
        record["target_rows"] = rows.made_of(train.target)["rows"]
    return record | {
        "digest": _digest(record),
        "num_tokens": train.num_tokens,
        "begun_tokens": begun_tokens or train.num_tokens,
        "total_steps": _steps(train),
        "versions": versions(),
    }


def _digest(record: dict[str, Any]) -> str:
    store = record["store"]
    target = [record["target_rows"]] if "target_rows" in record else []
    return digest([record["step"], store["parts"] or store["rows"], *target])


def write(folder: Path, record: dict[str, Any]) -> None:
    """Writes a record into the folder of a job or of an SAE."""
    write_json(folder / MADE_OF, record, indent=1)


def read(folder: Path) -> dict[str, Any] | None:
    """What `write` wrote, None where there is nothing. Raises DamagedRecordError."""
    file = folder / MADE_OF
    try:
        data = read_json(file)
        if data["digest"] != _digest(data):
            raise ValueError("its digest changed")
        int(data["total_steps"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as e:
        reason = " ".join(str(e).split())
        raise DamagedRecordError(
            f"{file} is damaged ({reason}); restore it, or remove that folder"
        ) from e
    found: dict[str, Any] = data
    return found


def records(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, record) of what a job's folder holds. Raises DamagedRecordError."""
    for place in (folder, folder / "sae"):
        if (record := read(place)) is not None:
            yield str(place / MADE_OF), record
    if (info := checkpoint.newest_info(folder / "checkpoints")) is not None and "made_of" in info:
        yield f"{folder}'s checkpoint of step {info['step']}", info["made_of"]


def other_rows(was: dict[str, Any], now: dict[str, Any]) -> Difference | None:
    """In what the rows of two stores differ, as far as both records tell.

    Of stores with identities these decide: the same text and weights give other roundings on
    another device. Others are compared by the rows themselves, and by the names in their configs
    where one of them is older than a checksum.
    """
    if was["parts"] and now["parts"]:
        if found := difference(was["parts"], now["parts"]):
            return found
        if was["rows"] != now["rows"]:
            logger.info("the store was made anew: the same rows but for their rounding")
        return None
    if was["rows"] and now["rows"]:
        # Rows that were copied, or of a store that was moved, are the same under any name.
        return difference({"rows": was["rows"]}, {"rows": now["rows"]})
    logger.info("the store is older than identities: its config alone is compared")
    names = sorted(was["names"].keys() | now["names"].keys())
    was_named, now_named = ({k: side["names"].get(k) for k in names} for side in (was, now))
    return difference(was_named, now_named)


def as_begun(job: Job, d_in: int) -> Job:
    """The job with what it began with for keys that are left out and whose defaults go with the
    number of tokens, or were others in older versions; a log line tells the learning rate.
    """
    train, sae = job.config.train, job.config.sae
    assert train is not None
    assert sae is not None
    if (found := _begun(job, d_in)) is None:
        return job
    was, tokens, is_older = found
    shorter = train.model_copy(update={"num_tokens": tokens})
    usual = [usual_lr(one, sae, d_in) for one in (train, shorter, _before(train))]
    kept: dict[str, Any] = {}
    if train.lr is None and (rate := was.get("train.lr")) != usual[0] and rate in usual:
        kept |= {"lr": rate, "lr_rule": None}
        logger.info("%s goes on at the learning rate that it began with, %.3g", job.name, rate)
    for key in ("warmup_steps", "encoder_scale"):
        if getattr(train, key) is None and (value := was.get(f"train.{key}")) is not None:
            kept[key] = value
    if is_older and train.lr_rule == "budget" and "warmup_steps" in kept:
        # They cut a warm-up of 1000 steps short beside it: it is not 1000.
        kept["warmup_steps"] = min(kept["warmup_steps"], warmup_steps(_steps(shorter), train))
    train = train.model_copy(update=kept)
    if train.engine == "auto" and was.get("train.engine") == "autograd":
        train = _by_autograd(train, sae, job.name)
    if isinstance(sae, JumpReLUConfig) and "sae.initial_l0" not in was:
        sae = sae.from_a_threshold()
    changed = job.config.model_copy(update={"train": train, "sae": sae})
    return job._replace(config=changed, begun_tokens=tokens)


def _by_autograd(train: TrainConfig, sae: SAEConfig, name: str) -> TrainConfig:
    """What began on the autograd engine goes on there: gated and signum had no fused form once."""
    if choose_engine(train, sae).engine == "autograd":
        return train
    logger.info("%s goes on by train.engine=autograd, as it began: fused is faster", name)
    own = AutogradTrainConfig.model_fields
    given = {key: value for key, value in train.model_dump().items() if key in own}
    return AutogradTrainConfig.model_validate(given | {"engine": "autograd"})


def _begun(job: Job, d_in: int) -> tuple[dict[str, Any], int, bool] | None:
    """The step of a job's newest record, or what its job.yaml comes to where it is older than these
    records; the number of tokens that it began with; whether a version began it whose defaults were
    others. None of a new job.
    """
    if found := [record for _, record in records(job.folder)]:
        newest = found[-1]
        tokens = newest.get("begun_tokens", newest["num_tokens"])
        return _BEFORE | newest["step"], int(tokens), "begun_tokens" not in newest
    before = read_job(job.folder)
    if before is None or before.train is None or job.config.sae is None:
        return None
    train = _before(before.train)
    was = {f"train.{key}": getattr(train, key) for key in ("warmup_steps", "encoder_scale")}
    was["train.lr"] = usual_lr(train, job.config.sae, d_in)
    return was, train.num_tokens, True


def _before(train: TrainConfig) -> TrainConfig:
    """What keys that are left out stood for before their defaults went with the run's length."""
    old = {"lr_rule": "width", "warmup_steps": 1000, "encoder_scale": "unit"}
    return train.model_copy(
        update={key: value for key, value in old.items() if getattr(train, key) is None}
    )


def _resolved(step: dict[str, Any]) -> dict[str, Any]:
    """A record's step, where it is older than sae.initial_l0 with the threshold that was meant."""
    if step.get("sae.architecture") != "jumprelu" or step["sae.sparsity"] == "tanh":
        return step
    if "sae.initial_l0" in step or step["sae.initial_threshold"] is not None:
        return step
    return step | {"sae.initial_threshold": 0.01}


def check_same(where: str, was: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises ConfigError where a record is of another job, or of more steps, than what is asked
    for.
    """
    cure = "name another output folder, or remove that job's"
    if found := difference(_resolved(was["step"]), now["step"], defaults=_defaults()):
        go_on = f"set {found.part}={found.was} to go on, " if found.part in _BEFORE else ""
        raise ConfigError(f"{found} in {where}; {go_on}{cure}")
    if found := other_rows(was["store"], now["store"]):
        source = now["step"]["train.source"]
        raise ConfigError(f"the {source}'s {found}, which {where} tells; {cure}")
    told = was.get("target_rows"), now.get("target_rows")
    # As of the input's: with identities a store that was made anew may round otherwise.
    has_parts = was["store"]["parts"] and now["store"]["parts"]
    if all(told) and not has_parts and (found := difference(*({"rows": one} for one in told))):
        raise ConfigError(f"train.target's {found}, which {where} tells; {cure}")


def check_same_job(job: Job, rows: Rows, device: torch.device) -> None:
    """Raises ConfigError where the folder holds a job of another config or of other rows, or one
    that was trained for longer; tells of other versions in a log line.
    """
    assert job.config.train is not None
    # Read in any case: a damaged one is told.
    before, names = read_job(job.folder), read_store_config(job.folder)
    now, newest = made_of(job.config, rows, device), None
    for where, was in records(job.folder):
        check_same(where, was, now)
        newest = was
    if newest is not None:
        tell_other_versions(str(job.folder), newest["versions"])
        _check_not_shorter(job, now["total_steps"])
    elif before is not None and before.train is not None and before.sae is not None:
        logger.info("%s is older than identities: its config alone is compared", job.folder)
        hookpoint = before.train.hookpoint
        if hookpoint != job.config.train.hookpoint:
            raise ConfigError(
                f"train.hookpoint={job.config.train.hookpoint!r} differs from {hookpoint!r} in "
                f"{job.folder}/job.yaml; name another output folder, or remove that job's"
            )
        old = before.model_copy(update={"train": _before(before.train)})
        was = made_of(old, rows, device)
        if checkpoint.newest_info(job.folder / "checkpoints") or (job.folder / "sae").is_dir():
            # One without either has nothing to go on with.
            was["step"] |= _BEFORE
        was["store"] = {"parts": {}, "rows": None, "names": names or rows.config}
        check_same(f"{job.folder}/job.yaml", was, now)
        _check_not_shorter(job, now["total_steps"])


def _check_not_shorter(job: Job, total_steps: int) -> None:
    sae, info = read(job.folder / "sae"), checkpoint.newest_info(job.folder / "checkpoints")
    made = max(sae["total_steps"] if sae else 0, info["step"] if info else 0)
    assert job.config.train is not None
    if made > total_steps:
        raise ConfigError(
            f"train.num_tokens={job.config.train.num_tokens} is {total_steps} steps, but "
            f"{job.folder} has been trained for {made}; raise it, or name another output folder"
        )


def tell_longer(job: Job, was: dict[str, Any], step: int, peak: float) -> None:
    """One log line where a run goes on towards another number of tokens than it began with."""
    cfg, before = job.config.train, int(was["total_steps"])
    assert cfg is not None
    total = _steps(cfg)
    if total == before:
        return
    rates = [lr_at(step, steps, peak, cfg) for steps in (before, total)]
    logger.info(
        "%s: train.num_tokens was %d, is %d: step %d of now %d goes on at a learning rate of %.3g, "
        "not %.3g%s",
        job.name, was["num_tokens"], cfg.num_tokens, step, total, rates[1], rates[0],
        f", which falls to 0 over the last {round(total * cfg.decay_fraction)} steps"
        if cfg.schedule == "warmup_stable_decay" else "",
    )  # fmt: skip


def is_finished(job: Job, *, whole: bool) -> bool:
    """Whether a job's SAE, which is whole or not, has been trained for as long as is asked for."""
    if not whole:
        return False
    assert job.config.train is not None
    cfg, record = job.config.train, read(job.folder / "sae")
    if record is None:
        # Older than these records, or cut off before it was written.
        before = read_job(job.folder)
        if read(job.folder) is not None:
            return False
        return before is None or before.train is None or _steps(before.train) >= _steps(cfg)
    return int(record["total_steps"]) >= _steps(cfg)


def _steps(cfg: TrainConfig) -> int:
    return -(-cfg.num_tokens // cfg.batch_tokens)
