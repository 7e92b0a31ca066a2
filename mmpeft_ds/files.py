"""Writing files: complete or absent at any moment, checked by hash, and with the permissions that the umask gives."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from mmpeft_ds.errors import BadInput

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_REFUSED = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
_UNWRITABLE = _FULL | _REFUSED
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
_TORN = re.compile(r"\(os error (\d+)\)")  # how safetensors, which is written in Rust, ends its messages
REPOSITORY = Path(__file__).resolve().parents[1]  # the checkout this package lies in


class CannotWrite(OSError):
    """A file could not be written; the message names it. Every command reports it in one line."""


def fsync(path: str | os.PathLike) -> None:
    """Wait until the bytes of a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_regular(path: str | os.PathLike) -> None:
    """Raise OSError for a pipe or a device, whose content may never end; what is not there is left to the caller."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise OSError(errno.EINVAL, "is a pipe or a device, and no file", os.fspath(path))


def sha256(file: str | os.PathLike | IO[bytes]) -> str:
    """sha256 of a file, or of the rest of an open one, as 64 hexadecimal digits."""
    if not hasattr(file, "read"):
        check_regular(file)
        with open(file, "rb") as stream:
            return sha256(stream)
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def is_on_local_disk(path: Path) -> bool:
    """Whether a path, which need not be there yet, lies on a disk of this machine, as far as psutil knows."""
    import psutil

    parts = [p for p in psutil.disk_partitions(all=True) if path.resolve().is_relative_to(p.mountpoint)]
    kind = max(parts, key=lambda p: len(p.mountpoint)).fstype if parts else ""
    return kind in ("ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "overlay", "tmpfs", "apfs", "f2fs")


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """For a block that writes `path`: what the file system refuses becomes one line. Raises BadInput."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path}: {cannot_write(error) or error}") from error


def check_writable(directory: Path) -> None:
    """Check before the work that its results can be written into a directory. Raises BadInput."""
    with writing(directory), tempfile.TemporaryFile(dir=directory):
        pass


def cannot_write(error: BaseException) -> str:
    """Advice for a file that could not be written, such as on a full disk; empty for any other error."""
    if not isinstance(error, OSError) or not (isinstance(error, CannotWrite) or error.errno in _UNWRITABLE):
        return ""
    if error.errno == errno.ENOENT:
        return "cannot be written, since its directory is gone. Restore it; the same command continues from it."
    remedies = dict.fromkeys(_FULL, "Make room")
    remedy = remedies.get(error.errno, "Choose another place, or mend this one")
    return f"cannot be written ({os.strerror(error.errno or errno.EIO)}). {remedy}; the same command continues."


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """For a block that writes `path`. What keeps it from being written is raised as CannotWrite, which names it."""
    try:
        yield
    except CannotWrite:
        raise
    except OSError as error:
        ours = error.filename is None or Path(os.fsdecode(error.filename)).is_relative_to(path.parent)
        if error.errno is None or not ours:  # such as a file that the block reads
            raise
        raise CannotWrite(error.errno, os.strerror(error.errno), str(path)) from error
    except Exception as error:
        if (quoted := _TORN.search(str(error))) is None:
            raise
        raise CannotWrite(int(quoted[1]), os.strerror(int(quoted[1])), str(path)) from error


def is_removed(file: IO[bytes], path: Path) -> bool:
    """Whether the open file `path` has been removed or replaced. Raises OSError over NFS, by another machine."""
    status = os.fstat(file.fileno())
    if status.st_nlink:
        return False
    with contextlib.suppress(FileNotFoundError):
        return not os.path.samestat(os.stat(path), status)  # some file systems count no links
    return True


