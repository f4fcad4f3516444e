"""What SAEs come to at equal tokens: ours beside SAELens, dictionary_learning and sparsify.

    flash-sae bench quality [STORE] [--python sae_lens=PATH ...] [--json FILE]

All are trained on the same batches of the same rows, each at its own defaults and at its learning
rate times the other factors. FVU is measured on rows that none has seen, at the same mean number of
active latents: the k largest activations a token (topk), or the k N largest of N tokens. Where the
features of the data are known, cosine is the mean over them of the best |cosine| of a decoder row,
and mcc that of a one-to-one matching (SAELens's mean correlation coefficient).
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..config.base import ConfigError
from ..config.train import FusedTrainConfig
from ..models import ARCHITECTURES
from ..parallel.mesh import Mesh
from ..training.defaults import with_defaults
from ..training.metrics import PhaseTimer
from ..training.optim import warmup_steps
from ..training.step import SAETraining
from .bench_quality_data import (
    MIXTURE,
    STORE,
    Data,
    Size,
    mixture,
    of_store,
    synthetic,
    synthetic_job,
)
from .bench_quality_peers import LIBRARIES, batches
from .bench_timing import print_table, write_json

OURS = "ours"
FACTORS = (1.0, 0.3, 3.0)
DATA = ("mixture", "sae_lens", "store")
_CHUNK = 2048
CPU = torch.device("cpu")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)


@app.callback()
def _several() -> None:
    """Quality beside peers."""


class Run(NamedTuple):
    """One training."""

    library: str
    architecture: str
    factor: float  # of the learning rate
    seed: int


class Score(NamedTuple):
    """What it came to."""

    fvu: float
    cosine: float | None
    mcc: float | None
    seconds: float


def train_ours(data: Data, run: Run, keys_of_train: dict[str, Any]) -> dict[str, Tensor]:
    """Ours, at the defaults but for some keys of train and the learning rate's factor."""
    size = data.size
    aims = {"sparsity": "target", "target_l0": size.k}
    keys = aims if run.architecture == "jumprelu" else {"k": size.k}
    kind = ARCHITECTURES[run.architecture]
    sae = kind.Config.model_validate({"d_sae": size.d_sae, **keys})
    given = {"num_tokens": size.steps * size.batch, "batch_tokens": size.batch, **keys_of_train}
    given["seed"] = run.seed
    cfg = FusedTrainConfig.model_validate(given)
    lr = with_defaults(cfg, sae, data.rows.shape[1]).lr
    assert lr is not None
    given |= {"lr": lr * run.factor, "warmup_steps": warmup_steps(size.steps, cfg)}
    given.pop("lr_rule", None)
    cfg = FusedTrainConfig.model_validate(given)
    rms = float(data.rows.square().mean().sqrt())
    training = SAETraining(sae, cfg, data.rows.shape[1], Mesh.single(), CPU, rms=rms)
    for x in batches(data.rows, size.batch, size.steps, run.seed):
        training.step(x, PhaseTimer(CPU, enabled=False))
    return {name: tensor.detach() for name, tensor in training.final_weights().items()}


@torch.no_grad()
def fvu_at(weights: dict[str, Tensor], rows: Tensor, k: int, *, per_token: bool) -> float:
    """FVU with exactly k active latents a token in the mean: of all activations, or by how far
    they exceed their thresholds, the largest of each token or of each 2048 tokens.
    """
    error = torch.zeros((), dtype=torch.float64)
    for x in torch.split(rows, _CHUNK):
        pre = (x - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]
        over = pre - weights["threshold"] if "threshold" in weights else pre
        if per_token:
            least = over.topk(k, dim=1).values[:, -1:]
        else:
            least = over.flatten().topk(k * len(x)).values[-1]
        acts = pre.relu() * (over >= least)
        error += (acts @ weights["W_dec"] + weights["b_dec"] - x).square().sum()
    return float(error / (rows - rows.mean(0)).square().sum())


