"""Several sequences of one text, as beams are, read all images of the text, in every family of language models."""

import pytest
import torch

from mmpeft_ds.backbones.mllm.image_features import Outputs
from tests.helpers.models import family_traits
from tests.helpers.models.family_samples import ONE, TALK, TWO, batch, samples_of
from tests.helpers.models.family_stock import made
from tests.helpers.models.family_traits import EVERY

QUICK = ("glm4v", "granite4_vision", "qwen3_vl")  # transformers mixes the images of the first two


@pytest.fixture
def folder(request, tmp_path):
    return family_traits.write(tmp_path, request.param)


@pytest.mark.parametrize(
    "folder",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in EVERY],
    indirect=True,
)
@torch.no_grad()
def test_all_sequences_of_a_text_read_its_images_in_their_order(folder, monkeypatch):
    backbone, model = made(folder)
    packed = batch(backbone, *samples_of(backbone, TWO, ONE, TALK))

    def first_logits(**options) -> torch.Tensor:
        """(sequences, vocabulary) of the first new token."""
        seen = []
        watched = model.get_output_embeddings().register_forward_hook(lambda *given: seen.append(given[-1][:, -1]))
        backbone.generate(model, packed, max_new_tokens=1, **options)
        watched.remove()
        return seen[0]

    def apart() -> float:
        several = first_logits(do_sample=True, num_return_sequences=2)
        return (several - alone.repeat_interleave(2, dim=0)).abs().max().item()

    alone = first_logits()
    together = apart()
    assert together < 1e-5 * alone.abs().max()

    def image_by_image(self, times):
        return self._make([i for text in self._by_text() for i in text for _ in range(times)])

    monkeypatch.setattr(Outputs, "repeated", image_by_image)
    assert apart() > 20 * together and apart() > 1e-4 * alone.abs().max()  # the first reads the first image twice
