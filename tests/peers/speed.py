"""The quick starts of tests/peers/scripts at a larger shape, each on its library and with one
import line changed, timed on one GPU.

    PYTHONPATH=. python tests/peers/speed.py [--shape N-D-F-k] [--steps 64] [--json FILE]

Every library has to be installed. A row is a script (a small model of random bfloat16 weights
included), or a trainer fed with rows from the GPU's memory; no latent is dead yet. Outside the
model is a step's time but for the forward passes within it.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.machinery
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

LIBRARIES = ("dictionary_learning", "sparsify", "sae_lens")
HOOKPOINT, LAYER, CONTEXT, LAYERS, VOCABULARY = "model.layers.5", 5, 128, 12, 50304
WARM = 24
# What the libraries import, and no script here uses.
UNUSED = ("nnsight", "zstandard", "circuitsvis", "circuitsvis.activations", "umap", "plotly")
UNUSED += ("plotly.express", "plotly.graph_objects", "plotly.subplots", "wandb", "babe")


class Shape(NamedTuple):
    tokens: int
    d_in: int
    d_sae: int
    k: int


class Job(NamedTuple):
    """What a process is asked for."""

    library: str
    ours: bool
    shape: Shape
    steps: int
    model: str
    device: str


def sync(job: Job) -> None:
    if job.device == "cuda":
        torch.cuda.synchronize()


class Clock:
    """Times the steps behind the first ones, from tick to tick, and the language model's forward
    passes among them.
    """

    def __init__(self, job: Job) -> None:
        self.job, self.count, self.marks, self.seconds = job, 0, [], 0.0

    def tick(self) -> None:
        if self.count in (WARM, WARM + self.job.steps):
            sync(self.job)
            self.marks.append(time.perf_counter())
        self.count += 1

    @property
    def ms(self) -> float:
        begin, end = self.marks
        return 1e3 * (end - begin) / self.job.steps

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A forward pass that is timed, the device idle before and after it: for all alike."""

        def timed(*args: Any, **options: Any) -> Any:
            sync(self.job)
            begin = time.perf_counter()
            found = call(*args, **options)
            sync(self.job)
            if len(self.marks) == 1:
                self.seconds += time.perf_counter() - begin
            return found

        return timed

    def apart(self, hook: Callable[..., Any]) -> Callable[..., Any]:
        """A hook of the model, which is none of its forward pass: sparsify trains in one."""
        timed = self.around(hook)

        def counted(*args: Any, **options: Any) -> Any:
            before = self.seconds
            found = timed(*args, **options)
            self.seconds -= 2 * (self.seconds - before)
            return found

        return counted

    @property
    def forward(self) -> float:
        """ms a step."""
        return 1e3 * self.seconds / self.job.steps


def fvu(x: Tensor, recon: Tensor) -> float:
    x, recon = x.float(), recon.detach().float()
    return float((x - recon).square().sum() / (x - x.mean(0)).square().sum())


class Source:
    """A language model, and what its hookpoint gives."""

    def __init__(self, job: Job) -> None:
        from transformers import AutoModelForCausalLM

        self.job, self.rows = job, []
        self.model = AutoModelForCausalLM.from_pretrained(job.model).to(job.device)
        self.generator = torch.Generator(job.device).manual_seed(0)

    def ids(self, sequences: int) -> Tensor:
        of = {"generator": self.generator, "device": self.job.device}
        return torch.randint(0, VOCABULARY, (sequences, CONTEXT), **of)

    def activations(self, sequences: int) -> Tensor:
        rows: list[Tensor] = []
        module = self.model.base_model.layers[LAYER]
        handle = module.register_forward_hook(lambda m, i, output: rows.append(output))
        with torch.no_grad():
            self.model(self.ids(sequences))
        handle.remove()
        found = rows[0][0] if isinstance(rows[0], tuple) else rows[0]
        return found.flatten(0, 1)


def in_memory(job: Job, source: Source, clock: Clock) -> Iterator[Tensor]:
    """Rows that are there already."""
    each = job.shape.tokens // CONTEXT
    batches = [source.activations(each).float() for _ in range(8)]
    while True:
        clock.tick()
        yield batches[clock.count % 8]


