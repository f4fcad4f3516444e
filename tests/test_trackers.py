"""What trackers stored is read back: each SAE's curves under its name, the config beside them."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator, tracking

from flash_sae_dist.config.base import ConfigError
from flash_sae_dist.grid.trackers import Trackers, safe_names

JOBS = ["model.layers.0:input/k=2,lr=0.001", "model.layers.0_input/k=2,lr=0.001", "h.*"]
CONFIG: dict[str, Any] = {"train": {"adam_betas": [0.9, 0.999]}, "store": None}


def logged(folder: Path, name: str) -> dict[str, str]:
    """Two metrics of two steps of each job; the jobs' safe names."""
    accelerator = Accelerator(cpu=True, log_with=name, project_dir=folder)
    configs = {job: {**CONFIG, "sae": {"k": number}} for number, job in enumerate(JOBS)}
    trackers = Trackers(accelerator, configs, group="theirs")
    for number, job in enumerate(JOBS):
        for step in (10, 20):
            trackers.log(job, {"fvu": number + 1 / step, "l0": 4.0}, step)
    trackers.finish()
    return safe_names(JOBS)


def test_names_are_safe_and_no_two_alike() -> None:
    names = safe_names(JOBS)
    assert list(names.values()) == [
        "model_layers_0_input/k_2_lr_0_001",
        "model_layers_0_input/k_2_lr_0_001_2",
        "h__",
    ]


def test_tensorboard_gives_back_what_was_logged(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    plugin_data_pb2 = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    names = logged(tmp_path, "tensorboard")
    for number, job in enumerate(JOBS):
        folder = tmp_path / "flash_sae_dist" / names[job]
        events = reading.EventAccumulator(str(folder)).Reload()
        assert sorted(events.Tags()["scalars"]) == ["fvu", "l0"], "a run of its own"
        events_ = events.Scalars("fvu")
        assert [e.step for e in events_] == [10, 20]
        assert [e.value for e in events_] == pytest.approx([number + 0.1, number + 0.05])
        about = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        told = plugin_data_pb2.HParamsPluginData.FromString(about).session_start_info.hparams
        assert told["sae.k"].number_value == number
        assert told["train.adam_betas"].string_value == "[0.9, 0.999]"
    folders = {file.parent for file in tmp_path.rglob("*tfevents*")}
    assert folders == {tmp_path / "flash_sae_dist" / name for name in names.values()}, "no others"


def test_a_run_that_goes_on_shows_each_step_once(tmp_path: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for steps in (range(1, 9), range(5, 13)):
        accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path)
        trackers = Trackers(accelerator, {"a": {}})
        for step in steps:
            trackers.log("a", {"fvu": 1 / step}, step)
        trackers.finish()
    events = reading.EventAccumulator(str(tmp_path / "flash_sae_dist/a")).Reload()
    assert [e.step for e in events.Scalars("fvu")] == list(range(1, 13))


def test_runs_that_started_end_where_another_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, finished = [], []

    class Run:
        def __init__(self, project: str, *_: Any, **options: Any) -> None:
            self.name = options["name"]

        def start(self) -> None:
            if len(started) == 2:
                raise RuntimeError("no API key")
            started.append(self.name)

        def finish(self) -> None:
            finished.append(self.name)
            if len(finished) == 1:
                raise RuntimeError("no network")

    accelerator = Accelerator(cpu=True, project_dir=tmp_path)
    accelerator.log_with = ["wandb"]
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Run)
    with pytest.raises(ConfigError, match="trackers: wandb cannot start: no API key"):
        Trackers(accelerator, {"a": {}, "b": {}, "c": {}})
    assert started == finished == ["a", "b"]
    assert not accelerator.trackers


def wandb_records(data: bytes) -> Iterator[bytes]:
    """Records of a .wandb file: LevelDB's log format behind a header of 7 bytes, in blocks of
    32 KiB; a record is cut where a block ends (kinds: 1 whole, 2 first, 3 middle, 4 last).
    """
    at, part = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield part
            part = b""


def test_offline_wandb_gives_back_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    names = safe_names(JOBS)
    # In a process of its own: wandb has one service and one set of settings for all of a process.
    code = f"from tests.test_trackers import *; logged(Path({str(tmp_path)!r}), 'wandb')"
    own = {"WANDB_MODE": "offline", "WANDB_PROJECT": "theirs", "WANDB_SILENT": "true"}
    own["PYTHONPATH"] = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=os.environ | own, check=True)
    runs: dict[str, Any] = {}
    for file in tmp_path.rglob("*.wandb"):
        curve, config, about = [], {}, None
        for data in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.run.run_id:
                about = (record.run.project, record.run.run_group)
                name = record.run.display_name
            for item in [*record.run.config.update, *record.config.update]:
                config[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
            row = {i.key or "/".join(i.nested_key): i.value_json for i in record.history.item}
            if "fvu" in row:
                curve.append(tuple(json.loads(row[key]) for key in ("_step", "fvu")))
        runs[name] = (about, config["sae.k"], curve)
    assert runs == {
        names[job]: (("theirs", "theirs"), number, [(10, number + 0.1), (20, number + 0.05)])
        for number, job in enumerate(JOBS)
    }


def test_a_run_that_cannot_begin_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    accelerator = Accelerator(cpu=True, log_with="tensorboard", project_dir=tmp_path / "file")
    with pytest.raises(ConfigError, match="trackers: tensorboard cannot start"):
        Trackers(accelerator, {"a": {}})
