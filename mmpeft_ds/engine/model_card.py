"""The README.md of an adapter directory."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mmpeft_ds.engine.optim.optimizers import TITLES


def model_card(resolved: Any, metrics: dict[str, Any], trained: dict[str, Tensor]) -> str:
    """What was trained on what with which result, and how to load it, as Markdown with the hub's header.

    Args:
        resolved: parts of the recipe (`engine.resolve.Resolved`).
        metrics: name -> value of the run.
        trained: name -> whole tensor.
    """
    recipe = resolved.recipe
    backbone = ", ".join(f"{k} `{v}`" for k, v in recipe.backbone.items() if isinstance(v, str))
    method = ", ".join(f"{k} `{v}`" for k, v in recipe.method.items() if v not in (None, "", [], {}) and k != "name")
    numel = sum(t.numel() for t in trained.values())
    data = "\n".join(_source(source) for source in resolved.train)
    table = "\n".join(f"| {name} | {_shown(value)} |" for name, value in metrics.items())
    return f"""---
library_name: peft
tags: [mmpeft_ds, {recipe.method["name"]}]
---

# {recipe.method["name"]} on {recipe.backbone["name"]}

* **Base (frozen)**: {backbone}; {recipe.engine.dtype}. `base_fingerprint.json` tells it from any other.
* **Method**: {recipe.method["name"]}: {method or "its defaults"}. {numel:,} trained parameters in float32.
* **Training**: {TITLES[recipe.optim.name]}, learning rate {recipe.optim.lr:g}, {recipe.data.global_batch} samples
  a step, seed {recipe.seed}; everything else is in `recipe.yaml`.

## Data

{data}

## Metrics

| | |
|---|---|
{table}

## Load

```python
import mmpeft_ds
adapter = mmpeft_ds.load("THIS_DIRECTORY")
print(adapter.predict(["photo.jpg"], ["What colour is the square?"]))
```

On a base model of your own: `import mmpeft_ds, peft; peft.PeftModel.from_pretrained(base, "THIS_DIRECTORY")`.
"""


def _source(source: Any) -> str:
    manifest, options = source.manifest, source.options
    chosen = f" ({options.subset})" if options.subset else ""
    return (
        f"* {manifest.name}, split {options.split}{chosen}: {source.samples:,} samples, "
        f"licence {manifest.licence}, task {options.task['name']}"
    )


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