def matched(features: Tensor, W_dec: Tensor) -> tuple[float, float | None]:
    """Mean best |cosine| of the features, and that of a one-to-one matching where scipy, which
    makes it, is installed.
    """
    cosines = features @ torch.nn.functional.normalize(W_dec, dim=1).T
    cosines = (cosines / features.norm(dim=1, keepdim=True)).abs()
    best = float(cosines.amax(dim=1).mean())
    if importlib.util.find_spec("scipy") is None:
        return best, None
    optimize = importlib.import_module("scipy.optimize")
    rows, columns = optimize.linear_sum_assignment(-cosines.numpy())
    return best, float(cosines[rows, columns].mean())


def score(data: Data, run: Run, weights: dict[str, Tensor], seconds: float) -> Score:
    """Measures a training's weights."""
    own = {"W_enc", "b_enc", "W_dec", "b_dec"}
    if run.architecture == "jumprelu":
        own.add("threshold")
    kept = {name: tensor.float() for name, tensor in weights.items() if name in own}
    fvu = fvu_at(kept, data.held, data.size.k, per_token=run.architecture == "topk")
    if data.features is None:
        return Score(fvu, None, None, seconds)
    return Score(fvu, *matched(data.features, kept["W_dec"]), seconds)


class PeerFailed(Exception):
    """A library's process ended with an error."""


class Peers:
    """The libraries that can be imported, each by its own Python, and the processes that run
    them.
    """

    def __init__(self, pythons: dict[str, str], threads: int, folder: Path) -> None:
        self.threads, self.folder = threads, folder
        self.script = Path(__file__).with_name("bench_quality_peers.py")
        self.pythons: dict[str, str] = {}
        self.missing: list[str] = []
        for library in LIBRARIES:
            python = pythons.get(library, sys.executable)
            # -P: the folder of this script is no place to import from.
            code = f"import importlib.util as u, sys; sys.exit(u.find_spec({library!r}) is None)"
            if subprocess.run([python, "-P", "-c", code], capture_output=True).returncode == 0:
                self.pythons[library] = python
            else:
                self.missing.append(library)

    def _process(self, library: str, job: dict[str, Any]) -> Iterator[str]:
        """Lines of a peer's process. Raises PeerFailed."""
        file = self.folder / f"{library}.json"
        file.write_text(json.dumps(job | {"threads": self.threads}))
        log = self.folder / f"{library}.log"
        env = os.environ | {"WANDB_MODE": "disabled", "TQDM_DISABLE": "1"}
        command = [self.pythons[library], "-P", str(self.script), library, str(file)]
        with (
            log.open("w") as errors,
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env
            ) as process,
        ):
            assert process.stdout is not None
            yield from process.stdout
        if process.returncode:
            last = " ".join(log.read_text().split()[-60:])
            raise PeerFailed(f"{library} failed: {last}")

    def synthetic_rows(self, size: Size) -> dict[str, Tensor]:
        """Those of SAELens's benchmark."""
        out = self.folder / "synthetic.safetensors"
        for _ in self._process("sae_lens", {"synthetic": synthetic_job(size), "out": str(out)}):
            pass
        return load_file(out)

    def train(self, data: Data, runs: list[Run]) -> Iterator[tuple[Run, Score]]:
        """Trainings of one library, scored as they come. Rows are scaled to a mean norm of
        sqrt(D), as SAELens's and dictionary_learning's own examples do.
        """
        scale = data.rows.shape[1] ** 0.5 / float(data.rows.norm(dim=1).mean())
        rows = self.folder / "rows.safetensors"
        save_file({"rows": (data.rows * scale).contiguous()}, rows)
        outs = [self.folder / f"{i}.safetensors" for i in range(len(runs))]
        jobs = [
            {
                **data.size._asdict(),
                "architecture": run.architecture,
                "lr_factor": run.factor,
                "seed": run.seed,
                "rows": str(rows),
                "out": str(out),
            }
            for run, out in zip(runs, outs, strict=True)
        ]
        scaled = data._replace(rows=data.rows * scale, held=data.held * scale)
        left = iter(zip(runs, outs, strict=True))
        for line in self._process(runs[0].library, {"jobs": jobs}):
            if line.startswith("done "):
                run, out = next(left)
                yield run, score(scaled, run, load_file(out), float(line.split()[1]))


