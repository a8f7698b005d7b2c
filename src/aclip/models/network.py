"""Names that need the network: found out quickly, said clearly."""

import contextlib
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub

from aclip.errors import CheckpointError

TIMEOUT = 5.0
"""Seconds that a server has to answer at all."""


def check_hub(what: str, repository: str, files: Sequence[str]) -> None:
    """Check that a repository of the Hugging Face hub can be fetched from, unless one of its files is in the cache.

    Raises:
        CheckpointError: it is not cached, and the hub does not answer.
    """
    if any(isinstance(huggingface_hub.try_to_load_from_cache(repository, file), str) for file in files):
        return
    endpoint = huggingface_hub.constants.ENDPOINT
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        raise CheckpointError(f"{what} needs the network, which HF_HUB_OFFLINE forbids, and is not in the cache")
    _check_answer(what, endpoint)


def check_url(what: str, url: str) -> None:
    """Check that a file can be fetched, unless open_clip has it in its cache.

    Raises:
        CheckpointError: it is not cached, and its server does not answer.
    """
    if not (Path.home() / ".cache" / "clip" / url.rpartition("/")[2]).is_file():
        _check_answer(what, url)


@contextlib.contextmanager
def fetching(what: str) -> Iterator[None]:
    """Turn what goes wrong while something is fetched into one sentence.

    Raises:
        CheckpointError: anything that the clients raise.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # no network, no such repository, no such file in it: the clients' own errors
        raise CheckpointError(f"{what} cannot be fetched: {(str(error) or repr(error)).splitlines()[0]}") from error


def _check_answer(what: str, url: str) -> None:
    """Ask once: clients that are offline try again and again for a minute before they give up."""
    host = "/".join(url.split("/")[:3])
    try:
        urllib.request.urlopen(urllib.request.Request(host, method="HEAD"), timeout=TIMEOUT).close()
    except urllib.error.HTTPError:
        return  # any answer is one
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{what} needs the network, and {host} does not answer ({error}): fetch it where there "
                              "is a network, or give its files as a folder, or as NAME:FILE") from error
