"""What every verb shares: its command line, its processes, and errors told in one sentence."""

from __future__ import annotations

import faulthandler
import inspect
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from .. import ending
from ..config.base import ConfigError

if TYPE_CHECKING:
    from ..training.job import Config

ConfigArgument = Annotated[
    str, typer.Argument(metavar="CONFIG.yaml", help="YAML file; `flash-sae keys` lists its keys.")
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Replace values: train.batch_tokens=8192 sae.k=64",
    ),
]
Run = Callable[["Config"], None]


DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure, too.")]
_CODES = """Exit codes: 0 done, 1 a failure (what was kept is said), 2 a mistake found before any
work, 143 or 130 stopped by SIGTERM or SIGINT (Ctrl-C)."""


def command(run: Run) -> Callable[[str, list[str] | None, bool], None]:
    """A verb's typer command: a mistake ends it in one sentence and exit code 2, a failure of
    anything but this code in one sentence and exit code 1, a signal in one sentence and 128 + its
    number. A fault of our own keeps its traceback.
    """

    def verb(
        config: ConfigArgument, overrides: OverridesArgument = None, debug: DebugOption = False
    ) -> None:
        def work() -> None:
            # Not at the top: `--help` need not wait for torch.
            from ..training.job import load_config

            run(load_config(*words_of(config, overrides or [])))

        end_well(work, debug)

    verb.__doc__ = help_text(run.__doc__)
    return verb


def words_of(config: str, overrides: list[str]) -> tuple[str | None, list[str]]:
    """The config's file, None where the command line has keys alone, and its keys, each `SAE=PATH`
    among them a path of evaluate.saes.
    """
    file: str | None = config
    if "=" in config and not os.path.isfile(config):
        file, overrides = None, [config, *overrides]
    saes = [word.removeprefix("SAE=") for word in overrides if word.startswith("SAE=")]
    if not saes:
        return file, overrides
    rest = [word for word in overrides if not word.startswith("SAE=")]
    return file, [*rest, f"evaluate.saes={json.dumps(saes)}"]


def help_text(doc: str | None) -> str:
    """A docstring as the help of a verb, with the exit codes behind it."""
    # Paragraphs on one line: the terminal's width breaks them.
    paragraphs = [*inspect.cleandoc(doc or "").split("\n\n"), _CODES]
    # Rich takes what is in brackets for markup.
    return escape("\n\n".join(" ".join(p.split()) for p in paragraphs))


def end_well(work: Callable[[], None], debug: bool) -> None:
    """Does a verb's work, and ends the process with its exit code where that is not 0."""
    with ending.listening(_tell):
        _prepare_process()
        code = _outcome(work, debug)
    # Not in the handler, where the error still keeps all that the verb had alive.
    if code and _nccl_is_up():
        # At once: the interpreter's end would wait for kernels that wait for other processes.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def _prepare_process() -> None:
    """What concerns the process as a whole: crashes, logs, bars."""
    # A crash below Python tells where every thread was, but in a notebook, which has no file.
    with suppress(OSError, AttributeError):
        faulthandler.enable()
    # Other libraries' chatter comes once a process; ours is said by one of them.
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("flash_sae_dist").setLevel(logging.INFO)
    if os.environ.get("RANK", "0") != "0":
        # Bars of downloads and of loading weights: one process's are enough.
        os.environ.setdefault("TQDM_DISABLE", "1")


def _outcome(work: Callable[[], None], debug: bool) -> int:
    """Runs a verb; its exit code. Raises what is a fault of our own, where nothing waits for it."""
    try:
        work()
    except ending.StopRequested as e:
        _tell(e.sentence)
        return e.code
    except Exception as e:
        sentence = ending.sentence_of(e)
        if sentence is None and not _nccl_is_up():
            raise
        if sentence is None or debug:
            traceback.print_exc()
        if sentence is not None:
            if is_mistake := isinstance(e, ConfigError):
                _mark_mistake()
            kept = "" if is_mistake else ending.kept()
            _tell(f"error: {sentence}{kept and f'; {kept}'}")
            return 2 if is_mistake else 1
        return 1
    return 0


