"""Order of the samples in an epoch: pure arithmetic on (seed, epoch, sizes). The whole state is (epoch, step, G).

An epoch of a source is a sequence of positions. Shards are permuted, then positions are permuted within consecutive
blocks by a keyed bijection, so that a look-up needs no list of samples. The sequence is cut into G equal stretches,
one per slot of the global batch; slot g takes the t-th sample of its stretch at step t. Ranks own consecutive slots.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate

import numpy as np

MASK = 2**64 - 1
ROUNDS = 8
TABLE = 2**22  # largest number of samples for which `EpochOrder.many` keeps a table, of 4 bytes each
BLOCKS = 4096  # of which `EpochOrder` keeps the permutation


def key_of(*parts: int | str) -> int:
    """64-bit key of a tuple of numbers and strings; almost surely another one if a part differs."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


def keys_of(texts: Iterable[str]) -> np.ndarray:
    """`key_of` of each of many strings alone, uint64."""
    blake = hashlib.blake2b
    digests = b"".join([blake(repr((text,)).encode(), digest_size=8).digest() for text in texts])
    return np.frombuffer(digests, ">u8").astype(np.uint64)


def combined(epoch: int, sample: int) -> int:
    """Seed of a sample's random choices in an epoch, from the keys of both."""
    return _mix(epoch ^ sample)


def combined_many(epoch: int, samples: np.ndarray) -> np.ndarray:
    """`combined` of many samples' keys, uint64."""
    return _mix_many(samples ^ np.uint64(epoch))


class Permutation:
    """Keyed bijection of range(n): a Feistel network on the next even power of two, applied until below n.

    Takes constant memory; a look-up applies the network, of 8 rounds, fewer than 4 times on average, for any n.
    """

    def __init__(self, n: int, key: int):
        self.n = n
        self.half = ((max(n, 2) - 1).bit_length() + 1) // 2
        self.low = (1 << self.half) - 1
        self.keys = [_mix(key + r * 0x9E3779B97F4A7C15) for r in range(ROUNDS)]

    def __getitem__(self, i: int) -> int:
        if not 0 <= i < self.n:
            raise IndexError(f"{i} is outside range({self.n})")
        if self.n == 1:
            return 0
        while True:
            left, right = i >> self.half, i & self.low
            for key in self.keys:
                left, right = right, left ^ (_mix(right ^ key) & self.low)
            i = left << self.half | right
            if i < self.n:
                return i

    def table(self) -> np.ndarray:
        """(n,) int64: all look-ups at once, a hundred times faster than one by one."""
        # A round mixes one half, of which there are few: all its results are known beforehand.
        halves, low = np.arange(self.low + 1, dtype=np.uint64), np.uint64(self.low)
        rounds = [(_mix_many(halves ^ np.uint64(key)) & low).astype(np.int64) for key in self.keys]
        table, at = np.zeros(self.n, np.int64), np.arange(self.n)
        i = at
        while self.n > 1 and len(at):
            left, right = i >> self.half, i & self.low
            for mixed in rounds:
                left, right = right, left ^ mixed[right]
            i = left << self.half | right
            inside = i < self.n
            table[at[inside]] = i[inside]
            i, at = i[~inside], at[~inside]
        return table


