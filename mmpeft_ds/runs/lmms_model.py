"""Adapter directories as models of lmms-eval (0.7), for its tasks of images and text.

`AdapterModel` is made when lmms-eval asks for it: this package does not need that one, and nothing else imports it.
"""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmpeft_ds import adapter
from mmpeft_ds.data.batch import PackedBatch, Prompted, Sample
from mmpeft_ds.data.decode import Pixels, of_picture
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.text_counts import TextCounts, note
from mmpeft_ds.errors import BadInput, BadSample

logger = logging.getLogger(__name__)
# Of lmms-eval's `generation_kwargs`, those that `generate` of transformers takes; the rest speaks to servers.
PASSED = ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "num_beams", "repetition_penalty")


class AdapterAnswers:
    """Model interface of lmms-eval for an adapter directory; requests are answered one at a time.

    Args:
        adapter: the directory, `model_args adapter=DIR`.
        device: such as `cpu` or `cuda:0`.
        batch_size: given by lmms-eval; other than 1 is refused.
    """

    is_simple = True

    def __init__(self, adapter: str, device: str | None = None, batch_size: int | str | None = 1, **unknown: Any):
        super().__init__()
        if unknown:
            raise BadInput(f"model_args: {', '.join(sorted(unknown))} unknown. Known: adapter, device.")
        if str(batch_size or 1) != "1":
            raise BadInput(f"batch_size: {batch_size}, and requests are answered one at a time. Leave it out.")
        self.loaded = _load(adapter, device or ("cuda" if torch.cuda.is_available() else "cpu"))

    @torch.no_grad()
    def generate_until(self, requests: list[Any]) -> list[str]:
        """An answer to each request: generated, or of models with a list of answers the likeliest one."""
        self._counts = TextCounts()
        answers = [self._answer(*request.args) for request in requests]
        self._say_what_was_cut()
        return answers

    @torch.no_grad()
    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """Mean loss of each continuation with the end of its turn, in nats per token, and whether greedy generation
        would give it: lmms-eval chooses the smallest, though its interface speaks of log-probabilities.

        Raises:
            BadInput: for a model that does not generate.
        """
        if not self.loaded.backbone.generates:
            raise BadInput("loglikelihood: this adapter's model picks from a list of answers and scores no others.")
        self._counts = TextCounts()
        scores = [self._score(*request.args) for request in requests]
        self._say_what_was_cut()
        return scores

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        """Refused: tasks of several rounds. Raises BadInput."""
        raise BadInput("generate_until_multi_round: tasks of several rounds are not offered.")

    def _answer(self, context: str, options: dict[str, Any], visuals: Any, number: int, task: str, split: str) -> str:
        sample = self._sample(context, visuals, number, task, split)
        if not self.loaded.backbone.generates:
            (row,) = self.loaded.answer([sample])
            self._counts.add(self.loaded.task, [int("cut_tokens" in row), 0, int("control_tokens" in row)])
            return str(row["prediction"])
        settings = {"max_new_tokens": 64} | {key: options[key] for key in PASSED if options.get(key) is not None}
        if not settings.get("do_sample"):
            settings = {key: value for key, value in settings.items() if key not in ("temperature", "top_p", "top_k")}
        batch = self._packed(sample)
        text = self.loaded.backbone.generate(self.loaded.model, batch, **settings)[0]
        until = options.get("until") or []
        for end in [until] if isinstance(until, str) else until:
            text = text.split(end)[0] if end else text
        return text.strip()

    def _score(
        self, context: str, target: Any, visuals: Any, number: int, task: str, split: str
    ) -> tuple[float, bool]:
        target = target(self._document(number, task, split)) if callable(target) else target
        sample = self._sample(context, visuals, number, task, split)
        asked = sample.texts[0] if isinstance(sample.texts[0], Prompted) else Prompted(str(sample.texts[0]))
        sample = dataclasses.replace(sample, texts=[dataclasses.replace(asked, target=str(target).strip())])
        outputs = forward(self.loaded.model, self.loaded.backbone, self._packed(sample), scores=True)
        losses, tokens = outputs.token_losses()
        return float(losses[0] / tokens[0].clamp(min=1)), bool(outputs.tokens_right()[0] == tokens[0])

    def _sample(self, context: str, visuals: Any, number: int, task: str, split: str) -> Sample:
        rule = self.loaded.recipe.data.pixels
        images = [_pixels(picture, rule) for picture in visuals(self._document(number, task, split)) or []]
        return self.loaded.sample(f"{task}/{split}/{number}", images, context)

    def _packed(self, sample: Sample) -> PackedBatch:
        """The batch of one sample, whose texts are counted where they are too long."""
        batch = self.loaded.pack([sample], 0)
        self._counts.add(self.loaded.task, batch.changed_texts())
        return batch

    def _say_what_was_cut(self) -> None:
        if self._counts:
            logger.warning("requests: %s", note(self.loaded.backbone, [self.loaded.task], self._counts))

    def _document(self, number: int, task: str, split: str) -> dict[str, Any]:
        return self.task_dict[task][split][number]


def _load(directory: str, device: str) -> adapter.Loaded:
    return adapter.load(directory, device)


def _pixels(picture: Any, rule: Pixels) -> Tensor:
    """A PIL image as uint8 (3, H, W), read as training read its files. Raises BadInput."""
    if not isinstance(picture, Image.Image):
        raise BadInput(f"a {type(picture).__name__} among what a task shows: images alone are offered.")
    try:
        return of_picture(picture, rule)
    except BadSample as bad:
        raise BadInput(f"a picture among what a task shows: {bad}.") from bad


def manifest() -> Any:
    """Entry for lmms-eval's entry point `lmms_eval.models`: the name of this model and the place of its class."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="mmpeft_ds", simple_class_path=f"{__name__}.AdapterModel")


def __getattr__(name: str) -> Any:
    if name != "AdapterModel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from lmms_eval.api.model import lmms

    return type(name, (AdapterAnswers, lmms), {"__module__": __name__, "__doc__": AdapterAnswers.__doc__})
