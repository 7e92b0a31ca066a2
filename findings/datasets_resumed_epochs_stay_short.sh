#!/usr/bin/env bash
# datasets: after load_state_dict every later epoch of an IterableDataset, too, begins where the first was resumed, unless set_epoch is called.
#
# A good guess: a state is used up by the pass that it resumes; the pass after that reads all samples, as a new epoch does.
# What happens: the state stays, and each iteration begins with it as long as the data set's epoch number is the state's. Only
#   set_epoch(other number), documented as a matter of shuffling, ends that. Resumed at sample 13 of 20, an unshuffled stream gives
#   7 samples per epoch for the rest of the run, in a DataLoader as well, and nothing is said.
# Source: datasets.IterableDataset.load_state_dict and _prepare_ex_iterable_for_iteration (_starting_state_dict, compared by epoch).
# Who is hurt: resumed runs over streams that are not shuffled, or shuffled once: they train on what stood behind the last checkpoint.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 datasets==5.2.0

observe <<'PY'
import datasets
from torch.utils.data import DataLoader


def stream():
    return datasets.Dataset.from_dict({"i": list(range(20))}).to_iterable_dataset(num_shards=4)


first = stream()
samples = iter(first)
read = [next(samples)["i"] for _ in range(13)]
state = first.state_dict()
lengths = {}
for case in ("iterated", "in a DataLoader", "with set_epoch"):
    resumed = stream()
    resumed.load_state_dict(state)
    epochs = []
    for epoch in range(4):
        if case == "with set_epoch":
            resumed.set_epoch(epoch)
        reader = DataLoader(resumed, batch_size=None) if case == "in a DataLoader" else resumed
        epochs.append([int(sample["i"]) for sample in reader])
    assert epochs[0] == list(range(13, 20))  # the resumed pass itself is right
    lengths[case] = [len(epoch) for epoch in epochs]
    print(f"resumed after 13 of 20 samples, {case}: samples of the resumed epoch and of three later ones {lengths[case]}")
    if case != "with set_epoch":
        assert all(epoch == epochs[0] for epoch in epochs)
assert lengths == {"iterated": [7] * 4, "in a DataLoader": [7] * 4, "with set_epoch": [7, 20, 20, 20]}
PY
