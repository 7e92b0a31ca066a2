"""Records that no later step could handle, in training and in evaluation, through real ranks and a loader process."""

from __future__ import annotations

import json

import pytest

from mmpeft_ds.data import writer
from tests.helpers import ROOT, launch
from tests.helpers.runs import tiny_vqa

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
TRAIN = ROOT / "launchers" / "train.py"
ODD = {
    3: {"type": ["count"]},
    7: {"question": "is it \ud83d ?"},
    11: {"extra": json.loads("[" * 70 + "]" * 70)},
    1002: {"type": {"a": 1}},
}


def test_a_run_ends_well_beside_them_and_at_the_budget_without_a_traceback(tmp_path, monkeypatch):
    plain = tiny_vqa.sample

    def sample(i, answer=int.__add__):
        made = plain(i, answer)
        made.record["questions"][0] |= ODD.get(i, {})
        return made

    def escaped(record):  # as json writes by default, where a half of a pair is no fault
        return json.dumps(record, sort_keys=True, separators=(",", ":"))

    monkeypatch.setattr(tiny_vqa, "sample", sample)
    monkeypatch.setattr(writer, "_encoded", escaped)
    monkeypatch.setattr(writer, "_checked", lambda sample, parts, widths: {})
    monkeypatch.setattr("mmpeft_ds.data.identity._number", lambda text: 0)
    tiny_vqa.prepare(tmp_path)

    def train(run, *sets):
        given = [f"run_dir={tmp_path / run}", "data.workers=1", "optim.epochs=1", *sets]
        words = [word for one in given for word in ("--set", one)]
        return launch.run_forked(TRAIN, "--recipe", str(tmp_path / "recipe.yaml"), *words, ranks=2, timeout=400.0)

    done = train("allowed", "data.max_bad_fraction=0.2")
    assert done.code == 0 and "Traceback" not in done.output, done.tail()
    rows = [json.loads(line) for line in (tmp_path / "allowed" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["bad"] == {"json": 2, "type": 1}
    for key in ("train-000000003", "train-000000007", "train-000000011", "val-000000002"):
        assert key in done.output
    done = train("refused", "data.max_bad_fraction=0.04")
    assert set(done.codes) == {2} and "Traceback" not in done.output, done.tail()
    assert "3 bad of" in done.output and "train-000000011 (json)" in done.output
