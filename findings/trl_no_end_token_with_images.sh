#!/usr/bin/env bash
# trl: SFTTrainer ends plain text answers with the end token, and leaves it out where the data set has images.
#
# A good guess: the same "prompt" and "completion" strings train the same targets, whether a column of images is there or not;
#   for text the trainer adds the end token to every completion that lacks one.
# What happens: that belongs to the preparation of the data set, which is skipped as a whole for images. The same strings, given
#   with images, are used as they are: no target tells the model to stop, and no word about it. Lists of messages are
#   safe as far as the chat template writes the end token.
# Source: trl.trainer.sft_trainer.SFTTrainer.__init__ (`_skip_prepare_dataset`), add_eos in its _prepare_dataset, and
#   DataCollatorForVisionLanguageModeling._collate_prompt_completion.
# Who is hurt: visual question answering and captions kept as plain strings: tuned models run on to max_new_tokens.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
                          PreTrainedTokenizerFast)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import SFTConfig, SFTTrainer

WORDS = ["<pad>", "<end>", "<image>", "what", "is", "it", "a", "cat", "dog", "<other>"]
SIDE = 28
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<other>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>",
                                    additional_special_tokens=["<image>"])
processor = LlavaProcessor(
    image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
    tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1)
small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=14, **small),
                     text_config=LlamaConfig(vocab_size=len(WORDS), **small), image_token_index=WORDS.index("<image>"))

def targets(columns):
    trainer = SFTTrainer(
        model=LlavaForConditionalGeneration(config), processing_class=processor, train_dataset=Dataset.from_dict(columns),
        args=SFTConfig(output_dir="out", max_length=None, use_cpu=True, bf16=False, per_device_train_batch_size=1, report_to=[]))
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    return processor.decode(labels[labels != -100])

text = targets({"prompt": ["what is it"], "completion": [" a cat"]})
image = targets({"prompt": ["<image> what is it"], "completion": [" a cat"], "images": [[Image.new("RGB", (SIDE, SIDE))]]})
print(f"targets of the completion ' a cat': without images {text!r}, with images {image!r}")
assert text == "a cat <end>" and image == "a cat"
PY
