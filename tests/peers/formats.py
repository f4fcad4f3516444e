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
}


def moved(module: torch.nn.Module) -> Any:
    """A module whose parameters are nobody's first ones, thresholds above 0."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            near = torch.rand_like(p) if "threshold" in name else 0.3 * torch.randn_like(p)
            p.add_(near)
    return module


# --- here


def made(kind: str, how: str, d_out: int) -> Any:
    """An SAE or a transcoder of ours; of the batch rules one threshold, which all formats have."""
    from flash_sae_dist.models import ARCHITECTURES

    config = ARCHITECTURES[kind].Config
    keys = {"architecture": kind, "d_sae": D_SAE, "k": K, "prefix_widths": [6, 24]}
    keys["skip"] = how == "skip"
    given = config.model_validate({n: v for n, v in keys.items() if n in config.model_fields})
    place = {"d_out": d_out} if how else {}
    sae = moved(ARCHITECTURES[kind].from_config(given, D_IN, **place).eval())
    with torch.no_grad():
        if "threshold" in dict(sae.named_buffers()):
            sae.threshold.fill_(0.7)
    return sae


def cases() -> Iterator[tuple[str, str, str]]:
    """Format, architecture, and how it transcodes."""
    from flash_sae_dist.interop import FORMATS

    for name in dict.fromkeys(n for names in READS.values() for n in names):
        yield from ((name, kind, "") for kind in FORMATS[name].converters)
        of = sorted(FORMATS[name].transcoders)
        yield from ((name, kind, how) for kind in of for how in ("transcoder", "skip"))


def write(root: Path) -> None:
    from flash_sae_dist import interop
    from flash_sae_dist.interop import About

    torch.manual_seed(0)
    x, wanted = 2 * torch.randn(200, D_IN), {}
    for name, kind, how in cases():
        sae = made(kind, how, D_OUT if name == "sae_lens" else D_IN)
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
    torch.save({"x": x, "wanted": wanted}, root / "x.pt")


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
        for case, recon in found["ours"].items():
            assert_same(case, recon, data["wanted"][case][1])
        for case, (path, recon) in found["own"].items():
            assert_same(case, interop.load(root / path)(data["x"]).recon, recon)
        read |= set(found["ours"])
        print(f"{file.stem}: ours there: {', '.join(found['ours'])}")
        print(f"{file.stem}: its own here: {', '.join(found['own'])}")
    assert read == set(data["wanted"]), set(data["wanted"]) - read


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

    for name in ("topk", "relu", "jumprelu"):
        cfg = SAEConfig(
            d_model=D_IN, expansion_factor=D_SAE // D_IN, act_fn=name, top_k=K, hook_point_in="h",
            hook_point_out="h", norm_activation="inference",
        )  # fmt: skip
        theirs = SparseAutoEncoder(cfg)
        with torch.no_grad():
            for p in theirs.parameters():
                p.copy_(0.3 * torch.randn_like(p))
        theirs.save_pretrained(root / name)
        cfg.save_hyperparameters(root / name)
        yield name, root / name, theirs


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
    else:
        (root / "theirs").mkdir(exist_ok=True)
        there(what, root)


if __name__ == "__main__":
    main()
