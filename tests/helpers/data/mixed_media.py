"""Conversations about no picture, pictures, videos, or both, drawn at random."""

from __future__ import annotations

import random

from mmpeft_ds.data.writer import RawSample
from tests.helpers.data.images import encoded

KINDS = ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2), (1, 1))  # pictures and videos of a sample


def sample(i: int, draw: random.Random) -> RawSample:
    pictures, videos = draw.choice(KINDS)
    frames = draw.choice([2, 4])
    record = {"videos": [{"times": [0.5 * n for n in range(frames)]} for _ in range(videos)]} if videos else {}
    marks = ["<image>\n"] * pictures + ["<video>\n"] * videos
    draw.shuffle(marks)
    record["conversations"] = [
        {"from": "human", "value": "".join(marks) + "what is it ?"},
        {"from": "gpt", "value": " ".join(draw.choices(["red", "blue", "a", "yes", "no"], k=draw.choice([1, 6])))},
    ]
    return RawSample(f"s{i}", [("jpg", encoded(i + n)) for n in range(pictures + videos * frames)], record)
