"""The simulator of growth: it runs the real loop, so what it says of staleness is the loop's own doing."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "bench"))
import simulate

from stepgrpo import pool
from stepgrpo.rundir import read_json_lines


def test_simulated_hours_pass_at_once_and_in_order():
    async def naps() -> list[str]:
        order: list[str] = []

        async def nap(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            order.append(name)

        await asyncio.gather(nap("an hour", 3600), nap("a minute", 60))
        order.append(await asyncio.to_thread(str, asyncio.get_running_loop().time()))
        return order

    with asyncio.Runner(loop_factory=simulate.VirtualLoop) as runner:
        assert runner.run(naps()) == ["a minute", "an hour", "3600.0"]


@pytest.mark.parametrize("staleness", [0, 2])
def test_the_real_loop_trains_on_every_group_within_its_staleness(tmp_path, staleness):
    config = simulate.setting(str(tmp_path), 3, 2, staleness, "train.num_batches=5")
    result = simulate.simulate(config, simulate.long_tailed())
    assert result.staleness_max == staleness
    assert result.groups == 5 * 3 * simulate.GROUPS_PER_WORKER
    assert 0 < result.engines_use < 1 and result.driver_us > 0


def late(groups, config):
    """A reward that tells no response of the first 20 draws from another."""
    return [[float(g.draw >= 20 and i == 0) for i in range(len(g.facts))] for g in groups]


def test_batches_without_any_signal_teach_nothing_and_the_run_goes_on(tmp_path):
    refilled = ["train.refill=true", "train.refill_limit=2", "reward.scheme=tests.test_simulate:late"]
    config = simulate.setting(str(tmp_path), 2, 1, 1, "train.num_batches=3", *refilled, groups=8)
    simulate.simulate(config, simulate.long_tailed())
    draws, lines = ([*read_json_lines(config.run_dir / name)] for name in ("draws.jsonl", "metrics.jsonl"))
    assert [(len(d["trained"]), len(d["filtered"])) for d in draws] == [(0, 10), (0, 10), (8, 0)]
    assert {line["batch"] for line in lines} == {2}


def test_sampling_ahead_keeps_the_learner_busier_than_strictly_on_policy(tmp_path):
    lengths = simulate.long_tailed()
    idle = [
        simulate.simulate(simulate.setting(str(tmp_path), 4, 3, s, "train.num_batches=5"), lengths).learner_idle
        for s in (0, 1)
    ]
    assert idle[1] < idle[0]


def test_the_first_worker_with_new_weights_leaves_the_others_their_share(tmp_path, monkeypatch):
    """Workers load one after the other, because what they decode meanwhile differs."""
    begun = {index: 0 for index in range(4)}
    roll = simulate.Worker.roll

    def counted(self, prompt):
        begun[self.index] += 1
        return roll(self, prompt)

    monkeypatch.setattr(simulate.Worker, "roll", counted)
    seconds = [
        simulate.simulate(
            simulate.setting(str(tmp_path), 4, 3, staleness, "train.num_batches=5"), simulate.long_tailed()
        ).batch_seconds
        for staleness in (0, 1)
    ]
    assert seconds[1] < 0.7 * seconds[0]
    assert max(begun.values()) < 1.2 * min(begun.values())


@pytest.mark.parametrize("staleness", [0, 1])
def test_groups_beyond_those_that_fit_whole_take_the_places_that_others_leave(tmp_path, monkeypatch, staleness):
    use, draws = [], []
    for load in (1, pool.LOAD):
        monkeypatch.setattr(pool, "LOAD", load)
        more = ("train.num_batches=5", "engine.max_num_seqs=20", f"runs_dir={tmp_path / str(load)}")
        config = simulate.setting("", 2, 2, staleness, *more)
        use.append(simulate.simulate(config, simulate.long_tailed()).engines_use)
        draws.append((config.run_dir / "draws.jsonl").read_text())
    assert use[1] > 1.05 * use[0]
    assert draws[0] == draws[1]


def test_a_worker_gets_more_groups_than_fit_only_where_no_other_has_places(tmp_path, monkeypatch):
    there: dict[int, int] = {0: 0, 1: 0, 2: 0}
    beyond = 0
    roll = simulate.Worker.roll

    def counted(self, prompt):
        nonlocal beyond
        if there[self.index] >= 4:
            beyond += 1
            assert min(there.values()) >= 4
        there[self.index] += 1
        done, group = roll(self, prompt)
        done.add_done_callback(lambda _: there.update({self.index: there[self.index] - 1}))
        return done, group

    monkeypatch.setattr(simulate.Worker, "roll", counted)
    config = simulate.setting(str(tmp_path), 3, 2, 0, "train.num_batches=3", "engine.max_num_seqs=20")
    simulate.simulate(config, simulate.long_tailed())
    assert beyond > 10


def test_an_engine_decodes_what_its_groups_are_long_in_the_time_its_rate_says(tmp_path):
    config = simulate.setting(str(tmp_path), 1, 1, 0, "train.num_batches=1", groups=4)
    lengths = simulate.miniature()
    with asyncio.Runner(loop_factory=simulate.VirtualLoop) as runner:
        loop = runner.get_loop()
        world = simulate.World(loop, simulate.rates(config, lengths, simulate.CARD), lengths, config)
        world.worker(0, {})
        engine = world.workers[0]
        prompt = simulate.Prompt(0, "p", simulate.np.ones(3, simulate.np.int32), "")
        done, group = engine.roll(prompt)

        async def finished() -> int:
            return await done

        tokens = runner.run(finished())
        assert tokens == sum(group.lengths) == pytest.approx(engine.decoded, abs=1e-3)
        left, seconds, before = len(group.lengths), 0.0, 0
        for n in sorted(group.lengths):  # the shorter ones leave, and the others go on faster
            seconds += (n - before) * left / world.rates.tokens_per_second(left)
            left, before = left - 1, n
        assert loop.time() == pytest.approx(seconds, abs=1e-6)


def test_nodes_that_pass_weights_on_take_hardly_longer_the_more_they_are():
    relayed_4, alone_4 = simulate.broadcast(16e9, 100, 4)
    relayed_128, alone_128 = simulate.broadcast(16e9, 100, 128)
    assert alone_4 == pytest.approx(4 * 16e9 / 12.5e9) and alone_128 == 32 * alone_4
    assert relayed_128 < 1.2 * relayed_4 < alone_4
