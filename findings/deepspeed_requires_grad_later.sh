#!/usr/bin/env bash
# DeepSpeed, ZeRO 1 to 3: requires_grad_() after deepspeed.initialize neither freezes a layer nor wakes it, without a word.
#
# A good guess: the flag counts whenever a step begins. An optimizer that holds all parameters passes over those that are frozen, and takes
#   them up once they are thawed; so it is in plain torch and at stage 0.
# What happens: which parameters are trained is fixed when the engine is built. A layer frozen later has zeros for its gradient, and Adam
#   goes on moving it by its moments and its weight decay. A layer thawed later computes gradients, which nobody reads: it
#   never moves, although the optimizer was given its parameters.
# Source: DeepSpeedZeroOptimizer.__init__ of deepspeed.runtime.zero.stage_1_and_2, and of stage3 (_get_trainable_parameter_groups), take the
#   parameters with requires_grad into flat buffers; the step updates whole buffers.
# Who is hurt: training in stages (adapters first, then the last blocks; a projector that is frozen after its warm-up), gradual unfreezing.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import warnings
import torch, deepspeed

deepspeed.init_distributed("gloo", verbose=False)


def moves(stage, first, later):
    """Largest move of the second layer's weights in six steps, whose requires_grad is `first` in three of them and then `later`."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    layer = model[1].requires_grad_(first)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    x, seen = torch.randn(8, 4), []
    if stage is not None:
        config = {"train_micro_batch_size_per_gpu": 8, "gradient_clipping": 0.0, "zero_optimization": {"stage": stage}}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def weights():
        with deepspeed.zero.GatheredParameters([layer.weight], enabled=stage == 3):
            return layer.weight.detach().clone()

    for step in range(6):
        if step == 3:
            layer.requires_grad_(later)
        before = weights()
        if stage is None:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            engine.backward(engine(x).square().mean())
            engine.step()
        seen.append(round((weights() - before).abs().max().item(), 3))
    return seen[:3], seen[3:]


with warnings.catch_warnings(record=True) as caught:
    for stage in (None, 0, 1, 2, 3):
        (trained, frozen), (asleep, woken) = moves(stage, True, False), moves(stage, False, True)
        print(f"{'torch' if stage is None else f'stage {stage}'}: frozen after three steps {trained} -> {frozen}; "
              f"thawed after three steps {asleep} -> {woken}")
        assert min(trained) > 0.009 and max(asleep) == 0
        if stage in (1, 2, 3):
            assert min(frozen) > 0.005 and max(woken) == 0
        else:
            assert max(frozen) == 0 and min(woken) > 0.009
assert not [w for w in caught if "requires_grad" in str(w.message)]
PY
