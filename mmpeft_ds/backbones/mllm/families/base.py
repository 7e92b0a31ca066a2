"""The contract of a family of multimodal language models, with what holds for most of them as defaults."""

# T texts, S text length with image tokens

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, ProcessorMixin

from mmpeft_ds.backbones.common import text_attention
from mmpeft_ds.backbones.common.text_row import give_texts_rows
from mmpeft_ds.backbones.mllm.finishing import Finishes
from mmpeft_ds.host_copies import both


class Family:
    """Differences of one family of transformers' image-text-to-text models from most others.

    Most need no file: their processor says what an image is in the text (`replace_image_token`), their
    `get_image_features` makes the features, and their forward takes these as `mm_encoder_outputs`.

    Attributes:
        model_types: `model_type` of the configurations that it is for.
        spelled: the processor says what an image is in the text, which may depend on its size: rows of tiles, tokens
            between them. False: it is one run of image tokens, as many as the tower makes of it.
        channels: where the channels stand in the pixels of an image batch; the pixels then stay whole numbers until
            they are on the device. None: the processor normalises them.
        patches: model types of it whose processor spells an image and cuts it into patches, channels first, that one
            module of the vision tower multiplies. Their pixels stay whole numbers too.
        unpackable: why texts may not follow one another in one row; empty where they may. Families that nobody
            has tried may not.
        row_attention: takes the place of sdpa where texts stand in one row, see `text_attention`; empty: a mask alone
            tells texts apart, since its layers know transformers' own names alone.
        text_axis: the first axis of its positions in time, height and width tells texts of one row apart.
        merges_each: its vision tower runs a part of itself once an image, outside of its blocks.
        first_position: of a text, which its model counts from.
        carrying: names of the classes of layers that carry a state, or a convolution, from token to token. In a row of
            several texts each text gets a row of its own there.
        one_token: features of videos stand where those of images do, though the model has a tower for either.
        video_list: the model takes the features of videos as a list, though it gives them in one tensor.
        no_videos: why its videos are not taken; empty where they are.
        one_turn: why it reads one question and its answer alone; empty where it reads conversations.
        compared: settings that its image processor and its vision tower must have alike, where both have them.
        optional: tensors that only some images have: their parts, which go through the vision tower by themselves.
        part_side: setting of its image processor for the side of such a part.
        as_lists: arguments of the vision tower that are lists of numbers.
        sizes_of_runs: arguments that positions follow from, with a row for each run of tokens of an image.
        finishes: model types of it that change the logits of their output layer, each with what it makes of them, from
            the configuration of its language model.
        template: chat template where the checkpoint has none.
        processor: class of the processor, where transformers has none that works without torchvision.
    """

    model_types: tuple[str, ...] = ()
    spelled: bool = True
    channels: int | None = None
    patches: tuple[str, ...] = ()
    unpackable: str = "was not tried with packed texts"
    row_attention: str = text_attention.NAME
    text_axis: bool = True
    merges_each: bool = False
    first_position: int = 0
    carrying: tuple[str, ...] = ()
    one_token: bool = False
    video_list: bool = False
    no_videos: str = ""
    one_turn: str = ""
    compared: tuple[tuple[str, str], ...] = (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    )
    optional: tuple[str, ...] = ()
    part_side: str = ""
    as_lists: tuple[str, ...] = ()
    sizes_of_runs: tuple[str, ...] = ()
    finishes: Finishes = MappingProxyType({})
    template: str = ""
    processor: type[ProcessorMixin] | None = None

    def min_side(self, processor: Any) -> int | None:
        """Short side that a decoder at reduced scale must not go below; None: the full image is needed.

        Args:
            processor: the image processor.
        """
        return None

    def collate(self, pixels: list[Tensor]) -> Tensor:
        """One tensor of what the processor made of each image; entries of all images stand in the first dimension.

        Default: the other dimensions are padded with zeros to the largest.
        """
        most = [max(sizes) for sizes in zip(*(p.shape[1:] for p in pixels), strict=True)]
        return torch.cat([_padded(p, most) for p in pixels])

    def together(self, media: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The tensors of all images, or videos, of a batch as one of each name. Default: `collate` of each, of those
        that have it."""
        names = dict.fromkeys(name for one in media for name in one if name in media[0] or name in self.optional)
        return {
            name: self.known([one[name] for one in media if name in one or name not in self.optional])
            for name in names
        }

    def known(self, pixels: list[Tensor]) -> Tensor:
        """`collate`, which remembers on the host what all of `pixels` do: the grids of images that a GPU holds."""
        return both(lambda *given: self.collate(list(given)), *pixels)

    def width(self, config: PretrainedConfig) -> int:
        """Width of the features of images. Default: that of the language model."""
        return config.get_text_config().hidden_size

    def processor_settings(self, config: PretrainedConfig) -> dict[str, Any]:
        """Arguments of the processor that its checkpoint may lack although the model's configuration has them."""
        return {}

    def mark(self, processor: Any) -> str:
        """The mark that the chat template writes for an image and the processor replaces. Default: its image token."""
        return processor.image_token

    def alone(self, processor: Any) -> str:
        """A text with one image and nothing else, as the processor takes it. Default: the mark."""
        return self.mark(processor)

    def opening(self, tokenizer: Any) -> str:
        """What every conversation begins with, also where the chat template does not write it. Default: nothing."""
        return ""

    def numbered(self, spelling: str, number: int) -> str:
        """The spelling of an image, or a video, as the one of this number, from 0 on, in its text. Default: the
        same for all."""
        return spelling

    def apart(self, output: Any) -> Any:
        """What `get_image_features` returned, with `pooler_output`, a tensor or one for each image, and with
        `deepstack_features`, where there are any, by layer and image. Default: as it is."""
        return output

    def joined(self, output: Any) -> Any:
        """The reverse of `apart`, for the images of one batch of texts. Default: as it is."""
        return output

    def unreadable(self, config: PretrainedConfig) -> str:
        """Why the stock class reads no image with this configuration, as an end of a sentence; empty where it does."""
        return ""

    def adjust(self, model: PreTrainedModel) -> None:
        """Change a model that was just made, where the stock one reads texts together otherwise than each alone.
        Default: layers of the classes that are `carrying`."""
        give_texts_rows(model, self.carrying)

    def looks_ahead(self, config: PretrainedConfig) -> bool:
        """Whether tokens of a text see later ones of it, so that its mask is not the causal one."""
        return False

    def video_mark(self, processor: Any) -> str:
        """The mark that the chat template writes for a video and the processor replaces. Default: its video token."""
        return processor.video_token

    def video_alone(self, processor: Any) -> str:
        """A text with one video and nothing else, as the processor takes it. Default: the mark."""
        return self.video_mark(processor)

    def without_padding(self, features: Tensor, wanted: int) -> Tensor:
        """The features (n, d) of a video that was padded with frames to the longest of its batch, without those of
        the padding. Default: the first `wanted`."""
        return features[:wanted]

    def token_types(self, media_tokens: Tensor, labels: Tensor | None) -> Tensor:
        """(T, S) int64 kinds of tokens, for models that ask for them. Default: as they are given.

        Args:
            media_tokens: (T, S) int64, 1 where a token of an image stands, 2 where one of a video does.
            labels: (T, S), -100 where nothing is asked; None in generation.
        """
        return media_tokens


def _padded(pixels: Tensor, most: list[int]) -> Tensor:
    missing = [m - s for m, s in zip(most, pixels.shape[1:], strict=True)]
    return torch.nn.functional.pad(pixels, [n for m in reversed(missing) for n in (0, m)]) if any(missing) else pixels
