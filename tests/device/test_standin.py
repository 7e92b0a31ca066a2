"""The stand-in for a GPU computes what the CPU does, and reports planted faults with their lines, and nothing else."""

import json

import pytest
import torch

from tests.helpers import launch

pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="torch has CUDA's own kernels")
SCRIPT = "tests.helpers.rank_scripts.device_planted"


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    out = tmp_path_factory.mktemp("planted") / "out.json"
    result = launch.run_forked(SCRIPT, str(out), ranks=0)
    assert result.code == 0, result.tail()
    return json.loads(out.read_text())


def test_every_planted_fault_is_reported_with_its_line_and_its_harmless_neighbour_is_not(planted):
    cases = {name: case for name, case in planted.items() if isinstance(case, dict) and "want" in case}
    assert len(cases) > 20
    for name, case in cases.items():
        kinds = [kind for kind, *_ in case["found"]]
        assert kinds == case["want"], name
        assert all(file.endswith("device_planted.py") for _, file, _ in case["found"]), name
        assert all(line == case["line"] for *_, line in case["found"]), name


def test_backward_runs_in_the_thread_of_the_device_as_on_a_gpu(planted):
    assert planted["own thread"] is True


def test_its_kernels_give_the_bits_of_the_cpu(planted):
    assert len(planted["gaps"]) == 6 and set(planted["gaps"].values()) == {0.0}


def test_cosines_on_a_device_are_added_up_in_an_order_that_no_other_pair_changes(planted):
    assert planted["cosines"] == {"by halves": True, "alone": True, "as the CPU": False}
