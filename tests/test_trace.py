"""Traces of spans written by hand; of a real run's in test_watch."""

from __future__ import annotations

import json
import random
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from stepgrpo import trace
from stepgrpo.config import ConfigError
from stepgrpo.rundir import append_json

Json = dict[str, Any]
T0 = 1_700_000_000.0

# Of the trace event format, what is used here: complete events, names, flows.
SCHEMA: Json = {
    "type": "object",
    "required": ["traceEvents"],
    "properties": {
        "displayTimeUnit": {"enum": ["ms", "ns"]},
        "traceEvents": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["ph", "name", "pid", "tid"],
                "properties": {
                    "name": {"type": "string", "minLength": 1},
                    "pid": {"type": "integer", "minimum": 1},
                    "tid": {"type": "integer"},
                    "ts": {"type": "integer", "minimum": 0},
                    "dur": {"type": "integer", "minimum": 0},
                    "id": {"type": "integer", "minimum": 1},
                    "args": {"type": "object"},
                },
                "oneOf": [
                    {"properties": {"ph": {"const": "X"}}, "required": ["ts", "dur", "args"]},
                    {"properties": {"ph": {"enum": ["s", "t"]}}, "required": ["ts", "id", "cat"]},
                    {"properties": {"ph": {"const": "f"}, "bp": {"const": "e"}}, "required": ["ts", "id", "cat", "bp"]},
                    {
                        "properties": {
                            "ph": {"const": "M"},
                            "name": {"enum": ["process_name", "thread_name"]},
                            "args": {"required": ["name"]},
                        },
                        "required": ["args"],
                    },
                ],
            },
        },
    },
}


def span(
    actor: str, name: str, start: float, seconds: float, node: str = "aaaaaaaa", restart: int = 0, **more: Any
) -> Json:
    return {
        "actor": actor,
        "node": node,
        "restart": restart,
        "name": name,
        "start": T0 + start,
        "seconds": seconds,
        **more,
    }


WORKER, RANK, OTHER = "rollout worker 0", "learner rank 0", "bbbbbbbb"
ONE_BATCH = [
    span("driver", "wait", 0, 4, batch=0),
    span("driver", "batch", 0, 10, batch=0),
    span(WORKER, "generate", 0, 2, OTHER, draw=0, tokens=100, oldest=0, newest=0),
    span(WORKER, "generate", 1, 2.5, OTHER, draw=1, tokens=150, oldest=0, newest=0),
    span(WORKER, "generate", 2, 7, OTHER, draw=2, tokens=150, oldest=0, newest=1),
    span(RANK, "grade", 2.1, 0.5, draw=0),
    span(RANK, "grade", 3.6, 0.4, draw=1),
    span(RANK, "reference", 5, 1),
    # Seems to end 100 us after the update: of two clocks.
    span(RANK, "optimize", 6, 2.0001),
    span(RANK, "update", 5, 3, batch=0, version=1),
    span(RANK, "publish", 8, 1, version=1, bytes=10),
    span(WORKER, "load", 9, 1, OTHER, version=1, paused=0.25),
]


def run_of(directory: Path, spans: Iterable[Json], **draws: list[int]) -> Path:
    append_json(directory / "spans.jsonl", *spans)
    for batch, trained in draws.items():
        append_json(
            directory / "draws.jsonl", {"batch": int(batch[1:]), "restart": 0, "trained": trained, "filtered": []}
        )
    return directory


def written(directory: Path, **window: Any) -> Json:
    trace.write(directory, directory / "t.json", **window)
    return json.loads((directory / "t.json").read_text())


def threads(events: list[Json]) -> dict[int, str]:
    return {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}


def places(events: list[Json]) -> list[tuple[str, str, int, int]]:
    names = threads(events)
    return [(names[e["tid"]], e["name"], e["ts"], e["dur"]) for e in events if e["ph"] == "X"]


def arrows(events: list[Json]) -> list[list[str]]:
    """Of each arrow the slices it leads over, found as Perfetto does: of its thread, the one opened last."""
    ways: dict[int, list[str]] = defaultdict(list)
    open_on: dict[int, list[Json]] = defaultdict(list)
    for e in events:
        if e["ph"] == "M":
            continue
        stack = open_on[e["tid"]]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= e["ts"]:
            stack.pop()
        if e["ph"] == "X":
            stack.append(e)
        else:
            assert e["ph"] == "s" or e["id"] in ways, "goes on before it began"
            ways[e["id"]].append(stack[-1]["name"])
    return list(ways.values())


