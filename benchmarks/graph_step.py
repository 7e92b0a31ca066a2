#!/usr/bin/env python
"""A step of GA-Net on one rank beside the same network in plain torch with the same edges: graph, forward, backward.

    python benchmarks/graph_step.py                 batches of 64 and 512; writes docs/benchmarks/graph_step.*
    python benchmarks/graph_step.py --batches 64 --rounds 3 --out runs

Random rows of text and image, 768 wide each, about 37 class centres; one thread. Plain torch makes a dense adjacency
of the cosines' matrix: of those above tau, or of the k largest of each row. Both must give the same loss and
gradients. Rounds in turn; processor time, which other programs disturb less than the clock. The target: 1.2 times
plain torch.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402

WIDTH, CLASSES, STEPS, TARGET = 768, 37, 20, 1.2
GRAPHS = {"threshold": {"variant": "fix"}, "knn": {"variant": "fix", "graph": "knn", "tau": 0.4}}


def rows(batch: int):
    """(batch, WIDTH) text and image, and labels."""
    import torch

    generator = torch.Generator().manual_seed(batch)
    labels = torch.randint(CLASSES, (batch,), generator=generator)
    centres, noise = (torch.randn(n, 2 * WIDTH, generator=generator) for n in (CLASSES, batch))
    return *(centres[labels] + 0.6 * noise).split(WIDTH, 1), labels


def plain(head, text, image, labels):
    """Loss of the network of `head` with a dense adjacency."""
    import torch
    import torch.nn.functional as F

    config, nodes = head.config, torch.cat([text, image], 1)
    with torch.no_grad():
        unit = F.normalize(torch.cat([F.normalize(text), F.normalize(image)], 1))
        cosines = (unit @ unit.T).fill_diagonal_(-1)
        if config.graph == "knn":
            best, at = cosines.topk(config.k)
            edges = torch.zeros_like(cosines).scatter_(1, at, (best > config.tau).float())
            edges = torch.maximum(edges, edges.T)
        else:
            edges = (cosines > config.tau).float()
        edges.fill_diagonal_(1)
        scale = edges.sum(1).rsqrt()
        adjacency = scale[:, None] * edges * scale
    hidden = (adjacency @ head.down(nodes) @ head.conv.weight + head.conv.bias).relu()
    logits = adjacency @ (head.up(hidden) @ head.classifier.weight) + head.classifier.bias
    return F.cross_entropy(logits, labels)


def measure(batch: int, graph: str, rounds: int) -> dict:
    """Milliseconds of processor time of a step of each, medians of rounds in turn, and how far both are apart."""
    import peft
    import torch
    import torch.nn.functional as F

    from mmpeft_ds import GaNetConfig
    from mmpeft_ds.sites.feature_site import Features
    from tests.helpers.models import tiny_feature_model

    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = tiny_feature_model.model(classes=CLASSES, width=WIDTH, text_width=WIDTH)
    peft.get_peft_model(base, GaNetConfig(**GRAPHS[graph]))
    head = base.features.head
    text, image, labels = rows(batch)
    features = Features(image, text, torch.ones(batch, dtype=torch.bool), torch.arange(batch))
    systems = {
        "ours": lambda: F.cross_entropy(head(features).logits, labels),
        "plain": lambda: plain(head, text, image, labels),
    }
    parameters = [p for p in head.parameters() if p.requires_grad]
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    results = {}
    for turn in range(rounds + 1):  # the first one does not count
        for name, loss_of in systems.items():
            began = time.process_time()
            for _ in range(STEPS):
                loss = loss_of()
                gradients = torch.autograd.grad(loss, parameters)
            if turn:
                seconds[name].append((time.process_time() - began) / STEPS)
            results[name] = [loss.detach(), *gradients]
    apart = max(float((a - b).abs().max()) for a, b in zip(*results.values(), strict=True))
    if apart > 1e-4:
        sys.exit(f"{graph} graph of {batch}: losses or gradients differ by {apart:.1e}")
    made = statistics.median(_seconds(lambda: head.graph(features)) for _ in range(rounds))
    medians = {name: 1000 * statistics.median(of) for name, of in seconds.items()}
    return {"batch": batch, "graph": graph, "apart": apart, "graph_ms": 1000 * made, **medians}


def _seconds(work) -> float:
    began = time.process_time()
    for _ in range(STEPS):
        work()
    return (time.process_time() - began) / STEPS


def table(result: dict) -> str:
    """Markdown."""
    lines = [
        "# A step of GA-Net beside plain torch",
        "",
        f"Rows of {WIDTH} + {WIDTH}, {CLASSES} classes, bottleneck 512, float32, one rank, one thread; graph, forward "
        f"and backward pass. Milliseconds of processor time, medians of {result['rounds']} rounds of {STEPS} steps in "
        "turn. Plain torch has a dense adjacency of the same edges.",
        f"Machine: {result['machine']}. `python benchmarks/graph_step.py` repeats it.",
        "",
        f"| graph | batch | ours | of which the graph | plain torch | ratio (target {TARGET}) | differ by at most |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['graph']} | {row['batch']} | {row['ours']:.1f} | {row['graph_ms']:.1f} | {row['plain']:.1f} "
            f"| {row['ours'] / row['plain']:.2f} | {row['apart']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512], help="rows of a graph")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=_page.FOLDER, help="folder of the page and the JSON")
    args = parser.parse_args()
    measured = [measure(batch, graph, args.rounds) for graph in GRAPHS for batch in args.batches]
    result = {"machine": _page.machine(), "rounds": args.rounds, "rows": measured}
    _page.write("graph_step", table(result), result, args.out)


if __name__ == "__main__":
    main()
