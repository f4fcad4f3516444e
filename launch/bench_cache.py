"""`flash-sae cache` timed beside the bare forward pass of its model in the same run.

    python -m flash_sae_dist.launch.bench_cache cache [--tokens 8000000] [--folder /dev/shm]

The model is a Llama of random weights, the text made of the words of Python's manual, the store in
`--folder`, which should be memory (/dev/shm): the disk is not what is timed. `bare forward` calls
the model in bfloat16 up to the last hookpoint and keeps nothing; `cache` is the rate between its
first and its last pass. The job is run for a tenth of the tokens first: the second row shows what
memory grows with. Private memory is that of the process without shared pages, model included.
"""

from __future__ import annotations

import json
import random
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer

from .bench_timing import print_table, write_json

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help=__doc__)
CONTEXT, SEQUENCES, VOCABULARY = 512, 16, 8192
_SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


class ModelShape(NamedTuple):
    """A Llama's; hookpoints are its blocks at 7 and 11 sixteenths, as far as it has them."""

    width: int
    blocks: int

    @property
    def hookpoints(self) -> list[str]:
        """The outputs of two blocks."""
        return [f"model.layers.{self.blocks * at // 16}" for at in (7, 11)]


@app.callback()
def _several() -> None:
    """The parts of a job beside their limits."""


def make_model(folder: Path, shape: ModelShape, device: torch.device) -> None:
    """Writes a Llama of random weights in bfloat16 with a tokenizer."""
    from pydoc_data.topics import topics

    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    hf: Any = transformers
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[*_SPECIAL.values()])
    tokenizer.train_from_iterator(topics.values(), trainer)
    hf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **_SPECIAL).save_pretrained(folder)
    config = hf.LlamaConfig(
        vocab_size=max(VOCABULARY, 128_256 * (shape.width >= 2048)),
        hidden_size=shape.width,
        intermediate_size=4 * shape.width,
        num_hidden_layers=shape.blocks,
        num_attention_heads=shape.width // 64,
        num_key_value_heads=max(1, shape.width // 256),
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    with device:
        torch.manual_seed(0)
        hf.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def make_text(file: Path, tokens: int) -> None:
    """Writes documents of the manual's words that give at least so many tokens."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    rng = random.Random(0)
    with file.open("w") as out:
        made = 0
        while made < tokens + CONTEXT:
            # A word gives at least one token.
            count = min(rng.randint(50, 2000), tokens + CONTEXT - made)
            out.write(json.dumps({"text": " ".join(rng.choices(words, k=count))}) + "\n")
            made += count


def bare_rate(folder: Path, shape: ModelShape, device: torch.device, passes: int) -> float:
    """Tokens a second of the model alone, up to the last hookpoint."""
    import transformers

    hf: Any = transformers
    model = hf.LlamaModel.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval()
    last = int(shape.hookpoints[-1].rpartition(".")[2])
    model.layers = model.layers[: last + 1]
    ids = torch.randint(4, VOCABULARY, (SEQUENCES, CONTEXT), device=device)
    times = []
    with torch.no_grad():
        for _ in range(passes + 3):
            start = time.perf_counter()
            model(input_ids=ids, use_cache=False)
            if device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return SEQUENCES * CONTEXT / sorted(times[3:])[passes // 2]


def private_bytes() -> int:
    """Memory of this process alone, without shared pages."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


@contextmanager
def _most_memory() -> Iterator[list[int]]:
    """Yields a list that holds the most private bytes so far."""
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            most[0] = max(most[0], private_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def _job(folder: Path, shape: ModelShape, tokens: int, device: torch.device) -> dict[str, Any]:
    """Runs the cache job once, as its verb does."""
    from accelerate import Accelerator

    from ..activations.harvest import run_cache
    from ..training.job import parse_config

    store = folder / "store.zarr"
    cache = {
        **{"store": str(store), "hookpoints": shape.hookpoints, "num_tokens": tokens},
        **{"context_length": CONTEXT, "batch_sequences": SEQUENCES},
    }
    text = {"source": "files", "paths": [str(folder / "text.jsonl")]}
    data = {"output": str(folder / "run"), "model": {"name": str(folder)}, "text": text}
    config = parse_config({**data, "cache": cache})
    start = time.perf_counter()
    with _most_memory() as most:
        rate = run_cache(config, Accelerator(cpu=device.type == "cpu"))
    seconds = time.perf_counter() - start
    assert rate is not None
    size = sum(f.stat().st_size for f in store.rglob("*") if f.is_file())
    shutil.rmtree(store)
    return {
        "tokens": tokens,
        "tokens/s": rate.rows / rate.seconds,
        "GB/s": size / tokens * rate.rows / rate.seconds / 1e9,
        "waited s": rate.waited,
        "whole job s": seconds,
        "private GiB": most[0] / 2**30,
    }


@app.command()
def cache(
    tokens: Annotated[int, typer.Option(help="Rows a hookpoint.")] = 8_000_000,
    width: Annotated[int, typer.Option(help="Width of the model, a multiple of 64.")] = 2048,
    blocks: Annotated[int, typer.Option(help="Blocks of the model.")] = 16,
    folder: Annotated[Path, typer.Option(help="Where a scratch folder is made.")] = Path(
        "/dev/shm"
    ),
    passes: Annotated[int, typer.Option(help="Bare passes that are timed.")] = 30,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the table, too.")] = None,
    cpu: Annotated[bool, typer.Option("--cpu", help="Time the CPU.")] = False,
) -> None:
    """The cache job beside the bare forward pass."""
    device = torch.device("cpu" if cpu else "cuda")
    shape = ModelShape(width, blocks)
    folder = Path(tempfile.mkdtemp(prefix="flash-sae-bench-", dir=folder))
    make_model(folder, shape, device)
    make_text(folder / "text.jsonl", tokens)
    bare = bare_rate(folder, shape, device, passes)
    rows: list[dict[str, Any]] = [{"run": "bare forward", "tokens/s": bare, "x bare": 1.0}]
    for count in (tokens // 10, tokens):
        row = _job(folder, shape, count, device)
        rows.append({"run": "cache", **row, "x bare": row["tokens/s"] / bare})
    title = f"Cache, Llama of {blocks} blocks of width {width}"
    print_table(title, rows)
    if json_file is not None:
        write_json(json_file, title, rows)
    shutil.rmtree(folder)


if __name__ == "__main__":
    app()
