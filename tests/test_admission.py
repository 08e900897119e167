"""Draws, batches and staleness, driven by random arrivals."""

import json
import random

import pytest

from stepgrpo.admission import Ledger


def drive(seed, *, num_batches, size, staleness, refill_limit, filtered_share, lag):
    """Run a ledger against a simulated cluster: random finishing order, random fates, late weight loads.

    Returns the closed batches, the draws admitted, and for each draw the version it started under.
    """
    rng = random.Random(seed)
    ledger = Ledger(num_batches=num_batches, prompts_per_batch=size, max_staleness=staleness, refill_limit=refill_limit)
    version, flying, started, batches = 0, [], {}, []
    while len(batches) < num_batches:
        room, before = ledger.room(version), len(started)
        while ledger.may_admit(version):
            draw = ledger.admit()
            started[draw] = version
            flying.append(draw)
        assert len(started) - before == room and ledger.room(version) == 0
        if flying:
            draw = flying.pop(rng.randrange(len(flying)))
            ledger.settle(draw, keep=rng.random() >= filtered_share)
        stuck = not flying and version == len(batches) and not ledger.may_admit(version)
        if stuck or rng.random() < 0.5:  # the learner is free, and asks for a batch
            batch = ledger.close()
            assert batch or not stuck, "nothing flies, nothing closes, nothing may start: a deadlock"
            batches += [batch] if batch else []
        if version < len(batches) and (rng.random() < lag or not flying):
            version += 1  # the worker loads the next version, at some time after it was published
    return batches, started, ledger


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("refill_limit", [0, 2, 8])
def test_no_draw_is_lost_or_used_twice_and_none_is_too_stale(staleness, refill_limit):
    for seed in range(40):
        share = 0.4 if refill_limit else 0.0
        batches, started, ledger = drive(
            seed, num_batches=6, size=8, staleness=staleness, refill_limit=refill_limit, filtered_share=share, lag=0.3
        )
        used = [d for b in batches for d in (*b.kept, *b.filtered)]
        assert sorted(used) == list(range(len(started))), "every admitted draw ends in exactly one batch"
        assert ledger.in_flight == 0
        assert all(0 <= b.index - started[d] <= staleness for b in batches for d in (*b.kept, *b.filtered))


def test_a_batch_is_the_first_groups_in_draw_order_whatever_finishes_first():
    ledger = Ledger(num_batches=2, prompts_per_batch=3, max_staleness=1, refill_limit=0)
    draws = [ledger.admit() for _ in range(6)]
    for d in (5, 4, 3, 2, 1):
        ledger.settle(d, keep=True)
        assert ledger.close() is None, "draw 0 is still open, so nothing may overtake it"
    ledger.settle(0, keep=True)
    assert ledger.close().kept == tuple(draws[:3])
    assert ledger.close().kept == tuple(draws[3:])


def test_where_nothing_is_replaced_the_draws_of_a_batch_are_known_before_they_are_admitted():
    ledger = Ledger(num_batches=3, prompts_per_batch=3, max_staleness=1, refill_limit=0)
    assert ledger.due() == range(3)
    for draw in [ledger.admit() for _ in range(4)]:
        ledger.settle(draw, keep=True)
    assert ledger.due() == range(3)
    assert ledger.close().kept == (0, 1, 2)
    assert ledger.due() == range(3, 6)
    refilled = Ledger(num_batches=3, prompts_per_batch=3, max_staleness=1, refill_limit=2)
    with pytest.raises(AssertionError, match="known when it closes"):
        refilled.due()


def test_strictly_on_policy_admits_one_batch_and_then_waits_for_its_version():
    ledger = Ledger(num_batches=2, prompts_per_batch=2, max_staleness=0, refill_limit=0)
    a, b = ledger.admit(), ledger.admit()
    assert not ledger.may_admit(0)
    ledger.settle(a, keep=True)
    ledger.settle(b, keep=True)
    assert ledger.close().index == 0
    assert not ledger.may_admit(0), "the worker still holds the weights of the batch before"
    assert ledger.may_admit(1)


def test_a_filtered_group_lets_one_more_start_at_the_same_version_up_to_the_limit():
    ledger = Ledger(num_batches=2, prompts_per_batch=2, max_staleness=0, refill_limit=1)
    first, second = ledger.admit(), ledger.admit()
    assert not ledger.may_admit(0)
    ledger.settle(first, keep=False)
    assert ledger.may_admit(0)
    third = ledger.admit()
    ledger.settle(second, keep=True)
    ledger.settle(third, keep=False)
    assert not ledger.may_admit(0), "the limit is one replacement"
    batch = ledger.close()
    assert batch.kept == (second,)
    assert batch.filtered == (first, third)


def test_the_draws_of_a_strictly_on_policy_run_do_not_depend_on_timing():
    def fates(draw):
        return random.Random(draw).random() >= 0.4

    results = []
    for order_seed in range(10):
        rng = random.Random(order_seed)
        ledger = Ledger(num_batches=5, prompts_per_batch=4, max_staleness=0, refill_limit=3)
        batches, flying = [], []
        while len(batches) < 5:
            while ledger.may_admit(len(batches)):
                flying.append(ledger.admit())
            draw = flying.pop(rng.randrange(len(flying)))
            ledger.settle(draw, keep=fates(draw))
            if (b := ledger.close()) is not None:
                batches.append(b)
        results.append(batches)
    assert all(r == results[0] for r in results)


def test_settling_a_draw_twice_is_caught():
    ledger = Ledger(num_batches=1, prompts_per_batch=2, max_staleness=0, refill_limit=0)
    draw = ledger.admit()
    ledger.settle(draw, keep=True)
    with pytest.raises(AssertionError, match="settled twice"):
        ledger.settle(draw, keep=True)


def test_nothing_starts_beyond_the_last_batch():
    ledger = Ledger(num_batches=1, prompts_per_batch=2, max_staleness=5, refill_limit=0)
    ledger.admit()
    ledger.admit()
    assert not ledger.may_admit(0)


def test_a_restored_ledger_goes_on_as_the_saved_one():
    settings = {"num_batches": 3, "prompts_per_batch": 2, "max_staleness": 2, "refill_limit": 1}
    saved = Ledger(**settings)
    draws = [saved.admit() for _ in range(6)]
    saved.settle(draws[0], keep=True)
    saved.settle(draws[1], keep=True)
    saved.settle(draws[2], keep=False)
    saved.settle(draws[4], keep=True)
    saved.close()
    state = json.loads(json.dumps(saved.state()))
    without = Ledger(**settings)
    assert without.restore(state, {draws[2]}) == [draws[3], draws[4], draws[5]], "a group that went away is open again"
    restored = Ledger(**settings)
    assert restored.restore(state, {draws[2], draws[4]}) == [draws[3], draws[5]]
    for ledger in (saved, restored):
        for draw in (draws[3], draws[5]):
            ledger.settle(draw, keep=True)
        batch = ledger.close()
        assert (batch.index, batch.kept, batch.filtered) == (1, (draws[3], draws[4]), (draws[2],))
    assert saved.state() == restored.state()
    assert saved.admit() == restored.admit() == 6
