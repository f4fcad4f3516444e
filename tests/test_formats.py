"""Every format: found, read back as it was written, and each damage told in one sentence."""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flash_sae_dist import TopKSAE, interop
from flash_sae_dist.files import CHECKSUMS
from flash_sae_dist.interop import FORMATS, About, delphi, hook_names
from flash_sae_dist.launch.cli import build
from flash_sae_dist.models import ARCHITECTURES
from flash_sae_dist.models.base import SparseCoder
from flash_sae_dist.models.crosscoder import Crosscoder
from flash_sae_dist.models.jumprelu import JumpReLU, JumpReLUConfig

ABOUT = About("model.layers.3", "EleutherAI/pythia-70m", 64)
D_IN, D_SAE, K = 12, 40, 5


@pytest.fixture(autouse=True)
def _no_transformer_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    # Asking TransformerLens takes as long as all of this file.
    monkeypatch.setattr(hook_names, "_known_models", lambda: None)


def perturbed(sae: SparseCoder) -> SparseCoder:
    with torch.no_grad():
        for name, p in sae.named_parameters():
            p.add_(0.3 * (torch.rand_like(p) if name == "threshold" else torch.randn_like(p)))
    return sae


def make(name: str) -> SparseCoder:
    """An SAE that a format holds; decoder rows are of unit norm only by chance."""
    torch.manual_seed(1)
    if name in ("gemma_scope", "gemma_scope_2", "circuit_tracer"):
        return perturbed(JumpReLU(JumpReLUConfig(d_sae=D_SAE), D_IN).eval())
    norm = "layer_norm" if name == "openai" else "none"
    return perturbed(TopKSAE(D_IN, D_SAE, K, input_norm=norm))


def assert_same(back: SparseCoder, sae: SparseCoder) -> None:
    assert type(back) is type(sae)
    assert back.spec() == sae.spec()
    for key, value in sae.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


ALL = [name for name in FORMATS if name != "circuit_tracer"]


@pytest.mark.parametrize("name", ALL)
def test_round_trip_is_exact_and_the_format_is_found(name: str, tmp_path: Path) -> None:
    sae = make(name)
    path = interop.save(sae, tmp_path / "model.layers.3", name, ABOUT)
    found, _ = interop.find(path)
    assert found.name == name
    assert_same(interop.load(path), sae)
    if path.is_dir():
        assert (name == "flash_sae_dist") == (not (path / CHECKSUMS).is_file())
        # A file of it stands for the folder.
        weights = next(p for p in path.iterdir() if p.suffix in (".safetensors", ".pt", ".npz"))
        assert_same(interop.load(weights), sae)


@pytest.mark.parametrize("name", ["sae_lens", "dictionary_learning", "llamascopium"])
def test_jumprelu_too(name: str, tmp_path: Path) -> None:
    sae = make("gemma_scope")
    back = interop.load(interop.save(sae, tmp_path / "x", name, ABOUT))
    if name != "llamascopium":
        assert_same(back, sae)
    for key, value in sae.state_dict().items():
        # The logarithm in between may cost a threshold's last bit.
        torch.testing.assert_close(back.state_dict()[key], value, rtol=2e-7, atol=0)


def made_of(architecture: str, **place: int) -> SparseCoder:
    """An SAE of an architecture, or with a d_out a transcoder, as it is used."""
    torch.manual_seed(2)
    kind = ARCHITECTURES[architecture]
    keys = {"architecture": architecture, "d_sae": D_SAE, "k": K, "prefix_widths": [5, 20]}
    keys |= {"skip": bool(place)}
    config = kind.Config.model_validate(
        {n: v for n, v in keys.items() if n in kind.Config.model_fields}
    )
    sae = perturbed(kind.from_config(config, D_IN, **place).eval())
    with torch.no_grad():
        if issubclass(kind, Crosscoder):
            # Others' are made so, which multiplies activations.
            sae.W_dec.copy_(torch.nn.functional.normalize(sae.W_dec, dim=1))
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.copy_(0.2 + torch.rand(D_SAE))
    return sae


HELD = [(name, kind) for name, found in FORMATS.items() for kind in sorted(found.converters)]


