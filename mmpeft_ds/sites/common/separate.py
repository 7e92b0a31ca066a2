"""Sites of a layer whose q, k and v are separate maps, and of its feed-forward block."""

from __future__ import annotations

from collections.abc import Sequence

from mmpeft_ds.sites.base import AttentionSite, Block, FFNSite


def attention_site(
    block: Block,
    name: str,
    out: str,
    heads: int,
    norm: str | None,
    causal: bool,
    pre_norm: bool = True,
    output: str | None = None,
) -> AttentionSite:
    """The attention module `name` of a layer.

    Args:
        out: name of the output projection in it.
        norm, output: names in the layer, as `AttentionSite` has them by path.
    """
    q = block.projection(f"{name}.q_proj")
    return AttentionSite(
        path=f"{block.path}.{name}",
        tower=block.tower,
        modality=block.modality,
        layer=block.layer,
        q=q,
        k=block.projection(f"{name}.k_proj"),
        v=block.projection(f"{name}.v_proj"),
        out=block.projection(f"{name}.{out}"),
        heads=heads,
        in_width=q.in_width,
        norm=_path(block, norm),
        pre_norm=pre_norm,
        causal=causal,
        block=block.path,
        output=_path(block, output),
    )


def ffn_site(
    block: Block,
    name: str,
    parts: Sequence[str],
    activation: str,
    norm: str | None,
    pre_norm: bool = True,
    output: str | None = None,
) -> FFNSite:
    """The feed-forward block `name` of a layer.

    Args:
        parts: names of its projections: the gate where there is one, the widening one, the narrowing one.
        norm, output: names in the layer, as `FFNSite` has them by path.
    """
    *gate, up, down = parts
    return FFNSite(
        path=f"{block.path}.{name}",
        tower=block.tower,
        modality=block.modality,
        layer=block.layer,
        up=block.projection(f"{name}.{up}"),
        down=block.projection(f"{name}.{down}"),
        norm=_path(block, norm),
        pre_norm=pre_norm,
        activation=activation,
        block=block.path,
        output=_path(block, output),
        gate=block.projection(f"{name}.{gate[0]}") if gate else None,
    )


def _path(block: Block, name: str | None) -> str | None:
    return None if name is None else f"{block.path}.{name}"
