import numpy as np
import pytest

from stepgrpo.learner.batch import Row, _first_fit, collate, make_plan, pair_sample, partition, sample_of
from stepgrpo.types import Exit, GradedGroup, Trajectory, VersionSpan
from tests.facts import facts


def trajectory(exit_: Exit, *, num_tokens: int = 6, complete: bool = True) -> Trajectory:
    """Prompt 1 2, response 3 4 5 ...; a forced one is closed by tokens 3 and 4 of the sequence."""
    token_ids = np.arange(1, num_tokens + 1, dtype=np.int32)
    closing = None if exit_ in (Exit.NATURAL, Exit.EOS) else (3, 5)
    sampled = np.arange(num_tokens) >= 2
    if closing:
        sampled[slice(*closing)] = False
    return Trajectory(
        prompt_len=2,
        token_ids=token_ids,
        logprobs=np.where(sampled, -0.5, 0).astype(np.float32),
        sampled=sampled,
        text="",
        exit=exit_,
        closing=closing,
        complete=complete,
        control=False,
        spans=(VersionSpan(3, 0, 2), VersionSpan(4, 2, num_tokens - 2)),
    )


def graded(draw: int, lengths: list[int]) -> GradedGroup:
    return GradedGroup(draw, f"p{draw}", tuple(facts(tokens=n - 2, prompt=2) for n in lengths))


def test_the_loss_reads_sampled_tokens_and_the_closing_of_a_confident_exit():
    s = sample_of(trajectory(Exit.CONFIDENT), 0.5, train_exit_tokens=True)
    assert s.loss_mask.tolist() == [False, False, True, True, True, True]
    assert s.forced.tolist() == [False, False, False, True, True, False]
    assert s.versions.tolist() == [-1, -1, 3, 3, 4, 4]
    assert s.advantage == 0.5


@pytest.mark.parametrize(
    ("exit_", "train"), [(Exit.BUDGET, True), (Exit.REPETITION, True), (Exit.BUDGET, False), (Exit.CONFIDENT, False)]
)
def test_the_loss_reads_no_other_closing(exit_: Exit, train: bool):
    s = sample_of(trajectory(exit_), 0.5, train_exit_tokens=train)
    assert s.loss_mask.tolist() == [False, False, True, False, False, True]
    assert not s.forced.any()


def test_no_token_is_added_that_the_policy_did_not_sample():
    """The released code appends an EOS to a response that hit its limit, and trains on it."""
    t = trajectory(Exit.EOS, complete=False)
    batch = collate([sample_of(t, 1.0, train_exit_tokens=True)], packed=False, pad_id=0)
    assert batch.targets.tolist() == t.token_ids[t.sampled].tolist()
    assert batch.input_ids.tolist() == [t.token_ids.tolist()]


def test_a_pair_is_trained_on_its_response():
    s = pair_sample([7, 8], np.array([9], np.int32))
    assert s.token_ids.dtype == np.int32
    assert s.loss_mask.tolist() == [False, False, True]


@pytest.mark.parametrize("packed", [False, True])
def test_each_loss_token_is_predicted_by_the_state_before_it(packed: bool):
    samples = [sample_of(trajectory(Exit.CONFIDENT, num_tokens=n), n / 10, True) for n in (6, 9, 7)]
    batch = collate(samples, packed, pad_id=0)
    assert batch.input_ids.shape == ((1, 22) if packed else (3, 9))
    ids, positions = batch.input_ids.ravel(), batch.position_ids.ravel()
    # Token ids count up from 1 in every sample: a target is its predecessor plus 1, and a position its id minus 1.
    assert (ids[batch.index] + 1 == batch.targets).all()
    assert (positions[batch.index] == ids[batch.index] - 1).all()
    assert (batch.forced == np.isin(batch.targets, [4, 5])).all()
    assert (batch.behaviour == np.where(batch.forced, 0, -0.5)).all()
    assert np.unique(batch.advantage).tolist() == pytest.approx([0.6, 0.7, 0.9])
    assert batch.versions.tolist() == np.concatenate([s.versions[s.loss_mask] for s in samples]).tolist()


def test_no_samples_make_a_micro_batch_without_loss_tokens():
    batch = collate([], packed=False, pad_id=5)
    assert batch.input_ids.tolist() == [[5]]
    assert len(batch.index) == len(batch.targets) == len(batch.advantage) == 0


def cost(rows: list[int], packed: bool) -> int:
    return sum(rows) if packed else len(rows) * max(rows, default=0)


