"""Joining the ranks leaves nothing on the machine, and what cannot work there is said in a line."""

import os
import time

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


@pytest.fixture
def lock(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(processes, "_on_local_disk", lambda path: True)
    (tmp_path / "op").mkdir()
    path = tmp_path / "op" / "lock"
    path.touch()
    return path


def test_the_lock_of_an_interrupted_build_is_removed_but_not_that_of_a_running_one(lock, capsys):
    """torch waits for such a file for ever, without a word; whoever builds keeps it open."""
    with lock.open():
        assert not processes.remove_stale_lock("op") and lock.exists()
    assert processes.remove_stale_lock("op") and not lock.exists()
    assert str(lock) in capsys.readouterr().err
    assert not processes.remove_stale_lock("op")


def test_a_young_lock_on_a_shared_file_system_may_belong_to_another_machine(lock, monkeypatch):
    monkeypatch.setattr(processes, "_on_local_disk", lambda path: False)
    assert not processes.remove_stale_lock("op")
    hour_ago = time.time() - 3600
    os.utime(lock, (hour_ago, hour_ago))
    assert processes.remove_stale_lock("op")
