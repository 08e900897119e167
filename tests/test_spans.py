import pytest

from stepgrpo.spans import Spans


def test_a_span_has_a_start_a_duration_and_what_was_learnt_on_the_way() -> None:
    spans = Spans()
    with spans.span("generate", draw=3) as outer:
        with spans.span("probe", draw=3):
            pass
        outer["tokens"] = 70
    ended, [probe, generate] = spans.fetch(0)
    assert ended == 2
    assert probe["name"] == "probe" and generate == generate | {"name": "generate", "draw": 3, "tokens": 70}
    assert generate["start"] <= probe["start"] and probe["seconds"] <= generate["seconds"]


def test_a_span_that_fails_is_recorded_and_stays_until_somebody_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stepgrpo.spans.LIMIT", 2)
    spans = Spans()

    def told(had: int) -> tuple[int, list[int]]:
        ended, new = spans.fetch(had)
        return ended, [s["version"] for s in new]

    with pytest.raises(KeyError), spans.span("load", version=1):
        raise KeyError
    assert told(0) == told(0) == (1, [1]), "the first answer may not have arrived"
    with spans.span("load", version=2):
        pass
    assert told(1) == (2, [2])
    for version in (3, 4):
        with spans.span("load", version=version):
            pass
    assert told(1) == (4, [3, 4]), "the oldest goes"
    assert told(4) == (4, [])
