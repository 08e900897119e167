"""Write stepgrpo.json, the Grafana dashboard of a run: `python cluster/grafana/make_dashboard.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

RUN = '{run="$run"}'
COLUMNS, WIDTH, HEIGHT = 3, 8, 8
"""A dashboard is 24 units wide."""
SOURCE = {"type": "prometheus", "uid": "${datasource}"}


def query(expression: str, legend: str = "") -> dict[str, Any]:
    """``legend``: with labels as `{{worker}}`."""
    return {"expr": expression, "legendFormat": legend, "datasource": SOURCE}


def gauges(**names: str) -> list[dict[str, Any]]:
    """Legend -> name of one of the run's own gauges."""
    return [query(f"ray_stepgrpo_{name}{RUN}", legend.replace("_", " ")) for legend, name in names.items()]


def per_second(counter: str) -> dict[str, Any]:
    """Of each worker that is up: a counter outlives the worker that counted."""
    rate = f"sum by (run, worker) (rate(ray_{counter}_total{RUN}[$__rate_interval]))"
    return query(f"{rate} and on (run, worker) ray_stepgrpo_worker_draws{RUN}", "worker {{worker}}")


def in_all(counter: str) -> dict[str, Any]:
    return query(f"sum by (run) (rate(ray_{counter}_total{RUN}[$__rate_interval]))", "all")


