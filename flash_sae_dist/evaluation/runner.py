"""Evaluates every finished SAE under an output folder, divided among the processes."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate.utils import gather_object
from torch import Tensor

from ..activations.language_model import LanguageModel, check_has_loss, load_language_model
from ..activations.loader import ActivationLoader
from ..activations.store import ActivationStore
from ..activations.text import TokenTable, held_out_table
from ..config import Config, ConfigError, EvaluateConfig, UserError
from ..config_file import parse_config
from ..models.topk import CONFIG_FILE, TopKSAE
from ..progress import progress_bar
from .loss_recovered import LossMeter
from .metrics import measure
from .report import evaluation_record, write_evaluation, write_report


class FinishedSAE(NamedTuple):
    """A trained SAE on disk."""

    name: str
    folder: Path
    hookpoint: str

    def check_fits(self, store: ActivationStore) -> None:
        """Raises ConfigError where the store holds other activations than it was trained on."""
        try:
            d_in = json.loads((self.folder / "sae" / CONFIG_FILE).read_text())["d_in"]
        except (OSError, KeyError, json.JSONDecodeError) as e:
            raise ConfigError(f"{self.folder}/sae is damaged ({e}); train it anew") from e
        width = store.width(self.hookpoint)
        if d_in != width:
            raise ConfigError(
                f"{self.folder}: the SAE is of width {d_in}, but {self.hookpoint} in {store.path} "
                f"of {width}; name the store it was trained on"
            )

    def load(self, device: torch.device | str = "cpu") -> TopKSAE:
        """The SAE itself. Raises UserError where its files are damaged."""
        try:
            return TopKSAE.load(self.folder / "sae", device=device)
        except ValueError as e:
            raise UserError(str(e)) from e


def finished_saes(output: Path) -> list[FinishedSAE]:
    """SAEs under a folder, by name. Raises ConfigError where there are none."""
    found = []
    for file in sorted(output.glob(f"**/sae/{CONFIG_FILE}")):
        folder = file.parents[1]
        if not (folder / "job.yaml").is_file():
            raise ConfigError(
                f"{folder} holds an SAE but no job.yaml, which tells its hookpoint; "
                "train it anew or move it out of output"
            )
        config = parse_config(yaml.safe_load((folder / "job.yaml").read_text()), str(folder))
        assert config.train is not None
        name = str(folder.relative_to(output))
        found.append(FinishedSAE(name, folder, str(config.train.hookpoint)))
    if not found:
        raise ConfigError(
            f"output={str(output)!r} holds no finished SAE; run `train` or `grid` first"
        )
    return found


def run_evaluation(config: Config, accelerator: Any) -> list[dict[str, Any]]:
    """Measures all finished SAEs and writes the report; returns its records on every process.
    Collective.
    """
    cfg, output = config.evaluate, Path(config.output)
    saes = finished_saes(output)
    store = ActivationStore.open(config.store_path())
    for sae in saes:
        sae.check_fits(store)
    rank, world = accelerator.process_index, accelerator.num_processes
    # Neighbours share a hookpoint, and with it the clean and the zero loss.
    saes.sort(key=lambda s: s.hookpoint)
    mine = saes[len(saes) * rank // world : len(saes) * (rank + 1) // world]
    lm, text = None, None
    if cfg.loss_sequences:
        lm, text = _language_model(config, store, accelerator.device)
    passes = len(mine) + 2 * len({s.hookpoint for s in mine})
    num_tokens = min(cfg.num_tokens, store.rows)
    work = num_tokens * len(mine) + (text.ids.size * passes if text is not None else 0)
    meters: dict[str, LossMeter] = {}
    records = []
    with progress_bar("evaluate", work, "tokens", accelerator.is_main_process) as bar:
        for sae in mine:
            if lm is not None and text is not None and sae.hookpoint not in meters:
                assert config.cache is not None
                meters[sae.hookpoint] = LossMeter(
                    lm, sae.hookpoint, text, config.cache.batch_sequences, bar.advance
                )
            meter = meters.get(sae.hookpoint)
            records.append(_evaluate(sae, cfg, store, meter, accelerator.device, bar.advance))
    everyone: list[dict[str, Any]] = gather_object(records) if world > 1 else records
    everyone.sort(key=lambda r: r["job"])
    if accelerator.is_main_process:
        write_report(output, everyone)
    accelerator.wait_for_everyone()
    return everyone


def _language_model(
    config: Config, store: ActivationStore, device: torch.device
) -> tuple[LanguageModel, TokenTable]:
    config.need("model", "text", "cache", verb="evaluate")
    assert config.model is not None
    assert config.text is not None
    assert config.cache is not None
    lm = load_language_model(config.model, device)
    check_has_loss(lm)
    table = held_out_table(
        config.text,
        lm.tokenizer,
        context_length=config.cache.context_length,
        causal=lm.causal,
        drop_special_tokens=config.cache.drop_special_tokens,
        after_documents=store.num_documents(),
        num_sequences=config.evaluate.loss_sequences,
    )
    return lm, table


def _evaluate(
    found: FinishedSAE,
    cfg: EvaluateConfig,
    store: ActivationStore,
    meter: LossMeter | None,
    device: torch.device,
    advance: Callable[[int], None],
) -> dict[str, Any]:
    sae = found.load(device)
    # Never more than the store holds: a row measured twice is no new evidence.
    num_tokens = min(cfg.num_tokens, store.rows)
    # Passes of equal size: less than a row a pass is left out, not most of a pass.
    num_steps = -(-num_tokens // cfg.batch_tokens)
    loader = ActivationLoader(
        store,
        found.hookpoint,
        batch_tokens=num_tokens // num_steps,
        seed=-1 & 0x7FFFFFFF,
        num_steps=num_steps,
        device=device,
    )

    def batches() -> Iterator[Tensor]:
        for batch in loader:
            yield batch
            advance(len(batch))

    with loader:
        metrics = measure(sae, batches())
    loss = meter.measure(sae) if meter is not None else None
    record = evaluation_record(found.name, found.hookpoint, sae.k, sae.d_sae, metrics, loss)
    write_evaluation(found.folder, record)
    return json.loads(json.dumps(record))  # type: ignore[no-any-return]
