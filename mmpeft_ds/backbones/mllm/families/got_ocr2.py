"""GOT-OCR 2: its checkpoint has no chat template, since its processor writes the conversation itself; several pages
stand between one pair of tokens there."""

from __future__ import annotations

from mmpeft_ds.backbones.mllm.families.base import Family


class GotOcr2(Family):
    """Turns as the processor marks them."""

    model_types = ("got_ocr2",)
    unpackable = ""
    template = (
        "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou should follow the instructions carefully "
        "and explain your answers in detail.<|im_end|>' }}{% endif %}{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' }}{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
        "{% else %}{% if loop.first or loop.previtem['type'] == 'text' %}{{ '<img>' }}{% endif %}{{ '<imgpad>' }}"
        "{% if loop.last or loop.nextitem['type'] == 'text' %}{{ '</img>\n' }}{% endif %}{% endif %}{% endfor %}"
        "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


ENTRY = GotOcr2()
