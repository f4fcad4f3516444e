"""Files both ways between this library and others, each in an environment of its own.

python tests/peers/formats.py write DIR           (here)  our files of every architecture, and rows
python tests/peers/formats.py LIBRARY DIR         (there) reads ours, writes its own
python tests/peers/formats.py check DIR           (here)  both reconstruct alike

A case is FORMAT/ARCHITECTURE, of transcoders with `-transcoder` or `-skip` behind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

D_IN, D_SAE, D_OUT, K = 12, 48, 7, 5
GROUPS = [6, 18, 24]
HOOK = "blocks.0.hook_resid_post"
Reconstruct = Callable[[Tensor], Tensor]
# What each library reads of formats.
READS = {
    "dictionary_learning": ("dictionary_learning",),
    "llamascopium": ("llamascopium",),
    "circuit_tracer": ("circuit_tracer", "gemma_scope_2"),
    "sparsify": ("sparsify",),
    "sae_lens": ("sae_lens", "gemma_scope", "gemma_scope_2", "qwen_scope"),
    "openai": ("openai",),
}
# A latent cache, which is no SAE.
SEQUENCES, LENGTH, SPLITS = 9, 7, 3


def moved(module: torch.nn.Module) -> Any:
    """A module whose parameters are nobody's first ones, thresholds above 0."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            near = torch.rand_like(p) if "threshold" in name else 0.3 * torch.randn_like(p)
            p.add_(near)
    return module


# --- here


def made(name: str, kind: str, how: str) -> Any:
    """An SAE or a transcoder of ours that a format holds; of the batch rules one threshold, which
    all formats have."""
    from flash_sae_dist.models import ARCHITECTURES

    config = ARCHITECTURES[kind].Config
    keys = {"architecture": kind, "d_sae": D_SAE, "k": K, "prefix_widths": [6, 24]}
    keys["skip"] = how == "skip"
    keys["input_norm"] = "layer_norm" if name == "openai" and "topk" in kind else "none"
    given = config.model_validate({n: v for n, v in keys.items() if n in config.model_fields})
    place = {"d_out": D_OUT if name == "sae_lens" else D_IN} if how else {}
    sae = moved(ARCHITECTURES[kind].from_config(given, D_IN, **place).eval())
    with torch.no_grad():
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(0.7)
    return sae


def cases() -> Iterator[tuple[str, str, str]]:
    """Format, architecture, and how it transcodes."""
    from flash_sae_dist.interop import FORMATS

    for name in dict.fromkeys(n for names in READS.values() for n in names):
        # Crosscoders are of a fork of dictionary_learning, which is in no registry.
        kinds = (kind for kind in FORMATS[name].converters if "crosscoder" not in kind)
        yield from ((name, kind, "") for kind in kinds)
        of, hows = sorted(FORMATS[name].transcoders), ("transcoder", "skip")
        if name == "llamascopium":
            hows = hows[:1]
        yield from ((name, kind, how) for kind in of for how in hows)


def write(root: Path) -> None:
    from flash_sae_dist import interop
    from flash_sae_dist.interop import About

    torch.manual_seed(0)
    x, wanted = 2 * torch.randn(200, D_IN), {}
    for name, kind, how in cases():
        sae = made(name, kind, how)
        about = About("model.layers.0", "google/gemma-3-1b-pt", 64)
        if how:
            about = about._replace(
                hookpoint="model.layers.0.mlp:input", output_hookpoint="model.layers.0.mlp"
            )
        contents = interop.contents.contents_of(sae)
        by_thresholds = name == "circuit_tracer" and kind in ("topk", "multi_topk")
        if by_thresholds:
            contents = interop.thresholds.with_thresholds(sae, x)
        case = f"{name}/{kind}{how and '-' + how}"
        path = interop.save(contents, root / "ours" / case, name, about)
        used = interop.load(path) if by_thresholds else sae
        wanted[case] = (str(path.relative_to(root)), used(x).recon.detach())
    cached = write_cache(root / "ours")
    torch.save({"x": x, "wanted": wanted, "cached": cached}, root / "x.pt")


def write_cache(root: Path) -> dict[str, Tensor]:
    """delphi's latent cache of an SAE; returns the tokens and the activations in it."""
    from flash_sae_dist.interop import delphi

    sae, x = made("sparsify", "topk", ""), 2 * torch.randn(SEQUENCES, LENGTH, D_IN)
    tokens = torch.randint(0, 50, (SEQUENCES, LENGTH))
    told = {"model_name": "model", "num_splits": SPLITS, "dataset_repo": "text"}
    delphi.write_cache(root / "delphi", "layers.0", sae, tokens, x.split(4), **told)
    return {"tokens": tokens, "acts": sae.encode_dense(x).detach()}


