"""Bytes that ZeRO-3 gathers in a step, by DeepSpeed's rules of fetching, prefetching and releasing, visit by visit.

The rules are those of DeepSpeed 0.19.8 (runtime/zero/partitioned_param_coordinator.py) once it has seen the order of
the modules, and of `engine.zero.stage3.keep_frozen`; a test compares the bytes with those of real ranks.
"""

from __future__ import annotations

import itertools
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from mmpeft_ds.engine.zero.resident import Rules, Tensors, persistent
from mmpeft_ds.planning.visits import Visit


@dataclass
class Gathers:
    """Gathers of one micro-step.

    Attributes:
        first: how often each parameter is gathered while no copy of it is near: from all ranks.
        again: how often it is gathered after it was released in this step, so that with hpZ a copy is near.
        calls: gathers, of several parameters together; trained_calls: those in which a trained parameter comes for the
            first time, for which no copy is near under hpZ.
        most_live: bytes of gathered parameters, and of the buffers in which they came, at the worst moment;
            persistent parameters left out.
        together: these bytes, those of activations, and those of gradients that wait, at the worst moment for their
            sum.
        left: bytes of gathered parameters after the last visit.
    """

    first: Counter[int] = field(default_factory=Counter)
    again: Counter[int] = field(default_factory=Counter)
    calls: int = 0
    trained_calls: int = 0
    most_live: int = 0
    together: int = 0
    left: int = 0


def gathers(
    visits: Sequence[Visit], tensors: Sequence[Tensors], rules: Rules, last: int = 0, waiting: int = 0
) -> Gathers:
    """Follow the visits of a micro-step at whose start only persistent parameters are whole.

    DeepSpeed decides what a module releases in the first step whose order it knows, and keeps to it (an lru_cache). In
    that step it also gathers the frozen persistent parameters, since while it records the order it releases all.

    Args:
        last: the most bytes that were live after the last visit.
        waiting: bytes of each element of a gradient until the end of the backward pass.
    """
    kept, decisions = persistent(tensors, rules), {}
    _Coordinator(visits, tensors, rules, {p for p in kept if tensors[p].trained}, decisions).run()
    again = _Coordinator(visits, tensors, rules, kept, decisions, waiting)
    found = again.run()
    trained, found.left = sum(t.numel for t in tensors if t.trained), again.live
    found.together = max(found.together, last + found.left + waiting * trained)
    return found


@dataclass
class _Gather:
    """Parameters that come together.

    Attributes:
        buffer: bytes of the one in which they come, beside their copies; left: how many have not been needed yet.
        copied: whether the copies have been made.
    """

    buffer: int
    left: int
    copied: bool = False


