"""What is fetched from the hub, and by whom."""

from __future__ import annotations

import pytest
import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine.assembly import hub
from mmpeft_ds.errors import BadInput


def recipe(**backbone: object) -> recipes.Recipe:
    return recipes.Recipe(run_dir="r", backbone=backbone, method={"name": "lora"})


def test_only_names_of_the_hub_are_waited_for(tmp_path):
    (tmp_path / "vision").mkdir()
    given = recipe(name="vision_text_encoder", vision=str(tmp_path / "vision"), text="packaged:minilm")
    assert hub.named(given) == {}
    given = recipe(name="vision_text_encoder", vision="google/vit", text="./no-such-folder")
    assert hub.named(given) == {"google/vit": True}
    assert hub.named(recipe(name="mllm", model="llava-hf/x", random_weights=True)) == {"llava-hf/x": False}


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """Patterns asked for; the checkpoint has what a test writes into tmp_path."""
    asked = []

    def snapshot_download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, [p for p in allow_patterns if p not in hub.SMALL]))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return asked


def test_weights_are_safetensors_where_there_are_some(downloads, tmp_path):
    hub.fetch("a/b", weights=False)
    assert downloads.pop() == ("a/b", []) and not downloads
    with pytest.raises(FileNotFoundError, match="no weights"):
        hub.fetch("a/b", weights=True)
    (tmp_path / "pytorch_model.bin").touch()
    downloads.clear()
    hub.fetch("a/b", weights=True)
    assert [patterns for _, patterns in downloads] == [[], ["model*.safetensors"], ["pytorch_model*.bin"]]
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    downloads.clear()
    hub.fetch("a/b", weights=True)
    assert [patterns for _, patterns in downloads] == [[], ["model*.safetensors"]]


@pytest.mark.parametrize("local_rank, own, others", [(0, "", ""), (0, "x", ""), (1, "", ""), (1, "", "n1: cannot")])
def test_all_ranks_raise_what_one_of_them_met(monkeypatch, local_rank, own, others):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    fetched = []
    monkeypatch.setattr(hub, "fetch", lambda name, weights: fetched.append(name) if not own else 1 / 0)
    monkeypatch.setattr(hub, "first_message", lambda mine: mine or others)
    ranks = Ranks(local_rank, 2, local_rank, 2, torch.device("cpu"))
    if own or others:
        with pytest.raises(BadInput, match="cannot"):
            hub.share({"a/b": True}, "auto", ranks)
        assert not hub.constants.HF_HUB_OFFLINE
    else:
        hub.share({"a/b": True}, "auto", ranks)
        assert hub.constants.HF_HUB_OFFLINE, "the others read from the disk"
    assert fetched == (["a/b"] if local_rank == 0 and not own else [])


def test_a_kernel_of_the_hub_is_fetched_too(monkeypatch):
    loaded: list[str] = []
    monkeypatch.setattr(hub.transformers.utils, "is_kernels_available", lambda: True)
    monkeypatch.setattr(hub.hub_kernels, "load_and_register_attn_kernel", loaded.append)
    assert hub._fetched({}, "kernels-community/flash-attn2") == "" and loaded == ["kernels-community/flash-attn2"]
    assert hub._fetched({}, "sdpa") == "" and len(loaded) == 1


def test_one_process_alone_needs_no_meeting(monkeypatch):
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("nothing to share"))
    hub.share({"a/b": True}, "auto", Ranks(0, 1, 0, 1, torch.device("cpu")))
