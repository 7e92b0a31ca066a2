"""Nodes without a network: the Hugging Face hub is asked once whether it is there, and not again where it is not."""

from __future__ import annotations

import logging
from functools import cache

from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from huggingface_hub.errors import OfflineModeIsEnabled

logger = logging.getLogger(__name__)


def is_missing(error: Exception) -> bool:
    """Whether the hub was not reached; the hub's library changes its HTTP client, whose errors keep their names."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return isinstance(error, OfflineModeIsEnabled) or not names.isdisjoint({"TransportError", "ConnectionError"})


@cache
def ask_hub(name: str) -> None:
    """Ask the hub for the checkpoint `name`. If it cannot be reached and the cache has that checkpoint, this process
    reads the cache alone from here on; what the cache has not is left to huggingface_hub, which tries for longer.

    Where a file is not in the cache, huggingface_hub asks six times, which takes 23 s each (2.4.0), and a tokenizer is
    looked for in a dozen files that few checkpoints have.
    """
    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # noqa: BLE001 - whoever loads it meets any other answer again, and says so
        if not is_missing(error) or not isinstance(try_to_load_from_cache(name, "config.json"), str):
            return
        reason = " ".join(str(error).split()) or type(error).__name__
        logger.warning(
            "%s cannot be reached (%s): checkpoints are read from the cache alone. HF_HUB_OFFLINE=1 says so without "
            "asking.",
            constants.ENDPOINT,
            reason,
        )
        constants.HF_HUB_OFFLINE = True
