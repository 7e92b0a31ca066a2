"""Collectives of a start, a training step and a checkpoint on two ranks."""

import pytest

from tests.helpers.device import counters_steps

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict:
    folder = tmp_path_factory.mktemp("step_counts")
    return counters_steps.run([*counters_steps.TINY, *counters_steps.CONTROLS], folder)


def test_trained_parameters_below_the_threshold_come_by_one_gather_after_a_step(tiny):
    for rank in (0, 1):
        assert tiny["zero3"][rank]["collectives"]["allgather_base"] == 1
        # Control: DeepSpeed alone gathers each of them in turn.
        assert tiny["zero3 apart"][rank]["collectives"]["allgather_base"] == tiny["zero3"][rank]["trained_tensors"]


def test_without_zero_ranks_sum_the_gradients_once_and_nothing_but_the_two_vectors_of_the_trainer_besides(tiny):
    """DeepSpeed would sum the norm that it clips by as well."""
    for rank in (0, 1):
        assert tiny["zero0"][rank]["collectives"]["allreduce"] == 3


def test_gathered_together_or_apart_the_losses_are_the_same_to_the_bit(tiny):
    assert tiny["zero3"][0]["losses"] == tiny["zero3 apart"][0]["losses"]
    assert len(set(tiny["zero3"][0]["losses"])) == counters_steps.STEPS


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_a_checkpoint_of_a_real_run_takes_one_gather(tiny, name):
    saving = tiny[name][0]["saving"]
    assert (
        saving["gather"] == 1
        and "allgather_base" not in saving
        and sum(saving.values()) < 10 < tiny[name][0]["trained_tensors"]
    )


@pytest.mark.parametrize("name", ["zero1", "zero3"])
def test_loading_a_checkpoint_takes_one_broadcast_of_what_trains(tiny, name):
    """And those of the header and of the model's own state."""
    loading = tiny[name][0]["loading"]
    assert sum(loading.values()) < 10 < tiny[name][0]["trained_tensors"], loading


def test_rank_0_sends_what_trains_at_the_start_and_nothing_frozen(tiny):
    sent, everything = (tiny[name][0]["building"]["broadcast"] for name in ("zero1", "zero1 sent"))
    assert everything - sent == tiny["zero1"][0]["tensors"] - tiny["zero1"][0]["trained_tensors"] > 20
    assert tiny["zero1"][0]["losses"] == tiny["zero1 sent"][0]["losses"]


@pytest.mark.parametrize("name", ["zero0 differs", "zero1 differs"])
def test_a_base_that_is_not_the_same_on_all_ranks_is_refused_on_all(tiny, name):
    for rank in (0, 1):
        assert "layer.0.intermediate.dense.bias is not the same on all ranks" in tiny[name][rank]["problem"]
