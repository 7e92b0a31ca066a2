"""What is tried of every family of multimodal language models, and which family lacks what, each with the reason.

The tests of families take what is missing from here, and each shows that it still is: a reason that no longer holds is
a test that fails. The table of docs/families.md is made of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.models import tiny_families, tiny_mllm
from tests.helpers.models.family_samples import WITHOUT_SITES

EVERY = [*tiny_mllm.FAMILIES, *tiny_families.FAMILIES]


@dataclass(frozen=True)
class Reason:
    """Why a family lacks something.

    Attributes:
        why: a sentence of the documentation.
        said: what the refusal, or the error of the stock class, says of it.
    """

    why: str
    said: str


@dataclass(frozen=True)
class Trait:
    """Something that is tried of every family.

    Attributes:
        head: of the column in the table.
        what: is tried, as a part of a sentence.
        tests: file below tests/.
        lacking: why families lack it.
    """

    head: str
    what: str
    tests: str
    lacking: Mapping[str, Reason] = field(default_factory=dict)


NO_VIDEOS = Reason(
    "its processor does not say how a video is spelled in a text; frames are read as images with `videos: images`",
    "does not say how a video is spelled in the text",
)
UNSPELLED = [name for name, tiny in tiny_families.FAMILIES.items() if not tiny.video_processor]
LACKS_VIDEOS = dict.fromkeys(["llava", "llava_next", *UNSPELLED], NO_VIDEOS) | {
    "kimi_k25": Reason(
        "transformers 5.23 reads videos of equally many frames alone; `videos: images` reads frames as images",
        "reads pieces of equally many frames alone",
    ),
    "minimax_m3_vl": Reason(
        "its video processor does not scale frames; `videos: images` reads frames as images", "does not scale frames"
    ),
    "video_llava": Reason(
        "transformers 5.23 gives features of frames without saying whose they are; `videos: images` reads frames as "
        "images",
        "without saying whose they are",
    ),
}
NO_SITES = Reason(
    "its attention has low-rank projections, which adapters reach by a pattern of names alone",
    "no separate projections",
)
ONE_QUESTION = Reason(
    "it sees its question from both sides, and a later one would show it an answer before that is given",
    "reads one question alone",
)
NO_TEXT_ALONE = Reason("its processor takes no text without an image", "list index out of range")
NO_BEAMS = Reason("transformers 5.23 does not repeat the images for the beams; here it does", "do not match")

# By name: lacking["video"] and so on.
TRAITS = {
    "equal": Trait("logits", "logits and losses of one packed batch are those of the stock class", "test_families"),
    "alone": Trait("text alone", "so in texts without an image", "test_families", {"paligemma": NO_TEXT_ALONE}),
    "several": Trait("several images", "so in texts with several", "test_families"),
    "greedy": Trait("greedy", "generated text is that of the stock class", "test_families"),
    "beams": Trait("beams", "so with two beams", "test_families", {"llama4": NO_BEAMS}),
    "turns": Trait(
        "turns",
        "tokens and logits of conversations with images anywhere are those of `apply_chat_template`",
        "test_chats",
        {"paligemma": ONE_QUESTION},
    ),
    "video": Trait("video", "logits, losses and generated text of videos", "test_videos", LACKS_VIDEOS),
    "packed": Trait(
        "packed", "texts in one row have the losses and gradients of padded rows (1e-6)", "test_packed_families"
    ),
    "lora": Trait("`lora`", "the method trains", "test_families"),
    "routed_lora": Trait(
        "`routed_lora`", "the method trains", "test_families", dict.fromkeys(WITHOUT_SITES, NO_SITES)
    ),
    "deep_prompt": Trait(
        "`deep_prompt`",
        "the method trains",
        "test_families",
        {
            **dict.fromkeys(WITHOUT_SITES, NO_SITES),
            **dict.fromkeys(
                ("inkling2", "qwen4_exp"),
                Reason(
                    "its attention keeps more than keys and values, which a prompt has none of", "asks its cache for"
                ),
            ),
            "glm5_next": Reason(
                "it carries a state from token to token, which a prompt lacks",
                "carries a state from token to token",
            ),
        },
    ),
    "again": Trait(
        "recomputed", "layers that are computed again give the gradients of a LoRA", "test_family_adapters"
    ),
    "merged": Trait("merged", "a LoRA is loaded again bit for bit, and merged within 1e-5", "test_family_adapters"),
    "peft": Trait(
        "stock peft",
        "peft opens it on the stock class in a process without this package",
        "test_family_adapters",
    ),
    "zero3": Trait(
        "ZeRO-3",
        "two ranks, one without images, give the losses, weights and answers of one process",
        "test_mllm_ranks",
    ),
}


def lacking(trait: str, family: str) -> Reason | None:
    """Why a family lacks something; None where it does not."""
    return TRAITS[trait].lacking.get(family)


def having(trait: str) -> list[str]:
    """Families that have it."""
    return [family for family in EVERY if lacking(trait, family) is None]


def write(folder: Path, family: str) -> str:
    """The tiny checkpoint of a family."""
    return (tiny_mllm if family in tiny_mllm.FAMILIES else tiny_families).write(folder, family)
