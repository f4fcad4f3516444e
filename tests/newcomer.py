"""What a newcomer does, by copy and paste from README.md and docs/, small.

In a folder stand models, texts and arrays of a few numbers, under the names that the pages give
theirs, and configs/ with the sizes of SMALL. A task runs blocks as they stand but for the words
that it replaces, which stand beside it: test_newcomer.py has them.
"""

from __future__ import annotations

import os
import shlex
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
import transformers
import yaml
from typer.testing import CliRunner

from flash_sae_dist import TopKSAE, interop
from flash_sae_dist.config.file import apply_override
from flash_sae_dist.launch.cli import build
from tests.hub_server import TOKEN, hub_server
from tests.pages import PAGES, ROOT, Block, blocks_of, commands, without_files
from tests.tiny_model import SPECIAL, save_llama, save_text, save_tokenizer

WIDTH = 16
# A model's folder by what the pages call it.
MODELS = {
    "HuggingFaceTB/SmolLM2-135M": lambda folder: save_llama(folder, layers=9),
    "openai-community/gpt2": lambda folder: _save(
        transformers.GPT2Config(n_embd=WIDTH, n_layer=9, n_head=2, n_positions=64), folder
    ),
    "EleutherAI/pythia-70m-deduped": lambda folder: _save(
        transformers.GPTNeoXConfig(
            hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
            max_position_embeddings=64,
        ),
        folder,
    ),
}  # fmt: skip
TEXT = ["text={source: files, paths: [text.jsonl]}", "trackers=[]"]
CACHE = ["cache.num_tokens=1500", "cache.context_length=24", "cache.batch_sequences=4"]
TRAIN = ["train.num_tokens=1280", "train.batch_tokens=64", "sae.d_sae=64", "train.lr=0.001"]
TRAIN += ["train.warmup_steps=2"]
MEASURE = ["evaluate.num_tokens=256", "evaluate.loss_sequences=2"]
SMALL = {
    "quickstart": [
        "model={name: HuggingFaceTB/SmolLM2-135M, dtype: float32}", *TEXT, *CACHE, *TRAIN, *MEASURE,
    ],
    "gpt2-small": [
        "model.dtype=float32", *TEXT, *CACHE, *TRAIN, *MEASURE, "sae.k=4",
    ],
    "pythia-70m": [
        "model.dtype=float32", *TEXT, *CACHE, *TRAIN, *MEASURE,
        "cache.store=acts.zarr",
    ],
    "llama-3.1-8b-wide": [
        "model={name: HuggingFaceTB/SmolLM2-135M, dtype: float32}", *TEXT, *CACHE, *TRAIN,
        "cache.hookpoints=[model.layers.4]", "train.hookpoint=model.layers.4", "sae.k=4",
        "cache.store=runs/quickstart/activations.zarr", "train.num_shards=1",
    ],
    "gemma-2-2b-grid": [
        "model={name: HuggingFaceTB/SmolLM2-135M, dtype: float32}", *TEXT, *CACHE, *TRAIN,
        "cache.store=runs/quickstart/activations.zarr", "grid.hookpoints=[model.layers.4]",
        "cache.hookpoints=[model.layers.4, model.layers.8]",
        "grid.values={sae.d_sae: [64], sae.k: [4]}",
    ],
}  # fmt: skip
# Of which the checks in test_docs.py are enough here.
PASSED_OVER = ("pip", ".", "git", "pre-commit", "mkdocs", "export")


def _save(config: Any, folder: Path) -> None:
    """A causal model of random weights."""
    config.vocab_size = save_tokenizer(folder, SPECIAL)
    config.bos_token_id, config.eos_token_id = 0, 1
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def _small(name: str) -> dict[str, Any]:
    data = yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text())
    for override in SMALL[name]:
        key, _, value = override.partition("=")
        if "." in key:
            apply_override(data, override)
        else:
            data[key] = yaml.safe_load(value)
    return data


