"""Options of the recipe's `data` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class SourceOptions:
    """One prepared data set and what is asked of it.

    Attributes:
        dir: directory that holds manifest.json; a local path or anything fsspec opens.
        split: which split of it.
        subset: JSON file that names the samples to use, written by data_prep/few_shot.py; a path, or one below `dir`.
            Empty: all of the split.
        task: `name` of a file in tasks/ and that task's options.
        weight: share of the steps of an epoch, relative to the other sources' weights times their sizes.
    """

    dir: str
    split: str = "train"
    subset: str = ""
    task: dict[str, Any] = field(default_factory=lambda: {"name": "vqa"})
    weight: float = 1.0


@dataclass
class DataOptions:
    """Stream of samples.

    Attributes:
        sources: what trains; one source (so one task) a step.
        validation: what is evaluated during training; selects `best` and early stopping.
        global_batch: slots of one optimizer step over all ranks and accumulation steps.
        workers: loader processes a rank; 0 decodes in the training process.
        shuffle_block: consecutive positions inside which samples are permuted; shards are permuted as well.
        evaluation_order: `stored` visits an evaluated split in the order of its shards, `shuffled` in a random one,
            the same in every run; `auto` is `shuffled` where the task or the method couples samples, so that a list
            sorted by class tells nothing.
        evaluation_seed: of that random order.
        last_batch: `pad` completes the last step of an epoch with weight-0 slots, `drop` leaves it out.
        max_bad_fraction: share of the samples read that may be bad before the run stops.
        max_bad_in_a_row: consecutive bad samples that stop the run.
        max_pixels: images with more are refused before decoding.
        decode: `full` decodes at full size, `scaled` lets libjpeg-turbo decode at a smaller scale (faster, PSNR
            about 41 dB).
        allow_pipe: accept `pipe:` URLs, which run shell commands.
        verify: `size` checks shard sizes at start, `sha256` also their hashes, `none` neither.
        prefetch: batches each worker prepares ahead.
        cache_dir: where remote shards are kept; empty reads ranges directly.
    """

    sources: list[SourceOptions] = field(default_factory=list)
    validation: list[SourceOptions] = field(default_factory=list)
    global_batch: int = 64
    workers: int = 2
    shuffle_block: int = 10_000
    evaluation_order: Literal["auto", "stored", "shuffled"] = "auto"
    evaluation_seed: int = 0
    last_batch: Literal["pad", "drop"] = "pad"
    max_bad_fraction: float = 0.001
    max_bad_in_a_row: int = 100
    max_pixels: int = 89_478_485
    decode: Literal["full", "scaled"] = "full"
    allow_pipe: bool = False
    verify: Literal["none", "size", "sha256"] = "sha256"
    prefetch: int = 4
    cache_dir: str = ""
