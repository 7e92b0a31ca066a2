#!/usr/bin/env bash
# transformers, Idefics2: return_assistant_tokens_mask with a picture marks image placeholders in place of the answer.
#
# A good guess: apply_chat_template(..., return_assistant_tokens_mask=True) marks the tokens of the answer, with or without pictures,
#   as it does for LLaVA and every processor that tells where its placeholders stand.
# What happens: the answer's place is counted in characters of the text before each <image> becomes many. The correction needs
#   "text_replacement_offsets", which Idefics2's processor, with a __call__ of its own, does not give out; without them nothing is
#   corrected and nothing is said. The mask falls on the picture's placeholders; without a picture it is right.
# Source: transformers.processing_utils.ProcessorMixin._adjust_assistant_masks_indices and Idefics2Processor.__call__.
# Who is hurt: fine-tuning on answers only: the loss counts tokens of the picture, and no token of the answer.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Idefics2Processor, LlavaProcessor, PreTrainedTokenizerFast

SPECIAL = ["<unk>", "<pad>", "<s>", "</s>", "<image>", "<fake_token_around_image>", "<end_of_utterance>"]
WORDS = [*SPECIAL, "user", "assistant", ":", "what", "is", "this", "a", "red", "bus", "."]
TEMPLATE = """{% for message in messages %}{{ message.role }} : {% for part in message.content %}{% if part.type == 'image' %}<image> {%
elif message.role == 'assistant' %}{% generation %}{{ part.text }}{% endgeneration %}{% else %}{{ part.text }}{% endif %}{% endfor %} {%
endfor %}"""


def tokenizer():
    whole_words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<unk>"))
    whole_words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=whole_words, unk_token="<unk>", pad_token="<pad>", bos_token="<s>",
                                   eos_token="</s>", additional_special_tokens=SPECIAL[4:])


def marked(processor, pictures):
    question = [{"type": "image", "image": Image.new("RGB", (64, 64))}] * pictures + [{"type": "text", "text": "what is this"}]
    answer = [{"type": "text", "text": "a red bus ."}]
    chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    made = processor.apply_chat_template(
        chat, chat_template=TEMPLATE, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    return [WORDS[int(token)] for token, mask in zip(made["input_ids"][0], made["assistant_masks"][0]) if mask]


llava = LlavaProcessor(transformers.CLIPImageProcessorPil(), tokenizer(), patch_size=14, vision_feature_select_strategy="default",
                       num_additional_image_tokens=1)
idefics2 = Idefics2Processor(transformers.Idefics2ImageProcessorPil(), tokenizer(), image_seq_len=8)
answer = ["a", "red", "bus", "."]
for name, processor in (("LLaVA", llava), ("Idefics2", idefics2)):
    print(f"{name}: marked without a picture {marked(processor, 0)}, with one {marked(processor, 1)}")
    assert marked(processor, 0) == answer
assert marked(llava, 1) == answer and set(marked(idefics2, 1)) == {"<image>"}
PY
