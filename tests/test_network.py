"""A checkpoint in the hub's cache, on a node that reaches no hub."""

from __future__ import annotations

import logging

import pytest
import transformers
from huggingface_hub import constants
from huggingface_hub.utils import _http

from mmpeft_ds import network
from mmpeft_ds.backbones.common import stock, tower_loading
from mmpeft_ds.errors import BadInput

NOBODY = "http://127.0.0.1:9"  # the port of a service that throws everything away, which nobody runs


@pytest.fixture
def waits(monkeypatch, tmp_path):
    """No hub answers, and the cache holds `some/bert`; the waits of huggingface_hub before it asks again."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", NOBODY)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", NOBODY + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    ask = network.ask_hub
    ask.cache_clear()
    commit, folder = "a" * 40, tmp_path / "models--some--bert"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    transformers.BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1).save_pretrained(snapshot)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue"]
    (snapshot / "vocab.txt").write_text("\n".join(words))
    found: list[float] = []
    monkeypatch.setattr(_http.time, "sleep", found.append)
    yield found
    ask.cache_clear()


def test_a_cached_checkpoint_is_read_without_asking_for_every_file_that_it_has_not(waits, caplog):
    with caplog.at_level(logging.WARNING, "mmpeft_ds"):
        tokenizer = stock.read_tokenizer("some/bert", "backbone.text")
        assert tower_loading.load_config("some/bert", "backbone.text", "text").hidden_size == 8
    assert tokenizer.tokenize("red blue") == ["red", "blue"] and not waits
    said = [r.getMessage() for r in caplog.records if r.name == network.__name__]
    assert len(said) == 1 and said[0].startswith(f"{NOBODY} cannot be reached (") and "\n" not in said[0]


def test_without_that_it_asks_for_them_again_and_again(waits, monkeypatch):
    """What the test above would meet."""
    monkeypatch.setattr(network, "ask_hub", lambda name: None)
    stock.read_tokenizer("some/bert", "backbone.text")
    assert sum(waits) > 60


def test_what_is_not_in_the_cache_is_tried_for_longer_and_refused_in_one_line(waits):
    with pytest.raises(BadInput, match=r"backbone\.text: .*some/other") as refused:
        tower_loading.load_config("some/other", "backbone.text", "text")
    assert "\n" not in str(refused.value) and waits and not constants.HF_HUB_OFFLINE


def test_a_hub_that_answers_is_asked_once_for_each_checkpoint(monkeypatch):
    asked = []
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(network, "get_hf_file_metadata", lambda url, timeout: asked.append(url) or 1 / 0)
    network.ask_hub.cache_clear()
    for name in ("a/b", "c/d", "a/b"):
        network.ask_hub(name)
    assert [url.split("/")[-5] for url in asked] == ["a", "c"] and not constants.HF_HUB_OFFLINE
    network.ask_hub.cache_clear()
