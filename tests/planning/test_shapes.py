"""Operations that run by shapes alone count what they would compute and hold."""

import pytest
import torch
from torch import nn

from mmpeft_ds.errors import BadInput
from mmpeft_ds.planning.shapes import Live, counting


def test_matrix_products_are_counted_by_dtype():
    with counting() as counts:
        torch.empty(2, 3, device="meta") @ torch.empty(3, 5, device="meta")
        torch.empty(2, 3, device="meta", dtype=torch.bfloat16) @ torch.empty(3, 7, device="meta", dtype=torch.bfloat16)
    assert counts.flops == {torch.float32: 2 * 2 * 3 * 5, torch.bfloat16: 2 * 2 * 3 * 7}


def test_live_bytes_rise_and_fall_with_the_tensors_and_views_count_once():
    live = Live()
    with counting(live):
        a = torch.empty(100, device="meta")
        view = a[:50]
        b = a + 1
        assert live.now == 800
        del b
        assert live.now == 400 and live.peak == 800
        del a
        assert live.now == 400, "the view keeps the storage"
        del view
    assert live.now == 0


def test_a_tensor_after_the_end_of_one_that_was_left_out_counts_at_its_place_too():
    live = Live()
    known = set()
    for _ in range(100):  # until a storage has the place of one that is gone
        weight = torch.empty(10, device="meta")
        live.ignore(weight)
        known.add(id(weight.untyped_storage()))
        del weight
        made = torch.empty(10, device="meta")
        taken = id(made.untyped_storage()) in known
        live.see(made)
        assert live.now == 40
        del made
        if taken:
            break
    assert taken and live.now == 0


def test_each_who_asks_hears_of_the_most_since_it_asked_last():
    live = Live()
    live.recent("early")
    a = torch.empty(100, device="meta")
    live.see(a)
    del a
    live.recent("late")
    b = torch.empty(10, device="meta")
    live.see(b)
    assert live.recent("late") == 40 and live.recent("early") == 400 and live.recent("early") == 40


def test_what_backward_needs_stays_until_it_has_run():
    live, weight = Live(), nn.Parameter(torch.empty(64, 64, device="meta"))
    live.ignore(weight)
    x = torch.empty(10, 64, device="meta")
    live.ignore(x)
    with counting(live):
        loss = torch.relu(x @ weight).sum()
        kept = live.now
        loss.backward()
        weight.grad = None
        del loss
    assert kept >= 10 * 64 * 4 and live.now == 0
    assert live.peak >= kept + 64 * 64 * 4, "the gradient of the weight"


def test_integers_keep_their_values_on_the_way_to_the_device():
    with counting():
        ids = torch.tensor([[1, 5, 5]]).to("meta")
        states = torch.empty(1, 3, 8, device="meta")
        assert int((ids == 5).sum()) == 2
        assert states[ids == 5].shape == (2, 8)
        assert torch.arange(4, device=states.device).tolist() == [0, 1, 2, 3]
        assert nn.functional.embedding(ids, torch.empty(9, 8, device="meta")).shape == (1, 3, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_does_not_hold_its_scores(dtype, masked):
    q, k, v = (torch.empty(1, 2, 512, 64, device="meta", dtype=dtype, requires_grad=True) for _ in range(3))
    mask = torch.ones(1, 1, 512, 512, dtype=torch.bool) if masked else None
    live = Live()
    with counting(live) as counts:
        out = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=not masked)
    assert out.shape == q.shape and counts.flops
    scores = 2 * 512 * 512 * q.element_size()
    assert live.now < scores + (scores // 2 if masked else 0)


def test_autocast_does_nothing_on_the_meta_device_and_is_torchs_afterwards():
    with counting() as found, torch.autocast("meta", torch.bfloat16):
        nn.Linear(3, 5, device="meta")(torch.empty(2, 3, device="meta"))
    assert set(found.flops) == {torch.float32}
    with pytest.raises(RuntimeError):  # negative control
        torch.autocast("meta", torch.bfloat16)


def test_the_plain_attention_is_back_afterwards():
    plain = nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), counting():
        raise ZeroDivisionError
    assert nn.functional.scaled_dot_product_attention is plain


def test_a_way_that_depends_on_numbers_is_refused():
    with counting(), pytest.raises(BadInput, match="cannot be counted"):
        int(torch.empty(3, device="meta").argmax())


def test_weights_of_samples_keep_their_values_and_choose_what_takes_part():
    with counting():
        weight = torch.tensor([1.0, 0.0, 1.0]).to("meta")
        states = torch.empty(3, 8, device="meta")
        assert states[weight > 0].shape == (2, 8) and (states * weight[:, None]).device.type == "meta"


def test_whichever_of_samples_that_are_alike_is_chosen_its_tokens_are_known():
    with counting():
        mask = torch.ones(4, 6, dtype=torch.bool)
        hardest = torch.empty(4, 9, device="meta").argmax(1)
        assert bool(mask[hardest].all()) and mask[hardest].shape == (4, 6)
        assert bool(mask.index_select(0, hardest).all())


def test_a_buffer_that_goes_to_the_input_has_no_values_there_either():
    buffer = torch.zeros(3, dtype=torch.int64, device="meta")
    with counting():
        moved = buffer.to(torch.device("cpu"))
        gathered = torch.gather(moved, 0, torch.tensor([0, 2]))
    assert moved.device.type == "meta" and gathered.shape == (2,)


def test_what_only_numbers_tell_is_said_in_one_line():
    mask = torch.zeros(3, dtype=torch.bool, device="meta")
    with counting(), pytest.raises(BadInput, match="cannot be counted"):
        torch.zeros(3)[mask]
    with counting(), pytest.raises(BadInput, match="cannot be counted"):
        torch.zeros(3, device="meta")[mask]
