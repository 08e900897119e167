"""Facts of a graded trajectory, for tests that care about a few of them."""

import dataclasses

from stepgrpo.types import Exit, TrajectoryFacts

PLAIN = TrajectoryFacts(
    correct=True,
    formatted=True,
    error=None,
    num_steps=2,
    num_tokens=10,
    num_loss_tokens=10,
    total_len=15,
    exit=Exit.NATURAL,
    complete=True,
    control=False,
    oldest_version=0,
    newest_version=0,
    probe_confidences=(),
    probe_verdicts=(),
    probe_correct=(),
    probe_tokens=0,
    discarded_tokens=0,
)


def facts(
    correct: bool = True, tokens: int = 10, steps: int = 2, prompt: int = 5, **changes: object
) -> TrajectoryFacts:
    """A natural, complete, unprobed trajectory, but for ``changes``."""
    return dataclasses.replace(
        PLAIN,
        correct=correct,
        num_tokens=tokens,
        num_loss_tokens=tokens,
        total_len=prompt + tokens,
        num_steps=steps,
        **changes,  # type: ignore[arg-type]
    )
