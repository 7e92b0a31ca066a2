#!/usr/bin/env python
"""Padding and balance of ranks with micro-batches planned by tokens, beside padded rows in the order of the samples.

    python benchmarks/packing.py                     2, 8, 64 and 512 ranks; writes docs/benchmarks/packing.*
    python benchmarks/packing.py --ranks 3 --pack 8192 --out runs

Lengths are drawn: no model runs. The parts of the mixture and their numbers of conversations are those that LLaVA-1.5
states for its 665,000 (arXiv 2310.03744, appendix); the tokens of their texts are assumed, log-normal with the median
and deviation in `PARTS`, with all cut at 2,048 tokens. `fixed` gives every image 576 tokens, as LLaVA-1.5 does;
`resolutions` gives it as many as it has patches of 28 x 28 pixels, as Qwen2-VL does: log-normal with median 350 and
deviation 0.6, between 64 and 1,280, four patches each. Costs are those of LLaVA-1.5-7B and of Qwen2-VL-2B.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

from benchmarks import _page  # noqa: E402
from mmpeft_ds.backbones.mllm.costs import Costs  # noqa: E402
from mmpeft_ds.data.token_counts import TokenCounts  # noqa: E402
from mmpeft_ds.data.token_plan import UNIT, Lengths, forecast, micro_batches  # noqa: E402

LONGEST, IMAGE = 2048, 576
# name: thousands of conversations, median and deviation of the logarithm of their text's tokens, has an image
PARTS = {
    "LLaVA-Instruct": (158, 260, 0.5, True),
    "ShareGPT": (40, 900, 0.9, False),
    "VQAv2": (83, 110, 0.5, True),
    "GQA": (72, 130, 0.5, True),
    "OKVQA": (9, 60, 0.4, True),
    "OCR-VQA": (80, 110, 0.3, True),
    "A-OKVQA": (66, 90, 0.3, True),
    "TextCaps": (22, 60, 0.3, True),
    "RefCOCO": (48, 120, 0.6, True),
    "Visual Genome": (86, 150, 0.6, True),
}
# As `Costs.of` counts them in the configurations of LLaVA-1.5-7B and Qwen2-VL-2B, and patches for a token of an image.
COSTS = {
    "fixed": (Costs(pair=3.04e-5, patch=0.0234, image_token=0.0016, patch_pair=3.79e-6), 1),
    "resolutions": (Costs(pair=4.92e-5, patch=0.24, image_token=0.013, patch_pair=3.13e-5), 4),
}
PLANS = 3  # that are timed


@dataclasses.dataclass
class Mixture:
    """Conversations drawn from `PARTS`.

    Attributes:
        part: (n,) index into PARTS.
        text: (n,) tokens of the texts; all tokens together are at most LONGEST.
        image: (n,) tokens of the image, 0 without one.
    """

    part: np.ndarray
    text: np.ndarray
    image: np.ndarray


def mixture(kind: str, samples: int) -> Mixture:
    """Lengths drawn from a mixture, the same at every call."""
    draw = np.random.default_rng(0)
    shares = np.array([part[0] for part in PARTS.values()], float)
    part = draw.choice(len(PARTS), samples, p=shares / shares.sum())
    parts = np.array(list(PARTS.values()), float)[part]
    text = np.exp(draw.normal(np.log(parts[:, 1]), parts[:, 2]))
    image = np.full(samples, IMAGE)
    if kind == "resolutions":
        image = np.clip(np.exp(draw.normal(np.log(350), 0.6, samples)), 64, 1280)
    image = np.where(parts[:, 3] > 0, image, 0)
    return Mixture(part, np.minimum(text, LONGEST - image), image)


def drawn(kind: str, samples: int = 20_000) -> Lengths:
    """Lengths of a mixture and their costs."""
    found = mixture(kind, samples)
    tokens = (found.text + found.image).astype(int)
    costs, cell = COSTS[kind]
    patches = cell * found.image
    counts = TokenCounts(tokens, found.image, tokens**2, patches, patches**2)
    return Lengths(tokens, np.rint(UNIT * costs.total(counts)).astype(np.int64))


def main() -> None:
    """Forecast every mixture on every number of ranks, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 64, 512])
    parser.add_argument("--pack", type=int, default=16384, help="tokens of a micro-batch")
    parser.add_argument("--samples", type=int, default=16, help="of a step, for each rank")
    parser.add_argument("--out", type=Path, default=_page.FOLDER)
    args = parser.parse_args()
    rows = []
    for kind in COSTS:
        lengths = drawn(kind)
        for ranks in args.ranks:
            slots = args.samples * ranks
            expected = forecast(lengths, args.pack, slots, ranks)
            some = slice(0, slots)
            began = time.process_time()
            for _ in range(PLANS):
                micro_batches(lengths.tokens[some].tolist(), lengths.costs[some].tolist(), args.pack, ranks)
            seconds = (time.process_time() - began) / PLANS
            facts = {"mixture": kind, "mean": float(lengths.tokens.mean()), "ranks": ranks, "samples": slots}
            rows.append(facts | dataclasses.asdict(expected) | {"milliseconds": 1000 * seconds})
    head = [
        "# Micro-batches by tokens\n",
        f"`data.pack: {args.pack}`, {args.samples} samples per step and rank, mean of 20 steps drawn from a mixture "
        "like LLaVA-1.5's (`benchmarks/packing.py` states the distributions). `slowest` is the cost of the slowest "
        "rank in a step over that of the median rank, planned and with samples in their order; `waiting` the share of "
        "time that ranks wait for each other if they meet in every micro-step; `moved` the share of samples that "
        "another rank takes than the one whose slots they are of; the last column is the processor time that each "
        f"rank spends on planning a step. {_page.machine()}. `python benchmarks/packing.py` repeats it.\n",
        "| mixture | mean tokens | ranks | micro-steps | padding, padded rows | padding, packed | slowest, in order | "
        "slowest, planned | waiting | moved | ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        head.append(
            f"| {r['mixture']} | {r['mean']:.0f} | {r['ranks']} | {r['micro_steps']:.1f} | {r['padded']:.0%} | 0% | "
            f"{r['slowest_in_order']:.2f} | {r['slowest']:.3f} | {r['waiting']:.1%} | {r['moved']:.1%} | "
            f"{r['milliseconds']:.1f} |"
        )
    _page.write("packing", "\n".join(head), {"pack": args.pack, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
