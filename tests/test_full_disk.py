"""A disk that is really full, in the middle of the work: a tmpfs of a few MiB, where this system
lets a user mount one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.dist.ranks import ROOT, free_port, rank_env
from tests.tiny_model import config_data, save_text, write_config

# Runs inside a mount namespace of its own: fills the disk once the first of `made` is there, then
# makes room and runs the same command again.
DRIVER = """
import json, subprocess, sys, time
from pathlib import Path

disk, made, command = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "none", str(disk)], check=True)

def fill():
    with (disk / "others").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 12))
        except OSError:
            pass

outcomes = []
for full in (True, False):
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while full and process.poll() is None and not list(disk.glob(made)):
        time.sleep(0.005)
    if full:
        fill()
    err = process.communicate()[1]
    outcomes.append([process.returncode, err, len(list(disk.glob(made)))])
    (disk / "others").unlink(missing_ok=True)
left = [str(path) for path in disk.rglob("*.tmp")] + [str(path) for path in disk.rglob("*.partial")]
print("\\n" + json.dumps([outcomes, left]))
"""


def in_a_namespace() -> list[str]:
    """The command that runs another where mounts are its own; skips where there is none."""
    command = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare on this system")
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets no user mount a file system")
    return command


@pytest.mark.parametrize(
    ("verb", "made"),
    [("cache", "s.zarr/records/shard-*.json"), ("train", "run/*/checkpoints/step-*[0-9]")],
)
def test_a_full_disk_is_one_sentence_and_room_mends_it(
    tmp_path: Path, verb: str, made: str
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    data = config_data(tmp_path, shard_mib=0.02, num_tokens=20_000)
    save_text(tmp_path / "text.jsonl", documents=900)
    data["train"] |= {"num_tokens": 32_000, "checkpoint_every": 10, "log_every": 50}
    options = [f"cache.store={disk / 's.zarr'}", f"output={disk / 'run'}"]
    if verb == "train":
        # Made beforehand, outside.
        options[0] = f"cache.store={tmp_path / 's.zarr'}"
        data["cache"]["num_tokens"] = 1500
    config = write_config(tmp_path / "c.yaml", data)
    module = [sys.executable, "-m", f"flash_sae_dist.launch.{verb}", str(config), *options]
    env = rank_env(0, 1, free_port())
    if verb == "train":
        cached = [sys.executable, "-m", "flash_sae_dist.launch.cache", str(config), options[0]]
        subprocess.run(cached, env=env, cwd=ROOT, check=True, capture_output=True)
    command = [*in_a_namespace(), sys.executable, "-c", DRIVER, str(disk), made, *module]
    done = subprocess.run(
        command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (full, again), left = json.loads(done.stdout.splitlines()[-1])
    assert full[0] == 1, full[1][-2000:]
    assert "Traceback" not in full[1]
    (line,) = (line for line in full[1].splitlines() if line.startswith("error: "))
    assert "No space left on device; free space there" in line
    assert "the same command" in line
    assert full[2] > 0, "something was kept"
    assert again[0] == 0, again[1][-2000:]
    assert not left