def assert_same(case: str, found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(
        found.float(), wanted.float(), rtol=1e-5, atol=2e-5, msg=lambda m: f"{case}: {m}"
    )


def check(root: Path) -> None:
    from flash_sae_dist import interop

    data = torch.load(root / "x.pt", weights_only=True)
    read: set[str] = set()
    for file in sorted((root / "theirs").glob("*.pt")):
        found = torch.load(file, weights_only=True)
        if file.stem == "delphi":
            check_cache(root, found, data["cached"])
            continue
        for case, recon in found["ours"].items():
            assert_same(case, recon, data["wanted"][case][1])
        for case, (path, recon) in found["own"].items():
            assert_same(case, interop.load(root / path)(data["x"]).recon, recon)
        read |= set(found["ours"])
        print(f"{file.stem}: ours there: {', '.join(found['ours'])}")
        print(f"{file.stem}: its own here: {', '.join(found['own'])}")
    left = set(data["wanted"]) - read
    if all(case.startswith("openai/") for case in left):
        print(f"not run: {', '.join(sorted(left)) or 'nothing'}")
    else:
        raise AssertionError(left)


def check_cache(root: Path, found: dict[str, Any], ours: dict[str, Tensor]) -> None:
    """Ours as delphi read it, and its own as it is read here."""
    from flash_sae_dist.interop import delphi

    for tokens, acts, want in (
        (found["tokens"], found["acts"], ours),
        (*_dense(delphi.read_cache(root / found["own"])), found["of_own"]),
    ):
        assert torch.equal(tokens, want["tokens"])
        # It keeps 16 bits, and nothing below 1e-5.
        torch.testing.assert_close(acts, want["acts"], rtol=1e-3, atol=1e-5)
    print("delphi: our latent cache there, its own here")


def _dense(cache: Any) -> tuple[Tensor, Tensor]:
    acts = torch.zeros(SEQUENCES, LENGTH, D_SAE)
    acts[tuple(cache.locations.T)] = cache.activations.float()
    return cache.tokens, acts


# --- there: how each library reads a file, and what it writes itself


def read_dictionary_learning(path: Path, case: str) -> Reconstruct:
    from dictionary_learning.utils import load_dictionary

    return load_dictionary(str(path), "cpu")[0]


def own_dictionary_learning(root: Path) -> Iterator[tuple[str, Path, Reconstruct]]:
    from dictionary_learning import dictionary as plain
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    for made, more in (
        (AutoEncoderTopK(D_IN, D_SAE, K), {"k": K}),
        (BatchTopKSAE(D_IN, D_SAE, K), {"k": K}),
        (MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, GROUPS), {"k": K}),
        (plain.AutoEncoder(D_IN, D_SAE), {}),
        (plain.AutoEncoderNew(D_IN, D_SAE), {}),
        (plain.GatedAutoEncoder(D_IN, D_SAE), {}),
        (plain.JumpReluAutoEncoder(D_IN, D_SAE), {}),
    ):
        theirs, name = moved(made), type(made).__name__
        if "threshold" in dict(theirs.named_buffers()) and name != "AutoEncoderTopK":
            theirs.threshold.fill_(0.6)
        folder = root / name
        folder.mkdir(parents=True)
        torch.save(theirs.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": name, **more}}))
        # As it is read again: its AutoEncoder scales decoder rows then.
        yield name, folder, read_dictionary_learning(folder, name)


def read_llamascopium(path: Path, case: str) -> Reconstruct:
    from llamascopium.models.sparse_dictionary import SparseDictionary

    return SparseDictionary.from_pretrained(str(path))


def own_llamascopium(root: Path) -> Iterator[tuple[str, Path, Reconstruct]]:
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder

    kinds = ("topk", "relu", "jumprelu")
    for name, out in [(name, "h") for name in kinds] + [(name, "out") for name in kinds]:
        cfg = SAEConfig(
            d_model=D_IN, expansion_factor=D_SAE // D_IN, act_fn=name, top_k=K, hook_point_in="h",
            hook_point_out=out, norm_activation="inference",
        )  # fmt: skip
        theirs = SparseAutoEncoder(cfg)
        with torch.no_grad():
            for p in theirs.parameters():
                p.copy_(0.3 * torch.randn_like(p))
        case = f"{name}{'-transcoder' * (out != 'h')}"
        theirs.save_pretrained(root / case)
        cfg.save_hyperparameters(root / case)
        yield case, root / case, theirs


def _third(sae: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor) -> Tensor:
    return sae(x)[2]


def read_openai(path: Path, case: str) -> Reconstruct:
    from sparse_autoencoder import Autoencoder

    return partial(_third, Autoencoder.from_state_dict(torch.load(path, weights_only=True)))


def own_openai(root: Path) -> Iterator[tuple[str, Path, Reconstruct]]:
    from sparse_autoencoder.model import Autoencoder, TopK

    root.mkdir(parents=True)
    for name, keys in (("topk", {"activation": TopK(K), "normalize": True}), ("relu", {})):
        theirs = moved(Autoencoder(D_SAE, D_IN, **keys))
        torch.save(theirs.state_dict(), root / f"{name}.pt")
        yield name, root / f"{name}.pt", partial(_third, theirs)


def there_delphi(root: Path) -> None:
    """Its data set over our cache, and a cache of its own."""
    from delphi.config import CacheConfig, ConstructorConfig, SamplerConfig
    from delphi.latents import LatentCache, LatentDataset

    data = LatentDataset(
        root / "ours/delphi", SamplerConfig(), ConstructorConfig(), tokenizer=object()
    )
    found = {"tokens": data.tokens, "acts": torch.zeros(SEQUENCES, LENGTH, D_SAE)}
    for latent in (latent for buffer in data.buffers for latent in buffer):
        at, acts = latent.activation_data.locations, latent.activation_data.activations
        assert (at[:, 2] == latent.latent.latent_index).all()
        found["acts"][tuple(at.T)] = acts.float()
    torch.manual_seed(2)
    cache = LatentCache(None, {}, batch_size=3)
    acts = torch.randn(SEQUENCES, LENGTH, D_SAE).sub(1).relu()
    tokens, place = torch.randint(0, 50, (SEQUENCES, LENGTH)), root / "theirs/delphi"
    for number in range(3):
        part = slice(3 * number, 3 * number + 3)
        cache.cache.add(acts[part], tokens[part], number, "layers.0")
    cache.cache.save()
    cache.width = D_SAE
    cache.save_splits(SPLITS, place)
    cache.save_config(place, CacheConfig(), "model")
    own = {"own": "theirs/delphi/layers.0", "of_own": {"tokens": tokens, "acts": acts}}
    torch.save(found | own, root / "theirs/delphi.pt")


def read_circuit_tracer(path: Path, case: str) -> Reconstruct:
    from circuit_tracer.transcoder import single_layer_transcoder as own

    cpu: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    if case.startswith("gemma_scope_2"):
        return own.load_gemma_scope_2_transcoder(str(path / "params.safetensors"), 0, **cpu)
    file = {0: str(path / "layer_0.safetensors")}
    return own.load_transcoder_set(file, "set", "hook_resid_post", "hook_resid_post", **cpu)[0]


def own_circuit_tracer(root: Path) -> Iterator[tuple[str, Path, Reconstruct]]:
    from circuit_tracer.transcoder.activation_functions import JumpReLU
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder

    for name, skip in (("relu", False), ("jumprelu", False), ("relu", True), ("jumprelu", True)):
        act = JumpReLU(0.5 + torch.rand(D_SAE), 0.1) if name == "jumprelu" else torch.relu
        theirs = SingleLayerTranscoder(
            D_IN, D_SAE, act, 0, skip_connection=skip, dtype=torch.float32
        )
        with torch.no_grad():
            for param, p in theirs.named_parameters():
                if "threshold" not in param:
                    p.copy_(0.3 * torch.randn_like(p))
        case = f"{name}{'-skip' * skip}"
        folder = root / case
        folder.mkdir(parents=True)
        theirs.to_safetensors(str(folder / "layer_0.safetensors"))
        hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
        (folder / "config.yaml").write_text(f"model_kind: transcoder_set\n{hooks}")
        yield case, folder, theirs


def read_sparsify(path: Path, case: str) -> Reconstruct:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(path)
    if coder.cfg.multi_topk:
        # Its forward gives the reconstruction of 4 k latents, which it trains beside that of k.
        skip = torch.zeros(D_IN, D_IN) if coder.W_skip is None else coder.W_skip
        return lambda x: coder.decode(*coder.encode(x)[:2]) + x @ skip.mT
    return lambda x: coder(x).sae_out


def own_sparsify(root: Path) -> Iterator[tuple[str, Path, Reconstruct]]:
    from sparsify import SparseCoder, SparseCoderConfig

    for name, keys in (
        ("topk", {}),
        ("multi_topk", {"multi_topk": True}),
        ("transcoder", {"transcode": True}),
        ("skip", {"transcode": True, "skip_connection": True}),
    ):
        theirs = moved(SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K, **keys)))
        theirs.save_to_disk(root / name)
        yield name, root / name, read_sparsify(root / name, name)