def test_a_batch_becomes_lanes_of_slices_and_arrows_from_its_groups_to_the_weights_they_made(tmp_path: Path) -> None:
    events = written(run_of(tmp_path, ONE_BATCH, b0=[0, 1]))["traceEvents"]
    assert [(e["pid"], e["args"]["name"]) for e in events if e["name"] == "process_name"] == [
        (1, "node aaaaaaaa"),
        (2, "node bbbbbbbb"),
    ]
    second = 1_000_000
    assert places(events) == [
        ("driver", "batch 0", 0, 10 * second),
        (f"{WORKER}: generate", "generate 0", 0, 2 * second),
        ("driver", "wait 0", 0, 4 * second),
        (f"{WORKER}: generate 2", "generate 1", 1 * second, 2_500_000),
        (f"{WORKER}: generate", "generate 2", 2 * second, 7 * second),
        (f"{RANK}: grade", "grade 0", 2_100_000, 500_000),
        (f"{RANK}: grade", "grade 1", 3_600_000, 400_000),
        (RANK, "update 0", 5 * second, 3 * second),
        (RANK, "reference", 5 * second, 1 * second),
        (RANK, "optimize", 6 * second, 2 * second),
        (RANK, "publish 1", 8 * second, 1 * second),
        (WORKER, "load 1", 9 * second, 1 * second),
    ]
    assert arrows(events) == [
        ["generate 0", "grade 0", "update 0"],
        ["generate 1", "grade 1", "update 0"],
        ["update 0", "publish 1"],
        ["publish 1", "load 1"],
    ]
    (load,) = (e for e in events if e["name"] == "load 1")
    assert load["args"] == {"version": 1, "paused": 0.25, "restart": 0}


def test_a_checkpoint_that_is_written_beside_updates_has_a_lane_of_its_own(tmp_path: Path) -> None:
    beside = span(RANK, "checkpoint", 4, 5, checkpoint="r0000-batch-000000")
    events = written(run_of(tmp_path, [*ONE_BATCH, beside], b0=[0, 1]))["traceEvents"]
    on = defaultdict(list)
    for lane, name, *_ in places(events):
        on[lane].append(name)
    assert on[RANK] == ["checkpoint"]
    assert on[f"{RANK} 2"] == ["update 0", "reference", "optimize", "publish 1"]


def test_of_a_draw_that_was_sampled_twice_the_arrow_begins_at_the_one_that_was_trained_on(tmp_path: Path) -> None:
    lost = span("rollout worker 1", "generate", 0, 1, draw=0)  # without tokens: its engine died
    after = span(WORKER, "generate", 9, 0.5, OTHER, draw=0, tokens=9)
    events = written(run_of(tmp_path, [lost, after, *ONE_BATCH], b0=[0, 1]))["traceEvents"]
    (begin,) = (e for e in events if e["ph"] == "s" and e["id"] == 1)
    assert threads(events)[begin["tid"]] == f"{WORKER}: generate"
    assert begin["ts"] == 0


def test_seconds_are_added_up_per_actor_and_what_goes_on_beside_leaves_it_idle() -> None:
    spent = trace.spent(ONE_BATCH, T0, T0 + 10)
    found = {(actor, name): (s.any, s.sum) for actor, names in spent.items() for name, s in names.items()}
    assert found == {
        key: pytest.approx(value, abs=1e-6)
        for key, value in {
            ("driver", "wait"): (4, 4),
            ("driver", "batch"): (10, 10),
            (RANK, "grade"): (0.9, 0.9),
            (RANK, "update"): (3, 3),
            (RANK, "reference"): (1, 1),
            (RANK, "optimize"): (2.0001, 2.0001),
            (RANK, "publish"): (1, 1),
            (RANK, "idle"): (6, 6),  # grading is no work of the rank's
            (WORKER, "generate"): (9, 11.5),
            (WORKER, "load"): (1, 1),
            (WORKER, "paused"): (0.25, 0.25),
            (WORKER, "idle"): (0, 0),
        }.items()
    }
    clipped = trace.spent(ONE_BATCH, T0 + 1, T0 + 2)
    assert clipped[WORKER]["generate"] == trace.Spent(pytest.approx(1), pytest.approx(2))
    assert clipped.keys() == {"driver", WORKER}


def batches(number: int) -> list[Json]:
    return [
        s
        for b in range(number)
        for s in (
            span("driver", "batch", b, 1, batch=b),
            span(WORKER, "generate", b, 0.5, draw=b, tokens=9),
            span(RANK, "grade", b + 0.5, 0.1, draw=b),
            span(RANK, "update", b + 0.6, 0.4, batch=b, version=b + 1),
        )
    ]


