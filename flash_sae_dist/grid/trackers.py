"""accelerate's trackers: started once, fed with the metrics of many SAEs."""

from __future__ import annotations

from typing import Any

from ..config.base import ConfigError
from ..parallel import agree


class Trackers:
    """What a launch logs to. Everything happens on the main process; elsewhere it is silent."""

    def __init__(self, accelerator: Any, job_names: list[str]) -> None:
        """Starts the trackers. Raises ConfigError for one that cannot start, such as wandb without
        a login.
        """
        self.accelerator = accelerator
        if not accelerator.log_with:
            return
        names = ", ".join(str(getattr(t, "value", t)) for t in accelerator.log_with)
        error = None
        try:
            accelerator.init_trackers("flash_sae_dist")
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
                        tracker.tracker.define_metric(f"{job}/*", step_metric=f"{job}/step")

    def finish(self) -> None:
        """Sends what is left; nothing is logged afterwards."""
        for tracker in self.accelerator.trackers:
            tracker.finish()
        self.accelerator.trackers.clear()

    def log(self, job: str, values: dict[str, float], step: int) -> None:
        """Sends a job's metrics of a step, as `job/metric`."""
        named = {f"{job}/{name}": value for name, value in values.items()}
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                # It drops a step below the last one, and each SAE of a grid counts from 1.
                tracker.log({**named, f"{job}/step": step})
            else:
                tracker.log(named, step=step)
