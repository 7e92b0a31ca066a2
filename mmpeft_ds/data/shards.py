"""Reading of single samples from shards by byte range, and checks of shards at start.

The range of a sample is a piece of tar that holds exactly that sample. Nothing is unpickled and nothing is executed.
"""

from __future__ import annotations

import io
import os
import shutil
import tarfile
import tempfile
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from mmpeft_ds.data.formats import MAX_SAMPLE_BYTES, READ
from mmpeft_ds.data.manifest import Manifest, local_path, sample_key
from mmpeft_ds.data.options import DataOptions
from mmpeft_ds.data.parsing import described, json_object
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.files import follow_umask, sha256

# Each slot reads one shard for a long time, so a rank needs about as many open files as slots.
OPEN_FILES = 256
TRIES = 3
MOST_DIGITS = 9  # of the number of an image within its sample
BLOCK = tarfile.BLOCKSIZE
Stamp = tuple[int, int]
HINT = "Restore it, or prepare the data set again; data_prep/verify.py checks a whole directory."


class ShardReader:
    """Reads the bytes of samples of one split, from local files, from what fsspec opens, or from a local copy.

    Args:
        manifest: of the data set.
        split: of the data set.
        cache_dir: directory for copies of remote shards; empty: byte ranges are read directly.
        allow_pipe: see `check_pipe`.
        max_sample_bytes: longer samples are not read.
        stamps: of the shards when the run began, see `stamp`; empty: each as it is when it is opened.

    Raises:
        BadInput: an unknown split, or a `pipe:` URL that is not allowed.
    """

    def __init__(
        self,
        manifest: Manifest,
        split: str,
        cache_dir: str = "",
        allow_pipe: bool = False,
        max_sample_bytes: int = MAX_SAMPLE_BYTES,
        stamps: Sequence[Stamp] = (),
    ):
        check_pipe(manifest.dir, allow_pipe)
        self.manifest, self.split, self.cache_dir = manifest, split, cache_dir
        self.max_sample_bytes = max_sample_bytes
        self.shards = manifest.shards(split)
        self._firsts = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self._stamps: dict[int, Stamp] = dict(enumerate(stamps))
        self._local: dict[int, str | None] = {}  # path of each shard, None of one that has to be fetched
        self._offsets: dict[int, np.ndarray] = {}
        self._files: OrderedDict[int, int] = OrderedDict()

    @classmethod
    def of(cls, manifest: Manifest, split: str, options: DataOptions, stamps: Sequence[Stamp] = ()) -> ShardReader:
        """The reader of a split as the `data` section of a recipe says."""
        return cls(manifest, split, options.cache_dir, options.allow_pipe, options.max_sample_bytes, stamps)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_offsets": {}, "_files": OrderedDict()}

    def read(self, wanted: Sequence[tuple[int, int]]) -> list[bytes | BadSample]:
        """Tar pieces of samples, in the order of `wanted`; as `each` gives them."""
        return list(self.each(wanted))

    def each(self, wanted: Sequence[tuple[int, int]]) -> Iterator[bytes | BadSample]:
        """Tar pieces of samples one after the other, in the order of `wanted`.

        The disk is told of all of them at once, but of a local file each is read when it is asked for: what has just
        been read and is soon dropped is still in the processor's cache, in memory that is used again.

        Args:
            wanted: number of the shard in the split, and of the sample in the shard.

        Yields:
            bytes of each, or BadSample: `read` where the file ends too early, `bytes` for a sample that is too long.

        Raises:
            BadInput: if a shard is missing, stays unreachable, or has changed.
        """
        ranges = [(shard, *map(int, self._table(shard)[sample])) for shard, sample in wanted]
        url = self.manifest.path(self.shards[ranges[0][0]].file) if ranges else ""
        if ranges and local_path(url) is None and not self.cache_dir:
            short = [one for one in ranges if one[2] <= self.max_sample_bytes]
            pieces = iter(self._read_remote(short) if short else ())
        else:
            pieces = self._read_local([one for one in ranges if one[2] <= self.max_sample_bytes])
        for _, _, size in ranges:
            yield next(pieces) if size <= self.max_sample_bytes else BadSample("bytes", f"{size:,} bytes")

    def check_key(self, shard: int, sample: int, key: str) -> None:
        """Raise BadInput if the sample read at a place has not the key that belongs there."""
        expected = sample_key(self.split, int(self._firsts[shard]) + sample)
        if key != expected:
            raise BadInput(
                f"{self.manifest.path(self.shards[shard].file)}: holds {key[:100]} where {expected} belongs: the "
                f"shard was rewritten, or the index is of another one. {HINT}"
            )

    def check_open(self) -> None:
        """Compare the shards that are open with what they were. Raises BadInput if one has changed or is gone."""
        self.check_files(self._files)

    def check_files(self, shards: Iterable[int]) -> None:
        """Compare the local files of shards with what they were. Raises BadInput if one has changed since the run
        began, or is gone."""
        local, stamps = self._local, self._stamps
        for shard in shards:  # of every batch of features, so known ones pass without a call
            path = local.get(shard) or self.path(shard)
            try:
                now = os.stat(path)
            except OSError as error:
                raise BadInput(f"{path}: shard cannot be opened ({error.strerror}). {HINT}") from error
            if stamps.get(shard) != (now.st_size, now.st_mtime_ns):
                self._check_stamp(shard, now)

    def _check_stamp(self, shard: int, now: os.stat_result) -> None:
        found = stamp(now)
        before = self._stamps.setdefault(shard, found)
        if before != found:
            what = "size" if before[0] != now.st_size else "time of change"
            raise BadInput(f"{self.path(shard)}: shard was changed during the run (its {what}). {HINT}")

    def close(self) -> None:
        """Close the files that are open."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _table(self, shard: int) -> np.ndarray:
        if shard not in self._offsets:
            self._offsets[shard] = self.manifest.offsets(self.split, shard)
        return self._offsets[shard]

    def _read_local(self, ranges: list[tuple[int, int, int]]) -> Iterator[bytes | BadSample]:
        for first in range(0, len(ranges), OPEN_FILES):
            part = ranges[first : first + OPEN_FILES]
            files = [self._open(shard) for shard, _, _ in part]
            while len(self._files) > OPEN_FILES:  # none of these, which were used last
                os.close(self._files.popitem(last=False)[1])
            if hasattr(os, "posix_fadvise"):
                # Announce all reads of the batch, so that the disk works on them together.
                for file, (_, begin, size) in zip(files, part, strict=True):
                    os.posix_fadvise(file, begin, size, os.POSIX_FADV_WILLNEED)
            for file, (shard, begin, size) in zip(files, part, strict=True):
                piece = _checked(os.pread(file, size, begin), size)
                self._check_stamp(shard, os.fstat(file))  # after reading, so that nothing of a new content is used
                yield piece

    def _open(self, shard: int) -> int:
        if shard in self._files:
            self._files.move_to_end(shard)
            return self._files[shard]
        path = self.path(shard)
        try:
            self._files[shard] = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        except OSError as error:
            raise BadInput(f"{path}: shard cannot be opened ({error.strerror}). {HINT}") from error
        return self._files[shard]

    def path(self, shard: int) -> str:
        """Path of a shard's local file, which is fetched if it is remote."""
        if shard not in self._local:
            self._local[shard] = local_path(self.manifest.path(self.shards[shard].file))
        return self._local[shard] or cached(self.manifest, self.split, shard, self.cache_dir)

    def _read_remote(self, ranges: list[tuple[int, int, int]]) -> list[bytes | BadSample]:
        urls = [self.manifest.path(self.shards[shard].file) for shard, _, _ in ranges]
        fs, _ = fsspec.core.url_to_fs(urls[0])
        paths = [fs._strip_protocol(url) for url in urls]
        starts = [begin for _, begin, _ in ranges]
        ends = [begin + size for _, begin, size in ranges]
        for attempt in range(TRIES):
            try:
                pieces = fs.cat_ranges(paths, starts, ends, on_error="raise")
                return [_checked(data, size) for data, (_, _, size) in zip(pieces, ranges, strict=True)]
            except FileNotFoundError as error:
                raise BadInput(f"{error.filename or error}: shard not found. {HINT}") from error
            except OSError as error:
                if attempt == TRIES - 1:
                    line = " ".join(str(error).split())
                    raise BadInput(
                        f"{self.manifest.dir}: reading failed {TRIES} times ({line}); try again."
                    ) from error
                time.sleep(2**attempt)
        raise AssertionError("the last attempt returns or raises")


