"""Task: describe a sample's images in words; CIDEr, BLEU and ROUGE-L against all captions that people gave.

With `prompt: "caption: "` this is the captioning of VL-Adapter (arXiv 2112.06825), without one that of the routing
paper (arXiv 2403.09377; specs/routing.md 2.2).
"""

# T texts (captions) of the micro-batch

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mmpeft_ds.data.batch import PackedBatch, Prompted
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.errors import BadInput, BadSample
from mmpeft_ds.metrics.captions import caption_scores
from mmpeft_ds.tasks.base import TaskBase
from mmpeft_ds.tasks.captioning.options import Options
from mmpeft_ds.tasks.captioning.priors import WHICH, by_picture, priors
from mmpeft_ds.tasks.common.losses import weighted_sum


class Captioning(TaskBase):
    """Records hold `captions`, a list of texts; training draws one per visit, evaluation takes all as references."""

    Options = Options
    main_metric = "cider"
    collates_by_row = True
    identifies_pictures = True
    prompt_kind, target_kind = "prompt", "caption"

    def __init__(self, options: Options, labels: list[str] | None):
        super().__init__(options, labels)
        if options.loss not in ("token", "caption"):
            raise BadInput(f"task.loss: {options.loss!r}. Use token or caption.")
        if not 0 <= options.smoothing < 1:
            raise BadInput(f"task.smoothing: {options.smoothing}. Use a number in [0, 1).")
        if options.num_beams < 1:
            raise BadInput(f"task.num_beams: {options.num_beams}. Use 1 or more.")
        if min(options.max_length, options.max_new_tokens) < 0 or not options.max_length + options.max_new_tokens:
            raise BadInput("task.max_length and task.max_new_tokens: one of them must be above 0, neither below.")
        longest = {"max_new_tokens": options.max_new_tokens} if options.max_new_tokens else {}
        self.generation = {
            "num_beams": options.num_beams,
            "length_penalty": options.length_penalty,
            **(longest or {"max_length": options.max_length}),
        }

    def read(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Prompted], list[Any]]:
        """The prompt and one of the captions, drawn again at each visit."""
        texts = self._captions(record)
        drawn = int(torch.randint(len(texts), (), generator=generator)) if len(texts) > 1 else 0
        return [Prompted(self.options.prompt, texts[drawn])], [{"known": 1.0}]

    def read_all(self, record: dict[str, Any], generator: torch.Generator) -> tuple[list[Prompted], list[Any]]:
        """The prompt and the first caption, for evaluation, whose loss would else depend on a draw.

        An empty list is that of a split whose captions are not public: it is described, and nothing is scored.
        """
        if record.get("captions") == []:
            return [Prompted(self.options.prompt, "")], [self.dummy_target()]
        return [Prompted(self.options.prompt, self._captions(record)[0])], [{"known": 1.0}]

    def collate(self, targets: list[Any]) -> dict[str, Tensor]:
        """`known` (T,): 1 for a text with a caption, 0 for one without."""
        return {"known": torch.tensor([target["known"] for target in targets], dtype=torch.float32)}

    def dummy_text(self, text: Any) -> Any:
        """The backbone's, behind the prompt of all others: within `max_length` a rank with a shorter one would write
        on, and the others with it, past the last position of their model."""
        same = isinstance(text, Prompted) and "max_length" in self.generation
        return replace(text, prompt=self.options.prompt) if same else text

    def dummy_target(self) -> Any:
        return {"known": 0.0}

    def every_text(self, record: dict[str, Any]) -> list[Prompted]:
        """The prompt and each of the captions."""
        return [Prompted(self.options.prompt, caption) for caption in self._captions(record)]

    def scored(self, rows: list[dict[str, Any]]) -> int:
        """Samples with captions to compare with."""
        return sum(bool(row["references"]) for row in rows)

    @staticmethod
    def _captions(record: dict[str, Any]) -> list[str]:
        """Captions that hold a text. Raises BadSample if there is none."""
        captions = record.get("captions")
        if not isinstance(captions, list) or not all(isinstance(c, str) for c in captions):
            raise BadSample("field", "`captions` is no list of texts")
        texts = [c.strip() for c in captions if c.strip()]
        if not texts:
            raise BadSample("field", "`captions` holds no text")
        return texts

    def prompted(self, text: str) -> Prompted:
        """A text given in prediction, as the model reads it: after the prompt."""
        return Prompted(self.options.prompt + text)

    def ask(self, texts: list[str]) -> tuple[dict[str, Any], list[Any]]:
        """A record without captions, and a target for each text."""
        return {"captions": []}, [self.dummy_target() for _ in texts]

    def weight(self, batch: PackedBatch) -> float:
        """Target tokens, or captions, that enter the loss."""
        return float(self._weights(batch).double().sum()) if len(batch.text_owner) else 0.0

    def _weights(self, batch: PackedBatch) -> Tensor:
        tokens = (batch.texts["labels"] != -100).sum(1)
        return self._text_weight(batch) * (tokens if self.options.loss == "token" else tokens > 0)

    @staticmethod
    def _text_weight(batch: PackedBatch) -> Tensor:
        """Weight of each text, 0 where its caption is not known; a batch that was packed without targets knows all."""
        known = batch.targets.get("known")
        return batch.text_weight if known is None else batch.text_weight * known

    def loss(self, outputs: GenerationOutput, batch: PackedBatch) -> Tensor:
        """Sum over captions of weight times the sum, or the mean, of the cross-entropy over their tokens."""
        total, count = outputs.token_losses(self.options.smoothing)
        each = total if self.options.loss == "token" else total / count.clamp(min=1)
        return weighted_sum(each, self._text_weight(batch))

    def predict(self, outputs: GenerationOutput, batch: PackedBatch) -> list[dict[str, Any]]:
        """One row per text of weight > 0: sample_id, text (the prompt), prediction, references, and of `WHICH` what is
        there."""
        if not len(batch.text_owner):
            return []
        rows = []
        for text, slot, weight, caption in zip(
            batch.raw_texts,
            batch.text_owner.tolist(),
            batch.text_weight.tolist(),
            outputs.generated,
            strict=True,
        ):
            if weight > 0:
                prompt = text.prompt if isinstance(text, Prompted) else text
                row = {"sample_id": batch.sample_id[slot], "text": prompt, "prediction": caption}
                record = batch.records[slot]
                row |= {name: record[name] for name in WHICH if name in record}
                rows.append(row | {"references": list(record.get("captions", []))})
        return rows

    def score(self, rows: list[dict[str, Any]]) -> dict[str, float]:
        """`cider`, `bleu1` to `bleu4`, `rouge_l`, of the pictures that have references.

        Samples of one picture, as files with one line a caption give them, count as one picture with the captions of
        all: these scores mean something else with one reference each.
        """
        known = by_picture([r for r in rows if r["references"]])
        references = [[text for r in same for text in r["references"]] for same in known]
        return caption_scores([same[0]["prediction"] for same in known], references) if known else {}

    def baselines(self, train: Iterable[dict[str, Any]], test: Iterable[dict[str, Any]]) -> dict[str, float]:
        """`majority_*` and `random_*`: captions of training for pictures that nobody looked at."""
        return priors(train, test)


ENTRY = Captioning
