"""Stored values of frozen towers reach a GPU while it computes: the host waits neither for copies nor to read them."""

import json

import pytest
import torch

from tests.helpers import launch
from tests.helpers.device.counters import counted

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA's own kernels")
# The last reads pixels alone; the others know of each image how many tokens it has, and its grid.
COLUMNS = ["mllm Qwen2-VL", "mllm LLaVA", "vision_text_encoder"]


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("frozen") / "out.json"
    result = launch.run_forked("tests.helpers.rank_scripts.device_frozen", str(out), *COLUMNS, ranks=0)
    assert result.code == 0, result.tail()
    return json.loads(out.read_text())


@pytest.mark.parametrize("column", COLUMNS)
def test_nobody_waits_for_values_that_are_stored(found, column):
    kinds = {"wait", "copy"}
    ours = [r for r in found[column]["read"] if r["kind"] in kinds and r["file"].startswith("mmpeft_ds/")]
    assert ours == []
    # Negative control: what is computed has to be read for the file, and is seen to be.
    written = [r for r in found[column]["computed"] if r["kind"] == "wait" and r["file"].endswith("frozen_store.py")]
    assert len(written) >= 3


def test_the_penalty_of_elastic_weight_consolidation_stays_on_the_device_until_the_step_reads_it():
    from mmpeft_ds.engine.ewc import Pull
    from mmpeft_ds.engine.zero.gradients import whole

    trained = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    pull = Pull(2.0)
    for parameter in trained:
        pull.hold(parameter, torch.ones_like(parameter), torch.zeros_like(parameter))
    with counted() as counts:
        penalty = pull.add(whole(trained))
    assert counts.reads == 0 and penalty.item() == pytest.approx(14.0)
    assert pull.add([]) is None
