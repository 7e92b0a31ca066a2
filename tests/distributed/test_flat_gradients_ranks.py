"""Gradients that are reduced as one tensor at ZeRO-1 and 3 train as DeepSpeed's own reduction does; one launch."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import launch

pytestmark = pytest.mark.distributed
RANKS = 3  # no parameter's size is a multiple of it, so parameters lie on two ranks


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> list[dict]:
    work = tmp_path_factory.mktemp("flat_gradients")
    result = launch.run_forked("tests.helpers.rank_scripts.flat_gradients", str(work), ranks=RANKS)
    assert result.code == 0, result.tail()
    return [torch.load(work / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture(params=[1, 3])
def ranks(launched, request) -> list[dict]:
    """What each rank saw under one ZeRO stage."""
    return [rank[request.param] for rank in launched]


def test_gradients_norms_and_weights_are_those_of_deepspeeds_own_reduction(ranks):
    for rank in ranks:
        for own, flat in zip(rank["own"], rank["flat"], strict=True):
            torch.testing.assert_close(flat["held"], own["held"], rtol=1e-6, atol=1e-7)
            assert flat["norm"] == pytest.approx(own["norm"], rel=1e-6)
            for norms in (own["norms"], flat["norms"]):  # of two groups of parameters
                assert float(norms.sum()) ** 0.5 == pytest.approx(own["norm"], rel=1e-6)
            torch.testing.assert_close(flat["norms"], own["norms"], rtol=1e-6, atol=0)
            torch.testing.assert_close(flat["weights"], own["weights"], rtol=1e-6, atol=1e-6)
            assert flat["counts"] == own["counts"]
            assert own["counts"][-1], "the step was applied"


def test_all_ranks_have_the_same_weights_after_each_step(ranks):
    for rank in ranks[1:]:
        for mine, first in zip(rank["flat"], ranks[0]["flat"], strict=True):
            assert all(torch.equal(mine["weights"][name], value) for name, value in first["weights"].items())


def test_a_parameter_that_one_rank_reaches_is_averaged_over_all(ranks):
    for rank in ranks:
        torch.testing.assert_close(rank["unreached"]["by rank 0"], torch.full((5,), 3 / RANKS))
        assert not rank["unreached"]["by none"].any()


def test_the_norm_that_the_caller_knows_is_not_computed_again(ranks):
    for rank in ranks:
        computed, told = rank["told"]
        assert told == pytest.approx(2 * computed, rel=1e-6)


def test_a_skipped_step_leaves_the_weights_and_the_next_one_applies(ranks):
    assert all(rank["skipped"] for rank in ranks)


def test_gradients_that_someone_has_released_are_whole_after_the_next_pass(ranks):
    assert all(rank["released"] for rank in ranks)


@pytest.mark.parametrize("offload", [False, True])
def test_where_deepspeed_reduces_a_parameter_that_nobody_reads_has_no_gradient_of_an_earlier_step(launched, offload):
    for rank in launched:
        # The second of two micro-batches reaches it; DeepSpeed adds that to both of the step before.
        assert rank["left over"][True, offload] == pytest.approx([0.0, 3.0])
        only, second = rank["left over"][False, offload]  # negative control
        assert only > 0.1 and second == pytest.approx(9.0)
