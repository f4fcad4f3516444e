"""push, pull and from_pretrained against a stand-in of the hub, by the hub's own client."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from typer.testing import CliRunner

from flash_sae_dist import TopKSAE, api, interop
from flash_sae_dist.config.base import ConfigError, UserError
from flash_sae_dist.config.train import FusedTrainConfig
from flash_sae_dist.hub.card import CardEntry, card_of
from flash_sae_dist.hub.pull import pull
from flash_sae_dist.hub.push import push
from flash_sae_dist.launch.cli import build
from flash_sae_dist.models.base import SparseCoder
from tests.hub_server import TOKEN, HubServer, hub_server
from tests.tiny_model import config_data

JOBS = ["model.layers.0", "model.layers.0/k=2", "model.layers.1.mlp/k=2"]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three finished SAEs, of which all are measured."""
    data = config_data(tmp_path_factory.mktemp("hub"))
    data["train"] |= {"num_tokens": 640, "holdout": 0.1, "lr": None}
    api.cache(data)
    api.train(data)
    api.train_grid(data, grid={"values": {"sae.k": [2]}})
    api.evaluate(data, evaluate={"loss_sequences": 0})
    return Path(data["output"])


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    from huggingface_hub import constants

    with hub_server() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub_cache"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


def is_private(asked: dict[str, Any]) -> bool:
    """Versions of the client say it in two ways."""
    return asked.get("private") is True or asked.get("visibility") == "private"


def test_what_is_pushed_comes_back_to_the_bit(output: Path, hub: HubServer, tmp_path: Path) -> None:
    pushed = push(output, "me/saes", license="apache-2.0", private=True)
    assert pushed.places == {name: name for name in JOBS}
    assert (is_private(hub.created[0]), hub.commits) == (True, 1)
    assert set(hub.repos["me/saes"]) == {"README.md"} | {
        f"{job}/{name}"
        for job in JOBS
        for name in ("config.json", "sae.safetensors", "evaluation.json")
    }
    # Written by another, and of no use here.
    hub.repos["me/saes"]["model.layers.0/ae.pt"] = b"a pickle"
    pulled = pull("me/saes", tmp_path / "saes")
    assert [found.path for found in pulled] == [tmp_path / "saes" / job for job in JOBS]
    assert {found.format for found in pulled} == {"flash_sae_dist"}
    assert not list((tmp_path / "saes").rglob("*.pt"))
    assert [f.path for f in pull("me/saes", tmp_path / "saes")] == [f.path for f in pulled]
    for job in JOBS:
        own = TopKSAE.load(output / job / "sae")
        for sae in (
            TopKSAE.load(tmp_path / "saes" / job),
            SparseCoder.from_pretrained("me/saes", job),
        ):
            assert isinstance(sae, TopKSAE)
            assert sae.config.k == own.config.k
            assert all(torch.equal(t, sae.state_dict()[n]) for n, t in own.state_dict().items())
            assert sae.about.hookpoint == job.partition("/")[0]
            assert sae.about.context_length == 24


def test_one_sae_is_the_repository_itself(output: Path, hub: HubServer, tmp_path: Path) -> None:
    pushed = push(output, "me/one", saes=("*.mlp/*",))
    assert pushed.places == {JOBS[2]: ""}
    assert set(hub.repos["me/one"]) == {
        *("README.md", "config.json", "sae.safetensors", "evaluation.json")
    }
    assert not is_private(hub.created[0])
    sae, own = TopKSAE.from_pretrained("me/one"), TopKSAE.load(output / JOBS[2] / "sae")
    assert torch.equal(sae.W_dec, own.W_dec)
    (found,) = pull("me/one", tmp_path / "one")
    assert found.path == tmp_path / "one"


def test_a_folder_of_a_repository_alone_is_pulled(
    output: Path, hub: HubServer, tmp_path: Path
) -> None:
    push(output, "me/saes")
    (found,) = pull("me/saes", tmp_path / "saes", subfolder=JOBS[1])
    assert found.path == tmp_path / "saes" / JOBS[1]
    assert not (tmp_path / "saes" / JOBS[2]).exists()
    assert (tmp_path / "saes/README.md").is_file()


