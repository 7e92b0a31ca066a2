"""Merging of an adapter into its base: one plain transformers folder that needs neither peft nor this project.

config.json, model.safetensors      of the base's own class, float32, as every part of the configuration says
tokenizer and processor files       copied from where the base has them
merged.json                         its origin, and the difference of its outputs from those of the adapted model
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import torch
import transformers
from peft import PeftConfig
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, PretrainedConfig, PreTrainedModel

from mmpeft_ds import adapter
from mmpeft_ds import recipe as recipes
from mmpeft_ds.adapter_files import read_backbone, whole
from mmpeft_ds.backbones.common import tower_loading
from mmpeft_ds.data.batch import PackedBatch, Prompted, Sample, pack
from mmpeft_ds.data.transform import hooks_of
from mmpeft_ds.engine.assembly.forward import forward
from mmpeft_ds.engine.assembly.resolve import make_method
from mmpeft_ds.engine.zero import fingerprint
from mmpeft_ds.errors import BadInput
from mmpeft_ds.files import new_directory, write_json
from mmpeft_ds.methods.base import SiteMethod
from mmpeft_ds.recipe import Section

TOLERANCE = 1e-3  # share of the largest output: above float32 rounding of large models, below a lost adapter
TEXTS = ("a", "a red circle on the left of two dogs", "what is it?")
# Options of backbones that name folders with files for texts and images, in order of preference.
PLACES = ("model", "text", "vision")
COPIED = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "tokenizer.model", "sentencepiece.bpe.model", "chat_template.jinja",
    "chat_template.json", "preprocessor_config.json", "processor_config.json",
)  # fmt: skip


def merge(directory: str | Path, out: str | Path, weights: adapter.Weights = "dequantised") -> dict[str, Any]:
    """Write the model of an adapter directory with all trained weights merged into it.

    A dual encoder that was trained on stored image features gets its vision tower.

    Args:
        out: a new directory.
        weights: of a quantised base, those that are merged into: `dequantised` or `original`; for another the same.

    Returns:
        contents of merged.json: `backbone`, `method`, `largest_difference` (relative to the largest output) from the
        adapted model over these weights, ...; of a quantised base `weights`, and in `differences` those from the
        adapted model `as trained` and over either kind of weights.

    Raises:
        BadInput: no such adapter, `out` exists, the method cannot be merged, or the outputs of the merged model
            differ from those of the adapted one, or its class cannot open the folder. Nothing is left under `out`.
    """
    section, method, config = opened(directory, out)
    if reason := method.unmergeable(config):
        raise BadInput(f"{directory}: method {section.name} cannot be merged: {reason} Keep it as an adapter.")
    quantised = read_backbone(whole(directory))["options"].get("quantise", "none") != "none"
    others = [name for name in get_args(adapter.Weights) if quantised and name != weights]
    references = {name: _adapted(directory, name) for name in others}
    loaded = adapter.load(directory, pictures=True, weights=weights)
    recipe, backbone = loaded.recipe, loaded.backbone
    model = loaded.model.float().eval()
    batch = probe(backbone)
    adapted = outputs(model, backbone, batch)
    _unwrap_heads(model.get_base_model())
    plain = model.merge_and_unload()
    merged = outputs(plain, backbone, batch)
    largest = difference(adapted, merged)
    if largest > TOLERANCE:
        raise BadInput(
            f"{directory}: method {section.name} cannot be folded into the weights: merged, outputs differ by "
            f"{largest:.1e} of the largest. Keep it as an adapter."
        )
    origin = {
        "backbone": recipe.backbone["name"],
        "method": section.name,
        "adapter": str(directory),
        "largest_difference": largest,
        "parameters": sum(p.numel() for p in plain.parameters()),
    }
    if quantised:
        compared = {name: difference(given, merged) for name, given in references.items()}
        origin |= {"weights": weights, "differences": {weights: largest, **compared}}
    stock_class = stock(type(plain))
    with new_directory(Path(out)) as partial:
        say_dtype(plain.config, torch.float32)
        plain.save_pretrained(partial)
        _copy_files(recipe.backbone, partial)
        write_json(partial / "merged.json", origin)
        weights = fingerprint.frozen_fingerprint(fingerprint.all_tensors(plain))
        del loaded, model, plain  # one model at a time
        open_once(partial, stock_class, weights, str(out))
    return origin


def opened(directory: str | Path, out: str | Path) -> tuple[Section, type[SiteMethod], PeftConfig]:
    """Section, entry and config of the method of an adapter directory from which `out` is to be written.

    Raises:
        BadInput: no such adapter, or `out` exists.
    """
    if Path(out).exists():
        raise BadInput(f"{out}: exists. Give a new directory.")
    section = recipes.components(adapter.recipe_of(whole(directory))).method
    return section, *make_method(section)


def _adapted(directory: str | Path, weights: adapter.Weights) -> list[Tensor]:
    """Outputs of the adapted model over a kind of weights, for the batch of `probe`."""
    loaded = adapter.load(directory, pictures=True, weights=weights)
    return outputs(loaded.model, loaded.backbone, probe(loaded.backbone))


def stock(model_class: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The class of transformers under which a model is saved; its own class where transformers has none."""
    return getattr(transformers, model_class.__name__, model_class)


