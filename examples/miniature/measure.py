"""Measure a miniature checkpoint by plain sampling: accuracy, steps, tokens, and whether a probe knows when it is done.

python -m examples.miniature.measure [CHECKPOINT]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from examples.miniature.policy import EOS, PAD
from examples.miniature.task import ANSWER_INDUCER, PARTS, TOKEN_IDS, VOCABULARY, Problem, ask, conclude

HERE = Path(__file__).parent
MAX_NEW_TOKENS = 180
BATCH_SIZE = 250
DELTA = 0.95


@dataclass(frozen=True, slots=True)
class Response:
    problem: Problem
    level: int
    words: list[str]

    @property
    def correct(self) -> bool:
        """Thinking closed once, and after it exactly the true answer in exactly the form it should have."""
        ending = ["</think>", *conclude(self.problem)]
        return self.words[-len(ending) :] == ending and self.words.count("</think>") == 1

    @property
    def num_steps(self) -> int:
        return 1 + self.words.count("Wait")


@dataclass(frozen=True, slots=True)
class Trigger:
    """A place where a response thinks on."""

    context: list[str]
    """Prompt and response in front of ``Wait``."""
    done: bool
    """Whether every hard part was checked by then, so that the answer is known."""
    truth: list[str]
    """The tentative answer that would be right."""


def read_problems(path: Path) -> list[tuple[Problem, int]]:
    """Problems with their levels."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(Problem.parse(row["problem"]), row["level"]) for row in rows]


def respond(model: Any, problems: Sequence[tuple[Problem, int]], *, greedy: bool = False) -> list[Response]:
    """One response per problem, at temperature 1 unless ``greedy``, from torch's global generator."""
    words, _ = _generate(model, [ask(p) for p, _ in problems], MAX_NEW_TOKENS, stop=[EOS], greedy=greedy)
    return [Response(p, level, w) for (p, level), w in zip(problems, words, strict=True)]


def triggers(response: Response) -> list[Trigger]:
    """All triggers of a response while it is thinking."""
    words, found = response.words, []
    end = words.index("</think>") if "</think>" in words else len(words)
    unchecked = {name for name, part in zip(PARTS, response.problem.parts, strict=False) if part.hard}
    truth = ["{", *response.problem.answer.split(), "}"]
    for i in range(end):
        if words[i] == "Wait":
            found.append(Trigger(ask(response.problem) + words[:i], not unchecked, truth))
            unchecked -= set(words[i + 1 : i + 2])
    return found


def probe(model: Any, at: Sequence[Trigger]) -> dict[str, float | None]:
    """Induce an answer at each trigger and compare the model's confidence with what it can know.

    Confidence is the geometric mean of the tentative answer's probabilities, its opening brace left out (DEER,
    arXiv 2504.15895, section 3).
    """
    contexts = [[*t.context, *ANSWER_INDUCER] for t in at]
    stop = [TOKEN_IDS[word] for word in ("}", "<eos>", "Wait", "</think>")]
    longest = max((len(t.truth) for t in at), default=0)
    tentative, logprobs = _generate(model, contexts, longest, stop=stop, greedy=True)
    sure = [float(lp[1:].mean().exp()) > DELTA for lp in logprobs]
    return {
        "triggers": len(at),
        "confident_where_done": _share([s for s, t in zip(sure, at, strict=True) if t.done]),
        "confident_where_not_done": _share([s for s, t in zip(sure, at, strict=True) if not t.done]),
        "right_where_confident": _share(
            [words == t.truth for words, s, t in zip(tentative, sure, at, strict=True) if s]
        ),
    }


def measure(model: Any, heldout: Path, *, seed: int = 0) -> dict[str, Any]:
    """Behaviour on the problems of ``heldout``, one sample each."""
    torch.manual_seed(seed)
    responses = respond(model, read_problems(heldout))

    def summary(chosen: Sequence[Response]) -> dict[str, float]:
        return {
            "problems": len(chosen),
            "accuracy": round(fmean(r.correct for r in chosen), 4),
            "steps": round(fmean(r.num_steps for r in chosen), 2),
            "tokens": round(fmean(len(r.words) for r in chosen), 1),
            "complete": round(fmean(r.words[-1] == "<eos>" for r in chosen), 4),
            "shortest": min(r.num_steps for r in chosen),
        }

    return {
        "temperature": 1.0,
        "max_new_tokens": MAX_NEW_TOKENS,
        **summary(responses),
        "levels": {
            level: summary([r for r in responses if r.level == level]) for level in sorted({r.level for r in responses})
        },
        "probe": probe(model, [t for r in responses for t in triggers(r)]),
    }


def _generate(
    model: Any, prompts: Sequence[list[str]], max_new_tokens: int, *, stop: list[int], greedy: bool
) -> tuple[list[list[str]], list[torch.Tensor]]:
    """Words after each prompt, up to and with a stop token, and their log-probabilities."""
    words, kept = [], []
    for start in range(0, len(prompts), BATCH_SIZE):
        batch = prompts[start : start + BATCH_SIZE]
        width = max(map(len, batch))
        with torch.inference_mode():
            out = model.generate(
                input_ids=torch.tensor([[PAD] * (width - len(p)) + [TOKEN_IDS[w] for w in p] for p in batch]),
                attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in batch]),
                do_sample=not greedy,
                max_new_tokens=max_new_tokens,
                eos_token_id=stop,
                return_dict_in_generate=True,
                output_logits=True,
            )
        ids = out.sequences[:, width:]
        logprobs = torch.stack(out.logits, 1).log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        for row, row_logprobs in zip(ids.tolist(), logprobs, strict=True):
            end = next((i for i, token in enumerate(row, 1) if token in stop), len(row))
            words.append([VOCABULARY[token] for token in row[:end]])
            kept.append(row_logprobs[:end])
    return words, kept


def _share(outcomes: Sequence[bool]) -> float | None:
    return round(fmean(outcomes), 4) if outcomes else None


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a miniature checkpoint on the held-out problems.")
    parser.add_argument("checkpoint", type=Path, nargs="?", default=HERE / "model")
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.checkpoint).eval()
    print(json.dumps(measure(model, HERE / "data" / "heldout.jsonl"), indent=2))


if __name__ == "__main__":
    main()
