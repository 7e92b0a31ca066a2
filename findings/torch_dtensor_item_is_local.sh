#!/usr/bin/env bash
# torch, FSDP2: norm, sum, mean or largest value of a sharded parameter, read by .item(), is that of one rank's part.
#
# A good guess: a DTensor stands for the whole tensor, as its shape and numel() do, so weight.grad.norm().item() is the norm.
# What happens: such a reduction is a DTensor with the placement Partial, whose sum over ranks is still to be done, and item(),
#   float() and tolist() read the local part without doing it. Each rank gets another number, the norm is too small by about
#   the root of the rank count, a weight penalty by the count. full_tensor() is right, and so are clip_grad_norm_,
#   get_total_norm and isnan().any().
# Source: torch.distributed.tensor._sharding_prop.ShardingPropagator, which passes aten._local_scalar_dense by before any placement
#   is looked at; its own rule in _ops._tensor_ops would allow replicated input only.
# Who is hurt: logged norms, distances from the start, penalties, early stops and skipped steps by a threshold, of which some ranks
#   see one side and some the other.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 numpy==2.4.6

in_ranks 2 <<'PY'
import copy
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
torch.manual_seed(0)
whole = torch.nn.Linear(8, 8)
model = copy.deepcopy(whole)
fully_shard(model, mesh=mesh)
batch = torch.randn(4, 8)
for each in (whole, model):
    each(batch).square().sum().backward()
weight, right = model.weight, whole.weight
measures = {"grad.norm()": lambda w: w.grad.norm(), "sum()": lambda w: w.sum(), "mean()": lambda w: w.mean(),
            "abs().max()": lambda w: w.abs().max(), "square().sum()": lambda w: w.square().sum()}
numbers = {name: (measure(weight).item(), measure(weight).full_tensor().item(), measure(right).item(),
                  str(measure(weight).placements[0])) for name, measure in measures.items()}
total = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()
gathered = [None, None]
dist.all_gather_object(gathered, numbers)
if dist.get_rank() == 0:
    print(f"shape {tuple(weight.shape)}, numel() {weight.numel()} on each of two ranks")
    for name in measures:
        (first, full, exact, placement), (second, *_) = gathered[0][name], gathered[1][name]
        print(f"weight.{name}.item(): rank 0 {first:.4f}, rank 1 {second:.4f}; full_tensor() {full:.4f}, unsharded {exact:.4f} "
              f"({placement})")
        assert abs(full - exact) < 1e-5 and abs(first - second) > 1e-3 and max(abs(first - exact), abs(second - exact)) > 1e-3
    exact = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters()]).item()
    print(f"get_total_norm of all gradients: {total:.4f}, unsharded {exact:.4f}")
    assert abs(total - exact) < 1e-4 and gathered[0]["grad.norm()"][0] < 0.9 * gathered[0]["grad.norm()"][2]
dist.destroy_process_group()
PY
