"""Emoji of three vendors and Tux Paint's stamps, from small folders that look like the packages."""

import io
import json
import subprocess

import pytest
from PIL import Image

from data_prep import prepare
from data_prep.few_shot import _records
from data_prep.sources.common.splits import by_hash, disjoint_captions, same_words
from mmpeft_ds.data.manifest import Manifest
from mmpeft_ds.errors import BadInput
from tests.helpers import ROOT
from tests.helpers.data.images import picture


def classes_of(size):
    """Code -> (subcategory, name) of two classes and a small one."""
    found = {f"1f4{i:02x}": ("animal-bird", f"BIRD {i}") for i in range(size)}
    found |= {f"1f5{i:02x}": ("food-fruit", f"FRUIT {i}") for i in range(size)}
    found |= {f"1f6{i:02x}": ("dishware", f"DISH {i}") for i in range(3)}
    # The same name as a bird's, in another class and so perhaps in another split.
    return found | {"1f5ff-fe0f": ("food-fruit", "BIRD 3")}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    root = tmp_path_factory.mktemp("emoji") / "node_modules"
    table, words = [], {}
    for code, (subcategory, name) in classes_of(20).items():
        table.append({"unified": code.upper(), "name": name, "category": "Nature", "subcategory": subcategory})
        table[-1] |= {"has_img_twitter": True, "has_img_google": code != "1f400"}
        emoji = "".join(chr(int(c, 16)) for c in code.split("-"))
        words[emoji] = [name.lower().replace(" ", "_"), "shared_word"]
    for vendor, folder in (("twitter", "img/twitter/64"), ("google", "img/google/64")):
        package = root / f"emoji-datasource-{vendor}"
        (package / folder).mkdir(parents=True)
        (package / "emoji.json").write_text(json.dumps(table))
        for code in classes_of(20):
            (package / folder / f"{code}.png").write_bytes(picture((len(vendor), 2, 3)))
    fluent = root / "@lobehub/fluent-emoji-3d"
    (fluent / "assets").mkdir(parents=True)
    for i, code in enumerate(classes_of(20)):
        if i != 5:
            (fluent / "assets" / f"{code.replace('-fe0f', '')}.webp").write_bytes(picture((i, 0, 0), "WEBP"))
    (root / "emojilib/dist").mkdir(parents=True)
    (root / "emojilib/dist/emoji-en-US.json").write_text(json.dumps(words))
    for package in ("@lobehub/fluent-emoji-3d", "emoji-datasource-twitter", "emoji-datasource-google", "emojilib"):
        (root / package / "package.json").write_text('{"version": "1.2.3"}')
    return root


def prepared(source, root, out, *more):
    arguments = ["--root", str(root), "--out", str(out), "--processes", "1", *more]
    prepare.main([source, *arguments])
    manifest = Manifest.load(out)
    return manifest, {split: [r for _, r in _records(manifest, split)] for split in manifest.splits}


def emoji(packages, out, vendor):
    return prepared("emoji", packages, out, "--vendor", vendor, "--categories", "Nature")


@pytest.fixture(scope="module")
def vendors(packages, tmp_path_factory):
    out = tmp_path_factory.mktemp("vendors")
    return {vendor: emoji(packages, out / vendor, vendor) for vendor in ("fluent", "twitter", "google")}


def assert_disjoint(records, field="captions"):
    seen = {}
    for split, of_split in records.items():
        for record in of_split:
            for text in record[field] if isinstance(record[field], list) else [record[field]]:
                assert seen.setdefault(same_words(text), split) == split
    assert set(seen.values()) == set(records)


def test_vendors_share_classes_splits_and_captions(vendors):
    splits = {}
    for vendor, (manifest, records) in vendors.items():
        assert manifest.labels == ["bird", "fruit"]  # `dishware` is too small
        assert manifest.licence.startswith("images ") and "emojilib" in manifest.licence
        for split, of_split in records.items():
            for r in of_split:
                assert splits.setdefault(r["emoji"], (split, r["captions"])) == (split, r["captions"])
                assert r["class_name"] == manifest.labels[r["label"]]
        counts = {split: len(of_split) for split, of_split in records.items()}
        assert sum(counts.values()) >= 36 and counts["train"] > counts["test"] > counts["val"] > 0, vendor
    fluent, twitter = ({r["emoji"] for part in vendors[v][1].values() for r in part} for v in ("fluent", "twitter"))
    assert twitter - fluent == {"1f405"} and not fluent - twitter
    assert "1f400" not in twitter  # Google does not draw it


def test_emoji_and_captions_of_the_splits_are_disjoint_within_and_across_vendors(vendors):
    merged = {s: [r for _, records in vendors.values() for r in records[s]] for s in ("train", "val", "test")}
    assert_disjoint(merged)
    assert_disjoint(merged, "emoji")


def test_the_check_of_disjointness_fails_where_a_caption_is_shared():
    with pytest.raises(AssertionError):
        assert_disjoint({"train": [{"captions": ["a  Bird"]}], "test": [{"captions": ["A bird"]}]})


def test_captions_are_the_official_name_the_everyday_one_and_keywords(vendors):
    records = [r for part in vendors["twitter"][1].values() for r in part if r["emoji"] == "1f502"]
    assert records[0]["captions"] == ["fruit 2", "fruit 2, shared word"]


