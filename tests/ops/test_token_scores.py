"""Losses of given tokens without the logits of all positions equal those of torch's cross-entropy over all logits."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from mmpeft_ds.ops import token_scores as module
from mmpeft_ds.ops.token_scores import TokenScores, is_scorable, scored, token_scores

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


@pytest.mark.parametrize("chunk", [1, 4, 1024])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("bias", [True, False])
def test_losses_and_gradients_are_those_of_all_logits(monkeypatch, chunk, smoothing, bias):
    monkeypatch.setattr(module, "CHUNK", chunk)
    states, weight, offset, labels = case(bias=bias)
    logits, expected = plainly(states, weight, offset, labels, smoothing)
    slopes = torch.rand(T, S, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (wanted,) = torch.autograd.grad((slopes * expected).sum(), states)
    scores = TokenScores(*token_scores(states, weight, offset, labels))
    losses = scores.losses(smoothing)
    (gradient,) = torch.autograd.grad((slopes * losses).sum(), states)
    torch.testing.assert_close(losses, expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)
    assert gradient.abs().max() > 0.1
    assert torch.equal(scores.right.bool(), (logits.argmax(-1) == labels) & (labels != -100))


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


def test_what_trains_or_has_adapters_is_not_scored():
    head = nn.Linear(D, V)
    assert not is_scorable(head) and not is_scorable(None)
    assert is_scorable(head.requires_grad_(False))
    assert not is_scorable(nn.Sequential(head))


def test_a_layer_with_a_forward_of_its_own_is_not_scored():
    head = nn.Linear(D, V).requires_grad_(False)
    head.forward = lambda x: nn.Linear.forward(head, x)  # as accelerate does where it moves weights between devices
    assert not is_scorable(head)
    del head.forward
    assert is_scorable(head)


def test_the_logits_of_a_long_conversation_are_never_there_together():
    """4 x 2,048 positions over 152,064 tokens, 2,048 of them labelled: below 1.2 GiB where logits took 15.0."""
    with torch.device("meta"):
        states = torch.empty(2048, 3584, dtype=torch.bfloat16, requires_grad=True)
        weight, labels = torch.empty(152_064, 3584, dtype=torch.bfloat16), torch.empty(2048, dtype=torch.int64)
    with _Peak(states, weight) as peak:
        nll, _, _ = module._Scores.apply(states, weight, None, labels)
        nll.sum().backward()
    assert peak.most < 1.2 * 2**30
    with _Peak(states, weight) as plain:
        logits = torch.nn.functional.linear(states, weight)
        cross_entropy(logits.float(), labels).backward()
    assert plain.most > 3 * 2**30, "negative control: what the plain form takes for the labelled positions alone"


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
