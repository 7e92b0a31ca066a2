#!/usr/bin/env bash
# datasets, mosaicml-streaming, litdata: a picture that was changed in place is stored as the file that it was opened from.
#
# A good guess: a PIL picture given to a data set is stored as it is; boxes drawn on it, a face pasted over and a thumbnail
#   made of it are there.
# What happens: a picture opened from a file keeps its class and its `filename` through every change in place (paste, ImageDraw,
#   thumbnail, exif_transpose(in_place=True)), and the writers take the file's bytes: the changes are gone without a word,
#   also in Dataset.map over a column of paths. datasets does so for every format, the "jpeg" columns of the two others for JPEG. What
#   makes a new picture (resize, convert, copy) is stored as it is.
# Source: datasets.features.image.encode_pil_image, streaming.base.format.mds.encodings.JPEG.encode,
#   litdata.streaming.serializers.JPEGSerializer.serialize: each looks at `filename` only.
# Who is hurt: prompts by marks drawn into the picture, blackened faces and number plates, pictures shrunk before they are stored.
. "$(dirname "$0")/_lib.sh"
no_deps litdata==0.2.76 mosaicml-streaming==0.13.0
pins torch==2.13.0 datasets==5.2.0 pillow==13.0.0 lightning-utilities==0.15.3 boto3==1.44.8 obstore==0.12.1 tifffile==2026.3.3 \
    requests==2.34.2

observe <<'PY'
import importlib.util, io, pathlib
import datasets
from importlib.metadata import files
from litdata.streaming.serializers import _SERIALIZERS
from PIL import Image, ImageDraw

# One module of mosaicml-streaming, loaded alone: the whole package asks for a dozen others.
path = next(file.locate() for file in files("mosaicml-streaming") if str(file).endswith("base/format/mds/encodings.py"))
spec = importlib.util.spec_from_file_location("mds_encodings", path)
mds = importlib.util.module_from_spec(spec)
spec.loader.exec_module(mds)

datasets.disable_progress_bars()
for ending in ("jpg", "png"):
    Image.new("RGB", (320, 240), "white").save(f"photo.{ending}")

def draw(picture):
    ImageDraw.Draw(picture).rectangle((0, 0, 160, 120), fill="black")

def cover(picture):
    picture.paste("black", (0, 0, 160, 120))

def shrink(picture):
    picture.thumbnail((64, 48))

def look(picture):
    return picture.size, "black" if picture.convert("RGB").getpixel((5, 5))[0] < 50 else "white"

def in_map(ending, change):
    def each(row):
        change(row["image"])
        return row
    return datasets.Dataset.from_dict({"image": [f"photo.{ending}"]}).cast_column("image", datasets.Image()).map(each)[0]["image"]

def by_litdata(picture):
    name, writer = next((name, writer) for name, writer in _SERIALIZERS.items() if writer.can_serialize(picture))
    data = writer.serialize(picture)[0]
    return Image.open(io.BytesIO(data)) if name == "jpeg" else writer.deserialize(data)

def by_mds(picture):
    kind = mds.JPEG() if picture.format == "JPEG" else mds.PNG()
    return kind.decode(kind.encode(picture))

for ending in ("jpg", "png"):
    for change in (draw, cover, shrink):
        picture = Image.open(f"photo.{ending}")
        before = look(picture)
        change(picture)
        stored = {"Dataset.from_dict": look(datasets.Dataset.from_dict({"image": [picture]})[0]["image"]),
                  "Dataset.map": look(in_map(ending, change)), "mosaicml-streaming": look(by_mds(picture)),
                  "litdata": look(by_litdata(picture)), "a copy in Dataset.from_dict":
                  look(datasets.Dataset.from_dict({"image": [picture.copy()]})[0]["image"])}
        lost = [where for where, what in stored.items() if what == before]
        print(f"photo.{ending} after {change.__name__}: {look(picture)}; the old picture is what was stored by {', '.join(lost)}")
        assert look(picture) != before and all(what in (before, look(picture)) for what in stored.values())
        assert lost == ["Dataset.from_dict", "Dataset.map"] + (["mosaicml-streaming", "litdata"] if ending == "jpg" else [])
PY
