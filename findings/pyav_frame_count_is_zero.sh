#!/usr/bin/env bash
# PyAV: whether a video says how many frames it has, and how long its stream is, depends on the container.
#
# A good guess: container.streams.video[0].frames is the number of frames, so linspace(0, frames - 1, n) spreads n frames over the video.
# What happens: MP4 and AVI say it; Matroska, WebM and MPEG-TS say 0, and in Matroska and WebM the stream's duration is None, while the
#   container's duration is right in all of them. With 0 frames every index of that linspace is negative or 0: n times one frame.
# Source: av.video.stream.VideoStream.frames (AVStream.nb_frames, 0 where the container does not store it), av.stream.Stream.duration.
# Who is hurt: frame sampling for video and language models that was tried on MP4 only; MSR-VTT and DiDeMo mirrors and web videos come
#   as WebM and MKV too.
. "$(dirname "$0")/_lib.sh"
pins av==18.1.0 numpy==2.4.6

observe <<'PY'
import av
import numpy as np

seen = {}
for ending, form in (("mp4", "mp4"), ("avi", "avi"), ("mkv", "matroska"), ("webm", "webm"), ("ts", "mpegts")):
    name = f"forty.{ending}"
    with av.open(name, "w", format=form) as out:
        stream = out.add_stream("libvpx" if ending == "webm" else "mpeg4", rate=25)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for number in range(40):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 6 * number, np.uint8), format="rgb24")
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    with av.open(name) as video:
        stream = video.streams.video[0]
        decoded = sum(1 for _ in video.decode(stream))
        seen[ending] = stream.frames, stream.duration is None, decoded, video.duration / av.time_base
        print(f"{ending}: frames {stream.frames}, stream.duration {stream.duration}, container {seen[ending][3]} s, decoded {decoded}")
for ending, (frames, unknown, decoded, seconds) in seen.items():
    assert decoded == 40 and seconds == 1.6
    assert frames == (40 if ending in ("mp4", "avi") else 0) and unknown == (ending in ("mkv", "webm")), seen
PY
