"""The Hugging Face hub without a network: what the cache holds is used, the rest told at once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

from huggingface_hub import constants, get_session, snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from distill_system.errors import ModelError

REACH_SECONDS = 3.0
"""Longest wait for an answer of the hub; looking up its name can take longer than any timeout."""


def require_hub_model(name: str) -> Path | None:
    """Check that a model of the hub can be had: over the network, or from this machine's cache.

    Without a network everything after this reads the cache alone, and waits for nothing.
    Returns the model's folder in the cache if there is no network; None if there is one.
    Raises: ModelError, with what was looked for and where, if it cannot be had.
    """
    if is_hub_reachable():
        return None
    folder = find_in_cache(name)
    if folder is None:
        network = (
            "HF_HUB_OFFLINE is set, so the hub is not asked"
            if constants.is_offline_mode()
            else f"{constants.ENDPOINT} does not answer within {REACH_SECONDS:g} s: there is no "
            "network, or a proxy is not set"
        )
        raise ModelError(
            f"looked for a folder {Path(name).absolute()} and for a model {name!r} in the hub's "
            f"cache {constants.HF_HUB_CACHE}: found neither; {network}. Give a local folder, or "
            f"fetch the model where there is a network (`hf download {name}`) and copy the cache"
        )
    go_offline()
    return folder


def is_hub_reachable() -> bool:
    """Whether the hub, or the mirror that HF_ENDPOINT names, may be asked and answers at all."""
    if constants.is_offline_mode():
        return False
    answers: list[int] = []

    def ask() -> None:
        try:
            answer = get_session().head(constants.ENDPOINT, timeout=REACH_SECONDS)
        except Exception:  # by the network: no name, no route, refused, a proxy that fails
            return
        answers.append(answer.status_code)

    thread = threading.Thread(target=ask, name="hub", daemon=True)
    thread.start()
    thread.join(REACH_SECONDS)
    return bool(answers)


def find_in_cache(name: str) -> Path | None:
    """Where a model or tokenizer of the hub lies on this machine; None if it does not."""
    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None
    return folder


def go_offline() -> None:
    """Let this process, and those that it starts, read the hub's cache and never the network."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    constants.HF_HUB_OFFLINE = True
