"""PaliGemma: image and question see each other, the answer is causal, which its kinds of tokens say."""

from __future__ import annotations

from torch import Tensor
from transformers import PretrainedConfig

from mmpeft_ds.backbones.mllm.families.base import Family
from mmpeft_ds.ops.finished_logits import Finish


class PaliGemma(Family):
    """Prefix and answer."""

    model_types = ("paligemma",)
    unpackable = ""
    first_position = 1
    finishes = {"paligemma": lambda text: Finish(cap=getattr(text, "final_logit_softcapping", None))}  # of Gemma 2
    one_turn = "it sees its question from both sides, and a later one would show it an answer before that is given"
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% endif %}"
        "{% endfor %}{% if loop.first %}{{ bos_token }}{% endif %}{% for c in m['content'] %}"
        "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{% if m['role'] != 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
    )

    def looks_ahead(self, config: PretrainedConfig) -> bool:
        return True

    def token_types(self, media_tokens: Tensor, labels: Tensor | None) -> Tensor:
        """0 for what is read, 1 for the answer."""
        return media_tokens * 0 if labels is None else (labels != -100).long()


ENTRY = PaliGemma()