def _runs(library: str, architectures: list[str], seeds: int, factors: list[float]) -> list[Run]:
    known = ARCHITECTURES if library == OURS else LIBRARIES[library]
    return [
        Run(library, name, factor, seed)
        for name in architectures
        if name in known
        for factor in factors
        for seed in range(seeds)
    ]


def _scores(
    data: Data, runs: list[Run], peers: Peers, keys_of_train: dict[str, Any]
) -> Iterator[tuple[Run, Score]]:
    if runs and runs[0].library != OURS:
        yield from peers.train(data, runs)
        return
    for run in runs:
        begun = time.perf_counter()
        weights = train_ours(data, run, keys_of_train)
        yield run, score(data, run, weights, time.perf_counter() - begun)


def _all(
    data: Data, runs: dict[str, list[Run]], peers: Peers, keys: dict[str, Any]
) -> dict[Run, Score]:
    """Every library's trainings on some rows, a line of output each."""
    found: dict[Run, Score] = {}
    for own in runs.values():
        try:
            for run, got in _scores(data, own, peers, keys) if own else ():
                found[run] = got
                what = f"{data.name}: {run.library} {run.architecture} lr x {run.factor:g}"
                typer.echo(f"{what} seed {run.seed}: FVU {got.fvu:.5f}, {got.seconds:.1f} s")
        except PeerFailed as e:
            # The others' figures are worth having all the same.
            typer.echo(f"{data.name}: {e}", err=True)
    return found


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def _error(values: list[float | None]) -> float | None:
    """Standard error over seeds."""
    known = [value for value in values if value is not None]
    return statistics.stdev(known) / len(known) ** 0.5 if len(known) > 1 else None


