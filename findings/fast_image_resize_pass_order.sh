#!/usr/bin/env bash
# cykooz-resizer (fast_image_resize) scales columns first and Pillow rows first: with the same filter every fifth value differs.
#
# A good guess: `catmull_rom` and `bilinear` of fast_image_resize are Pillow's BICUBIC and BILINEAR in fixed point with vector
#   instructions, ten times as fast, so pixels agree but for rare rounding, as those of torch's antialiased uint8 kernel do.
# What happens: both round to 8 bits between their two passes, and the passes come in the other order, so about a fifth of the
#   values differ (55 dB where torch has above 70). Two calls, the width first and then the height, agree with Pillow as torch does.
# Source: Resizer.resize_pil of cykooz-resizer 4.0.1, which wraps the Rust crate fast_image_resize; Pillow 13.0 Resample.c.
# Who is hurt: whoever swaps Pillow for it in the transform of a pretrained tower and compares features or scores.
. "$(dirname "$0")/_lib.sh"
pins cykooz-resizer==4.0.1 pillow==13.0.0 numpy==2.4.6 torch==2.13.0

observe <<'PY'
import cykooz_resizer as fast
import numpy as np
import torch
from PIL import Image

draw = np.random.default_rng(0)
waves = Image.fromarray(draw.integers(0, 256, (30, 40, 3), dtype=np.uint8)).resize((640, 480), Image.BICUBIC)
photo = Image.fromarray((np.asarray(waves) + draw.normal(0, 14, (480, 640, 3))).clip(0, 255).astype(np.uint8))
size = width, height = 298, 224
resizer = fast.Resizer()

def by_fast(image, size, kernel):
    made = Image.new("RGB", size)
    resizer.resize_pil(image, made, fast.ResizeOptions(fast.ResizeAlg.convolution(kernel), use_alpha=False))
    return made

def by_torch(image, mode):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(pixels, size=(height, width), mode=mode, antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()

def psnr(one, other):
    error = ((np.asarray(one, float) - np.asarray(other, float)) ** 2).mean()
    return 10 * np.log10(255**2 / error) if error else float("inf")

for mode, pillow, kernel in (
    ("bicubic", Image.BICUBIC, fast.FilterType.catmull_rom), ("bilinear", Image.BILINEAR, fast.FilterType.bilinear)
):
    wanted = photo.resize(size, pillow)
    once = by_fast(photo, size, kernel)
    twice = by_fast(by_fast(photo, (width, 480), kernel), size, kernel)
    columns_first = photo.resize((640, height), pillow).resize(size, pillow)
    differ = (np.asarray(once) != np.asarray(wanted)).mean()
    print(
        f"{mode}: PSNR to Pillow: one call {psnr(once, wanted):.1f} dB ({differ:.0%} of the values differ), two calls "
        f"{psnr(twice, wanted):.1f} dB, torch {psnr(by_torch(photo, mode), wanted):.1f} dB; one call to Pillow with its "
        f"columns first {psnr(once, columns_first):.1f} dB"
    )
    assert psnr(once, wanted) < 58 and differ > 0.1
    assert min(psnr(twice, wanted), psnr(by_torch(photo, mode), wanted), psnr(once, columns_first)) > 70
PY
