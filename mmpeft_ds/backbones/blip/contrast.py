"""One training step of BLIP's retrieval form: contrast with all pairs and the queue, matching with hard negatives.

Source: Aurora, arXiv 2305.08381, released code; ALBEF, arXiv 2107.07651. All ranks together form one set of pairs,
unless `negatives: local` asks for the released behaviour, in which each rank forms a set of its own.
"""

# S slots, T pairs (texts and the images of their slots), L text length, k images of a slot, m image tokens of a slot
# d width, E shared width; M pairs and Z slots of the pool; K keys, Q of them in the queue

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mmpeft_ds.backbones.blip.model import ImageStates
from mmpeft_ds.distributed import collectives
from mmpeft_ds.distributed.gather import gather_rows, gather_sizes
from mmpeft_ds.host_copies import nonzero, on_host, to_device
from mmpeft_ds.ops import contrastive
from mmpeft_ds.ops.context_enhancement import context_enhancement
from mmpeft_ds.ops.frame_weighting import frame_weights
from mmpeft_ds.ops.precision import at_least_float32


@dataclass
class Encoded:
    """Result of one pass through both towers.

    Attributes:
        seen: image states of every slot.
        frames: (S, k, E) unit vectors of the single images.
        image, text: (S, E) and (T, E) unit vectors, at least float32.
        text_states: (T, L, d).
    """

    seen: ImageStates
    frames: Tensor
    image: Tensor
    text: Tensor
    text_states: Tensor


@dataclass
class Pairs:
    """The pairs of this rank.

    Attributes:
        ids: (T,) int64, not negative.
        slot: (T,) slot of each pair, which owns its images.
        keep: (T,) bool; the others are absent from all losses, negatives and the queue.
        input_ids, attention_mask: (T, L).
    """

    ids: Tensor
    slot: Tensor
    keep: Tensor
    input_ids: Tensor
    attention_mask: Tensor


@dataclass
class Pool:
    """The pairs that one loss compares: of all ranks in the same order, or of this one; only those that count.

    Attributes:
        rows: (T,) row of the pool of each pair of this rank; meaningless for those that do not count.
        ids, slot: (M,), slot in [0, Z).
        key_image, key_text: (M, E) keys of the contrast: the teacher's features, or the model's with gradient.
        image, text: (M, E), without gradient.
        input_ids, attention_mask: (M, L).
        seen, frames: images of Z slots, with gradient, and (Z, k, E), without.
        context: (M, 1, d) first states of the texts, with gradient.
    """

    rows: Tensor
    ids: Tensor
    slot: Tensor
    key_image: Tensor
    key_text: Tensor
    image: Tensor
    text: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    seen: ImageStates
    frames: Tensor
    context: Tensor