def furnish(root: Path) -> None:
    """What the pages take for granted."""
    (root / "configs").mkdir(parents=True)
    for name in SMALL:
        (root / f"configs/{name}.yaml").write_text(yaml.safe_dump(_small(name)))
    for name, save in MODELS.items():
        save(root / name)
    (root / "my-model").symlink_to(root / "HuggingFaceTB/SmolLM2-135M")
    save_text(root / "text.jsonl")
    (root / "my-text.jsonl").symlink_to(root / "text.jsonl")
    rng = np.random.default_rng(0)
    (root / "acts").mkdir()
    for layer in (3, 7, 9):
        (root / f"acts/{layer}").mkdir()
        for part in range(2):
            rows = rng.normal(size=(400, WIDTH)).astype(np.float32)
            np.save(root / f"acts/{layer}/part{part}.npy", rows)
    flash_sae(["store", "import", "layer9.zarr", "layers.9=acts/9/*.npy"], root)
    # SAEs of others.
    sae, about = TopKSAE(WIDTH, 64, 4), interop.About("gpt_neox.layers.3")
    interop.save(sae, root / "trainer_0", "dictionary_learning", about)
    interop.save(sae, root / "saelens/layer_3", "sae_lens", about)
    interop.save(sae, root / "EleutherAI/sae-pythia-70m-32k/layers.3", "sparsify", about)
    interop.save(sae, root / "SAE-L0_4/layer8.sae.pt", "qwen_scope")
    flash_sae(["cache", "configs/pythia-70m.yaml"], root)


def flash_sae(words: list[str], root: Path) -> str:
    """`flash-sae WORDS` in a folder; what it printed."""
    with _inside(root):
        done = CliRunner().invoke(build(), words, catch_exceptions=False)
    assert done.exit_code == 0, f"flash-sae {' '.join(words)}: {done.output}"
    return done.output


@contextmanager
def _inside(root: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(root)
    try:
        yield
    finally:
        os.chdir(before)


def run_command(words: list[str], root: Path) -> str:
    """One command of a block: every launcher's verb runs in this process."""
    program, *rest = words
    if program == "flash-sae":
        return flash_sae(rest, root)
    if program == "accelerate":  # several processes: tests/dist/test_accelerate_launch.py
        module = rest[rest.index("-m") + 1]
        verb = module.removeprefix("flash_sae_dist.launch.")
        return flash_sae([verb, *rest[rest.index("-m") + 2 :]], root)
    if program == "bash" and rest[0] == "launch/quickstart.sh":
        lines = [shlex.split(line) for line in (ROOT / rest[0]).read_text().splitlines()
                 if line.startswith("distributed ")]  # fmt: skip
        verbs = [line[2] for line in lines]
        return "".join(flash_sae([v, "configs/quickstart.yaml", *rest[1:]], root) for v in verbs)
    if program == "bash":  # launch/hosts/ssh.sh: tests/test_hosts.py
        return flash_sae(rest[1:], root)
    if program == "python" and rest[0] == "-c":
        with _inside(root):
            exec(compile(rest[1], "-c", "exec"), {})
        return ""
    assert program in PASSED_OVER, program
    return ""


def run_block(block: Block, smaller: dict[str, str], root: Path, names: dict[str, Any]) -> str:
    """A block of a page, its words replaced; names are those of the Python blocks before it."""
    text = block.text
    for was, now in smaller.items():
        assert was in text, f"{block.where} has no {was!r}"
        text = text.replace(was, now)
    if block.language == "python":
        with _inside(root):
            exec(compile(text, block.where, "exec"), names)
        return ""
    text = without_files(text, root)
    return "".join(run_command(words, root) for words in commands(text))


class Task(NamedTuple):
    """What somebody wants, and the blocks that do it: of a page the one that has a text, with what
    is replaced in it."""

    title: str
    blocks: list[tuple[str, str, dict[str, str]]]
    check: Callable[[Path, dict[str, Any], str], None]

    def found(self) -> list[tuple[Block, dict[str, str]]]:
        """The blocks."""
        return [(find(page, text), smaller) for page, text, smaller in self.blocks]

    def run(self, root: Path) -> None:
        """Does it, and looks at what came of it."""
        names: dict[str, Any] = {}
        said = "".join(run_block(block, s, root, names) for block, s in self.found())
        self.check(root, names, said)


def find(page: str, text: str) -> Block:
    """The one block of a page that has a text."""
    (path,) = [p for p in PAGES if str(p.relative_to(ROOT)) == page]
    (block,) = [block for block in blocks_of(path) if block.language and text in block.text]
    return block


@contextmanager
def hub() -> Iterator[Any]:
    """The hub's client meets a stand-in on this machine."""
    from huggingface_hub import constants

    with hub_server() as server, tempfile.TemporaryDirectory() as cache, mock.patch.multiple(
        constants, ENDPOINT=server.url, HF_HUB_OFFLINE=False, HF_HUB_CACHE=cache,
        HUGGINGFACE_CO_URL_TEMPLATE=server.url + "/{repo_id}/resolve/{revision}/{filename}",
    ), mock.patch.dict("os.environ", HF_TOKEN=TOKEN):  # fmt: skip
        yield server
