"""Adapter directories on the Hugging Face hub: what goes there, and what must not."""

from __future__ import annotations

import json
import re
import shutil
import struct
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id

from mmpeft_ds import network
from mmpeft_ds.adapter_files import CHECKSUMS, CONFIG, WEIGHTS, whole
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import new_directory
from mmpeft_ds.redaction import masked

TEXT = (".json", ".yaml", ".md", ".txt", ".jinja")
# Two parts or more, and not the end of a URL, a tag or a relative path.
_PLACE = re.compile(r"(?<![\w/:.~$<>*+})\]-])/[\w.@+-]+(?:/[\w.@+-]+)+|\b[A-Za-z]:\\\\?[\w.]+")
_MAY_HOLD_ANY_TEXT = ("labels.json",)  # answers, where a slash is no path


def push(directory: str | Path, repo: str, out: str | Path, private: bool = False) -> str:
    """Upload an adapter directory, or a LoRA directory of `to_lora.py`; without a network write what would be.

    Args:
        repo: `owner/name`; made if it is not there.
        out: new folder for the files, if the hub cannot be reached.

    Returns:
        a line for the user: the address, or the command that uploads the folder.

    Raises:
        BadInput: no adapter, a credential or a path of this machine in a file, a name that the hub does not take, or
            an upload that it refuses. Nothing is uploaded then.
    """
    directory, out = Path(directory), Path(out)
    files = uploaded(directory)
    try:
        validate_repo_id(repo)
        if repo.count("/") != 1:
            raise HFValidationError("it must be owner/name")
    except HFValidationError as error:
        raise BadInput(f"--repo {repo}: {' '.join(str(error).split())}. Give owner/name.") from error
    try:
        api = HfApi()
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=repo,
            folder_path=directory,
            allow_patterns=[path.name for path in files],
            commit_message="An adapter of mmpeft_ds",
        )
    except LocalTokenNotFoundError as error:
        raise BadInput(f"--repo {repo}: nobody is logged in. Run `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else "an error"
        mend = "Check the token (`hf auth whoami`) and its rights." if status in (401, 403) else "Try again later."
        raise BadInput(f"--repo {repo}: the hub answered {status}. {mend}") from error
    except Exception as error:
        if not network.is_missing(error):
            raise
        return _kept(files, repo, out, private)
    return f"{constants.ENDPOINT}/{repo}: {len(files)} files"


def uploaded(directory: Path) -> list[Path]:
    """The files of an adapter directory, if they may be uploaded: readable, without credentials and places. Raises
    BadInput."""
    if (directory / "recipe.yaml").is_file():
        whole(directory)
    for name in (CONFIG, WEIGHTS):
        if not (directory / name).is_file():
            raise BadInput(f"{directory}: no adapter directory, {name} is missing. Give RUN/adapter.")
    files = sorted(path for path in directory.iterdir() if path.is_file() and not path.name.startswith("."))
    for path in files:
        if path.suffix == ".safetensors" and not (directory / CHECKSUMS).exists():
            _check_numbers(path)
        for number, line in enumerate(_lines(path), 1):
            if masked(line) != line:
                raise BadInput(
                    f"{path}:{number}: holds a credential. Remove it from the recipe and train or export again."
                )
            if path.name not in _MAY_HOLD_ANY_TEXT and (place := _PLACE.search(line)):
                raise BadInput(
                    f"{path}:{number}: holds a path of this machine, {place.group()}. Replace it by a name."
                )
    return files


def _check_numbers(path: Path) -> None:
    """Refuse weights that nobody could load. Raises BadInput."""
    from mmpeft_ds.engine.assembly.saved_adapter import read_tensors  # imports torch, which checksums make needless

    read_tensors(path)


def _lines(path: Path) -> list[str]:
    """Text of a file, line by line; of weights the notes in their header."""
    if path.suffix == ".safetensors":
        with path.open("rb") as file:
            header = json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
        return [json.dumps(header.get("__metadata__", {}))]
    if path.suffix not in TEXT:
        raise BadInput(f"{path}: is no file of an adapter directory. Move it elsewhere.")
    return path.read_text("utf-8", errors="replace").splitlines()


def _kept(files: list[Path], repo: str, out: Path, private: bool) -> str:
    if out.exists():
        raise BadInput(f"{out}: exists, and the hub cannot be reached. Give another folder by --out.")
    with new_directory(out) as partial:
        for path in files:
            shutil.copyfile(path, partial / path.name)
    return (
        f"{out}: {len(files)} files, not uploaded, since the hub cannot be reached from here. Where it can: "
        f"hf upload {repo} {out} .{' --private' if private else ''}"
    )
