"""The verbs of peft on every registered method, attached to tiny stock models: what may be relied on, whatever trains.

A new method joins by being registered. A pair that cannot be attached must say why (`BadInput`); which those are is
written in docs/methods.md and not here.

A test of all pairs has every method on every second model that takes it, and the rest is slow: what a verb does is a
matter of the method, and the models differ in where it attaches. Which half it is alternates, so that every pair is
tried by some of the tests.
"""

import dataclasses
import warnings
from contextlib import contextmanager

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mmpeft_ds import methods
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites import Sites, find_sites
from mmpeft_ds.sites.condition import MEDIA, QUESTION, Condition, conditioned, enable_checkpointing
from tests.helpers import plain_methods
from tests.helpers.models.tiny_stock import fill, image
from tests.helpers.models.tiny_zoo import ZOO, output

MODELS = ("bert", "gpt2", "blip", "bart")
# Not `enable_input_require_grads`, whose leaf BLIP changes in place.
WITH_GRADIENT = torch.ones(1, requires_grad=True)
# peft's own layers take the change off again, which does not restore the bits.
PEFTS_OWN = [name for name in plain_methods.names(heads=False) if methods.get(name).Tuner is None]


@contextmanager
def condition(rows: int = 2):
    """What a composed model would publish."""
    states = torch.randn(rows, 5, 16, generator=torch.Generator().manual_seed(6))
    kinds = torch.tensor([[MEDIA, MEDIA, QUESTION, QUESTION]]).expand(rows, -1)
    with conditioned(Condition(image(rows), encoder=states, kinds=kinds)):
        yield


def configured(name: str, model: nn.Module, sites: Sites | None = None, **options: object) -> peft.PeftConfig:
    method, sites = methods.get(name), sites or find_sites(model)
    if "model.decoder" in sites.towers and "tower" in {f.name for f in dataclasses.fields(method.Config)}:
        options["tower"] = ["text"]  # of BART's two towers both
    config = method.Config(**options)
    method.check(config, sites, 16)
    return method.prepare(config, model, sites)


def attach(name: str, model: nn.Module, filled: bool = True, **options: object) -> peft.PeftModel:
    torch.manual_seed(7)
    wrapped = peft.get_peft_model(model, configured(name, model, **options))
    return fill(wrapped, scale=0.1) if filled else wrapped


def attachable() -> list[tuple[str, str]]:
    pairs, built = [], {model: ZOO[model].build() for model in MODELS}
    sites = {model: find_sites(built[model]) for model in MODELS}
    for name in plain_methods.names(heads=False):
        for model in MODELS:
            try:
                configured(name, built[model], sites[model])
            except BadInput:
                continue
            pairs.append((name, model))
    return pairs


PAIRS = attachable()


def is_quick(name: str, model: str, turn: int) -> bool:
    """Whether this pair belongs to the half of this turn, 0 or 1; what one model alone takes belongs to both."""
    models = [m for n, m in PAIRS if n == name]
    return len(models) == 1 or (models.index(model) + len(name) + turn) % 2 == 0


def marked(name: str, model: str, turn: int) -> tuple[pytest.MarkDecorator, ...]:
    return () if is_quick(name, model, turn) else (pytest.mark.slow,)


def every_pair(turn: int) -> pytest.MarkDecorator:
    """All pairs as the argument `pair`; those of the other half are slow."""
    pairs = [pytest.param(pair, id="-".join(pair), marks=marked(*pair, turn)) for pair in PAIRS]
    return pytest.mark.parametrize("pair", pairs)


def run(wrapped: nn.Module, model: str) -> Tensor:
    with condition():
        return output(wrapped, ZOO[model])


def train(wrapped: nn.Module, model: str, steps: int = 2) -> None:
    trainables = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainables, 0.05)
    for _ in range(steps):
        run(wrapped, model).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def bare(model: nn.Module) -> dict[str, Tensor]:
    """Parameters of the frozen model inside, by their names before anything was attached."""
    tuned = {id(p) for p in model.parameters() if p.requires_grad}
    return {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if id(p) not in tuned}


def test_every_method_attaches_to_some_of_these_models():
    assert {name for name, _ in PAIRS} == set(plain_methods.names(heads=False))
    assert {model for _, model in PAIRS} == set(MODELS)
    halves = [{pair for pair in PAIRS if is_quick(*pair, turn)} for turn in (0, 1)]
    assert halves[0] | halves[1] == set(PAIRS)
    for half in halves:
        assert {name for name, _ in half} == {name for name, _ in PAIRS} and {model for _, model in half} == set(
            MODELS
        )


