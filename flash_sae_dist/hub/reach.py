"""What may go wrong with the Hugging Face hub, in a sentence each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from ..config.base import ConfigError, UserError
from ..interop.hub import first_sentence

_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_name(repo: str) -> None:
    """Raises ConfigError where a repository's name is none."""
    if not _NAME.fullmatch(repo):
        raise ConfigError(
            f"{repo!r} is no repository's name; write owner/name, such as me/pythia-70m-saes"
        )


@contextmanager
def reaching(repo: str, doing: str) -> Iterator[None]:
    """Turns what the hub's client raises inside into UserError: no network, no login, no such
    repository. doing: what is done with it, such as `pull`.
    """
    # Not at the top: it takes long to import.
    from huggingface_hub import errors

    # Of the HTTP library that the client's version is built on, which are several.
    broken: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    login = "log in with `hf auth login`"
    try:
        yield
    except errors.LocalTokenNotFoundError as e:
        raise UserError(f"cannot {doing} {repo}: there is no token; {login}") from e
    except errors.RepositoryNotFoundError as e:
        raise UserError(
            f"cannot {doing} {repo}: the hub has no such repository, or it is private; check the "
            f"name, or {login}"
        ) from e
    except errors.RevisionNotFoundError as e:
        raise UserError(f"cannot {doing} {repo}: it has no such revision; check --revision") from e
    except errors.HFValidationError as e:
        raise ConfigError(f"cannot {doing} {repo}: {_line(e)}; rename it") from e
    except errors.HfHubHTTPError as e:
        code = e.response.status_code
        cure = f"{login} to an account with the rights" if code in (401, 403) else "try again later"
        raise UserError(f"cannot {doing} {repo}: the hub answers {_line(e)}; {cure}") from e
    except (broken, errors.LocalEntryNotFoundError, ConnectionError, TimeoutError) as e:
        raise UserError(
            f"cannot {doing} {repo}: the Hugging Face hub cannot be reached "
            f"({first_sentence(e)}); check the network, and that HF_HUB_OFFLINE is not set"
        ) from e


def _line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]
