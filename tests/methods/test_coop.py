"""CoOp: prompts laid out as published, equal to a hand-built tower, gradients to the contexts and to nothing else."""

import copy

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from mmpeft_ds import CoOpConfig
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods import get
from mmpeft_ds.sites import find_sites
from tests.helpers.models import tiny_feature_model, tiny_prompted_encoder

KINDS = ("bert", "roberta", "clip")
IMAGES, LABELS = 7, torch.tensor([0, 1, 2, 0, 1, 2, 1])


@pytest.fixture(scope="module")
def sections(tmp_path_factory):
    place = tmp_path_factory.mktemp("coop")
    return {kind: tiny_prompted_encoder.write(place / kind, kind) for kind in KINDS}


def attached(sections, kind, dtype=torch.float32, **options):
    base = tiny_prompted_encoder.model(sections[kind], dtype)
    torch.manual_seed(3)
    config = CoOpConfig(**{"context": 4, "init_std": 0.5, **options})
    return peft.get_peft_model(base, config)


def rows(model, dtype=torch.float32):
    width = model.get_base_model().config.image_width
    return torch.randn(IMAGES, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


def context(model):
    (found,) = (p for p in model.parameters() if p.requires_grad)
    return found


def by_hand(model, vectors, position):
    """(C, D) class features: a tower whose table has new rows for the vectors, each class alone and unpadded."""
    base = model.get_base_model()
    encoder = copy.deepcopy(base.encoder)
    tower = encoder.text_model
    table = tower.get_input_embeddings().base_layer
    words, n = len(table.weight), vectors.shape[-2]
    out = []
    for number, name in enumerate(base.class_names):
        own = vectors[number] if vectors.dim() == 3 else vectors
        grown = torch.nn.Embedding(words + n, table.embedding_dim, dtype=table.weight.dtype)
        # plain assignment: the gradient must come back to `own`
        del grown.weight
        grown.weight = torch.cat([table.weight, own.to(table.weight.dtype)])
        tower.set_input_embeddings(grown)
        tokens = base.tokenise([name])["input_ids"][0].tolist()
        begin, middle, end = tokens[:1], tokens[1:-1], tokens[-1:]
        (stop,) = base.tokenise(["."])["input_ids"][0].tolist()[1:-1]
        new = [words + i for i in range(n)]
        order = {"end": new + middle, "middle": new[: n // 2] + middle + new[n // 2 :]}[position]
        ids = torch.tensor([begin + order + [stop] + end])
        given = {"attention_mask": torch.ones_like(ids)}
        if tower.config.model_type in ("bert", "roberta"):
            hidden = tower(inputs_embeds=grown(ids), **given).last_hidden_state.mean(1)
            out.append(encoder.text_projection(hidden))
        else:
            out.append(encoder.get_text_features(ids, **given).pooler_output)
    return torch.cat(out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"position": "middle"}, {"class_specific": True}, {"context": 3, "position": "middle"}]
)
def test_logits_and_gradients_are_those_of_a_tower_built_by_hand(sections, kind, options):
    model = attached(sections, kind, **options)
    given = rows(model)
    logits = model(image_features=given).logits
    cross_entropy(logits, LABELS).backward()
    got = context(model).grad.clone()
    vectors = context(model).detach().clone().requires_grad_(True)
    text = by_hand(model, vectors, options.get("position", "end"))
    scale = model.get_base_model().features.base_layer.logit_scale
    want = scale * normalize(given) @ normalize(text).T
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)
    cross_entropy(want, LABELS).backward()
    assert vectors.grad.abs().max() > 1e-4
    torch.testing.assert_close(got, vectors.grad, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_context_trains_and_there_is_one_or_one_a_class(sections, kind):
    model = attached(sections, kind)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    width = model.get_base_model().encoder.text_model.get_input_embeddings().base_layer.embedding_dim
    assert len(names) == 1 and names[0].endswith("coop_context.default.vectors")
    assert context(model).shape == (4, width)
    assert context(attached(sections, kind, class_specific=True)).shape == (3, 4, width)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.5)
    cross_entropy(model(image_features=rows(model)).logits, LABELS).backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    optimizer.step()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == set(names)


