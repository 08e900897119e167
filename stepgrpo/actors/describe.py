"""A group as people read it: texts, where steps open, what the probes answered, where thinking was cut."""

from __future__ import annotations

import math
from typing import Any

from stepgrpo.reward.outcome import extract_answer
from stepgrpo.reward.steps import StepRule
from stepgrpo.tokens import Codec
from stepgrpo.types import GradedGroup, Group, Trajectory, TrajectoryFacts, Verdict


def describe(group: Group, graded: GradedGroup, codec: Codec, step_rule: StepRule, think_close: str) -> dict[str, Any]:
    """One line of ``samples.jsonl`` and of an evaluation's dump, less what only the caller knows (batch, rewards).

    All places are character offsets into the trajectory's ``text``.
    """
    return {
        "draw": group.draw,
        "key": group.prompt.key,
        "prompt": codec.decode(group.prompt.token_ids.tolist()),
        "truth": group.prompt.truth,
        "trajectories": [
            _trajectory(t, f, codec, step_rule, think_close)
            for t, f in zip(group.trajectories, graded.facts, strict=True)
        ],
    }


def _trajectory(
    t: Trajectory, facts: TrajectoryFacts, codec: Codec, step_rule: StepRule, think_close: str
) -> dict[str, Any]:
    response = t.token_ids[t.prompt_len :].tolist()

    def offset(num_tokens: int) -> int:
        return len(codec.decode(response[:num_tokens]))

    closing = [offset(i - t.prompt_len) for i in t.closing] if t.closing else [None, None]
    return {
        "text": t.text,
        "steps": [start for start, _ in step_rule.openings(t.text)],
        "probes": [
            {
                "at": offset(p.position),
                "confidence": None if math.isnan(p.confidence) else round(p.confidence, 4),
                "answer": codec.decode(list(p.token_ids)).strip(),
                "verdict": p.verdict.value,
                "correct": right,
            }
            for p, right in zip(t.probes, facts.probe_correct, strict=True)
            if p.verdict is not Verdict.UNUSED
        ],
        "cut": closing[0],
        "closed": closing[1],
        "exit": t.exit.value,
        "complete": t.complete,
        "control": t.control,
        "correct": facts.correct,
        "answer": extract_answer(t.text, think_close),
        "num_steps": facts.num_steps,
        "num_tokens": facts.num_tokens,
        "version": facts.oldest_version,
        "reward": None,
        "advantage": None,
    }
