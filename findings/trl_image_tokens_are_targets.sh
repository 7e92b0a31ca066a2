#!/usr/bin/env bash
# trl: SFTTrainer on conversations with images trains the model to predict the image placeholders.
#
# A good guess: the loss covers text; the placeholder tokens that stand for an image's patches, whose embeddings are replaced
#   before the first layer, are no targets, as padding is none.
# What happens: with "messages" and the default settings every token that is no padding is a target, the placeholders too. LLaVA
#   at 336 pixels has 576 of them, so that an answer of three tokens makes up half a percent of the loss: loss and token
#   accuracy look fine after a few steps, and the answers are hardly learnt. With "prompt" and "completion", the default covers
#   the completion alone; `assistant_only_loss=True` helps too.
# Source: trl.trainer.sft_trainer.DataCollatorForVisionLanguageModeling._collate_language_modeling.
# Who is hurt: tuning of vision-language models on chat data, the longer the image's tokens against the answers the more.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor,
                          PreTrainedTokenizerFast)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from trl import SFTConfig, SFTTrainer

WORDS = ["<pad>", "<end>", "<image>", "user", "assistant", "what", "is", "it", "a", "cat", "dog", "<other>"]
SIDE = 336
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<other>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>",
                                    additional_special_tokens=["<image>"])
processor = LlavaProcessor(
    image_processor=CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}),
    tokenizer=tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    chat_template="{% for turn in messages %}{{ turn['role'] }} {% for part in turn['content'] %}{% if part['type'] == 'image' %}"
                  "<image>{% else %} {{ part['text'] }} {% endif %}{% endfor %}<end> {% endfor %}"
                  "{% if add_generation_prompt %}assistant {% endif %}")
small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=SIDE, patch_size=14, **small),
                     text_config=LlamaConfig(vocab_size=len(WORDS), **small), image_token_index=WORDS.index("<image>"))
question = [{"role": "user", "content": "what is it"}]
answers = [[{"role": "assistant", "content": text}] for text in ("a cat", "a dog")]
pictures = [[Image.new("RGB", (SIDE, SIDE), colour)] for colour in ("white", "black")]
kinds = {"messages": {"messages": [question + answer for answer in answers]},
         "prompt and completion": {"prompt": [question] * 2, "completion": answers}}

def trained(columns):
    torch.manual_seed(0)
    return SFTTrainer(
        model=LlavaForConditionalGeneration(config), processing_class=processor,
        train_dataset=Dataset.from_dict({"images": pictures, **columns}),
        args=SFTConfig(output_dir="out", max_length=None, use_cpu=True, bf16=False, per_device_train_batch_size=2, max_steps=20,
                       learning_rate=3e-3, lr_scheduler_type="constant", logging_steps=20, save_strategy="no", report_to=[],
                       disable_tqdm=True))

trainers = {kind: trained(columns) for kind, columns in kinds.items()}
answer_batch = next(iter(trainers["prompt and completion"].get_train_dataloader()))
targets = {}
for kind, trainer in trainers.items():
    labels = next(iter(trainer.get_train_dataloader()))["labels"]
    row = labels[0][labels[0] != -100].tolist()
    targets[kind] = (len(row), row.count(WORDS.index("<image>")), processor.decode(row[-3:]))
    trainer.train()
    with torch.no_grad():
        loss = trainer.accelerator.unwrap_model(trainer.model)(**answer_batch).loss
    print(f"{kind}: {targets[kind][0]} targets of a sample, {targets[kind][1]} of them placeholders, the last ones {targets[kind][2]!r}; "
          f"after 20 steps the loss of the answers is {float(loss):.2f}, logged token accuracy "
          f"{trainer.state.log_history[0]['mean_token_accuracy']:.2f}")
assert targets["messages"][:2] == (585, 576) and targets["prompt and completion"][:2] == (3, 0)
PY
