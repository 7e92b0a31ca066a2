#!/usr/bin/env bash
# transformers Trainer: eval_loss of a language model depends on the evaluation batch size, though the training loss counts tokens.
#
# A good guess: eval_loss is the mean over the data's target tokens, and perplexity its exponential, whatever
#   per_device_eval_batch_size is; training averages over tokens, since num_items_in_batch came in.
# What happens: evaluation takes each batch's mean, repeats it for the rows of the batch and averages these: an answer of one token
#   weighs as much as the longest of another batch. On rows with 2 and 19 targets the loss moves by ten percent between batches
#   of one row and of all, and so does what load_best_model_at_end and early stopping compare.
# Source: transformers.Trainer.evaluation_loop (loss.repeat(batch_size)) and prediction_step, which passes no num_items_in_batch.
# Who is hurt: perplexities compared between runs or machines with other batch sizes, or with the training loss.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 pillow==13.0.0

observe <<'PY'
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments

ROWS, LENGTH = 8, 20
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
                                     num_attention_heads=2, initializer_range=0.5))
texts = torch.randint(1, 20, (ROWS, LENGTH))
labels = texts.clone()
for i, row in enumerate(labels):
    row[:1 if i % 4 == 0 else LENGTH - 2] = -100
rows = [{"input_ids": text, "labels": label} for text, label in zip(texts, labels)]
with torch.no_grad():
    whole = model(input_ids=texts, labels=labels).loss.item()
seen = {}
for size in (1, 2, ROWS):
    arguments = TrainingArguments(output_dir="out", per_device_eval_batch_size=size, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model, arguments, eval_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    seen[size] = round(trainer.evaluate()["eval_loss"], 3)
print(f"mean loss of the {int((labels != -100).sum())} target tokens {whole:.3f}; eval_loss by per_device_eval_batch_size: {seen}")
assert abs(seen[ROWS] - whole) < 0.01 and abs(seen[1] - whole) > 0.3 and abs(seen[1] - seen[2]) > 0.1
PY
