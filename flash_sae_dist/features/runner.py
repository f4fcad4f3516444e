"""Looks at the latents of finished SAEs, divided among the processes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..activations.language_model import LanguageModel, load_language_model, load_tokenizer
from ..activations.store import ActivationStore, store_of
from ..config.base import ConfigError, sources_of
from ..config.run import FeaturesConfig
from ..evaluation.finished import FinishedSAE, check_loaded_model, finished_saes, named_saes
from ..evaluation.results import write_results
from ..files import check_space, check_writable, locked
from ..identity import versions
from ..models.base import SparseCoder
from ..models.crosscoder import Crosscoder
from ..models.saved import read_spec
from ..parallel import agree
from ..parallel.mesh import local_processes
from ..progress import progress_bar
from ..training.job import Config
from ..training.made_of import rows_made_of
from ..training.metrics import read_metrics
from .collect import Collected, collect
from .directions import nearest_latents, output_tokens
from .line_processes import line_processes, num_processes
from .page import FeatureFiles
from .pairs import LEFTOVERS, PairSpool
from .records import Directions, latent_lines
from .texts import Texts, open_texts
from .words import Words

logger = logging.getLogger(__name__)
FOLDER = "features"
_CURE = "features.output_tokens=0 to leave its output tokens out, with the tokenizer alone"


class _Model(NamedTuple):
    """What is used of a language model."""

    tokenizer: Any | None = None
    unembedding: Tensor | None = None  # [V, D]


def run_features(config: Config, accelerator: Any) -> list[Path]:
    """Writes the folder `features` of every SAE that config.features.saes names, and returns those
    of this process. Collective.

    Raises ConfigError before any work where a name or a latent is not there, or the store or the
    model is not the SAEs' own.
    """
    cfg, output = config.features, Path(config.output)
    saes = chosen_saes(finished_saes(output), cfg)
    store = agree.after_first(lambda: store_of(config))
    for found in saes:
        found.check_fits(store)
    agree.first_checks(lambda: _remove_leftovers(output))
    together = min(accelerator.num_processes, len(saes))
    agree.first_checks(lambda: _check_disk(output, saes, cfg, store, together))
    mine = saes[accelerator.process_index :: accelerator.num_processes]
    model = agree.together(lambda: _open_model(config, store, accelerator.device))
    num_rows = min(cfg.num_tokens, store.rows)
    written = []
    with progress_bar(
        "features", num_rows * len(mine), "tokens", accelerator.is_main_process
    ) as bar:
        texts = open_texts(store, num_rows) if mine else None
        for found in mine:
            assert texts is not None
            sae = found.load(accelerator.device)
            written.append(_look_at(found, sae, cfg, store, model, texts, bar.advance))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        # Its report links to them.
        write_results(output)
    return written


def chosen_saes(saes: list[FinishedSAE], cfg: FeaturesConfig) -> list[FinishedSAE]:
    """The SAEs that features.saes names. Raises ConfigError for a pattern that names none, or a
    latent that one of them has not.
    """
    kept = named_saes(saes, cfg.saes, "features.saes")
    for found in kept if cfg.latents is not None else []:
        d_sae = read_spec(found.folder / "sae")["d_sae"]
        if (largest := max(cfg.latents or (), default=-1)) >= d_sae:
            raise ConfigError(
                f"features.latents: {largest} is no latent of {found.name}, which has 0 .. "
                f"{d_sae - 1}; drop it, or name other SAEs in features.saes"
            )
    return kept


def _remove_leftovers(output: Path) -> None:
    """Removes the pairs that killed runs left beside any SAE, chosen this time or not."""
    for folder in (found.folder / FOLDER for found in finished_saes(output)):
        if not any(folder.glob(LEFTOVERS)):
            continue
        try:
            with locked(folder):
                for path in folder.glob(LEFTOVERS):
                    path.unlink(missing_ok=True)
        except ConfigError as e:
            # They are no leftovers: another run is at it.
            logger.info("%s", e)


def _check_disk(
    output: Path,
    saes: list[FinishedSAE],
    cfg: FeaturesConfig,
    store: ActivationStore,
    together: int,
) -> None:
    """Raises ConfigError where nothing can be written, or the pairs of as many SAEs as are looked
    at together do not fit.
    """
    check_writable("output", output)
    actives = sum(sorted(map(_actives, saes))[-together:])
    needed = 8 * actives * min(cfg.num_tokens, store.rows)
    check_space("output", output, needed, "active latents of a pass (features.num_tokens)")


def _actives(found: FinishedSAE) -> int:
    """Active latents a token: k, or L0 at the end of training; 100 where neither is known."""
    if k := read_spec(found.folder / "sae").get("k"):
        return int(k)
    lines = read_metrics(found.folder / "metrics.jsonl")
    l0 = float(lines[-1].get("l0", math.nan)) if lines else math.nan
    return math.ceil(l0) if math.isfinite(l0) else 100


def _open_model(config: Config, store: ActivationStore, device: torch.device) -> _Model:
    """Tokenizer and unembedding, as far as the config asks for them and the model has them; what
    is left out is logged. Raises ConfigError where it is not the store's model.
    """
    if config.model is None:
        logger.warning(
            "the config has no section model: tokens are shown as numbers, and the output tokens "
            "that a latent raises are left out"
        )
        return _Model()
    if config.features.output_tokens == 0:
        return _Model(load_tokenizer(config.model))
    lm = load_language_model(config.model, device)
    check_loaded_model(config, lm, store, cure=_CURE)
    return _Model(lm.tokenizer, _unembedding(lm))


def _unembedding(lm: LanguageModel) -> Tensor | None:
    found: Any = getattr(lm.model, "get_output_embeddings", lambda: None)()
    weight = getattr(found, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2 or weight.is_meta:
        logger.warning("the model has no unembedding: raised output tokens are left out")
        return None
    return weight.detach()


def _look_at(
    found: FinishedSAE,
    sae: SparseCoder,
    cfg: FeaturesConfig,
    store: ActivationStore,
    model: _Model,
    texts: Texts,
    advance: Callable[[int], None],
) -> Path:
    """Writes what is known of one SAE's latents."""
    folder = found.folder / FOLDER
    words = Words(model.tokenizer)
    latents = sae.d_sae if cfg.latents is None else len(set(cfg.latents))
    count = num_processes(latents, local_processes())
    with locked(folder), PairSpool(folder) as spool, line_processes(count) as processes:
        kept = collect(sae, store, found.hookpoint, cfg, spool, advance)
        directions = _directions(found, sae, kept, cfg, model)
        left_out = [] if directions.raised is not None else ["raised", "lowered"]
        summary = _summary(found, sae, store, kept, left_out)
        with FeatureFiles(folder, summary) as files:
            around = cfg.context_tokens
            for line in latent_lines(kept, directions, spool, texts, words, around, processes):
                files.add(line)
            files.finish()
    return folder