def append(file: IO[bytes], data: bytes) -> None:
    """Add all of `data` to the end of a file that is open without a buffer, or nothing of it where that fails."""
    before, left = os.fstat(file.fileno()).st_size, memoryview(data)
    try:
        with naming(Path(file.name)):
            while left:
                left = left[file.write(left) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(file.fileno(), before)
        raise


@contextlib.contextmanager
def replacing(path: Path, temporary: Path | None = None) -> Iterator[Path]:
    """A temporary path to write to, which takes the place of the file `path` when the block ends without an error.

    A reader, and whoever starts after a crash, sees the old file or the new one, never a part.

    Args:
        temporary: in the same directory; by default `path` with a name that no other process uses.
    """
    temporary = temporary or path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path):
            yield temporary
            fsync(temporary)
            os.replace(temporary, path)
            fsync(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):  # of a directory that is gone; the first error is the one to tell
            temporary.unlink(missing_ok=True)
        raise


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a file, text as UTF-8, so that it is the old or the new one at any moment."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def json_line(value: Any) -> bytes:
    """JSON in one line of UTF-8. What UTF-8 cannot hold, as the name of a file may, is escaped and read back alike."""
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_json(path: Path, value: Any, in_new_directory: bool = False) -> None:
    """Write a JSON file so that it is the old or the new one at any moment; what JSON does not know becomes a text.

    Args:
        in_new_directory: it lies in one that `new_directory` makes, which is complete or absent and waits for the disk
            by itself: the file is then written at once.
    """
    text = json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n"
    if in_new_directory:
        with naming(path):
            path.write_bytes(text.encode())
    else:
        write_atomic(path, text)


@contextlib.contextmanager
def new_directory(path: Path, replace: bool = False) -> Iterator[Path]:
    """A new directory to fill, which is called `path` when the block ends without an error. One writer at a time.

    Everything in it is on disk and follows the umask before it gets its name.

    Args:
        replace: a directory of that name makes way for it; otherwise there must be none.
    """
    partial, old = (path.with_name(f".{path.name}.{word}") for word in ("partial", "old"))
    _remove(partial)
    try:
        with naming(path):
            if replace and old.exists() and not path.exists():  # a writer was killed between two renames
                old.rename(path)
            partial.mkdir(parents=True)
            yield partial
            follow_umask(partial)
            for inner in partial.rglob("*"):
                fsync(inner)
            fsync(partial)
            if replace and path.exists():
                _replace(path, partial, old)
            else:
                partial.rename(path)
            fsync(path.parent)
    finally:
        _remove(partial)
    _remove(old)


def _replace(path: Path, new: Path, old: Path) -> None:
    """Give `new` the name `path`; what bore it is called `new` or `old` afterwards, and is there at any moment."""
    if not _exchanged(new, path):
        _remove(old)
        path.rename(old)
        new.rename(path)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or the file system does not offer it, as NFS."""
    try:
        exchange = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError):
        return False
    here = _AT_FDCWD
    return exchange(here, os.fsencode(one), here, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _remove(path: Path) -> None:
    """Remove a directory, or a link to one, if it is there and can be removed."""
    with contextlib.suppress(OSError):
        path.unlink() if path.is_symlink() else shutil.rmtree(path, ignore_errors=True)


def follow_umask(path: Path) -> None:
    """Give a file, or a directory and all files below it, the permissions of new ones there.

    safetensors and tempfile make files of mode 0600, which a colleague on a shared file system cannot read.
    """
    folder = path if path.is_dir() else path.parent
    example = folder / f".mode.{os.getpid()}.tmp"
    descriptor = os.open(example, os.O_CREAT | os.O_WRONLY, 0o666)  # less the umask, or by the directory's rules
    mode = os.fstat(descriptor).st_mode & 0o777
    os.close(descriptor)
    example.unlink()
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            file.chmod(mode)
    if path.is_dir():
        path.chmod(mode | (mode & 0o444) >> 2)  # whoever may read it may enter it


def save_tensors(path: Path, tensors: dict[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Write torch tensors as a safetensors file with the permissions that the umask gives."""
    from safetensors.torch import save_file

    with naming(path):
        save_file(tensors, path, metadata)
    follow_umask(path)
