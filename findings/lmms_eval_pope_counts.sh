#!/usr/bin/env bash
# lmms-eval: POPE's yes ratio is that of the questions, not of the answers, and its F1 leaves out answers other than "yes" and "no".
#
# A good guess: pope_yes_ratio is the share of questions that the model answers with yes (what POPE measures hallucination by), and an
#   answer that is not understood counts against precision or recall.
# What happens: the ratio counts the reference answers, so it is 0.5 for every model on a balanced set. "Yes." or "yes, there is a dog" is
#   wrong in the accuracy and is neither a hit nor a miss in precision, recall and F1: one right answer of a hundred and nothing
#   readable besides gives F1 1.0. A model that says yes to all has the yes ratio of one that says no to all.
# Source: lmms_eval.tasks.pope.utils: pope_aggregate_yes_ratio (looks at ground_truth), pope_aggregate_precision, pope_aggregate_recall.
# Who is hurt: tables of object hallucination; a tuned model whose answers end with a full stop looks precise.
. "$(dirname "$0")/_lib.sh"
no_deps lmms-eval==0.7.3
pins numpy==2.4.6

observe <<'PY'
import importlib.util
from importlib.metadata import files

# The task's module alone: the package around it asks for a dozen others, and its data for a network.
path = next(file.locate() for file in files("lmms-eval") if str(file).endswith("tasks/pope/utils.py"))
spec = importlib.util.spec_from_file_location("pope", path)
pope = importlib.util.module_from_spec(spec)
spec.loader.exec_module(pope)

truth = ["yes"] * 50 + ["no"] * 50
models = {
    "always yes": ["yes"] * 100,
    "always no": ["no"] * 100,
    "right, with a full stop but for the first": ["yes"] + [f"{answer.capitalize()}." for answer in truth[1:]],
}
metrics = ("accuracy", "precision", "recall", "f1_score", "yes_ratio")
seen = {}
for name, answers in models.items():
    rows = [pope.pope_process_results({"answer": right, "question_id": i}, [answer])
            for i, (right, answer) in enumerate(zip(truth, answers))]
    seen[name] = {m: getattr(pope, f"pope_aggregate_{m}")([row[f"pope_{m}"] for row in rows]) for m in metrics}
    print(name, {m: round(value, 2) for m, value in seen[name].items()})
assert {row["yes_ratio"] for row in seen.values()} == {0.5}
stops = seen["right, with a full stop but for the first"]
assert stops["accuracy"] == 0.01 and stops["precision"] == stops["recall"] == stops["f1_score"] == 1
PY
