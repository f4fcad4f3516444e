"""The blocks of README.md and docs/, run as somebody who has just come here would; see newcomer.py.

Tasks follow one another in one folder: what the quick start leaves is what the pages then read.
"""

from __future__ import annotations

import csv
import json
import re
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from flash_sae_dist import TopKSAE, interop
from flash_sae_dist.activations.store import ActivationStore
from tests.newcomer import WIDTH, Task, furnish, hub
from tests.pages import ROOT, all_blocks

RUN, K16 = "runs/quickstart", "model.layers.8/k=16"
SAE = f"{RUN}/model.layers.8/k=32"
# Run to their end by other tests.
ELSEWHERE = {
    ("docs/api.md", "python"): "test_api.py",
    ("docs/features.md", "python"): "test_features.py",
    ("docs/hub.md", "python"): "test_hub.py",
}


def finished(root: Path, output: str) -> list[str]:
    """The SAEs under an output, each of which loads."""
    found = sorted((root / output).rglob("sae/config.json"))
    assert all(interop.load(file.parent).W_dec.isfinite().all() for file in found)
    return [str(file.parents[1].relative_to(root / output)) for file in found]


def measured(root: Path, output: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = json.loads((root / output / "evaluation.json").read_text())
    assert all(0 < record["fvu"] < 3 and record["l0"] > 0 for record in records)
    return records


def quick_start(root: Path, names: dict[str, Any], said: str) -> None:
    four = [f"model.layers.{layer}/k={k}" for layer in (4, 8) for k in (16, 32)]
    assert finished(root, RUN) == four
    assert [record["job"] for record in measured(root, RUN)] == four
    # What README's table says that it leaves.
    table = re.findall(r"^\| (`.*`) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    for name in re.findall(r"`([^`]+)`", " ".join(table[:6])):
        pattern = name.replace("<hookpoint>", "*").replace("k=...", "k=*").rstrip("/")
        assert list((root / RUN).glob(pattern)), name


def module_of_readme(root: Path, names: dict[str, Any], said: str) -> None:
    assert names["loss"].isfinite()
    assert names["acts"].shape == (2, 16, 64)
    assert (names["acts"] > 0).sum() <= 2 * 16 * 32


def other_model(root: Path, names: dict[str, Any], said: str) -> None:
    assert len(finished(root, "runs/pythia")) == 4


def every_verb(root: Path, names: dict[str, Any], said: str) -> None:
    jobs = {"transformer.h.8", *(f"transformer.h.8/k={k}" for k in (4, 16, 32))}
    assert set(finished(root, "runs/gpt2-small")) == jobs
    assert len(measured(root, "runs/gpt2-small")) == 4
    assert len(list((root / "runs/gpt2-small").rglob("features/index.html"))) == 4
    assert len(list((root / "runs/gpt2-small/export/sae_lens").rglob("cfg.json"))) == 4
    assert type(interop.load(root / "out")) is TopKSAE
    assert finished(root, "runs/llama-3.1-8b-wide") == ["model.layers.4"]


def own_arrays(root: Path, names: dict[str, Any], said: str) -> None:
    assert finished(root, "runs/mine") == ["layers.3"]
    (record,) = measured(root, "runs/mine")
    assert "loss" not in record or record["loss"] is None, "there is no language model"


def own_text_and_model(root: Path, names: dict[str, Any], said: str) -> None:
    (record,) = measured(root, "runs/mine-lm")
    assert record["loss"]["clean"] > 0
    lines = (root / "runs/mine-lm/model.layers.8/metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["tokens"] == 2560, "twice as long as it was at first"
    grown = ActivationStore.open(str(root / "runs/mine-lm/activations.zarr"))
    assert grown.rows > 1500, "and more of the text"


def streamed(root: Path, names: dict[str, Any], said: str) -> None:
    assert len(finished(root, "runs/gpt2-stream")) == 2
    assert not list((root / "runs/gpt2-stream").rglob("*.zarr"))


def sae_of_sae_lens(root: Path, names: dict[str, Any], said: str) -> None:
    (record,) = measured(root, "runs/lens")
    assert record["d_sae"] == 64
    jobs = [record["job"] for record in measured(root, "runs/others")]
    assert len(jobs) == 2
    (trained,) = finished(root, "runs/pythia-70m")
    theirs = interop.load(root / "trainer_0")
    assert not theirs.W_dec.equal(interop.load(root / f"runs/pythia-70m/{trained}/sae").W_dec)
    assert type(interop.load(root / "out")) is TopKSAE


def tuned(root: Path, names: dict[str, Any], said: str) -> None:
    (trained,) = finished(root, "runs/kl")
    lines = (root / f"runs/kl/{trained}/metrics.jsonl").read_text().splitlines()
    assert all(0 < json.loads(line)["model_loss"] < 9 for line in lines)
    kept, begun = (
        interop.load(root / f"runs/{run}/{trained}/sae").W_dec for run in ("kl", "pythia-70m")
    )
    assert 0 < (kept - begun).norm() < 0.5 * begun.norm()


def steered(root: Path, names: dict[str, Any], said: str) -> None:
    plain = names["model"].generate(**names["inputs"], max_new_tokens=20, do_sample=False)
    assert names["steered"].shape == plain.shape
    assert names["steered"].tolist() != plain.tolist(), "a latent that is set changes the text"
    assert not names["sae"].encode_dense(names["sae"].W_dec[:2].detach())[:, 12].eq(800).any()


def sweep(root: Path, names: dict[str, Any], said: str) -> None:
    seeds = [f"model.layers.{n}/k={k},seed={s}" for n in (4, 8) for k in (16, 32) for s in (0, 1)]
    assert set(seeds) <= set(finished(root, RUN))
    rows = list(csv.DictReader((root / RUN / "results.csv").open()))
    assert [row["job"] for row in names["saes"]] == [row["job"] for row in rows]
    assert {row["job"] for row in rows} >= set(seeds)
    page = (root / RUN / "report.html").read_text()
    assert all(json.dumps(seed) in page for seed in seeds), "the report shows them"
    (opened,) = OPENED
    assert opened == (root / RUN / "report.html").as_uri()


def features(root: Path, names: dict[str, Any], said: str) -> None:
    assert (root / SAE / "features/index.html").is_file()
    assert not (root / RUN / K16 / "features").exists()


def pushed(root: Path, names: dict[str, Any], said: str) -> None:
    assert {found.name for found in (root / "saes").glob("model.layers.*")}
    for name in ("W_enc", "W_dec"):
        back = interop.load(root / "saes/model.layers.8/k=32").state_dict()[name]
        assert back.equal(interop.load(root / SAE / "sae").state_dict()[name])


def converted(root: Path, names: dict[str, Any], said: str) -> None:
    assert interop.find(root / "out")[0].name == "sae_lens"


def own_stores(root: Path, names: dict[str, Any], said: str) -> None:
    assert (root / "both.zarr").is_dir()
    assert "layers.7" in said


def imported(root: Path, names: dict[str, Any], said: str) -> None:
    assert names["trainSAE"].__module__.startswith("flash_sae_dist.compat")
    assert names["SAETrainer"].__module__.startswith("flash_sae_dist.compat")


def planned(root: Path, names: dict[str, Any], said: str) -> None:
    """The plans are those that the page shows."""
    shown = [block.text for block in all_blocks("") if block.page == "docs/scale.md"]
    assert len(shown) == 3
    own = "\n".join(line.rstrip() for line in said.splitlines())
    for text in shown:
        for line in text.splitlines():
            assert line.rstrip() in own, line


OPENED: list[str] = []
TASKS = [
    Task("the quick start", [("README.md", "bash launch/quickstart.sh\n", {})], quick_start),
    Task(
        "an SAE as a module",
        [("README.md", "TopKSAE(d_in=768", {
            "24576": "96", "768": "12", "4096": "8", "576": str(WIDTH)})],
        module_of_readme,
    ),
    Task(
        "the quick start with another model and text",
        [("README.md", "output=runs/pythia", {
            "text.source=hub text.name=monology/pile-uncopyrighted":
            "text.source=files text.paths=[text.jsonl]"})],
        other_model,
    ),
    Task(
        "every verb",
        [("README.md", "flash-sae plan", {
            "50000000": "640", "[16, 32, 64]": "[4, 16, 32]",
            "push     runs/gpt2-small": "push     runs/gpt2-small --sae transformer.h.8/k=4"})],
        every_verb,
    ),
    Task(
        "arrays of one's own, without a language model",
        [("README.md", "store import", {}),
         ("docs/guide.md", "cat > mine.yaml", {
            "4096, k: 32": "64, k: 4",
            "5_000_000, batch_tokens: 4096": "1280, batch_tokens: 64, warmup_steps: 2"})],
        own_arrays,
    ),
    Task(
        "stores of one's own rows",
        [("docs/guide.md", "layers.7=", {"mine.zarr": "two.zarr"})],
        own_stores,
    ),
    Task(
        "one's own text and a local model",
        [("docs/guide.md", "cat > mine-lm.yaml", {
            "num_tokens: 2_000_000, context_length: 512": "num_tokens: 1500, context_length: 24",
            "16_384, k: 32": "64, k: 4",
            "num_tokens: 20_000_000": "num_tokens: 1280, batch_tokens: 64, warmup_steps: 2",
            "=40_000_000": "=2560", "=4_000_000": "=1700"})],
        own_text_and_model,
    ),
    Task(
        "no store",
        [("docs/guide.md", "output=runs/gpt2-stream", {
            "transformer.h.*": "transformer.h.7, transformer.h.8",
            " \\\n": " \"grid.values={sae.k: [4]}\" \\\n"})],
        streamed,
    ),
    Task(
        "somebody else's SAE: loaded, converted, measured, trained further",
        [("docs/formats.md", "interop.load(", {}),
         ("docs/formats.md", "SAE=saelens/layer_3", {
            "CONFIG.yaml": "configs/quickstart.yaml output=runs/qwen",
            "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50/layer12": "SAE-L0_4/layer8",
            "sae.d_sae=16384 sae.k=32": "sae.d_sae=64 sae.k=4"})],
        sae_of_sae_lens,
    ),
    Task(
        "an SAE is tuned by what the model predicts with it",
        [("docs/guide.md", "train.loss=kl", {
            "train.num_tokens=1000000": "train.num_tokens=480 train.batch_tokens=48 sae.k=4"})],
        tuned,
    ),
    Task(
        "a latent steers the model",
        [("docs/formats.md", "def steer", {
            "The weather today": "word1 word2 word3", "1234] = 8.0": "12] = 800.0"})],
        steered,
    ),
    Task(
        "a sweep is compared, and its report read",
        [("docs/grids.md", "train.seed: [0, 1]}\"", {}), ("docs/grids.md", "results.csv", {})],
        sweep,
    ),
    Task("what was measured", [("docs/evaluation.md", "evaluate", {})],
         lambda root, names, said: measured(root, RUN) and None),
    Task("what a latent means", [("docs/features.md", "flash-sae features", {})], features),
    Task("pushed to the hub, and pulled", [("docs/hub.md", "push runs/quickstart", {})], pushed),
    Task("another library's script", [("docs/compat.md", "trainSAE", {})], imported),
    Task(
        "several processes and hosts",
        [("docs/guide.md", "launch/hosts/ssh.sh", {}), ("docs/guide.md", "ACCELERATE_USE_CPU", {})],
        lambda root, names, said: finished(root, "runs/gemma-2-2b") and None,
    ),
]  # fmt: skip
PLANS = Task(
    "large jobs planned",
    [
        ("docs/scale.md", "LlamaConfig(", {}),
        ("docs/scale.md", "plan configs/llama-3.1-8b-wide.yaml --gpu H200 --processes 8 ", {}),
        ("docs/scale.md", "plan configs/llama-3.1-8b-wide.yaml --gpu H200 --processes 64", {}),
        ("docs/scale.md", "plan configs/gemma-2-2b-grid.yaml --gpu", {}),
    ],
    planned,
)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = tmp_path_factory.mktemp("newcomer") / "here"
    with pytest.MonkeyPatch.context() as patch, hub():
        patch.setattr(webbrowser, "open", lambda url: OPENED.append(url))
        # A tenth of a second each, and drawn in test_plots.py.
        patch.setattr(Figure, "savefig", lambda self, file, **_: Path(file).write_bytes(b""))
        furnish(root)
        yield root


@pytest.mark.parametrize("task", [pytest.param(task, id=task.title) for task in TASKS])
def test_by_copy_and_paste(task: Task, desk: Path) -> None:
    task.run(desk)


def test_the_plans_that_are_shown(tmp_path: Path) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    PLANS.run(tmp_path)


def test_every_block_is_run_or_says_why_not() -> None:
    ran = {block.where for task in [*TASKS, PLANS] for block, _ in task.found()}
    for block in all_blocks("bash", "python"):
        elsewhere = ELSEWHERE.get((block.page, block.language))
        if elsewhere is not None:
            assert block.page in (ROOT / "tests" / elsewhere).read_text()
            continue
        assert (block.where in ran) != (block.not_run is not None), (
            f"{block.where}: give it a task, or write before it <!-- not run by the tests: WHY -->"
        )