@pytest.mark.parametrize(
    ("window", "updates"),
    [({}, range(5, 15)), ({"last": 2}, range(13, 15)), ({"batches": "3-4"}, (3, 4)), ({"batches": "7"}, (7,))],
)
def test_a_window_holds_the_batches_that_were_asked_for(tmp_path: Path, window: Json, updates: Iterable[int]) -> None:
    run = run_of(tmp_path, batches(15), **{f"b{b}": [b] for b in range(15)})
    names = [e["name"] for e in written(run, **window)["traceEvents"] if e["ph"] == "X"]
    assert [n for n in names if n.startswith("update")] == [f"update {b}" for b in updates]


def test_a_group_that_was_sampled_before_the_window_is_in_it(tmp_path: Path) -> None:
    run = run_of(tmp_path, batches(4), b3=[1])
    assert arrows(written(run, batches="3")["traceEvents"])[0] == ["generate 1", "grade 1", "update 3"]


def test_of_a_batch_that_was_done_again_the_last_time_counts(tmp_path: Path) -> None:
    again = [
        span("driver", "batch", 20, 1, restart=1, batch=1),
        span(RANK, "update", 20, 1, restart=1, batch=1, version=2),
    ]
    run = run_of(tmp_path, [*batches(3), *again])
    window, _ = trace.write(run, tmp_path / "t.json", batches="1")
    assert (window.start, window.end) == (T0 + 20, T0 + 21)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ({"batches": "2-9"}, "--batches: got 2-9, takes A-B or one batch, of 0-2"),
        ({"batches": "2-1"}, "--batches: got 2-1, takes A-B or one batch, of 0-2"),
        ({"batches": "all"}, "--batches: got all, takes A-B or one batch, of 0-2"),
        ({"batches": "1", "last": 1}, "--batches, --last: got both, takes one of them"),
    ],
)
def test_batches_that_are_not_there_are_named(tmp_path: Path, window: Json, message: str) -> None:
    with pytest.raises(ConfigError) as e:
        written(run_of(tmp_path, batches(3)), **window)
    assert str(e.value) == message


def test_a_directory_without_spans_and_an_output_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"has no spans.jsonl with a batch; takes the directory of a `stepgrpo train`"
    ):
        trace.write(tmp_path, tmp_path / "t.json")
    with pytest.raises(ConfigError, match=r"--output: got /proc/t.json, cannot be written"):
        trace.write(run_of(tmp_path, batches(1)), Path("/proc/t.json"))


# ---- what Perfetto asks for


def assert_keeps_perfettos_rules(record: Json) -> None:
    Draft202012Validator(SCHEMA).validate(record)
    events = record["traceEvents"]
    timed = [e for e in events if e["ph"] != "M"]
    assert events[-len(timed) :] == timed, "names come first"
    assert [e["ts"] for e in timed] == sorted(e["ts"] for e in timed)
    places = {(e["pid"], e["tid"]) for e in timed}
    assert len({tid for _, tid in places}) == len(places), "a thread's number is its own in the whole trace"
    assert {tid for _, tid in places} == threads(events).keys()
    for e in (e for e in timed if e["ph"] == "X"):
        assert e["pid"] != e["tid"], "would be taken for the main thread"
    open_on: dict[int, list[Json]] = defaultdict(list)
    for e in (e for e in timed if e["ph"] == "X"):
        stack = open_on[e["tid"]]
        while stack and stack[-1]["ts"] + stack[-1]["dur"] <= e["ts"]:
            stack.pop()
        assert not stack or e["ts"] + e["dur"] <= stack[-1]["ts"] + stack[-1]["dur"], "neither beside nor within"
        stack.append(e)


def test_many_spans_at_the_same_time_keep_perfettos_rules(tmp_path: Path) -> None:
    rng = random.Random(0)
    crowd = [span(WORKER, "generate", rng.random(), rng.random(), draw=i, tokens=9) for i in range(300)]
    crowd += [span(WORKER, "probe", rng.random(), rng.random() / 10, draw=i, sample=0, step=0) for i in range(300)]
    crowd += [span(RANK, "grade", rng.random(), 0, draw=i) for i in range(300)]
    record = written(run_of(tmp_path, [*ONE_BATCH, *crowd], b0=list(range(300))))
    assert_keeps_perfettos_rules(record)
    ways = Counter(map(len, arrows(record["traceEvents"])))
    assert ways[3] > 100, "few of the draws have been graded after they were sampled"
