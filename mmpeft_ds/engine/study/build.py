"""Building a study: one frozen base, and for each member an adapter on it with its own DeepSpeed engine."""

from __future__ import annotations

import copy
from pathlib import Path

from torch import nn

from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import checkpoint, frozen_images
from mmpeft_ds.engine.assembly import build
from mmpeft_ds.engine.assembly.build import Built
from mmpeft_ds.engine.assembly.resolve import Resolved
from mmpeft_ds.engine.streams import first_batches
from mmpeft_ds.engine.study.share import SharedImages, Sharing, copy_of, share
from mmpeft_ds.engine.study.work import SharedWork
from mmpeft_ds.engine.zero import fingerprint as fingerprints
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites.base import Sites, base_model


class Builder:
    """Builds one member after the other.

    Args:
        resolved: of the first member, whose base all share.
    """

    def __init__(self, resolved: Resolved, ranks: Ranks, work: SharedWork):
        self.ranks, self.work = ranks, work
        self.bases: dict[int, nn.Module] = {}  # seed -> base, with the head that is drawn from it
        self.base = self._base(resolved)
        self.fingerprint = fingerprints.of_frozen(self.base)
        self.images: list[tuple[object, SharedImages]] = []

    def _base(self, resolved: Resolved) -> nn.Module:
        """The base of a member. Another seed loads it once more, so that random weights are those of the member's own
        run; tensors that are equal are then shared, and only the others are kept."""
        seed = resolved.recipe.seed
        if seed not in self.bases:
            base = build.load_base(resolved, self.ranks, stage=0)
            if self.bases:
                share(base, self.base)
            self.bases[seed] = base
        return self.bases[seed]

    def build(self, name: str, resolved: Resolved, resume_from: Path | None) -> tuple[Built, Sharing]:
        """The model and engine of a member, and the sharing of its frozen modules. Collective.

        Raises:
            BadInput: the method changes or trains the frozen weights themselves.
        """
        base, ranks = self._base(resolved), self.ranks
        shared = {id(p) for p in base.parameters()}
        shapes = resume_from and checkpoint.shapes(resume_from)
        model = build.adapted(resolved, copy_of(base), lambda: first_batches(resolved, ranks), shapes)
        trained = [n for n, p in model.named_parameters() if p.requires_grad and id(p) in shared]
        if trained:
            raise BadInput(f"{name}: trains {trained[0]} of the frozen base itself, which other members use. {_ALONE}")
        built = build.started(resolved, ranks, model, copy.deepcopy(resolved.ds_config), Sites())
        self._check_unchanged(name, base, built.fingerprint)
        inner = base_model(model)
        sharing = Sharing(inner, base, self.work, resolved.backbone.frozen_prefix(inner))
        built.frozen = self._images(resolved, built)
        return built, sharing

    def _check_unchanged(self, name: str, base: nn.Module, fingerprint: dict[str, str]) -> None:
        """Raise BadInput if attaching the method has changed shared tensors of the base."""
        common = {id(p) for p in self.base.parameters()}
        own = [path for path, p in base.named_parameters() if id(p) not in common]  # drawn from another seed
        for tensor, value in self.fingerprint.items():
            drawn = any(tensor == path or tensor.startswith(f"{path}.") for path in own)
            if not drawn and fingerprint.get(tensor, value) != value:
                raise BadInput(f"{name}: changes {tensor} of the frozen base, which other members use. {_ALONE}")

    def _images(self, resolved: Resolved, built: Built) -> SharedImages | None:
        """The computation of images outside the forward pass; one for all members with the same frozen prefix."""
        if not frozen_images.wanted(resolved.recipe.engine):
            return None
        prefix = frozen_images.checked_prefix(resolved.recipe, resolved.backbone, base_model(built.model))
        for known, images in self.images:
            if known == prefix:
                return images
        images = SharedImages(frozen_images.of_built(resolved, built, self.ranks), self.work)
        self.images.append((prefix, images))
        return images


_ALONE = "Train this one by launchers/train.py."
