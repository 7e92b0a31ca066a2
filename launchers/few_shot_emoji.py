#!/usr/bin/env python
"""The few-shot study on emoji from nothing: features of the frozen towers, alignment, aligned features, all methods.

make few-shot runs it, after make few-shot-data. Every phase continues where it stopped, or leaves alone what is done.
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# This folder must not come first on the path: its file names would hide installed modules of the same name.
sys.path[0] = str(ROOT)

from launchers._run import launch, python  # noqa: E402
from mmpeft_ds import console  # noqa: E402
from mmpeft_ds.errors import BadInput  # noqa: E402

RECIPE, ALIGN, MODEL = "recipes/few_shot_emoji.yaml", "recipes/align_emoji.yaml", "models/aligned"
TOWERS = (
    "vision=packaged:dinov2-focus",
    "vision_layers=11",
    "vision_norm=false",
    "image_size=126",
    "text=packaged:minilm",
)
TEMPLATES = ("{}", "an emoji of a {}", "a small picture of a {}")
VIEWS = ("--views", "2", "--view-scale", "0.5", "1", "--thumbnails", "64")
TEST_ALONE = ("--splits", "test", "--thumbnails", "64")


def main() -> int:
    """All phases in turn."""
    console.Parser(description=__doc__).parse_args()
    os.chdir(ROOT)
    if not Path("data/emoji-fluent/manifest.json").is_file():
        raise BadInput("data/emoji-fluent: not prepared. Run make few-shot-data, which needs npm's registry.")
    if not Path("data/stamps/manifest.json").is_file():
        raise BadInput("data/stamps: not prepared; the alignment learns from them. Run make few-shot-data on Debian.")
    phases = [lambda d=d: features(d, "dinov2", VIEWS) for d in ("emoji-fluent", "emoji-twitter", "stamps")]
    phases.append(lambda: features("emoji-google", "dinov2", TEST_ALONE))
    phases.append(lambda: launch("launchers/train.py", "--recipe", ALIGN))
    phases.append(merge)
    phases.append(lambda: features("emoji-fluent", "aligned", VIEWS))
    phases += [lambda d=d: features(d, "aligned", TEST_ALONE) for d in ("emoji-twitter", "emoji-google")]
    for kind in ("", "-dinov2", "-aligned"):
        phases.append(lambda kind=kind: python("data_prep/few_shot.py", f"data/emoji-fluent{kind}"))
    phases.append(lambda: launch("launchers/few_shot.py", "--recipe", RECIPE))
    for phase in phases:
        if code := phase():
            print(f"ended with exit code {code}; the same command continues from here", file=sys.stderr)
            return code
    return 0


def features(data: str, kind: str, more: tuple[str, ...]) -> int:
    """Feature shards of a data set, by the towers as they come or by the aligned ones."""
    chosen = TOWERS if kind == "dinov2" else (f"model={MODEL}",)
    towers = [word for choice in chosen for word in ("--set", choice)]
    texts = [word for template in TEMPLATES for word in ("--template", template)] if kind == "aligned" else []
    out = f"data/{data}-{kind}"
    print(f"\n--- {out}", flush=True)
    where = ("--data", f"data/{data}", "--out", out, "--backbone", "dual_encoder")
    return launch("launchers/features.py", *where, *more, *towers, *texts)


def merge() -> int:
    """The aligned dual encoder as a model of its own."""
    if Path(MODEL).is_dir():
        return 0
    return python("launchers/merge.py", "--adapter", "runs/align_emoji/adapter", "--out", MODEL)


if __name__ == "__main__":
    console.run(main)
