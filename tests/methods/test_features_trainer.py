"""Heads on a model of features under transformers' own Trainer: it gives labels to the forward and gets a loss."""

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from mmpeft_ds import methods
from tests.helpers.models import tiny_feature_model

HEADS = {
    "ga_net": {"r": 6, "tau": 0.1},
    "graph_adapter": {},
    "hegraph": {},
    "task_res": {},
    "tip_adapter": {"train_keys": True},
}


def attached(name):
    torch.manual_seed(3)
    return peft.get_peft_model(tiny_feature_model.model(), methods.get(name).Config(**HEADS[name]))


def samples(count=20):
    made = tiny_feature_model.labelled(count)
    columns = {"image_features": made.features.image, "text_features": made.features.text, "labels": made.labels}
    return [{name: values[i] for name, values in columns.items()} for i in range(count)]


def stacked(rows):
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_the_mean_cross_entropy_of_rows_that_count(name):
    model, batch = attached(name).eval(), stacked(samples(8))
    out = model(**batch)
    terms = out.terms or [(1.0, out.logits)]
    torch.testing.assert_close(out.loss, sum(w * cross_entropy(logits, batch["labels"]) for w, logits in terms))
    valid, labels = torch.arange(8) != 2, batch["labels"].masked_fill(torch.arange(8) == 5, -100)
    part = model(**{**batch, "labels": labels}, valid=valid)
    kept = valid & (labels != -100)
    terms = part.terms or [(1.0, part.logits)]
    torch.testing.assert_close(part.loss, sum(w * cross_entropy(x[kept], labels[kept]) for w, x in terms))
    assert model(**{**batch, "labels": torch.full((8,), -100)}).loss == 0
    del batch["labels"]
    assert model(**batch).loss is None and torch.equal(model(**batch).logits, out.logits)


@pytest.mark.parametrize("name", HEADS)
def test_the_stock_trainer_trains_evaluates_saves_and_resumes(name, tmp_path):
    def trainer(model, steps):
        arguments = TrainingArguments(
            output_dir=tmp_path, max_steps=steps, per_device_train_batch_size=10, learning_rate=1e-2, save_steps=3,
            report_to=[], use_cpu=True, disable_tqdm=True, lr_scheduler_type="constant",
        )  # fmt: skip
        return Trainer(model=model, args=arguments, train_dataset=samples(), eval_dataset=samples())

    model = attached(name)
    whole = trainer(model, 6)
    before = whole.evaluate()["eval_loss"]
    whole.train()
    after = whole.evaluate()["eval_loss"]
    assert after < before
    predicted = whole.predict(samples())
    assert predicted.predictions.shape == (20, 5) and predicted.label_ids.shape == (20,)
    again = trainer(attached(name), 6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.evaluate()["eval_loss"] == pytest.approx(after, abs=1e-6)
    loaded = peft.PeftModel.from_pretrained(tiny_feature_model.model(), tmp_path / "checkpoint-6").eval()
    batch = stacked(samples())
    assert torch.equal(loaded(**batch).logits, model.eval()(**batch).logits)