@pytest.mark.parametrize("packed", [False, True])
def test_random_plans_keep_budget_balance_and_every_trajectory(packed: bool):
    rng = np.random.default_rng(0)
    for _ in range(60):
        num_ranks, num_updates, budget = int(rng.integers(1, 5)), int(rng.integers(1, 4)), 400
        groups = [graded(int(d), rng.integers(3, 300, rng.integers(2, 6)).tolist()) for d in rng.permutation(20)[:12]]
        advantages = [rng.normal(size=len(g.facts)).astype(np.float32) for g in groups]
        arguments = {
            "version": 3,
            "num_updates": num_updates,
            "num_ranks": num_ranks,
            "budget_tokens": budget,
            "packed": packed,
        }
        plan = make_plan(groups, advantages, **arguments)
        length = {(g.draw, i): f.total_len for g in groups for i, f in enumerate(g.facts)}

        seen: list[Row] = []
        for update in plan.updates:
            assert len(update.micro_batches) == num_ranks
            assert len({len(share) for share in update.micro_batches}) == 1, "ranks would wait for each other for ever"
            for share in update.micro_batches:
                for rows in share:
                    assert cost([length[r] for r in rows], packed) <= budget
            rows = [r for share in update.micro_batches for mb in share for r in mb]
            assert update.num_loss_tokens == sum(length[r] - 2 for r in rows)
            seen += rows
        assert sorted(seen) == sorted(length), "every trajectory once"
        draws = [sorted({d for share in u.micro_batches for mb in share for d, _ in mb}) for u in plan.updates]
        assert [d for part in draws for d in part] == sorted(g.draw for g in groups), "updates follow draw order"
        assert max(map(len, draws)) - min(map(len, draws)) <= 1
        for g, a in zip(groups, advantages, strict=True):
            assert (plan.advantages[g.draw] == a).all()

        order = rng.permutation(len(groups))
        again = make_plan([groups[i] for i in order], [advantages[i] for i in order], **arguments)
        assert again.updates == plan.updates, "the order of arrival changes nothing"


@pytest.mark.parametrize("packed", [False, True])
def test_there_are_as_few_micro_batches_as_any_arrangement_has(packed: bool):
    def fewest(lengths: list[int], budget: int) -> int:
        """By trying every way to put the next row into an open micro-batch or a new one."""

        def search(i: int, bins: list[list[int]]) -> int:
            if i == len(lengths):
                return len(bins)
            options = [search(i + 1, [*bins, [lengths[i]]])]
            for j, b in enumerate(bins):
                if cost([*b, lengths[i]], packed) <= budget:
                    options.append(search(i + 1, [*bins[:j], [*b, lengths[i]], *bins[j + 1 :]]))
            return min(options)

        return search(0, [])

    rng = np.random.default_rng(1)
    for _ in range(40):
        lengths = rng.integers(1, 10, 7).tolist()
        [share] = partition(lengths, num_ranks=1, budget_tokens=12, packed=packed)
        assert len(share) == fewest(lengths, 12)


def test_a_row_goes_to_the_first_micro_batch_that_has_room():
    rng = np.random.default_rng(3)
    for size in (0, 1, 2, 3, 8, 9, 200):
        lengths = sorted(rng.integers(1, 100, size).tolist(), reverse=True)
        expected: list[list[int]] = []
        for i, n in enumerate(lengths):
            fits = (b for b in expected if sum(lengths[j] for j in b) + n <= 130)
            if (first := next(fits, None)) is None:
                expected.append(first := [])
            first.append(i)
        bins = _first_fit(range(size), lengths, 130, packed=True)
        assert [(b.items, b.cost) for b in bins] == [(b, sum(lengths[i] for i in b)) for b in expected]


def test_ranks_carry_about_the_same_load():
    rng = np.random.default_rng(2)
    lengths = rng.integers(50, 500, 256).tolist()
    for packed in (False, True):
        shares = partition(lengths, num_ranks=8, budget_tokens=4096, packed=packed)
        loads = [sum(lengths[i] for mb in share for i in mb) for share in shares]
        assert max(loads) <= 1.1 * min(loads)
        padded = sum(cost([lengths[i] for i in mb], False) for share in shares for mb in share)
        assert packed or padded <= 1.1 * sum(lengths), "rows of one micro-batch have about one length"


def test_a_batch_smaller_than_the_number_of_updates_gets_fewer_updates():
    plan = make_plan(
        [graded(4, [5, 6])],
        [np.zeros(2, np.float32)],
        version=0,
        num_updates=4,
        num_ranks=3,
        budget_tokens=12,
        packed=False,
    )
    assert len(plan.updates) == 1
    assert sorted(plan.updates[0].micro_batches) == [((),), (((4, 0),),), (((4, 1),),)], "one rank has nothing"


def test_a_sequence_over_the_budget_is_refused_with_the_field_to_raise():
    with pytest.raises(ValueError, match=r"learner\.micro_batch_tokens: got 10, takes .* \(11 tokens\)"):
        partition([3, 11], num_ranks=1, budget_tokens=10, packed=True)
