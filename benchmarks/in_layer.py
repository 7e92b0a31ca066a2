#!/usr/bin/env python
"""Every method inside the layers beside plain LoRA: operations a step, and processor time of forward and backward.

    python benchmarks/in_layer.py                       tiny models, and layers of BLIP-base's widths
    python benchmarks/in_layer.py --columns clip blip-base --methods p_adapter aurora --rounds 9 --out runs

Each method has its default options. peft's LoRA, rank 8, has q and v of the same towers as the method that it is
compared with, so both send gradients equally far down. A round runs LoRA and the method one after the other, in an
order that changes; a ratio is the median over rounds of the method's time through LoRA's. Times are processor time of
one thread. As in the engine's steps, freed memory is kept and Python looks for garbage between passes only.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks import _page  # noqa: E402

TINY = ("vision_text_encoder", "dual_encoder", "clip_bart", "clip", "blip captioner", "blip vqa", "mllm LLaVA")
LARGE = "blip-base"
LAYERS, WORDS = 3, 20  # of the large column


def blip_base(folder: Path) -> Any:
    """A BLIP captioner with layers of BLIP-base's widths, three in each tower, and a caption for an image."""
    from unittest import mock

    import torch

    from mmpeft_ds import backbones, registry
    from mmpeft_ds.data.batch import Prompted, Sample, pack
    from tests.helpers.device import matrix
    from tests.helpers.models import tiny_blip

    widths = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    with mock.patch.multiple(tiny_blip, WIDTH=768, LAYERS=widths), mock.patch.object(tiny_blip, "config", _config):
        path = tiny_blip.write(folder, "captioner")
    entry = registry.load(backbones, "blip", "backbone.name")
    backbone = entry(entry.Options(path, form="captioner"), None)
    backbone.check()
    model = backbone.build().eval()
    transform, drawn = backbone.image_transform(train=False), torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, 384, 384), dtype=torch.uint8, generator=drawn)
    text = Prompted("", " ".join((tiny_blip.WORDS * 2)[:WORDS]))
    samples = [Sample("one", 1.0, [transform(image, torch.Generator())], [text], [0])]
    labels = lambda targets: {"label": torch.tensor(targets)}  # noqa: E731
    return matrix.Column(backbone, model, pack(samples, backbone.collate_images, backbone.collate_texts, labels))


def _config(**_: Any) -> Any:
    from transformers import BlipConfig

    from tests.helpers.models import tiny_blip

    text = dict(
        vocab_size=tiny_blip.ENC + 1, num_hidden_layers=LAYERS, max_position_embeddings=40, encoder_hidden_size=768,
        **tiny_blip.LAYERS, **tiny_blip.IDS,
    )  # fmt: skip
    vision = dict(image_size=384, patch_size=16, num_hidden_layers=LAYERS, **tiny_blip.LAYERS)
    return BlipConfig(text_config=text, vision_config=vision, image_text_hidden_size=256)


def compare(column: str, methods: list[str], rounds: int) -> list[dict]:
    """A row for each method that fits the column."""
    from tests.helpers.device import matrix

    with tempfile.TemporaryDirectory() as name:
        if column == LARGE:
            made = blip_base(Path(name))
            return _rows(column, made, methods, rounds)
        with matrix.column(column, Path(name)) as made:
            return _rows(column, made, methods, rounds)


def _rows(column: str, made: Any, methods: list[str], rounds: int) -> list[dict]:
    from tests.helpers.device import matrix

    models = matrix.models(made, methods)
    return [_row(column, name, model, made, rounds) for name, model in models if name != matrix.FROZEN]


def _row(column: str, method: str, model: Any, made: Any, rounds: int) -> dict:
    from tests.helpers.device import matrix
    from tests.helpers.device.counters import counted

    peer = _lora(made, model)
    passes = [lambda m=m: matrix.passes(made, m, made.batch) for m in (peer, model)]
    counts = []
    for run in passes:
        run()
        with counted() as found:
            run()
        counts.append(found.kernels)
    times: list[list[float]] = [[], []]
    for turn in range(rounds):
        for which in (0, 1) if turn % 2 else (1, 0):
            times[which].append(_seconds(passes[which]))
    ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
    lora, own = (statistics.median(each) * 1e3 for each in times)
    row = {"column": column, "method": method, "kernels": counts, "ms": [lora, own], "ratio": ratio}
    print(
        f"{column:20} {method:15} {counts[1]:5} / {counts[0]:5} kernels {own:8.2f} / {lora:8.2f} ms  {ratio:.2f}",
        flush=True,
    )
    return row


def _seconds(run: Callable[[], Any]) -> float:
    from mmpeft_ds.distributed.own_process import garbage_later

    with garbage_later():
        began, passes = time.process_time(), 0
        while True:
            run()
            passes += 1
            if (spent := time.process_time() - began) > 0.1 or passes == 20:
                return spent / passes


def _lora(made: Any, model: Any) -> Any:
    """LoRA on q and v of the towers in which `model` trains something."""
    import copy

    import peft
    import torch

    from mmpeft_ds import methods
    from mmpeft_ds.sites import find_sites

    base = copy.deepcopy(made.model)
    sites = find_sites(base)
    trained = {name.replace("base_model.model.", "") for name, p in model.named_parameters() if p.requires_grad}
    towers = {tower for tower in sites.towers if any(name.startswith(tower) for name in trained)}
    paths = sorted({part.path for s in sites.attention if s.tower in towers for part in (s.q, s.v)})
    entry = methods.get("lora")
    config = entry.Config(target_modules=paths)
    torch.manual_seed(2)
    return peft.get_peft_model(base, entry.prepare(config, base, sites))


def table(rows: list[dict], rounds: int) -> str:
    """Markdown: a row per method, a column per model."""
    columns = list(dict.fromkeys(row["column"] for row in rows))
    lines = [
        "# Methods inside the layers beside plain LoRA",
        "",
        f"Forward and backward of one batch: operations that are no views, and processor time of one thread, each "
        f"through that of LoRA (rank 8, q and v of the same towers); medians of {rounds} rounds in turn. Tiny models "
        f"have two layers of width 16; `{LARGE}` is a captioner of {LAYERS} layers a tower, 768 wide, on an image "
        f"of 384 px with {WORDS} words. {_page.machine()}. `python benchmarks/in_layer.py` repeats it.",
        "",
        f"| | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method in dict.fromkeys(row["method"] for row in rows):
        cells = {row["column"]: row for row in rows if row["method"] == method}
        shown = [
            f"{cells[c]['kernels'][1] / cells[c]['kernels'][0]:.2f}x, {cells[c]['ratio']:.2f}" if c in cells else "-"
            for c in columns
        ]
        lines.append(f"| {method} | {' | '.join(shown)} |")
    return "\n".join(lines)


def main() -> None:
    """Run, print, write."""
    from mmpeft_ds import methods

    inside = [name for name in methods.names(heads=False) if name not in ("peft", "moka")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", nargs="+", default=[*TINY, LARGE])
    parser.add_argument("--methods", nargs="+", default=inside, choices=inside)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=_page.FOLDER)
    args = parser.parse_args()
    import torch

    from mmpeft_ds.distributed.own_process import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    rows = [row for column in args.columns for row in compare(column, args.methods, args.rounds)]
    _page.write("in_layer", table(rows, args.rounds), {"rounds": args.rounds, "rows": rows}, args.out)


if __name__ == "__main__":
    main()
