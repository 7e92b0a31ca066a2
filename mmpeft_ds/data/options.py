"""Options of the recipe's `data` section."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class SourceOptions:
    """One prepared data set and its task.

    Attributes:
        dir: directory with manifest.json; a local path or a URL that fsspec opens.
        split: of the data set.
        subset: JSON file that names the samples to use, written by data_prep/few_shot.py; a path, or one below `dir`.
            Empty: all of the split.
        task: `name` of an entry in tasks/, and its options.
        weight: a source's share of the steps is in proportion to its weight times its size.
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
        sources: data sets for training; each step takes one source, so one task.
        validation: data sets that are evaluated during training; the first decides on `best` and early stopping.
        global_batch: slots of one optimizer step over all ranks and accumulation steps.
        seed: of the order of the samples and of their augmentation; null: the recipe's `seed`, which is that of
            initialisation and dropout besides.
        workers: loader processes per rank; 0 decodes in the training process, in as many threads as it has
            (`engine.threads`).
        worker_threads: in which each loader process decodes.
        pack: tokens of a micro-batch, 0 = off. Texts then follow one another in one row without padding, each
            read by itself; each step takes as many micro-steps as its tokens need, and ranks get about the same
            number. A sample of more tokens has a micro-batch to itself. For language models; `optim.accumulation`
            stays 1.
        shuffle_block: number of consecutive positions within which samples are permuted; shards are permuted as well.
        evaluation_order: `stored` visits an evaluated split in the order of its shards, `shuffled` in a random one,
            the same in every run; `auto` is `shuffled` where the task or the method couples samples, so that a split
            sorted by class gives no class away.
        evaluation_seed: of that random order.
        evaluation_batch: samples that a rank evaluates at a time, at most `global_batch`. Each of these batches holds
            the same samples for any number of ranks, so rounding, and with it every prediction, is the same. Where the
            task or the method couples samples, and for heads on stored features, `global_batch` counts instead.
        last_batch: `pad` completes the last step of an epoch with weight-0 slots, `drop` leaves it out.
        max_bad_fraction: share of the samples that may be bad before the run stops.
        max_bad_in_a_row: consecutive bad samples that stop the run.
        max_pixels: images with more are refused before decoding.
        max_sample_bytes: a sample that takes more, as it is stored or as transformed images, is bad; it bounds the
            memory of a loader process.
        decode: `full` decodes at full size, `scaled` lets libjpeg-turbo decode at a smaller scale (faster, PSNR
            about 41 dB).
        pixels: `shown` reads pictures as a viewer shows them: EXIF orientation applied, transparency on white, 16 bits
            scaled to 8; `published` as published code does, by Pillow's conversion to RGB alone: not turned, alpha
            dropped, 16 bits cut off at 255.
        allow_pipe: accept `pipe:` URLs, which run shell commands.
        verify: `size` checks shard sizes at start, `sha256` also their hashes, `none` neither.
        prefetch: batches that each worker prepares ahead.
        cache_dir: directory for copies of remote shards; empty: byte ranges are read directly.
    """

    sources: list[SourceOptions] = field(default_factory=list)
    validation: list[SourceOptions] = field(default_factory=list)
    global_batch: int = 64
    seed: int | None = None
    workers: int = 2
    worker_threads: int = 1
    pack: int = 0
    shuffle_block: int = 10_000
    evaluation_order: Literal["auto", "stored", "shuffled"] = "auto"
    evaluation_seed: int = 0
    evaluation_batch: int = 16
    last_batch: Literal["pad", "drop"] = "pad"
    max_bad_fraction: float = 0.001
    max_bad_in_a_row: int = 100
    max_pixels: int = 89_478_485
    max_sample_bytes: int = 2**30
    decode: Literal["full", "scaled"] = "full"
    pixels: Literal["shown", "published"] = "shown"
    allow_pipe: bool = False
    verify: Literal["none", "size", "sha256"] = "sha256"
    prefetch: int = 4
    cache_dir: str = ""
