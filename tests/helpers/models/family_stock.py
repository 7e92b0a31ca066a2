"""A tiny model of a family beside the stock class of transformers, which is fed by the family's own processor."""

import pytest
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from mmpeft_ds.backbones.mllm import patch_products
from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options

# Families whose model reads the kinds of tokens, and whose processor gives them only if it is asked.
ASKED = ("cosmos3_edge",)
# Settings of the processors of LLaVA and LLaVA-NeXT that the files of their checkpoints hold.
OF_LLAVA = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
# Families in which float32 rounds the logits of small random models by more than 2e-6 of the largest.
ROUNDED = dict.fromkeys(
    ("deepseek_vl_hybrid", "llava_next", "minicpmv4_6", "qwen2_5_vl", "qwen2_vl", "qwen4_exp", "step3p7"), 4e-6
) | {"glm5_next": 3e-5}  # 1e-7 in float64
# In float64, from pixels that the processor rounds to float32, the first of these is 2e-6 off.
ROUNDED |= dict.fromkeys(("glm4v", "glm46v", "glmga", "glm4v_moe", "qwen3_5", "qwen3_5_moe"), 2e-5)


def made(folder, **options):
    """The backbone and its model, for evaluation."""
    backbone = ENTRY(Options(folder, **options), None)
    backbone.attention = "eager"
    backbone.check()
    return backbone, backbone.build().eval()


def stock(folder, backbone):
    """The stock class with the same weights, for evaluation.

    Its single patches are multiplied as ours are: `test_patch_products` holds the products against the convolutions in
    float64, and in float32 another order of a sum is rounded otherwise, which these small models make much of.
    """
    stock_class = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(backbone._config)]
    return patch_products.used(stock_class.from_pretrained(folder, attn_implementation="eager").eval())


def tolerance(backbone):
    """Largest difference of logits, as a share of the largest one.

    Patches of whole numbers are standardised by the weights that they are multiplied by, so that float32 rounds other
    terms of the sum; `test_patch_products` holds their features in float64.
    """
    whole = backbone._family.spelled and backbone._channels is not None
    return max(ROUNDED.get(backbone._config.model_type, 2e-6), 8e-6 if whole else 0.0)


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
        read = backbone._processor if backbone._chat.opening else words  # some processors take no text alone
        plain = read(text=[rendered], return_tensors="pt")
        return {name: plain[name] for name in ("input_ids", "attention_mask")}
    if backbone._config.model_type in ASKED:
        media |= {"return_mm_token_type_ids": True}
    if "videos" in media:
        media |= {"return_metadata": True}
    made = dict(backbone._processor(text=[rendered], return_tensors="pt", **media))
    made.pop("video_metadata", None)
    return {  # Llama 4's pixels are of half precision
        name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in made.items()
    }


def of_llava(backbone, pictures, text, answer=True):
    """The same of LLaVA and LLaVA-NeXT, whose processors lack settings that the files of their checkpoints hold, and
    whose answers end with a token that the template does not write."""
    text = text.with_images(len(pictures))
    strategy = {"vision_feature_select_strategy": backbone._config.vision_feature_select_strategy}
    vars(backbone._processor).update(OF_LLAVA | strategy)
    messages = backbone._chat._messages(text)
    rendered = backbone._chat._rendered(messages if answer else messages[:-1], None)[0]
    return dict(backbone._processor(text=[rendered], images=pictures or None, return_tensors="pt"))


def check_against_stock(backbone, out, widened, reference, inputs_of_texts):
    """Hold tokens, logits and losses of every text against the stock class.

    Args:
        out: of the model for all texts together.
        widened: these texts with as many tokens as each image or video has features.
        reference: a model of the stock class.
        inputs_of_texts: number of a text -> what the family's own processor makes of it.
    """
    losses, counts = out.token_losses()
    for i, inputs in inputs_of_texts.items():
        labels = widened.labels[i, : int(widened.attention_mask[i].sum())]
        assert widened.input_ids[i, : len(labels)].tolist() == inputs["input_ids"][0].tolist()
        asked = (labels != -100).nonzero()[:, 0]
        expected = reference(**inputs).logits[0, asked - 1]
        got = out.logits[i][out.labels[i] != -100]
        largest, scale = (got - expected).abs().max(), expected.abs().max()
        assert largest <= tolerance(backbone) * scale, (i, largest / scale)
        loss = torch.nn.functional.cross_entropy(expected, labels[asked], reduction="sum")
        assert (losses[i], counts[i]) == (pytest.approx(loss.item(), rel=tolerance(backbone), abs=1e-5), len(asked))
