"""What a run should give: the quickstart's losses in plain torch on one process, without DeepSpeed."""

from __future__ import annotations

from typing import Any


def reference(recipe: Any, batches: list, world: int, steps: int, dtype: str) -> list[float]:
    """Loss of each step: one mean over all samples of a step, one gradient, clipped, AdamW.

    Args:
        batches: packed batches, those of all ranks of a step one after the other.
        dtype: `float64` or `float32`, of all weights, moments and sums. Weights start as float32 drew them.
    """
    import torch

    from mmpeft_ds.engine.assembly.resolve import attach, resolve
    from mmpeft_ds.engine.optim.schedule import learning_rate

    torch.set_num_threads(1)
    resolved = resolve(recipe)
    torch.manual_seed(recipe.seed)
    base = resolved.backbone.build()
    torch.manual_seed(recipe.seed)
    model = attach(resolved, base).eval().to(getattr(torch, dtype))
    task, backbone = resolved.train[0].task, resolved.backbone
    trained = [p for p in model.parameters() if p.requires_grad]
    options = recipe.optim
    optimizer = torch.optim.AdamW(
        trained, lr=options.lr, betas=tuple(options.betas), eps=options.eps, weight_decay=0.0
    )
    losses = []
    for step in range(steps):
        parts = batches[step * world : (step + 1) * world]
        weight, total = sum(task.weight(batch) for batch in parts), 0.0
        for batch in parts:
            inputs = {k: _as(v, model.dtype) for k, v in backbone.inputs(batch).items()}
            loss = task.loss(model(**inputs), batch) / weight
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(trained, options.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step, steps, 0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _as(value: Any, dtype: Any) -> Any:
    return value.to(dtype) if hasattr(value, "is_floating_point") and value.is_floating_point() else value
