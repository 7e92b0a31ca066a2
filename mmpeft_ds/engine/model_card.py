"""The README.md of an adapter directory."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from torch import Tensor

from mmpeft_ds.data.transform import hooks_of
from mmpeft_ds.engine.optim.optimizers import TITLES
from mmpeft_ds.engine.summary import shown
from mmpeft_ds.redaction import named


def model_card(resolved: Any, metrics: dict[str, Any], trained: dict[str, Tensor]) -> str:
    """The model card: training, data, results and how to load the adapter, as Markdown with the header of the hub.

    Args:
        resolved: parts of the recipe (`engine.resolve.Resolved`).
        metrics: name -> value of the run.
        trained: name -> whole tensor.
    """
    recipe = resolved.recipe
    options = {k: v for k, v in recipe.backbone.items() if isinstance(v, str) and v and k != "name"}
    backbone = ", ".join([recipe.backbone["name"], *(f"{k} `{v}`" for k, v in named(options).items())])
    changed = ", ".join(f"{k} `{_shown(v)}`" for k, v in _own_settings(resolved).items())
    method = f" with {changed}, otherwise its defaults" if changed else " with its defaults"
    numel = sum(t.numel() for t in trained.values())
    data = "\n".join(_source(source) for source in resolved.train)
    table = "\n".join(f"| {name} | {value} |" for name, value in shown(metrics).items())
    return f"""---
library_name: peft
tags: [mmpeft_ds, {recipe.method["name"]}]
---

# {recipe.method["name"]} on {recipe.backbone["name"]}

* **Base (frozen)**: {backbone}; {recipe.engine.dtype}. `base_fingerprint.json` tells it from any other.
* **Method**: {recipe.method["name"]}{method}. {numel:,} trained parameters in float32.
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
{_example(resolved)}
```

```sh
{_commands(resolved)}
```

On a base model of your own: `import mmpeft_ds, peft; peft.PeftModel.from_pretrained(base, "THIS_DIRECTORY")`.
{_unmerging(resolved)}"""


def _unmerging(resolved: Any) -> str:
    """A warning about peft's own tuners on a base of half precision."""
    dtype = resolved.recipe.engine.dtype
    if dtype == "float32" or resolved.method.Tuner is not None:
        return ""
    return (
        f"\nDo not merge and unmerge it on a {dtype} base: peft subtracts the change again, which leaves a third\n"
        "to a half of the weights changed. Load the base again, or write a merged copy with `launchers/merge.py`.\n"
    )


def _source(source: Any) -> str:
    manifest, options = source.manifest, source.options
    chosen = f" ({options.subset})" if options.subset else ""
    return (
        f"* {manifest.name}, split {options.split}{chosen}: {source.samples:,} samples, "
        f"licence {manifest.licence}, task {options.task['name']}"
    )


def _own_settings(resolved: Any) -> dict[str, Any]:
    """The method's settings that differ from its defaults."""
    defaults = {f.name: f for f in dataclasses.fields(resolved.method.Options)}
    own = {}
    for key, value in resolved.recipe.method.items():
        field = defaults.get(key)
        if field is None or value in (None, "", [], {}):
            continue
        factory = field.default_factory
        default = factory() if factory is not dataclasses.MISSING else field.default
        if value != default:
            own[key] = value
    return own


def _example(resolved: Any) -> str:
    """Python that asks the adapter about one picture, as its first task asks."""
    stored, known = _stored(resolved)
    text = _example_text(resolved)
    note = "  # with the frozen towers that made the stored features" if known else ""
    asked = f", [{json.dumps(text)}]" if text is not None else ""
    file = "features.npy" if stored and not known else "photo.jpg"
    return (
        f'import mmpeft_ds\nadapter = mmpeft_ds.load("THIS_DIRECTORY"{", pictures=True" if known else ""}){note}\n'
        f'print(adapter.predict(["{file}"]{asked}))'
    )


def _commands(resolved: Any) -> str:
    """The same from a shell, for a folder."""
    text = _example_text(resolved)
    asked = f" --text {json.dumps(text)}" if text is not None else ""
    lines = [f"python launchers/predict.py --adapter THIS_DIRECTORY --images photos{asked}"]
    if resolved.train and resolved.train[0].options.task["name"] == "retrieval":
        lines.append(f"python launchers/search.py --adapter THIS_DIRECTORY --images photos{asked} --out results")
    return "\n".join(lines)


def _example_text(resolved: Any) -> str | None:
    return resolved.train[0].task.example_text if resolved.train else None


def _stored(resolved: Any) -> tuple[bool, bool]:
    """Whether the model reads stored features, and whether the backbone can make them of pictures."""
    stored = hooks_of(resolved.backbone.image_transform(False)).takes_features
    return stored, stored and resolved.recipe.backbone.get("images") == "stored"


def _shown(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(named(value))
