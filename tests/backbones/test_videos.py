"""Videos in conversations: packed, every family says what the stock class says of them, fed by its own processor."""

import json
import pickle

import pytest
import torch
from PIL import Image

from mmpeft_ds.backbones.mllm import torchvision_functions
from mmpeft_ds.backbones.mllm.backbone import ENTRY, Options
from mmpeft_ds.backbones.mllm.families.smolvlm import in_words
from mmpeft_ds.backbones.mllm.model import media_ids
from mmpeft_ds.backbones.mllm.processing import TOKEN_RUNS
from mmpeft_ds.backbones.mllm.video_processing import VideoTransform
from mmpeft_ds.data.batch import Prompted, Sample, pack
from mmpeft_ds.data.video import Video, evenly
from mmpeft_ds.engine.assembly import modality
from mmpeft_ds.errors import BadSample
from mmpeft_ds.tasks.instruction.options import Options as TaskOptions
from mmpeft_ds.tasks.instruction.task import ENTRY as TASK
from tests.helpers.models import family_traits, tiny_families, tiny_mllm
from tests.helpers.models.family_stock import check_against_stock, made, processed, stock

QUICK = ("llava_onevision", "qwen3_vl", "internvl")
every_family = pytest.mark.parametrize(
    "folder",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in family_traits.having("video")],
    indirect=True,
)
# height, width, frames, frames shown in a second; stock processors stack the videos of one text
VIDEOS = {1: (20, 24, 4, 0.5), 2: (16, 30, 6, 1.0), 3: (24, 16, 2, 2.0), 4: (16, 20, 2, 0.25)}
SIZES = {1: (20, 33), 2: (40, 16)}
FILM = ([], [1], [Prompted("what is this ?", "a blue .")])
MIXED = ([1], [2], [Prompted("<video> is this <image> ?", "yes"), Prompted("color ?", "red")])
TWO = ([], [3, 4], [Prompted("<video> is <video> ?", "no", (("user", "what ?"), ("assistant", "blue")))])
PICTURE = ([2], [], [Prompted("what color ?", "red")])
TEXT = ([], [], [Prompted("yes ?", "no")])
ALL = (FILM, MIXED, TWO, PICTURE, TEXT)
# Their stock classes count tokens of images and of videos as one, and take no text that has both.
ONE_TOKEN = ("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga", "smolvlm", "molmo2")

ONE_VIDEO = ("molmo2",)  # whose processor takes one a text


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    return family_traits.write(tmp_path_factory.mktemp(request.param), request.param)


def image(number):
    generator = torch.Generator().manual_seed(number)
    return torch.randint(0, 256, (3, *SIZES[number]), dtype=torch.uint8, generator=generator)


def video(number):
    height, width, frames, rate = VIDEOS[number]
    generator = torch.Generator().manual_seed(number)
    pixels = torch.randint(0, 256, (frames, 3, height, width), dtype=torch.uint8, generator=generator)
    return Video(pixels, evenly(frames, rate))


def batch(backbone, *samples):
    see, watch = backbone.image_transform(False), backbone.video_transform()
    given = []
    for i, (images, videos, texts) in enumerate(samples):
        sample = Sample(str(i), 1.0, [see(image(n), None) for n in images])
        sample.videos = [watch(video(n)) for n in videos]
        sample.times = [video(n).times.of_frames for n in videos]
        sample.texts, sample.targets = list(texts), [0] * len(texts)
        given.append(sample)
    return pack(given, backbone.collate_images, backbone.collate_texts, lambda _: {}, backbone.collate_videos)


def stock_inputs(backbone, images, videos, text, answer=True):
    """What the processor of the family makes of one conversation; without its answer for generation."""
    given = {}
    if images:
        given["images"] = [Image.fromarray(image(n).permute(1, 2, 0).numpy()) for n in images]
    if videos:
        films = [video(n) for n in videos]
        given |= {"videos": [film.frames.numpy() for film in films], "do_sample_frames": False}
        # a camera of 100 frames a second, of which these were taken
        given["video_metadata"] = [
            dict(
                fps=100.0,
                total_num_frames=round(100 * film.times.duration),
                duration=film.times.duration,
                frames_indices=[round(100 * time) for time in film.times.of_frames],
            )
            for film in films
        ]
    return processed(backbone, text.with_images(len(images), (), len(videos)), answer, **given)


def of_texts(backbone, samples):
    """Number, images, videos and text of each that the stock class takes."""
    texts = [(images, videos, text) for images, videos, texts in samples for text in texts]
    alone = backbone._config.model_type in ONE_TOKEN
    most = 1 if backbone._config.model_type in ONE_VIDEO else 9
    return [(i, *text) for i, text in enumerate(texts) if not (alone and text[0] and text[1]) and len(text[1]) <= most]


