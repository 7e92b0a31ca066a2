"""What the paths of a recipe lead to, so that a run continues with the same data or base at another place."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from mmpeft_ds.engine.assembly.resolve import Resolved
from mmpeft_ds.files import sha256

# Files beside the weights of a base model, whose fingerprint is compared when it is loaded.
_SMALL = (".json", ".txt", ".model", ".jinja")


def identities(resolved: Resolved) -> dict[str, str]:
    """Key of the recipe -> hash of what is at its path: the split of a data set, a subset, a local base's small files.

    Keys of anything else, such as names on the hub, are left out.
    """
    found = {}
    for role, sources in (("sources", resolved.train), ("validation", resolved.validation)):
        for number, source in enumerate(sources):
            manifest, split = source.manifest, source.options.split
            content = [manifest.name, split, manifest.labels, [s.sha256 for s in manifest.shards(split)]]
            found[f"data.{role}.{number}.dir"] = _hash([*content, manifest.index[split].sha256])
            if source.subset is not None:
                found[f"data.{role}.{number}.subset"] = _hash(sorted(source.subset.keys))
    return found | _of_folders(resolved.recipe.backbone, "backbone")


def _of_folders(value: Any, key: str) -> dict[str, str]:
    if isinstance(value, dict):
        return {k: v for name, inner in value.items() for k, v in _of_folders(inner, f"{key}.{name}").items()}
    if not isinstance(value, str) or not value or not Path(value).is_dir():
        return {}
    files = sorted(path for path in Path(value).iterdir() if path.is_file() and path.suffix in _SMALL)
    return {key: _hash([[path.name, sha256(path)] for path in files])} if files else {}


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