class _Coordinator:
    """State of `PartitionedParameterCoordinator` while it goes through a step that it knows."""

    def __init__(
        self,
        visits: Sequence[Visit],
        tensors: Sequence[Tensors],
        rules: Rules,
        whole: set[int],
        decisions: dict[tuple[int, int], set[int]],
        waiting: int = 0,
    ):
        self.visits, self.tensors, self.rules, self.decisions = visits, tensors, rules, decisions
        self.kept, self.waiting = persistent(tensors, rules), waiting
        self.order = [v for v in visits if v.fetch]
        self.fetched_again = {v.module for v in self.order if not v.forward}
        self.queue = deque((p, step) for step, v in enumerate(self.order) for p in v.parameters)
        self.fetched_for: dict[int, int] = {}  # the last step for which a parameter was taken off the queue
        self.waited = set(whole)
        self.in_flight: dict[int, _Gather] = {}  # by parameter
        self.active: dict[int, set[int]] = {}
        self.backward: dict[int, set[int]] = {}  # modules in backward: frozen parameters fetched again for them
        self.released_before: set[int] = set()
        self.step, self.available, self.live = 0, 0, 0
        self.found = Gathers()

    def run(self) -> Gathers:
        for visit in self.visits:
            self.note(visit.peak, visit)
            if visit.fetch:
                self.fetch(visit)
            elif visit.forward or visit.module in self.backward:
                self.release(visit)
        return self.found

    def note(self, activations: int, visit: Visit) -> None:
        self.found.together = max(self.found.together, activations + self.live + self.waiting * visit.gradients)

    def fetch(self, visit: Visit) -> None:
        wanted = set(visit.parameters)
        if not visit.forward:
            self.backward.setdefault(visit.module, set())
        self.gather(wanted)
        for p in wanted:
            self.active.setdefault(p, set()).add(visit.module)
            if visit.recomputed and self.backward and not self.tensors[p].trained:
                self.backward[next(reversed(self.backward))].add(p)
        self.wait(wanted, visit)
        unseen = {p for p in wanted if self.fetched_for.get(p, -1) < self.step}
        passed: set[int] = set()
        while self.queue and len(passed) < len(unseen):
            p, self.fetched_for[p] = self.queue.popleft()
            passed.add(p)
        if self.rules.prefetch_bucket_size:
            self.prefetch()
        self.step += 1

    def prefetch(self) -> None:
        room = min(self.rules.max_live_parameters - self.available, self.rules.prefetch_bucket_size)
        chosen, numel = set(), 0
        while self.queue and numel < room:
            p, step = self.queue.popleft()
            self.fetched_for[p] = max(self.fetched_for.get(p, -1), step)
            if p not in chosen and p not in self.waited and p not in self.in_flight:
                chosen.add(p)
                numel += self.tensors[p].numel
        self.gather(chosen)

    def wait(self, wanted: set[int], visit: Visit) -> None:
        """Take the parameters of a module. Those that come together come in one buffer; when the first of them is
        needed all are copied out of it, and it stays until the last of them is needed."""
        for p in sorted(wanted & self.in_flight.keys()):
            gather = self.in_flight.pop(p)
            if not gather.copied:
                gather.copied = True
                self.live += gather.buffer
                self.found.most_live = max(self.found.most_live, self.live)
                self.note(visit.live, visit)
            gather.left -= 1
            if not gather.left:
                self.live -= gather.buffer
        self.waited |= wanted

    def gather(self, wanted: set[int]) -> None:
        missing = wanted - self.waited - self.in_flight.keys()
        if not missing:
            return
        near = missing & self.released_before
        self.found.first.update(missing - near)
        self.found.again.update(near)
        self.found.calls += 1
        self.found.trained_calls += any(self.tensors[p].trained for p in missing - near)
        self.available += sum(self.tensors[p].numel for p in missing)
        self.live += self.bytes_of(missing)
        self.found.most_live = max(self.found.most_live, self.live)
        # A parameter that comes alone lies in what it came in.
        together = _Gather(self.bytes_of(missing) if len(missing) > 1 else 0, len(missing))
        self.in_flight |= dict.fromkeys(missing, together)

    def release(self, visit: Visit) -> None:
        key = (visit.module, self.step)
        if key not in self.decisions:
            out = {p for p in visit.parameters if p not in self.kept and self.fetched_for.get(p, -1) <= self.step}
            self.decisions[key] = out - self.soon(visit.leaf)
        out = set(self.decisions[key])
        touched = set(visit.parameters)
        if not visit.forward:
            again = self.backward.pop(visit.module)
            out |= again - self.kept
            touched |= again
        for p in touched:
            self.active.get(p, set()).discard(visit.module)
        gone = {p for p in touched & out & self.waited if not self.active.get(p)}
        self.waited -= gone
        self.released_before |= gone
        self.available -= sum(self.tensors[p].numel for p in gone)
        if not (visit.forward and self.holds(visit)):
            self.live -= self.bytes_of(gone)

    def holds(self, visit: Visit) -> bool:
        """Whether the graph of autograd holds what a module has read until the backward pass has used it: one that
        trains and is not fetched for it, since DeepSpeed finds no tensor in what it returns."""
        return visit.module not in self.fetched_again and any(self.tensors[p].trained for p in visit.direct)

    def soon(self, leaf: bool) -> set[int]:
        """Parameters that come again within the reuse distance. Of later modules all that is below them counts where
        the released one is a leaf."""
        parameters_soon: set[int] = set()
        passed = 0
        for visit in itertools.islice(self.order, self.step, None):
            if passed >= self.rules.max_reuse_distance:
                break
            parameters = visit.everything if leaf else visit.direct
            parameters_soon.update(parameters)
            passed += sum(self.tensors[p].numel for p in parameters)
        return parameters_soon

    def bytes_of(self, chosen: set[int]) -> int:
        return sum(self.tensors[p].numel * self.tensors[p].width for p in chosen)
