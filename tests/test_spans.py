import pytest

from stepgrpo.spans import Spans


def test_a_span_has_a_start_a_duration_and_what_was_learnt_on_the_way() -> None:
    spans = Spans()
    with spans.span("generate", draw=3) as outer:
        with spans.span("probe", draw=3):
            pass
        outer["tokens"] = 70
    probe, generate = spans.fetch()
    assert probe["name"] == "probe" and generate == generate | {"name": "generate", "draw": 3, "tokens": 70}
    assert generate["start"] <= probe["start"] and probe["seconds"] <= generate["seconds"]


def test_a_span_that_fails_is_recorded_and_is_fetched_once() -> None:
    spans = Spans()
    with pytest.raises(KeyError), spans.span("load", version=2):
        raise KeyError
    assert [s["name"] for s in spans.fetch()] == ["load"] and spans.fetch() == []
