#!/usr/bin/env bash
# transformers, Qwen2-VL: size=... given to from_pretrained is ignored where the checkpoint's file holds max_pixels.
#
# A good guess: an argument of from_pretrained wins over the file; `size` is what the current class documents and saves.
# What happens: published files hold min_pixels and max_pixels, which are written over `size` after the argument was
#   applied: a picture asked down to 16 x 16 patches keeps 72 x 72, twenty times the tokens. max_pixels=..., and size=... in
#   the call, both work. The dict given as `size` is overwritten too, so that using it again passes the file's number on.
# Source: transformers.models.qwen2_vl.image_processing_pil_qwen2_vl.Qwen2VLImageProcessorPil.__init__.
# Who is hurt: whoever bounds memory and sequence length by the documented option: it is ignored without a word.
. "$(dirname "$0")/_lib.sh"
pins torch==2.13.0 transformers==5.23.0 peft==0.21.2 tokenizers==0.23.3 pillow==13.0.0

observe <<'PY'
import json, pathlib
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Processor

picture = Image.new("RGB", (1000, 1000))
Processor().save_pretrained("new")
published = json.loads(pathlib.Path("new/preprocessor_config.json").read_text())
del published["size"]
published.update(min_pixels=56 * 56, max_pixels=14 * 14 * 4 * 16384)
pathlib.Path("published").mkdir()
pathlib.Path("published/preprocessor_config.json").write_text(json.dumps(published))
asked = {"shortest_edge": 3136, "longest_edge": 16 * 16 * 196}
given = dict(asked)
grid = lambda processor, **call: processor(picture, **call)["image_grid_thw"].tolist()[0]
seen = {"file with size, from_pretrained(size=...)": grid(Processor.from_pretrained("new", size=dict(asked))),
        "file with max_pixels, from_pretrained(size=...)": grid(Processor.from_pretrained("published", size=given)),
        "file with max_pixels, from_pretrained(max_pixels=...)": grid(Processor.from_pretrained("published", max_pixels=50176)),
        "file with max_pixels, processor(image, size=...)": grid(Processor.from_pretrained("published"), size=dict(asked))}
for case, shape in seen.items():
    print(f"{case}: patches (frames, rows, columns) {shape}")
print("the dict given to from_pretrained, afterwards:", given)
assert given["longest_edge"] == published["max_pixels"]
assert list(seen.values()) == [[1, 16, 16], [1, 72, 72], [1, 16, 16], [1, 16, 16]]
PY
