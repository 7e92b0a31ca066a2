#!/usr/bin/env bash
# pytorch-metric-learning: DistributedLossWrapper multiplies the loss by the rank count, and efficient=True changes every gradient.
#
# A good guess: on N ranks the loss is that of the whole batch on one, and `efficient` saves work for the same gradients under DDP.
# What happens: the value handed back is N times the loss, which makes DDP's average right where every rank computes the whole loss
#   (efficient=False: gradients are exact). With efficient=True a rank takes its own embeddings as anchors only, others' come without
#   gradients, and the factor stays: gradients here are 1.5 to 1.6 times as long and point 13 to 18 degrees elsewhere.
# Source: pytorch_metric_learning.utils.distributed.DistributedLossWrapper.forward_regular_loss (loss * world_size).
# Who is hurt: curves that are compared between rank counts; contrastive tuning with efficient=True and SGD, clipping or a tuned rate.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 pytorch-metric-learning==2.9.0

in_ranks 2 <<'PY'
import torch, torch.distributed as dist
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

dist.init_process_group("gloo")
rank = dist.get_rank()

def compare(kind, efficient):
    torch.manual_seed(0)
    inputs, labels = torch.randn(16, 6), torch.arange(16) % 4
    model, alone = torch.nn.Linear(6, 4, bias=False), torch.nn.Linear(6, 4, bias=False)
    alone.load_state_dict(model.state_dict())
    mine = slice(8 * rank, 8 * rank + 8)
    averaged = torch.nn.parallel.DistributedDataParallel(model)
    loss = DistributedLossWrapper(kind(), efficient=efficient)(averaged(inputs[mine]), labels[mine])
    loss.backward()
    whole = kind()(alone(inputs), labels)
    whole.backward()
    ours, right = model.weight.grad.flatten(), alone.weight.grad.flatten()
    return loss.item() / whole.item(), (ours.norm() / right.norm()).item(), torch.cosine_similarity(ours, right, 0).item()

for kind in (losses.NTXentLoss, losses.SupConLoss, losses.ContrastiveLoss):
    for efficient in (False, True):
        value, length, cosine = compare(kind, efficient)
        if rank == 0:
            print(f"{kind.__name__}, efficient={efficient}: loss {value:.2f} times, gradient {length:.2f} times as long, cosine {cosine:.3f}")
        if efficient:
            assert value > 1.9 and length > 1.25 and cosine < 0.98
        else:
            assert abs(value - 2) < 1e-4 and abs(length - 1) < 1e-4 and cosine > 0.9999
dist.destroy_process_group()
PY
