"""Facts of a sampled group: its verdicts, and those on the tentative answers of its probes."""

import dataclasses

import numpy as np

from stepgrpo.reward.graded import grade_group
from stepgrpo.reward.outcome import ExactGrader
from stepgrpo.reward.steps import TriggerRule
from stepgrpo.types import Exit, Group, Probe, Prompt, Trajectory, Verdict, VersionSpan

CLOSE = "</think>"
PROMPT = Prompt(4, "p:4", np.array([1, 2], np.int32), "5")
RULE = TriggerRule(["Wait"])


def trajectory(text, probes=(), *, exit=Exit.NATURAL, num=6, **changes):
    ids = np.array([1, 2, *range(num)], np.int32)
    sampled = np.arange(len(ids)) >= 2
    closing = (3, 5) if exit in (Exit.CONFIDENT, Exit.BUDGET) else None
    if closing:
        sampled[slice(*closing)] = False
    return dataclasses.replace(
        Trajectory(
            prompt_len=2,
            token_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            sampled=sampled,
            text=text,
            exit=exit,
            closing=closing,
            complete=True,
            control=False,
            spans=(VersionSpan(0, 0, num),),
        ),
        probes=tuple(probes),
        **changes,
    )


def probe(text, verdict=Verdict.DECLINED):
    return Probe(0, 1, 0.5, (3,), verdict, text)


class Recording(ExactGrader):
    """Keeps what it was asked."""

    def __init__(self):
        super().__init__(CLOSE)
        self.asked = []

    async def grade(self, responses, truth):
        self.asked.append((list(responses), truth))
        return await super().grade(responses, truth)


async def test_each_probe_knows_whether_its_tentative_answer_was_right():
    group = Group(
        PROMPT,
        (
            trajectory(
                r"4 Wait 5 Wait </think> \boxed{4}",
                [
                    probe(r"\boxed{4}"),
                    probe(r"\boxed{5}"),
                    probe("", Verdict.STALE),
                    probe("no box"),
                    probe(f"{CLOSE} so \\boxed{{5}}", Verdict.CONFIDENT),
                ],
            ),
            trajectory(r"</think> \boxed{5}", [probe("", Verdict.UNUSED)]),
            trajectory("5"),
        ),
    )
    graded = await grade_group(group, ExactGrader(CLOSE), RULE, CLOSE)
    assert [f.probe_correct for f in graded.facts] == [(False, True, None, False, True), (None,), ()]
    assert graded.correct.tolist() == [False, True, False]
    assert graded.formatted.tolist() == [True, True, False]
    assert graded.num_steps.tolist() == [3, 1, 1]
    assert (graded.draw, graded.key) == (4, "p:4")


async def test_responses_and_distinct_tentative_answers_are_asked_about_together():
    probes = [probe("a"), probe("b"), probe("a")]
    group = Group(PROMPT, (trajectory("x", probes), trajectory("y", probes[:1])))
    grader = Recording()
    await grade_group(group, grader, RULE, CLOSE)
    assert grader.asked == [(["x", "y", f"{CLOSE}a", f"{CLOSE}b"], "5")]


async def test_a_trained_closing_counts_among_the_tokens_the_loss_reads():
    group = Group(PROMPT, tuple(trajectory("x", exit=e) for e in (Exit.NATURAL, Exit.CONFIDENT, Exit.BUDGET)))
    for train, expected in ((True, [6, 6, 4]), (False, [6, 4, 4])):
        graded = await grade_group(group, ExactGrader(CLOSE), RULE, CLOSE, train_exit_tokens=train)
        assert [f.num_loss_tokens for f in graded.facts] == expected
        assert {(f.num_tokens, f.total_len) for f in graded.facts} == {(6, 8)}
