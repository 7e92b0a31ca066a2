"""A tiny model of a family beside the stock class of transformers, which is fed by the family's own processor."""

from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options


def made(folder, **options):
    """The backbone and its model, for evaluation."""
    backbone = ENTRY(Options(folder, **options), None)
    backbone.attention = "eager"
    backbone.check()
    return backbone, backbone.build().eval()


def stock(folder, backbone):
    """The stock class with the same weights, for evaluation."""
    stock_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(backbone._config)]
    return stock_class.from_pretrained(folder, attn_implementation="eager").eval()


def processed(backbone, text, answer=True, **media):
    """What the processor makes of one conversation, without its answer for generation.

    Args:
        text: with its numbers of images and videos.
        media: what the processor takes beside it; nothing where there are no images and videos.
    """
    messages, words = backbone._chat._messages(text), backbone._tokenizer
    rendered = words.apply_chat_template(
        messages if answer else messages[:-1],
        chat_template=backbone._chat.template,
        tokenize=False,
        add_generation_prompt=not answer,
    )
    if answer and words.eos_token not in rendered:
        rendered = rendered.rstrip() + words.eos_token
    if not media:
        plain = words([rendered], return_tensors="pt")
        return {name: plain[name] for name in ("input_ids", "attention_mask")}
    return dict(backbone._processor(text=[rendered], return_tensors="pt", **media))
