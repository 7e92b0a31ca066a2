"""What transformers' code raises when a model reads its first batch, in one line: configurations that few checkpoints
have may fail there, though all files of the checkpoint can be read."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import PretrainedConfig

from mmpeft_ds.backbones.common.stock_backbone import WHERE
from mmpeft_ds.backbones.common.tower_loading import first_line
from mmpeft_ds.errors import BadInput

NO_MEMORY = "not enough memory"  # of the host: torch says so in a RuntimeError


@contextlib.contextmanager
def blamed(config: PretrainedConfig) -> Iterator[None]:
    """Context in which what transformers' code raises becomes BadInput that names family and place; what other code
    raises, such as that of an adapter, and a lack of memory stay as they are."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        place = _place(error)
        if place is None or NO_MEMORY in str(error):
            raise
        raise BadInput(
            f"{WHERE}: {config._name_or_path!r} is of family {config.model_type!r}, whose model in transformers fails "
            f"with this configuration at its first batch ({type(error).__name__}: {first_line(error)}; {place}). "
            "Compare config.json with those of released checkpoints."
        ) from error


def _place(error: BaseException) -> str | None:
    """File and line in transformers that an error comes from, through torch too; None where other code raised it."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        parts = Path(frame.filename).parts
        if "transformers" in parts:
            return f"{parts[-1]} line {frame.lineno}"
        if "torch" not in parts:
            return None
    return None