def test_brackets_in_a_folder_are_taken_as_they_stand(
    output: Path, hub: HubServer, tmp_path: Path
) -> None:
    push(output, "me/one", saes=(JOBS[0],))
    files, name = hub.repos["me/one"], "layers.0/betas=[0.9, 0.999]"
    hub.repos["me/saes"] = {f"{name}/{path}": content for path, content in files.items()}
    (found,) = pull("me/saes", tmp_path / "saes", subfolder=name)
    sae = TopKSAE.from_pretrained("me/saes", name)
    assert torch.equal(TopKSAE.load(found.path).W_enc, sae.W_enc)


def test_saes_of_another_library_are_pulled(hub: HubServer, tmp_path: Path) -> None:
    sae = TopKSAE(d_in=16, d_sae=32, k=4)
    about = interop.About("model.layers.0", "gpt2")
    folder = interop.save(sae, tmp_path / "lens", "sae_lens", about)
    hub.repos["others/saes"] = {
        f"layer_0/{file.name}": file.read_bytes() for file in folder.iterdir()
    }
    (found,) = pull("others/saes", tmp_path / "pulled")
    assert found == (tmp_path / "pulled/layer_0", "sae_lens")
    assert torch.equal(interop.load(found.path).W_dec, sae.W_dec)


def test_the_card_of_a_transcoder_without_a_model() -> None:
    spec = {"architecture": "relu", "d_in": 4, "d_out": 6, "d_sae": 8}
    about = interop.About("a.mlp:input", output_hookpoint="a.mlp")
    entry = CardEntry("", spec, about, FusedTrainConfig(num_tokens=4096), {}, None)
    card = card_of("me/one", [entry], None)
    row = "| root | relu | a.mlp:input to a.mlp | 4 | 8 | - | 4,096 tokens | - | - | - | - | - |"
    assert row in card.splitlines()
    assert "A sparse autoencoder of activations of imported activations" not in card
    assert 'SparseCoder.from_pretrained("me/one")' in card
    assert "- model: not known, the activations were imported\n" in card
    assert "FVU:" not in card, "nothing was measured"