def _mark_mistake() -> None:
    """Makes the file that launch/hosts/slurm.sbatch looks for: a launcher hides exit codes."""
    if file := os.environ.get("FLASH_SAE_MISTAKE"):
        with suppress(OSError):
            Path(file).touch()


def _tell(sentence: str) -> None:
    """Prints an error once, and hands it to the launcher, whose report of the failed processes is
    what stands last on the terminal."""
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if report:
        # The form that torch.distributed.elastic reads.
        told = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
        with suppress(OSError):
            Path(report).write_text(json.dumps({"message": told}))
    if not report or os.environ.get("RANK", "0") == "0":
        # An argument that is no text comes as surrogates, which no terminal takes.
        typer.echo(sentence.encode(errors="backslashreplace").decode(), err=True)


def verb_main(run: Run) -> None:
    """Entry point of `accelerate launch -m flash_sae_dist.launch.VERB CONFIG.yaml ...`."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command(run))
    app()


def end_with_launcher() -> None:
    """Ends this process when its launcher dies.

    A launcher that is killed cannot end its processes: they would go on, and beside those of the
    same command started again they would write the same files.
    """
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, name="launcher", daemon=True).start()


def _check_devices() -> None:
    """Raises ConfigError where a host has fewer GPUs than processes: NCCL takes one each."""
    import torch
    from accelerate.utils import parse_flag_from_env

    gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if 0 < gpus < local and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        raise ConfigError(
            f"--num_processes puts {local} processes on this host, which has {gpus} GPU(s); "
            f"start at most {gpus} a host, or set ACCELERATE_USE_CPU=1"
        )


def launch_seconds(config: Config) -> tuple[float, float]:
    """train.rendezvous_timeout_s and train.heartbeat_s, or their defaults where a config has no
    section train."""
    from ..config.train import TrainConfig

    if (train := config.train) is not None:
        return train.rendezvous_timeout_s, train.heartbeat_s
    fields = TrainConfig.model_fields
    return fields["rendezvous_timeout_s"].default, fields["heartbeat_s"].default


@contextmanager
def processes(config: Config, *, trackers: bool = False) -> Iterator[Any]:
    """The accelerator of this launch, torn down whatever happens inside.

    Alone, under `accelerate launch` or under torchrun; CPU with gloo where there is no CUDA device.
    """
    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from ..grid.trackers import check_trackers
    from ..parallel.heartbeat import beating
    from ..parallel.rendezvous import come_together

    # Only the agent of accelerate and torchrun stays with its processes: another launcher, such as
    # a shell, may end before what it started.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_launcher()
    _check_devices()
    if trackers:
        check_trackers(config.trackers)
    rendezvous_s, heartbeat_s = launch_seconds(config)
    accelerator = come_together(
        lambda timeout: Accelerator(
            cpu=not torch.cuda.is_available(),
            # A user's own accelerate config may say fp16; the precision is train.precision's.
            mixed_precision="no",
            log_with=(list(config.trackers) or None) if trackers else None,
            project_dir=config.output,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=timeout)],
        ),
        rendezvous_s,
    )
    with _torn_down(accelerator), beating(heartbeat_s, rendezvous_s):
        yield accelerator
        # Together: the launcher ends all when one ends badly, be it at its very end, and the first
        # may still be writing.
        accelerator.wait_for_everyone()


@contextmanager
def _torn_down(accelerator: Any) -> Iterator[None]:
    from ..parallel.mesh import end_groups

    try:
        yield
    except BaseException:
        for tracker in accelerator.trackers:
            with suppress(Exception):
                tracker.finish()
        if not _nccl_is_up():
            end_groups()
        raise
    accelerator.end_training()
    end_groups()


def _nccl_is_up() -> bool:
    """Whether this process is in a group of NCCL's: ending one waits for the other processes, which
    may wait for this one in a collective that it will never enter."""
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_initialized() and dist.get_backend() == "nccl"
