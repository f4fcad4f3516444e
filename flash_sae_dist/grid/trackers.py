"""accelerate's trackers: started once, fed with the metrics of many SAEs."""

from __future__ import annotations

import os
import re
from typing import Any

from ..config.base import ConfigError
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


def _project(names: str) -> str:
    """wandb's project is where its users have said; accelerate would name another."""
    asked = os.environ.get("WANDB_PROJECT")
    return asked if asked and "wandb" in names.split(", ") else "flash_sae_dist"


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


class Trackers:
    """What a launch logs to. Everything happens on the main process; elsewhere it is silent."""

    def __init__(
        self, accelerator: Any, job_names: list[str], config: dict[str, Any] | None = None
    ) -> None:
        """Starts the trackers and gives them the resolved config as hyperparameters. Raises
        ConfigError for one that cannot start, such as wandb without a login.
        """
        self.accelerator, self._names = accelerator, safe_names(job_names)
        if not accelerator.log_with:
            return
        names = ", ".join(str(getattr(t, "value", t)) for t in accelerator.log_with)
        error = None
        try:
            accelerator.init_trackers(_project(names), config=_flat(config or {}))
        except Exception as e:  # each tracker has errors of its own
            accelerator.trackers.clear()  # half-made ones cannot be ended
            error = ConfigError(
                f"trackers: {names} cannot start: {' '.join(str(e).split())}; log in, or drop it "
                "from the list"
            )
        agree.raise_together(error)
        if accelerator.is_main_process:
            for tracker in accelerator.trackers:
                if tracker.name == "wandb":
                    for job in job_names:
                        name = self._names[job]
                        tracker.tracker.define_metric(f"{name}/*", step_metric=f"{name}/step")

    def finish(self) -> None:
        """Sends what is left; nothing is logged afterwards."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()

    def log(self, job: str, values: dict[str, float], step: int) -> None:
        """Sends a job's metrics of a step, as `job/metric`, the job by its safe name."""
        job = self._names.setdefault(job, _safe(job))
        named = {f"{job}/{name}": value for name, value in values.items()}
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                # It drops a step below the last one, and each SAE of a grid counts from 1.
                tracker.log({**named, f"{job}/step": step})
            else:
                tracker.log(named, step=step)
