"""CoOp: learned context vectors in front of the class names (Zhou et al., IJCV 2022, arXiv 2109.01134).

The vectors enter where the text tower embeds its tokens, so class features go through the frozen text tower again in
every step, and the gradient comes back through it.
"""

# B rows, C classes, L tokens of a prompt, n context vectors, d width of the token embedding, D of the features

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.common.config import HeadConfig
from mmpeft_ds.methods.common.few_shot import cosine_logits
from mmpeft_ds.methods.common.head import HeadLayer, HeadMethod, HeadTuner, feature_site
from mmpeft_ds.methods.common.layers import SiteLayer
from mmpeft_ds.methods.common.text_head import TextTowerHead, names_and_tokeniser, path_of, tower_of
from mmpeft_ds.methods.coop.options import CoOpOptions
from mmpeft_ds.ops.precision import full_dtype
from mmpeft_ds.sites import Sites, find_sites
from mmpeft_ds.sites.base import base_layer
from mmpeft_ds.sites.feature_site import Features, Scores

MARK = "X"  # stands for a context vector when prompts are tokenised; one token in every vocabulary


@dataclass
class CoOpConfig(CoOpOptions, HeadConfig):
    """CoOpOptions as a peft config."""


@dataclass(frozen=True)
class Prompts:
    """Tokens of all classes and where context vectors stand.

    Attributes:
        tokens: arguments of the text tower, each (C, L).
        place: (C, L) int64, number of the context vector at each token; -1 where the token's own embedding stays.
    """

    tokens: dict[str, Tensor]
    place: Tensor

    @classmethod
    def of(cls, names: list[str], tokenise: Callable[[list[str]], dict[str, Tensor]], config: CoOpConfig) -> Prompts:
        """[first tokens] n vectors, class name, `.` [last tokens]; or the name in their middle.

        Raises:
            BadInput: a prompt is longer than the text tower takes.
        """
        n = config.context
        marks = " ".join([MARK] * n)
        # special tokens before the text: what the tokens of nothing and of something have in common
        nothing, something = tokenise(["", f"{MARK} {MARK}"])["input_ids"]
        first = int((nothing == something).long().cumprod(0).sum())
        made = tokenise([f"{marks} {name}." for name in names])
        ids, total = made["input_ids"], _lengths(made)
        alone = _lengths(tokenise([f"{name}." for name in names]))
        if total is not None and bool((total != alone + n).any()):
            longest = int(alone.argmax())
            raise BadInput(
                f"coop: context: {n} vectors and the class {names[longest]!r} need {int(alone[longest]) + n} tokens, "
                f"but texts are cut at {int(total.max())}. Use fewer vectors, or a larger max_text_length."
            )
        place = torch.full_like(ids, -1)
        place[:, first : first + n] = torch.arange(n)
        if config.position == "middle":
            if total is None:
                raise BadInput("coop: position: middle needs a text tower that masks its padding. Use end.")
            name_length = alone - _lengths(tokenise(["."]))
            order = torch.stack([_name_between(ids.shape[1], first, n, int(k)) for k in name_length])
            made = {key: rows.gather(1, order) for key, rows in made.items()}
            place = place.gather(1, order)
        return cls(dict(made), place)


def _lengths(tokens: dict[str, Tensor]) -> Tensor | None:
    """(C,) tokens that count; None where the tower attends to its padding."""
    return tokens["attention_mask"].sum(1) if "attention_mask" in tokens else None


def _name_between(length: int, first: int, n: int, name: int) -> Tensor:
    """(L,) order of the tokens that puts the second half of n marks after a name of so many tokens."""
    half = first + n // 2
    before, second = torch.arange(half), torch.arange(half, first + n)
    named, rest = torch.arange(first + n, first + n + name), torch.arange(first + n + name, length)
    return torch.cat([before, named, second, rest])


class Context(nn.Module):
    """The learned vectors of one adapter: `vectors` (n, d), or (C, n, d) if each class has its own."""

    def __init__(self, shape: tuple[int, ...], std: float, like: Tensor):
        super().__init__()
        dtype = full_dtype(like.dtype)
        self.vectors = nn.Parameter(std * torch.randn(shape, dtype=dtype).to(like.device))

    def forward(self, embedded_CLd: Tensor, place_CL: Tensor) -> Tensor:
        """`embedded` with vectors at their places."""
        vectors = self.vectors.to(embedded_CLd.dtype)
        at = place_CL.clamp(min=0)
        if vectors.dim() == 2:
            chosen = vectors[at]
        else:
            chosen = vectors.gather(1, at.unsqueeze(2).expand(-1, -1, vectors.shape[2]))
        return torch.where((place_CL >= 0).unsqueeze(2), chosen, embedded_CLd)


