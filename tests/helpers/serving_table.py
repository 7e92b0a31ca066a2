"""The table of docs/serving.md: how an adapter of every method can be served, as the methods themselves say.

`python -m tests.helpers.serving_table` regenerates it.
"""

from __future__ import annotations

from typing import Any

import peft

from mmpeft_ds import methods
from tests.helpers import ROOT, plain_methods
from tests.helpers.method_table import BEGIN, END

PAGE = ROOT / "docs" / "serving.md"
# Options with which a method is asked again, where those by default are in the way.
ASKED: dict[str, list[dict[str, Any]]] = {"routed_lora": [{"route": "none"}], "aurora": [{"gates": True}]}


def rows() -> list[tuple[str, str, str, str]]:
    """(method with options, as it is, as a LoRA, merged folder) of every method."""
    found = []
    for name in plain_methods.names():
        method = methods.get(name)
        for options in [{}, *ASKED.get(name, [])]:
            config = method.Config(**options)
            title = f"`{name}`" + "".join(f", `{key}: {str(value).lower()}`" for key, value in options.items())
            plain = isinstance(config, peft.LoraConfig)
            as_lora, merged = method.no_lora(config), method.unmergeable(config)
            found.append((title, "yes" if plain else "no", as_lora or "exact", merged or "yes"))
    return found


def table() -> str:
    """Markdown of the table."""
    lines = ["| method | vLLM, stock peft: unchanged | `to_lora.py` | `merge.py` |", "|---|---|---|---|"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows())])


def written(page: str) -> str:
    """`page` with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text("utf-8")), "utf-8")
    print(f"wrote {PAGE}")
