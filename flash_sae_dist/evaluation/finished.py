"""Trained SAEs on disk, and whether a store and a model are those they were trained on."""

from __future__ import annotations

import fnmatch
import logging
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..activations.harvest import store_config
from ..activations.language_model import LanguageModel
from ..activations.origin import MODEL_PARTS, loaded_parts, model_parts, row_parts
from ..activations.store import ActivationStore
from ..config.base import ConfigError, UserError, nearest_name, sources_of
from ..files import check_readable
from ..identity import Difference, difference
from ..models import load_sae
from ..models.base import SparseCoder
from ..models.saved import CONFIG_FILE, read_spec
from ..training import made_of
from ..training.job import Config
from ..training.metrics import read_metrics
from ..training.records import DamagedRecordError, job_folders, read_job, read_store_config

logger = logging.getLogger(__name__)
# What an activation is, of whatever text: another model's are other numbers, and positions that
# training left out (special tokens, places beyond the context) are outliers to the SAE.
_ROW_KEYS = (
    "model.name",
    "model.revision",
    "model.gguf_file",
    "cache.context_length",
    "cache.drop_special_tokens",
)
_NO_LOSSES = "evaluate.loss_sequences=0 to measure no losses"


class FinishedSAE(NamedTuple):
    """A trained SAE on disk."""

    name: str
    folder: Path
    hookpoint: str  # of a crosscoder several, joined by +
    target: str | None = None  # of a transcoder

    @property
    def hookpoints(self) -> list[str]:
        """All whose rows it takes or gives."""
        return [*sources_of(self.hookpoint), *([] if self.target is None else [self.target])]

    def check_fits(self, store: ActivationStore) -> None:
        """Raises ConfigError where the store's rows are other than those it was trained on: of
        another model, of other positions, of another width. Rows of another text are allowed.
        """
        trained_on, record = read_store_config(self.folder) or {}, self.made_of()
        before, now = record["store"]["parts"] if record else {}, store.made_of()["parts"]
        if before and now:
            other = difference(before, now, MODEL_PARTS)
        else:
            if store.knows_model():
                logger.info(
                    "%s or the store is older than identities: names are compared", self.name
                )
            other = next(iter(_differences(trained_on, store.config)), None)
        if other:
            raise ConfigError(
                f"store={store.path!r} has {other.part}={other.now!r}, but {self.folder} was "
                f"trained on {other.was!r}; name the store it was trained on"
            )
        check_readable(self.folder / "sae" / CONFIG_FILE)
        try:
            spec = read_spec(self.folder / "sae")
            widths = [*spec.get("sources", [spec["d_in"]]), spec.get("d_out")]
        except (OSError, KeyError, TypeError, ValueError) as e:
            raise ConfigError(f"{self.folder}/sae is damaged ({e}); train it anew") from e
        names = [*sources_of(self.hookpoint), self.target]
        for name, own in zip(names, widths, strict=True):
            if name is not None and own != (width := store.width(name)):
                raise ConfigError(
                    f"{self.folder}: the SAE is of width {own}, but {name} in {store.path} "
                    f"of {width}; name the store it was trained on"
                )

    def made_of(self) -> dict[str, Any] | None:
        """What it was made of; None for an SAE that is older than such records."""
        return made_of.read(self.folder / "sae") or made_of.read(self.folder)

    def architecture(self) -> str:
        """Its name in `sae.architecture`. Raises UserError where the files are damaged."""
        return str(self.spec()["architecture"])

    def spec(self) -> dict[str, Any]:
        """Its architecture, widths and keys. Raises UserError where the files are damaged."""
        try:
            spec = read_spec(self.folder / "sae")
            spec["architecture"]
        except (OSError, KeyError, TypeError, ValueError) as e:
            raise UserError(f"{self.folder}/sae is damaged ({e}); train it anew") from e
        return spec

    def metrics(self) -> list[dict[str, float]]:
        """What training logged, oldest first: `step`, `tokens`, `fvu`, `l0` and others."""
        return read_metrics(self.folder / "metrics.jsonl")

    def load(self, device: torch.device | str = "cpu") -> SparseCoder:
        """The SAE itself. Raises UserError where its files are damaged."""
        try:
            return load_sae(self.folder / "sae", device=device)
        except ValueError as e:
            raise UserError(str(e)) from e