def stamp(status: os.stat_result) -> Stamp:
    """Size and time of change of a file, by which a shard that is rewritten during a run is noticed."""
    return status.st_size, status.st_mtime_ns


def stamps_of(manifest: Manifest, split: str, rank: int = 0, world_size: int = 1) -> list[Stamp]:
    """Stamps of this rank's share of the shards of a split, (-1, -1) for one that is missing; none of remote ones."""
    if local_path(manifest.dir) is None:
        return []
    stamps = []
    for info in manifest.shards(split)[rank::world_size]:
        try:
            stamps.append(stamp(os.stat(local_path(manifest.path(info.file)))))
        except OSError:  # reported by `verify_shards`, or when it is opened
            stamps.append((-1, -1))
    return stamps


def check_bytes(held: int, most: int) -> None:
    """Raise BadSample if a sample holds more bytes than `data.max_sample_bytes`."""
    if held > most:
        raise BadSample("bytes", f"{held:,} bytes in memory, more than data.max_sample_bytes {most:,}")


def members(piece: bytes) -> tuple[str, dict[str, bytes]]:
    """Key and {extension: bytes} of the one sample in a piece of tar; the extension follows the key's first dot.

    Raises:
        BadSample: `tar` if it cannot be parsed, does not hold exactly one key, a name has control characters, or files
            are pickled.
    """
    files = _plain_members(piece)
    if files is None:
        files = _any_members(piece)
    key, parts = "", {}
    for name, data in files:
        if not name.isprintable():  # a name is shown in messages, which are one line
            raise BadSample("tar", f"{name[:100]!a} is no printable name")
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        this = f"{folder}/{stem}" if folder else stem
        if key and this != key:
            raise BadSample("tar", f"two keys, {key} and {this}, in one range")
        key = this
        if extension.lower().rsplit(".", 1)[-1] in ("pyd", "pickle", "pkl", "pth", "pt"):
            raise BadSample("tar", f"{name}: pickled content is never read")
        parts[extension.lower()] = data
    if not key:
        raise BadSample("tar", "no member")
    return key, parts


