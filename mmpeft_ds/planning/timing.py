"""An estimate of the time of a step, from counts and assumed rates. Nothing of it was measured on a GPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mmpeft_ds.engine.zero.resident import Layout
from mmpeft_ds.planning.cluster import Cluster
from mmpeft_ds.planning.count import StepCount
from mmpeft_ds.planning.traffic import Traffic


@dataclass(frozen=True)
class Seconds:
    """Parts of a step.

    Attributes:
        compute: matrix products and attention, or the memory traffic of all operations where that takes longer.
        near: collectives inside nodes; wide: across nodes; latency: of starting them; host: copies over PCIe.
    """

    compute: float
    near: float
    wide: float
    latency: float
    host: float

    @property
    def network(self) -> float:
        """All that ranks wait for each other."""
        return self.near + self.wide + self.latency

    @property
    def apart(self) -> float:
        """The step if nothing overlaps."""
        return self.compute + self.network + self.host

    @property
    def overlapped(self) -> float:
        """The step if everything but latency overlaps."""
        return max(self.compute, self.near + self.wide, self.host) + self.latency


def estimate(
    count: StepCount, traffic: Traffic, layout: Layout, cluster: Cluster, accumulation: int, tf32: bool
) -> Seconds:
    """Seconds of an optimizer step of `accumulation` micro-steps.

    Args:
        tf32: `engine.matmul`.
    """
    assumed, rates = cluster.assumed, cluster.rates
    products = sum(flops / speed(dtype, cluster, tf32) for dtype, flops in count.flops.items())
    others = count.moved / (rates.memory * 1e12 * assumed.bandwidth)
    link, nic = (rate * 1e9 * assumed.network for rate in (cluster.link, cluster.nic))
    inside = sum(traffic.near.values()) / link
    over_all = sum(traffic.wide.values())
    # Inside a node a collective over all nodes passes the links as well; the slower of both decides.
    wide = max(over_all / link, over_all / nic) if cluster.nodes > 1 else 0.0
    near_hops = (cluster.gpus - 1) * assumed.near_hop
    hops = (cluster.nodes - 1) * assumed.hop + near_hops
    return Seconds(
        compute=accumulation * max(products, others),
        near=inside + (over_all / link if cluster.nodes == 1 else 0.0),
        wide=wide,
        latency=(traffic.calls * hops + traffic.near_calls * near_hops) * 1e-6 if layout.ranks > 1 else 0.0,
        host=traffic.host / (assumed.pcie * 1e9),
    )


def speed(dtype: str, cluster: Cluster, tf32: bool) -> float:
    """Operations a second that matrix products of a dtype are taken to reach."""
    rates: Mapping[str, float] = {
        "bfloat16": cluster.rates.half,
        "float16": cluster.rates.half,
        "float32": cluster.rates.tf32 if tf32 else cluster.rates.single,
    }
    return rates.get(dtype, cluster.rates.single) * 1e12 * cluster.assumed.efficiency
