"""Layers of MokA: the low-rank path of a projection that tells tokens of images from text."""

# B texts, L positions of each, N of a row of several texts, d in width, g parts of a fused projection, r rank

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.parts import spread
from mmpeft_ds.methods.common.products import Multiplies, at_edge
from mmpeft_ds.methods.moka.config import MokaConfig
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.ops.question_attention import question_attention
from mmpeft_ds.sites.base import base_layer, features
from mmpeft_ds.sites.condition import MEDIA, OTHER, PROMPT, QUESTION, Segments, current

Parts = tuple[tuple[int, int], ...]  # (first output feature, width) of each adapted part of a projection


class MokaDelta(Multiplies, nn.Module):
    """The update of one projection by one adapter.

    `up` starts at zero, so the layer starts as the frozen one.

    Args:
        base: the frozen Linear or Conv1D.
    """

    def __init__(self, base: nn.Module, parts: Parts, config: MokaConfig):
        super().__init__()
        width, self.out_features = features(base)
        self.parts, self.r, self.dropout = parts, config.r, config.dropout
        self.scale, self.attention = config.alpha / config.r, config.attention
        self.read = (QUESTION,) if config.read == "question" else (PROMPT, QUESTION)
        like = {"dtype": full_dtype(base.weight.dtype), "device": base.weight.device}
        self.A_text = nn.Parameter(torch.empty(len(parts) * config.r, width, **like))
        self.A_image = nn.Parameter(torch.empty(len(parts) * config.r, width, **like))
        self.B = nn.Parameter(torch.zeros(sum(width for _, width in parts), config.r, **like))
        for down in (self.A_text, self.A_image):
            nn.init.kaiming_uniform_(down, a=math.sqrt(5))

    def forward(self, x: Tensor, kinds_BL: Tensor | None, segments: Segments | None) -> Tensor:
        """(B, L, out) in the dtype of the products.

        Args:
            x: (B, L, d), or (1, N, d) where all texts stand in one row.
            kinds_BL: as `Condition.kinds`; None: all is text.
            segments: where the texts stand in that row; None: each has a row.
        """
        with self.multiplying(x):
            x = at_edge(x, self.B.dtype)
            if self.dropout and self.training:
                x = F.dropout(x, self.dropout)
            h = F.linear(x, self.A_text)
            if kinds_BL is not None:
                h = self._by_kind(x, h, kinds_BL, segments)
            ups = zip(h.split(self.r, -1), self.B.split([width for _, width in self.parts]), strict=True)
            return spread([F.linear(part, up) for part, up in ups], self.parts, self.out_features) * self.scale

    def _by_kind(self, x: Tensor, h: Tensor, kinds: Tensor, segments: Segments | None) -> Tensor:
        media = kinds == MEDIA
        # All tokens through both, which are narrow: sizes stay known without asking the device, and on every rank both
        # have a gradient, also of texts without images.
        of_image = media if segments is None else segments.join(media)
        h = torch.where(of_image[..., None], F.linear(x, self.A_image), h)
        if not self.attention:
            return h
        rows = h if segments is None else segments.split(h)
        read = torch.stack([kinds == kind for kind in self.read]).any(0)
        attended = question_attention(rows, media, read, len(self.parts))
        return h + self.attention * (attended if segments is None else segments.join(attended))


class MokaLinear(nn.Module, SiteLayer):
    """A frozen Linear or Conv1D with MokA's paths beside it, one for each adapter."""

    adapter_layer_names = ("moka",)

    def __init__(self, base: nn.Module, adapter_name: str):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.moka = nn.ModuleDict()

    def update_layer(self, adapter_name: str, parts: Parts, config: MokaConfig, path: str) -> None:
        """Add an adapter. `path` names this projection in error messages."""
        self.path = path
        self.moka[adapter_name] = MokaDelta(base_layer(self), parts, config).train(self.base_layer.training)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        """(B, L, d) -> (B, L, out); reads the condition of the running forward."""
        frozen = self._frozen()
        out = self.base_layer(x, *args, **kwargs)
        active = [] if frozen else [name for name in self.active_adapters if name in self.moka]
        if active:
            kinds, segments = kinds_for(x, self.path)
            for name in active:
                added = self.moka[name](x, kinds, segments)
                out = out + added if added.dtype == out.dtype else (out + added).to(out.dtype)
        return out


def kinds_for(x: Tensor, path: str) -> tuple[Tensor | None, Segments | None]:
    """Kinds of the tokens that the layer at `path` reads, see `MokaDelta.forward`.

    A token that is generated is text, and so are all after the prompt where nothing is cached.

    Raises:
        BadInput: nothing was published, or these are tokens of which it is not known where they stand.
    """
    condition = current()
    kinds = None if condition is None else condition.token_kinds()
    if condition is None or kinds is None:
        raise BadInput(
            f"{path}: moka needs to know which tokens are of an image, but no condition says so. Use backbone mllm or "
            "vision_text_decoder, or run the forward inside "
            "mmpeft_ds.sites.condition.conditioned(Condition(kinds=...)); with activation checkpointing, turn it on "
            "with mmpeft_ds.sites.condition.enable_checkpointing."
        )
    if x.dim() == 3:
        rows, length = x.shape[:2]
        segments, all_kinds = condition.segments, kinds
        if segments is not None and (rows, length) == (1, sum(segments.lengths)):
            return kinds, segments
        if length == 1 != kinds.shape[1]:
            return None, None
        if segments is None:
            all_kinds = condition.token_kinds(rows)
        if all_kinds.shape[1] <= length and all_kinds.shape[0] == rows:
            return F.pad(all_kinds, (0, length - all_kinds.shape[1]), value=OTHER), None
    raise BadInput(
        f"{path}: moka has kinds of {' x '.join(map(str, kinds.shape))} tokens and gets an input of shape "
        f"{' x '.join(map(str, x.shape))}. It reads a whole prompt, in projections that see all tokens in order: "
        "generate without prefill in chunks and without an assistant, and leave experts out of `targets`."
    )