def say_dtype(config: PretrainedConfig, dtype: torch.dtype) -> None:
    """Write `dtype` into a configuration and all its parts: a part that is loaded alone has the dtype of its own."""
    config.dtype = dtype
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            say_dtype(part, dtype)


def open_once(folder: Path, model_class: type[PreTrainedModel], weights: dict[str, str], name: str) -> None:
    """Open a written model as its users will: weights, tokenizer and image processor.

    Args:
        weights: fingerprint of what was written.
        name: what the folder will be called, for the message.

    Raises:
        BadInput: it cannot be opened, or other weights come back.
    """
    try:
        with tower_loading.quiet_loading():
            model, info = model_class.from_pretrained(folder, output_loading_info=True)
        if (folder / "tokenizer_config.json").is_file():
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if _names_its_class(folder / "preprocessor_config.json", model_class):
            AutoImageProcessor.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - whatever a class of transformers raises, nobody can use the folder
        raise BadInput(
            f"{name}: not written, since {model_class.__name__} cannot open the merged folder "
            f"({tower_loading.first_line(error)}). Keep the adapter, and see whether the base itself opens."
        ) from error
    read = fingerprint.frozen_fingerprint(fingerprint.all_tensors(model))
    wrong = [*info["missing_keys"], *info["unexpected_keys"]]
    wrong += [tensor for tensor in weights.keys() | read.keys() if weights.get(tensor) != read.get(tensor)]
    if wrong:
        raise BadInput(
            f"{name}: not written, since {model_class.__name__} reads other weights than were merged, first "
            f"{min(wrong)}. Keep the adapter."
        )


def _names_its_class(file: Path, model_class: type[PreTrainedModel]) -> bool:
    """Whether transformers can know of which class an image processor is. A composed model has the file of its vision
    tower, which may leave that to the configuration of the tower; our own code reads the numbers in it."""
    if not file.is_file():
        return False
    stated = {"image_processor_type", "feature_extractor_type"} & json.loads(file.read_text("utf-8")).keys()
    return bool(stated) or model_class.__module__.startswith("transformers.")


def probe(backbone: Any) -> PackedBatch:
    """A batch with two noisy images and some texts, for comparing two models."""
    generator = torch.Generator().manual_seed(0)
    transform = backbone.image_transform(False)

    def image() -> Any:
        if hooks_of(transform).takes_features:
            dummy = backbone.dummy("image")
            return transform(torch.randn(dummy.shape, generator=generator), generator)
        return transform(torch.randint(256, (3, 48, 64), dtype=torch.uint8, generator=generator), generator)

    texts = [Prompted(text, "a dog") if backbone.generates else text for text in TEXTS]
    samples = [Sample(str(i), 1.0, [image()], texts, [0] * len(texts)) for i in range(2)]
    return pack(samples, backbone.collate_images, backbone.collate_texts, lambda targets: {})


@torch.no_grad()
def outputs(model: nn.Module, backbone: Any, batch: PackedBatch) -> list[Tensor]:
    """Outputs of the model for the batch: logits, or features."""
    result = forward(model, backbone, batch)
    if backbone.generates:
        return [result.logits]
    return [result[name] for name in ("logits", "image_features", "text_features") if name in result]


def difference(one: list[Tensor], other: list[Tensor]) -> float:
    """Largest difference of two lists of outputs, relative to the largest finite value of each."""
    differences = [0.0]
    for a, b in zip(one, other, strict=True):
        finite = a.isfinite() & b.isfinite()
        scale = a[finite].abs().max().clamp(min=1e-12)
        differences.append(float((a - b)[finite].abs().max() / scale))
    return max(differences)


def _unwrap_heads(base: nn.Module) -> None:
    """Put modules that were trained in full in their places. peft does it too, but for IA3 only if they have a weight
    of their own."""
    for path, module in list(base.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            put(base, path, module.modules_to_save[module.active_adapters[0]])


def put(base: nn.Module, path: str, module: nn.Module) -> None:
    """Make `module` the one at `path` of `base`."""
    parent, _, name = path.rpartition(".")
    setattr(base.get_submodule(parent), name, module)


def _copy_files(section: dict[str, Any], out: Path) -> None:
    for place in (section[key] for key in PLACES if section.get(key)):
        for name in COPIED:
            file = tower_loading.find_file(tower_loading.locate(place, "backbone"), name)
            if file and not (out / name).exists():
                shutil.copyfile(file, out / name)