def panel(title: str, question: str, *queries: dict[str, Any], unit: str = "short", stacked: bool = False) -> Any:
    custom = {"fillOpacity": 40 if stacked else 5, "showPoints": "never", "stacking": {"mode": "none", "group": "A"}}
    if stacked:
        custom["stacking"] = {"mode": "normal", "group": "A"}
    return {
        "type": "timeseries",
        "title": title,
        "description": question,
        "datasource": SOURCE,
        "fieldConfig": {"defaults": {"unit": unit, "custom": custom}, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [{**q, "refId": "ABCDEFGH"[i]} for i, q in enumerate(queries)],
    }


OTHER = (
    f"ray_stepgrpo_time_batch{RUN} - ray_stepgrpo_time_wait{RUN} - ray_stepgrpo_time_train{RUN}"
    f" - ray_stepgrpo_time_publish{RUN}"
)
ROWS: dict[str, list[Any]] = {
    "Throughput": [
        panel(
            "Response tokens per second",
            "How fast is it, and does each worker do its part?",
            in_all("stepgrpo_worker_tokens"),
            per_second("stepgrpo_worker_tokens"),
        ),
        panel(
            "Trajectories per second",
            "The same in trajectories: it rises while responses get shorter.",
            in_all("stepgrpo_worker_trajectories"),
            per_second("stepgrpo_worker_trajectories"),
        ),
        panel(
            "Decoded tokens per second",
            "What the engines decode, probes and what is thrown away included: far above response tokens, it is waste.",
            in_all("vllm_generation_tokens"),
            per_second("vllm_generation_tokens"),
        ),
        panel(
            "GPU use",
            "Which GPUs stand still?",
            query("ray_node_gpus_utilization", "{{instance}} GPU {{GpuIndex}}"),
            unit="percent",
        ),
        panel(
            "GPU memory",
            "How near is which GPU to running out?",
            query("ray_node_gram_used", "{{instance}} GPU {{GpuIndex}}"),
            unit="decmbytes",
        ),
        panel(
            "CPU use",
            "Is a node short of cores, for grading or for the engines' own loops?",
            query("ray_node_cpu_utilization", "{{instance}}"),
            unit="percent",
        ),
    ],
    "Queues": [
        panel(
            "Draws in flight",
            "Is every worker given enough? A worker at 0 waits for admission: the learner is the bottleneck.",
            query(f"ray_stepgrpo_worker_draws{RUN}", "worker {{worker}}"),
        ),
        panel(
            "Groups that wait",
            "Finished ones wait for their batch to close or for the learner; the others to be sampled again.",
            *gauges(finished="queue_finished", to_be_sampled_again="queue_again"),
        ),
        panel(
            "Engine requests",
            "How full is an engine? Waiting ones find no place in its batch (engine.max_num_seqs).",
            query(f"ray_vllm_num_requests_running{RUN}", "worker {{worker}}, running"),
            query(f"ray_vllm_num_requests_waiting{RUN}", "worker {{worker}}, waiting"),
        ),
        panel(
            "KV cache in use",
            "Near 1, requests are put back and computed again.",
            query(f"ray_vllm_kv_cache_usage_perc{RUN}", "worker {{worker}}"),
            unit="percentunit",
        ),
        panel(
            "Learner at work",
            "Share of the last five minutes; far below 1, generation is the bottleneck.",
            query(f"avg_over_time(ray_stepgrpo_learner_busy{RUN}[5m])", "busy"),
            unit="percentunit",
        ),
        panel(
            "Staleness",
            "How many versions old is what is trained on?",
            *gauges(mean="staleness_mean", max="staleness_max"),
        ),
    ],
    "Time": [
        panel(
            "Where a batch's time went",
            "What does the learner do with its time?",
            *gauges(waiting_for_the_batch="time_wait", updates="time_train", publishing="time_publish"),
            query(OTHER, "other"),
            unit="s",
            stacked=True,
        ),
        panel(
            "Beside it",
            "What overlaps: seconds with anything in flight, of grading, until all held the weights, and stood still.",
            *gauges(generating="time_generate", grading="time_grade", spreading_weights="time_sync"),
            *gauges(engines_paused="time_paused", checkpoint="time_checkpoint"),
            unit="s",
        ),
        panel(
            "Weights held",
            "Which worker falls behind?",
            query(f"ray_stepgrpo_worker_version{RUN}", "worker {{worker}}"),
        ),
    ],
    "Learning": [
        panel(
            "Exits",
            "What ends thinking? Confident exits fall as the policy learns to stop by itself.",
            *gauges(natural="exit_natural", confident="exit_confident", budget="exit_budget"),
            *gauges(eos="exit_eos", repetition="exit_repetition"),
            unit="percentunit",
            stacked=True,
        ),
        panel(
            "Tokens",
            "Do responses get shorter, and how much do exits save against samples that are never cut?",
            *gauges(per_response="rollout_tokens", saved_by_exits="rollout_tokens_saved"),
        ),
        panel(
            "Steps",
            "Fewer steps of the same length, or longer ones? The latter is a policy that avoids the trigger word.",
            *gauges(per_response="rollout_steps", tokens_per_step="rollout_tokens_per_step"),
        ),
        panel(
            "Reward",
            "Does it learn, and do groups still differ?",
            *gauges(mean="reward_mean", std_in_groups="reward_std", share_with_signal="reward_signal"),
        ),
        panel(
            "Accuracy",
            "Is shortness paid with mistakes? Control samples are never cut.",
            *gauges(all="reward_accuracy", control="accuracy_control", may_be_cut="accuracy_treated"),
            *gauges(held_out="eval_accuracy"),
            unit="percentunit",
        ),
        panel(
            "Policy",
            "Does it drift or collapse?",
            *gauges(KL="policy_kl", entropy="policy_entropy", gradient_norm="policy_grad_norm"),
        ),
    ],
    "Trouble": [
        panel(
            "Workers",
            "Who died, and how often did the run begin again? `events.jsonl` says why.",
            *gauges(up="workers_up", deaths="workers_deaths", restarts="restart"),
        ),
        panel(
            "Errors",
            "Failures in a row end a run at train.max_failures.",
            *gauges(failures_in_a_row="failures_in_a_row", checkpoints_failed="checkpoint_failed"),
            *gauges(grader_failures="reward_grader_failures", updates_skipped="policy_skipped"),
        ),
        panel(
            "Spilled to disk",
            "Is the object store too small?",
            *gauges(spilled="store_spilled"),
            unit="bytes",
        ),
    ],
}


def panels() -> Iterator[dict[str, Any]]:
    ids, y = count(1), 0
    for title, row in ROWS.items():
        yield {
            "type": "row",
            "title": title,
            "id": next(ids),
            "gridPos": {"x": 0, "y": y, "w": 24, "h": 1},
            "panels": [],
        }
        y += 1
        for i, content in enumerate(row):
            x, below = i % COLUMNS * WIDTH, i // COLUMNS * HEIGHT
            yield {**content, "id": next(ids), "gridPos": {"x": x, "y": y + below, "w": WIDTH, "h": HEIGHT}}
        y += -(-len(row) // COLUMNS) * HEIGHT


def dashboard() -> str:
    variables: list[dict[str, Any]] = [
        {"name": "datasource", "label": "Source", "type": "datasource", "query": "prometheus"},
        {
            "name": "run",
            "label": "Run",
            "type": "query",
            "datasource": SOURCE,
            "query": {"query": "label_values(ray_stepgrpo_workers_up, run)", "refId": "run"},
            "refresh": 2,
        },
    ]
    model = {
        "title": "stepgrpo",
        "uid": "stepgrpo",
        "schemaVersion": 41,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": variables},
        "panels": list(panels()),
    }
    return json.dumps(model, indent=1) + "\n"


if __name__ == "__main__":
    path = Path(__file__).with_name("stepgrpo.json")
    path.write_text(dashboard(), encoding="utf-8")
    print(f"wrote {path}")
