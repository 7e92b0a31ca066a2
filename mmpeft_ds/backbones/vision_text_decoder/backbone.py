"""Backbone: any ViT-like vision tower and any causal language model of a known family, joined to generate text.

The defaults are the GPT-2 + ViT wiring of the routing paper (arXiv 2403.09377; specs/routing.md 2.2), but for the
loss, whose published form is `loss: official`.
"""

# T texts, L text length, P prefix length

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mmpeft_ds.backbones.common import stock, tower_loading
from mmpeft_ds.backbones.common.generation import in_step, one_of
from mmpeft_ds.backbones.common.spelling import Spelling
from mmpeft_ds.backbones.common.text_row import TextRow
from mmpeft_ds.backbones.common.texts import collated, fitted, pairs
from mmpeft_ds.backbones.common.vision_backbone import VisionBackbone
from mmpeft_ds.backbones.vision_text_decoder.model import (
    VisionTextDecoder,
    VisionTextDecoderConfig,
    VisionTextDecoderOutput,
)
from mmpeft_ds.backbones.vision_text_decoder.options import Options
from mmpeft_ds.data.batch import PackedBatch, Prompted
from mmpeft_ds.data.generation_output import GenerationOutput
from mmpeft_ds.data.token_counts import TokenCounts
from mmpeft_ds.errors import BadInput
from mmpeft_ds.host_copies import both

FAMILIES = ("gpt2", "llama", "mistral", "qwen2")


