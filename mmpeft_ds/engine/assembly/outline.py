"""Outline of a run: what a recipe says, as far as it can be read and checked without torch.

Commands ask for it before they import anything that takes seconds, so that a wrong recipe is refused at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mmpeft_ds.data.assumed import Assumed, is_absent, is_assumed
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.data.subset import Subset
from mmpeft_ds.engine.assembly.checks import (
    check_backbone,
    check_names,
    check_quantised,
    check_records,
    check_texts,
    check_validation,
    check_values,
)
from mmpeft_ds.engine.zero.config import read_ds_config
from mmpeft_ds.errors import BadInput
from mmpeft_ds.recipe import Recipe, components, filled, where
from mmpeft_ds.recipe.components import Components, keyed_sources


@dataclass(frozen=True)
class Outline:
    """Parts of a recipe that need no torch, checked against each other.

    Attributes:
        recipe: with the defaults of its components filled in.
        parts: its components.
        ds_config: the ds_configs JSON.
        sources: data sources by their positions in the recipe, such as `data.sources.0`.
        manifests, subsets: of each source; None for a source that is used whole.
    """

    recipe: Recipe
    parts: Components
    ds_config: dict[str, Any]
    sources: dict[str, SourceOptions]
    manifests: dict[str, Manifest]
    subsets: dict[str, Subset | None]

    def of(self, role: str) -> list[str]:
        """Positions of the sources of a role: `sources`, which train, or `validation`."""
        return [key for key in self.sources if key.startswith(f"data.{role}.")]

    def labels(self) -> list[str] | None:
        """Closed list that the head covers: the labels of all train sets, each once, in order of appearance.

        Also where a subset leaves classes out: what was trained on some can then be asked about the others.
        """
        merged: dict[str, None] = {}
        for key in self.of("sources"):
            merged.update(dict.fromkeys(self.manifests[key].labels or []))
        return list(merged) or None


def outline(recipe: Recipe, assumed: Assumed | None = None) -> Outline:
    """Read and check what needs no torch.

    Args:
        assumed: what to take for data sets that are not prepared yet; None: they are refused.

    Raises:
        BadInput: one line: what, where, how to mend it.
    """
    check_values(recipe)
    ds_config = read_ds_config(recipe)
    parts = components(recipe)
    recipe = filled(recipe, parts)
    check_validation(recipe, parts.method.options)
    with parts.method.blamed():
        stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        parts.method.options.check_training(recipe.engine.dtype, stage)
    check_quantised(recipe, parts.backbone.options.quantise, stage)
    if recipe.engine.compile:
        _check_compiling(recipe, stage)
    listed = keyed_sources(recipe)
    if not listed["sources"]:
        raise BadInput(f"{where(recipe, 'data.sources')}: empty. Name a prepared data set: [{{dir: data/easy-vqa}}].")
    sources = listed["sources"] | listed["validation"]
    manifests = {key: load_manifest(recipe, key, options, assumed) for key, options in sources.items()}
    check_names(recipe, [(key, options, manifests[key]) for key, options in sources.items()])
    subsets = {key: load_subset(recipe, key, options, manifests[key]) for key, options in sources.items()}
    for key, options in sources.items():
        check_records(recipe, key, options, manifests[key], parts.tasks[key])
    for key, options in sources.items():
        check_backbone(recipe, key, parts.tasks[key], parts.backbone)
        check_texts(recipe, key, options, parts.method.options)
    return Outline(recipe, parts, ds_config, sources, manifests, subsets)


def _check_compiling(recipe: Recipe, stage: int) -> None:
    if stage == 3:
        raise BadInput(
            f"{where(recipe, 'engine.compile')}: compiled adapters do not work with the partitioned parameters of "
            "ZeRO stage 3. Use ds_configs/zero1.json or zero2.json, or set engine.compile: false."
        )
    if recipe.data.pack:
        raise BadInput(
            f"{where(recipe, 'engine.compile')}: compiled adapters do not see where packed texts begin. Set "
            "data.pack: 0, or engine.compile: false."
        )


def load_manifest(recipe: Recipe, key: str, options: SourceOptions, assumed: Assumed | None = None) -> Manifest:
    """The manifest of a source, which must have the split; an assumed one where it is absent. Raises BadInput."""
    if assumed is not None and is_absent(options.dir):
        splits = [s.split for s in (*recipe.data.sources, *recipe.data.validation) if s.dir == options.dir]
        stored = recipe.backbone.get("images") == "stored" and recipe.backbone.get("encoder", "") is None
        return assumed.manifest(options.dir, splits, stored)
    with blamed(recipe, key):
        if options.dir.startswith("pipe:") and not recipe.data.allow_pipe:
            raise BadInput("pipe: runs a shell command and is refused. Set data.allow_pipe: true if you trust it.")
        if is_absent(options.dir):
            raise BadInput(
                f"{options.dir}/manifest.json: not found; prepare the data set first: python data_prep/prepare.py "
                f"SOURCE --out {options.dir}. To size the run before: --check --samples N."
            )
        manifest = Manifest.load(options.dir)
        manifest.shards(options.split)
    return manifest


def load_subset(recipe: Recipe, key: str, options: SourceOptions, manifest: Manifest) -> Subset | None:
    """The samples of a source that are used; None for all. Raises BadInput."""
    with blamed(recipe, f"{key}.subset"):
        there = options.subset and not is_assumed(manifest)
        return Subset.load(options.subset, manifest, options.split) if there else None


@contextlib.contextmanager
def blamed(recipe: Recipe, key: str) -> Iterator[None]:
    """Inside, errors also say which file and key of the recipe they are about."""
    try:
        yield
    except BadInput as e:
        raise BadInput(f"{where(recipe, key)}: {e}") from e
