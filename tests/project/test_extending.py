"""The examples of docs/extending.md are complete: saved as one file each, recipes find them and they train."""

import re
import sys

import peft
import pytest
import torch

import mmpeft_ds
from data_prep import prepare, sources, verify
from mmpeft_ds import backbones, methods, registry, tasks
from mmpeft_ds.backbones.common.model_hooks import model_hooks
from mmpeft_ds.data.batch import Sample, pack
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.sites import find_sites
from tests.helpers import ROOT
from tests.helpers.data.images import encoded
from tests.helpers.models import tiny_stock, tiny_towers


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Save the first example of a section as a file NAME.py in a folder of `package`."""

    def save(section, package, name):
        page = (ROOT / "docs" / "extending.md").read_text("utf-8")
        code = re.search(rf"^## {section}$.*?^```python\n(.*?)^```$", page, re.M | re.S).group(1)
        folder = tmp_path / package.__name__
        folder.mkdir()
        (folder / f"{name}.py").write_text(code)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}", raising=False)
        assert name in registry.names(package)
        entry = registry.load(package, name, "name")
        assert registry.options(package, name, "name") is entry.Options
        return entry

    return save


def pixels(seed):
    return torch.randint(0, 256, (3, 9, 11), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def test_the_example_backbone_and_the_example_task_train_together(saved, tmp_path):
    entry, rating = saved("A backbone", backbones, "image_classifier"), saved("A task", tasks, "rating")
    made = entry(entry.Options(model=tiny_towers.write_vision(tmp_path / "vit", "vit")), ["a", "b"])
    made.check()
    torch.manual_seed(0)
    model, task = made.build(), rating(rating.Options(), None)
    made.dtype = torch.bfloat16  # as with engine.dtype
    assert {(p.device.type, p.dtype) for p in made.build(on_meta=True).parameters()} == {("meta", torch.bfloat16)}
    made.dtype = torch.float32
    for path in model_hooks(model).head_modules:
        model.get_submodule(path).requires_grad_(True)
    transform, samples = made.image_transform(True), []
    for i, images in enumerate(([1], [2, 3], [])):
        record = {"rating": i}
        texts, targets = task.read(record, torch.Generator())
        weight = float(i < 2)
        samples.append(Sample(str(i), weight, [transform(pixels(s), None) for s in images], texts, targets, record))
    batch = pack(samples, made.collate_images, made.collate_texts, task.collate)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.003)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = task.loss(forward(model, made, batch), batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == {"classifier.weight", "classifier.bias"}
    rows = task.predict(forward(model, made, batch), batch)
    assert [row["sample_id"] for row in rows] == ["0", "1"] and set(task.score(rows)) == {task.main_metric}
    with pytest.raises(BadSample):
        task.read({"rating": "good"}, torch.Generator())


def test_the_example_backbone_answers_samples_without_images_with_zeros(saved, tmp_path):
    entry = saved("A backbone", backbones, "image_classifier")
    made = entry(entry.Options(model=tiny_towers.write_vision(tmp_path / "vit", "vit")), ["a", "b"])
    batch = pack([Sample("s", 1.0, [], ["a"], [0])], made.collate_images, made.collate_texts, lambda t: {})
    assert forward(made.build().eval(), made, batch).logits.tolist() == [[0.0, 0.0]]


def test_the_example_method_attaches_trains_saves_and_loads(saved, tmp_path, monkeypatch):
    entry = saved("A method", methods, "channel_scale")
    assert issubclass(entry, SiteMethod) and methods.configs()["ChannelScaleConfig"] == "channel_scale"
    for what in ("CONFIG", "TUNER", "PREFIX"):  # forgotten again after this test
        monkeypatch.setitem(getattr(peft.mapping, f"PEFT_TYPE_TO_{what}_MAPPING"), "CHANNEL_SCALE", None)
    methods.register()
    base, config = tiny_stock.bert(), mmpeft_ds.ChannelScaleConfig(targets=["q", "out"])
    entry.check(config, find_sites(base), None)
    frozen = tiny_stock.output(base)
    model = peft.get_peft_model(base, entry.prepare(config, base, find_sites(base)))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert entry.kinds(trained)["peft"] == trained and len(trained) == 4
    assert torch.equal(tiny_stock.output(model), frozen), "zero factors change nothing"
    tiny_stock.output(model).square().sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    changed = tiny_stock.output(tiny_stock.fill(model, scale=0.1))
    assert not torch.equal(changed, frozen)
    with model.disable_adapter():
        assert torch.equal(tiny_stock.output(model), frozen)
    with pytest.raises(BadInput, match="cannot be merged: nobody has written how"):
        model.merge_adapter()
    with monkeypatch.context() as patched, pytest.raises(BadInput, match="ChannelScaleLayer defines no `merge`"):
        patched.delattr(entry.Tuner, "unmergeable")
        model.merge_adapter()
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(tiny_stock.bert(), tmp_path / "adapter")
    assert torch.equal(tiny_stock.output(again), changed)


def test_the_example_source_is_prepared_and_verified(saved, tmp_path):
    saved("A data set", sources, "csv_table")
    for i in range(3):
        (tmp_path / f"{i}.jpg").write_bytes(encoded(i))
    table = tmp_path / "table.csv"
    table.write_text("file,class,split\n0.jpg,cat,train\n1.jpg,dog,train\n2.jpg,cat,val\n")
    prepare.main(["csv-table", "--table", str(table), "--out", str(tmp_path / "out"), "--processes", "1"])
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.labels == ["cat", "dog"] and [manifest.samples(s) for s in ("train", "val")] == [2, 1]
    verify.main([str(tmp_path / "out")])
    table.write_text("file,class\n9.jpg,cat\n")
    with pytest.raises(BadInput, match="table.csv:2"):
        prepare.main(["csv-table", "--table", str(table), "--out", str(tmp_path / "other")])
