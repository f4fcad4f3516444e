"""Crosscoders in the form of dictionary_learning's fork: what its classes compute of the tensors is
what ours gives, both ways.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from flash_sae_dist import interop
from flash_sae_dist.interop import About
from flash_sae_dist.launch.cli import build
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.models.crosscoder import Crosscoder

S, D, F, K = 3, 5, 24, 4
ABOUT = About("layers.3+layers.4+layers.5", "EleutherAI/pythia-70m")
APART, ALIKE, PLAIN = (2.7, 0.3, 11.0), (2.7, 2.7, 2.7), (1.0, 1.0, 1.0)


def rows(seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return 4 * torch.randn(60, S * D, generator=g, dtype=torch.float64)


def crosscoder(
    name: str, scales: tuple[float, ...], *, own: bool = False, dtype: torch.dtype = torch.float64,
    **keys: Any,
) -> Crosscoder:  # fmt: skip
    """As training leaves one: decoder rows of norm 1 over all hookpoints, thresholds of the moving
    average or each latent's own."""
    if name != "relu_crosscoder":
        keys["k"] = K
    kind, g = ARCHITECTURES[name], torch.Generator().manual_seed(3)
    config = kind.Config(architecture=name, d_sae=F, **keys)
    sae = kind.from_config(config, S * D, sources=(D,) * S, dtype=dtype).eval()
    assert isinstance(sae, Crosscoder)
    with torch.no_grad():
        for param in (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec):
            param.copy_(torch.randn(param.shape, generator=g))
        sae.W_dec[:, :D] *= torch.rand(F, 1, generator=g)
        sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
        means = [None if scales == PLAIN else torch.randn(D, generator=g) for _ in range(S)]
        sae.set_sources_(scales, means)
        if name == "batch_topk_crosscoder":
            ranks = sae.ranks()
            sae.mean_threshold.fill_(0.8)
            sae.threshold.copy_(sae.mean_threshold / (1 if ranks is None else ranks))
            if own:
                sae.threshold *= 0.5 + torch.rand(F, generator=g)
                sae.threshold[3], sae.threshold[4] = torch.inf, 0
    return sae


def theirs(found: dict[str, Tensor], x: Tensor) -> Tensor:
    """What CrossCoder and BatchTopKCrossCoder give of rows side by side."""
    tensors = {name: tensor.double() for name, tensor in found.items()}
    mean, by = tensors["activation_mean"], tensors["activation_global_scale"]
    x, normalises = x.reshape(-1, S, D), not bool(mean.isnan().any())
    if normalises:
        x = (x - mean) * by
    pre = torch.einsum("nsd,sdf->nf", x, tensors["encoder.weight"]) + tensors["encoder.bias"]
    acts, W_dec = pre.relu(), tensors["decoder.weight"]
    if "threshold" in tensors:
        norms = {
            1: W_dec.norm(dim=2).sum(dim=0),
            2: W_dec.norm(dim=(0, 2)),
            4: torch.ones(F, dtype=torch.float64),
        }[int(tensors["code_normalization_id"])]
        acts = acts * (acts * norms > tensors["threshold"])
        assert 0.05 < float((acts > 0).double().mean()) < 0.95
    out = torch.einsum("nf,sfd->nsd", acts, W_dec) + tensors["decoder.bias"]
    return (out / by + mean if normalises else out).flatten(1)


