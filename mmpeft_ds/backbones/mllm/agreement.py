"""Checks that the files of a checkpoint fit together, before a run.

The image processor must make the patches that the vision tower reads. Of a family that nobody has tried, the whole
processor must besides make the same tokens of a conversation as are made here of its parts, mark the same ones as of
an image, and give nothing that the model reads and that is not passed on to it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from PIL import Image
from torch import Tensor
from transformers import PretrainedConfig

from mmpeft_ds.backbones.common import tower_loading
from mmpeft_ds.backbones.common.stock_backbone import WHERE
from mmpeft_ds.backbones.mllm.chat import Chat
from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.backbones.mllm.model import GRIDS, TYPES, argument_names
from mmpeft_ds.backbones.mllm.processing import OF_TEXTS, TOKEN_RUNS
from mmpeft_ds.data.batch import Prompted, Spelled
from mmpeft_ds.errors import BadInput

_LACKING = re.compile(r"requires the (\S+) library but it was not found")  # as transformers says it
# A conversation in which the second image stands apart from the first, behind words.
_TALK = Prompted("<image> two? <image>", "", (("user", "one?"), ("assistant", "a.")), images=2)


def refuse_other_sizes(
    name: str, family: Family, config: PretrainedConfig, processor: Any, black: dict[str, Tensor]
) -> None:
    """Compare the sizes that an image processor and the vision tower must have alike.

    Args:
        name: of the checkpoint.
        processor: of images.
        black: what it makes of a black image.

    Raises:
        BadInput: with both numbers.
    """
    # Some families have their vision tower's settings under another name; its sizes are then not compared.
    vision = getattr(config, "vision_config", None)
    pairs = {
        (ours, theirs): (getattr(processor, ours), getattr(vision, theirs))
        for ours, theirs in family.compared
        if isinstance(getattr(processor, ours, None), int) and isinstance(getattr(vision, theirs, None), int)
    }
    if vision and vision.model_type in ("clip_vision_model", "siglip_vision_model"):  # which take one size alone
        pairs["crop_size", "image_size"] = _pixels(black).shape[-1], vision.image_size
    for (ours, theirs), (made, read) in pairs.items():
        if made != read:
            raise BadInput(
                f"{WHERE}: {name!r}: preprocessor_config.json has {ours} {made}, but the vision "
                f"tower of config.json has {theirs} {read}. Take both files of one checkpoint."
            )


def refuse_other_conversations(
    name: str,
    classes: tuple[type, type],
    processor: Any,
    chat: Chat,
    kind_ids: list[int],
    black: tuple[Image.Image, Spelled],
) -> None:
    """Compare what the whole processor makes of a conversation with two images with what is made of it here.

    Args:
        name: of the checkpoint.
        classes: of the model, and of what is in it below the output layer.
        processor: the whole one.
        kind_ids: tokens that count to an image beside those of its features.
        black: a picture, and what the backbone's transform makes of it.

    Raises:
        BadInput: with what differs.
    """
    picture, seen = black
    text = Prompted(_TALK.prompt, "", _TALK.turns, images=2, spellings=(seen.spelling,) * 2)
    ids = _widened(chat.encode(text).ids, chat.ids, seen[TOKEN_RUNS][0].tolist() * 2)
    kinds = [int(number in (*chat.ids, *kind_ids)) for number in ids]
    try:
        rendered = chat.rendered(text)
        options = {"add_special_tokens": False} if chat.begun(rendered) else {}
        made = processor(text=[rendered], images=[picture, picture], return_tensors="pt", **options)
    except (ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        reason = tower_loading.first_line(error)
        raise _untried(name, processor, f"cannot read a conversation with two images ({reason})") from error
    theirs = made["input_ids"][0].tolist()
    if theirs != ids:
        differ = (i for i, (a, b) in enumerate(zip(theirs, ids, strict=False)) if a != b)
        at = next(differ, min(len(theirs), len(ids)))
        tokens = chat.tokenizer.convert_ids_to_tokens(theirs[at : at + 1] + ids[at : at + 1])
        raise _untried(
            name,
            processor,
            f"makes other tokens of a conversation than its parts do, at place {at} {' and '.join(tokens)}",
        )
    stock_class, inner = classes
    forward, features = argument_names(stock_class.forward), argument_names(inner.get_image_features)
    by_position = argument_names(getattr(inner, "get_rope_index", _nothing))
    if types := [n for n in TYPES if n in forward and n in made and made[n][0].tolist() != kinds]:
        raise _untried(name, processor, f"marks other tokens as of an image ({types[0]}) than those of its features")
    unread = sorted(set(made) & ((forward - features) | by_position) - {*OF_TEXTS, *GRIDS, *TYPES})
    if unread:
        raise _untried(name, processor, f"gives {unread[0]}, which the model reads beside the features of images")


@contextlib.contextmanager
def foreign(name: str, config: PretrainedConfig) -> Iterator[None]:
    """Context in which what classes of transformers raise becomes BadInput: they were made for other files, or for
    packages that are missing."""
    try:
        yield
    except (AttributeError, ImportError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, ImportError) and (lacking := _LACKING.search(str(error))):
            raise BadInput(
                f"{WHERE}: {name!r} is of family {config.model_type!r}, which needs the package {lacking[1]}: "
                f"pip install {lacking[1]}. The family was not tried here; it is then compared with its own processor."
            ) from error
        reason = f"{type(error).__name__}: {tower_loading.first_line(error)}"
        raise BadInput(
            f"{WHERE}: {name!r} is of family {config.model_type!r}, whose processor or model cannot be tried with a "
            f"black image ({reason}). Take all files of one checkpoint, and install what it asks for."
        ) from error


def _pixels(image: dict[str, Tensor]) -> Tensor:
    return next(value for name, value in image.items() if name.startswith("pixel_values"))


def _nothing() -> None:
    """Stands for a function that a class lacks."""


def _widened(ids: list[int], of_images: list[int], runs: list[int]) -> list[int]:
    """Tokens with each placeholder as often as its run is long."""
    left = iter(runs)
    times = [next(left, 1) if number in of_images else 1 for number in ids]
    return [number for number, n in zip(ids, times, strict=True) for _ in range(n)]


def _untried(name: str, processor: Any, problem: str) -> BadInput:
    kind = type(processor).__name__
    return BadInput(
        f"{WHERE}: {name!r} is of a family that was not tried, and its processor {kind} {problem}. "
        "Such a family needs a file in mmpeft_ds/backbones/mllm/families."
    )
