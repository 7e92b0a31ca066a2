#!/usr/bin/env bash
# torch: a CPU generator uses 32 of the 64 bits of its seed, so that many pairs of seeds give the same numbers.
#
# A good guess: manual_seed takes a 64-bit seed (initial_seed() gives it back), so seeds that differ give other streams; a
#   seed mixed from (run seed, epoch, sample) in 64 bits is as good as a hash.
# What happens: seeds that differ in the upper 32 bits only give equal numbers: s and s + 2**32, or (epoch << 32) + sample.
# Source: at::CPUGeneratorImpl, whose Mersenne Twister (at::mt19937) is initialised from a 32-bit word.
# Who is hurt: per-sample augmentation and dropout with packed seeds: every epoch repeats the first; hashes collide early.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 tensorboard==2.21.0

observe <<'PY'
import torch

generator = torch.Generator()
draw = lambda seed: torch.rand(4, generator=generator.manual_seed(seed)).tolist()
for other in (1 + 2**31, 1 + 2**32, 1 + 12345 * 2**32):
    print(f"seeds 1 and {other}: initial_seed() {generator.manual_seed(other).initial_seed()}, equal numbers: {draw(1) == draw(other)}")
epochs = {tuple(torch.randperm(20, generator=generator.manual_seed((epoch << 32) + 7)).tolist()) for epoch in range(5)}
print("different permutations from the seeds (epoch << 32) + 7 of five epochs:", len(epochs))
assert draw(1) != draw(1 + 2**31) and draw(1) == draw(1 + 2**32) and len(epochs) == 1
PY