@pytest.mark.parametrize(("name", "kind"), [h for h in HELD if h[0] not in ("openai",)])
def test_every_architecture_is_the_same_at_use(name: str, kind: str, tmp_path: Path) -> None:
    sae, x = made_of(kind), 2 * torch.randn(60, D_IN)
    contents = interop.contents.contents_of(sae)
    if name == "circuit_tracer" and "topk" in kind:
        contents = interop.thresholds.with_thresholds(sae, x)
    path = interop.save(contents, tmp_path / "model.layers.3", name, ABOUT)
    back = interop.load(path)
    if "topk" not in kind or name != "circuit_tracer" or kind == "batch_topk":
        torch.testing.assert_close(back.encode_dense(x), sae.encode_dense(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(back(x).recon, sae(x).recon, rtol=1e-5, atol=1e-5)
    assert (sae.encode_dense(x) > 0).any()
    if FORMATS[name].converters[kind][1] is not None and name != "dictionary_learning":
        assert type(back) is type(sae)


TRANSCODERS = [(n, kind) for n, f in FORMATS.items() for kind in sorted(f.transcoders)]


@pytest.mark.parametrize(("name", "kind"), TRANSCODERS)
@pytest.mark.parametrize("skip", [True, False])
def test_transcoders(name: str, kind: str, skip: bool, tmp_path: Path) -> None:
    d_out = D_IN if name in ("sparsify", "llamascopium") else 7
    sae, x = made_of(kind, d_out=d_out), 2 * torch.randn(60, D_IN)
    if not skip:
        kept = {n: t for n, t in sae.state_dict().items() if n != "W_skip"}
        keys = interop.contents.contents_of(sae).keys | {"skip": False}
        sae = interop.build(tmp_path, interop.Contents(kind, kept, keys))
    contents = interop.contents.contents_of(sae)
    if name == "circuit_tracer" and "topk" in kind:
        contents = interop.thresholds.with_thresholds(sae, x)
    about = ABOUT._replace(
        hookpoint="model.layers.3.mlp:input", output_hookpoint="model.layers.3.mlp"
    )
    if skip and name == "llamascopium":
        with pytest.raises(ValueError, match="no word for a transcoder's skip connection"):
            interop.save(contents, tmp_path / "model.layers.3", name, about)
        return
    back = interop.load(interop.save(contents, tmp_path / "model.layers.3", name, about))
    assert (back.transcodes, back.d_out, back.W_skip is not None) == (True, d_out, skip)
    if "topk" not in kind or name != "circuit_tracer" or kind == "batch_topk":
        torch.testing.assert_close(back(x).recon, sae(x).recon, rtol=1e-5, atol=1e-5)
    if name in ("sae_lens", "gemma_scope_2", "llamascopium"):
        assert back.about.output_hookpoint == "model.layers.3.mlp"


def test_formats_without_a_word_for_transcoders_refuse_them(tmp_path: Path) -> None:
    sae = made_of("topk", d_out=7)
    for name in ("sae_lens", "dictionary_learning", "gemma_scope", "qwen_scope"):
        with pytest.raises(ValueError, match="is a transcoder of architecture 'topk'"):
            interop.save(sae, tmp_path, name, ABOUT)
    narrow = interop.contents.contents_of(sae)
    del narrow.weights["W_skip"]
    for name in ("sparsify", "llamascopium"):
        with pytest.raises(ValueError, match=f"{name}'s are of one width"):
            interop.save(narrow, tmp_path, name, ABOUT._replace(output_hookpoint="model.layers.4"))
    with pytest.raises(ValueError, match="--output-hookpoint"):
        interop.save(made_of("jumprelu", d_out=7), tmp_path, "gemma_scope_2", ABOUT)


def test_dictionary_learnings_batch_rules_have_one_threshold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for kind in ("batch_topk", "matryoshka"):
        sae = made_of(kind)
        assert interop.load(interop.save(sae, tmp_path / "own", "dictionary_learning")).spec()[
            "architecture"] == "jumprelu"  # fmt: skip
        with torch.no_grad():
            sae.threshold.fill_(0.7)
            sae.mean_threshold.fill_(0.7)
        folder = interop.save(sae, tmp_path / kind, "dictionary_learning", ABOUT)
        assert_same(interop.load(folder), sae)
        found = torch.load(folder / "ae.pt", weights_only=True)
        (folder / CHECKSUMS).unlink()
        torch.save(found | {"threshold": torch.tensor(-1.0)}, folder / "ae.pt")
        x = torch.randn(5, D_IN)
        every = (interop.load(folder).encode_dense(x) > 0).sum()
        assert every > (sae.encode_dense(x) > 0).sum()
        assert "before its threshold was first set" in caplog.text
        caplog.clear()
    torch.save(found | {"group_sizes": torch.tensor([5, 5])}, folder / "ae.pt")
    with pytest.raises(ValueError, match="do not add up to the 40 latents"):
        interop.load(folder)


def test_the_april_form_of_dictionary_learning(tmp_path: Path) -> None:
    """Its encoder reads x itself; its decoder has the bias."""
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(D_IN, D_SAE), torch.nn.Linear(D_SAE, D_IN)
    state = {f"encoder.{n}": p for n, p in encoder.state_dict().items()}
    state |= {f"decoder.{n}": p for n, p in decoder.state_dict().items()}
    torch.save(state, tmp_path / "ae.pt")
    config = {"trainer": {"dict_class": "AutoEncoderNew"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.randn(9, D_IN)
    want = decoder(encoder(x).relu())
    torch.testing.assert_close(interop.load(tmp_path)(x).recon, want, rtol=1e-5, atol=1e-5)


def test_half_types_are_kept(tmp_path: Path) -> None:
    sae = make("sae_lens").bfloat16()
    for name in ("sae_lens", "sparsify", "dictionary_learning"):
        assert_same(interop.load(interop.save(sae, tmp_path / name, name)), sae)


def test_circuit_tracer_holds_thresholds_of_any_architecture(tmp_path: Path) -> None:
    for layer in range(2):
        about = About(f"model.layers.{layer}")
        interop.save(make("circuit_tracer"), tmp_path / "set", "circuit_tracer", about)
    with pytest.raises(ValueError, match=r"holds 2 layers; name the file of one"):
        interop.load(tmp_path / "set")
    back = interop.load(tmp_path / "set/layer_1.safetensors")
    x = 2 * torch.randn(50, D_IN)
    torch.testing.assert_close(back(x).recon, make("circuit_tracer")(x).recon, rtol=1e-5, atol=1e-5)
    config = yaml.safe_load((tmp_path / "set/config.yaml").read_text())
    assert config["feature_input_hook"] == config["feature_output_hook"] == "hook_resid_post"
    assert [Path(p).name for p in config["transcoders"]] == [
        "layer_0.safetensors",
        "layer_1.safetensors",
    ]
    with pytest.raises(ValueError, match="feature_input_hook='hook_resid_post'"):
        interop.save(
            make("circuit_tracer"),
            tmp_path / "set",
            "circuit_tracer",
            About("gpt_neox.layers.2.mlp"),
        )
    with pytest.raises(ValueError, match="--rows"):
        interop.save(make("sae_lens"), tmp_path / "topk", "circuit_tracer", ABOUT)


def test_thresholds_keep_each_latents_frequency(tmp_path: Path) -> None:
    sae = make("sae_lens")
    x = 2 * torch.randn(400, D_IN)
    contents = interop.thresholds.with_thresholds(sae, x)
    path = interop.save(contents, tmp_path / "set", "circuit_tracer", ABOUT)
    gated = interop.load(path)
    assert isinstance(gated, JumpReLU)
    assert torch.equal((gated.encode_dense(x) > 0).sum(0), (sae.encode_dense(x) > 0).sum(0))
    # Of the same latents nearly everywhere, and so nearly the same reconstruction.
    error = (gated(x).recon - x).square().sum() / (sae(x).recon - x).square().sum()
    assert 0.8 < error < 1.2


def test_norms_of_the_decoder_are_taken_into_the_encoder(tmp_path: Path) -> None:
    """SAELens's own default: pre-activations times the norms are ranked."""
    sae = make("sae_lens")
    folder = interop.save(sae, tmp_path, "sae_lens")
    config = json.loads((folder / "cfg.json").read_text())
    assert config["rescale_acts_by_decoder_norm"] is False, "the rows are of other norms"
    (folder / CHECKSUMS).unlink()
    (folder / "cfg.json").write_text(json.dumps(config | {"rescale_acts_by_decoder_norm": True}))
    back, x = interop.load(folder), 2 * torch.randn(30, D_IN)
    pre = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc) * sae.W_dec.norm(dim=1)
    top = pre.topk(K, dim=1)
    acts = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    want = (acts / sae.W_dec.norm(dim=1)) @ sae.W_dec + sae.b_dec
    torch.testing.assert_close(back(x).recon, want, rtol=1e-5, atol=1e-5)
    unit = TopKSAE(D_IN, D_SAE, K)
    assert interop.sae_lens.CONVERTERS["topk"][0](interop.contents.contents_of(unit))[1][
        "rescale_acts_by_decoder_norm"
    ]
    assert_same(interop.load(interop.save(unit, tmp_path / "unit", "sae_lens")), unit)


def test_sae_lens_of_before_6(tmp_path: Path) -> None:
    sae = make("sae_lens")
    folder = interop.save(sae, tmp_path, "sae_lens")
    (folder / CHECKSUMS).unlink()
    old = {
        "d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "hook_name": "blocks.3.hook_resid_post",
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}, "model_name": "gpt2",
        "normalize_activations": False,
    }  # fmt: skip
    (folder / "cfg.json").write_text(json.dumps(old))
    assert_same(interop.load(folder), sae)


def test_layer_norm_travels_where_a_format_knows_it(tmp_path: Path) -> None:
    sae = make("openai")
    assert_same(interop.load(interop.save(sae, tmp_path / "lens", "sae_lens")), sae)
    for name in ("sparsify", "dictionary_learning", "qwen_scope", "llamascopium"):
        with pytest.raises(ValueError, match="standardises its tokens"):
            interop.save(sae, tmp_path / name, name)
    with pytest.raises(ValueError, match="input_norm='none'"):
        interop.save(make("sae_lens"), tmp_path / "openai", "openai")


def test_qwen_scope_needs_k(tmp_path: Path) -> None:
    sae = make("qwen_scope")
    path = interop.save(sae, tmp_path, "qwen_scope", ABOUT)
    assert path.name == "layer3.sae.pt"
    data = torch.load(path, weights_only=True)
    del data["k"]
    torch.save(data, path)
    with pytest.raises(ValueError, match="does not tell k"):
        interop.load(path)
    assert_same(interop.load(path, k=K), sae)
    named = tmp_path / f"SAE-Res-Qwen3-8B-Base-W64K-L0_{K}"
    named.mkdir()
    shutil.move(path, named)
    back = interop.load(named / path.name)
    assert_same(back, sae)
    assert back.about.hookpoint == "model.layers.3"


@pytest.mark.parametrize("transcodes", [False, True])
def test_llamascopium_of_scaled_rows(transcodes: bool, tmp_path: Path) -> None:
    """Its own default: rows are scaled to a mean norm of sqrt(d), decoder norms included; a
    transcoder's output by its own norm."""
    sae = make("llamascopium")
    folder = interop.save(sae, tmp_path, "llamascopium", ABOUT)
    (folder / CHECKSUMS).unlink()
    config = json.loads((folder / "config.json").read_text())
    scaled = {"norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
    norms = {"model.layers.3": torch.tensor(7.0)}
    if transcodes:
        scaled["hook_point_out"], norms["out"] = "out", torch.tensor(5.0)
    (folder / "config.json").write_text(json.dumps(config | scaled))
    file = folder / "sae_weights.safetensors"
    with pytest.raises(ValueError, match="fold_activation_scale"):
        interop.load(folder)
    weights = {n: t.float() for n, t in load_file(file).items()}
    keys = {f"dataset_average_activation_norm.{hook}": norm for hook, norm in norms.items()}
    save_file(weights | keys, file)
    x = 2 * torch.randn(30, D_IN)
    s, out = (D_IN**0.5 / norm for norm in (norms["model.layers.3"], list(norms.values())[-1]))
    pre = ((s * x) @ weights["W_E"] + weights["b_E"]) * weights["W_D"].norm(dim=1)
    top = pre.topk(K, dim=1)
    acts = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    want = ((acts / weights["W_D"].norm(dim=1)) @ weights["W_D"] + weights["b_D"]) / out
    back = interop.load(folder)
    assert back.transcodes == transcodes
    torch.testing.assert_close(back(x).recon, want, rtol=1e-5, atol=2e-5)


def test_openais_own_state_dict_tells_the_activation_twice(tmp_path: Path) -> None:
    sae = make("openai")
    path = interop.save(sae, tmp_path / "3.pt", "openai", ABOUT)
    state = torch.load(path, weights_only=True)
    torch.save(state | {"activation.k": K, "activation.postact_fn": "ReLU"}, path)
    assert_same(interop.load(path), sae)


def test_openais_relu_saes(tmp_path: Path) -> None:
    """Its first ones: of ReLU, tokens as they are, the activation's name in the file or not."""
    sae, x = made_of("relu"), 2 * torch.randn(30, D_IN)
    path = interop.save(sae, tmp_path / "3.pt", "openai", ABOUT)
    assert_same(interop.load(path), sae)
    state = torch.load(path, weights_only=True)
    assert state["activation"] == "ReLU"
    pre = (x - state["pre_bias"]) @ state["encoder.weight"].T + state["latent_bias"]
    want = pre.relu() @ state["decoder.weight"].T + state["pre_bias"]
    torch.save({n: t for n, t in state.items() if n != "activation"}, path)
    torch.testing.assert_close(interop.load(path)(x).recon, want, rtol=1e-5, atol=1e-5)
    kind = ARCHITECTURES["relu"]
    config = kind.Config.model_validate({"d_sae": D_SAE, "input_norm": "layer_norm"})
    standardised = kind.from_config(config, D_IN)
    with pytest.raises(ValueError, match="only of TopK does OpenAI's class standardise tokens"):
        interop.save(standardised, tmp_path / "4.pt", "openai", ABOUT)
    with pytest.raises(ValueError, match="standardises each token where the activation is TopK"):
        interop.save(TopKSAE(D_IN, D_SAE, K), tmp_path / "4.pt", "openai", ABOUT)


def _other(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrites a file of tensors or keys of any type."""
    if file.suffix == ".safetensors":
        save_file({n: t.contiguous() for n, t in change(dict(load_file(file))).items()}, file)
    elif file.suffix == ".npz":
        with np.load(file) as data:
            arrays = {n: torch.from_numpy(data[n]) for n in data.files}
        np.savez(file, **{n: np.asarray(t) for n, t in change(arrays).items()})
    elif file.suffix == ".pt":
        torch.save(change(torch.load(file, weights_only=True)), file)
    else:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))


class Evil:
    """What unpickling would run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("evil"),)


def damages(path: Path) -> list[tuple[str, Callable[[], None]]]:
    """Twenty and more ways in which files of an SAE are not whole."""
    files = [path] if path.is_file() else sorted(path.iterdir())
    weights = next(f for f in files if f.suffix in (".safetensors", ".pt", ".npz"))
    configs = [f for f in files if f.suffix == ".json"]
    data = weights.read_bytes()

    def tensors(values: dict[str, Any]) -> list[str]:
        found = {n for n, t in values.items() if isinstance(t, torch.Tensor) and t.ndim}
        # Statistics that no one reads.
        return sorted(n for n in found if not n.startswith(("stats_", "latents_")))

    def each(name: str, change: Callable[[torch.Tensor], object], which: int) -> tuple[str, Any]:
        def act() -> None:
            _other(weights, lambda v: {**v, (n := tensors(v)[which]): change(v[n])})

        return f"{name} {which}", act

    def write(content: bytes) -> Callable[[], None]:
        return lambda: weights.write_bytes(content) and None

    buffer = io.BytesIO()
    pickle.dump(Evil(), buffer)
    found: list[tuple[str, Callable[[], None]]] = [
        ("gone", weights.unlink),
        ("empty", write(b"")),
        ("text", write(b"not a model\n" * 20)),
        ("a pickle", write(buffer.getvalue())),
        ("a header alone", write(data[:100])),
        ("half", write(data[: len(data) // 2])),
        ("one byte short", write(data[:-1])),
        ("nothing in it", lambda: _other(weights, lambda v: {"x": torch.zeros(2)})),
        ("a tensor more", lambda: _other(weights, lambda v: {**v, "W_more": torch.zeros(3)})),
        *(
            (f"without {i}", lambda i=i: _other(
                weights, lambda v: {n: t for n, t in v.items() if n != tensors(v)[i]}))
            for i in range(3)
        ),
        *(each("flat", lambda t: t.flatten()[:-1], i) for i in range(4)),
        *(each("nan", lambda t: torch.full_like(t, torch.nan), i) for i in range(4)),
        *(each("whole numbers", lambda t: t.to(torch.int32), i) for i in range(2)),
        *(each("deep", lambda t: t[None, None], i) for i in range(2)),
    ]  # fmt: skip
    for config in configs:
        found += [
            # Some of Gemma Scope 2's have none.
            *([("config gone", config.unlink)] if weights.name != "params.safetensors" else []),
            ("config empty", lambda c=config: c.write_text("") and None),
            ("config cut", lambda c=config: c.write_text(c.read_text()[:-8]) and None),
            ("config a list", lambda c=config: c.write_text("[1]") and None),
            ("config no text", lambda c=config: c.write_bytes(b"\xff\xfe\x00") and None),
        ]
    return found


def _wide(path: Path) -> list[tuple[str, Callable[[], None]]]:
    """Keys that are told wrongly, of formats whose config tells widths and k."""
    config = next((f for f in sorted(path.iterdir()) if f.suffix == ".json"), None)
    if path.is_file() or config is None:
        return []
    text = json.loads(config.read_text())
    inner = text.get("trainer") if isinstance(text.get("trainer"), dict) else text
    out = []
    for key, wrong in (
        *(("k", v) for v in (0, -1, "5", True, 4.5, 41)),
        *(("top_k", v) for v in (0, "5", 41)),
        *((key, 39) for key in ("d_sae", "d_in", "num_latents", "activation_dim", "d_model")),
        *((key, "other") for key in ("architecture", "activation", "act_fn", "dict_class")),
    ):
        if key in inner and config.name != CHECKSUMS:

            def act(key: str = key, wrong: object = wrong) -> None:
                changed = {**inner, key: wrong}
                whole = {**text, "trainer": changed} if inner is not text else changed
                config.write_text(json.dumps(whole))

            out.append((f"{key}={wrong!r}", act))
    return out


@pytest.mark.parametrize("name", [n for n in FORMATS if n != "flash_sae_dist"])
def test_damaged_files_end_in_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = interop.save(make(name), tmp_path / "whole", name, ABOUT)
    folder = whole if whole.is_dir() else whole.parent
    (folder / CHECKSUMS).unlink(missing_ok=True)  # as another's files
    told, place = set(), tmp_path / "m" / "model.layers.3"
    count = len(damages(whole) + (_wide(whole) if whole.is_dir() else []))
    for number in range(count):
        shutil.rmtree(place.parent, ignore_errors=True)
        shutil.copytree(folder, place)
        path = place if whole.is_dir() else place / whole.name
        cases = damages(path) + (_wide(path) if whole.is_dir() else [])
        what, act = cases[number]
        if (name, what) == ("circuit_tracer", "without 2"):
            continue  # its thresholds: that is a ReLU SAE's file
        act()
        with pytest.raises(ValueError, match=r".") as caught:  # noqa: PT011
            interop.load(path)
        sentence = str(caught.value)
        assert str(place.parent) in sentence, (what, sentence)
        assert "\n" not in sentence, (what, sentence)
        assert len(sentence) < 700, (what, sentence)
        told.add(what)
    assert len(told) >= 20
    assert not (tmp_path / "evil").exists(), "a pickle was run"


def test_random_bytes_are_told(tmp_path: Path) -> None:
    """Whatever is flipped in a .pt, whose checksum nobody keeps, is told or changes one value."""
    path = interop.save(make("qwen_scope"), tmp_path, "qwen_scope", ABOUT)
    data, rng = path.read_bytes(), random.Random(0)
    for _ in range(60):
        changed = bytearray(data)
        for _ in range(8):
            changed[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        with suppress(ValueError):
            interop.load(path)


def test_architectures_that_do_not_exist_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interop.save(make("gemma_scope"), tmp_path / "g", "gemma_scope")
    others = {n: kind for n, kind in ARCHITECTURES.items() if n != "jumprelu"}
    monkeypatch.setattr(interop.contents, "ARCHITECTURES", others)
    with pytest.raises(ValueError, match="'jumprelu', which this version does not have"):
        interop.load(tmp_path / "g")
    folder = interop.save(make("sae_lens"), tmp_path / "l", "sae_lens")
    (folder / CHECKSUMS).unlink()
    for theirs in ("temporal", "topk_transcoder", "matching_pursuit"):
        config = json.loads((folder / "cfg.json").read_text())
        (folder / "cfg.json").write_text(json.dumps(config | {"architecture": theirs}))
        with pytest.raises(ValueError, match=f"'{theirs}', which is not read here"):
            interop.load(folder)


def test_what_is_no_sae_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        interop.load(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("a")
    for path in (tmp_path, tmp_path / "a.txt"):
        with pytest.raises(ValueError, match="no SAE of a format that is known here"):
            interop.load(path)


def test_convert(tmp_path: Path) -> None:
    app = build()
    sae = make("sae_lens")
    source = interop.save(sae, tmp_path / "dl", "dictionary_learning", ABOUT)

    def run(*words: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["convert", *map(str, words)])
        return result.exit_code, result.output

    code, said = run(source / "ae.pt", tmp_path / "q", "--format", "qwen_scope")
    assert (code, said) == (0, f"topk, 40 latents of width 12 -> {tmp_path / 'q/layer3.sae.pt'}\n")
    code, _ = run(tmp_path / "q", tmp_path / "own", "--format", "flash_sae_dist", "--model", "gpt2")
    assert code == 0
    back = interop.load(tmp_path / "own")
    assert_same(back, sae)
    assert back.about == About("model.layers.3", "gpt2")
    for words, told in (
        ((tmp_path / "none", "x", "--format", "sae_lens"), "is no file or folder"),
        ((source, "x", "--format", "sae-lens"), "it is none of flash_sae_dist, sae_lens"),
        ((source, "x", "--format", "gemma_scope"), "cannot hold"),
        ((source, "x", "--format", "circuit_tracer"), "--rows"),
    ):
        code, said = run(*words)
        assert code == 2, said
        assert told in said
        assert said.count("\n") == 1


def test_delphis_latent_cache(tmp_path: Path) -> None:
    sae = make("sae_lens")
    tokens = torch.randint(0, 50, (9, 7))
    x = 2 * torch.randn(9, 7, D_IN)
    place = delphi.write_cache(
        tmp_path, "layers.3", sae, tokens, x.split(4), model_name="m", num_splits=3
    )
    assert sorted(p.name for p in place.iterdir()) == [
        "0_12.safetensors", "13_25.safetensors", "26_39.safetensors", "config.json",
    ]  # fmt: skip
    first = load_file(place / "13_25.safetensors")
    assert first["locations"].dtype == torch.uint16
    assert int(first["locations"][:, 2].long().max()) <= 12, "counted from the file's first latent"
    cache = delphi.read_cache(place)
    assert torch.equal(cache.tokens, tokens)
    dense = torch.zeros(9, 7, D_SAE)
    dense[tuple(cache.locations.T)] = cache.activations.float()
    torch.testing.assert_close(dense, sae.encode_dense(x).detach(), rtol=1e-3, atol=1e-3)
    assert json.loads((place / "config.json").read_text())["ctx_len"] == 7
    with pytest.raises(ValueError, match="of 4 sequences, tokens of 9"):
        delphi.write_cache(tmp_path, "h", sae, tokens, [x[:4]], model_name="m")
    (place / "0_12.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="0_12.safetensors holds no whole"):
        delphi.read_cache(place)
    with pytest.raises(ValueError, match="no latent cache"):
        delphi.read_cache(tmp_path)
