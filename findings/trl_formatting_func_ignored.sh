#!/usr/bin/env bash
# trl: SFTTrainer ignores formatting_func where the rows have a column "messages", "conversations", or "prompt".
#
# A good guess: what formatting_func returns is the text that is trained on; its documentation says that it converts the data.
# What happens: the text is put into a column "text" beside the others, and the next steps look at the others first: a row with
#   "messages" or "conversations" is rendered by the chat template, one with "prompt" and "completion" (and
#   completion_only_loss=False) is joined. The function runs for every row, its progress bar says "Applying formatting
#   function", and its result is thrown away. With columns of any other name it is used.
# Source: trl.trainer.sft_trainer.SFTTrainer._prepare_dataset (the map of formatting_func keeps all columns; tokenize_fn).
# Who is hurt: whoever changes the template, adds a system text or drops turns by formatting_func on data of the common names.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 trl==1.16.0 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import datasets
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

datasets.disable_progress_bars()
WORDS = ["<pad>", "<end>", "user", "assistant", "question", "answer", "FORMATTED:", "<other>"]
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<other>"))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")
tokenizer.chat_template = "{% for turn in messages %}{{ turn['role'] }} {{ turn['content'] }} <end> {% endfor %}"
config = LlamaConfig(vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
calls = []

def trained_text(columns, **options):
    def write(row):
        calls.append(row)
        return "FORMATTED: question answer"
    trainer = SFTTrainer(
        model=LlamaForCausalLM(config), processing_class=tokenizer, train_dataset=datasets.Dataset.from_dict(columns),
        formatting_func=write, args=SFTConfig(output_dir="out", use_cpu=True, bf16=False, report_to=[], **options))
    return tokenizer.decode(trainer.train_dataset[0]["input_ids"])

turns = [("user", "question"), ("assistant", "answer")]
seen = {
    "question, reply": trained_text({"question": ["question"], "reply": ["answer"]}),
    "messages": trained_text({"messages": [[{"role": role, "content": text} for role, text in turns]]}),
    "conversations": trained_text({"conversations": [[{"from": role, "value": text} for role, text in turns]]}),
    "prompt, completion": trained_text({"prompt": ["question"], "completion": [" answer"]}, completion_only_loss=False)}
for columns, text in seen.items():
    print(f"columns {columns}: trained on {text!r}")
print("calls of formatting_func:", len(calls))
assert {columns: "FORMATTED:" in text for columns, text in seen.items()} == {
    "question, reply": True, "messages": False, "conversations": False, "prompt, completion": False}
assert len(calls) >= 4
PY