def read_sae_lens(path: Path, case: str) -> Reconstruct:
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from sae_lens.registry import get_sae_class

    if case.startswith("sae_lens"):
        return SAE.load_from_disk(str(path), device="cpu")
    # Its loaders of the hub's files, which they find here.
    files = {p.name: p for p in (path.iterdir() if path.is_dir() else [path])}
    loaders.hf_hub_download = lambda repo_id, filename, **_: str(files[Path(filename).name])
    sizes = {"d_in": D_IN, "d_sae": D_SAE}
    if case.startswith("gemma_scope_2"):
        from safetensors.torch import load_file

        loaders.get_safetensors_tensor_shapes = lambda *_: {
            n: t.shape for n, t in load_file(path / "params.safetensors").items()
        }
        hook = "transcoder" if "-" in case else "resid_post"
        found = loaders.gemma_3_sae_huggingface_loader("google/gemma-scope-2", f"{hook}/layer_0_x")
    elif case.startswith("gemma_scope"):
        of = ("google/gemma-scope-2b-pt-res", "layer_0/width_16k/average_l0_5")
        found = loaders.gemma_2_sae_huggingface_loader(*of, cfg_overrides=sizes)
    else:
        of = ("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", path.name)
        found = loaders.qwen_scope_sae_huggingface_loader(*of, cfg_overrides=sizes | {"k": K})
    cfg, state, _ = found
    kind, of = get_sae_class(cfg["architecture"])
    sae = kind(of.from_dict(cfg | {"device": "cpu", "normalize_activations": "none"}))
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    return sae


