"""A frozen model of features: it turns stored or live features into rows and scores classes by their texts."""

# I images, T texts, B rows (= T, or I where no text is given), C classes, D widths

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from mmpeft_ds.backbones.common.model_hooks import ModelHooks
from mmpeft_ds.backbones.common.stock import mean_per_text
from mmpeft_ds.host_copies import to_device
from mmpeft_ds.ops.precision import at_least_float32
from mmpeft_ds.sites.base import base_layer
from mmpeft_ds.sites.feature_site import Bank, Features, Scores, calibrated_buffers, collecting


class FeatureConfig(PretrainedConfig):
    """Widths, and shapes of the bank.

    Attributes:
        image_width, text_width: D of the features; 0: none.
        num_classes: C.
        logit_scale: factor of the cosine, 1 / temperature.
        ensemble: how templates become one class text: `unit` averages unit vectors, `raw` the vectors as they are.
        live_images: the encoder computes the image features in every step.
        bank_shapes: name -> shape of the tensors of the bank.
    """

    model_type = "mmpeft_features"
    # Trainer collects every other output of an evaluation as an array.
    keys_to_ignore_at_inference = ["terms", "report", "graph", "features", "penalty"]

    image_width: int = 0
    text_width: int = 0
    num_classes: int = 2
    logit_scale: float = 1.0
    ensemble: str = "unit"
    live_images: bool = False
    bank_shapes: dict[str, list[int]] | None = None


