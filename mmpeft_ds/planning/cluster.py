"""Machines that a run is planned for, and what is assumed of them; imports nothing that takes seconds."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mmpeft_ds.errors import BadInput

GIB = 2**30


@dataclass(frozen=True)
class Card:
    """Peak rates of a GPU as its maker states them, dense, and the links that it usually comes with.

    Attributes:
        half, tf32, single: TFLOP/s of matrix products in bfloat16, in TF32, and in float32.
        memory: TB/s of its memory.
        hbm: GiB.
        link: GB/s in one direction to the GPUs of the same node.
    """

    half: float
    tf32: float
    single: float
    memory: float
    hbm: float
    link: float


CARDS = {
    "a100-40": Card(312, 156, 19.5, 1.56, 40, 300),
    "a100-80": Card(312, 156, 19.5, 2.04, 80, 300),
    "h100": Card(989, 495, 67, 3.35, 80, 450),
    "h200": Card(989, 495, 67, 4.8, 141, 450),
    "b200": Card(2250, 1125, 75, 8.0, 180, 900),
    "l40s": Card(362, 183, 91.6, 0.864, 48, 32),
}


@dataclass(frozen=True)
class Assumptions:
    """Figures that nobody measured here; the plan prints all of them.

    Attributes:
        context: GiB of a CUDA context and of NCCL's buffers.
        usable: share of the memory that may be filled; the rest is lost in gaps between blocks.
        efficiency: share of the stated rates that matrix products reach.
        bandwidth: share of the stated memory rate that other operations reach.
        network: share of the stated rates that collectives reach.
        hop: microseconds of a collective for each further node, and `near_hop` for each further GPU of a node.
        pcie: GB/s from host memory.
    """

    context: float = 1.0
    usable: float = 0.95
    efficiency: float = 0.5
    bandwidth: float = 0.8
    network: float = 0.8
    hop: float = 8.0
    near_hop: float = 2.0
    pcie: float = 25.0


@dataclass(frozen=True)
class Cluster:
    """Nodes of equal GPUs.

    Attributes:
        nodes, gpus: number of nodes, and of GPUs in each.
        hbm: GiB of a GPU.
        card: name of its rates in `CARDS`.
        link: GB/s in one direction between GPUs of a node.
        nic: GB/s in one direction between nodes, all adapters of a node together.
    """

    nodes: int
    gpus: int
    hbm: float
    card: str = "h100"
    link: float = 0.0
    nic: float = 0.0
    assumed: Assumptions = Assumptions()

    def __post_init__(self) -> None:
        for option, value in (("--nodes", self.nodes), ("--gpus-per-node", self.gpus)):
            if value < 1:
                raise BadInput(f"{option}: must be 1 or more, got {value}.")
        for option, value in (("--hbm", self.hbm), ("--link", self.link), ("--nic", self.nic)):
            if not (math.isfinite(value) and value > 0):
                raise BadInput(f"{option}: must be above 0, got {value:g}.")
        if self.card not in CARDS:
            raise BadInput(f"--card: {self.card!r} is unknown. Known: {', '.join(CARDS)}.")
        if self.hbm <= self.assumed.context:
            raise BadInput(f"--hbm: {self.hbm:g} GiB hold no more than a CUDA context ({self.assumed.context:g} GiB).")

    @property
    def ranks(self) -> int:
        """One for each GPU."""
        return self.nodes * self.gpus

    @property
    def rates(self) -> Card:
        """Rates of its GPUs."""
        return CARDS[self.card]

    @property
    def budget(self) -> float:
        """Bytes of a GPU that may be filled."""
        return self.hbm * GIB * self.assumed.usable


def cluster(
    nodes: int, gpus: int, hbm: float | None, card: str = "h100", link: float | None = None, nic: float | None = None
) -> Cluster:
    """A cluster; None means the card's value, and for `nic` 50 GB/s (400 Gb/s) for each GPU. Raises BadInput."""
    known = CARDS.get(card, CARDS["h100"])
    hbm, link = (own if given is None else given for given, own in ((hbm, known.hbm), (link, known.link)))
    return Cluster(nodes, gpus, hbm, card, link, 50.0 * max(1, gpus) if nic is None else nic)
