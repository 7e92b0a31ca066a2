"""Relations of the class graph and the coefficients of their messages; plain values, read without torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of directed edges between classes.

    Attributes:
        sender, receiver: `positive` (class texts), `negative` (negated class texts) or `visual` (class means).
        diagonal: what the edge of a class to itself weighs: `flip` minus the cosine, `keep` the cosine, `remove` 0.
    """

    sender: str
    receiver: str
    diagonal: str


# In the order of the layer. Source of all of this file: HeGraphAdapter, arXiv 2410.07854; see docs/methods/hegraph.md
# for how sure each detail is.
RELATIONS = {
    "pn": Relation("positive", "negative", "flip"),
    "vn": Relation("visual", "negative", "flip"),
    "pp": Relation("positive", "positive", "remove"),
    "vp": Relation("visual", "positive", "keep"),
    "np": Relation("negative", "positive", "flip"),
    "vv": Relation("visual", "visual", "remove"),
}


def in_use(drop: Collection[str] = ()) -> dict[str, Relation]:
    """Relations that have a say when those of `drop` are left out: without `np` nobody reads the negated texts."""
    unread = () if "np" not in drop else ("pn", "vn", "np")
    return {name: relation for name, relation in RELATIONS.items() if name not in drop and name not in unread}


@dataclass(frozen=True)
class Coefficients:
    """Weights of messages and of the two heads.

    Attributes:
        beta_pn, beta_vn: into the negated texts.
        alpha_pp, alpha_vp: into the texts.
        alpha_np, alpha_np_test: from the updated negated texts into the texts, while training and afterwards.
        gamma: of the class shift of the cache.
        visual_loss: lambda, weight of the visual head's cross-entropy.
        fusion: w, weight of the visual head in a prediction.

    The defaults are given, by a secondary source, as the optimum on ImageNet.
    """

    beta_pn: float = 0.5
    beta_vn: float = 0.5
    alpha_pp: float = 0.06
    alpha_vp: float = 0.24
    alpha_np: float = 0.2
    alpha_np_test: float = 0.1
    gamma: float = 0.5
    visual_loss: float = 0.1
    fusion: float = 1.0

    def of_relations(self, training: bool) -> dict[str, float]:
        """Coefficient of each relation's message; `vv` stands for gamma."""
        return {
            "pn": self.beta_pn,
            "vn": self.beta_vn,
            "pp": self.alpha_pp,
            "vp": self.alpha_vp,
            "np": self.alpha_np if training else self.alpha_np_test,
            "vv": self.gamma,
        }
