#!/usr/bin/env bash
# Pillow: resizing a picture with a palette takes the nearest pixel, whatever filter is asked for.
#
# A good guess: resize(size, BICUBIC) interpolates, or refuses a picture of numbers into a palette.
# What happens: for modes P and 1 the filter is replaced by NEAREST without a word. convert("RGB") before and after the resize
#   therefore give different pictures; a fine chessboard becomes one plain colour in one order and grey in the other.
# Source: PIL.Image.Image.resize (modes "1" and "P" set resample to NEAREST).
# Who is hurt: pipelines that resize first and convert last: GIF and palette PNG files, which are common among the
#   charts, screenshots and drawings that multimodal models are tuned on, are subsampled while JPEG files are filtered.
. "$(dirname "$0")/_lib.sh"
pins pillow==13.0.0 numpy==2.4.6

observe <<'PY'
import io
import numpy as np
from PIL import Image

chessboard = Image.fromarray(np.indices((64, 64)).sum(0).astype(np.uint8) % 2 * 255)
file = io.BytesIO()
chessboard.convert("RGB").quantize(2).save(file, "PNG")
picture = Image.open(file)
assert picture.mode == "P"
spread = {}
for filter_ in (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC, Image.Resampling.LANCZOS):
    late = np.asarray(picture.resize((32, 32), filter_).convert("L"))
    early = np.asarray(picture.convert("RGB").resize((32, 32), filter_).convert("L"))
    nearest = np.asarray(picture.resize((32, 32), Image.Resampling.NEAREST).convert("L"))
    print(f"{filter_.name}: resized, then converted: values {sorted(set(late.ravel().tolist()))} (equal to NEAREST: "
          f"{bool((late == nearest).all())}); converted, then resized: middle value {early[16, 16]}")
    assert (late == nearest).all() and 100 < early[16, 16] < 156
PY
