"""PaliGemma: image and question see each other, the answer is causal, which its kinds of tokens say."""

from __future__ import annotations

from torch import Tensor

from mmpeft_ds.backbones.mllm.families.base import Family


class PaliGemma(Family):
    """Prefix and answer."""

    model_types = ("paligemma",)
    template = (
        "{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}{{ '<image>' }}{% endif %}"
        "{% endfor %}{% if loop.first %}{{ bos_token }}{% endif %}{% for c in m['content'] %}"
        "{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}"
        "{% if m['role'] != 'assistant' %}{{ '\n' }}{% endif %}{% endfor %}"
    )

    def token_types(self, image_tokens: Tensor, labels: Tensor | None) -> Tensor:
        """0 for what is read, 1 for the answer."""
        return image_tokens * 0 if labels is None else (labels != -100).long()


ENTRY = PaliGemma()
