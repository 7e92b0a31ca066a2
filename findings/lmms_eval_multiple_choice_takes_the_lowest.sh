#!/usr/bin/env bash
# lmms-eval: a task of kind multiple_choice counts the choice with the lowest log-likelihood as the model's answer.
#
# A good guess: loglikelihood() returns log-probabilities, as its docstring says and as lm-eval, where it comes from, has it;
#   the likeliest choice wins, and acc_norm divides its sum by the length of the text.
# What happens: the lowest number wins, since many models that come with the package return a mean loss under that name. A model
#   written by the docstring scores 1 where it is wrong and 0 where it is right. The third metric of the same function,
#   acc_mutual_info, takes the highest, so no model is judged rightly by both; acc_norm divides a mean per token once more.
#   In 0.7.3 the evaluator besides turns each pair (number, greedy) into one text before it is scored: its own run of such a
#   task ends in an error after all requests, so that only callers of process_results see scores.
# Source: lmms_eval.api.task.ConfigurableTask.process_results, lmms_eval.api.instance.unwrap_generation_output; the docstring
#   is that of lmms_eval.api.model.lmms.loglikelihood.
# Who is hurt: whoever adds a model with loglikelihood, or compares its multiple-choice scores with lm-eval's.
. "$(dirname "$0")/_lib.sh"
no_deps lmms-eval==0.7.3
pins torch==2.13.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0 evaluate==0.4.6 sacrebleu==2.6.0 loguru==0.7.3 \
    tenacity==9.2.1 pytz==2026.6 pillow==13.0.0

observe <<'PY'
import json
import lmms_eval.api.metrics  # fills the registry of metrics
from lmms_eval.api.instance import unwrap_generation_output
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask

row = {"question": "What is it?", "choices": ["a dog", "a cat", "a cow"], "right": 0}
with open("rows.jsonl", "w") as rows:
    rows.write(json.dumps(row))
metrics = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm", "acc_mutual_info")]
task = ConfigurableTask(config={
    "task": "probe", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "test_split": "test",
    "output_type": "multiple_choice", "doc_to_visual": lambda row: [], "doc_to_text": lambda row: row["question"],
    "doc_to_choice": lambda row: row["choices"], "doc_to_target": lambda row: row["right"], "metric_list": metrics})
promise = next(line.strip() for line in lmms.loglikelihood.__doc__.splitlines() if "log probability" in line)
print("the docstring of loglikelihood:", promise)

# The pairs stand as the evaluator sorts them: conditional and unconditional value of each choice in turn.
scores = {}
for kind, values in (("log-probabilities", (-0.1, -3.0, -4.0)), ("losses", (0.1, 3.0, 4.0))):
    for best in (0, 1):
        order = values if best == 0 else (values[1], values[0], values[2])
        pairs = [pair for value in order for pair in ((value, False), (0.0, False))]
        scores[kind, best] = task.process_results(row, pairs)
        print(f"{kind} {order}, right is choice 0, the likeliest is choice {best}: {scores[kind, best]}")
assert scores["log-probabilities", 0] == {"acc": 0.0, "acc_norm": 0.0, "acc_mutual_info": 1.0}
assert scores["losses", 0] == {"acc": 1.0, "acc_norm": 1.0, "acc_mutual_info": 0.0}
assert scores["losses", 1]["acc"] == scores["log-probabilities", 1]["acc"] == 0.0

print("what the evaluator keeps of the pair (-0.1, True):", unwrap_generation_output((-0.1, True)))
assert unwrap_generation_output((-0.1, True)) == ("(-0.1, True)", None)
PY