def test_the_card_tells_what_the_saes_are_and_no_paths(output: Path, hub: HubServer) -> None:
    push(output, "me/saes", license="mit")
    files = hub.repos["me/saes"]
    card = files["README.md"].decode()
    _, metadata, text = card.split("---\n", 2)
    data = yaml.safe_load(metadata)
    assert (data["license"], data["library_name"]) == ("mit", "flash_sae_dist")
    assert "base_model" not in data, "the model is a folder of this machine"
    rows = {}
    for line in text.splitlines():
        if line.startswith("| `"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[cells[0].strip("`")] = cells[1:]
    assert list(rows) == JOBS
    record = json.loads((output / JOBS[1] / "evaluation.json").read_text())
    assert rows[JOBS[1]] == [
        *("topk", "model.layers.0", "16", "64", "2", "640 tokens"),
        *(f"{record['l0']:.1f}", f"{record['fvu']:.4f}", f"{record['cosine']:.4f}"),
        *(f"{record['never_fired_fraction']:.1%}", "-"),
    ]
    assert "License: mit." in text
    assert "- model: model\n- text: files of its trainer\n- context: 24 tokens\n" in text
    rate = json.loads((output / JOBS[1] / "sae/made_of.json").read_text())["step"]["train.lr"]
    assert f", {rate:.3g} learning rate, seed 0, 10.0% of the documents held out\n" in text
    for name, content in files.items():
        if not name.endswith(".safetensors"):
            assert str(output.parent).encode() not in content, name


def test_the_code_of_the_card_runs(output: Path, hub: HubServer) -> None:
    push(output, "me/saes")
    (code,) = re.findall(r"```python\n(.*?)```", hub.repos["me/saes"]["README.md"].decode(), re.S)
    names: dict[str, Any] = {"x": torch.randn(3, 16)}
    exec(code, names)
    assert names["out"].recon.shape == (3, 16)


def test_names_of_the_hub_are_metadata(
    output: Path, hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"model.name": "gpt2", "text.source": "hub", "text.name": "monology/pile"}
    monkeypatch.setattr("flash_sae_dist.hub.push.read_store_config", lambda folder: told)
    push(output, "me/saes")
    card = hub.repos["me/saes"]["README.md"].decode()
    data = yaml.safe_load(card.split("---\n")[1])
    assert (data["base_model"], data["datasets"]) == (["gpt2"], ["monology/pile"])
    assert "license" not in data
    assert "License: not stated" in card
    assert "- text: monology/pile" in card


def test_the_verbs_tell_what_they_did(output: Path, hub: HubServer, tmp_path: Path) -> None:
    runner, app = CliRunner(), build()
    pushed = runner.invoke(app, ["push", str(output), "me/saes", "--sae", JOBS[0]])
    assert pushed.exit_code == 0, pushed.output
    assert pushed.stdout.splitlines()[0] == f"{JOBS[0]} -> me/saes"
    pulled = runner.invoke(app, ["pull", "me/saes", str(tmp_path / "saes")])
    assert pulled.stdout == f"{tmp_path / 'saes'} (flash_sae_dist)\n"
    for words in (["push", str(output), "saes"], ["pull", "saes", str(tmp_path / "other")]):
        wrong = runner.invoke(app, words)
        assert wrong.exit_code == 2
        assert "'saes' is no repository's name; write owner/name" in wrong.output


def test_the_commands_and_the_code_of_the_docs_run(
    output: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (Path(__file__).parents[1] / "docs/hub.md").read_text()
    text = text.replace("runs/quickstart", str(output)).replace("model.layers.8", "model.layers.0")
    text = text.replace("k=32", "k=2").replace("torch.randn(4, 576)", "torch.randn(4, 16)")
    monkeypatch.chdir(tmp_path)
    (commands,) = re.findall(r"```bash\n(.*?)```", text, re.S)
    app = build()
    for line in commands.splitlines():
        program, *words = shlex.split(line, comments=True)
        assert program == "flash-sae"
        done = CliRunner().invoke(app, words)
        assert done.exit_code == 0, (line, done.output)
    assert set(hub.repos) == {"me/smollm2-saes", "me/smollm2-k32"}
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.S):
        exec(block, names)
    assert names["out"].recon.shape == (4, 16)
    assert [found.format for found in names["found"]] == ["flash_sae_dist"]


def test_offline_and_refused_are_one_sentence(
    output: Path, hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    none = "cannot pull me/none: the hub has no such repository, or it is private; check the name"
    with pytest.raises(UserError, match=none):
        pull("me/none", tmp_path / "a")
    push(output, "me/saes", saes=(JOBS[0],))
    with pytest.raises(UserError, match="it has no such revision; check --revision"):
        pull("me/saes", tmp_path / "a", revision="v2")
    monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    with pytest.raises(
        UserError, match="cannot push me/saes: the hub answers .*log in with `hf auth"
    ):
        push(output, "me/saes")
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    for offline in (False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match=_UNREACHABLE.format("push")):
            push(output, "me/saes")
        with pytest.raises(UserError, match=_UNREACHABLE.format("pull")):
            pull("me/saes", tmp_path / f"b{offline}")
        with pytest.raises(ValueError, match="could not be downloaded from the Hugging Face hub"):
            TopKSAE.from_pretrained("me/saes")


_UNREACHABLE = (
    r"^cannot {} me/saes: the Hugging Face hub cannot be reached \([^\n()']+\); "
    "check the network.*$"
)


def test_nothing_is_sent_of_what_is_not_whole(output: Path, hub: HubServer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--sae: 'layers.9' is no finished SAE"):
        push(output, "me/saes", saes=("layers.9",))
    file = output / JOBS[0] / "sae/sae.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    try:
        with pytest.raises(UserError, match="holds no whole TopKSAE"):
            push(output, "me/saes")
    finally:
        file.write_bytes(whole)
    assert not hub.repos


def test_damaged_downloads_and_full_folders_are_told(
    output: Path, hub: HubServer, tmp_path: Path
) -> None:
    push(output, "me/saes", saes=(JOBS[0],))
    weights = hub.repos["me/saes"]["sae.safetensors"]
    hub.repos["me/saes"]["sae.safetensors"] = weights[:-1] + bytes([weights[-1] ^ 1])
    with pytest.raises(UserError, match="holds no whole TopKSAE .*; pull it again"):
        pull("me/saes", tmp_path / "saes")
    hub.repos["me/empty"] = {"README.md": b"none", "ae.pt": b"a pickle"}
    with pytest.raises(UserError, match="me/empty holds no SAE as safetensors"):
        pull("me/empty", tmp_path / "empty")
    with pytest.raises(ConfigError, match="holds other things already; name a new folder"):
        pull("me/saes", output)