@dataclass(frozen=True)
class _Insertion:
    """Positions of context vectors in the tokens that are about to be embedded."""

    adapter: str
    place: Tensor


_insertion: contextvars.ContextVar[_Insertion | None] = contextvars.ContextVar("mmpeft_ds_coop", default=None)


@contextlib.contextmanager
def inserting(adapter: str, place: Tensor) -> Iterator[None]:
    """Texts embedded in here are class prompts; all others, captions for example, are embedded as they are."""
    token = _insertion.set(_Insertion(adapter, place))
    try:
        yield
    finally:
        _insertion.reset(token)


class PromptedEmbedding(nn.Module, SiteLayer):
    """The token embedding of the text tower and a context per adapter, `PATH.coop_context.ADAPTER.vectors`."""

    adapter_layer_names = ("coop_context",)

    def __init__(self, base: nn.Module, adapter_name: str):
        nn.Module.__init__(self)
        SiteLayer.__init__(self, base, adapter_name)
        self.coop_context = nn.ModuleDict()

    @property
    def weight(self) -> nn.Parameter:
        """The frozen table."""
        return self.base_layer.weight

    def forward(self, ids: Tensor) -> Tensor:
        embedded = self.base_layer(ids)
        insertion = _insertion.get()
        if insertion is None or self._disable_adapters:
            return embedded
        return self.coop_context[insertion.adapter](embedded, insertion.place)


class CoOpHead(TextTowerHead):
    """logits = tau u(z) u(t)^T, t the text features of the prompts.

    Args:
        encoder: the frozen dual encoder.
        adapter: whose context is inserted.
    """

    def __init__(self, config: CoOpConfig, base: nn.Module, encoder: nn.Module, prompts: Prompts, adapter: str):
        super().__init__(config, base, encoder, prompts.tokens)
        self.adapter = adapter
        self.register_buffer("place", prompts.place, persistent=False)

    def inserting(self) -> contextlib.AbstractContextManager[None]:
        return inserting(self.adapter, self.place)

    def forward(self, features: Features) -> Scores:
        return Scores(cosine_logits(features.image, self.text, self.logit_scale))

    @torch.no_grad()
    def export(self) -> dict[str, Tensor]:
        """`text` (C, D) and `scale`: logits = scale u(z) u(text)^T, without a text tower."""
        text = self._through_the_tower()
        return {"text": text, "scale": text.new_tensor(self.logit_scale)}


class CoOpTuner(HeadTuner):
    """Tuner with the verbs of every peft tuner; it wraps the scorer, and the token embedding of the text tower."""

    prefix = "coop_"
    head_class = CoOpHead

    def places(self, config: CoOpConfig, model: nn.Module) -> dict[str, Any]:
        sites = find_sites(model)
        site, tower = feature_site(config, sites), tower_of("coop", sites, "text")
        names, tokenise = names_and_tokeniser("coop", model)
        with torch.device("cpu"):  # also for a model on meta, whose sizes are only counted
            prompts = Prompts.of(names, tokenise, config)
        embedding = model.get_submodule(tower).get_input_embeddings()
        return {site.path: (model.encoder, prompts), path_of(model, embedding): len(names)}

    def wrap(self, config: CoOpConfig, adapter_name: str, target: nn.Module, place: Any, path: str) -> nn.Module:
        if isinstance(place, int):
            layer = target if isinstance(target, PromptedEmbedding) else PromptedEmbedding(target, adapter_name)
            table = base_layer(layer)
            shape = (config.context, table.embedding_dim)
            shape = (place, *shape) if config.class_specific else shape
            layer.coop_context[adapter_name] = Context(shape, config.init_std, table.weight)
        else:
            layer = target if isinstance(target, HeadLayer) else HeadLayer(target, adapter_name, self.prefix)
            layer.heads[adapter_name] = CoOpHead(config, base_layer(layer), *place, adapter_name)
        layer.set_adapter(layer.active_adapters, inference_mode=config.inference_mode)
        return layer


class CoOp(HeadMethod):
    """The method entry: what recipes and the engine use."""

    Options = CoOpOptions
    Config = CoOpConfig
    Tuner = CoOpTuner
    reads_names = True
    tables = (".vectors",)

    @classmethod
    def check(cls, config: CoOpConfig, sites: Sites, condition_width: int | None) -> None:
        """Raise BadInput where there are no features to score, or no text encoder."""
        feature_site(config, sites)
        tower_of("coop", sites, "text")


ENTRY = CoOp
