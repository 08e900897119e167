"""How busy an engine is, as Ray metrics under the names that vLLM itself gives them.

vLLM's own logger for Ray needs all of Ray Serve, and keeps histograms of every single token: 6 % of an engine's CPU
time, and more in the node's metrics agent.
"""

from __future__ import annotations

from typing import Any


class EngineStats:
    """Of one rollout worker's engine; to be made inside of its actor."""

    def __init__(self, run: str, worker: int, model: str) -> None:
        from ray.util.metrics import Counter, Gauge

        tags = {"run": run, "worker": str(worker), "model_name": model}

        def make(kind: Any, name: str, meaning: str) -> Any:
            return kind(f"vllm_{name}", meaning, tuple(tags)).set_default_tags(tags)

        self._running = make(Gauge, "num_requests_running", "Requests in the batch of the last step.")
        self._waiting = make(Gauge, "num_requests_waiting", "Requests that wait for a place in it.")
        self._cache_usage = make(Gauge, "kv_cache_usage_perc", "KV cache in use; 1 is all of it.")
        self._queries = make(Counter, "prefix_cache_queries", "Tokens looked up in the prefix cache.")
        self._hits = make(Counter, "prefix_cache_hits", "Tokens found there.")
        self._prompt = make(Counter, "prompt_tokens", "Tokens prefilled.")
        self._generated = make(Counter, "generation_tokens", "Tokens decoded, for probes too.")
        self._preempted = make(Counter, "num_preemptions", "Requests put back because the KV cache was full.")

    def record(self, scheduler: Any, iteration: Any) -> None:
        """Take what vLLM says of one step: its ``SchedulerStats`` and ``IterationStats``, either may be None."""
        if scheduler is not None:
            self._running.set(scheduler.num_running_reqs)
            self._waiting.set(scheduler.num_waiting_reqs + scheduler.num_skipped_waiting_reqs)
            self._cache_usage.set(scheduler.kv_cache_usage)
            _add(self._queries, scheduler.prefix_cache_stats.queries)
            _add(self._hits, scheduler.prefix_cache_stats.hits)
        if iteration is not None:
            _add(self._prompt, iteration.num_prompt_tokens)
            _add(self._generated, iteration.num_generation_tokens)
            _add(self._preempted, iteration.num_preempted_reqs)


def _add(counter: Any, amount: int) -> None:
    if amount:  # Ray refuses to count nothing
        counter.inc(amount)
