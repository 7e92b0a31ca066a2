"""Inputs of commands: picture files, texts, a split, and the device. Imports no model."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmpeft_ds.data.formats import FORMATS, READ_SUFFIXES
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.data.video_files import ENDINGS, is_video
from mmpeft_ds.errors import BadInput, printable

FEATURES = ".npy"


def find_pictures(given: Sequence[Path], option: str = "--images") -> list[Path]:
    """Files as given, and of each directory everything below it that looks like a picture or stored features. Hidden
    files are passed over, such as the `._` files that macOS leaves beside pictures; of others a note is printed. Where
    nothing is given, nothing is found.

    Raises:
        BadInput: a path that is not there, a directory without pictures, no picture among the files, or pictures mixed
            with stored features.
    """
    paths: list[Path] = []
    endings = (*READ_SUFFIXES, FEATURES)
    for path in given:
        if not path.exists():
            raise BadInput(f"{option} {path}: no such file or directory. Give image files or a folder of them.")
        below = _below(path) if path.is_dir() else []
        inside = [p for p in below if p.suffix.lower() in endings] if path.is_dir() else [path]
        left = [p for p in below if p.suffix.lower() not in (*endings, *ENDINGS)]
        if left and inside:
            first = printable(left[0].name)
            print(
                f"note: {option} {path}: files left out, whose endings are others: {len(left):,}, first {first}",
                file=sys.stderr,
            )
        if not inside:
            raise BadInput(f"{option} {path}: no image in it. Known endings: {', '.join(endings)}.")
        paths += inside
    if paths and not any(p.suffix.lower() in endings or _is_picture(p) for p in paths):
        raise BadInput(f"{option} {paths[0]}: is no picture. Give image files or folders of them.")
    stored = [p for p in paths if p.suffix.lower() == FEATURES]
    if 0 < len(stored) < len(paths):
        raise BadInput(f"{option}: pictures and stored features together ({stored[0]}). Ask about them one by one.")
    return list(dict.fromkeys(paths))


def _is_picture(path: Path) -> bool:
    """Whether the header of a file is that of a picture, whatever its name says."""
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS):
            return True
    except Exception:  # noqa: BLE001 - Pillow's plugins raise nearly anything on damaged input
        return False


def _below(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, in order; links to nothing as well, so that they are said."""
    paths = (p for p in folder.rglob("*") if not p.is_dir())
    return sorted(p for p in paths if not any(part.startswith(".") for part in p.relative_to(folder).parts))


def find_videos(given: Sequence[Path]) -> list[Path]:
    """Files as given, and of each directory everything below it that looks like a video, but no hidden files. Raises
    BadInput."""
    paths: list[Path] = []
    for path in given:
        if not path.exists():
            raise BadInput(f"--videos {path}: no such file or directory. Give video files or a folder of them.")
        inside = [p for p in _below(path) if is_video(p)] if path.is_dir() else [path]
        if not inside or not is_video(inside[0]):
            raise BadInput(f"--videos {path}: no video. Known endings: {', '.join(sorted(ENDINGS))}.")
        paths += inside
    return list(dict.fromkeys(paths))


def read_texts(given: Sequence[str], file: Path | None, option: str = "--texts") -> list[str]:
    """Texts of the command line, then those of the file, one per line; each once. Raises BadInput."""
    texts = list(given)
    if file is not None:
        try:
            texts += [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as e:
            reason = e.strerror if isinstance(e, OSError) else "is no UTF-8 text"
            raise BadInput(f"{option} {file}: {reason}. Give a file with one text a line.") from e
    return list(dict.fromkeys(texts))


def default_split(dirs: Sequence[str]) -> str:
    """The split to evaluate on where none is named: `test` if all these data sets have it, else `val`, else the only
    one beside `train`. Raises BadInput that lists the splits there are."""
    manifests = [Manifest.load(dir) for dir in dirs]
    common = [s for s in manifests[0].splits if all(s in m.splits for m in manifests)]
    held_out = [s for s in common if s != "train"]
    for split in ("test", "val", *(held_out if len(held_out) == 1 else ())):
        if split in common:
            return split
    raise BadInput(f"--split: name one; the splits of {manifests[0].dir} are {', '.join(manifests[0].splits)}.")


def device_of(name: str) -> Any:
    """The torch.device that `--device` names; `auto` is a GPU if there is one. Raises BadInput."""
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return torch.device("cuda" if there else "cpu")
    known = ["cpu", *(f"cuda:{i}" for i in range(there))]
    if name not in known and not (name == "cuda" and there):
        reason = "torch sees no GPU on this machine" if name.startswith("cuda") and not there else "no such device"
        raise BadInput(f"--device {name}: {reason}. Use one of auto, {', '.join(known)}.")
    return torch.device(name)


def short_names(paths: Sequence[str], width: int = 40) -> list[str]:
    """Names that fit into `width` characters and still differ where the paths do: without the folder that all share,
    shortened in the middle, and as a terminal can show them."""
    folders = {os.path.dirname(path) for path in paths}
    shared = os.path.commonpath(folders) if folders and len({os.path.isabs(f) for f in folders}) == 1 else ""
    names = [printable(os.path.relpath(path, shared) if shared else path) for path in paths]
    head = width // 3
    return [n if len(n) <= width else f"{n[:head]}...{n[head + 3 - width :]}" for n in names]
