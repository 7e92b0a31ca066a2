#!/usr/bin/env bash
# transformers: BlipForQuestionAnswering cannot be given labels with -100; padding of shorter answers counts in its loss.
#
# A good guess: labels are masked with -100 as everywhere, and the model makes its decoder's inputs of them.
# What happens: without decoder_input_ids the labels themselves become the decoder's inputs, so -100 is looked up in the word table: an
#   IndexError. With the padding token in its place padding is predicted and counted: the loss of an answer depends on the longest answer beside it. Passing both, padded decoder_input_ids and masked labels, works.
# Source: transformers.models.blip.modeling_blip.BlipForQuestionAnswering.forward (decoder_input_ids = labels).
# Who is hurt: VQA fine-tuning of BLIP in batches: most of the loss of short answers is that of their padding.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0

observe <<'PY'
import torch
from transformers import BlipConfig, BlipForQuestionAnswering

sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
text = dict(sizes, vocab_size=32, encoder_hidden_size=16, bos_token_id=1, sep_token_id=2, pad_token_id=0)
torch.manual_seed(0)
model = BlipForQuestionAnswering(BlipConfig(text_config=text, vision_config=dict(sizes, image_size=16, patch_size=8), projection_dim=8)).eval()
inputs = dict(pixel_values=torch.randn(1, 3, 16, 16), input_ids=torch.tensor([[5, 6, 7]]))
answer = [1, 9, 2]

def loss(labels, **more):
    return model(**inputs, labels=torch.tensor([labels]), **more).loss.item()

alone, padded = loss(answer), loss(answer + [0] * 5)
try:
    loss(answer + [-100] * 5)
    masked = "works"
except IndexError as error:
    masked = f"IndexError: {error}"
both = loss(answer + [-100] * 5, decoder_input_ids=torch.tensor([answer + [0] * 5]))
print(f"loss of one answer: alone {alone:.4f}, padded by five tokens {padded:.4f}, masked and decoder_input_ids {both:.4f}")
print("masked alone:", masked)
assert masked.startswith("IndexError") and abs(padded - alone) > 1e-3 and abs(both - alone) < 1e-5
PY
