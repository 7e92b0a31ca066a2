#!/usr/bin/env python
"""Upload a trained adapter to the Hugging Face hub: weights, model card, base fingerprint, metrics.

    python launchers/push.py --adapter runs/quickstart/adapter --repo me/quickstart [--private]

Files with a credential or a path of this machine are refused by name and line. Without a network, or with
HF_HUB_OFFLINE=1, the folder that would be uploaded is written and the command that uploads it is printed.
"""

import sys
from pathlib import Path

# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from mmpeft_ds import console  # noqa: E402


def main() -> int:
    """Check, upload or write."""
    parser = console.Parser(description=__doc__)
    parser.add_argument("--adapter", type=Path, required=True, help="adapter directory: RUN/adapter")
    parser.add_argument("--repo", required=True, help="owner/name on the hub; made if it is not there")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--out", type=Path, help="folder written without a network; default: ADAPTER-for-the-hub")
    args = parser.parse_args()
    with console.quick_imports():
        from mmpeft_ds.runs import push

    out = args.out or args.adapter.with_name(f"{args.adapter.name}-for-the-hub")
    print(push.push(args.adapter, args.repo, out, args.private))
    return 0


if __name__ == "__main__":
    console.run(main)