def image_names(parts: dict[str, bytes]) -> list[str]:
    """Names of the images of a sample in order: `jpg`, or `0.jpg`, `1.png`, ..., `10.jpg`. Raises BadSample."""

    def rank(name: str) -> tuple[int, str]:
        head = name.rpartition(".")[0]
        if head.isdecimal() and len(head) > MOST_DIGITS:
            raise BadSample("name", f"an image number of {len(head):,} digits")
        return (int(head) if head.isdecimal() else -1, name)

    return sorted((n for n in parts if n.rsplit(".", 1)[-1] in READ), key=rank)


def record_of(parts: dict[str, bytes]) -> dict[str, Any]:
    """The json of a sample whose members are `parts`; empty if it has none.

    Raises:
        BadSample: as `parsing.json_object`.
    """
    return json_object(parts.get("json", b"{}"))


def verify_shards(manifest: Manifest, split: str, mode: str, rank: int = 0, world_size: int = 1) -> list[str]:
    """Check this rank's share of the shards of a split against the manifest, and on rank 0 the split's side file.

    Args:
        mode: `none`, `size` or `sha256` (which checks the size as well).

    Returns:
        one line per problem, empty if all is well; the caller gathers the lines of all ranks.
    """
    problems = []
    if mode == "none":
        return problems
    if rank == 0:
        try:
            manifest.offsets(split, 0)  # so that damage is seen now, not at the first evaluation
        except BadInput as error:
            problems.append(str(error))
    for info in manifest.shards(split)[rank::world_size]:
        url = manifest.path(info.file)
        try:
            fs, path = fsspec.core.url_to_fs(url)
            size = fs.size(path)
            if size != info.bytes:
                problems.append(f"{url}: {size} bytes, manifest.json says {info.bytes}. {HINT}")
            elif mode == "sha256":
                with fs.open(path, "rb") as file:
                    digest = sha256(file)
                if digest != info.sha256:
                    problems.append(f"{url}: sha256 {digest[:12]}.., manifest.json says {info.sha256[:12]}... {HINT}")
        except FileNotFoundError:
            problems.append(f"{url}: missing, manifest.json lists it. {HINT}")
        except (OSError, ValueError, ImportError) as error:
            problems.append(f"{url}: cannot be read ({' '.join(str(error).split())}). {HINT}")
    return problems


