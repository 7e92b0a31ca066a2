"""Deep prompts in every family, compared with a plain evaluation of the equation."""

import copy
import math

import peft
import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from mmpeft_ds import DeepPromptConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.sites import find_sites
from tests.helpers.models.tiny_stock import IDS, fill
from tests.helpers.models.tiny_zoo import MASK, ZOO, output

P = 3
# family, tower, attention; T5 is refused
ATTENTION = [
    ("bert", "", "self"),
    ("roberta", "", "self"),
    ("bert_decoder", "bert", "self"),
    ("bert_decoder", "bert", "cross"),
    ("gpt2", "transformer", "self"),
    ("vit", "", "self"),
    ("dinov2", "", "self"),
    ("clip_vision", "", "self"),
    ("clip_text", "", "self"),
    ("siglip_vision", "", "self"),
    ("blip", "vision_model", "self"),
    ("blip", "text_decoder.bert", "self"),
    ("blip", "text_decoder.bert", "cross"),
    ("bart", "model.encoder", "self"),
    ("bart", "model.decoder", "self"),
    ("bart", "model.decoder", "cross"),
    ("llama", "model", "self"),
    ("qwen2", "model", "self"),
]
IMPLEMENTATIONS = {"blip": [None]}  # always eager


def cases():
    return [(f, t, a, i) for f, t, a in ATTENTION for i in IMPLEMENTATIONS.get(f, ["sdpa", "eager"])]


def wrap(family, implementation=None, filled=True, **options):
    torch.manual_seed(5)
    config = DeepPromptConfig(**{"length": P, **options})
    wrapped = peft.get_peft_model(ZOO[family].build(implementation), config)
    return fill(wrapped, scale=0.7) if filled else wrapped


class Recorder:
    """Outputs of projections and inputs of the output projection, in one forward."""

    def __init__(self, model, site):
        self.seen, base = {}, model.get_base_model() if hasattr(model, "get_base_model") else model
        for name in ("q", "k", "v"):
            base.get_submodule(getattr(site, name).path).register_forward_hook(self.note(name, getattr(site, name)))
        base.get_submodule(site.out.path).register_forward_pre_hook(self.note_input)

    def note(self, name, part):
        def hook(module, args, out):
            self.seen[name] = out[..., part.start : part.start + part.width].detach()

        return hook

    def note_input(self, module, args):
        self.seen["context"] = args[0].detach()


def kept(family, tower, kind, n, m) -> Tensor:
    """(B, 1, n, m) bool: which key a query may see."""
    keep = torch.ones(2, 1, n, m, dtype=torch.bool)
    if (
        family in ("bert", "roberta", "gpt2", "bert_decoder", "clip_text", "llama", "qwen2")
        or tower == "model.encoder"
    ):
        keep &= (MASK[:, None, None] == 1) if kind == "self" else torch.ones(1, dtype=torch.bool)
    if tower == "text_decoder.bert" and kind == "self":
        keep &= MASK[:, None, None] == 1
    if family == "bert_decoder" and kind == "cross":
        keep &= torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])[:, None, None] == 1
    if (family, kind) == ("bart", "cross"):
        keep &= MASK[:, None, None] == 1
    causal = family in ("gpt2", "bert_decoder", "clip_text", "llama", "qwen2") or tower in (
        "text_decoder.bert",
        "model.decoder",
    )
    if causal and kind == "self":
        keep &= torch.ones(n, m).tril().bool()
    return keep


