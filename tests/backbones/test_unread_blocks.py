"""Blocks of a vision tower that no feature is made of: the same features without running them."""

import pytest
import torch
from transformers import AutoModel, CLIPVisionConfig, LlamaConfig, LlavaConfig

from mmpeft_ds.backbones.mllm.unread_blocks import UnreadBlocks
from tests.helpers.models import adapted_mllm, tiny_mllm

BLOCKS = tiny_mllm.CLIP["num_hidden_layers"]


@pytest.fixture
def seen(tmp_path):
    """seen(family, train, **config): features of one image, thrice, and the numbers of the blocks that computed."""

    def look(family="llava", train=(), **config):
        backbone = adapted_mllm.mllm(tmp_path, family)
        backbone.check()
        model = backbone.build().eval().requires_grad_(False)
        for name, value in config.items():
            setattr(model.config, name, value)
        blocks = model.get_encoder(modality="image").encoder.layers
        for number in train:
            blocks[number].requires_grad_()
        pixels = backbone.image_transform(False)(adapted_mllm.image(1))
        images, ran, features = backbone.collate_images([pixels]), [], []
        for number, block in enumerate(blocks):
            block.mlp.register_forward_hook(lambda *_, number=number: ran.append(number))
        numbers = []
        for _ in range(3):
            ran.clear()
            features.append(torch.cat(model.image_features(images).tokens))
            numbers.append(list(ran))
        return features, numbers

    return look


@pytest.mark.parametrize("family", ["llava", "llava_next"])
@pytest.mark.parametrize(("layer", "read"), [(-2, BLOCKS - 1), (-1, BLOCKS), (1, 1)])
def test_what_stands_behind_the_last_block_that_is_read_runs_once_alone(seen, family, layer, read):
    (whole, *later), numbers = seen(family, vision_feature_layer=layer)
    assert numbers[0] == list(range(BLOCKS)), "to see what a block returns"
    assert numbers[1:] == [list(range(read))] * 2
    assert all(torch.equal(features, whole) for features in later)


def test_a_trained_block_runs_though_nobody_reads_it(seen):
    _, numbers = seen(train=[2], vision_feature_layer=1)
    assert numbers[1:] == [[0, 2]] * 2


def test_of_several_layers_that_are_read_the_last_one_counts():
    config = LlavaConfig(vision_config=CLIPVisionConfig(**tiny_mllm.CLIP), text_config=LlamaConfig(**tiny_mllm.TEXT))
    tower = AutoModel.from_config(config.vision_config)
    for layers, unread in (([-3, 1], 2), ([-2, 1], 1), ([-1, 0], 0)):
        config.vision_feature_layer = layers
        assert UnreadBlocks(config, tower).blocks == list(tower.encoder.layers[BLOCKS - unread :])


def test_blocks_that_return_a_tuple_run():
    config = LlavaConfig(vision_config=CLIPVisionConfig(**tiny_mllm.CLIP), text_config=LlamaConfig(**tiny_mllm.TEXT))
    tower = AutoModel.from_config(config.vision_config)
    unread, ran = UnreadBlocks(config, tower), []
    block = tower.encoder.layers[-1]
    block.register_forward_hook(lambda module, args, output: (output,))
    block.mlp.register_forward_hook(lambda *_: ran.append(1))
    for _ in range(2):
        with unread.left_out():
            block(torch.zeros(1, 5, tiny_mllm.CLIP["hidden_size"]), None)
    assert len(ran) == 2