@every_family
@torch.no_grad()
def test_logits_and_loss_are_those_of_the_stock_class_fed_by_its_own_processor(folder):
    backbone, model = made(folder)
    packed = batch(backbone, *ALL)
    given = backbone.inputs(packed)
    seen = []
    tower = model.get_encoder(modality="video")
    hook = tower.register_forward_hook(lambda module, args, output: seen.append(1))
    features = model.media_features(given["images"], given["videos"])
    hook.remove()
    assert len(features.videos) == 4 and len(features.images) == 2  # each once, however many texts read it
    without = backbone._config.model_type == "gemma4_unified"  # whose patches go through no tower
    assert without or 1 <= len(seen) <= 2, "the tower runs once for all images and once for all videos"
    texts = (given["input_ids"], given["attention_mask"], given["labels"])
    widened = model.widen(*texts, features, given["media_rows"])
    out = backbone.read(model(**given), packed)
    inputs = {i: stock_inputs(backbone, *text) for i, *text in of_texts(backbone, ALL)}
    check_against_stock(backbone, out, widened, stock(folder, backbone), inputs)


@every_family
@torch.no_grad()
def test_generated_text_is_that_of_the_stock_class(folder):
    backbone, model = made(folder)
    reference = stock(folder, backbone)
    ends = dict(pad_token_id=0, eos_token_id=backbone._tokenizer.eos_token_id, do_sample=False, max_new_tokens=4)
    ends |= dict(suppress_tokens=media_ids(backbone._config))
    samples = (MIXED, TWO, FILM, PICTURE)
    got = backbone.generate(model, batch(backbone, *samples), max_new_tokens=4)
    for i, images, videos, text in of_texts(backbone, samples):
        inputs = stock_inputs(backbone, images, videos, text, answer=False)
        ids = reference.generate(**inputs, **ends)[:, inputs["input_ids"].shape[1] :]
        assert got[i] == backbone._spelling.decode_all(ids.tolist(), None)[0]


@every_family
@torch.no_grad()
def test_another_video_gives_other_answers(folder):
    """A negative control of the comparison above."""
    backbone, model = made(folder)
    text = [Prompted("what is this ?", "a blue .")]
    packed = batch(backbone, ([], [3], text), ([], [4], text))
    losses = backbone.read(model(**backbone.inputs(packed)), packed).token_losses()[0]
    assert losses[0] != pytest.approx(losses[1].item(), rel=1e-6)


@pytest.mark.parametrize("folder", ["qwen2_5_vl"], indirect=True)
@torch.no_grad()
def test_videos_of_texts_in_one_row_are_read_as_in_rows_of_their_own(folder):
    backbone, model = made(folder)
    packed = batch(backbone, *ALL)
    apart = backbone.read(model(**backbone.inputs(packed)), packed).token_losses()[0]
    packed.padding_free = True
    together = backbone.read(model(**backbone.inputs(packed)), packed).token_losses()[0]
    assert torch.allclose(apart, together, rtol=1e-5)


@pytest.mark.parametrize("folder", QUICK, indirect=True)
@torch.no_grad()
def test_a_rank_without_videos_reads_the_whole_one_it_is_given_however_short_its_texts_are(folder):
    """A video that its text does not read would leave this rank with another backward pass than the others'."""
    backbone, model = made(folder)
    task = TASK(TaskOptions(), None)
    for words in range(0, 30, 3):
        alone = batch(backbone, ([], [], [Prompted("yes " * words + "?", "no")]))
        completed = modality.complete(alone, [1.0, 3.0, 1.0, 0.0], backbone, task)
        assert completed.modalities == {"image", "text", "video"}
        given = backbone.inputs(completed)
        assert given["media_rows"].tolist() == [0, 1]
        want = backbone.read(model(**backbone.inputs(alone)), alone).token_losses()[0]
        got = backbone.read(model(**given), completed).token_losses()[0]
        assert got[0].item() == pytest.approx(want[0].item(), rel=1e-5)


def test_another_video_processor_counts_tokens_anew_and_another_place_does_not(tmp_path):
    folder, moved = (tiny_families.write(tmp_path / name, "qwen3_vl") for name in ("here", "there"))
    before = made(folder)[0].tokens_key()
    assert made(moved)[0].tokens_key() == before
    path = tmp_path / "here" / "video_preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"size": {"shortest_edge": 4096, "longest_edge": 8192}}))
    assert made(folder)[0].tokens_key() != before


@pytest.mark.parametrize("folder", QUICK, indirect=True)
def test_tokens_are_counted_from_sizes_and_times_alone(folder):
    backbone, model = made(folder)
    texts = [MIXED[2][0].with_images(1, (), 1)]
    packed = batch(backbone, (MIXED[0], MIXED[1], MIXED[2][:1]))
    given = backbone.inputs(packed)
    length = int(model(**given)["lengths"][0])
    film = video(2)
    counted, of_media = backbone.tokens(texts, [SIZES[1]], [(*film.frames.shape[-2:], film.times)])[:2]
    features = model.media_features(given["images"], given["videos"])
    assert (counted, of_media) == (length, sum(len(t) for t in features.tokens))


