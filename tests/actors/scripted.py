"""An engine that reads its tokens from a script, and the small tokenizers to write scripts in.

It is the ``Engine`` protocol in full: chunks, stop tokens, limits, versions, aborts. What it adds is control over chunk
sizes and timing, and a record of every request.
"""

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from stepgrpo.actors.rollout import Chunk, Sampling
from stepgrpo.tokens import Codec
from stepgrpo.types import Prompt

MARKERS = ["<pad>", "<bos>", "<eos>", "<think>", "</think>"]
WORDS = [*MARKERS, "Wait", "Waiting", "Hmm", "so", "\n", "Final", "\\boxed", *"{}=+0123456789"]
PIECES = ["<eos>", "</think>", "Wait", " Wait", "Wa", "it", "ing", "\n\nWait", "</th", "ink>", " so", ".\n\n", "}."]


def word_codec() -> Codec:
    """One token per blank-separated word; decodes with blanks between words."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return Codec(tokenizer)


def piece_codec(*, close_token: bool = False) -> Codec:
    """Bytes, and pieces such as " Wait" or "</th" that a model may sample; texts are encoded byte by byte.

    ``close_token``: "</think>" is a token of its own, as in most reasoning models.
    """
    byte_level = decoders.ByteLevel()
    spelling = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = ["".join(part for part, _ in spelling.pre_tokenize_str(piece)) for piece in PIECES]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate([*pieces, *alphabet])}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = spelling, byte_level
    special = ["<eos>", "</think>"] if close_token else ["<eos>"]
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    return Codec(tokenizer)


def prompt_of(token_ids: Sequence[int], draw: int = 0) -> Prompt:
    return Prompt(draw, f"test:{draw}", np.array(token_ids, np.int32), "")


@dataclass(slots=True)
class Request:
    """What was asked of the engine, and how it ended."""

    prompt: tuple[int, ...]
    sampling: Sampling
    sent: list[int] = field(default_factory=list)
    state: Literal["open", "finished", "aborted", "failed"] = "open"

    @property
    def is_probe(self) -> bool:
        return self.sampling.temperature == 0


@dataclass(frozen=True, slots=True)
class Reply:
    """What a request would get if nothing ended it; the engine applies stop tokens and limit."""

    token_ids: Sequence[int]
    logprobs: Sequence[float] | float = -0.01
    versions: Sequence[int] | int = 0


Script = Callable[[Request], Reply]
Pace = Callable[[Request], Awaitable[None]]


async def at_once(request: Request) -> None:
    """Every request gets a chunk in turn."""
    await asyncio.sleep(0)


def at_random(seed: int) -> Pace:
    """Every chunk of every request comes after some turns of the event loop."""
    rng = random.Random(seed)

    async def pace(request: Request) -> None:
        for _ in range(rng.choice((0, 0, 1, 2, 5, 30))):
            await asyncio.sleep(0)

    return pace


class ScriptedEngine:
    """``pace`` is awaited before each chunk."""

    def __init__(self, script: Script, *, chunk_size: int = 1, pace: Pace = at_once) -> None:
        self.script, self.chunk_size, self.pace = script, chunk_size, pace
        self.requests: list[Request] = []
        self._streams: list[AsyncGenerator[Chunk, None]] = []  # held, so that only who reads a stream can close it

    @property
    def probes(self) -> list[Request]:
        return [r for r in self.requests if r.is_probe]

    @property
    def others(self) -> list[Request]:
        return [r for r in self.requests if not r.is_probe]

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        self._streams.append(self._generate(prompt, sampling))
        return self._streams[-1]

    async def _generate(self, prompt: Sequence[int], sampling: Sampling) -> AsyncGenerator[Chunk, None]:
        request = Request(tuple(prompt), sampling)
        self.requests.append(request)
        try:
            reply = self.script(request)
            ids = list(reply.token_ids[: sampling.max_tokens])
            stop = next((i + 1 for i, token in enumerate(ids) if token in sampling.stop_token_ids), None)
            ids = ids[:stop]
            assert stop or len(ids) == sampling.max_tokens, "the script ended before the request"
            logprobs = [reply.logprobs] * len(ids) if isinstance(reply.logprobs, float) else list(reply.logprobs)
            versions = [reply.versions] * len(ids) if isinstance(reply.versions, int) else list(reply.versions)
            for a in range(0, len(ids), self.chunk_size):
                b = min(a + self.chunk_size, len(ids))
                await self.pace(request)
                last = b == len(ids)
                request.state = "finished" if last else "open"
                request.sent += ids[a:b]
                yield Chunk(ids[a:b], logprobs[a:b], versions[a:b], ("stop" if stop else "length") if last else None)
        except Exception:
            request.state = "failed"
            raise
        finally:
            if request.state == "open":
                request.state = "aborted"
