#!/usr/bin/env bash
# transformers Trainer: for many models the gradient is multiplied by the accumulation steps and by the number of ranks.
#
# A good guess: eight samples give one and the same step, be they one batch, four batches accumulated, or spread over ranks.
# What happens: the trainer leaves the division by accumulation steps and ranks to every model whose forward takes **kwargs, and
#   passes num_items_in_batch along. In this version nearly all take **kwargs, and many have a loss of their own that never reads
#   that number: ViLT, the image classifier of CLIP, T5, BERT's classifiers (a search of the source finds some 380 classes). With
#   4 steps on 2 ranks their gradient, and the loss in the log, are 8 times too large. LLaMA's loss reads the number and is right.
#   Adam hides the factor; clipping by norm, SGD and every comparison of losses do not.
# Source: transformers.Trainer.__init__ (model_accepts_loss_kwargs, from the signature alone), training_step and compute_loss
#   (`loss *= num_processes`, average_tokens_across_devices); the models' forward, as in ViltForQuestionAnswering.
# Who is hurt: visual question answering, image and text classifiers, T5: their step depends on how the batch was cut up.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 pillow==13.0.0

script=$(cat <<'PY'
import torch
from transformers import (BertConfig, BertForSequenceClassification, CLIPConfig, CLIPForImageClassification, LlamaConfig,
                          LlamaForCausalLM, PrinterCallback, T5Config, T5ForConditionalGeneration, Trainer,
                          TrainingArguments, ViltConfig, ViltForQuestionAnswering)

STEPS, SAMPLES = 4, 8
tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
picture = {"image_size": 32, "patch_size": 16, **tower}
torch.manual_seed(0)
images, texts, classes = torch.randn(SAMPLES, 3, 32, 32), torch.randint(1, 20, (SAMPLES, 6)), torch.randint(0, 3, (SAMPLES,))
cases = {
    "ViltForQuestionAnswering": (
        lambda: ViltForQuestionAnswering(ViltConfig(vocab_size=20, num_labels=3, **picture, **still)),
        {"pixel_values": images, "input_ids": texts, "labels": torch.eye(3)[classes]}),
    "CLIPForImageClassification": (
        lambda: CLIPForImageClassification(CLIPConfig(vision_config=picture, text_config={"vocab_size": 20, **tower}, num_labels=3)),
        {"pixel_values": images, "labels": classes}),
    "T5ForConditionalGeneration": (
        lambda: T5ForConditionalGeneration(T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                                                    dropout_rate=0.0, decoder_start_token_id=0)),
        {"input_ids": texts, "labels": texts}),
    "BertForSequenceClassification": (
        lambda: BertForSequenceClassification(BertConfig(vocab_size=20, num_labels=3, **tower, **still)),
        {"input_ids": texts, "labels": classes}),
    "LlamaForCausalLM": (lambda: LlamaForCausalLM(LlamaConfig(vocab_size=20, **tower)), {"input_ids": texts, "labels": texts})}
flat = lambda tensors: torch.cat([tensor.detach().flatten().clone() for tensor in tensors])

def step(model, data, accumulation):
    before = flat(model.parameters())
    arguments = TrainingArguments(output_dir="out", max_steps=1, gradient_accumulation_steps=accumulation, max_grad_norm=0,
                                  optim="sgd", learning_rate=1e-3, lr_scheduler_type="constant", use_cpu=True, save_strategy="no",
                                  report_to=[], disable_tqdm=True, logging_steps=1)
    arguments.per_device_train_batch_size = SAMPLES // accumulation // arguments.world_size
    rows = [{name: values[i] for name, values in data.items()} for i in range(SAMPLES)]
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return (before - flat(model.parameters())).norm() / 1e-3, trainer.state.log_history[0]["loss"], arguments

for name, (build, data) in cases.items():
    torch.manual_seed(1)
    model = build()
    whole = model(**data).loss
    right = flat(torch.autograd.grad(whole, model.parameters(), allow_unused=True, materialize_grads=True)).norm()
    for accumulation in (1, STEPS):
        torch.manual_seed(1)
        length, logged, arguments = step(build(), data, accumulation)
        factor, ranks = float(length / right), arguments.world_size
        if arguments.process_index == 0:
            print(f"{name}, {ranks} rank(s), {accumulation} accumulation step(s), {SAMPLES} samples in all: gradient {factor:.2f} times "
                  f"that of the batch as a whole; loss logged {logged:.3f}, of the whole batch {float(whole):.3f}")
        assert abs(factor - (1 if name == "LlamaForCausalLM" else accumulation * ranks)) < 0.02 * factor
PY
)
for ranks in 1 2; do in_ranks $ranks <<< "$script"; done