def test_frames_of_more_pixels_than_allowed_are_scaled_down(tmp_path):
    folder = tiny_mllm.write(tmp_path, "qwen2_vl")
    frames = torch.randint(0, 256, (4, 3, 224, 112), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    film, counted = Video(frames, evenly(4)), []
    for most in (0, 28 * 28):
        backbone = ENTRY(Options(folder, max_pixels=most), None)
        watch = backbone.video_transform()
        height, width = watch._bounded(frames).shape[-2:]
        assert abs(height - 2 * width) <= 1 and (not most or 700 < height * width <= most)
        counted.append(int(watch(film)[TOKEN_RUNS].sum()))
        assert backbone.tokens([], [], [(224, 112, film.times)]).of_images == counted[-1]
    assert 0 < counted[1] < counted[0]


@pytest.mark.parametrize("folder", QUICK, indirect=True)
def test_a_loader_process_makes_the_same_of_a_video(folder):
    transform = made(folder)[0].video_transform()
    again = pickle.loads(pickle.dumps(transform))
    assert isinstance(again, VideoTransform)
    first, second = transform(video(1)), again(video(1))
    assert first.spelling == second.spelling and first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "family",
    [f if f == "idefics3" else pytest.param(f, marks=pytest.mark.slow) for f in family_traits.TRAITS["video"].lacking],
)
def test_a_family_without_videos_reads_frames_as_images_only_when_told(tmp_path, family):
    folder = family_traits.write(tmp_path, family)
    backbone = ENTRY(Options(folder), None)
    assert backbone.modalities == ("image", "text") and backbone.video_transform() is None
    said = family_traits.lacking("video", family).said
    assert said in backbone.no_videos and "backbone.videos: images" in backbone.no_videos
    assert ENTRY(Options(folder, videos="images"), None).no_videos == ""


def test_values_of_images_have_another_key_where_frames_are_images(tmp_path):
    tiny_mllm.write(tmp_path, "qwen2_vl")
    prefixes = []
    for videos in ("videos", "images"):
        backbone = ENTRY(Options(str(tmp_path), videos=videos), None)
        prefixes.append(backbone.image_prefix(backbone.build(on_meta=True).requires_grad_(False)))
    assert prefixes[0].modules == prefixes[1].modules and prefixes[0].choice != prefixes[1].choice


def test_frames_that_are_read_as_images_stand_where_the_video_was_named():
    talk = Prompted("<video> or <video> ?", "a", (("user", "<image> what ?"), ("assistant", "b")))
    assert talk.with_frames([2, 1]).prompt == "<image>\n<image> or <image> ?"
    with pytest.raises(BadSample, match="after all"):
        Prompted("<video> <image>").with_frames([2])
    with pytest.raises(BadSample, match="for 2 <video>"):
        Prompted("<video>").with_frames([2, 2])


def test_a_tokenizer_without_the_token_of_videos_takes_none(tmp_path):
    folder = tiny_families.write(tmp_path, "qwen3_vl")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"video_token_id": 5000}))
    assert "no token for the features of a video" in ENTRY(Options(folder), None).no_videos


@pytest.mark.parametrize(
    "number, words",
    [
        (8, "eight"),
        (21, "twenty-one"),
        (90, "ninety"),
        (101, "one hundred and one"),
        (768, "seven hundred and sixty-eight"),
        (1024, "one thousand and twenty-four"),
        (1124, "one thousand, one hundred and twenty-four"),
    ],
)
def test_numbers_of_frames_are_written_in_words(number, words):
    assert in_words(number) == words


@pytest.mark.skipif(torchvision_functions.is_missing(), reason="compares with torchvision, which is not installed")
@pytest.mark.parametrize("mode", ["BILINEAR", "BICUBIC", "LANCZOS", "NEAREST_EXACT"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_functions_are_those_of_torchvision(mode, dtype):
    from torchvision.transforms.v2 import functional

    pixels = torch.randint(0, 256, (2, 3, 40, 31), generator=torch.Generator().manual_seed(0)).to(dtype)
    ours, theirs = torchvision_functions, functional
    for size in ((17, 50), (40, 31), (64, 9)):
        got = ours.resize(pixels, size, ours.InterpolationMode[mode])
        assert torch.equal(got, theirs.resize(pixels, size, theirs.InterpolationMode[mode]))
    assert torch.equal(ours.pad(pixels, [1, 2, 3, 4], 7), theirs.pad(pixels, [1, 2, 3, 4], 7))
    colour = [7, 8, 9]
    assert torch.equal(ours.pad(pixels, [1, 2, 3, 4], colour), theirs.pad(pixels, [1, 2, 3, 4], colour))
    assert torch.equal(ours.crop(pixels, 2, 3, 5, 6), theirs.crop(pixels, 2, 3, 5, 6))
    assert torch.equal(ours.grayscale_to_rgb(pixels[:, :1]), theirs.grayscale_to_rgb(pixels[:, :1]))
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.4]
    assert torch.equal(ours.normalize(pixels.float(), mean, std), theirs.normalize(pixels.float(), mean, std))
    assert torch.equal(ours.to_dtype(pixels, torch.float32, True), theirs.to_dtype(pixels, torch.float32, True))
