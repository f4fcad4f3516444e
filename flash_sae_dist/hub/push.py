"""Finished SAEs as a repository of the Hugging Face hub: safetensors, configs and a model card."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .. import __version__
from ..config.base import UserError
from ..evaluation.finished import FinishedSAE, finished_saes, named_saes
from ..exporting import about_of, begins_with_token
from ..files import json_text, read_json
from ..models.saved import CONFIG_FILE, WEIGHTS_FILE
from ..training import made_of
from ..training.records import read_job, read_store_config
from .card import CardEntry, card_of, public_name
from .reach import check_name, reaching


class Pushed(NamedTuple):
    """What `push` uploaded."""

    url: str  # of the commit
    places: dict[str, str]  # by name of the SAE its folder in the repository, "" for the root


def push(
    output: str | Path,
    repo: str,  # owner/name
    *,
    saes: tuple[str, ...] = ("*",),
    license: str | None = None,  # the hub's name of one, such as apache-2.0
    private: bool = False,
    revision: str | None = None,  # a branch that is there
) -> Pushed:
    """Uploads finished SAEs under a folder in one commit, to a new repository if there is none: one
    alone to its root, several to folders of their names. Paths of this machine are left out.

    Raises ConfigError or UserError before anything is sent where an SAE is not there or not whole,
    UserError where the hub cannot be reached or refuses.
    """
    check_name(repo)
    chosen = named_saes(finished_saes(Path(output).expanduser()), saes, "--sae")
    places = {found.name: found.name if len(chosen) > 1 else "" for found in chosen}
    entries = [_entry(found, places[found.name]) for found in chosen]
    files: dict[str, bytes | Path] = {}
    for found, entry in zip(chosen, entries, strict=True):
        files |= dict(_files(found, entry))
    files["README.md"] = card_of(repo, entries, license).encode()
    with reaching(repo, "push"):
        return Pushed(_upload(repo, files, private, revision), places)


def _upload(repo: str, files: dict[str, bytes | Path], private: bool, revision: str | None) -> str:
    # Not at the top: it takes long to import.
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="flash_sae_dist", library_version=__version__)
    # Of a repository that is there it changes nothing.
    api.create_repo(repo, private=private or None, exist_ok=True)
    operations = [CommitOperationAdd(path, content) for path, content in files.items()]
    done = api.create_commit(
        repo, operations, commit_message="Add sparse autoencoders", revision=revision
    )
    return str(done.commit_url)


def _files(found: FinishedSAE, entry: CardEntry) -> Iterator[tuple[str, bytes | Path]]:
    """What is uploaded of an SAE, by path in the repository."""
    prefix = f"{entry.place}/" if entry.place else ""
    spec = entry.spec | {"about": entry.about._asdict()}
    yield f"{prefix}{CONFIG_FILE}", f"{json_text(spec, indent=2)}\n".encode()
    yield f"{prefix}{WEIGHTS_FILE}", found.folder / "sae" / WEIGHTS_FILE
    if entry.evaluation is not None:
        text = json_text(entry.evaluation, indent=1)
        yield f"{prefix}evaluation.json", f"{text}\n".encode()


def _entry(found: FinishedSAE, place: str) -> CardEntry:
    """What is told of an SAE, whose weights are compared with their checksum."""
    found.load()
    config = read_job(found.folder)
    assert config is not None
    assert config.train is not None
    about = about_of(config, found, begins_with_token(config))
    store = read_store_config(found.folder) or {}
    # Of a store that knows its model the config of the run need not.
    name = about.model_name or store.get("model.name")
    about = about._replace(model_name=None if name is None else public_name(name))
    # What it came to, where the config leaves it out.
    step = (made_of.read(found.folder / "sae") or {}).get("step", {})
    train = config.train.model_copy(update={"lr": step.get("train.lr", config.train.lr)})
    return CardEntry(place, found.spec(), about, train, store, _evaluation(found))


def _evaluation(found: FinishedSAE) -> dict[str, Any] | None:
    """What `evaluate` measured; None where it was not run. Raises UserError where it is damaged."""
    try:
        record = read_json(found.folder / "evaluation.json")
    except FileNotFoundError:
        return None
    except ValueError as e:
        raise UserError(
            f"{found.folder}/evaluation.json is damaged ({e}); run `flash-sae evaluate` again"
        ) from e
    record.pop("made_of", None)
    return record
