"""Packing of decoded samples."""

import pytest
import torch

from mmpeft_ds.data import order
from mmpeft_ds.data.batch import IMAGE_MARK, Prompted, Sample, hash_id, hash_ids, pack
from mmpeft_ds.errors import BadSample
from tests.helpers.data.tiny_shards import collate_images, collate_targets, collate_texts


def packed(*samples):
    return pack(samples, collate_images, collate_texts, collate_targets)


def good(sample_id, images=0, texts=0):
    image = torch.zeros(3, 2, 2, dtype=torch.uint8)
    return Sample(sample_id, 1.0, [image] * images, ["t"] * texts, [(1, 2)] * texts)


def test_owners_follow_ragged_samples_and_empty_slots():
    batch = packed(good("a", 1, 3), Sample(), good("b", 0, 1), good("c", 2, 0))
    assert batch.weight.tolist() == [1, 0, 1, 1]
    assert batch.image_owner.tolist() == [0, 3, 3] and batch.text_owner.tolist() == [0, 0, 0, 2]
    assert batch.text_weight.tolist() == [1, 1, 1, 1]
    assert batch.modalities == {"image", "text"}


def test_a_batch_lacks_the_modality_that_no_slot_has():
    assert packed(good("a", 0, 2)).modalities == {"text"} and packed(good("a", 0, 2)).images == {}
    assert packed(Sample(), Sample()).modalities == frozenset()


def test_targets_must_match_texts():
    with pytest.raises(ValueError, match="2 texts but 1 targets"):
        packed(Sample("a", 1.0, [], ["x", "y"], [(1, 2)]))


def test_key_hash_counts_samples_of_weight_only_and_adds_up_over_ranks():
    one, two = good("a", 0, 1), good("b", 0, 1)
    bad = Sample("c", 0.0, bad=("image", "s", "c"))
    whole = packed(one, two, bad, Sample()).sample_keys_hash()
    assert whole == (hash_id("a") + hash_id("b")) % 2**64
    assert (packed(one, bad).sample_keys_hash() + packed(two).sample_keys_hash()) % 2**64 == whole
    assert packed(one).sample_keys_hash() != packed(two).sample_keys_hash()


def test_hashes_of_many_samples_are_those_one_by_one():
    names = ["a/train-000000001", "ü/x", "it's", ""]
    assert hash_ids(names).tolist() == list(map(hash_id, names))
    assert order.keys_of(names).tolist() == list(map(order.key_of, names))
    assert not len(hash_ids([])) and not len(order.keys_of([]))


def test_moving_keeps_everything_and_changes_only_tensors():
    batch = packed(good("a", 1, 1))
    moved = batch.to("meta")
    assert moved.images["pixels"].device.type == "meta" and moved.weight.device.type == "meta"
    assert moved.records is batch.records and moved.sample_id == batch.sample_id


def test_texts_in_two_parts_learn_how_many_images_go_with_them():
    sample = good("a", 2, 2)
    sample.texts = [Prompted("what?"), Prompted("and?", turns=(("user", f"{IMAGE_MARK} or {IMAGE_MARK}?"),))]
    batch = pack(
        [sample, Sample()], collate_images, lambda t: {"images": torch.tensor([x.images for x in t])}, lambda t: {}
    )
    assert batch.texts["images"].tolist() == [2, 2] and [t.images for t in batch.raw_texts] == [2, 2]
    assert [t.images for t in sample.texts] == [None, None]


def test_a_text_that_names_another_number_of_images_is_a_bad_sample():
    sample = good("a", 1, 1)
    sample.texts = [Prompted(f"{IMAGE_MARK}{IMAGE_MARK} which?")]
    with pytest.raises(BadSample, match="names <image> 2 times, but the sample has 1 images"):
        packed(sample)


def test_counts_are_those_of_what_enters_the_loss_and_slots_without_weight_change_none():
    bad = Sample("c", 0.0, [], ["t"], [(1, 2)], bad=("image", "s", "c"))
    whole, part = packed(good("a", 1, 3), bad, good("b", 0, 1)), packed(good("a", 1, 3), good("b", 0, 1))

    def weight(batch):
        return float(batch.text_weight.sum())

    counts = whole.count(weight)
    assert (counts.loss_weight, counts.rows, counts.changed) == (4.0, 4, [0, 0, 0])
    assert counts == part.count(weight) and counts.keys_hash == (hash_id("a") + hash_id("b")) % 2**64
    assert packed(good("a", 2), Sample()).count(lambda batch: 1.0).rows == 1  # slots, where there are no texts


def test_a_batch_that_is_where_it_shall_be_is_not_copied():
    batch = packed(good("a", 1, 1))
    assert batch.to("cpu") is batch and batch.to("meta") is not batch
