#!/usr/bin/env bash
# PyAV: the stream of an MKV or WebM file says 0 frames and has no duration.
#
# A good guess: stream.frames is the number of frames, and stream.duration the length, for every file that decodes.
# What happens: MP4, AVI and GIF say both; MKV, WebM and MPEG-TS say 0 frames, the first two besides duration None. The number is
#   known after decoding only; the length stands at the container (container.duration, in microseconds).
# Source: av.stream.Stream.frames and duration, from FFmpeg's AVStream.nb_frames, which is 0 where the format does not store it.
# Who is hurt: even sampling of k frames by stream.frames: no frame, a division by zero, or "empty video" for data sets that
#   are WebM (Something-Something, Kinetics mirrors).
. "$(dirname "$0")/_lib.sh"
pins av==18.1.0 numpy==2.4.6

observe <<'PY'
import av, numpy as np

seen = {}
for name, codec in (("a.mp4", "mpeg4"), ("a.avi", "mpeg4"), ("a.mkv", "mpeg4"), ("a.webm", "libvpx")):
    with av.open(name, "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(50):
            picture = np.full((48, 64, 3), index * 5, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    with av.open(name) as container:
        stream = container.streams.video[0]
        seen[name] = (stream.frames, stream.duration is None, round(container.duration / 1e6, 1))
        decoded = sum(1 for _ in container.decode(stream))
    print(f"{name}: stream.frames {seen[name][0]}, stream.duration is None {seen[name][1]}, container.duration {seen[name][2]} s, "
          f"decoded {decoded} frames")
    assert decoded == 50
assert {name: facts[:2] for name, facts in seen.items()} == {
    "a.mp4": (50, False), "a.avi": (50, False), "a.mkv": (0, True), "a.webm": (0, True)}
PY
