"""Methods whose layers share a computation of a forward: fewer operations, and the gradients of layers alone."""

import peft
import pytest
import torch

from mmpeft_ds import AuroraConfig, GraphLoraConfig, PAdapterConfig, TensLoraConfig
from tests.helpers.device.counters import counted
from tests.helpers.models.tiny_zoo import ZOO, output

CONFIGS = {
    "aurora": lambda: AuroraConfig(r=4, dropout=0.0),
    "graph_lora": lambda: GraphLoraConfig(r=2, adjacency="dense"),
    "p_adapter": lambda: PAdapterConfig(r=4),  # what a mask hides
    "tens_lora": lambda: TensLoraConfig(r=3),
}


def attached(name):
    torch.manual_seed(3)
    model = peft.get_peft_model(ZOO["bert"].build(), CONFIGS[name]()).double()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter += 0.1 * torch.randn_like(parameter)
    return model.eval()


def gradients(model, forwards):
    """Of the sum of some forwards, each by `model` or by the model inside of it, and the kernels that they take."""
    model.zero_grad()
    with counted() as counts:
        losses = [output(forward, ZOO["bert"]).double().square().sum() for forward in forwards]
        for loss in losses:
            loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}, counts.kernels


@pytest.mark.parametrize("name", CONFIGS)
def test_layers_share_it_in_a_forward_of_the_whole_model_and_the_gradients_stay(name):
    model = attached(name)
    shared, fewer = gradients(model, [model])
    alone, more = gradients(model, [model.base_model.model])
    assert fewer < more and shared.keys() == alone.keys() and all(g.any() for k, g in alone.items() if "node" in k)
    for key, gradient in alone.items():
        torch.testing.assert_close(shared[key], gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_forwards_before_their_backward_passes_give_twice_the_gradient(name):
    model = attached(name)
    once, _ = gradients(model, [model])
    twice, _ = gradients(model, [model, model])
    for key, gradient in once.items():
        torch.testing.assert_close(twice[key], 2 * gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_between_two_forwards_is_seen_by_the_second(name):
    model = attached(name)
    before = output(model, ZOO["bert"])
    for parameter in (p for p in model.parameters() if p.requires_grad):
        parameter.data.add_(0.1)  # as DeepSpeed writes, past the count of versions
    assert not torch.equal(before, output(model, ZOO["bert"]))
    torch.testing.assert_close(output(model, ZOO["bert"]), output(model.base_model.model, ZOO["bert"]))


@pytest.mark.parametrize("name", CONFIGS)
def test_two_losses_of_one_forward_whose_layers_have_nothing_else_in_common(name):
    model, gradients = attached(name), []
    for apart in (False, True):
        given = []
        hooks = [
            layer.register_forward_hook(lambda module, args, out, given=given: given.append(out) or out.detach())
            for layer in model.get_base_model().encoder.layer
        ]
        output(model, ZOO["bert"])
        for hook in hooks:
            hook.remove()
        losses = [out.square().sum() for out in given]
        for loss in losses if apart else [sum(losses)]:
            loss.backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys() and gradients[0]
    for key, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], gradient, rtol=1e-10, atol=1e-12)
