"""Subsets of a split, and the order in which evaluation goes through it."""

import json

import pytest
import torch

from mmpeft_ds.data import order
from mmpeft_ds.data.subset import Subset, fingerprint
from mmpeft_ds.errors import BadInput
from tests.helpers.data.streamed import ids, run
from tests.helpers.data.tiny_shards import one_image, source, write_shards

N = 45
CHOSEN = (3, 0, 44, 13, 14, 20, 21, 27, 9, 40, 30)  # none of shard 5, the last of the last shard


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("subset") / "toy", [one_image(i) for i in range(N)])


def keys(numbers=CHOSEN):
    return [f"train-{i:09d}" for i in numbers]


@pytest.fixture
def file(toy, tmp_path):
    path = tmp_path / "few.json"
    Subset("toy", "train", keys(), shots=1, seed=1, protocol="by hand", shards=fingerprint(toy, "train")).save(path)
    return path


def chosen_source(toy, file):
    return [source(toy, subset=Subset.load(str(file), toy, "train"))]


def test_a_stream_over_a_subset_holds_exactly_those_samples_in_training_and_evaluation(toy, file):
    wanted = sorted(f"toy/{key}" for key in keys())
    for train in (True, False):
        assert sorted(ids(run(toy, sources=chosen_source(toy, file), global_batch=4, train=train))) == wanted


@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_rank_count_workers_and_resume_do_not_change_the_batches_of_a_subset(toy, file, world_size):
    def of(**options):
        return run(toy, sources=chosen_source(toy, file), global_batch=4, epoch=1, **options)

    whole = of()
    assert len(whole) == 3
    assert of(world_size=world_size) == whole
    assert of(world_size=world_size, workers=2) == whole
    assert of(world_size=world_size, start=2) == {2: whole[2]}


def test_a_sample_of_a_subset_draws_what_it_draws_in_the_whole_split(toy, file):
    everything = {row[0]: row for part in run(toy).values() for row in part}
    for part in run(toy, sources=chosen_source(toy, file)).values():
        assert all(everything[row[0]] == row for row in part)


def test_a_shuffled_evaluation_is_one_block_and_holds_no_list_of_samples():
    n = 10**10  # a list of so many would not fit into memory
    large = order.EpochOrder([n // 1000] * 1000, 1, n, True)
    assert len({large[position] for position in range(0, n, n // 500)}) == 500


def test_shuffled_evaluation_mixes_a_split_sorted_by_class_and_is_the_same_for_every_recipe_seed(toy):
    stored = run(toy, train=False, evaluation_order="stored", global_batch=9)
    mixed = run(toy, train=False, evaluation_order="shuffled", global_batch=9, shuffle_block=5)
    assert sorted(ids(mixed)) == sorted(ids(stored)) and ids(mixed) != ids(stored)
    assert run(toy, train=False, evaluation_order="shuffled", global_batch=9, seed=5).keys() == mixed.keys()
    assert ids(run(toy, train=False, evaluation_order="shuffled", global_batch=9, seed=5)) == ids(mixed)
    assert ids(run(toy, 3, train=False, evaluation_order="shuffled", global_batch=9, epoch=4)) == ids(mixed)
    other = run(toy, train=False, evaluation_order="shuffled", global_batch=9, evaluation_seed=1)
    assert ids(other) != ids(mixed) and sorted(ids(other)) == sorted(ids(mixed))
    # Not only inside blocks of `shuffle_block`: the first slot leaves the first fifth of the split.
    first = [int(mixed[t][0][0].rpartition("-")[2]) for t in mixed]
    assert max(first) >= N // 5


def test_auto_shuffles_only_where_samples_are_coupled_and_never_touches_training(toy):
    from mmpeft_ds.data.options import DataOptions
    from mmpeft_ds.data.stream import Stream

    def of(coupled, train, chosen="auto"):
        options = DataOptions(global_batch=8, workers=0, evaluation_order=chosen)
        stream = Stream([source(toy)], options, train=train, coupled=coupled)
        return [s for step in stream.epoch(0) for b in step.micro for s in b.sample_id]

    assert of(False, False) == of(False, False, "stored") != of(True, False) == of(False, False, "shuffled")
    assert of(True, True) == of(False, True) == of(True, True, "stored")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dataset": "other"}, "'other'"),
        ({"split": "val"}, "'val'"),
        ({"keys": []}, "no sample"),
        ({"keys": ["train-000000045"]}, "train-000000045"),
        ({"keys": ["train-7"]}, "train-7"),
        ({"keys": ["val-000000001"]}, "val-000000001"),
        ({"keys": ["train-000000001"] * 2}, "twice"),
        ({"keys": "train-000000001"}, "list of texts"),
        ({"shards": "0" * 64}, "other shards"),
        ({"classes": 3}, "no subset"),
    ],
)
def test_a_subset_that_does_not_fit_is_refused_in_one_line(toy, tmp_path, change, words):
    path = tmp_path / "bad.json"
    path.write_text(json.dumps({"dataset": "toy", "split": "train", "keys": keys(), **change}))
    with pytest.raises(BadInput, match=words) as caught:
        Subset.load(str(path), toy, "train")
    assert "\n" not in str(caught.value) and "few_shot.py" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "{}", '{"dataset": "toy"}'])
def test_a_damaged_or_missing_subset_is_refused_in_one_line(toy, tmp_path, text):
    path = tmp_path / "bad.json"
    path.write_text(text)
    for name in (str(path), str(tmp_path / "none.json"), "few_shot/none.json"):
        with pytest.raises(BadInput) as caught:
            Subset.load(name, toy, "train")
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_subset_is_found_beside_the_manifest_and_its_bytes_depend_on_its_content_alone(toy, file, tmp_path):
    from pathlib import Path

    beside = Path(toy.dir) / "few_shot" / "few.json"
    Subset.load(str(file), toy, "train").save(beside)
    assert beside.read_bytes() == file.read_bytes()
    assert Subset.load("few_shot/few.json", toy, "train") == Subset.load(str(file), toy, "train")


def test_places_cover_every_shard_and_point_at_the_named_samples(toy, file):
    places = Subset.load(str(file), toy, "train").places(toy)
    found = [7 * shard + int(i) for shard, rows in enumerate(places) for i in rows]
    assert found == sorted(CHOSEN) and len(places) == len(toy.shards("train"))
    assert torch.tensor([len(rows) for rows in places]).sum() == len(CHOSEN)
