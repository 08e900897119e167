"""Trajectories and advantages -> micro-batches within a token budget, equally many on every rank.

The driver makes one ``Plan`` per rollout batch from scalars alone and sends it to all ranks; each rank looks up its
rows' tokens and collates them. Dimension suffixes: ``_T`` tokens of one sample, ``N`` loss tokens of a micro-batch,
``B``, ``L`` rows and columns of its token matrix. A *loss token* is one the loss reads: a target of the forward pass.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from stepgrpo.types import BoolArray, FloatArray, GradedGroup, IntArray, Trajectory

LongArray = NDArray[np.int64]
Row = tuple[int, int]
"""A trajectory's address: (draw, index in its group)."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sequence to train on.

    >>> s = pair_sample([1, 20], [5, 2])
    >>> s.token_ids.tolist(), s.loss_mask.tolist()
    ([1, 20, 5, 2], [False, False, True, True])
    """

    token_ids: IntArray
    """[T]"""
    loss_mask: BoolArray
    """[T] True where the loss reads the token."""
    forced: BoolArray
    """[T] True where a loss token was not sampled: it has no behaviour log-probability."""
    behaviour: FloatArray
    """[T] log-probabilities at sampling; 0 where not sampled."""
    versions: IntArray
    """[T] version of the weights that sampled the token; -1 outside the response."""
    advantage: float
    """Of the whole sequence; in supervised training its weight."""

    def __post_init__(self) -> None:
        lengths = {len(a) for a in (self.token_ids, self.loss_mask, self.forced, self.behaviour, self.versions)}
        assert len(lengths) == 1, "token arrays differ in length"
        assert not self.loss_mask[0], "nothing predicts the first token"
        assert not (self.forced & ~self.loss_mask).any(), "a forced token outside the loss"


def sample_of(trajectory: Trajectory, advantage: float, train_exit_tokens: bool) -> Sample:
    """A trajectory as the learner reads it."""
    mask = trajectory.loss_mask(train_exit_tokens)
    return Sample(
        token_ids=trajectory.token_ids,
        loss_mask=mask,
        forced=mask & ~trajectory.sampled,
        behaviour=trajectory.logprobs,
        versions=trajectory.versions(),
        advantage=float(advantage),
    )


def pair_sample(prompt_ids: Sequence[int] | IntArray, response_ids: Sequence[int] | IntArray) -> Sample:
    """A (prompt, response) pair for supervised training: the loss reads the whole response."""
    token_ids = np.concatenate([prompt_ids, response_ids]).astype(np.int32)
    mask = np.arange(len(token_ids)) >= len(prompt_ids)
    return Sample(
        token_ids=token_ids,
        loss_mask=mask,
        forced=mask,
        behaviour=np.zeros(len(token_ids), np.float32),
        versions=np.full(len(token_ids), -1, np.int32),
        advantage=1.0,
    )


def partition(lengths: Sequence[int], *, num_ranks: int, budget_tokens: int, packed: bool) -> list[list[list[int]]]:
    """Deal sequences to ranks and micro-batches: [rank][micro-batch] -> indices into ``lengths``.

    Every rank gets the same number of micro-batches, as few as first-fit decreasing manages, some of them possibly
    empty; the k-th micro-batches of all ranks cost about the same, because ranks wait for each other in each. Among
    the ways to fill them, the one with the smallest largest micro-batch is taken (Coffman, Garey & Johnson's MULTIFIT,
    1978), so that none is left nearly empty. A micro-batch costs its tokens if ``packed``, else rows x longest row.

    Raises:
        ValueError: a sequence is longer than ``budget_tokens``.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    longest = lengths[order[0]] if order else 0
    if longest > budget_tokens:
        raise ValueError(
            f"learner.micro_batch_tokens: got {budget_tokens}, "
            f"takes at least the longest sequence ({longest} tokens): raise it"
        )
    fewest = len(_first_fit(order, lengths, budget_tokens, packed))
    num_micro_batches = max(1, -(-fewest // num_ranks))

    def fits(capacity: int) -> bool:
        return len(_first_fit(order, lengths, capacity, packed)) <= num_micro_batches * num_ranks

    capacities = range(longest, budget_tokens)
    capacity = longest + bisect_left(capacities, True, key=fits)
    bins = _first_fit(order, lengths, capacity, packed)

    bins.sort(key=lambda b: -b.cost)
    plan: list[list[list[int]]] = [[] for _ in range(num_ranks)]
    load = [0] * num_ranks
    for k in range(num_micro_batches):
        turn = bins[k * num_ranks : (k + 1) * num_ranks]
        # The largest of this turn goes to the rank with the least so far.
        for place, rank in enumerate(sorted(range(num_ranks), key=lambda r: load[r])):
            plan[rank].append(turn[place].items if place < len(turn) else [])
            load[rank] += turn[place].cost if place < len(turn) else 0
    return plan


@dataclass(slots=True)
class _Bin:
    items: list[int]
    cost: int


def _first_fit(order: Sequence[int], lengths: Sequence[int], capacity: int, packed: bool) -> list[_Bin]:
    """Fill bins in the given (decreasing) order; unpacked bins come out as runs of neighbouring lengths."""
    bins: list[_Bin] = []
    if not packed:
        at = 0
        while at < len(order):
            longest = lengths[order[at]]
            items = [*order[at : at + capacity // longest]]
            bins.append(_Bin(items, len(items) * longest))
            at += len(items)
        return bins
    first = _FirstWithRoom(len(order), capacity)
    for i in order:
        place = first.take(lengths[i])
        if place == len(bins):
            bins.append(_Bin([], 0))
        bins[place].items.append(i)
        bins[place].cost += lengths[i]
    return bins


class _FirstWithRoom:
    """The first of many bins that has room, in logarithmic time: the driver plans for thousands of trajectories.

    A binary tree: a node has the most room of the bins below it; node k's children are 2k and 2k + 1.
    """

    def __init__(self, num_bins: int, capacity: int) -> None:
        self._num_leaves = 1 << max(0, num_bins - 1).bit_length()
        self._room = [capacity] * (2 * self._num_leaves)

    def take(self, amount: int) -> int:
        """Take ``amount`` of the room of the first bin that has it; returns which one."""
        room, node = self._room, 1
        while node < self._num_leaves:
            node *= 2
            if room[node] < amount:
                node += 1
        place = node - self._num_leaves
        room[node] -= amount
        while node := node // 2:
            room[node] = max(room[2 * node], room[2 * node + 1])
        return place


@dataclass(frozen=True, slots=True)
class Update:
    """What one optimizer update trains on."""

    num_loss_tokens: int
    """Of all ranks: the denominator of the token mean."""
    micro_batches: tuple[tuple[tuple[Row, ...], ...], ...]
    """[rank][micro-batch] -> rows; an empty tuple where a rank has nothing to do."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the learner does with one rollout batch; the same object goes to every rank."""

    version: int
    """The learner's weights before the first update."""
    updates: tuple[Update, ...]
    advantages: dict[int, FloatArray]
    """draw -> [G]"""

    def draws(self, rank: int) -> set[int]:
        """Groups of which the rank trains on a trajectory."""
        return {draw for u in self.updates for rows in u.micro_batches[rank] for draw, _ in rows}


def make_plan(
    groups: Sequence[GradedGroup],
    advantages: Sequence[NDArray[np.floating]],
    *,
    version: int,
    num_updates: int,
    num_ranks: int,
    budget_tokens: int,
    packed: bool,
) -> Plan:
    """Cut a rollout batch into updates of nearly equal group counts, in draw order, and those into micro-batches.

    Trajectories are dealt singly, whatever their group: rewards are known by now. A batch of fewer groups than
    ``num_updates`` gets fewer updates.

    Args:
        groups: the batch, in any order.
        advantages: [G] for each of ``groups``, in the same order.
        version: the learner's weights before the first update.

    Raises:
        ValueError: a trajectory is longer than ``budget_tokens``.
    """
    assert len({g.draw for g in groups}) == len(groups), "a draw twice in a batch"
    assert all(len(g.facts) == len(a) for g, a in zip(groups, advantages, strict=True))
    ordered = sorted(groups, key=lambda g: g.draw)
    updates = []
    num_updates = min(num_updates, len(ordered))
    for u in range(num_updates):
        part = ordered[u * len(ordered) // num_updates : (u + 1) * len(ordered) // num_updates]
        rows = [(g.draw, i) for g in part for i in range(len(g.facts))]
        facts = [f for g in part for f in g.facts]
        shares = partition(
            [f.total_len for f in facts], num_ranks=num_ranks, budget_tokens=budget_tokens, packed=packed
        )
        micro_batches = tuple(tuple(tuple(rows[i] for i in mb) for mb in share) for share in shares)
        updates.append(Update(sum(f.num_loss_tokens for f in facts), micro_batches))
    return Plan(
        version, tuple(updates), {g.draw: np.asarray(a, np.float32) for g, a in zip(groups, advantages, strict=True)}
    )


def joined(parts: Sequence[Plan]) -> Plan:
    """The plan of one update whose parts were planned, and trained on, one after the other."""
    updates = [p.updates[0] for p in parts]
    ranks = zip(*(u.micro_batches for u in updates), strict=True)
    update = Update(sum(u.num_loss_tokens for u in updates), tuple(tuple(chain(*parts)) for parts in ranks))
    return Plan(parts[0].version, (update,), {d: a for p in parts for d, a in p.advantages.items()})


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward pass, as arrays.

    There is no attention mask. Padding stands on the right, where a causal model's real tokens cannot see it; packed
    sequences are told apart by positions that start again at 0.
    """

    input_ids: LongArray
    """[B, L]"""
    position_ids: LongArray
    """[B, L]"""
    index: LongArray
    """[N] which of the B * L hidden states predicts each loss token."""
    targets: LongArray
    """[N] the loss tokens."""
    advantage: FloatArray
    """[N]"""
    behaviour: FloatArray
    """[N] log-probabilities at sampling; 0 where forced."""
    forced: BoolArray
    """[N]"""
    versions: IntArray
    """[N]"""
    old: FloatArray | None = None
    """[N] log-probabilities under the weights before the rollout batch's first update; None: the current ones."""
    reference: FloatArray | None = None
    """[N] log-probabilities under the run's original model; None: no KL term."""


def collate(samples: Sequence[Sample], packed: bool, pad_id: int) -> MicroBatch:
    """Lay samples out for one forward pass: one row of all tokens if ``packed``, else one padded row each.

    No samples make a micro-batch of one padding token and no loss token: a rank with nothing to train on still runs
    the forward and backward that the other ranks' collectives wait for.
    """
    lengths = [len(s.token_ids) for s in samples] or [1]
    if packed:
        num_rows, width = 1, sum(lengths)
        starts = np.cumsum([0, *lengths[:-1]])
    else:
        num_rows, width = len(lengths), max(lengths)
        starts = np.arange(num_rows) * width
    input_ids = np.full(num_rows * width, pad_id, np.int64)
    position_ids = np.tile(np.arange(width), num_rows)
    index = []
    for s, start, length in zip(samples, starts, lengths, strict=False):
        input_ids[start : start + length] = s.token_ids
        position_ids[start : start + length] = np.arange(length)
        index.append(np.flatnonzero(s.loss_mask) + start - 1)
    return MicroBatch(
        input_ids=input_ids.reshape(num_rows, width),
        position_ids=position_ids.reshape(num_rows, width),
        index=_flat(index, np.int64),
        targets=_flat((s.token_ids[s.loss_mask] for s in samples), np.int64),
        advantage=_flat((np.full(s.loss_mask.sum(), s.advantage) for s in samples), np.float32),
        behaviour=_flat((s.behaviour[s.loss_mask] for s in samples), np.float32),
        forced=_flat((s.forced[s.loss_mask] for s in samples), np.bool_),
        versions=_flat((s.versions[s.loss_mask] for s in samples), np.int32),
    )


def _flat(arrays: Iterable[NDArray], dtype: type[np.generic]) -> NDArray:
    return np.concatenate([np.zeros(0, dtype), *arrays]).astype(dtype, copy=False)
