"""Pictures decoded in threads while the samples before them are transformed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from torch import Tensor

from mmpeft_ds.data.formats import READ
from mmpeft_ds.errors import BadSample

MOST = 8  # threads; what is not decoding needs Python's lock, and bounds what more of them would bring


class Opened(NamedTuple):
    """A sample of which nothing is decoded yet.

    Attributes:
        key: within its data set.
        parts: name of each member -> its bytes, or why it cannot be used.
    """

    key: str
    parts: dict[str, bytes] | BadSample


class DecodeAhead:
    """Decodes pictures of the next samples, while the caller works on one. It never changes the result.

    Threads help because libjpeg-turbo and Pillow's decoders let go of Python's lock. What is decoded ahead is bounded:
    of each sample no more pictures than there are threads, or none, and of one sample more than there are threads.

    Args:
        threads: with that of the caller, which decodes what no other has begun; 1: nothing is decoded ahead.
    """

    def __init__(self, threads: int):
        self.threads = min(threads, MOST)
        self._pool = ThreadPoolExecutor(self.threads - 1, "decode") if self.threads > 1 else None

    def over(
        self, samples: Iterable[Opened], read: Callable[[bytes], Tensor]
    ) -> Iterator[tuple[Opened, Callable[[str], Tensor]]]:
        """The samples in their order, each with a function that gives the picture in one of its members."""
        if self._pool is None:
            yield from ((sample, lambda name, parts=sample.parts: read(parts[name])) for sample in samples)
            return
        waiting: deque[tuple[Opened, Callable[[str], Tensor]]] = deque()
        for sample in samples:
            waiting.append((sample, self._begun(sample, read)))
            if len(waiting) > self.threads:
                yield waiting.popleft()
        yield from waiting

    def _begun(self, sample: Opened, read: Callable[[bytes], Tensor]) -> Callable[[str], Tensor]:
        parts, pictures = sample.parts, {}
        names = [name for name in parts if name.rpartition(".")[2] in READ] if isinstance(parts, dict) else []
        if len(names) <= self.threads:
            pictures = {name: self._pool.submit(read, parts[name]) for name in names}

        def picture(name: str) -> Tensor:
            ahead = pictures.pop(name, None)
            return read(parts[name]) if ahead is None or ahead.cancel() else ahead.result()

        return picture

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
