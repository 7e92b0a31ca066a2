"""Composed encoders of tiny towers, and a batch in which one text has an image and others share one or have none."""

import torch

from mmpeft_ds.backbones.vision_text_encoder.backbone import ENTRY, Options
from tests.helpers.models import tiny_towers

LABELS = ["yes", "no", "red"]


def write_towers(folder) -> dict[str, str]:
    """Directories of tiny towers by name."""
    made = {f: tiny_towers.write_vision(folder / f, f) for f in tiny_towers.VISION}
    made |= {f: tiny_towers.write_text(folder / f, f) for f in ("bert", "roberta")}
    made["wide"] = tiny_towers.write_vision(folder / "wide", "vit", width=32)
    made["roberta_without_pooler"] = tiny_towers.write_text(folder / "nopool", "roberta", pooler=False)
    return made


def entry(towers, vision="vit", text="roberta", **options):
    return ENTRY(Options(vision=towers[vision], text=towers[text], image_size=8, **options), LABELS)


def inputs(backbone, images=2):
    pixels = torch.randint(0, 256, (images, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    texts = backbone.collate_texts(["is it red", "what color is there", "is it"])
    owner = dict(image_owner=torch.arange(images), text_owner=torch.tensor([0, 1, 1]), num_slots=2)
    return {**backbone.collate_images(list(pixels)), **texts, **owner}
