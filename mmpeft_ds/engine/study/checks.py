"""Checks of a study: settings that its members must share, so that each gives the result of its own run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from mmpeft_ds.backbones.common.tower_loading import choose_attention
from mmpeft_ds.engine.assembly.resolve import Resolved
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe.study import Study


def check_directory(folder: Path) -> None:
    """Refuse the directory of a single run, whose files a member could overwrite. Raises BadInput."""
    if (folder / "recipe.yaml").exists():
        raise BadInput(
            f"{folder}: is the directory of a run, and a study needs one of its own. Name another: --set run_dir=..., "
            "or add --fresh."
        )


def check(study: Study, members: Mapping[str, Resolved]) -> None:
    """Refuse members that cannot share a frozen base. Raises BadInput."""
    first_name, first = next(iter(members.items()))
    stage = first.ds_config["zero_optimization"].get("stage", 0)
    if stage == 3:
        raise BadInput(
            f"{study.path}: engine.deepspeed: ZeRO stage 3 splits the frozen base for one model alone, so a study "
            "cannot share it. Use ds_configs/zero1.json or zero2.json."
        )
    for name, resolved in members.items():
        if resolved.method_options.gradient_free or resolved.backbone.reads_bank:
            raise BadInput(
                f"{study.path}: {name}: method {resolved.recipe.method['name']} trains on stored or pooled features, "
                "where there is no frozen work to share. Use launchers/few_shot.py, or train it by launchers/train.py."
            )
        if resolved.recipe.optim.accumulation != first.recipe.optim.accumulation:
            raise BadInput(
                f"{study.path}: optim.accumulation: {resolved.recipe.optim.accumulation} in {name} and "
                f"{first.recipe.optim.accumulation} in {first_name}, but all members see the same micro-batches. Set "
                "it for all outside `study`."
            )
        own, other = (choose_attention(r.backbone.attention, r.backbone.dtype) for r in (resolved, first))
        if own != other:
            raise BadInput(
                f"{study.path}: engine.attention: {name} needs {own} and {first_name} takes {other}, but they share "
                f"one base. Set engine.attention: {own} for all."
            )
