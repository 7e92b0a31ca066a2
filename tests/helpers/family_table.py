"""The table of docs/families.md: what works with every family of multimodal language models.

It is made of what the tests of families try and expect, see `tests.helpers.models.family_traits`.

`python -m tests.helpers.family_table` regenerates it.
"""

from __future__ import annotations

from tests.helpers import ROOT
from tests.helpers.method_table import written
from tests.helpers.models.family_traits import EVERY, TRAITS

PAGE = ROOT / "docs" / "families.md"


def table() -> str:
    """Markdown: a row for each family, a column for each trait, and the reasons by number."""
    reasons = list(dict.fromkeys(reason.why for trait in TRAITS.values() for reason in trait.lacking.values()))
    lines = [f"| | {' | '.join(trait.head for trait in TRAITS.values())} |", "|---" * (len(TRAITS) + 1) + "|"]
    for family in sorted(EVERY):
        found = [trait.lacking.get(family) for trait in TRAITS.values()]
        cells = ["yes" if reason is None else f"({reasons.index(reason.why) + 1})" for reason in found]
        lines.append(f"| `{family}` | {' | '.join(cells)} |")
    sentences = [f"{why[0].upper()}{why[1:]}" if why.startswith("it") else why for why in reasons]
    return "\n".join([*lines, "", *(f"{at}. {sentence}." for at, sentence in enumerate(sentences, 1))])


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8"), table()), "utf-8")
    print(f"wrote {PAGE}")