@pytest.mark.parametrize(("family", "tower", "kind", "implementation"), cases())
def test_a_prefix_is_attended_to_as_the_equation_says(family, tower, kind, implementation):
    """The first layer alone has a prefix; q, k and v of the frozen model enter the equation."""
    wrapped, tiny = wrap(family, implementation, tower=tower, attention=[kind], layers=[0]), ZOO[family]
    base = tiny.build(implementation)
    site = next(s for s in find_sites(base).attention if s.tower == tower and s.cross == (kind == "cross"))
    plain, own = Recorder(base, site), Recorder(wrapped, site)
    output(base, tiny)
    output(wrapped, tiny)
    prompts = {n.split(".")[-2]: p.detach() for n, p in wrapped.named_parameters() if p.requires_grad}
    q, k, v = (plain.seen[name] for name in "qkv")

    def heads(x):
        x = x.unflatten(-1, (-1, site.head_dim)).transpose(1, 2)
        return x.repeat_interleave(site.heads // x.shape[1], 1)

    if family in ("llama", "qwen2"):  # they rotate q and k, but not the prefix
        turn = base.model.rotary_emb(q, torch.arange(q.shape[1])[None])
        q, k = (
            apply_rotary_pos_emb(*[x.unflatten(-1, (-1, site.head_dim)).transpose(1, 2)] * 2, *turn)[0] for x in (q, k)
        )
        q, k = (x.transpose(1, 2).flatten(2) for x in (q, k))
    keep = kept(family, tower, kind, q.shape[1], k.shape[1])
    keys = torch.cat([prompts["key"].expand(2, -1, -1), k], 1)
    values = torch.cat([prompts["value"].expand(2, -1, -1), v], 1)
    scores = heads(q) @ heads(keys).mT / math.sqrt(site.head_dim)
    keep = torch.nn.functional.pad(keep, (P, 0), value=True)
    want = (scores.masked_fill(~keep, -math.inf).softmax(-1) @ heads(values)).transpose(1, 2).flatten(2)
    got = own.seen["context"][:, -q.shape[1] :]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert (got - plain.seen["context"]).abs().max() > 1e-3, "the prefix must count for the check to mean something"


TOKENS = [(f, t) for f, t, kind in ATTENTION if kind == "self" and t in ("", "vision_model", "model.encoder")]


@pytest.mark.parametrize("depth", ["deep", "shallow"])
@pytest.mark.parametrize(("family", "tower"), TOKENS)
def test_tokens_stand_before_the_layers_and_are_cut_off(family, tower, depth):
    """The layers of a frozen copy are called one by one with longer masks."""
    tiny = ZOO[family]
    wrapped, base = wrap(family, "eager", style="vpt", depth=depth, tower=tower), tiny.build("eager")
    prompts = [p.detach() for p in wrapped.parameters() if p.requires_grad]
    blocks = [s.block for s in find_sites(base).attention if s.tower == tower and not s.cross]
    calls, outputs = [], []
    for path in blocks:
        base.get_submodule(path).register_forward_pre_hook(lambda m, a, k: calls.append((m, a, k)), with_kwargs=True)
    output(base, tiny)
    wrapped.get_submodule("base_model.model." + blocks[-1] if blocks[-1] else "").register_forward_hook(
        lambda m, a, o: outputs.append(o)
    )
    output(wrapped, tiny)
    x = calls[0][1][0] if calls[0][1] else calls[0][2]["hidden_states"]
    for at, (block, args, kwargs) in enumerate(list(calls)):
        if depth == "deep" or at == 0:
            x = torch.cat([prompts[at].expand(len(x), -1, -1), x], 1)
        kwargs = {k: v for k, v in kwargs.items() if k != "hidden_states"}
        mask = kwargs.pop("attention_mask", args[1] if len(args) > 1 else None)
        if mask is not None:
            rows = P if mask.shape[-2] > 1 else 0
            mask = torch.nn.functional.pad(mask, (P, 0, rows, 0), value=mask.dtype == torch.bool)
        if family != "blip":  # whose vision layers take none
            kwargs["attention_mask"] = mask
        out = block.forward(x, **kwargs)
        x = out[0] if isinstance(out, tuple) else out
        if depth == "deep" or at == len(calls) - 1:
            x = x[:, P:]
    got = outputs[0][0] if isinstance(outputs[0], tuple) else outputs[0]
    torch.testing.assert_close(got, x, rtol=1e-5, atol=1e-5)
    assert len(prompts) == (len(blocks) if depth == "deep" else 1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_decoding_step_by_step_equals_the_whole(family, attention):
    wrapped = wrap(family, attention)
    whole = wrapped(IDS).logits
    frozen = ZOO[family].build(attention)(IDS).logits
    assert (whole - frozen).abs().max() > 1e-3
    for chunks in ([1] * 5, [3, 2]):
        cache, parts = None, []
        for piece in IDS.split(chunks, 1):
            out = wrapped(piece, past_key_values=cache, use_cache=True)
            cache, parts = out.past_key_values, [*parts, out.logits]
        torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-5, atol=1e-5)
        assert cache.get_seq_length() == IDS.shape[1], "the prefix is never stored"


@pytest.mark.parametrize("family", ["gpt2", "clip_text"])
def test_a_causal_tower_stays_causal(family):
    style = "vpt" if family == "clip_text" else "prefix"
    later = IDS.clone()
    later[:, 3:] += 1
    for attention in ("sdpa", "eager"):
        wrapped = wrap(family, attention, style=style)
        first, second = (output(wrapped, ZOO[family], input_ids=i, attention_mask=None) for i in (IDS, later))
        torch.testing.assert_close(first[:, :3], second[:, :3], rtol=0, atol=1e-6)
        assert (first[:, 3:] - second[:, 3:]).abs().max() > 1e-4


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_padding_changes_nothing(family):
    tiny, short = ZOO[family], IDS[1:, :3]
    for style in ("prefix", "vpt") if family == "bert" else ("prefix",):
        wrapped = wrap(family, style=style)
        alone = output(wrapped, tiny, input_ids=short, attention_mask=None)
        padded = output(wrapped, tiny)[1:, :3]
        torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


def count(wrapped) -> int:
    return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def test_shared_and_reparameterised_prompts():
    own, shared = wrap("bert"), wrap("bert", shared=True)
    assert (count(own), count(shared)) == (2 * 2 * P * 16, 2 * P * 16)
    output(shared, ZOO["bert"]).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in shared.parameters() if p.requires_grad)
    # the same numbers in every layer are the same model
    with torch.no_grad():
        tables = {n.split(".")[-2]: p for n, p in shared.named_parameters() if p.requires_grad}
        for name, parameter in own.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(tables[name.split(".")[-2]])
    assert torch.equal(output(own, ZOO["bert"]), output(shared, ZOO["bert"]))
    made = wrap("bert", reparameterize=5)
    assert count(made) == 2 * 2 * (P * 5 + 5 * 5 + 5 + 5 * 16 + 16)
    output(made, ZOO["bert"]).square().sum().backward()
    assert all(p.grad is not None for p in made.parameters() if p.requires_grad)