def train_step(
    model: Any,
    encoded: Encoded,
    taught: Encoded | None,
    pairs: Pairs,
    negatives: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Losses and states of `RetrievalOutput`; writes the pairs of all ranks into the queue. Collective.

    Args:
        model: a `Retriever`, with its options, queue, temperature and steps.
        taught: the same batch as the teacher encodes it; None without a teacher.
        negatives: (T,) image and (T,) text of each pair, as rows of the pool, in place of drawing them.
    """
    options = model.training_options
    temperature = model.temperature.to(encoded.text.dtype)
    temperature = contrastive.clamp_temperature(to_device(temperature, encoded.text.device))
    matching = options.negatives != "none"
    pool = make_pool(encoded, taught or encoded, pairs, options.negatives != "local", matching)
    model.queue.like(encoded.text)
    results = {"contrast_losses": _contrast(model, encoded, taught, pairs, pool, temperature)}
    _enqueue(model, taught or encoded, pairs, pool)
    if matching:
        results |= _match(model, encoded, pairs, pool, temperature, negatives)
    return results


def make_pool(encoded: Encoded, keys: Encoded, pairs: Pairs, everywhere: bool, matching: bool) -> Pool:
    """The pool of this step. Collective if `everywhere`.

    Args:
        keys: features that queries are compared with, the teacher's where there is one.
        everywhere: the pairs of all ranks form the pool.
        matching: gather also what the matching head needs.
    """
    seen = encoded.seen
    own_kept = int(on_host(pairs.keep).sum())
    mine = [own_kept, len(pairs.ids), *seen.tokens.shape[:2], pairs.input_ids.shape[1], encoded.frames.shape[1]]
    sizes = gather_sizes(mine, pairs.ids.device) if everywhere else [mine]
    kept_counts, counts, slots, tokens, lengths, frames = zip(*sizes, strict=True)
    rank = collectives.rank() if everywhere else 0

    def gathered(x: Tensor, counts: tuple[int, ...]) -> Tensor:
        return gather_rows(x, list(counts)) if everywhere else x

    def of_slots(x: Tensor) -> Tensor:
        return gathered(x, slots)

    kept = gathered(pairs.keep.to(torch.uint8), counts).bool()
    start = sum(counts[:rank])
    rows = (kept.cumsum(0) - 1)[start : start + len(pairs.ids)].clamp(min=0)
    total = sum(kept_counts)
    if not total:  # no pair counts on any rank; all are kept, so that every rank runs the same modules
        kept, total = torch.ones_like(kept), len(kept)
    places = nonzero(kept, total)[:, 0]

    def of_pairs(x: Tensor) -> Tensor:
        return gathered(x, counts)[places]

    if matching:
        room = max(tokens) - seen.tokens.shape[1]
        mask = pad(seen.mask.to(torch.uint8), (0, room))
        all_seen = ImageStates(
            of_slots(pad(seen.tokens, (0, 0, 0, room))), of_slots(mask).bool(), of_slots(seen.pooled)
        )
        all_frames = of_slots(pad(encoded.frames.detach(), (0, 0, 0, max(frames) - encoded.frames.shape[1])))
        ids, read = (of_pairs(pad(x, (0, max(lengths) - x.shape[1]))) for x in (pairs.input_ids, pairs.attention_mask))
        context = of_pairs(encoded.text_states[:, :1])
    else:
        all_seen, all_frames, context = seen, encoded.frames, encoded.text_states[:, :1]
        ids, read = pairs.input_ids, pairs.attention_mask
    return Pool(
        rows=rows,
        ids=of_pairs(pairs.ids),
        slot=of_pairs(pairs.slot + sum(slots[:rank])),
        key_image=of_pairs(keys.image[pairs.slot]),
        key_text=of_pairs(keys.text),
        image=of_pairs(encoded.image[pairs.slot].detach()),
        text=of_pairs(encoded.text.detach()),
        input_ids=ids,
        attention_mask=read,
        seen=all_seen,
        frames=all_frames,
        context=context,
    )


def _contrast(
    model: Any, encoded: Encoded, taught: Encoded | None, pairs: Pairs, pool: Pool, temperature: Tensor
) -> Tensor:
    """(T,) half the loss of the image among all texts and half that of the text among all images."""
    options, queue = model.training_options, model.queue
    alpha = 0.0 if taught is None else options.alpha
    if options.alpha_ramp:
        alpha *= min(1.0, model.steps / options.alpha_ramp)
    key_ids = torch.cat([pool.ids, queue.ids])

    def one_way(query: Tensor, teacher: Tensor | None, own: Tensor, held: Tensor) -> Tensor:
        keys = torch.cat([own.to(held.dtype), held.T])
        view = None
        if teacher is not None:
            with torch.no_grad():
                view = contrastive.similarities(teacher, keys, temperature, None)
        targets = contrastive.soft_targets(pairs.ids, key_ids, view, alpha, dtype=keys.dtype)
        return contrastive.soft_cross_entropy(contrastive.similarities(query, keys, temperature, None), targets)

    images = None if taught is None else taught.image[pairs.slot]
    texts = None if taught is None else taught.text
    to_text = one_way(encoded.image[pairs.slot], images, pool.key_text, queue.text)
    to_image = one_way(encoded.text, texts, pool.key_image, queue.image)
    return (to_text + to_image) / 2


@torch.no_grad()
def _enqueue(model: Any, keys: Encoded, pairs: Pairs, pool: Pool) -> None:
    """Push the pairs of all ranks that count, in rank order, also where each rank contrasts by itself."""
    if not len(model.queue):
        return
    sizes = gather_sizes([len(pairs.ids), int(on_host(pairs.keep).sum())], pairs.ids.device)
    counts = [n for n, _ in sizes]
    kept = nonzero(gather_rows(pairs.keep.to(torch.uint8), counts), sum(n for _, n in sizes))[:, 0]
    features = keys.image[pairs.slot].detach(), keys.text.detach(), pairs.ids
    image, text, ids = (gather_rows(x, counts)[kept] for x in features)
    model.queue.push(image, text, ids)


def _match(
    model: Any,
    encoded: Encoded,
    pairs: Pairs,
    pool: Pool,
    temperature: Tensor,
    negatives: tuple[Tensor, Tensor] | None,
) -> dict[str, Tensor]:
    """Losses and states of the matching head, for each pair, its text with a wrong image, and its image with a wrong
    text."""
    options = model.training_options
    own = encoded.seen.rows(pairs.slot)
    frames = encoded.frames[pairs.slot]
    image, text, possible = _negatives(model, encoded, pairs, pool, temperature.detach(), negatives)

    def weights(texts: Tensor, frames: Tensor) -> Tensor | None:
        if not options.frame_aware:
            return None
        return frame_weights(torch.einsum("te,tke->tk", texts.detach(), frames.detach()))

    positive = model.fuse(pairs.input_ids, pairs.attention_mask, own, weights(encoded.text, frames))
    wrong = pool.seen.rows(pool.slot[image])
    room, length = wrong.tokens.shape[1] - own.tokens.shape[1], pool.input_ids.shape[1] - pairs.input_ids.shape[1]
    seen = ImageStates(
        torch.cat([wrong.tokens, pad(own.tokens, (0, 0, 0, room))]),
        torch.cat([wrong.mask, pad(own.mask, (0, room))]),
        torch.cat([wrong.pooled, own.pooled]),
    )
    more = pool.frames.shape[1] - frames.shape[1]
    negative = model.fuse(
        torch.cat([pad(pairs.input_ids, (0, length)), pool.input_ids[text]]),
        torch.cat([pad(pairs.attention_mask, (0, length)), pool.attention_mask[text]]),
        seen,
        weights(
            torch.cat([encoded.text, pool.text[text]]),
            torch.cat([pool.frames[pool.slot[image]], pad(frames, (0, 0, 0, more))]),
        ),
    )
    heads = context_enhancement(positive[:, :1], negative[:, :1], pool.context, options.context_enhancement)
    inputs = torch.cat(heads)[:, 0]
    logits = model.itm_head(inputs)
    losses = contrastive.matching_loss(at_least_float32(logits), possible)
    return {
        "matching_losses": losses,
        "fused_positive": positive,
        "fused_negative": negative,
        "matching_inputs": inputs,
        "matching_logits": logits,
    }


@torch.no_grad()
def _negatives(
    model: Any,
    encoded: Encoded,
    pairs: Pairs,
    pool: Pool,
    temperature: Tensor,
    given: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(T,) wrong image and (T,) wrong text of each pair, as rows of the pool, and (2 T,) bool: there was one."""
    if given is not None:
        return *given, torch.ones(2 * len(pairs.ids), dtype=torch.bool, device=pairs.ids.device)
    # Random numbers for all pairs of the pool, so that a pair draws the same negatives whichever rank holds it.
    local = model.training_options.negatives == "local"
    generator = torch.Generator().manual_seed(model.steps * 65536 + (collectives.rank() if local else 0))
    uniform = to_device(torch.rand(2, len(pool.ids), dtype=torch.float64, generator=generator), pairs.ids.device)
    allowed = pairs.ids[:, None] != pool.ids
    drawn = []
    for query, candidates, numbers in (
        (encoded.text, pool.image, uniform[0]),
        (encoded.image[pairs.slot], pool.text, uniform[1]),
    ):
        weights = contrastive.negative_weights(query, candidates, pairs.ids, pool.ids, temperature)
        drawn.append(contrastive.draw(weights, allowed, numbers[pool.rows]))
    (image, some_image), (text, some_text) = drawn
    return image, text, torch.cat([some_image, some_text])