def test_the_shards_hold_the_packages_own_images_and_fingerprint_their_versions(packages, vendors):
    manifest, _ = vendors["twitter"]
    assert manifest.source["fingerprint"]["emojilib"] == "1.2.3"
    import tarfile

    with tarfile.open(manifest.path(manifest.shards("train")[0].file)) as shard:
        name = next(m for m in shard.getmembers() if m.name.endswith(".png"))
        assert shard.extractfile(name).read() == picture((7, 2, 3))


def test_what_is_missing_is_said_in_one_line(packages, tmp_path):
    for more, words in (
        (["--root", str(tmp_path)], "make few-shot-data"),
        (["--root", str(packages), "--categories", "Objects"], "Nature"),
        (["--root", str(packages), "--test-fraction", "1"], "--test-fraction"),
    ):
        with pytest.raises(BadInput, match=words) as caught:
            prepare.main(["emoji", "--out", str(tmp_path / "out"), *more])
        assert "\n" not in str(caught.value)
    with pytest.raises(BadInput, match="tuxpaint-stamps-default"):
        prepare.main(["stamps", "--out", str(tmp_path / "out"), "--root", str(tmp_path / "none")])


@pytest.fixture(scope="module")
def stamps(tmp_path_factory):
    """Two classes of 20 images; wide, with transparency, copies, a symbol, and the same caption in both classes."""
    root = tmp_path_factory.mktemp("stamps") / "stamps"
    for folder in ("animals/birds", "animals/cartoon", "food", "symbols", "few"):
        (root / folder).mkdir(parents=True)
        for i in range(10 if folder.startswith("animals") else 20 if folder == "food" else 4):
            image = Image.new("RGBA", (40, 10), (255, 0, 0, 0))
            image.paste((0, i, 200, 255), (0, 0, 20, 10))
            image.save(root / folder / f"{i:02d}.png")
            caption = "The same words." if i == 0 else f"Number {i // 2} of {folder}."
            (root / folder / f"{i:02d}.txt").write_text(f"{caption}\nde.utf8=Anders.\n", "utf-8")
        image.save(root / folder / "00_mirror.png")
        (root / folder / "00_mirror.txt").write_text("A copy.")
    (root / "food" / "silent.png").write_bytes(picture((1, 2, 3)))
    return root


def test_stamps_have_the_folder_as_class_and_the_first_line_as_caption(stamps, tmp_path):
    manifest, records = prepared("stamps", stamps, tmp_path / "o")
    everything = [r for part in records.values() for r in part]
    assert manifest.labels == ["animals", "food"] and manifest.licence.startswith("GPL-2")
    names = {r["source_name"] for r in everything}
    assert not any("mirror" in n or "symbols" in n or "silent" in n or "few" in n for n in names)
    assert 38 <= len(names) <= 40
    assert all(r["captions"][0].endswith(".") and "Anders" not in r["captions"][0] for r in everything)
    assert_disjoint(records)
    assert {r["style"] for r in everything if "cartoon" in r["source_name"]} == {"drawing"}
    assert manifest.account["train"]["aside"] == {"no text beside the picture": [1, ["food/silent.png"]]}
    assert not any("aside" in manifest.account.get(split, {}) for split in ("val", "test"))


def test_stamps_are_squares_on_white(stamps, tmp_path):
    from data_prep.sources.stamps import squared

    image = Image.open(io.BytesIO(squared(stamps / "food" / "03.png", 256)))
    assert image.size == (40, 40) and image.mode == "RGB"
    assert image.getpixel((5, 20)) == (0, 3, 200)
    assert image.getpixel((30, 20)) == image.getpixel((5, 2)) == (255, 255, 255)
    assert Image.open(io.BytesIO(squared(stamps / "food" / "03.png", 8))).size == (8, 8)


def test_drawings_and_photographs_part_the_stamps_with_the_same_classes_and_splits(stamps, tmp_path):
    parts = {s: prepared("stamps", stamps, tmp_path / s, "--style", s) for s in ("all", "photo", "drawing")}
    assert parts["photo"][0].labels == parts["drawing"][0].labels == parts["all"][0].labels

    def names(style, split):
        return {r["source_name"] for r in parts[style][1].get(split, [])}

    for split in ("train", "val", "test"):
        assert names("photo", split) | names("drawing", split) == names("all", split)
        assert not names("photo", split) & names("drawing", split)


def test_a_members_split_does_not_depend_on_other_groups_and_shares_are_kept():
    names = [f"member {i}" for i in range(100)]
    split = by_hash({"a": names}, 0.1, 0.3)
    assert {s: list(split.values()).count(s) for s in set(split.values())} == {"train": 60, "val": 10, "test": 30}
    assert by_hash({"b": ["x", "y"], "a": names}, 0.1, 0.3).items() >= split.items()


def test_captions_stay_with_the_later_split():
    captions = {1: ["A cat", "a dog"], 2: ["a  CAT"], 3: ["a dog", "an eel"]}
    split = {1: "train", 2: "val", 3: "test"}
    assert disjoint_captions(captions, split) == {1: [], 2: ["a  CAT"], 3: ["a dog", "an eel"]}


def test_make_offers_the_data():
    shown = subprocess.run(["make", "-n", "few-shot-data"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0 and "--ignore-scripts" in shown.stdout and "dpkg-deb" in shown.stdout
