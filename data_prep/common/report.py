"""Table of a data set's records that prepare.py prints at the end, from the manifest."""

from __future__ import annotations

from typing import Any

from data_prep.common.duplicates import SHOWN
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.errors import counted

COUNTED = ("records", "samples", "pictures", "texts")
TEXTS = ("captions[]", "questions[].question", "conversations[].value", "label")


def show(manifest: Manifest) -> None:
    """Print one row per split with the published counts, what was set aside, and what several splits have."""
    print(f"  {'':8} " + "".join(f"{name:>22}" for name in COUNTED))
    splits = dict.fromkeys([*manifest.splits, *manifest.account])  # those without samples too
    for split in splits:
        numbers = counts(manifest, split)
        expected = manifest.account.get(split, {}).get("expected", {})
        cells = []
        for name in COUNTED:
            beside = f" of {expected[name]:,}" if name in expected else ""
            cells.append(f"{numbers[name]:,}{beside}" if name in numbers else "")
        print(f"  {split:8} " + "".join(f"{cell:>22}" for cell in cells))
    if template := next((a["template"] for a in manifest.account.values() if "template" in a), None):
        print(f"  the published prompt: {template}")
    for split in splits:
        for reason, (number, names) in manifest.account.get(split, {}).get("aside", {}).items():
            # A name may stand for several records, such as all captions of a picture.
            more = ", ..." if number > len(names) >= SHOWN else ""
            print(f"  {split}: {number:,} set aside, {reason}: {', '.join(names)}{more}")
        for reason, (number, names) in manifest.account.get(split, {}).get("bad", {}).items():
            more = ", ..." if number > len(names) else ""
            samples = counted(number, "sample")
            print(f"  {split}: {samples} that training will leave out, {reason}: {', '.join(names)}{more}")
        if without := manifest.account.get(split, {}).get("uncaptioned"):
            number, names = without if isinstance(without, list) else (without, [])  # earlier versions named none
            more = ", ..." if number > len(names) > 0 else ""
            listed = f": {', '.join(names)}{more}" if names else ""
            print(f"  {split}: {number:,} left out, pictures or videos that are listed without any text{listed}")
        if cut := manifest.fields.get(split, {}).get("cut", {}).get("present"):
            print(f"  {split}: {cut:,} videos break off or do not decode in parts; their records say `cut`")
        for other, (number, names) in manifest.account.get(split, {}).get("also_in", {}).items():
            more = ", ..." if number > len(names) else ""
            print(f"  {split}: {number:,} of the pictures are also in {other}: {', '.join(names)}{more}")


def counts(manifest: Manifest, split: str) -> dict[str, int]:
    """`records` read, `samples` written, their different `pictures`, and their `texts`, where they have any."""
    fields: dict[str, dict[str, Any]] = manifest.fields.get(split, {})
    numbers = {"samples": manifest.samples(split) if split in manifest.splits else 0}
    numbers |= {k: v for k, v in manifest.account.get(split, {}).items() if k in COUNTED}
    images = fields.get("images", {})
    if images.get("max"):
        numbers["pictures"] = images.get("distinct", round(images["mean"] * images["present"]))
    if texts := next((fields[path]["present"] for path in TEXTS if path in fields), 0):
        numbers["texts"] = texts
    return numbers
