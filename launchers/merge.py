#!/usr/bin/env python
"""Fold a trained adapter into its base and write a plain transformers folder.

    python launchers/merge.py --adapter runs/align_emoji/adapter --out models/aligned [--weights original]

The folder holds config, weights (float32), tokenizer and processor files. Backbones take it by its path: `model:` of
dual_encoder, clip, blip and mllm; any model of it loads with AutoModel.from_pretrained. Methods that are no change of
weights (bottlenecks, prompts, routed deltas, heads on features) are refused.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import adapter_files, console  # noqa: E402


def main() -> int:
    """Merge, compare, write."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter directory: RUN/adapter")
    parser.add_argument("--out", type=Path, required=True, help="new directory for the merged model")
    parser.add_argument(
        "--weights",
        choices=("dequantised", "original"),
        default="dequantised",
        help="of a quantised base, what is merged into: the weights it computed with, or the checkpoint's",
    )
    args = parser.parse_args()
    adapter_files.whole(args.adapter)  # reported before torch is imported
    with console.quick_imports():
        from mmpeft_ds import merging

    summary = merging.merge(args.adapter, args.out, args.weights)
    print(
        f"{args.out}: {summary['backbone']} with {summary['method']} merged, {summary['parameters']:,} parameters; "
        f"outputs differ from the adapted model's by {summary['largest_difference']:.1e} of the largest"
    )
    for name, difference in summary.get("differences", {}).items():
        over = "the quantised weights" if name == "as trained" else f"the {name} weights"
        print(f"from the adapted model over {over}: {difference:.1e}")
    return 0


if __name__ == "__main__":
    console.run(main)
