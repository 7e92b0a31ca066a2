"""Miniatures of official layouts: what tests of sources build and read back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import webdataset

from data_prep import prepare
from mmpeft_ds.data.manifest import Manifest
from tests.helpers.data.images import picture


def put(path: Path, content: Any) -> Path:
    """Write bytes, text, or anything else as JSON, with the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def put_picture(path: Path, number: int, form: str = "JPEG") -> Path:
    """A picture whose bytes differ from those of another number."""
    return put(path, picture((number * 16 % 256, number // 16, 99), form))


def prepared(source: str, root: Path, out: Path, *options: str) -> Manifest:
    """Prepare a miniature in this process."""
    prepare.main([source, "--root", str(root), "--out", str(out), "--processes", "1", *options])
    return Manifest.load(out)


def records(manifest: Manifest, split: str) -> list[dict[str, Any]]:
    """Records of a split as any WebDataset reader sees them, with the endings of their pictures under `endings`."""
    urls = [manifest.path(shard.file) for shard in manifest.shards(split)]
    found = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        endings = [name for name in sample if not name.startswith("__") and name != "json"]
        found.append(json.loads(sample["json"]) | {"endings": endings})
    return found
