"""Losses of given tokens without the logits of all positions equal those of torch's cross-entropy over all logits."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft_ds.ops import token_scores as module
from mmpeft_ds.ops.finished_logits import PLAIN, Finish
from mmpeft_ds.ops.scored_head import biased_logits, is_scorable, scored
from mmpeft_ds.ops.token_scores import TokenScores, token_scores

T, S, D, V = 3, 7, 5, 11


def case(dtype=torch.float64, bias=True):
    g = torch.Generator().manual_seed(0)
    states = torch.randn(T, S, D, generator=g, dtype=dtype).requires_grad_()
    weight, offset = torch.randn(V, D, generator=g, dtype=dtype), torch.randn(V, generator=g, dtype=dtype)
    labels = torch.randint(V, (T, S), generator=g)
    labels[0, :4] = labels[2] = -100
    return states, weight, offset if bias else None, labels


def plainly(states, weight, bias, labels, smoothing):
    logits = torch.nn.functional.linear(states, weight, bias)
    return logits, cross_entropy(logits.transpose(1, 2), labels, reduction="none", label_smoothing=smoothing)


# Positions whose logits exist together: one, four (so that the last part is smaller), all.
@pytest.fixture(params=[1, 4, 1024])
def together(request, monkeypatch):
    monkeypatch.setattr(module, "LOGITS", request.param * V + V // 2)


def compare(states, weight, offset, labels, smoothing):
    """Losses, the gradients of all that requires one, and right tokens, of both forms, under uneven weights."""
    leaves = [x for x in (states, weight, offset) if x is not None and x.requires_grad]
    slopes = torch.rand(labels.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    logits, expected = plainly(states, weight, offset, labels, smoothing)
    wanted = torch.autograd.grad((slopes * expected).sum(), leaves, retain_graph=True)
    scores = TokenScores(*token_scores(states, weight, offset, labels))
    losses = scores.losses(smoothing)
    found = torch.autograd.grad((slopes * losses).sum(), leaves, retain_graph=True)
    torch.testing.assert_close(losses, expected, atol=1e-12, rtol=0)
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, atol=1e-12, rtol=0)
    assert torch.equal(scores.right.bool(), (logits.argmax(-1) == labels) & (labels != -100))
    return found


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",), ("weight", "bias")])
def test_losses_and_gradients_are_those_of_all_logits(together, smoothing, bias, trained):
    states, weight, offset, labels = case(bias=bias)
    weight.requires_grad_("weight" in trained)
    if bias:
        offset.requires_grad_("bias" in trained)
    for gradient in compare(states, weight, offset, labels, smoothing):
        assert gradient.abs().max() > 0.1


@pytest.mark.parametrize("texts, positions", [(0, S), (T, 0), (1, 1)])
@pytest.mark.parametrize("trained", [False, True])
def test_an_empty_batch_and_a_single_position(together, texts, positions, trained):
    states, weight, offset, labels = case()
    states = states.detach()[:texts, -positions or S :].requires_grad_()
    compare(states, weight.requires_grad_(trained), offset, labels[:texts, -positions or S :], 0.1)


@pytest.mark.parametrize("trained", [False, True])
def test_every_position_may_have_a_label(together, trained):
    states, weight, offset, labels = case()
    compare(states, weight.requires_grad_(trained), offset, labels.abs() % V, 0.1)


def test_a_tied_weight_gets_the_gradients_of_both_its_uses(together):
    _, weight, offset, labels = case()
    weight.requires_grad_()
    ids = labels.abs() % V
    compare(torch.tanh(weight[ids]), weight, offset, labels, 0.1)


def test_a_second_backward_pass_gives_the_same(together):
    for trained in (False, True):
        states, weight, offset, labels = case()
        nll, uniform, _ = token_scores(states, weight.requires_grad_(trained), offset, labels)
        first, second = (torch.autograd.grad((nll + uniform).sum(), states, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)


@pytest.mark.parametrize("trained", [False, True])
def test_a_gradient_of_the_gradient_is_refused_and_not_left_out(trained):
    states, weight, offset, labels = case()
    nll, uniform, _ = token_scores(states, weight.requires_grad_(trained), offset, labels)
    slope = torch.ones((), dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((slope * (nll + uniform)).sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (gradient.square().sum() + slope).backward()


def test_without_a_label_the_loss_is_0_and_the_gradient_is_0_and_not_missing():
    """A rank without a sample goes through the same backward as the others."""
    states, weight, offset, labels = case()
    losses = TokenScores(*token_scores(states, weight, offset, torch.full_like(labels, -100))).losses(0.1)
    losses.sum().backward()
    assert torch.equal(losses, torch.zeros_like(losses)) and torch.equal(states.grad, torch.zeros_like(states))


def test_over_bfloat16_losses_are_float32_and_gradients_those_of_float32_logits_rounded():
    states, weight, offset, labels = case(torch.bfloat16)
    scores = TokenScores(*token_scores(states, weight, offset, labels))
    assert scores.nll.dtype == torch.float32
    logits = torch.nn.functional.linear(states, weight, offset)
    expected = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(scores.nll, expected)
    (wanted,) = torch.autograd.grad(expected.sum(), states)
    (gradient,) = torch.autograd.grad(scores.nll.sum(), states)
    torch.testing.assert_close(gradient, wanted, atol=0.02, rtol=0.02)


def test_evaluation_keeps_nothing_for_a_backward_pass():
    states, weight, offset, labels = case()
    with torch.no_grad():
        scores = TokenScores(*token_scores(states, weight, offset, labels))
    assert scores.nll.grad_fn is None


def test_a_layer_scores_within_the_block_and_computes_logits_behind_it():
    head = nn.Linear(D, V).double().requires_grad_(False)
    states, _, _, labels = case()
    with scored(head, lambda positions: labels[:, : positions - 2]):  # of the last positions
        outputs = head(states)
    assert outputs.shape == (T, S, 3) and outputs.requires_grad
    logits, expected = plainly(states[:, 2:], head.weight, head.bias, labels[:, : S - 2], 0.0)
    scores = TokenScores.of(outputs)
    torch.testing.assert_close(scores.nll[:, 2:], expected, atol=1e-12, rtol=0)
    assert torch.equal(scores.right[:, 2:], (logits.argmax(-1) == labels[:, : S - 2]) & (labels[:, : S - 2] != -100))
    assert not scores.nll[:, :2].any()
    assert head(states).shape == (T, S, V)
    with pytest.raises(RuntimeError, match="stop"), scored(head, lambda positions: labels):
        raise RuntimeError("stop")
    assert head(states).shape == (T, S, V)


def test_a_layer_with_adapters_is_not_scored():
    head = nn.Linear(D, V)
    assert is_scorable(head) and is_scorable(head.requires_grad_(False))
    assert not is_scorable(nn.Sequential(head)) and not is_scorable(None)


@pytest.mark.parametrize("own", [True, False])
def test_a_bias_that_belongs_to_no_layer_enters_the_scores(own):
    head = nn.Linear(D, V, bias=own).double().requires_grad_(False)
    states, _, offset, labels = case()
    logits = biased_logits(head, states, offset[None])
    with scored(head, lambda positions: labels):
        scores = TokenScores.of(biased_logits(head, states, offset[None]))
    assert torch.equal(logits, head(states) + offset)
    expected = cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(scores.nll, expected, atol=1e-12, rtol=0)
    without = cross_entropy(head(states).transpose(1, 2), labels, reduction="none")
    assert (scores.nll - without).abs().max() > 0.1


@pytest.mark.parametrize("trained", [False, True])
def test_hooks_of_others_see_a_frozen_layer_without_and_a_trained_one_with_a_gradient(trained):
    """DeepSpeed gathers the weight once more for the backward pass of what returns something with a gradient."""
    head = nn.Linear(D, V).double().requires_grad_(trained)
    seen = []
    head.register_forward_pre_hook(lambda m, args: seen.append(args[0].requires_grad))
    head.register_forward_hook(lambda m, args, out: seen.append(out.requires_grad))
    states, _, _, labels = case()
    for _ in range(2):
        with scored(head, lambda positions: labels):
            out = head(states)
        out[..., 0].sum().backward()
    assert seen == [trained] * 4 and states.grad.abs().max() > 0.1
    assert len(head._forward_hooks) == len(head._forward_pre_hooks) == 1


def test_a_layer_with_a_forward_of_its_own_is_not_scored():
    head = nn.Linear(D, V).requires_grad_(False)
    head.forward = lambda x: nn.Linear.forward(head, x)  # as accelerate does where it moves weights between devices
    assert not is_scorable(head)
    del head.forward
    assert is_scorable(head)


GIB = 2**30
# texts, kept positions, tokens of the vocabulary, width, peaks of the plain form as counted
SHAPES = [(4, 2048, 152_064, 3584), (4, 1024, 152_064, 3584), (16, 2048, 32_064, 4096)]


@pytest.mark.parametrize("finish", [PLAIN, Finish(cap=30.0)])
@pytest.mark.parametrize("texts, positions, tokens, width", SHAPES)
def test_the_peak_of_head_loss_and_backward_is_below_1_2_gib(texts, positions, tokens, width, finish):
    """With a label at every position, in bfloat16; what is counted is made of shapes alone."""
    with torch.device("meta"):
        states = torch.empty(texts, positions, width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(tokens, width, dtype=torch.bfloat16)
        labels = torch.empty(texts, positions, dtype=torch.int64)
        rows = torch.empty(texts * positions, dtype=torch.int64)
    with _Peak(states, weight, labels, rows) as peak:
        with torch.no_grad():
            known = module._known(states.flatten(0, 1), rows, weight, None, labels.flatten(), True, finish)
        nll, uniform, _ = known.attached(states)
        (nll + uniform).sum().backward()
    assert peak.most < 1.2 * GIB
    with _Peak(states, weight, labels) as plain:
        logits = torch.nn.functional.linear(states, weight)
        losses = cross_entropy(logits.float().transpose(1, 2), labels, reduction="none")
        losses.sum().backward()
    needed = texts * positions * tokens * 2
    assert plain.most > 6 * needed > 5 * GIB, "negative control"


class _Peak(TorchDispatchMode):
    """Counts the bytes of storages that operations have made and that are still alive, not those of `given`."""

    def __init__(self, *given: torch.Tensor):
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.alive: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive and storage._cdata not in self.given:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.most = max(self.most, sum(self.alive.values()))
        return result
