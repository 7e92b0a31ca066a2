#!/usr/bin/env bash
# bitsandbytes on a CPU with AVX-512 BF16: once a 4-bit layer has been evaluated, training goes on without gradients below it.
#
# A good guess: eval() and train() change dropout alone; a step of QLoRA after an evaluation has the gradients of one before it.
# What happens: the first forward in evaluation whose input needs no gradient packs the weights anew for a kernel that has no
#   backward pass. train() does not undo it: outputs are rounded to bfloat16 from then on, and everything below the layer gets the
#   gradient None. torch warns once (gemv_4bit: an autograd kernel was not registered); the loss still falls by what lies above.
# Source: bitsandbytes.nn.Linear4bit.forward (packs where not self.training), bitsandbytes.autograd._functions.matmul_4bit.
# Who is hurt: QLoRA on CPUs with an evaluation before or between the epochs: adapters of lower layers stop training. The same code on an
#   older CPU or a GPU trains all.
. "$(dirname "$0")/_lib.sh"
grep -qw avx512_bf16 /proc/cpuinfo || { echo "this CPU has no AVX-512 BF16, where this shows"; exit $NOT_RUN; }
pins torch==2.13.0 bitsandbytes==0.50.2

observe <<'PY'
import torch, bitsandbytes as bnb

torch.manual_seed(0)
quantised = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
model = torch.nn.Sequential(torch.nn.Linear(64, 64), quantised, torch.nn.Linear(64, 1))
batch = torch.randn(4, 64)

def step():
    model.train().zero_grad()
    output = model(batch)
    output.sum().backward()
    return output.detach(), [name for name, p in model.named_parameters() if p.requires_grad and p.grad is not None]

output, before = step()
again, _ = step()
assert torch.equal(output, again)
model.eval()
with torch.no_grad():
    model(batch)
changed, after = step()
print("trained parameters that get a gradient, before any evaluation:", *before)
print("and after one:                                              ", *after)
print(f"outputs of the training step differ by {(changed - output).abs().max():.1e}")
assert before == ["0.weight", "0.bias", "2.weight", "2.bias"] and after == ["2.weight", "2.bias"]
assert (changed - output).abs().max() > 1e-4
PY
