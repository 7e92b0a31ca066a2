"""What holds for all tests."""

import sys

import pytest


@pytest.fixture(autouse=True, scope="module")
def no_process_group_stays():
    """A process group that a test made in this process ends with its file: ranks that a later test forks would inherit
    it, and could not make their own."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
        if "deepspeed.comm.comm" in sys.modules:  # it keeps its own note of the group
            sys.modules["deepspeed.comm.comm"].cdb = None