class EpochOrder:
    """Position -> (shard, sample) of one source in one epoch.

    Args:
        sizes: samples of every shard, in the manifest's order.
        key: of (seed, source, epoch), see `key_of`.
        block: number of consecutive positions within which samples are permuted, >= 1.
        shuffle: False: the manifest's order.
    """

    def __init__(self, sizes: Sequence[int], key: int, block: int, shuffle: bool):
        self.key, self.block, self.shuffle = key, max(1, block), shuffle
        shards = Permutation(len(sizes), key_of(key, "shards"))
        self.shards = [shards[i] if shuffle else i for i in range(len(sizes))]
        self.ends = list(accumulate(sizes[s] for s in self.shards))
        self.n = self.ends[-1] if self.ends else 0
        self._table: np.ndarray | None = None
        self._blocks: dict[int, Permutation] = {}
        self._shards = np.array(self.shards, np.int64)
        self._ends, self._starts = np.array(self.ends, np.int64), np.array([0, *self.ends[:-1]], np.int64)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, position: int) -> tuple[int, int]:
        if not 0 <= position < self.n:
            raise IndexError(f"{position} is outside an epoch of {self.n} samples")
        if self.shuffle:
            first = position // self.block * self.block
            position = first + self._permutation(first)[position - first]
        at = bisect_right(self.ends, position)
        return self.shards[at], position - (self.ends[at - 1] if at else 0)

    def _permutation(self, first: int) -> Permutation:
        """That of the block at a position. Slots walk through their blocks, so a few are asked for again and again."""
        if first not in self._blocks:
            if len(self._blocks) == BLOCKS:
                self._blocks.clear()
            self._blocks[first] = Permutation(min(self.block, self.n - first), key_of(self.key, first))
        return self._blocks[first]

    def many(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shards and samples of many positions, int64 as `positions`; the first call makes a table of the epoch."""
        if self.shuffle:
            if self.n > TABLE:
                places = [self[p] for p in positions.tolist()]
                return tuple(np.array(places, np.int64).reshape(-1, 2).T)
            if self._table is None:
                self._table = self._permuted()
            positions = self._table[positions]
        at = self._ends.searchsorted(positions, side="right")
        return self._shards[at], positions - self._starts[at]

    def _permuted(self) -> np.ndarray:
        blocks = [first + self._permutation(first).table() for first in range(0, self.n, self.block)]
        return np.concatenate(blocks).astype(np.int32)


def steps_of(n: int, slots: int, last_batch: str) -> int:
    """Steps in which `slots` slots take `n` samples; `drop` leaves out a last step with empty slots."""
    return n // slots if last_batch == "drop" else ceil(n, slots)


def position_of(n: int, slots: int, slot: int, step: int) -> int | None:
    """Position of `slot` at `step` in an epoch of `n` samples; None if its stretch has ended.

    The lengths of the stretches differ by at most one, so only the last step of an epoch can have empty slots.
    """
    first, end = slot * n // slots, (slot + 1) * n // slots
    return first + step if first + step < end else None


def positions_of(n: int, slots: int, some: np.ndarray, step: int | np.ndarray) -> np.ndarray:
    """`position_of` of some slots at once, int64; -1 for None. Of steps (K, 1) the result is (K, slots)."""
    first, end = some * n // slots, (some + 1) * n // slots
    return np.where(first + step < end, first + step, -1)


def micro_slots(slots: int, rank: int, world_size: int, accumulation: int) -> list[list[int | None]]:
    """Slots of one rank, split into `accumulation` micro-batches of equal size on all ranks; None is padding.

    Ranks own consecutive slots, in numbers that differ by at most one; padding is at the end of a micro-batch.
    """
    mine = list(range(rank * slots // world_size, (rank + 1) * slots // world_size))
    width = ceil(ceil(slots, world_size), accumulation)
    cut = [a * len(mine) // accumulation for a in range(accumulation + 1)]
    micros = [mine[cut[a] : cut[a + 1]] for a in range(accumulation)]
    return [micro + [None] * (width - len(micro)) for micro in micros]


@dataclass(frozen=True)
class Visit:
    """One step of a mixed epoch: step `step` of epoch `epoch` of source `source`."""

    source: int
    epoch: int
    step: int


class Mix:
    """Interleaving of sources, one per step, evenly and in proportion to weight times size.

    An epoch of the mix has as many steps as the epochs of all sources together; with equal weights every source is
    read exactly once. A source with more or fewer steps than its own epoch has continues in the next epoch where it
    stopped.

    Args:
        steps: own steps of every source's epoch, each >= 1.
        weights: relative weights, > 0.
        seed: of the shift of each source.
    """

    def __init__(self, steps: Sequence[int], weights: Sequence[float], seed: int):
        self.own, self.seed, self.steps = list(steps), seed, sum(steps)
        shares = [Fraction(w) * s for w, s in zip(weights, steps, strict=True)]
        exact = [self.steps * share / sum(shares) for share in shares]
        self.visits = [int(e) for e in exact]
        # Largest remainders take the steps that rounding down left over.
        left = self.steps - sum(self.visits)
        for i in sorted(range(len(exact)), key=lambda i: self.visits[i] - exact[i])[:left]:
            self.visits[i] += 1

    def at(self, epoch: int, step: int) -> Visit:
        """The source, and its step, at `step` of `epoch`."""
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is outside an epoch of {self.steps} steps")
        # Source i against all later ones: of the first s steps, floor((s * visits + shift) / total) are its own.
        total = self.steps
        for i, visits in enumerate(self.visits):
            # The last source has all steps that are left, whatever its shift; often it is the only one.
            shift = key_of(self.seed, "mix", epoch, i) % total if visits < total else 0
            before = (step * visits + shift) // total
            if ((step + 1) * visits + shift) // total > before:
                own = epoch * visits + before
                return Visit(i, own // self.own[i], own % self.own[i])
            step, total = step - before, total - visits
        raise AssertionError("the shares of the sources add up to all steps")


def ceil(n: int, by: int) -> int:
    """n / by, rounded up."""
    return -(-n // by)


def _mix(x: int) -> int:
    """Finaliser of splitmix64: every input bit affects every output bit."""
    x &= MASK
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & MASK
    return x ^ x >> 31


def _mix_many(x: np.ndarray) -> np.ndarray:
    """`_mix` of uint64 numbers, whose products wrap around by themselves."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