class VisionTextDecoderBackbone(VisionBackbone):
    """A vision tower and a language model as recipes use them."""

    Options = Options
    generates = True

    @property
    def publishes_kinds(self) -> bool:
        """Where image vectors stand before the text."""
        return self.options.prefix != "none"

    @property
    def unpackable(self) -> str:
        """The published loss is that of padding too, which a row without padding has not."""
        return "" if self.options.loss == "fixed" else VisionBackbone.unpackable

    def check(self) -> None:
        """Refuse what cannot work, from configurations only."""
        self._check_vision()
        o, text = self.options, self._text_config
        used = o.max_text_length + self._prefix_length + o.begin_token
        if o.max_text_length < 2 or used > text.max_position_embeddings:
            raise BadInput(
                f"backbone.max_text_length: {o.max_text_length} with prefix {o.prefix} needs {used} positions; "
                f"{o.text!r} has {text.max_position_embeddings} (at least 2 are needed for a word and its end)."
            )
        if o.prefix == "none" and not self._start:
            raise BadInput(
                "backbone.start: empty, and prefix: none leaves nothing to begin with. Give a start, or a prefix."
            )
        if o.begin_token and o.prefix == "none":
            raise BadInput(
                "backbone.begin_token: true, but prefix: none leaves no image vector after it. Give a prefix."
            )
        if o.loss not in ("fixed", "official"):
            raise BadInput(f"backbone.loss: {o.loss!r}. Use fixed or official.")
        if o.projection not in ("none", "linear", "mlp"):
            raise BadInput(f"backbone.projection: {o.projection!r}. Use none, linear or mlp.")

    def build(self, on_meta: bool = False) -> PreTrainedModel:
        """The model, frozen."""
        o = self.options
        config = VisionTextDecoderConfig(
            **self._side_config(on_meta), projection=o.projection, begin_token=o.begin_token
        )
        config._attn_implementation = tower_loading.choose_attention(self.attention, self.dtype)
        if on_meta:
            with torch.device("meta"):
                model = VisionTextDecoder(config).with_towers_in(self.dtype)
        else:
            text = stock.load(
                MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)],
                o.text,
                "backbone.text",
                config.text_config,
                self.dtype,
                self.attention,
                o.random_weights,
                device=self.device,
                quantise=o.quantise,
            )
            vision = self._load_vision(config.vision_config)
            with torch.random.fork_rng():
                # The same projection on every rank and at every ZeRO stage, however many draws loading has taken.
                torch.manual_seed(torch.initial_seed())
                model = VisionTextDecoder(config, vision, text)
        return self._quantised(model.requires_grad_(False).train())

    def collate_texts(self, texts: list[str | Prompted]) -> dict[str, Tensor]:
        """Ids and mask of start, prompt and target, padded on the right with the end of text, and `labels`: the ids
        that enter the loss, -100 elsewhere. Where a text is too long, the prompt loses its middle and the target its
        end."""
        o, end, start = self.options, self._end_id, self._start_ids
        texts = pairs(texts)
        prompts, targets = self._texts.words([t.prompt for t in texts]), self._texts.words([t.target for t in texts])
        rows, from_, until = [], [], []
        for i, text in enumerate(texts):
            if text.target and o.loss == "fixed":
                targets[i].ids.append(end)  # the first to go where the target is cut
            prompts[i], targets[i] = fitted(prompts[i], targets[i], o.max_text_length - len(start))
            before = start + prompts[i].ids
            rows.append(before + targets[i].ids)
            # published texts have no prompt, and their start enters the loss like the rest
            from_.append(0 if o.loss == "official" and not text.prompt else len(before))
            until.append(0 if not text.target else o.max_text_length if o.loss == "official" else len(rows[-1]))
        length = o.max_text_length if o.loss == "official" else max(1, *map(len, rows))
        ids = torch.tensor([row + [end] * (length - len(row)) for row in rows])
        place = torch.arange(length)
        real = place < torch.tensor([len(row) for row in rows])[:, None]
        asked = (place >= torch.tensor(from_)[:, None]) & (place < torch.tensor(until)[:, None])
        tensors = {"input_ids": ids, "attention_mask": real.long(), "labels": labels_of(ids, asked, o.loss)}
        return collated(tensors, prompts, targets)

    def read(self, outputs: VisionTextDecoderOutput, batch: PackedBatch) -> GenerationOutput:
        """Labels moved to the position before each token: the last of the prefix predicts the first token."""
        row, shape = outputs.text_row, outputs.logits.shape
        labels = self._labels(batch, shape[1], row)
        text_of = None if row is None else row.text_of
        lengths = {"lengths": outputs.lengths, "positions": shape[0] * shape[1]}
        return GenerationOutput(outputs.logits, labels, text_of=text_of, texts=len(batch.text_owner), **lengths)

    def labels_at(self, model: Any, batch: PackedBatch, positions: int) -> Tensor:
        """The token that follows each position; nothing follows the last, and a prefix stands before the first."""
        return self._labels(batch, positions, model.text_row)

    def _labels(self, batch: PackedBatch, positions: int, row: TextRow | None) -> Tensor:
        labels, pad = batch.texts["labels"], functools.partial(nn.functional.pad, value=-100)
        if row is not None:
            whole = both(lambda known: pad(known, (row.width - known.shape[1], 0)), labels)
            return both(lambda known: pad(known[:, 1:], (0, 1)), row.labels(whole))
        prefix = positions - labels.shape[1]
        return both(lambda known: pad(known[:, 1:] if prefix == 0 else known, (max(prefix - 1, 0), 1)), labels)

    def inputs(self, batch: PackedBatch) -> dict[str, Any]:
        """Forward arguments as of every backbone, what the answers are, and whether all texts are one row."""
        given = super().inputs(batch) | {"answers": batch.texts["labels"]}
        return given | ({"padding_free": True} if batch.padding_free else {})

    def tokens(self, texts: list[str | Prompted], image_sizes: list[tuple[int, int]]) -> TokenCounts:
        """Token counts of all texts of a sample, each after the vectors of its images."""
        before = len(image_sizes) * self._prefix_length + self.options.begin_token if image_sizes else 1
        before = 0 if self.options.prefix == "none" else before
        read = [int(self.collate_texts([text])["attention_mask"].sum()) + before for text in texts]
        return TokenCounts(sum(read), len(image_sizes) * self._prefix_length, sum(n * n for n in read))

    def tokens_key(self) -> str:
        """Hash of tokenizer, limits and prefix."""
        o = self.options
        limits = [o.max_text_length, self._start, o.prefix, o.begin_token, self._prefix_length, o.loss]
        return stock.short_hash([self._tokenizer.backend_tokenizer.to_str(), limits])

    def generate(self, model: Any, batch: PackedBatch, choices: list[str] | None = None, **options: Any) -> list[str]:
        """The text generated after start and prompt of each text.

        Args:
            choices: the only answers that may be generated.
            options: of transformers' `generate`; `max_length` counts prefix, start and prompt.
        """
        if not len(batch.text_owner):
            return []
        prompts = [t.prompt if isinstance(t, Prompted) else t for t in batch.raw_texts]
        room = self.options.max_text_length - len(self._start_ids)
        rows = [self._start_ids + words.without_middle(room).ids for words in self._texts.words(prompts)]
        length = max(map(len, rows))
        device = batch.text_owner.device
        ids = torch.tensor([row + [self._end_id] * (length - len(row)) for row in rows], dtype=torch.int64)
        real = torch.arange(length) < torch.tensor([len(row) for row in rows])[:, None]
        asked = {k: v for k, v in self.inputs(batch).items() if k not in {*batch.texts, "answers"}}
        asked |= {"input_ids": ids.view(len(rows), length).to(device), "attention_mask": real.long().to(device)}
        if choices:
            known = [words.ids for words in self._texts.words(choices)]
            options |= {"prefix_allowed_tokens_fn": one_of(known, self._end_id, skip=0)}
            options |= {"max_new_tokens": max(map(len, known)) + 1}
        ends = {"eos_token_id": self._end_id, "pad_token_id": self._end_id}
        generated = model.generate(**asked, **ends, synced_gpus=in_step(model), **{"do_sample": False, **options})
        return [" ".join(text.split()) for text in self._spelling.decode_all(generated.tolist(), choices)]

    def as_generated(self, text: str) -> str | None:
        """`text` through the tokenizer, on one line."""
        text = self._spelling.as_generated(text)
        return None if text is None else " ".join(text.split())

    def frozen_prefix(self, model: nn.Module) -> list[str]:
        """The vision tower and the embeddings of the language model, up to the first that has a trainable."""
        at, base = next((n, m) for n, m in model.named_modules() if isinstance(m, VisionTextDecoder))
        embeddings = [n for n, m in base.text_model.named_modules() if isinstance(m, nn.Embedding)]
        frozen = []
        for path in ("vision_model", *(f"text_model.{n}" for n in embeddings)):
            if any(p.requires_grad for p in base.get_submodule(path).parameters()):
                break
            frozen.append(f"{at}.{path}" if at else path)
        return frozen

    # configurations and parts

    _other_widths = "Set projection: mlp or linear, which trains what joins them, or choose another pair."

    @property
    def _vector_width(self) -> int:
        tower = self._vision_config if self.options.projection == "none" else self._text_config
        return tower.hidden_size

    @functools.cached_property
    def _text_config(self) -> PretrainedConfig:
        return stock.read_config(self.options.text, "backbone.text", FAMILIES)

    @functools.cached_property
    def _spelling(self) -> Spelling:
        return Spelling(self._tokenizer)

    @property
    def _start(self) -> str:
        o = self.options
        return ("<s>" if o.prefix == "none" else "") if o.start == "auto" else o.start

    @property
    def _end_id(self) -> int:
        end = self._tokenizer.eos_token_id
        if end is None:
            raise BadInput(f"backbone.text: the tokenizer of {self.options.text!r} has no eos_token. Give it one.")
        return end

    @functools.cached_property
    def _start_ids(self) -> list[int]:
        return self._tokenizer(self._start, add_special_tokens=False)["input_ids"] if self._start else []


ENTRY = VisionTextDecoderBackbone


def labels_of(ids_TL: Tensor, asked_TL: Tensor, loss: str) -> Tensor:
    """(T, L) the ids that enter the loss, -100 elsewhere.

    Args:
        ids_TL: tokens.
        asked_TL: bool, which of them belong to the target (padding too, in the published form).
        loss: `fixed` takes all of these; `official` leaves out the first token of a text and every token 0.

    Source: caption loss of arXiv 2403.09377, specs/routing.md 2.2.
    """
    labels = ids_TL.masked_fill(~asked_TL, -100)
    if loss == "official":
        labels = labels.masked_fill(ids_TL == 0, -100)
        labels[:, 0] = -100
    return labels
