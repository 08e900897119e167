"""A sampled group -> its verdicts and counts, the scalars that rewards and metrics are made of."""

from __future__ import annotations

import time

from stepgrpo.reward.outcome import Grader
from stepgrpo.reward.steps import StepRule, count_steps
from stepgrpo.types import GradedGroup, Group, TrajectoryFacts


async def grade_group(
    group: Group, grader: Grader, step_rule: StepRule, think_close: str, *, train_exit_tokens: bool = True
) -> GradedGroup:
    """Grade every trajectory and its probes' tentative answers, and count its steps."""
    start = time.monotonic()
    # A tentative answer is graded as the response it would have been: the grader looks behind the closing marker.
    tentative = list(dict.fromkeys(p.text for t in group.trajectories for p in t.probes if p.text))
    outcomes = await grader.grade(
        [*(t.text for t in group.trajectories), *(think_close + text for text in tentative)], group.prompt.truth
    )
    right = {text: o.correct for text, o in zip(tentative, outcomes[len(group.trajectories) :], strict=True)}
    facts = tuple(
        TrajectoryFacts(
            correct=o.correct,
            formatted=o.formatted,
            error=o.error,
            num_steps=count_steps(t.text, step_rule),
            num_tokens=t.num_tokens,
            num_loss_tokens=int(t.loss_mask(train_exit_tokens).sum()),
            total_len=len(t.token_ids),
            exit=t.exit,
            complete=t.complete,
            control=t.control,
            oldest_version=t.oldest_version,
            newest_version=t.newest_version,
            probe_confidences=tuple(p.confidence for p in t.probes),
            probe_verdicts=tuple(p.verdict for p in t.probes),
            probe_correct=tuple(right.get(p.text) for p in t.probes),
            probe_tokens=t.probe_tokens,
            discarded_tokens=t.discarded_tokens,
        )
        for t, o in zip(group.trajectories, outcomes, strict=False)
    )
    return GradedGroup(group.draw, group.prompt.key, facts, time.monotonic() - start)
