#!/usr/bin/env bash
# accelerate: load_state and skip_first_batches, the documented way to resume within an epoch, goes on in another order of the data.
#
# A good guess: after load_state, which restores the random generators, skip_first_batches(loader, n) gives the batches that were still
#   to come, so that an interrupted epoch sees every sample once.
# What happens: the generator's state is that of the middle of the epoch, and the shuffled loader draws a new order from it. Of that order n
#   batches are skipped: some samples come twice in the epoch and others never. With DataLoaderConfiguration(use_seedable_sampler=True), which
#   is off, and set_epoch, the rest is right.
# Source: accelerate.data_loader.skip_first_batches and prepare_data_loader; torch.utils.data.RandomSampler draws its seed at __iter__.
# Who is hurt: every shuffled training that is resumed within an epoch; the loss does not show it.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 accelerate==1.15.0

cat > train.py <<'PY'
import json, sys
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import set_seed

resume, seedable = sys.argv[1] == "resume", sys.argv[2] == "seedable"
set_seed(1)
accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable))
model = torch.nn.Linear(1, 1)
loader = torch.utils.data.DataLoader(torch.arange(40.0), batch_size=2, shuffle=True)
model, optimizer, loader = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1), loader)
seen = []
if resume:
    accelerator.load_state("checkpoint")
    rest = accelerator.skip_first_batches(loader, 10)
    if hasattr(rest, "set_epoch"):
        rest.set_epoch(1)
    for batch in rest:
        seen += batch.tolist()
else:
    for epoch in range(2):
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(epoch)
        seen = []
        for number, batch in enumerate(loader):
            seen += batch.tolist()
            if (epoch, number) == (1, 9):
                accelerator.save_state("checkpoint")
print(json.dumps(seen))
PY
observe <<'PY'
import json, shutil, subprocess, sys


def run(*arguments):
    return json.loads(subprocess.run([sys.executable, "train.py", *arguments], check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])


for kind in ("plain", "seedable"):
    shutil.rmtree("checkpoint", ignore_errors=True)
    whole, rest = run("begin", kind), run("resume", kind)
    epoch = whole[:20] + rest
    print(f"{kind} sampler: of 40 samples the resumed epoch saw {len(set(epoch))}; the rest is that of the run without a break: "
          f"{rest == whole[20:]}")
    assert len(set(whole)) == 40 and len(epoch) == 40
    assert (len(set(epoch)) < 36 and rest != whole[20:]) if kind == "plain" else rest == whole[20:]
PY