def streamed(job: Job, source: Source, clock: Clock) -> Iterator[Tensor]:
    activations = clock.around(source.activations)
    while True:
        clock.tick()
        yield activations(job.shape.tokens // CONTEXT)


# --- a library's script, or ours


def dictionary_learning(job: Job) -> Iterator[dict[str, Any]]:
    if job.ours:
        top_k = library = importlib.import_module("flash_sae_dist.compat.dictionary_learning")
    else:
        library = importlib.import_module("dictionary_learning.training")
        top_k = importlib.import_module("dictionary_learning.trainers.top_k")
    source, shape = Source(job), job.shape
    held = source.activations(64).float()
    for dtype in (torch.float32, torch.bfloat16):
        for feed in (in_memory, streamed):
            clock = Clock(job)
            config = {
                "trainer": top_k.TopKTrainer, "activation_dim": shape.d_in, "k": shape.k,
                "dict_size": shape.d_sae, "layer": LAYER, "lm_name": "random", "seed": 0,
                "warmup_steps": 10, "steps": WARM + job.steps + 1, "device": job.device,
            }  # fmt: skip
            folder = tempfile.mkdtemp(dir=job.model)
            library.trainSAE(
                data=feed(job, source, clock), trainer_configs=[config], save_dir=folder,
                steps=WARM + job.steps + 1, device=job.device, autocast_dtype=dtype,
            )  # fmt: skip
            ae = top_k.AutoEncoderTopK.from_pretrained(f"{folder}/trainer_0/ae.pt")
            row = {"ms": clock.ms, "fvu": fvu(held, ae.to(job.device)(held))}
            name = str(dtype).removeprefix("torch.")
            if feed is streamed:
                yield {"row": f"script, {name}", "forward": clock.forward, **row}
            else:
                yield {"row": f"trainSAE fed from memory, {name}", **row}


@contextmanager
def hooks_apart(clock: Clock) -> Iterator[None]:
    """Hooks of forward passes that are set within it count as outside of them."""
    hook_on = torch.nn.Module.register_forward_hook

    def register(module: torch.nn.Module, hook: Any, **options: Any) -> Any:
        return hook_on(module, clock.apart(hook), **options)

    with mock.patch.object(torch.nn.Module, "register_forward_hook", register):
        yield


def sparsify(job: Job) -> Iterator[dict[str, Any]]:
    from datasets import Dataset

    name = "flash_sae_dist.compat.sparsify" if job.ours else "sparsify"
    library, source, shape = importlib.import_module(name), Source(job), job.shape
    batch = shape.tokens // CONTEXT
    held, base = source.activations(64).float(), source.model.base_model
    for optimizer in ("adam", "signum"):
        clock = Clock(job)
        ids = source.ids(batch * (WARM + job.steps + 1)).cpu()
        data = Dataset.from_dict({"input_ids": ids.numpy()}).with_format("torch")
        cfg = library.TrainConfig(
            library.SaeConfig(num_latents=shape.d_sae, k=shape.k), batch_size=batch,
            optimizer=optimizer, layers=[LAYER], log_to_wandb=False, lr_warmup_steps=10,
            save_dir=tempfile.mkdtemp(dir=job.model),
        )  # fmt: skip
        trainer = library.Trainer(cfg, data, source.model)
        # Ours leaves the model's head out.
        outer = base if job.ours else source.model
        handle = base.register_forward_pre_hook(lambda m, i, c=clock: c.tick())
        forward, outer.forward = outer.forward, clock.around(outer.forward)
        with hooks_apart(clock):
            trainer.fit()
        outer.forward = forward
        handle.remove()
        (coder,) = trainer.saes.values()
        row = {"forward": clock.forward, "ms": clock.ms, "fvu": fvu(held, coder(held).sae_out)}
        yield {"row": f"script, {optimizer}", **row}


def sae_lens(job: Job) -> Iterator[dict[str, Any]]:
    own = importlib.import_module("sae_lens")
    library = importlib.import_module("flash_sae_dist.compat.sae_lens") if job.ours else own
    for autocast in (False, True):
        name = "bfloat16" if autocast else "float32"
        yield {"row": f"SAETrainer fed from memory, {name}", **_lens_memory(job, library, autocast)}
        yield {"row": f"script, {name}", **_lens_script(job, own, library, autocast)}


def _lens_sae(job: Job, library: Any) -> Any:
    torch.manual_seed(0)
    keys = {"d_in": job.shape.d_in, "d_sae": job.shape.d_sae, "k": job.shape.k}
    return library.TopKTrainingSAEConfig(**keys, device=job.device)


def _lens_memory(job: Job, library: Any, autocast: bool) -> dict[str, Any]:
    """Its trainer on rows that are there."""
    source, clock, shape = Source(job), Clock(job), job.shape
    held = source.activations(64).float()
    trainer_config = importlib.import_module("sae_lens.config").SAETrainerConfig
    cfg = trainer_config(
        total_training_samples=shape.tokens * (WARM + job.steps + 1), lr_warm_up_steps=10,
        lr_end=3e-5, train_batch_size_samples=shape.tokens, device=job.device, autocast=autocast,
    )  # fmt: skip
    sae = library.TopKTrainingSAE(_lens_sae(job, library))
    kind = library if job.ours else importlib.import_module("sae_lens.training.sae_trainer")
    kind.SAETrainer(cfg=cfg, sae=sae, data_provider=in_memory(job, source, clock)).fit()
    return {"ms": clock.ms, "fvu": fvu(held, sae(held))}


def _lens_script(job: Job, own: Any, library: Any, autocast: bool) -> dict[str, Any]:
    from datasets import Dataset

    shape, clock, batch = job.shape, Clock(job), job.shape.tokens // CONTEXT
    ids = torch.randint(0, VOCABULARY, (batch * (WARM + job.steps + 16), CONTEXT))
    cfg = library.LanguageModelSAERunnerConfig(
        sae=_lens_sae(job, library), model_name=job.model, hook_name=HOOKPOINT,
        model_class_name="AutoModelForCausalLM", dataset_path="none", is_dataset_tokenized=True,
        streaming=False, context_size=CONTEXT, prepend_bos=False, lr_warm_up_steps=10,
        training_tokens=shape.tokens * (WARM + job.steps + 1), train_batch_size_tokens=shape.tokens,
        store_batch_size_prompts=batch, n_batches_in_buffer=8 * batch, device=job.device,
        output_path=tempfile.mkdtemp(dir=job.model), autocast=autocast,
        logger=library.LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    data = Dataset.from_dict({"tokens": ids.numpy()})
    runner = library.LanguageModelSAETrainingRunner(cfg, override_dataset=data)
    given = own.ActivationsStore.__next__

    def counted(store: Any) -> Any:
        clock.tick()
        return given(store)

    own.ActivationsStore.__next__ = counted
    run_with_cache = runner.model.run_with_cache
    runner.model.run_with_cache = clock.around(run_with_cache)
    sae = runner.run()
    own.ActivationsStore.__next__ = given
    part = ids[:batch].to(job.device)
    how = {"names_filter": [HOOKPOINT], "prepend_bos": False, "stop_at_layer": LAYER + 1}
    with torch.no_grad():
        held = run_with_cache(part, **how)[1][HOOKPOINT].flatten(0, 1).float()
        return {"forward": clock.forward, "ms": clock.ms, "fvu": fvu(held, sae(held))}


# --- the processes


class Unused(types.ModuleType):
    """A module with any name in it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return object


def stub_unused() -> None:
    """Empty modules for what is not installed."""
    from transformers import AutoModelForCausalLM  # noqa: F401, looks for some of them itself

    tops = {name.partition(".")[0] for name in UNUSED}
    absent = {top for top in tops if importlib.util.find_spec(top) is None}
    for name in UNUSED:
        if name.partition(".")[0] in absent:
            sys.modules[name] = Unused(name)
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)


def worker(job: Job) -> None:
    """Imports, waits for its turn, and writes a line a row."""
    stub_unused()
    importlib.import_module(job.library if not job.ours else "flash_sae_dist")
    sys.stdin.readline()
    for row in globals()[job.library](job):
        print("row", json.dumps(row), flush=True)


def save_model(folder: Path, shape: Shape) -> None:
    """A Llama of random weights in bfloat16, and a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny_model import SPECIAL, save_tokenizer

    save_tokenizer(folder, SPECIAL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=shape.d_in, intermediate_size=shape.d_in * 8 // 3,
        num_hidden_layers=LAYERS, num_attention_heads=12, num_key_value_heads=12,
        max_position_embeddings=CONTEXT,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)


def started(job: Job, log: Path) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = os.environ | {"TQDM_DISABLE": "1"}
    if job.device == "cpu":
        # Else sparsify calls Triton's decoder.
        env["SPARSIFY_DISABLE_TRITON"] = "1"
    return subprocess.Popen(command, **pipes, env=env, stderr=log.open("w"))


def measured(process: subprocess.Popen[str], log: Path) -> Iterator[dict[str, Any]]:
    """Rows of a process whose turn it is."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    for line in process.stdout:
        if line.startswith("row "):
            yield json.loads(line.removeprefix("row "))
    if process.wait():
        print(f"{log.stem} failed: {log.read_text()[-3000:]}")


def shown(theirs: dict[str, Any], ours: dict[str, Any]) -> str:
    """A line of the table."""
    found = f"{theirs['ms']:.2f} | {ours['ms']:.2f} | {theirs['ms'] / ours['ms']:.2f}"
    outside = "- | - | -"
    if "forward" in theirs:
        a, b = (row["ms"] - row["forward"] for row in (theirs, ours))
        outside = f"{a:.2f} | {b:.2f} | {b / a:.3f}"
    return f"{found} | {outside} | {theirs['fvu']:.4f} | {ours['fvu']:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="4096-768-24576-32", help="tokens, d_in, d_sae, k")
    parser.add_argument("--steps", type=int, default=64, help="timed steps, a multiple of 8")
    parser.add_argument("--library", action="append", choices=LIBRARIES)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job is not None:
        library, ours, shape, *rest = json.loads(given.job)
        worker(Job(library, ours, Shape(*shape), *rest))
        return
    shape = Shape(*map(int, given.shape.split("-")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    header = "| ms a step: library | ours | x | outside the model: library | ours | ours / library"
    print(f"{header} | FVU: library | ours |")
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        save_model(Path(folder), shape)
        turns = [(name, ours) for name in given.library or LIBRARIES for ours in (False, True)]
        logs = [Path(folder) / f"{name}-{'ours' if ours else 'own'}.log" for name, ours in turns]
        processes = [
            started(Job(name, ours, shape, given.steps, folder, device), log)
            for (name, ours), log in zip(turns, logs, strict=True)
        ]
        for at in range(0, len(turns), 2):
            theirs, ours = (list(measured(processes[i], logs[i])) for i in (at, at + 1))
            for a, b in zip(theirs, ours, strict=False):
                print(f"{turns[at][0]}: {a['row']} | {shown(a, b)}", flush=True)
                found.append({"library": turns[at][0], "theirs": a, "ours": b})
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