@dataclass
class ClassificationOutput(ModelOutput):
    """Output of the model, one row per text (per image where no text is given).

    Attributes:
        loss: scalar, where `labels` were given.
        logits: (B, C).
        terms: weighted logits whose cross-entropies make the loss, or None (`sites.features.Scores`).
        report: sums over own rows for the monitor.
        graph: the graph, for a picture of it.
        features: the rows that were scored.
        penalty: (B,) added to the loss of each row, or None.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    terms: list[tuple[float, Tensor]] | None = None
    report: dict[str, float] | None = None
    graph: Any = None
    features: Features | None = None
    penalty: Tensor | None = None


class ZeroShot(nn.Module):
    """Class scores of the frozen encoders alone: scaled cosines with the class texts; zeros where there are none.

    The one site of a model of features: heads take its place and may read `bank` and `logit_scale`.

    Source: CLIP, arXiv 2103.00020; ensembles as in Tip-Adapter (`unit`) and TaskRes (`raw`).

    Attributes:
        reads_frozen_images: whether a head in its place compares with `Features.further["frozen"]`.
    """

    reads_frozen_images = False

    def __init__(self, config: FeatureConfig, bank: Bank):
        super().__init__()
        self.bank = bank
        self.image_width, self.text_width = config.image_width, config.text_width
        self.live_images = config.live_images
        self.logit_scale, self.ensemble = config.logit_scale, config.ensemble
        # The same number as a parameter: peft and transformers need a model to have one.
        self.scale = nn.Parameter(torch.tensor([config.logit_scale]), requires_grad=False)

    @property
    def class_text(self) -> Tensor:
        """(C, D) unit vectors of the class texts."""
        texts = normalize(self.bank.positive, dim=-1) if self.ensemble == "unit" else self.bank.positive
        return normalize(texts.mean(1), dim=-1)

    def forward(self, features: Features) -> Scores:
        image = features.image
        if not self.bank.holds["text"]:
            return Scores(image.new_zeros(len(image), self.bank.num_classes))
        return Scores(self.logit_scale * normalize(image, dim=-1) @ self.class_text.to(image.dtype).T)


class FeatureModel(ModelHooks, PreTrainedModel):
    """Rows of features in, class scores out; `features` is where heads attach, `encoder` the frozen towers if any.

    Args:
        bank: class texts and support samples; None: empty tensors of the configuration's shapes.
        encoder: frozen model that computes features that are not stored; with `embed`, its backbone's function
            (model, batch) -> image and text features.
        class_names, tokenise: for methods that learn prompts of the classes: their names in words, and a function list
            of texts -> arguments of the encoder.
        trained_classes: indices of the classes that occur in training; None: all may.
    """

    config_class = FeatureConfig
    base_model_prefix = "feature_model"
    _no_split_modules: list[str] = []

    def __init__(
        self,
        config: FeatureConfig,
        bank: Bank | None = None,
        encoder: nn.Module | None = None,
        embed: Any = None,
        class_names: list[str] | None = None,
        tokenise: Any = None,
        trained_classes: list[int] | None = None,
    ):
        super().__init__(config)
        if bank is None:
            bank = empty_bank(config)
        config.bank_shapes = {name: list(getattr(bank, name).shape) for name in Bank.NAMES}
        self.features = ZeroShot(config, bank)
        if encoder is not None:
            self.encoder = encoder
        self._embed = embed
        self.class_names, self.tokenise, self.trained_classes = class_names, tokenise, trained_classes
        self.post_init()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the bank, whatever that of the encoder."""
        return base_layer(self.features).bank.positive.dtype

    @property
    def device(self) -> torch.device:
        return base_layer(self.features).bank.positive.device

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing to draw: the bank is data."""

    def rows(
        self,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        valid: Tensor | None = None,
        key: Tensor | None = None,
        num_slots: int | None = None,
        batch: Any = None,
    ) -> Features:
        """One row per text: the mean of its slot's image features, and its own; as `forward` takes them.

        Args:
            image_features: (I, Dv); text_features: (T, Dt); None: the encoder computes them from `batch`.
            image_owner, text_owner: slot of each image and text; None: row i is image i and text i.
            valid: (B,) bool; None: all are.
            key: (B,) int64; None: their position.
            num_slots: number of slots.
            batch: packed batch for the encoder.
        """
        further: dict[str, Tensor] = {}
        if batch is not None:
            image, text, further = self._embedded(batch)
            image_features = image if image_features is None else image_features
            text_features = text if text_features is None else text_features
        some = image_features if image_features is not None else text_features
        if text_owner is None:
            rows = len(some)
            text_owner = torch.arange(rows, device=some.device)
            image_owner = text_owner if image_owner is None else image_owner
            num_slots = rows if num_slots is None else num_slots
        rows = len(text_owner)
        if image_features is None:
            dtype = torch.float32 if some is None else some.dtype
            image = torch.zeros(rows, self.config.image_width, dtype=dtype, device=text_owner.device)
        else:
            image = mean_per_text(image_features, image_owner, text_owner, num_slots)
        return Features(
            image,
            text_features,
            to_device(torch.ones(rows, dtype=torch.bool), image.device) if valid is None else valid,
            torch.arange(rows, device=image.device) if key is None else key,
            {name: mean_per_text(x, image_owner, text_owner, num_slots) for name, x in further.items()} or None,
        )

    def _embedded(self, batch: Any) -> tuple[Tensor | None, Tensor | None, dict[str, Tensor]]:
        """Features of images and texts by the encoder, and what else there is of the images: `Features.further`."""
        frozen = None
        if self.features.reads_frozen_images:
            with torch.no_grad():  # first, so that layers recomputed in backward find what the other pass left
                frozen, _ = self._embed(self.encoder, batch)
        trained = any(p.requires_grad for p in self.encoder.parameters())
        with contextlib.nullcontext() if trained else torch.no_grad(), collecting() as further:
            image, text = self._embed(self.encoder, batch)
        return image, text, further if frozen is None else {**further, "frozen": frozen}

    def forward(
        self,
        image_features: Tensor | None = None,
        text_features: Tensor | None = None,
        image_owner: Tensor | None = None,
        text_owner: Tensor | None = None,
        valid: Tensor | None = None,
        key: Tensor | None = None,
        num_slots: int | None = None,
        batch: Any = None,
        labels: Tensor | None = None,
        return_dict: bool | None = None,
    ) -> ClassificationOutput:
        """Score the rows, and with `labels` also give their loss, as stock classifiers of transformers do.

        Args:
            labels: (B,) class of each row, -100 for a row that does not count. The loss is the mean over rows that
                count and are valid. Recipes leave labels to their task, which weights rows over ranks.
            return_dict: accepted for transformers' sake; the output is always a ModelOutput.
            (others): as in `rows`.
        """
        rows = self.rows(image_features, text_features, image_owner, text_owner, valid, key, num_slots, batch)
        scores = self.features(rows)
        loss = None if labels is None else _mean_loss(scores, labels.masked_fill(~rows.valid, -100))
        return ClassificationOutput(
            loss, scores.logits, scores.terms, scores.report, scores.graph, rows, scores.penalty
        )

    def training_state(self) -> dict[str, Tensor]:
        """Buffers that heads have calibrated without gradients, for checkpoints: path -> tensor."""
        return calibrated_buffers(self)

    def load_training_state(self, state: dict[str, Tensor]) -> None:
        """Restore the buffers that `training_state` returned."""
        for path, tensor in state.items():
            module, _, name = path.rpartition(".")
            getattr(self.get_submodule(module), name).copy_(tensor)


def _mean_loss(scores: Scores, labels: Tensor) -> Tensor:
    """Cross-entropies of the terms and the penalty, the mean over the rows whose label is not -100; 0 where there is
    none."""
    count = (labels != -100).sum().clamp(min=1)
    terms = scores.terms or [(1.0, scores.logits)]
    total = sum(w * cross_entropy(at_least_float32(logits), labels, reduction="sum") for w, logits in terms)
    if scores.penalty is not None:
        total = total + scores.penalty[labels != -100].sum()
    return total / count


def empty_bank(config: FeatureConfig) -> Bank:
    """A bank of zeros with the shapes that the configuration names."""
    shapes = config.bank_shapes or {}
    dtypes = {"support_labels": torch.int64}
    return Bank(
        config.num_classes,
        *(torch.zeros(shapes[n], dtype=dtypes.get(n)) if n in shapes else None for n in Bank.NAMES),
    )


AutoConfig.register(FeatureConfig.model_type, FeatureConfig, exist_ok=True)
AutoModel.register(FeatureConfig, FeatureModel, exist_ok=True)
