#!/usr/bin/env bash
# DeepSpeed, ZeRO 3: a parameter that no batch of a step reads is moved by its gradient of an earlier step.
#
# A good guess: what is not read has no gradient. Plain torch leaves it alone, and stages 0 to 2 take zeros for it.
# What happens: the buffer of a parameter's gradient is written when its gradient comes, and never emptied. At the first batch of a step it
#   is overwritten, at later ones added to; so without a gradient the last step's is applied once more, every step anew, and counts in the
#   gradient norm that clips all others. With accumulation it is enough that the first batch of a step does not read the parameter: the
#   gradient of the second is then added to that of the step before.
# Source: deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3.partition_grads (copy at micro_step_id 0, else add) and
#   zero_grad, which leaves grad_partitions_flat_buffer as it is.
# Who is hurt: batches of text alone between batches with images, adapters by task or by modality, heads by task, experts without tokens.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 deepspeed==0.19.8

in_ranks 1 <<'PY'
import torch, deepspeed

deepspeed.init_distributed("gloo", verbose=False)


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.text = torch.nn.Linear(4, 4, bias=False)
        self.image = torch.nn.Linear(4, 4, bias=False)

    def forward(self, x, has_image):
        return (self.text(x) + (self.image(x) if has_image else 0)).sum()  # every weight that is read has a gradient of 1


def moves(stage, steps):
    """How far SGD with rate 0.1 moves a weight of `image` in each step, and the gradient norm that is reported."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, seen = torch.ones(1, 4), []
    if stage is not None:
        config = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": len(steps[0]), "gradient_clipping": 0.0,
                  "zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    for has_images in steps:
        with deepspeed.zero.GatheredParameters([model.image.weight], enabled=stage == 3):
            before = model.image.weight[0, 0].item()
        for has_image in has_images:
            if stage is None:
                (model(x, has_image) / len(has_images)).backward()
            else:
                engine.backward(engine(x, has_image))
                engine.step()
        if stage is None:
            optimizer.step()
            optimizer.zero_grad()
        with deepspeed.zero.GatheredParameters([model.image.weight], enabled=stage == 3):
            seen.append(round(before - model.image.weight[0, 0].item(), 3))
    return seen, round(float(engine.get_global_grad_norm()), 2) if stage in (1, 2, 3) else None


cases = {"one batch a step: image, text, text": ([[True], [False], [False]], [0.1, 0.0, 0.0], [0.1, 0.1, 0.1], (4.0, 5.66)),
         "two batches a step: image + image, image + text, text + image, text + image":
             ([[True, True], [True, False], [False, True], [False, True]], [0.1, 0.05, 0.05, 0.05], [0.1, 0.05, 0.1, 0.15], None)}
for case, (steps, right, at_stage_3, norms) in cases.items():
    print(case)
    for stage in (None, 0, 1, 2, 3):
        seen, norm = moves(stage, steps)
        print(f"  {'torch' if stage is None else f'stage {stage}'}: the image layer moves by {seen}; gradient norm of the last step {norm}")
        assert seen == (at_stage_3 if stage == 3 else right)
        if norms and stage in (1, 2, 3):
            assert norm == norms[stage == 3]
PY
