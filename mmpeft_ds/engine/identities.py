"""Identities of the data and base that a recipe names by path, so that a run continues after they were moved."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import Any

from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.engine.assembly.resolve import Resolved
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import sha256

# Files beside the weights of a base model, whose fingerprint is compared when it is loaded.
_SMALL = (".json", ".txt", ".model", ".jinja")


def identities(resolved: Resolved) -> dict[str, str]:
    """Key of the recipe -> hash of what is at its path: the split of a data set, a subset, a local base's small files.

    Keys of anything else, such as names on the hub, are left out.
    """
    hashes = {}
    for role, sources in (("sources", resolved.train), ("validation", resolved.validation)):
        for number, source in enumerate(sources):
            hashes[f"data.{role}.{number}.dir"] = _of_data(source.manifest, source.options.split)
            if source.subset is not None:
                hashes[f"data.{role}.{number}.subset"] = _hash(sorted(source.subset.keys))
    return hashes | _of_folders(resolved.recipe.backbone, "backbone")


def of_saved(recipe: dict[str, Any]) -> dict[str, str]:
    """`identities` of what the paths of a saved recipe lead to today, as far as there is something, without subsets.

    For checkpoints of versions that did not note them.
    """
    hashes = {}
    for role in ("sources", "validation"):
        # Whatever has another form leads nowhere.
        with contextlib.suppress(KeyError, TypeError):
            for number, source in enumerate(recipe["data"][role]):
                with contextlib.suppress(BadInput):
                    hashes[f"data.{role}.{number}.dir"] = _of_data(Manifest.load(source["dir"]), source["split"])
    return hashes | _of_folders(recipe.get("backbone"), "backbone")


def _of_data(manifest: Manifest, split: str) -> str:
    content = [manifest.name, split, manifest.labels, [s.sha256 for s in manifest.shards(split)]]
    return _hash([*content, manifest.index[split].sha256])


def _of_folders(value: Any, key: str) -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _of_folders(inner, f"{key}.{name}").items()}
    if not isinstance(value, str) or not value or not Path(value).is_dir():
        return {}
    files = sorted(path for path in Path(value).iterdir() if path.is_file() and path.suffix in _SMALL)
    return {key: _hash([[path.name, sha256(path)] for path in files])} if files else {}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
