"""A sampled group -> its verdicts and counts, the scalars that rewards and metrics are made of."""

from __future__ import annotations

import time
from collections.abc import Sequence

from stepgrpo.reward.outcome import Grader
from stepgrpo.reward.steps import count_steps
from stepgrpo.types import GradedGroup, Group, TrajectoryFacts


async def grade_group(
    group: Group, grader: Grader, triggers: Sequence[str], *, train_exit_tokens: bool = True
) -> GradedGroup:
    """Grade every trajectory and count its steps."""
    start = time.monotonic()
    outcomes = await grader.grade([t.text for t in group.trajectories], group.prompt.truth)
    facts = tuple(
        TrajectoryFacts(
            correct=o.correct,
            formatted=o.formatted,
            error=o.error,
            num_steps=count_steps(t.text, triggers),
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
            probe_tokens=t.probe_tokens,
            discarded_tokens=t.discarded_tokens,
        )
        for t, o in zip(group.trajectories, outcomes, strict=True)
    )
    return GradedGroup(group.draw, group.prompt.key, facts, time.monotonic() - start)