def summarised(data: str, found: dict[Run, Score]) -> list[dict[str, Any]]:
    """A row for each library and architecture at its defaults, and one at its best learning
    rate where that is another.
    """
    rows = []
    for architecture, library in dict.fromkeys((r.architecture, r.library) for r in found):
        by_factor: dict[float, list[Score]] = {}
        for run, own in found.items():
            if (run.architecture, run.library) == (architecture, library):
                by_factor.setdefault(run.factor, []).append(own)
        best = min(by_factor, key=lambda f: statistics.fmean(s.fvu for s in by_factor[f]))
        for factor in dict.fromkeys((1.0, best)):
            if (scores := by_factor.get(factor)) is None:
                continue
            row: dict[str, Any] = {"data": data, "architecture": architecture}
            row |= {"library": library, "lr": "default" if factor == 1 else f"x {factor:g}"}
            for name in ("fvu", "cosine", "mcc"):
                values = [getattr(s, name) for s in scores]
                row |= {name: _mean(values), f"{name} +-": _error(values)}
            rows.append(
                {**row, "seeds": len(scores), "s": statistics.fmean(s.seconds for s in scores)}
            )
    return rows


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours at its defaults beside the best of the peers' rows: FVU over theirs, and by how many of
    its standard errors the features are found worse than by the one that finds them best.
    """
    found = []
    for data, architecture in dict.fromkeys((r["data"], r["architecture"]) for r in rows):
        own = [r for r in rows if (r["data"], r["architecture"]) == (data, architecture)]
        ours = [r for r in own if r["library"] == OURS and r["lr"] == "default"]
        peers = [r for r in own if r["library"] != OURS]
        if not ours or not peers:
            continue
        best = min(peers, key=lambda r: r["fvu"])
        ratio = ours[0]["fvu"] / best["fvu"]
        row = {"data": data, "architecture": architecture, "best peer": best["library"]}
        row |= {"at lr": best["lr"], "ours / theirs": ratio, "within 1%": ratio <= 1.01}
        if ours[0]["cosine"] is not None:
            finder = max(peers, key=lambda r: r["cosine"])
            least = finder["cosine"] - (finder["cosine +-"] or 0.0)
            row |= {"cosine": ours[0]["cosine"], "at least": least}
            row["found"] = ours[0]["cosine"] >= least
        found.append(row)
    return found


def _pythons(given: list[str]) -> dict[str, str]:
    """Raises typer.BadParameter where one is not LIBRARY=PATH."""
    found = {}
    for one in given:
        library, _, path = one.partition("=")
        if library not in LIBRARIES or not Path(path).is_file():
            raise typer.BadParameter(
                f"--python {one} is no LIBRARY=PATH of a Python; LIBRARY is one of "
                f"{', '.join(LIBRARIES)}"
            )
        found[library] = path
    return found


def _data(
    store: str | None, hookpoint: str | None, peers: Peers, steps: int | None, names: list[str]
) -> Iterator[Data]:
    """The sets of rows, of which those are left out that are not asked for."""
    if unknown := [name for name in names if name not in DATA]:
        raise ConfigError(f"--data {unknown[0]} is none of {', '.join(DATA)}")
    if names == ["store"] and store is None:
        raise ConfigError("--data store needs a STORE; name one")
    small = MIXTURE if steps is None else MIXTURE._replace(steps=steps)
    if "mixture" in names:
        yield mixture(small)
    if "sae_lens" in names and "sae_lens" in peers.pythons:
        yield synthetic(peers.synthetic_rows(small), small)
    if "store" in names and store is not None:
        size = STORE if steps is None else STORE._replace(steps=steps)
        yield of_store(store, hookpoint, size)


def _train_keys(given: list[str]) -> dict[str, Any]:
    """Raises typer.BadParameter where one is not KEY=VALUE."""
    found = {}
    for one in given:
        key, equals, value = one.partition("=")
        if not equals:
            raise typer.BadParameter(f"--train {one} is no KEY=VALUE of the section train")
        found[key] = yaml.safe_load(value)
    return found


Architectures = Annotated[
    list[str] | None, typer.Option(help="Any of topk, batch_topk, matryoshka, jumprelu.")
]
Sets = Annotated[list[str] | None, typer.Option(help="Any of mixture, sae_lens, store.")]
Pythons = Annotated[
    list[str] | None, typer.Option(help="LIBRARY=PATH: the Python that has a library.")
]
Factors = Annotated[
    list[float] | None, typer.Option(help="Of the learning rate; 1, 0.3 and 3 if left out.")
]
Keys = Annotated[list[str] | None, typer.Option(help="KEY=VALUE of train, for ours alone.")]


@app.command()
def quality(
    store: Annotated[str | None, typer.Argument(help="Such as the quick start's.")] = None,
    hookpoint: Annotated[str | None, typer.Option(help="Of the store; else its last.")] = None,
    architecture: Architectures = None,
    data: Sets = None,
    python: Pythons = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each.")] = 3,
    factor: Factors = None,
    steps: Annotated[int | None, typer.Option(min=20, help="Of every training.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of the CPU.")] = 1,
    train: Keys = None,
    json: Annotated[Path | None, typer.Option(help="Write the table here, too.")] = None,
) -> None:
    """FVU at equal L0 and equal tokens, and known features found, beside other libraries."""
    chosen = architecture or ["topk", "batch_topk", "matryoshka"]
    if unknown := [name for name in chosen if name not in LIBRARIES["sae_lens"]]:
        raise typer.BadParameter(f"--architecture {unknown[0]} is none that peers have, too")
    torch.set_num_threads(threads)
    keys, factors, pythons = (
        _train_keys(train or []),
        factor or list(FACTORS),
        _pythons(python or []),
    )
    table: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, _told_mistakes():
        peers = Peers(pythons, threads, Path(folder))
        for library in peers.missing:
            typer.echo(f"{library} is not installed here: it is left out; --python {library}=PATH")
        for one in _data(store, hookpoint, peers, steps, data or list(DATA)):
            runs = {name: _runs(name, chosen, seeds, factors) for name in (OURS, *peers.pythons)}
            table += summarised(one.name, _all(one, runs, peers, keys))
    judged = verdicts(table)
    print_table("Quality at equal tokens", table, width=160)
    print_table("Ours at its defaults beside the best of the others", judged, width=160)
    if json is not None:
        write_json(json, "quality", table, verdicts=judged, train=keys)


@contextmanager
def _told_mistakes() -> Iterator[None]:
    """Ends with one sentence where a key or a store does not fit."""
    try:
        yield
    except (ConfigError, ValueError) as e:
        typer.echo(f"error: {' '.join(str(e).split())}", err=True)
        raise typer.Exit(2) from e


if __name__ == "__main__":
    app()