def check_pipe(dir: str, allow_pipe: bool) -> None:
    """Refuse a `pipe:` URL, which runs a shell command.

    Raises:
        BadInput: if `dir` is a `pipe:` URL and `allow_pipe` is not set.
    """
    if dir.startswith("pipe:") and not allow_pipe:
        raise BadInput(f"data source {dir!r} runs a shell command. Set data.allow_pipe: true if you trust the recipe.")


def cached(manifest: Manifest, split: str, shard: int, cache_dir: str) -> str:
    """Path of the local copy of a remote shard, which is fetched and checked if it is not there yet.

    Several processes may call it at once: each fetches to its own temporary name, and the last rename wins.
    """
    info = manifest.shards(split)[shard]
    # The hash in the name tells an old copy from a newer shard of the same name.
    path = Path(cache_dir) / f"{info.sha256[:16]}-{info.file}"
    if path.exists() and path.stat().st_size == info.bytes:
        return str(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    url = manifest.path(info.file)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{info.file}.")
    try:
        with os.fdopen(handle, "w+b") as copy:
            with fsspec.open(url, "rb") as remote:
                shutil.copyfileobj(remote, copy, 1 << 20)
            copy.seek(0)
            digest = sha256(copy)
        follow_umask(Path(temporary))
        if digest != info.sha256:
            raise BadInput(f"{url}: sha256 {digest[:12]}.., manifest.json says {info.sha256[:12]}... {HINT}")
        os.replace(temporary, path)
    except OSError as error:
        raise BadInput(f"{url}: cannot be copied to {path.parent} ({' '.join(str(error).split())}).") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
    return str(path)


def _plain_members(piece: bytes) -> list[tuple[str, bytes]] | None:
    """(name, bytes) of members with plain ustar headers, ten times faster than tarfile; None: use tarfile."""
    files, at = [], 0
    while at + BLOCK <= len(piece):
        header = piece[at : at + BLOCK]
        if not any(header):
            break
        try:
            size = int(header[124:136].strip(b" \0"), 8)
            claimed = int(header[148:156].strip(b" \0"), 8)
        except ValueError:
            return None
        end = at + BLOCK + size
        if header[156:157] not in (b"0", b"\0") or header[345:346] != b"\0" or end > len(piece):
            return None
        if claimed != sum(header) - sum(header[148:156]) + 8 * ord(" "):
            return None
        files.append((header[:100].partition(b"\0")[0].decode("utf-8", "replace"), piece[at + BLOCK : end]))
        at = at + BLOCK + -(-size // BLOCK) * BLOCK
    return files


def _any_members(piece: bytes) -> list[tuple[str, bytes]]:
    """(name, bytes) of members with any headers. Raises BadSample."""
    files = []
    try:
        with tarfile.open(fileobj=io.BytesIO(piece), mode="r:") as archive:
            for member in archive:
                if member.issparse() or member.size > len(piece):  # tarfile would make up what is not there
                    raise BadSample("tar", f"{member.name[:100]}: claims {member.size:,} bytes of {len(piece):,}")
                if member.isfile():
                    files.append((member.name, archive.extractfile(member).read()))
    except BadSample:
        raise
    except Exception as error:  # noqa: BLE001 - beside its own, such as RecursionError for thousands of extended headers
        raise BadSample("tar", described(error)) from error
    return files


def _checked(data: bytes, size: int) -> bytes | BadSample:
    return data if len(data) == size else BadSample("read", f"{len(data)} of {size} bytes")