def own_sae_lens(root: Path) -> Iterator[tuple[str, Path, Reconstruct]]:
    import sae_lens
    from sae_lens.saes import transcoder

    width = {"d_in": D_IN, "d_sae": D_SAE}
    for name, keys in (
        ("TopK", {"k": K}),
        ("BatchTopK", {"k": K}),
        ("MatryoshkaBatchTopK", {"k": K, "matryoshka_widths": [6, 24, D_SAE]}),
        ("JumpReLU", {}),
        ("Gated", {}),
        ("Standard", {}),
    ):
        cfg = getattr(sae_lens, f"{name}TrainingSAEConfig")(**width, **keys)
        theirs = moved(getattr(sae_lens, f"{name}TrainingSAE")(cfg))
        if hasattr(theirs, "topk_threshold"):
            theirs.topk_threshold.fill_(0.6)
        theirs.save_inference_model(str(root / name))
        # As it is read again: BatchTopK is JumpReLU then.
        yield name, root / name, sae_lens.SAE.load_from_disk(str(root / name), device="cpu")
    for name in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"):
        cfg = getattr(transcoder, f"{name}Config")(**width, d_out=D_OUT, apply_b_dec_to_input=False)
        theirs = moved(getattr(transcoder, name)(cfg))
        theirs.save_model(str(root / name))
        yield name, root / name, theirs


@torch.no_grad()
def there(library: str, root: Path) -> None:
    data = torch.load(root / "x.pt", weights_only=True)
    torch.manual_seed(1)
    read = globals()[f"read_{library}"]
    ours = {
        case: read(root / path, case)(data["x"])
        for case, (path, _) in data["wanted"].items()
        if case.partition("/")[0] in READS[library]
    }
    own = {
        case: (str(path.relative_to(root)), sae(data["x"]))
        for case, path, sae in globals()[f"own_{library}"](root / "theirs" / library)
    }
    torch.save({"ours": ours, "own": own}, root / "theirs" / f"{library}.pt")


def main() -> None:
    what, root = sys.argv[1], Path(sys.argv[2])
    if what in ("write", "check"):
        globals()[what](root)
        return
    (root / "theirs").mkdir(exist_ok=True)
    if what == "delphi":
        there_delphi(root)
    else:
        there(what, root)


if __name__ == "__main__":
    main()
