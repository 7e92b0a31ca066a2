"""Tokens of samples: counted once, kept beside the data, planned by; and what cannot share a row is refused."""

import pickle

import numpy as np
import pytest
import torch

from mmpeft_ds import recipe as recipes
from mmpeft_ds.data.batch import Prompted
from mmpeft_ds.data.token_counts import TokenCounts
from mmpeft_ds.distributed.processes import Ranks
from mmpeft_ds.engine import plan, streams, token_counts
from mmpeft_ds.engine.assembly import resolve
from mmpeft_ds.engine.assembly.checks import check_packing
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.methods import get
from tests.helpers.models import tiny_mllm
from tests.helpers.runs import tiny_talk, tiny_vqa

ONE = Ranks(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("talk")
    tiny_talk.write(path)
    return path


def resolved(folder, **changes):
    return resolve.resolve(recipes.load(tiny_talk.recipe(folder, "recipe", **{"data__pack": 160, **changes})))


def batches(parts, rank=0, world_size=1):
    ranks = Ranks(rank, world_size, rank, world_size, torch.device("cpu"))
    lengths = [token_counts.lengths_of(parts, source, ONE) for source in parts.train]  # as all ranks have them
    stream = streams.make_stream(parts, parts.train, ranks, train=True, lengths=lengths)
    return [[batch for batch in step.micro] for step in stream.epoch(0)]


def test_counts_are_kept_beside_the_data_for_this_tokenizer_and_limit(folder, monkeypatch):
    parts = resolved(folder)
    counts = token_counts.token_counts(parts, parts.train[0], ONE)
    assert counts.shape == (tiny_talk.SAMPLES, 5) and counts[:, 0].min() > 5 and len(set(counts[:, 0])) > 10
    assert [bool(c) for c in counts[:, 1]] == [i % 3 != 2 for i in range(tiny_talk.SAMPLES)]  # those with images
    file = token_counts.file_of(parts, parts.train[0])
    assert file.parent == folder / "data" and file.is_file()
    other = resolved(folder, backbone__max_text_length=30)
    assert token_counts.file_of(other, other.train[0]) != file
    assert token_counts.token_counts(other, other.train[0], ONE)[:, 0].max() < counts[:, 0].max()
    again = resolved(folder)
    with monkeypatch.context() as patch:
        patch.setattr(token_counts, "count", lambda *a: pytest.fail("counted again"))
        assert np.array_equal(token_counts.token_counts(again, again.train[0], ONE), counts)
    file.write_bytes(file.read_bytes()[:-5])
    assert np.array_equal(token_counts.token_counts(again, again.train[0], ONE), counts)


def test_a_sample_that_could_not_be_read_is_planned_as_the_longest_and_counted_again(tmp_path, monkeypatch):
    tiny_talk.write(tmp_path)
    parts = resolved(tmp_path)
    right = token_counts.token_counts(parts, parts.train[0], ONE)
    token_counts.file_of(parts, parts.train[0]).unlink()
    read_all, asked = token_counts.ShardReader.read, []

    def read(self, wanted):
        asked.append(len(wanted))
        pieces = read_all(self, wanted)
        return [BadSample("read", "cut off"), b"no tar file", *pieces[2:]] if damaged else pieces

    monkeypatch.setattr(token_counts.ShardReader, "read", read)
    damaged = True
    counts = token_counts.token_counts(parts, parts.train[0], ONE)
    assert counts[:2, 0].tolist() == [token_counts.UNREAD] * 2 and np.array_equal(counts[2:], right[2:])
    lengths = token_counts.lengths_of(parts, parts.train[0], ONE)
    assert lengths.tokens[:2].tolist() == [right[2:, 0].max()] * 2 and lengths.costs.min() > 0
    damaged = False
    asked.clear()
    assert np.array_equal(token_counts.token_counts(parts, parts.train[0], ONE), right) and asked == [2]
    assert np.array_equal(token_counts.token_counts(parts, parts.train[0], ONE), right) and asked == [2]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_have_as_many_micro_batches_within_the_budget_and_the_samples_of_one_rank(folder, world_size):
    parts = resolved(folder)
    alone = batches(parts)
    ranks = [batches(parts, rank, world_size) for rank in range(world_size)]
    lengths = token_counts.lengths_of(parts, parts.train[0], ONE)
    for step, whole in enumerate(alone):
        mine = [rank[step] for rank in ranks]
        assert len({len(micro) for micro in mine}) == 1
        ids = [i for micro in mine for batch in micro for i in batch.sample_id if i]
        assert sorted(ids) == sorted(i for batch in whole for i in batch.sample_id if i)
        for batch in (*whole, *(batch for micro in mine for batch in micro)):
            assert batch.padding_free
            numbers = [int(i.rpartition("-")[2]) for i in batch.sample_id if i]
            assert lengths.tokens[numbers].sum() <= 160 or len(numbers) == 1


def test_a_backbone_that_has_counted_goes_to_loader_processes(folder):
    backbone = resolved(folder).backbone
    for family in ("llava_next", "qwen2_vl"):  # by the model without storage, by the grid
        tiny_mllm.write(folder / family, family)
        backbone = type(backbone)(type(backbone.options)(str(folder / family)), None)
        counts = backbone.tokens([Prompted("what is it ?", "red", images=1)], [(9, 14)])
        assert backbone.costs(TokenCounts(*np.array([counts]).T)) > counts.tokens
        again = pickle.loads(pickle.dumps(backbone))
        assert again.tokens([Prompted("what is it ?", "red", images=1)], [(9, 14)]) == counts


def test_evaluation_reads_padded_rows(folder):
    parts = resolved(folder)
    stream = streams.make_stream(parts, parts.train, ONE, train=False)
    assert not any(batch.padding_free for step in stream.epoch(0) for batch in step.micro)


def test_check_says_what_steps_will_be_like(folder):
    report = plan.make(resolved(folder, data__pack=60), [2])
    rows = {row["ranks"]: row for row in report["packing"]}
    assert set(rows) == {1, 2, 8, 64}
    assert rows[1]["micro_steps"] > rows[2]["micro_steps"] > 1
    assert 0 < rows[1]["padded"] < 1 and rows[1]["slowest"] == 1 and rows[2]["waiting"] >= 0
    assert any("micro-batch to itself" in line for line in report["remarks"])
    assert plan.make(resolved(folder, data__pack=0))["packing"] == []


def test_accumulation_is_left_to_the_tokens(folder):
    with pytest.raises(BadInput, match="optim.accumulation: 2, but with data.pack"):
        resolved(folder, optim__accumulation=2)
    with pytest.raises(BadInput, match="data.pack: must be 0"):
        resolved(folder, data__pack=-1)


def test_a_backbone_that_reads_each_text_by_itself_is_refused(tmp_path):
    tiny_vqa.prepare(tmp_path)
    with pytest.raises(BadInput, match="data.pack: 100, but the backbone vision_text_encoder"):
        resolve.resolve(recipes.load(tmp_path / "recipe.yaml", ["data.pack=100"]))


def test_methods_and_tasks_that_mix_texts_are_refused(folder):
    parts = resolved(folder)
    (source,) = parts.train

    def refusal(method="lora", attention="sdpa", stored=False, **options):
        config = get(method).Config(**options) if options else parts.method_config
        train = [("data.sources.0", source.task, source.manifest)]
        with pytest.raises(BadInput, match="data.pack: 160, but") as caught:
            check_packing(parts.recipe, parts.backbone, train, get(method), config, stored, attention)
        return str(caught.value)

    assert "mixes all tokens" in refusal("routed_lora", route="xtxt")
    assert "sdpa or eager" in refusal("deep_prompt", "flash_attention_2", length=2)
    assert "stored features" in refusal(stored=True)
    source.task.couples_samples = True
    assert "couples the samples" in refusal()
