#!/usr/bin/env bash
# datasets: a map that only looks at an image column stores every picture compressed anew, with loss.
#
# A good guess: image columns hold the file's bytes; a function that reads the picture and returns another column, or hands the
#   same image on, leaves them alone.
# What happens: the picture was decoded for the function, and the whole row is encoded again, as JPEG of quality 75: other
#   pixels than the file's, fewer bytes. Only a function that does not touch the column keeps the bytes.
# Source: datasets.features.image.Image.encode_example and image_to_bytes (PIL's default quality).
# Who is hurt: preparation that measures or filters pictures by map: features of what is kept differ from the originals', hashes
#   too, and each further map loses more.
. "$(dirname "$0")/_lib.sh"
pins datasets==5.2.0 pillow==13.0.0 numpy==2.4.6

observe <<'PY'
import io
import datasets
import numpy as np
from PIL import Image as Picture
from datasets import Dataset, Image

datasets.disable_progress_bars()
blocks = np.random.default_rng(0).integers(0, 255, (16, 16, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
file = io.BytesIO()
Picture.fromarray(blocks).save(file, "JPEG", quality=95)
data = Dataset.from_dict({"image": [{"bytes": file.getvalue(), "path": None}]}).cast_column("image", Image())
stored = lambda d: d.cast_column("image", Image(decode=False))[0]["image"]["bytes"]
pixels = lambda content: np.asarray(Picture.open(io.BytesIO(content))).astype(int)
original, seen = file.getvalue(), {}
for name, function in (("does not touch the image", lambda row: {"note": "x"}),
                       ("reads its width", lambda row: {"wide": row["image"].width > 100}),
                       ("returns it as it is", lambda row: {"image": row["image"]})):
    content = stored(data.map(function))
    moved = np.abs(pixels(content) - pixels(original))
    seen[name] = content == original
    print(f"a map that {name}: {len(content)} bytes of {len(original)}, equal {seen[name]}, pixels moved by {moved.mean():.2f} "
          f"on average, {moved.max()} at most")
assert list(seen.values()) == [True, False, False] and moved.mean() > 1
PY