@every_pair(0)
def test_training_leaves_the_base_as_it_was_and_disabling_shows_it(pair):
    name, model = pair
    base = ZOO[model].build()
    before, frozen = run(base, model), {n: p.clone() for n, p in base.named_parameters()}
    wrapped = attach(name, base, filled=False)
    train(wrapped, model)
    now = bare(wrapped.get_base_model())
    assert all(torch.equal(now[n], p) for n, p in frozen.items()), "a base tensor changed"
    assert all(p.grad is None for n, p in wrapped.named_parameters() if not p.requires_grad)
    changed = run(wrapped, model)
    assert not torch.equal(changed, before)
    with wrapped.disable_adapter():
        assert torch.equal(run(wrapped, model), before)
    assert torch.equal(run(wrapped, model), changed)
    assert torch.equal(run(wrapped.unload(), model), before)


@every_pair(1)
def test_saving_and_loading_is_equal_to_the_bit(pair, tmp_path):
    name, model = pair
    wrapped = attach(name, ZOO[model].build())
    wrapped.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {n.replace(".default", "") for n, p in wrapped.named_parameters() if p.requires_grad}
    want = run(wrapped, model)
    assert not [n for n in wrapped.state_dict() if not n.startswith("base_model.model.")], "the tuner holds a module"
    again = peft.PeftModel.from_pretrained(ZOO[model].build(), tmp_path, adapter_name="renamed")
    assert torch.equal(run(again, model), want)
    assert not any(p.requires_grad for p in again.parameters())
    lazy = peft.PeftModel.from_pretrained(ZOO[model].build(), tmp_path, low_cpu_mem_usage=True, is_trainable=True)
    assert torch.equal(run(lazy, model), want)
    assert sum(p.requires_grad for p in lazy.parameters()) == len(saved)


@every_pair(0)
def test_two_adapters_are_what_they_are_alone(pair):
    name, model = pair
    wrapped = attach(name, ZOO[model].build())
    first = run(wrapped, model)
    config = configured(name, wrapped.get_base_model())
    torch.manual_seed(8)
    wrapped.add_adapter("other", config)
    assert torch.equal(run(wrapped, model), first), "adding an adapter must not change the active one"
    wrapped.set_adapter("other")
    trained = [n for n, p in wrapped.named_parameters() if p.requires_grad]
    assert trained and all(".other" in n for n in trained)
    fill(wrapped, seed=4, scale=0.1)
    second = run(wrapped, model)
    assert not torch.equal(second, first)

    base = ZOO[model].build()
    config = configured(name, base)
    torch.manual_seed(8)
    alone = peft.get_peft_model(base, config)
    assert torch.equal(run(fill(alone, seed=4, scale=0.1), model), second)

    wrapped.set_adapter("default")
    assert torch.equal(run(wrapped, model), first)
    wrapped.delete_adapter("other")
    assert not any(".other" in n for n, _ in wrapped.named_parameters())
    assert torch.equal(run(wrapped, model), first)


