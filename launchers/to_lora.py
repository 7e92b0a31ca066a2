#!/usr/bin/env python
"""Write a trained adapter as a plain LoRA, for stock peft without this package and for servers that know LoRA alone.

    python launchers/to_lora.py --adapter runs/talk/adapter --out loras/talk

The change is the same, to rounding: for methods whose change is a product of thin matrices by construction (aurora
without gates, graph_lora, tens_lora, routed_lora with route: none, lora with its scales and ranks written out). Others
are refused. Outputs of the base with the written files are compared with the adapter's before they are kept.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import adapter_files, console  # noqa: E402


def main() -> int:
    """Write, load with peft, compare."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter directory: RUN/adapter")
    parser.add_argument("--out", type=Path, required=True, help="new directory for the LoRA")
    args = parser.parse_args()
    adapter_files.whole(args.adapter)  # reported before torch is imported
    with console.quick_imports():
        from mmpeft_ds import lora_export

    report = lora_export.export(args.adapter, args.out)
    least, most = report["ranks"]
    rank = f"rank {most}" if least == most else f"ranks {least} to {most}"
    print(
        f"{args.out}: {report['method']} as a LoRA of {rank} on {report['modules']} modules; outputs differ from the "
        f"adapter's by {report['largest_difference']:.1e} of the largest"
    )
    if report["whole_modules"]:
        print(
            "trained in full, as modules_to_save, which peft reads and vLLM refuses: "
            f"{', '.join(report['whole_modules'])}"
        )
    if report["base_class"].startswith("mmpeft_ds."):
        print(f"its base is a {report['base_class']}: whoever loads it needs that class, and so this package")
    return 0


if __name__ == "__main__":
    console.run(main)
