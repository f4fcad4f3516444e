"""Files both ways between this library and others, each in an environment of its own.

python tests/peers/formats.py write DIR           (here)  our files and the rows to compare on
python tests/peers/formats.py LIBRARY DIR         (there) reads ours, writes its own
python tests/peers/formats.py check DIR           (here)  both reconstruct alike
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

D_IN, D_SAE, K = 12, 48, 5


def write(root: Path) -> None:
    from flash_sae_dist import TopKSAE, interop
    from flash_sae_dist.interop import About

    torch.manual_seed(0)
    sae = TopKSAE(D_IN, D_SAE, K)
    with torch.no_grad():
        for p in sae.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x = 2 * torch.randn(200, D_IN)
    about = About("model.layers.0", "EleutherAI/pythia-70m", 64)
    for name in ("sae_lens", "sparsify", "dictionary_learning", "llamascopium"):
        interop.save(sae, root / "ours" / name, name, about)
    gated = interop.thresholds.with_thresholds(sae, x)
    interop.save(gated, root / "ours/circuit_tracer", "circuit_tracer", about)
    t = gated.weights["threshold"]
    pre = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    jumped = (pre * (pre > t)) @ sae.W_dec + sae.b_dec
    torch.save({"x": x, "recon": sae(x).recon.detach(), "jumped": jumped.detach()}, root / "x.pt")


def check(root: Path) -> None:
    from flash_sae_dist import interop

    data = torch.load(root / "x.pt", weights_only=True)
    for file in sorted((root / "theirs").glob("*.pt")):
        found = torch.load(file, weights_only=True)
        want = data["jumped" if file.stem == "circuit_tracer" else "recon"]
        torch.testing.assert_close(found["ours"].float(), want, rtol=1e-5, atol=1e-5)
        told = "ours there"
        if "own" in found:
            back = interop.load(root / "theirs" / file.stem)(data["x"]).recon
            torch.testing.assert_close(back, found["own"].float(), rtol=1e-5, atol=2e-5)
            told += " and theirs here"
        print(f"{file.stem}: {told} reconstruct the same")


def dictionary_learning(ours: Path, own: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    from dictionary_learning.trainers.top_k import AutoEncoderTopK
    from dictionary_learning.utils import load_dictionary

    mine, _ = load_dictionary(str(ours), "cpu")
    theirs = AutoEncoderTopK(D_IN, D_SAE, K)
    own.mkdir(parents=True)
    torch.save(theirs.state_dict(), own / "ae.pt")
    (own / "config.json").write_text('{"trainer": {"dict_class": "AutoEncoderTopK"}}')
    return {"ours": mine(x), "own": theirs(x)}


def llamascopium(ours: Path, own: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
    from llamascopium.models.sparse_dictionary import SparseDictionary

    mine = SparseDictionary.from_pretrained(str(ours))
    cfg = SAEConfig(
        d_model=D_IN, expansion_factor=D_SAE // D_IN, act_fn="topk", top_k=K, hook_point_in="h",
        hook_point_out="h", norm_activation="inference",
    )  # fmt: skip
    theirs = SparseAutoEncoder(cfg)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(0.3 * torch.randn_like(p))
    theirs.save_pretrained(own)
    cfg.save_hyperparameters(own)
    return {"ours": mine(x), "own": theirs(x)}


def circuit_tracer(ours: Path, own: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    del own
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    made = load_transcoder_set(
        {0: str(ours / "layer_0.safetensors")}, "set", "hook_resid_post", "hook_resid_post",
        device=torch.device("cpu"), dtype=torch.float32,
    )  # fmt: skip
    return {"ours": made[0](x)}


def sae_lens(ours: Path, own: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    from sae_lens import SAE, TopKTrainingSAE, TopKTrainingSAEConfig

    mine = SAE.load_from_disk(str(ours), device="cpu")
    theirs = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_IN, d_sae=D_SAE, k=K))
    theirs.save_inference_model(str(own))
    return {"ours": mine(x), "own": SAE.load_from_disk(str(own), device="cpu")(x)}


def sparsify(ours: Path, own: Path, x: torch.Tensor) -> dict[str, torch.Tensor]:
    from sparsify import SparseCoder, SparseCoderConfig

    mine = SparseCoder.load_from_disk(ours)
    theirs = SparseCoder(D_IN, SparseCoderConfig(num_latents=D_SAE, k=K))
    theirs.save_to_disk(own)
    return {"ours": mine(x).sae_out, "own": theirs(x).sae_out}


def main() -> None:
    what, root = sys.argv[1], Path(sys.argv[2])
    if what in ("write", "check"):
        return globals()[what](root)
    x = torch.load(root / "x.pt", weights_only=True)["x"]
    torch.manual_seed(1)
    found = globals()[what](root / "ours" / what, root / "theirs" / what, x)
    (root / "theirs").mkdir(exist_ok=True)
    torch.save({n: t.detach() for n, t in found.items()}, root / "theirs" / f"{what}.pt")
    return None


if __name__ == "__main__":
    main()