@every_pair(1)
def test_merging_is_exact_or_refused(pair):
    name, model = pair
    base = ZOO[model].build()
    frozen = run(base, model)
    wrapped = attach(name, base)
    kept = run(wrapped, model)
    if methods.get(name).unmergeable(wrapped.peft_config["default"]):
        for verb in (wrapped.merge_adapter, wrapped.merge_and_unload):
            with pytest.raises(BadInput, match="cannot be merged") as refused:
                verb()
            assert "\n" not in str(refused.value)
        assert torch.equal(run(wrapped, model), kept)
        return
    wrapped.merge_adapter(safe_merge=True)
    torch.testing.assert_close(run(wrapped, model), kept, rtol=1e-6, atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's IA3 warns that its own is inexact
        wrapped.unmerge_adapter()
    loose = {"rtol": 1e-5, "atol": 1e-5} if name in PEFTS_OWN else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(run(wrapped, model), kept, **loose)
    with wrapped.disable_adapter():
        torch.testing.assert_close(run(wrapped, model), frozen, **loose)
    try:
        merged = wrapped.merge_and_unload()
    except BadInput as refused:  # part of it fits into weights, part does not
        assert "cannot hold" in str(refused) and "\n" not in str(refused)
        return
    torch.testing.assert_close(run(merged, model), kept, rtol=1e-6, atol=1e-6)
    assert set(dict(merged.named_parameters())) == set(dict(ZOO[model].build().named_parameters()))


@every_pair(0)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_unmerging_restores_half_precision_weights_to_the_bit_except_with_pefts_own(pair, dtype):
    name, model = pair
    if methods.get(name).unmergeable(configured(name, ZOO[model].build())):
        return
    base = ZOO[model].build().to(dtype)
    frozen = {n: p.clone() for n, p in base.named_parameters()}
    wrapped = attach(name, base)
    for _ in range(2):
        wrapped.merge_adapter()
        merged = bare(wrapped.get_base_model())
        assert any(not torch.equal(merged[n], p) for n, p in frozen.items()), "nothing was merged"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's IA3 warns that its own is inexact
            wrapped.unmerge_adapter()
    now = bare(wrapped.get_base_model())
    changed = [n for n, p in frozen.items() if not torch.equal(now[n], p)]
    assert not changed if name not in PEFTS_OWN else changed  # the latter as a negative control


def gradients(name: str, model: str, reentrant: bool | None) -> dict[str, Tensor]:
    wrapped = attach(name, ZOO[model].build()).train()
    if reentrant is not None:
        enable_checkpointing(wrapped.get_base_model(), use_reentrant=reentrant)
        if reentrant:  # else nothing that enters the first layer requires gradient
            for module in wrapped.modules():
                if type(module).__name__.endswith("Embeddings") or isinstance(module, nn.Embedding):
                    module.register_forward_hook(lambda m, a, out: out if out.requires_grad else out * WITH_GRADIENT)
    run(wrapped, model).square().mean().backward()
    return {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}


@every_pair(1)
def test_recomputed_layers_give_the_same_gradients(pair):
    plain = gradients(*pair, None)
    assert any(g is not None and g.any() for g in plain.values())
    for reentrant in (False, True):
        again = gradients(*pair, reentrant)
        for name, gradient in plain.items():
            assert (gradient is None) == (again[name] is None), name
            if gradient is not None:
                torch.testing.assert_close(
                    again[name], gradient, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
                )


@pytest.mark.parametrize(
    ("name", "model", "beams"),
    [
        pytest.param(*pair, beams, marks=marked(*pair, turn))
        for pair in PAIRS
        if ZOO[pair[1]].prompt
        for turn, beams in enumerate((1, 3))
    ],
)
def test_writing_with_a_cache_is_writing_without_one(name, model, beams):
    wrapped = attach(name, ZOO[model].build())
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    # Copies: BLIP writes its first token into the tensor it is given, which all tests share.
    prompts = [{k: v.clone() for k, v in ZOO[model].prompt().items()} for _ in range(2)]
    with condition():
        cached = wrapped.generate(**prompts[0], **options, use_cache=True)
        whole = wrapped.generate(**prompts[1], **options, use_cache=False)
    assert torch.equal(cached.sequences, whole.sequences)
    for one, other in zip(cached.scores, whole.scores, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@every_pair(0)
def test_trainables_are_float32_on_a_bfloat16_base(pair):
    name, model = pair
    wrapped = attach(name, ZOO[model].build().to(torch.bfloat16))
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    wrapped.add_adapter("other", configured(name, wrapped.get_base_model()))
    assert {p.dtype for n, p in wrapped.named_parameters() if ".other" in n} == {torch.float32}
    inputs = {k: v.to(torch.bfloat16) for k, v in ZOO[model].inputs().items() if v.is_floating_point()}
    with condition():
        out = output(wrapped, ZOO[model], **inputs)
    assert out.dtype == torch.bfloat16 and out.isfinite().all()
    out.float().square().mean().backward()
    grads = [p.grad for p in wrapped.parameters() if p.grad is not None]
    assert grads and all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


# a head in bfloat16 stays so with peft's own tuners
@pytest.mark.parametrize("name", [name for name, model in PAIRS if model == "bert" and name not in PEFTS_OWN])
def test_heads_that_train_beside_are_float32_and_saved(name, tmp_path):
    wrapped = attach(name, ZOO["bert"].build().to(torch.bfloat16), modules_to_save=["pooler"])
    with condition():
        pooled = wrapped(**ZOO["bert"].inputs()).pooler_output
    assert pooled.dtype == torch.float32
    heads = [p for n, p in wrapped.named_parameters() if ".pooler.modules_to_save." in n]
    assert heads and all(p.dtype == torch.float32 and p.requires_grad for p in heads)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(ZOO["bert"].build().to(torch.bfloat16), tmp_path)
    with condition():
        assert torch.equal(again(**ZOO["bert"].inputs()).pooler_output, pooled)


@pytest.mark.parametrize("name", ["aurora", "graph_lora", "routed_lora", "tens_lora"])
def test_an_adapter_that_is_not_finite_is_not_merged_where_that_is_asked_for(name):
    options = {"route": "none"} if name == "routed_lora" else {}
    wrapped = attach(name, ZOO["gpt2"].build(), **options)
    frozen = {n: p.clone() for n, p in bare(wrapped).items()}
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"h\.0\.attn.*adapter 'default' is not finite and was not merged"):
        wrapped.merge_adapter(safe_merge=True)
    assert all(torch.equal(p, frozen[n]) for n, p in bare(wrapped).items())