def test_the_vectors_start_as_published(sections):
    drawn = context(attached(sections, "bert", init_std=0.02, class_specific=True, context=10)).detach()
    assert 0.016 < float(drawn.std()) < 0.024 and abs(float(drawn.mean())) < 0.003


@pytest.mark.parametrize("kind", KINDS)
def test_disabled_it_is_zero_shot_and_other_texts_are_read_as_ever(sections, kind, tmp_path):
    base = tiny_prompted_encoder.model(sections[kind])
    given = torch.randn(IMAGES, base.config.image_width, generator=torch.Generator().manual_seed(5))
    caption = base.tokenise(["a red circle", "what is it"])
    with torch.no_grad():
        frozen, read = base(image_features=given).logits, base.encoder(**caption).text_features
        model = attached(sections, kind)
        trained = model(image_features=given).logits
        assert not torch.equal(trained, frozen)
        assert torch.equal(model.get_base_model().encoder(**caption).text_features, read)
        with model.disable_adapter():
            assert torch.equal(model(image_features=given).logits, frozen)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_prompted_encoder.model(sections[kind]), tmp_path).eval()
        assert torch.equal(again(image_features=given).logits, trained)


def test_two_adapters_have_contexts_of_their_own(sections):
    model = attached(sections, "clip")
    given = rows(model)
    with torch.no_grad():
        one = model.eval()(image_features=given).logits
        model.add_adapter("other", CoOpConfig(context=2, position="middle", init_std=0.5))
        model.set_adapter("other")
        other = model(image_features=given).logits
        assert not torch.allclose(one, other)
        model.set_adapter("default")
        assert torch.equal(model(image_features=given).logits, one)


def test_class_features_are_computed_once_per_evaluation_and_never_from_an_older_context(sections):
    model = attached(sections, "bert")
    given, calls = rows(model), []
    tower = model.get_base_model().encoder.text_model
    tower.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model.eval()
        first = model(image_features=given).logits
        model(image_features=given)
        assert len(calls) == 1
        model.train()
        context(model).mul_(-3)
        model.eval()
        assert not torch.allclose(model(image_features=given).logits, first) and len(calls) == 2
    model.train()
    for _ in range(2):
        model(image_features=given)
    assert len(calls) == 4


def test_it_exports_a_classifier_that_needs_no_text_tower(sections):
    model = attached(sections, "clip")
    given = rows(model)
    plain = model.get_base_model().features.head.export()
    want = model(image_features=given).logits
    torch.testing.assert_close(plain["scale"] * normalize(given) @ normalize(plain["text"]).T, want)


def test_in_a_half_precision_base_the_context_is_float32(sections):
    model = attached(sections, "bert", torch.bfloat16)
    assert context(model).dtype == torch.float32
    cross_entropy(model(image_features=rows(model)).logits, LABELS).backward()
    assert context(model).grad.abs().sum() > 0


def test_a_model_without_text_encoder_is_refused_in_one_line():
    model = tiny_feature_model.model()
    method = get("coop")
    for refused in (
        lambda: method.check(method.Config(), find_sites(model), None),
        lambda: peft.get_peft_model(model, method.Config()),
    ):
        with pytest.raises(BadInput, match="text encoder") as error:
            refused()
        assert "\n" not in str(error.value)


def test_prompts_that_would_be_cut_are_refused(sections):
    with pytest.raises(BadInput, match=r"16 vectors and the class 'big blue square' need 22 tokens, .* cut at 12"):
        attached(sections, "clip", context=16)
    assert attached(sections, "bert", context=13) is not None
    with pytest.raises(BadInput, match="cut at 19"):
        attached(sections, "bert", context=14)


@pytest.mark.parametrize("options", [{"context": 0}, {"position": "front"}, {"init_std": -1.0}])
def test_impossible_options_are_refused(options):
    with pytest.raises(BadInput, match="coop"):
        CoOpConfig(**options)