def test_shared_prompts_are_saved_once_and_loaded(tmp_path):
    tiny = ZOO["bert"]
    wrapped = wrap("bert", shared=True)
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(tiny.build(), tmp_path)
    assert torch.equal(output(again, tiny), output(wrapped, tiny))
    copied = copy.deepcopy(wrapped)
    fill(wrapped, seed=9)
    assert torch.equal(output(copied, tiny), output(again, tiny)), "a copy has hooks of its own"
    assert not torch.equal(output(wrapped, tiny), output(again, tiny))


def test_both_styles_on_one_model_and_no_hook_stays():
    tiny = ZOO["bert"]
    frozen = tiny.build()
    wrapped = wrap("bert")
    prefix = output(wrapped, tiny)
    wrapped.add_adapter("rows", DeepPromptConfig(style="vpt", length=2))
    assert torch.equal(output(wrapped, tiny), prefix)
    wrapped.base_model.set_adapter(["default", "rows"])
    both = output(wrapped, tiny)
    wrapped.set_adapter("rows")
    tokens = output(wrapped, tiny)
    assert not torch.equal(both, prefix) and not torch.equal(both, tokens) and not torch.equal(prefix, tokens)
    wrapped.delete_adapter("rows")
    assert torch.equal(output(wrapped, tiny), prefix)
    bare = wrapped.unload()
    assert torch.equal(output(bare, tiny), output(frozen, tiny))
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in bare.modules())


def test_the_hidden_states_of_two_prompts_stand_side_by_side():
    """Two active prefixes are one of both lengths."""
    tiny = ZOO["gpt2"]
    wrapped = wrap("gpt2", length=2)
    wrapped.add_adapter("second", DeepPromptConfig(length=3))
    wrapped.base_model.set_adapter(["default", "second"])
    fill(wrapped, seed=8)
    long = wrap("gpt2", length=5, filled=False)
    values = dict(wrapped.named_parameters())
    with torch.no_grad():
        for name, parameter in long.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.cat([values[name], values[name.replace(".default.", ".second.")]]))
    torch.testing.assert_close(output(wrapped, tiny), output(long, tiny), rtol=0, atol=1e-6)


def test_states_that_transformers_captured_before_the_tokens_came_are_cut_too():
    """Its hooks come with the first `output_hidden_states` and stay, so they may be older than ours."""
    base = ZOO["clip_vision"].build(None)
    pixels = torch.randn(2, 3, base.config.image_size, base.config.image_size)
    plain = base(pixels, output_hidden_states=True).hidden_states
    wrapped = peft.get_peft_model(base, DeepPromptConfig(style="vpt", length=P))
    states = wrapped(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert [s.shape for s in states[1:]] == [s.shape for s in plain[1:]]


@pytest.mark.parametrize(
    ("family", "options", "says"),
    [
        ("bert", {"style": "prompt"}, "style"),
        ("bert", {"length": 0}, "1 or more"),
        ("bert", {"length": 1.5}, "length: expected an integer, got 1.5"),
        ("bert", {"dropout": 1.0}, "dropout"),
        ("bert", {"init_std": -1.0}, "init_std: must be 0 or more"),
        ("bert", {"attention": ["cross"]}, "no 'cross' attention"),
        ("bert", {"attention": ["self"], "style": "vpt"}, "enter a whole layer"),
        ("bert", {"depth": "shallow"}, "stands in every chosen layer"),
        ("bert", {"depth": "shallow", "style": "vpt", "shared": True}, "one set"),
        ("bert", {"layers": [4]}, "not in tower"),
        ("gpt2", {"style": "vpt"}, "writes with a cache"),
        ("llama", {"style": "vpt"}, "writes with a cache"),
        ("bart", {"style": "vpt", "tower": "model.decoder"}, "writes with a cache"),
        ("t5", {"tower": "encoder"}, "bias for each pair"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(family, options, says):
    with pytest.raises(BadInput, match=says) as refused:
        wrap(family, **options)
    assert "\n" not in str(refused.value)
