"""Calibration of heads after training, without gradients: a search on validation, or a closed form."""

# B rows of a batch, N rows of a whole split

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.gather import gather_rows
from mmpeft_ds.distributed.partitioned import gathered
from mmpeft_ds.engine.assembly import modality
from mmpeft_ds.engine.zero import state as zero_state
from mmpeft_ds.methods.common.head import Head, head_of
from mmpeft_ds.sites.base import base_model
from mmpeft_ds.sites.feature_site import Features, Labelled


def head(model: nn.Module) -> Head | None:
    """The head of `model` if it is one that calibrates, else None."""
    any_head = head_of(model)
    return any_head if any_head is not None and any_head.calibrates else None


@torch.no_grad()
def rows_of(engine: Any, backbone: Any, task: Any, steps: Any, device: torch.device | str) -> Labelled:
    """All rows of a split and their classes, on every rank, in the order of their keys. Collective.

    Args:
        steps: of an evaluation stream.
    """
    base = base_model(getattr(engine, "module", engine))
    image, text, key, label = [], [], [], []
    for step in steps:
        for batch in step.micro:
            anywhere = collectives.sum_scalars(modality.present(batch), device)
            if not any(anywhere):
                continue
            batch = modality.complete(batch, anywhere, backbone, task).to(device)
            rows = base.rows(**backbone.inputs(batch))
            good = rows.valid
            image.append(rows.image[good])
            text += [] if rows.text is None else [rows.text[good]]
            key.append(rows.key[good])
            label.append(batch.targets["label"][good])
    parts = [gather_rows(torch.cat(part)) if part else None for part in (image, text, key, label)]
    order = parts[2].argsort(stable=True)
    image, text, key, label = (None if part is None else part[order] for part in parts)
    return Labelled(Features(image, text, torch.ones(len(key), dtype=torch.bool, device=key.device), key), label)


def run(built: Any, train: Labelled, validation: Labelled | None) -> dict[str, float]:
    """Calibrate the head on these rows, the same on every rank, and write the new weights into the engine. Collective.

    Returns:
        numbers that the head reports, such as what it has chosen.
    """
    calibrated = head(built.model)
    own = [p for p in calibrated.parameters() if p.requires_grad]
    with gathered(own), torch.enable_grad():
        before = [p.detach().clone() for p in own]
        report = calibrated.calibrate(train, validation)
        after = [p.detach().clone() for p in own]
    # Under ZeRO-3 a forward pass of the head releases the whole weights again; a head that runs one has set none.
    pairs = ((p, old, new) for p, old, new in zip(own, before, after, strict=True) if new.shape == old.shape)
    changed = [(p, new) for p, old, new in pairs if not torch.equal(old, new)]
    if changed:
        zero_state.ensure_optimizer_state(built.engine)
        for p, new in changed:
            zeros = torch.zeros_like(new)
            moments = dict.fromkeys(zero_state.moments(built.engine, p), zeros)
            zero_state.write_full(built.engine, p, {"weight": new.to(built.engine.device), **moments})
            zero_state.write_parameter(p, new)
    return report