def _directions(
    found: FinishedSAE, sae: SparseCoder, kept: Collected, cfg: FeaturesConfig, model: _Model
) -> Directions:
    near, weight = nearest_latents(sae.W_dec, kept.latents, cfg.nearest), model.unembedding
    if weight is not None and weight.shape[1] != sae.d_out:
        logger.warning(
            "%s: raised output tokens are left out, as its decoder's rows are of width %d and the "
            "model's unembedding of %d", found.name, sae.d_out, weight.shape[1],
        )  # fmt: skip
        weight = None
    if isinstance(sae, Crosscoder):
        names = tuple(sources_of(found.hookpoint))
        return Directions(near, None, None, names, sae.decoder_norms(sae.W_dec)[kept.latents])
    if weight is None:
        return Directions(near, None, None)
    rows = sae.W_dec[kept.latents]
    return Directions(near, *output_tokens(rows, weight.to(rows.device), cfg.output_tokens))


def _summary(
    found: FinishedSAE,
    sae: SparseCoder,
    store: ActivationStore,
    kept: Collected,
    left_out: list[str],
) -> dict[str, Any]:
    made, rows = found.made_of(), rows_made_of(store, found.hookpoint)
    return {
        "sae": found.name,
        "hookpoint": found.hookpoint,
        "spec": sae.spec(),
        "model": store.config.get("model.name"),
        "tokens": kept.counts.tokens,
        "latents": len(kept.latents),
        "never_fired": int((kept.counts.fired() == 0).sum()),
        "left_out": left_out,
        "made_of": {
            "sae": made["digest"] if made else None,
            "store": {"parts": rows["parts"], "rows": rows["rows"]},
            "versions": versions(),
        },
    }