@pytest.mark.parametrize("scales", [PLAIN, ALIKE, APART], ids=str)
@pytest.mark.parametrize("norms", ["sum", "whole"])
@pytest.mark.parametrize("own", [None, False, True])
def test_their_classes_give_the_same_and_it_comes_back(
    scales: tuple[float, ...], norms: str, own: bool | None, tmp_path: Path
) -> None:
    name = "relu_crosscoder" if own is None else "batch_topk_crosscoder"
    sae = crosscoder(name, scales, own=bool(own), decoder_norms=norms)
    path = interop.save(sae, tmp_path / "x", "dictionary_learning", ABOUT)
    found = torch.load(path / "ae.pt", weights_only=True)
    torch.testing.assert_close(theirs(found, rows()), sae(rows()).recon, rtol=1e-9, atol=1e-9)
    config = json.loads((path / "config.json").read_text())["trainer"]
    assert (config["activation_dim"], config["dict_size"]) == (D, F)
    # One threshold of activations times norms is theirs; others are taken into the weights.
    as_theirs = {"sum": 1, "whole": 2}[norms]
    same = own is None or (own is False and scales != APART)
    assert int(found["code_normalization_id"]) == (as_theirs if same else 4)
    assert config["code_normalization"] == {"sum": "CROSSCODER", "whole": "SAE"}[norms]
    back = interop.load(path)
    assert back.spec() == sae.spec()
    assert back.about.hookpoint == ABOUT.hookpoint
    small = crosscoder(name, scales, own=bool(own), decoder_norms=norms, dtype=torch.float32)
    again = interop.load(interop.save(small, tmp_path / "y", "dictionary_learning", ABOUT))
    for key, value in small.state_dict().items():
        got = again.state_dict()[key]
        if same:
            assert torch.equal(got, value), key
        elif key != "threshold_steps":
            torch.testing.assert_close(got, value, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(back(rows()).recon, sae(rows()).recon, rtol=1e-9, atol=1e-9)


def their_tensors(batch: bool, kind: int = 1) -> dict[str, Tensor]:
    """A state_dict as their trainers leave it: rows of any norm, elements of unequal deviations."""
    g = torch.Generator().manual_seed(7)
    shapes = {
        "encoder.weight": (S, D, F), "encoder.bias": (F,), "decoder.weight": (S, F, D),
        "decoder.bias": (S, D), "activation_mean": (S, D), "activation_std": (S, D),
    }  # fmt: skip
    found = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    found["activation_std"] = found["activation_std"].abs() + 0.5
    found["activation_global_scale"] = torch.tensor(0.17)
    found["target_rms"], found["code_normalization_id"] = torch.tensor(1.0), torch.tensor(kind)
    if batch:
        found |= {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(9.0)}
        if kind == 4:
            found["threshold"] = torch.tensor(1.5)
    return found


@pytest.mark.parametrize(("batch", "kind"), [(True, 1), (True, 2), (True, 4), (False, 1)])
def test_files_of_their_trainers_and_of_the_hub(batch: bool, kind: int, tmp_path: Path) -> None:
    found = their_tensors(batch, kind)
    torch.save(found, tmp_path / "ae_20000.pt")  # without a config
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(found, hub / "model.safetensors")
    config = {"activation_dim": D, "dict_size": F, "num_layers": S, "encoder_layers": None}
    (hub / "config.json").write_text(json.dumps(config))
    for path in (tmp_path / "ae_20000.pt", hub, hub / "model.safetensors"):
        back = interop.load(path)
        assert isinstance(back, Crosscoder)
        assert back.spec().get("k") == (K if batch else None)
        torch.testing.assert_close(
            back(rows().float()).recon.double(), theirs(found, rows()), rtol=1e-4, atol=1e-4
        )
    # And out again, bits and all: our rows are divided by one number.
    written = interop.save(back, tmp_path / "again", "dictionary_learning", ABOUT)
    again = torch.load(written / "ae.pt", weights_only=True)
    torch.testing.assert_close(theirs(again, rows()), theirs(found, rows()), rtol=1e-4, atol=1e-4)


def test_what_is_not_held_or_read(tmp_path: Path) -> None:
    kind = ARCHITECTURES["relu_crosscoder"]
    sae = kind.from_config(kind.Config(d_sae=F), 12, sources=(5, 7))
    with pytest.raises(ValueError, match=r"widths \[5, 7\], of which dictionary_learning"):
        interop.save(sae, tmp_path, "dictionary_learning")
    with pytest.raises(ValueError, match="'topk_crosscoder', which dictionary_learning cannot"):
        interop.save(crosscoder("topk_crosscoder", PLAIN), tmp_path, "dictionary_learning")
    for changed, told in (
        ({"code_normalization_id": torch.tensor(5)}, "MIXED or DECOUPLED"),
        ({"decoder.weight": torch.ones(S, F, D + 1)}, "do not fit together: decoder.weight"),
        ({"activation_mean": torch.ones(D)}, "its normalisation is not of"),
        ({"threshold": torch.ones(S)}, "not one number each"),
    ):
        torch.save(their_tensors(True) | changed, tmp_path / "ae.pt")
        with pytest.raises(ValueError, match=told):
            interop.load(tmp_path / "ae.pt")
    hub = tmp_path / "hub"
    hub.mkdir()
    save_file(their_tensors(True), hub / "model.safetensors")
    for config, told in (
        ({"activation_dim": D, "dict_size": F, "encoder_layers": [2, 1, 0]}, "encoder_layers="),
        ({"architectures": ["LlamaForCausalLM"]}, "is of no dictionary"),
    ):
        (hub / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=told):
            interop.load(hub)


@pytest.mark.parametrize("name", ["topk_crosscoder", "batch_topk_crosscoder", "relu_crosscoder"])
def test_this_librarys_own_form_holds_them_and_convert_reads_it(name: str, tmp_path: Path) -> None:
    sae = crosscoder(name, APART, own=True, dtype=torch.float32)
    sae.about = ABOUT
    path = interop.save(sae, tmp_path / "own", "flash_sae_dist", ABOUT)
    for key, value in sae.state_dict().items():
        assert torch.equal(interop.load(path).state_dict()[key], value), key
    words = ["convert", str(path), str(tmp_path / "x"), "--format", "dictionary_learning"]
    told = CliRunner().invoke(build(), words)
    if name == "topk_crosscoder":
        assert told.exit_code == 2
        return
    assert told.exit_code == 0, told.output
    back = interop.load(tmp_path / "x")
    assert back.about.hookpoint == ABOUT.hookpoint
    x = rows().float()
    torch.testing.assert_close(back(x).recon, sae(x).recon, rtol=1e-4, atol=1e-4)
