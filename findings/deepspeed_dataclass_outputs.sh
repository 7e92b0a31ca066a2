#!/usr/bin/env bash
# DeepSpeed, ZeRO 3: a module that returns a dataclass trains forward and fails in backward on an empty weight.
#
# A good guess: what a submodule returns is its own affair; a dataclass (or any object with tensors) works as a tuple does.
# What happens: forward works, with one warning among the log lines. Backward needs the submodule's weight, which is still
#   split: "mat2 must be a matrix" or a similar message about a shape that names neither DeepSpeed nor the module. Tuples,
#   lists and dicts work (the outputs of transformers are dicts), and so does the dataclass at stage 2.
# Source: deepspeed.runtime.zero.parameter_offload, which hooks backward onto tensors found by
#   deepspeed.runtime.zero.utils.apply_to_tensors_only: tuples, lists and dicts only.
# Who is hurt: authors of adapters, heads and composed models: tests on small models and at stages 0 to 2 pass.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 2 <<'PY'
import dataclasses, torch, deepspeed

@dataclasses.dataclass
class Out:
    hidden: torch.Tensor

class Inner(torch.nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap, self.linear = wrap, torch.nn.Linear(6, 6)

    def forward(self, x):
        return self.wrap(x @ self.linear.weight)

class Outer(torch.nn.Module):
    def __init__(self, wrap, unwrap):
        super().__init__()
        self.first, self.inner, self.unwrap = torch.nn.Linear(6, 6), Inner(wrap), unwrap

    def forward(self, x):
        return self.unwrap(self.inner(self.first(x)))

deepspeed.init_distributed("gloo", verbose=False)

def train(wrap, unwrap, stage):
    config = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {
        "stage": stage, "stage3_param_persistence_threshold": 0, "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}}
    with deepspeed.zero.Init(config_dict_or_path=config, enabled=stage == 3):
        model = Outer(wrap, unwrap)
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=config)
    try:
        engine.backward(engine(torch.ones(4, 6)).square().mean())
        engine.step()
    except RuntimeError as error:
        return f"RuntimeError: {error}"
    return "trained"

kinds = {"tuple": (lambda t: (t,), lambda o: o[0]), "dict": (lambda t: {"hidden": t}, lambda o: o["hidden"]),
         "dataclass": (Out, lambda o: o.hidden)}
seen = {(kind, stage): train(*kinds[kind], stage)
        for kind, stage in (("tuple", 3), ("dict", 3), ("dataclass", 2), ("dataclass", 3))}
for (kind, stage), result in seen.items():
    print(f"{kind}, stage {stage}: {result}")
assert [result == "trained" for result in seen.values()] == [True, True, True, False], seen
PY
