"""GA-Net as a method: settings, sizes, what trains, what a prediction may depend on, search of tau, bad input."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy

from mmpeft_ds import GaNetConfig, methods
from mmpeft_ds.backbones.features.backbone import FeatureConfig, FeatureModel, FeaturesBackbone
from mmpeft_ds.backbones.features.backbone import Options as FeatureOptions
from mmpeft_ds.data.batch import Described, Sample, hash_id, pack
from mmpeft_ds.data.options import SourceOptions
from mmpeft_ds.engine.assembly import checks
from mmpeft_ds.errors import BadInput
from mmpeft_ds.methods.ga_net.options import VARIANTS
from mmpeft_ds.recipe import Recipe
from mmpeft_ds.runs import fisher, graph_report
from mmpeft_ds.sites import find_sites
from mmpeft_ds.sites.feature_site import Labelled
from mmpeft_ds.tasks.classification.task import Classification
from mmpeft_ds.tasks.classification.task import Options as ClassificationOptions
from tests.helpers.models import tiny_feature_model

HEAD = "base_model.model.features.ga_net_head.default."


def attached(seed=0, classes=5, **options):
    base = tiny_feature_model.model(classes=classes, templates=2)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, GaNetConfig(**{"r": 6, "tau": 0.1, **options}))
    return model, base.features.head


def run(model, rows):
    return model(image_features=rows.image, text_features=rows.text, valid=rows.valid, key=rows.key)


# ---------------------------------------------------------------------------------------------- settings and sizes


def test_a_variant_fills_what_is_left_open_and_any_field_may_differ():
    assert (GaNetConfig().variant, GaNetConfig().activation, GaNetConfig().train) == ("fix", "relu", "all")
    released = GaNetConfig(variant="v2")
    assert (released.graph, released.tau, released.k, released.symmetric) == ("knn", 0.4, 5, False)
    assert GaNetConfig(variant="v1", tau=0.5, train="all").train == "all"
    assert GaNetConfig(variant="v2", symmetric=True, self_loops="merged").symmetric is True
    assert all(set(fields) == set(VARIANTS["fix"]) for fields in VARIANTS.values())
    # what is saved says everything, whatever later versions make of a variant
    saved = {k: getattr(released, k) for k in VARIANTS["v2"]}
    assert GaNetConfig(**saved, variant="fix").self_loops == "appended"


COUNTS = {  # adapter (down, conv, up), fusion, and the classifier for 37, 101 and 102 classes
    "v1": (1_837_568, 0, {37: 56_869, 101: 155_237, 102: 156_774}),
    "v2": (1_443_584, 525_570, {37: 28_453, 101: 77_669, 102: 78_438}),
    "fix": (1_837_568, 0, {37: 56_869, 101: 155_237, 102: 156_774}),
}


@pytest.mark.parametrize("classes", [37, 101, 102])
@pytest.mark.parametrize("variant", COUNTS)
def test_sizes_are_the_published_ones(variant, classes):
    with torch.device("meta"):
        base = FeatureModel(FeatureConfig(image_width=768, text_width=768, num_classes=classes))
        peft.get_peft_model(base, GaNetConfig(variant=variant))
    head = base.features.head
    sizes = {"adapter": 0, "fusion": 0, "classifier": 0}
    tensors = dict(head.named_parameters()) | {n: b for n, b in head.named_buffers() if n != "tau_choice"}
    for name, tensor in tensors.items():
        part = name.split(".")[0]
        sizes[part if part in sizes else "adapter"] += tensor.numel()
    adapter, fusion, of_classes = COUNTS[variant]
    assert sizes == {"adapter": adapter, "fusion": fusion, "classifier": of_classes[classes]}
    trained = sum(p.numel() for p in head.parameters() if p.requires_grad)
    assert trained == fusion + of_classes[classes] + (adapter if variant == "fix" else 0)


# ------------------------------------------------------------------------------------------------------ what trains


def moved(**options):
    model, head = attached(**options)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = {n: t.clone() for n, t in head.state_dict().items()}
    data = tiny_feature_model.labelled()
    cross_entropy(run(model, data.features).logits, data.labels).backward()
    optimizer.step()
    return {n for n, t in head.state_dict().items() if not torch.equal(t, before[n])}


EVERYTHING = {f"{part}.{kind}" for part in ("down", "conv", "up", "classifier") for kind in ("weight", "bias")}


@pytest.mark.parametrize("graph", ["threshold", "knn", "none"])
def test_one_step_changes_everything(graph):
    assert moved(graph=graph) == EVERYTHING


@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_the_releases_change_their_classifier_alone_unless_asked(variant):
    assert moved(variant=variant, tau=0.1) == {"classifier.weight", "classifier.bias"}
    assert moved(variant=variant, tau=0.1, train="all") == EVERYTHING


def test_names_hold_the_prefix_and_all_is_saved(tmp_path):
    for options in ({}, {"variant": "v2", "tau": 0.1}, {"tau_grid": [0.3, 0.1]}):
        model, head = attached(**options)
        with torch.no_grad():
            for parameter in head.parameters():
                parameter.normal_()
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trained and all(n.startswith(HEAD) for n in trained)
        assert methods.get("ga_net").kinds(trained)["peft"] == trained
        head.tau_choice.fill_(len(head.config.tau_grid) - 1)
        rows = tiny_feature_model.rows(9)
        model.save_pretrained(tmp_path)
        again = peft.PeftModel.from_pretrained(tiny_feature_model.model(), tmp_path)
        assert torch.equal(run(again, rows).logits, run(model, rows).logits)
        assert again.get_base_model().features.head.tau == head.tau
        fresh, _ = attached(seed=1, **options)
        fresh.get_base_model().load_training_state(model.get_base_model().training_state())
        for name, buffer in head.named_buffers():
            assert torch.equal(fresh.get_base_model().features.head.get_buffer(name), buffer), name


def test_disabled_it_is_the_frozen_scorer_to_the_bit():
    rows = tiny_feature_model.rows(9)
    model, _ = attached()
    with model.disable_adapter():
        assert torch.equal(run(model, rows).logits, run(tiny_feature_model.model(), rows).logits)


def test_accumulation_is_refused_but_for_a_graph_without_edges():
    recipe = Recipe(run_dir="", backbone={}, method={"name": "ga_net"})
    recipe.optim.accumulation = 2
    with pytest.raises(BadInput, match="GaNetConfig couples the samples"):
        checks.check_coupling(recipe, [], GaNetConfig())
    checks.check_coupling(recipe, [], GaNetConfig(graph="none"))


def test_a_search_without_validation_is_refused_before_training():
    recipe = Recipe(run_dir="", backbone={}, method={"name": "ga_net"})
    with pytest.raises(BadInput, match="data.validation: empty, but ga_net searches"):
        checks.check_validation(recipe, GaNetConfig(tau_grid=[0.5]))
    checks.check_validation(recipe, GaNetConfig())


@pytest.mark.parametrize("inputs", ["both", "text"])
def test_captions_that_the_task_leaves_out_are_refused_not_read_as_zeros(inputs):
    recipe = Recipe(run_dir="", backbone={}, method={"name": "ga_net"})
    silent, told = (SourceOptions(dir="", task={"name": "classification", "text": t}) for t in ("none", "captions"))
    with pytest.raises(BadInput, match="task.text: none, but ga_net reads captions"):
        checks.check_texts(recipe, "data.sources.0", silent, GaNetConfig(inputs=inputs))
    checks.check_texts(recipe, "data.sources.0", told, GaNetConfig(inputs=inputs))
    checks.check_texts(recipe, "data.sources.0", silent, GaNetConfig(inputs="image"))


# ------------------------------------------------------------------------------- what a prediction may depend on


def test_without_activation_it_is_two_hops_of_an_affine_map():
    """Y = A A X M + (A A 1) u + (A 1) v + b, as the release computes."""
    model, head = attached(variant="v1", tau=0.1, train="all")
    head.double()
    rows = tiny_feature_model.rows(12, dtype=torch.float64)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
        out = run(model, rows)
        w = dict(head.named_parameters())
        graph, ones = out.graph, torch.ones(12, 1, dtype=torch.float64)
        a = torch.zeros(12, 12, dtype=torch.float64)
        a.index_put_((graph.target, graph.source), graph.weight.double(), accumulate=True)
        assert (a > 0).sum() > 20
        tail = w["conv.weight"] @ w["up.weight"].T @ w["classifier.weight"]
        u = w["down.bias"] @ tail
        v = (w["conv.bias"] @ w["up.weight"].T + w["up.bias"]) @ w["classifier.weight"]
        x = torch.cat([rows.text, rows.image], 1)
        affine = a @ a @ x @ w["down.weight"].T @ tail + (a @ a @ ones) * u + (a @ ones) * v + w["classifier.bias"]
    torch.testing.assert_close(out.logits, affine, atol=1e-10, rtol=1e-10)


def test_without_edges_a_sample_stands_for_itself():
    rows = tiny_feature_model.rows(9)
    model, _ = attached(graph="none")
    alone = torch.cat([run(model, rows[i : i + 1]).logits for i in range(9)])
    torch.testing.assert_close(run(model, rows).logits, alone)
    coupled, _ = attached(tau=-1.0)
    alone = torch.cat([run(coupled, rows[i : i + 1]).logits for i in range(9)])
    assert (run(coupled, rows).logits - alone).abs().max() > 1e-3


def test_the_order_of_the_rows_does_not_matter():
    rows, order = tiny_feature_model.rows(11), torch.randperm(11)
    for options in ({}, {"graph": "knn", "k": 3}, {"variant": "v2", "k": 3, "tau": 0.0}):
        model, _ = attached(**options)
        torch.testing.assert_close(run(model, rows[order]).logits, run(model, rows).logits[order])


def test_similarity_may_count_both_modalities_alike():
    rows = tiny_feature_model.rows(12)
    loud = dataclasses.replace(rows, text=1e4 * rows.text)
    fixed, _ = attached(tau=0.3)
    assert torch.equal(run(fixed, loud).graph.edge_index, run(fixed, rows).graph.edge_index)
    released, _ = attached(tau=0.3, normalise_similarity=False)
    assert not torch.equal(run(released, loud).graph.edge_index, run(released, rows).graph.edge_index)
    scaled, _ = attached(tau=0.3, normalise_input=True)
    torch.testing.assert_close(run(scaled, loud).logits, run(scaled, rows).logits)


@pytest.mark.parametrize("inputs", ["image", "text"])
def test_one_modality_alone_reads_nothing_of_the_other(inputs):
    rows = tiny_feature_model.rows(9)
    model, head = attached(inputs=inputs)
    assert head.down.in_features == 8
    changed = dataclasses.replace(rows, **{"text" if inputs == "image" else "image": rows.image.flip(0)})
    assert torch.equal(run(model, changed).logits, run(model, rows).logits)
    if inputs == "image":
        without = model(image_features=rows.image, valid=rows.valid, key=rows.key)
        assert torch.equal(without.logits, run(model, rows).logits)


@pytest.mark.parametrize("options", [{}, {"graph": "knn"}, {"graph": "none"}], ids=str)
def test_what_stands_in_rows_that_are_not_valid_reaches_nothing(options):
    model, head = attached(**options)
    rows, labels = tiny_feature_model.rows(9), torch.arange(9) % 5
    rows.valid[3:5] = False

    def gradients(rows):
        model.zero_grad()
        out = run(model, rows)
        cross_entropy(out.logits[rows.valid], labels[rows.valid]).backward()
        return [out.logits[rows.valid].detach(), *(p.grad.clone() for p in head.parameters())]

    want = gradients(rows)
    rows.image[3:5], rows.text[3:5] = torch.nan, torch.inf
    for got, expected in zip(gradients(rows), want, strict=True):
        assert torch.equal(got, expected)
    kept = rows[rows.valid]
    for got, expected in zip(want, [run(model, kept).logits.detach()], strict=False):
        torch.testing.assert_close(got, expected)


# --------------------------------------------------------------------------------------------- Fisher information


class OneProcess:
    """Stands for the stepper of one process without DeepSpeed: a batch is (rows, labels)."""

    def __init__(self, model):
        trained = [p for p in model.parameters() if p.requires_grad]
        self.engine = SimpleNamespace(
            module=model,
            optimizer=SimpleNamespace(param_groups=[{"params": trained}]),
            zero_optimization_stage=lambda: 0,
            zero_grad=model.zero_grad,
            micro_steps=0,
        )
        self.ranks = SimpleNamespace(device="cpu")
        self.budget = SimpleNamespace(feed=lambda batch: None)
        self.resolved = SimpleNamespace(train=[SimpleNamespace(task=None)])

    def agree(self, micro, task):
        return SimpleNamespace(stop=False, bad=0, weight=1.0, rows=1, changed=(0, 0, 0))

    def accumulate(self, micro, task, agreed):
        data = micro[0]
        loss = cross_entropy(run(self.engine.module, data.features).logits, data.labels)
        loss.backward()
        return loss.detach(), 0.0, {}


@pytest.mark.parametrize("options", [{}, {"variant": "v1", "train": "all"}, {"variant": "v2", "train": "all", "k": 3}])
def test_of_which_logits_fisher_information_is_estimated(options):
    model, head = attached(**{"tau": 0.1, **options})
    squares, _ = fisher.measure(OneProcess(model), [SimpleNamespace(micro=[tiny_feature_model.labelled()], source=0)])
    seen = {n.split(".")[0] for n, p in head.named_parameters() if squares.whole(p).any()}
    released = {"v1": {"classifier"}, "v2": {"classifier", "fusion"}}
    assert seen == released.get(options.get("variant"), {"down", "conv", "up", "classifier"})
    run(model, tiny_feature_model.rows()).logits.sum().backward()
    assert head.down.weight.grad.any(), "training is as before"


# --------------------------------------------------------------------------------------------------- search of tau


def test_tau_is_searched_on_validation_rows():
    _, head = attached(classes=3, tau_grid=[-0.9, 0.2, 0.8], tau_batch=30)
    validation = tiny_feature_model.labelled(60, classes=3)
    assert head.tau == 0.1
    told = head.calibrate(validation, validation)
    right = {}
    for choice, tau in enumerate(head.config.tau_grid):
        head.tau_choice.fill_(choice)
        halves = [validation.features[torch.arange(s, s + 30)] for s in (0, 30)]
        logits = torch.cat([head(half).logits for half in halves])
        right[tau] = (logits.argmax(1) == validation.labels).sum().item() / 60
    assert len(set(right.values())) > 1, "the choice must matter"
    assert told == {"tau": max(right, key=right.get), "validation_top1": max(right.values())}
    head.calibrate(validation, validation)
    assert head.tau == told["tau"]
    with pytest.raises(BadInput, match="no validation rows"):
        head.calibrate(validation, None)
    assert attached()[1].calibrate(validation, None) == {}


# ------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "options, message",
    [
        ({"variant": "v3"}, "variant: 'v3' is unknown"),
        ({"graph": "ring"}, "graph: 'ring' is unknown"),
        ({"tau": 1.5}, "tau: a cosine lies in"),
        ({"tau_grid": [0.1, 3.0]}, "tau_grid: a cosine lies in"),
        ({"tau_grid": [0.1], "graph": "none"}, "tau_grid: graph: none"),
        ({"variant": "v2", "symmetric": True}, "self_loops: appended"),
        ({"r": 0}, "r: must be 1 or more"),
        ({"k": 0}, "k: must be 1 or more"),
        ({"residual": True, "up": "image"}, "residual: .* up: joined"),
        ({"variant": "v2", "inputs": "image"}, "fusion: it weighs text against image"),
        ({"variant": "v2", "fusion": False}, "fisher: released"),
        ({"symmetric": "yes"}, "symmetric: expected"),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(options, message):
    with pytest.raises(BadInput, match=message):
        GaNetConfig(**options)


def test_features_that_are_not_there_are_named():
    method = methods.get("ga_net")
    for widths, options, message in (
        ({"text_width": 0}, {}, "inputs: both needs text features"),
        ({"text_width": 4}, {"variant": "v2"}, "fusion: adds text features of width 4"),
    ):
        sites = find_sites(tiny_feature_model.model(templates=0, **widths))
        with pytest.raises(BadInput, match=message):
            method.check(GaNetConfig(**options), sites, None)
    model, _ = attached()
    with pytest.raises(BadInput, match="bring no text"):
        model(image_features=tiny_feature_model.rows(4).image)


# -------------------------------------------------------------------------------------------- who is in the batch


def clustered(count=120, classes=6):
    """Rows whose class their features tell only faintly, a row of any order."""
    made = torch.Generator().manual_seed(5)
    labels = torch.randint(classes, (count,), generator=made)
    centres = torch.randn(classes, 8, generator=made)
    rows = tiny_feature_model.rows(count)
    rows.image = centres[labels] + 1.2 * torch.randn(count, 8, generator=made)
    rows.text = centres[labels] + 1.2 * torch.randn(count, 8, generator=made)
    return Labelled(rows, labels)


def test_the_report_shows_that_a_sorted_list_leaks_classes():
    data = clustered()
    # edges between all of a batch: in one of a single class the mean of the rows names it
    model, head = attached(classes=6, variant="v1", tau=-1.0, train="all", r=8)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01)
    for step in range(60):
        order = torch.randperm(120, generator=torch.Generator().manual_seed(step))
        with head.without_edges():
            loss = cross_entropy(run(model, data.features[order]).logits, data.labels[order])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert graph_report.invariance(head, data, 10, stopped=lambda: True) is None
    lines = graph_report.invariance(head, data, 10)
    assert [line["order"] for line in lines] == [
        "no edges", "shuffled, seed 0", "shuffled, seed 1", "shuffled, seed 2", "sorted by class"
    ]  # fmt: skip
    found = {line["order"]: line for line in lines}
    shuffled = [found[f"shuffled, seed {seed}"] for seed in range(3)]
    assert all(line["degree"] == 9 and line["isolated"] == 0 for line in lines[1:])
    assert found["sorted by class"]["same_class"] > 0.7 > 0.3 > max(line["same_class"] for line in shuffled)
    assert found["sorted by class"]["top1"] > 0.2 + max(line["top1"] for line in shuffled)
    with head.without_edges():
        right = (run(model, data.features).logits.argmax(1) == data.labels).float().mean()
    assert found["no edges"]["top1"] == pytest.approx(right.item())


class Leaky(Classification):
    """As the release: words of the class are cut from the captions of its own samples."""

    def _read(self, record, generator):
        texts, targets = super()._read(record, generator)
        name = record["class_name"]
        text = Described(" ".join(w for w in texts[0].text.split() if name not in w), None)
        return [text], targets


def predictions(task_class, names, columns="all"):
    """What a model with live captions predicts for samples whose classes are said to be `names`."""
    labels = ["cat", "dog", "owl"]
    task = task_class(ClassificationOptions(text="captions", columns=columns), labels)
    backbone = FeaturesBackbone(FeatureOptions(), labels)
    backbone.use_features({"key": "toy", "image_width": 8, "text_width": 8})
    torch.manual_seed(0)
    model = peft.get_peft_model(backbone.build(), GaNetConfig(r=6, tau=-0.5))
    made = torch.Generator().manual_seed(2)
    samples = []
    for i, name in enumerate(names):
        record = {"label": labels.index(name), "class_name": name, "captions": [f"a {labels[i % 3]} on a mat {i}"]}
        texts, targets = task.read_all(record, made)
        # a toy text encoder: a text's features are drawn by its words
        drawn = torch.Generator().manual_seed(hash_id(texts[0].text) % 2**31)
        texts = [Described(texts[0].text, torch.randn(8, generator=drawn))]
        samples.append(Sample(f"t/{i}", 1.0, [torch.randn(8, generator=made)], texts, targets, record))
    batch = pack(samples, backbone.collate_images, backbone.collate_texts, task.collate)
    rows = task.predict(model(**backbone.inputs(batch)), batch)
    return [(row["sample_id"], row["prediction"], row["probability"]) for row in rows]


def test_other_test_labels_leave_every_prediction_as_it_is_to_the_bit():
    names = ["cat", "dog", "owl", "cat", "owl", "owl", "dog", "dog", "cat"]
    permuted = names[4:] + names[:4]
    assert predictions(Classification, names) == predictions(Classification, permuted)
    assert predictions(Classification, names, "target") == predictions(Classification, permuted, "target")
    assert predictions(Leaky, names) != predictions(Leaky, permuted), "the check must notice captions that know labels"