def _differences(before: dict[str, Any], now: dict[str, Any]) -> list[Difference]:
    return [
        Difference(key, before[key], now[key])
        for key in _ROW_KEYS
        if key in before and key in now and before[key] != now[key]
    ]


def check_same_model(config: Config, store: ActivationStore) -> None:
    """Raises ConfigError where the sections model and cache would give other rows than the store's:
    losses would be those of another model than the SAEs' own. Loads no model: its files are
    compared where they are found.
    """
    assert config.model is not None
    parts = store.made_of()["parts"]
    found = model_parts(config.model)
    other = difference(parts, row_parts(config) | (found or {}), MODEL_PARTS)
    if other is None and (found is None or not parts):
        # Without the files, names are all there is: another one's would be downloaded first.
        other = next(iter(_differences(store.config, store_config(config))), None)
    if other is not None:
        raise _of_another_model(other, store, _NO_LOSSES)


def check_loaded_model(
    config: Config, lm: LanguageModel, store: ActivationStore, cure: str = _NO_LOSSES
) -> None:
    """`check_same_model` of a loaded model and its tokenizer. cure: what else there is to set.
    Raises ConfigError.
    """
    assert config.model is not None
    now = loaded_parts(config.model, lm)
    if other := difference(store.made_of()["parts"], now, MODEL_PARTS):
        raise _of_another_model(other, store, cure)


def _of_another_model(other: Difference, store: ActivationStore, cure: str) -> ConfigError:
    return ConfigError(f"{other} in the store {store.path}; set it to that, or {cure}")


def warn_of_other_text(config: Config, store: ActivationStore) -> None:
    """Tells where losses will be of another text than the store's rows, which is allowed."""
    for key, asked in store_config(config).items():
        was = store.config.get(key, asked)
        if key.startswith("text.") and key != "text.streaming" and was != asked:
            logger.warning(
                "%s=%r differs from %r in the store %s: losses are of another text than its rows",
                key,
                asked,
                was,
                store.path,
            )


def finished_saes(output: Path) -> list[FinishedSAE]:
    """SAEs under a folder, by name. Raises ConfigError where there are none, DamagedRecordError
    where a job.yaml is damaged.
    """
    found = []
    for folder in job_folders(output):
        if not (folder / "sae" / CONFIG_FILE).is_file():
            continue
        if not (folder / "job.yaml").is_file():
            raise ConfigError(
                f"{folder} holds an SAE but no job.yaml, which tells its hookpoint; "
                "train it anew or move it out of output"
            )
        found.append(FinishedSAE(str(folder.relative_to(output)), folder, *_hookpoints(folder)))
    if not found:
        raise ConfigError(
            f"output={str(output)!r} holds no finished SAE; run `train` or `grid` first"
        )
    return found


def named_saes(saes: list[FinishedSAE], patterns: tuple[str, ...], key: str) -> list[FinishedSAE]:
    """The SAEs that patterns name, `*` being any text. Raises ConfigError, naming the key, for one
    that names none.
    """
    names, chosen = [found.name for found in saes], set[str]()
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ConfigError(
                f"{key}: {pattern!r} is no finished SAE{nearest_name(pattern, names)}"
            )
        chosen |= set(matched)
    return [found for found in saes if found.name in chosen]


def _hookpoints(folder: Path) -> tuple[str, str | None]:
    """What job.yaml says. Raises DamagedRecordError where it does not."""
    config = read_job(folder)
    if config is None or config.train is None or config.train.hookpoint is None:
        raise DamagedRecordError(
            f"{folder / 'job.yaml'} is damaged (it has no train.hookpoint); restore it or train "
            "that SAE anew"
        )
    return config.train.hookpoint, config.train.target
