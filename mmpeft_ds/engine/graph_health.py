"""Reports on the graph over a batch: numbers of its health every step, and a picture at evaluations."""

# B rows of this rank, E edges

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmpeft_ds.backbones.features.model import ClassificationOutput
from mmpeft_ds.data.batch import PackedBatch

SIDE, CELL, MARGIN = 1000, 44, 40  # pixels of the picture, of a thumbnail, and around all
MOST = 64  # nodes of a picture
SAME, OTHER, UNKNOWN = "seagreen", "indianred", "silver"


def measure(outputs: Any, batch: PackedBatch) -> dict[str, float]:
    """Numbers of one forward pass as sums over own rows, with the same names on every rank; may be empty. Collective.

    Labels are compared with the graph only here; no head ever sees them.
    """
    if not isinstance(outputs, ClassificationOutput):
        return {}
    graph = outputs.graph
    if graph is None:
        return dict(outputs.report or {})
    labels = batch.targets.get("label")
    if labels is not None:
        labels = torch.where(graph.valid, labels, -1)
    return graph.health(labels)


def summary(sums: dict[str, float], ranks: int) -> dict[str, float]:
    """Numbers for the curves, from sums over ranks.

    Returns:
        edges (without self-loops), mean_degree, isolated nodes, same_class_share of the edges between known classes,
        gather_ms per rank, gather_mib of all ranks, and what else the head reports.
    """
    numbers = dict(sums)
    nodes, labelled = numbers.pop("nodes", 0.0), numbers.pop("labelled_edges", 0.0)
    same = numbers.pop("same_class_edges", 0.0)
    if "edges" in numbers and nodes:
        numbers["mean_degree"] = numbers["edges"] / nodes
    if labelled:
        numbers["same_class_share"] = same / labelled
    if "gather_ms" in numbers:
        numbers["gather_ms"] /= ranks
        numbers["gather_mib"] = numbers.pop("gather_bytes", 0.0) / 2**20
    return numbers


@dataclass
class View:
    """Own rows of one evaluated batch, and the edges between them.

    Attributes:
        names: B sample ids.
        edges: (source, target) rows, each pair once.
        labels: B class indices, -1 where unknown.
        right: B; None where the class is unknown.
        pixels: sample id -> (3, H, W) in [0, 1], where the batch holds images.
    """

    names: list[str]
    edges: list[tuple[int, int]]
    labels: list[int]
    right: list[bool | None]
    pixels: dict[str, Tensor]


def view(outputs: Any, batch: PackedBatch, rows: list[dict[str, Any]]) -> View | None:
    """View of the first rows of this rank's batch; None where there is no graph of at least two of them."""
    graph = outputs.graph if isinstance(outputs, ClassificationOutput) else None
    if graph is None:
        return None
    kept = graph.valid.nonzero()[:MOST, 0].tolist()
    if len(kept) < 2:
        return None
    place = {row: i for i, row in enumerate(kept)}
    own = graph.source - graph.offset
    pairs = zip(own.tolist(), graph.target.tolist(), strict=True)
    edges = {tuple(sorted((place[s], place[t]))) for s, t in pairs if s != t and s in place and t in place}
    labels = batch.targets["label"].tolist() if "label" in batch.targets else [-1] * len(graph.valid)
    owners = batch.text_owner.tolist()
    names = [batch.sample_id[owners[row]] for row in kept]
    row_of = {row["sample_id"]: row for row in rows}
    right = [row_of[n]["prediction"] == row_of[n]["answer"] if "answer" in row_of.get(n, {}) else None for n in names]
    pixels = next((v for v in batch.images.values() if v.dim() == 4 and v.shape[1] == 3), None)
    shown = {}
    if pixels is not None:
        slots = batch.image_owner.tolist()
        for name, row in zip(names, kept, strict=True):
            if owners[row] in slots:
                image = pixels[slots.index(owners[row])].float().cpu()
                low, high = image.amin(), image.amax()
                shown[name] = (image - low) / (high - low).clamp(min=1e-6)
    return View(names, sorted(edges), [labels[row] for row in kept], right, shown)


def picture(seen: View, thumbnail: Callable[[str], Tensor | None] | None = None) -> Tensor:
    """Picture of a graph, (3, H, W) in [0, 1]. Neighbours lie close, nodes without any at the bottom. Edges within a
    class are green, others red; frames of right predictions are green, of wrong ones red.

    Args:
        thumbnail: sample id -> (3, H, W) in [0, 1], for samples whose batch holds no pixels.
    """
    import networkx
    from PIL import Image, ImageDraw

    joined = sorted({node for edge in seen.edges for node in edge})
    alone = [i for i in range(len(seen.names)) if i not in joined]
    columns = (SIDE - 2 * MARGIN) // (CELL + 8)
    rows_below = math.ceil(len(alone) / columns)
    points: dict[int, tuple[float, float]] = {}
    for place, node in enumerate(alone):  # samples without a neighbour stand in rows at the bottom
        row, column = divmod(place, columns)
        points[node] = (MARGIN + column * (CELL + 8), SIDE - MARGIN - (rows_below - 1 - row) * (CELL + 8))
    if joined:
        graph = networkx.Graph(seen.edges)
        laid = networkx.spring_layout(graph, seed=0, k=4 / math.sqrt(len(joined)), iterations=150)
        spread = np.array([laid[node] for node in joined])
        low, high = spread.min(0), spread.max(0)
        room = np.array([SIDE - 2 * MARGIN, SIDE - 2 * MARGIN - rows_below * (CELL + 8)])
        where = MARGIN + (spread - low) / np.maximum(high - low, 1e-9) * room
        points |= {node: (float(x), float(y)) for node, (x, y) in zip(joined, where, strict=True)}
    sheet = Image.new("RGB", (SIDE, SIDE), "white")
    draw = ImageDraw.Draw(sheet)
    for a, b in seen.edges:
        known = seen.labels[a] >= 0 and seen.labels[b] >= 0
        colour = UNKNOWN if not known else SAME if seen.labels[a] == seen.labels[b] else OTHER
        draw.line([points[a], points[b]], fill=colour, width=2)
    half = CELL // 2
    for i, (x, y) in sorted(points.items()):
        frame = {True: SAME, False: OTHER, None: UNKNOWN}[seen.right[i]]
        box = (int(x) - half, int(y) - half)
        name = seen.names[i]
        image = seen.pixels.get(name)
        if image is None and thumbnail is not None:
            image = thumbnail(name)
        draw.rectangle((box[0] - 3, box[1] - 3, box[0] + CELL + 2, box[1] + CELL + 2), fill=frame)
        if image is None:
            draw.rectangle((*box, box[0] + CELL - 1, box[1] + CELL - 1), fill="white")
            draw.text((box[0] + 4, box[1] + half - 6), str(seen.labels[i]), fill="black")
            continue
        pixels = (image.clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        sheet.paste(Image.fromarray(pixels).resize((CELL, CELL), Image.Resampling.LANCZOS), box)
    return torch.from_numpy(np.asarray(sheet).copy()).permute(2, 0, 1).float() / 255
