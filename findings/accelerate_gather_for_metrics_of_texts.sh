#!/usr/bin/env bash
# accelerate: gather_for_metrics on a dictionary of texts gives the names of its keys, on two ranks or more.
#
# A good guess: nested input is gathered leaf by leaf, as for tensors and as the docstring promises ("nested
#   tuple/list/dictionary of object"): {"answer": [..], "label": [..]} of each rank becomes one such dictionary.
# What happens: one leaf that is no tensor is enough, and the whole structure is pickled and the ranks' structures are chained
#   by iterating over them. A dictionary becomes ["answer", "label", "answer", "label"], also where it holds tensors besides;
#   a pair (answers, references) becomes [answers 0, references 0, answers 1, references 1]. At the last batch this list is
#   cut to the number of samples left, whatever its entries are, so that references vanish too. One rank alone gets its input back.
# Source: accelerate.Accelerator.gather_for_metrics with accelerate.utils.operations.gather_object.
# Who is hurt: evaluation of generated answers on several ranks, written and tried on one. A flat list with one entry for each
#   sample is gathered rightly.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 accelerate==1.15.0

in_ranks 2 <<'PY'
import torch
from torch.utils.data import DataLoader
from accelerate import Accelerator

accelerator = Accelerator(cpu=True)
loader = accelerator.prepare(DataLoader(range(5), batch_size=1))
flat, dictionaries, mixed, pairs = [], [], [], []
for batch in loader:
    answers, references = [f"answer {i}" for i in batch], [f"reference {i}" for i in batch]
    flat.extend(accelerator.gather_for_metrics(answers))
    dictionaries.append(accelerator.gather_for_metrics({"answer": answers, "reference": references}))
    mixed.append(accelerator.gather_for_metrics({"answer": answers, "number": batch}))
    pairs.append(accelerator.gather_for_metrics((answers, references)))
tensors = accelerator.gather({"number": torch.tensor([accelerator.process_index])})
accelerator.print("five samples on two ranks, three batches each\nlist of texts:", flat, "\ndictionaries of texts:", dictionaries,
                  "\ndictionaries of texts and a tensor:", mixed, "\npairs:", pairs, "\ndictionary of tensors:", tensors)
assert flat == [f"answer {i}" for i in range(5)]
assert dictionaries == [["answer", "reference"] * 2] * 2 + [["answer"]]
assert mixed == [["answer", "number"] * 2] * 2 + [["answer"]]
assert pairs[0] == [["answer 0"], ["reference 0"], ["answer 1"], ["reference 1"]] and pairs[-1] == [["answer 4"]]
assert tensors["number"].tolist() == [0, 1]
accelerator.end_training()
PY
