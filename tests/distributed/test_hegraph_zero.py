"""HeGraphAdapter on 2 ranks under ZeRO-3, however the work is shared, trains as one plain process does."""

from __future__ import annotations

import pytest
import torch

from mmpeft_ds.ops.class_graph import classify
from mmpeft_ds.ops.class_relations import Coefficients
from tests.helpers import launch
from tests.helpers.rank_scripts import hegraph as worker

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("hegraph")
    result = launch.run_forked(worker.__name__, str(path))
    assert result.code == 0, result.tail()
    return path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.feature_bank, "read", None)  # the worker replaces it; this puts it back
        return worker.run_plainly(tmp_path_factory.mktemp("plain"))


def compare(found, plain):
    assert found["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    assert list(found["end"]) == list(plain["end"])
    for key in ("start", "end", "exported"):
        for name, tensor in plain[key].items():
            torch.testing.assert_close(found[key][name], tensor, atol=1e-5, rtol=1e-5, msg=f"{key} {name}")


@pytest.mark.parametrize("shard", worker.SHARDS)
def test_two_ranks_under_zero3_train_as_one_plain_process(folder, plain, shard):
    found = torch.load(folder / f"{shard}.pt", weights_only=False)
    compare(found, plain)
    assert len(found["end"]) == 4
    for name, tensor in found["end"].items():
        assert (tensor - found["start"][name]).abs().max() > 0.01, name
    assert classify(found["exported"], torch.randn(3, worker.WIDTH)).isfinite().all()


def test_training_used_the_factor_of_training(folder, tmp_path):
    """The engine ran without dropout, so in evaluation mode; with the other factor the losses would differ."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.feature_bank, "read", None)
        of_relations = Coefficients.of_relations
        patch.setattr(Coefficients, "of_relations", lambda self, training: of_relations(self, False))
        wrong = worker.run_plainly(tmp_path)
    found = torch.load(folder / "none.pt", weights_only=False)
    with pytest.raises(AssertionError):
        compare(found, wrong)
