"""Joining the ranks leaves nothing on the machine, and what cannot work there is said in a line."""

import os

import pytest
import torch

from mmpeft_ds.distributed import processes
from mmpeft_ds.errors import BadInput


def test_deepspeed_is_not_told_that_all_ranks_share_a_machine_while_they_meet(monkeypatch):
    monkeypatch.setenv("LOCAL_SIZE", "2")
    with processes.no_shared_buffers():
        assert "LOCAL_SIZE" not in os.environ
    assert os.environ["LOCAL_SIZE"] == "2"
    monkeypatch.delenv("LOCAL_SIZE")
    with processes.no_shared_buffers():
        pass
    assert "LOCAL_SIZE" not in os.environ


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(BadInput, match=r"local rank 1.* 1 GPU"):
        processes.start()
