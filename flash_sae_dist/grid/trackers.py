"""accelerate's trackers: started once, fed with the metrics of many SAEs."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..config.base import ConfigError, nearest_name
from ..parallel import agree


def _safe(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_/-]", "_", name)


def safe_names(jobs: list[str]) -> dict[str, str]:
    """Names of jobs that every tracker keeps as they are, no two alike: TensorBoard turns `=`, `,`
    and `:` into `_`, wandb takes a dot for a level and a `*` for a pattern.
    """
    names: dict[str, str] = {}
    for job in jobs:
        name = unique = _safe(job)
        number = 2
        while unique in names.values():
            unique, number = f"{name}_{number}", number + 1
        names[job] = unique
    return names


def _project(trackers: list[Any]) -> str:
    """wandb's project is where its users have said; accelerate would name another."""
    asked = os.environ.get("WANDB_PROJECT")
    return asked if asked and "wandb" in trackers else "flash_sae_dist"


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config by dotted key, of values that every tracker takes: what is none is text."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            flat[prefix + key] = value if plain else str(value)
    return flat


# Of these each SAE is a run of its own; others take one run of a launch.
_WITH_RUNS = ("tensorboard", "wandb")


def check_trackers(names: tuple[str, ...]) -> None:
    """Raises ConfigError for a tracker that accelerate does not know or that is not installed.

    They are started once all else has been checked.
    """
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    installed = [tracker.value for tracker in get_available_trackers()]
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            known = sorted(LOGGER_TYPE_TO_CLASS)
            raise ConfigError(f"trackers: {name!r} is no tracker{nearest_name(name, known)}")
        if name not in installed:
            raise ConfigError(
                f"trackers: {name!r} is not installed; pip install {name}, or drop it from the list"
            )


class Trackers:
    """What a launch logs to. Everything happens on the main process; elsewhere it is silent.

    In TensorBoard and wandb each SAE is a run with its own resolved config and metrics by their
    plain names; those of a launch are in one group. Other trackers get one run, in which metrics
    are called `job/metric`.
    """

    def __init__(
        self,
        accelerator: Any,
        configs: dict[str, dict[str, Any]],  # the resolved one of each job that is trained
        group: str = "train",
        *,
        names: Sequence[str] = (),  # of all jobs of the launch, finished ones too
    ) -> None:
        """Raises ConfigError for a tracker that cannot start, such as wandb without a login."""
        self.accelerator, self._names = accelerator, safe_names(list(names or configs))
        self._runs: dict[str, list[Any]] = {}
        # Of jobs whose run in TensorBoard begins with what is logged first.
        self._waiting: dict[str, dict[str, Any]] = {}
        if not accelerator.log_with:
            return
        kinds = [str(getattr(t, "value", t)) for t in accelerator.log_with]
        error = None
        try:
            if accelerator.is_main_process:
                self._start(kinds, configs, group)
        except Exception as e:  # each tracker has errors of its own
            # Those that did start would be left running.
            for tracker in accelerator.trackers:
                with suppress(Exception):
                    tracker.finish()
            accelerator.trackers.clear()
            self._runs.clear()
            error = ConfigError(
                f"trackers: {', '.join(kinds)} cannot start: {' '.join(str(e).split())}; log in, "
                "or drop it from the list"
            )
        agree.raise_together(error)

    def _start(self, names: list[str], configs: dict[str, dict[str, Any]], group: str) -> None:
        others = [t for t in self.accelerator.log_with if str(getattr(t, "value", t)) in
                  set(names) - set(_WITH_RUNS)]  # fmt: skip
        self.accelerator.trackers = []
        if others:
            asked, self.accelerator.log_with = self.accelerator.log_with, others
            shared = next(iter(configs.values()), {})
            self.accelerator.init_trackers(_project(others), config=_flat(shared))
            self.accelerator.log_with = asked
        for job, config in configs.items():
            self._runs[job] = [self._wandb(job, _flat(config), group)] if "wandb" in names else []
            if "tensorboard" in names:
                self._waiting[job] = _flat(config)
        if self._waiting:
            # Their runs begin later; what would keep them from it shows now.
            from torch.utils.tensorboard import SummaryWriter as SummaryWriter

            Path(self.accelerator.logging_dir).mkdir(parents=True, exist_ok=True)

    def _wandb(self, job: str, config: dict[str, Any], group: str) -> Any:
        """A run of its own, among the accelerator's trackers from its start on."""
        options = {"name": self._names[job], "group": group, "reinit": "create_new"}
        return self._started("wandb", _project(["wandb"]), config=config, **options)

    def _started(self, kind: str, *args: Any, **options: Any) -> Any:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        run = LOGGER_TYPE_TO_CLASS[kind](*args, **options)
        run.start()
        self.accelerator.trackers.append(run)
        return run

    def _tensorboard(self, job: str, config: dict[str, Any], first: int) -> Any:
        """`_wandb` in TensorBoard, of what is logged from a step on: an earlier launch may have
        logged it before.
        """
        from torch.utils.tensorboard.summary import hparams

        name, folder = f"{_project([])}/{self._names[job]}", self.accelerator.logging_dir
        run = self._started("tensorboard", name, folder, purge_step=first)
        # As the run's own: accelerate's way, `add_hparams`, makes another run beside it, which
        # stays empty.
        for summary in hparams(config, {}):  # type: ignore[no-untyped-call]
            run.writer.file_writer.add_summary(summary)
        return run

    def finish(self) -> None:
        """Sends what is left; nothing is logged afterwards."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()
        self._runs.clear()

    def log(self, job: str, values: dict[str, float], step: int) -> None:
        """Sends a job's metrics of a step."""
        if job in self._waiting:
            self._runs[job].append(self._tensorboard(job, self._waiting[job], step))
            del self._waiting[job]
        for tracker in self._runs.get(job, []):
            tracker.log(values, step=step)
        name = self._names.setdefault(job, _safe(job))
        named = {f"{name}/{metric}": value for metric, value in values.items()}
        for tracker in self.accelerator.trackers:
            if tracker.name not in _WITH_RUNS:
                tracker.log(named, step=step)
