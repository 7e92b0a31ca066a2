#!/usr/bin/env bash
# datasets: load_dataset("webdataset") knows the fields of the first five samples; what later samples have besides is dropped.
#
# A good guess: every sample arrives with its own fields, or a shard whose samples differ is refused, as it is if the first five differ.
# What happens: the columns are those of the first five samples of the first shard. A picture that is a .png among .jpg, or a .json that
#   only some samples have, is left out without a word: the sample stays, its picture is None. Read from disk and streamed alike.
# Source: datasets.packaged_modules.webdataset.webdataset.WebDataset (NUM_EXAMPLES_FOR_FEATURES_INFERENCE).
# Who is hurt: shards of the web and of many data sets, where jpg, png and webp are mixed: captions are trained on without their pictures,
#   or a run ends at the first None, thousands of steps later.
. "$(dirname "$0")/_lib.sh"
pins datasets==5.2.0 webdataset==1.0.2 pillow==13.0.0

observe <<'PY'
import io
import datasets, webdataset
from PIL import Image

def picture(kind):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 30)).save(file, kind)
    return file.getvalue()

def shard(name, kinds):
    with webdataset.TarWriter(name) as writer:
        for i, kind in enumerate(kinds):
            ending = {"JPEG": "jpg", "PNG": "png"}[kind]
            writer.write({"__key__": f"{i:03d}", ending: picture(kind), "txt": "a red square"} | ({"json": {"source": "b"}} if i == 7 else {}))

shard("late.tar", ["JPEG"] * 6 + ["PNG"] + ["JPEG"])
shard("early.tar", ["JPEG", "PNG"] + ["JPEG"] * 6)
for streaming in (False, True):
    rows = list(datasets.load_dataset("webdataset", data_files={"train": "late.tar"}, split="train", streaming=streaming, cache_dir="cache"))
    print("streamed:" if streaming else "from disk:", len(rows), "samples, columns", sorted(rows[0]), "without a picture:",
          [row["__key__"] for row in rows if row["jpg"] is None])
    assert [row["__key__"] for row in rows if row["jpg"] is None] == ["006"] and rows[6]["txt"] and "json" not in rows[7]
try:
    datasets.load_dataset("webdataset", data_files={"train": "early.tar"}, split="train", streaming=True)
    early = "accepted"
except ValueError as error:
    early = type(error).__name__
print("the same difference among the first five:", early)
assert early == "ValueError"
PY
