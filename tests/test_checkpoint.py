"""A checkpoint is all there or it is none, whatever happens while it is written, kept or removed."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pytest
from safetensors.numpy import save
from typer.testing import CliRunner

from stepgrpo import checkpoint
from stepgrpo.checkpoint import CheckpointError, FileEntry, Manifest
from stepgrpo.cli import app
from stepgrpo.config import ConfigError

MINIATURE = Path(__file__).parents[1] / "examples" / "miniature" / "model"
FORK = multiprocessing.get_context("fork")


def write(place: str | Path, number: int, accuracy: float | None = None) -> Manifest:
    """A checkpoint whose contents follow from its number."""
    name = f"batch-{number:06}"
    entries = [checkpoint.put(place, name, f"data-{i}.bin", contents(number, i)) for i in range(3)]
    return checkpoint.commit(place, name, {"batch": number, "accuracy": accuracy}, entries)


def contents(number: int, part: int) -> bytes:
    return random.Random(f"{number} {part}").randbytes(5000 + 1000 * part)


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "place") if request.param == "local" else f"memory://{uuid4().hex}/run/checkpoints"


# ---- what is put is what is read


def test_what_was_put_is_what_is_fetched(place: str, tmp_path: Path) -> None:
    file = tmp_path / "source.bin"
    file.write_bytes(b"from a file")
    parts = [b"in ", memoryview(np.arange(3, dtype=np.float32)).cast("B")]
    entries = [
        checkpoint.put(place, "a-1", "file", file),
        checkpoint.put(place, "a-1", "whole", b"all at once"),
        checkpoint.put(place, "a-1", "parts", parts),
        checkpoint.put(place, "a-1", "empty", b""),
    ]
    checkpoint.commit(place, "a-1", {"nested": {"n": [1, None, "é"]}, "pair": (1, 2), "by number": {1: 0.1}}, entries)
    read = checkpoint.verify(place, "a-1")
    assert read.meta == {"nested": {"n": [1, None, "é"]}, "pair": [1, 2], "by number": {"1": 0.1}}
    assert read.files == tuple(entries) and read.size == sum(e.size for e in entries)
    got = {e.name: checkpoint.fetch(place, "a-1", e.name, tmp_path / "cache").read_bytes() for e in entries}
    assert got == {"file": b"from a file", "whole": b"all at once", "parts": b"".join(map(bytes, parts)), "empty": b""}
    with pytest.raises(CheckpointError, match="a-1: has no file other"):
        checkpoint.fetch(place, "a-1", "other", tmp_path / "cache")


def test_the_committed_are_listed_oldest_first_and_the_newest_is_offered(place: str) -> None:
    assert checkpoint.names(place) == []
    for number in (2, 10, 1):
        write(place, number)
    assert checkpoint.names(place) == ["batch-000001", "batch-000002", "batch-000010"]
    manifest, refusals = checkpoint.newest(place)
    assert manifest == checkpoint.read(place, "batch-000010") and refusals == []


def test_a_committed_checkpoint_is_never_written_to_again(place: str) -> None:
    before = write(place, 1)
    with pytest.raises(CheckpointError, match="batch-000001: is committed already"):
        checkpoint.put(place, "batch-000001", "data-0.bin", b"other")
    with pytest.raises(CheckpointError, match="is committed already"):
        checkpoint.commit(place, "batch-000001", {}, before.files)
    assert checkpoint.verify(place, "batch-000001") == before


def test_what_a_lost_attempt_left_is_written_over(place: str) -> None:
    checkpoint.put(place, "batch-000001", "data-0.bin", b"from before the crash")
    assert checkpoint.names(place) == [] and checkpoint.half_written(place) == ["batch-000001"]
    write(place, 1)
    assert checkpoint.newest(place)[0].name == "batch-000001"


def test_a_file_that_another_node_wrote_elsewhere_prevents_the_commit(place: str) -> None:
    entry = checkpoint.put(place, "a-1", "here", b"x")
    elsewhere = FileEntry("there", 1, entry.sha256)
    with pytest.raises(CheckpointError, match="a-1: there: missing; does every node see"):
        checkpoint.commit(place, "a-1", {}, [entry, elsewhere])
    assert checkpoint.names(place) == []


def test_a_download_is_made_once_and_those_of_other_checkpoints_are_removed(tmp_path: Path) -> None:
    place = f"memory://{uuid4().hex}"
    write(place, 1)
    write(place, 2)
    first = checkpoint.fetch(place, "batch-000001", "data-0.bin", tmp_path)
    made = first.stat().st_ino
    assert checkpoint.fetch(place, "batch-000001", "data-0.bin", tmp_path).stat().st_ino == made
    second = checkpoint.fetch(place, "batch-000002", "data-0.bin", tmp_path)
    assert second.read_bytes() == contents(2, 0) and not first.exists()


def test_entries_and_manifests_cross_processes(tmp_path: Path) -> None:
    manifest = write(tmp_path, 1)
    assert pickle.loads(pickle.dumps(manifest)) == manifest


@pytest.mark.parametrize("place", ["nosuch://bucket/x", "s3x://bucket"])
def test_a_place_of_an_unknown_kind_is_refused_in_one_line(place: str) -> None:
    with pytest.raises(ConfigError, match=f"got {place}, takes a directory or a URL") as e:
        checkpoint.names(place)
    assert "\n" not in str(e.value)


# ---- damage


def damaged(place: str, damage: Callable[[Any, str], None], filename: str = "data-1.bin") -> str:
    """Why the newest of three checkpoints is refused, of which the one before it is offered."""
    for number in (1, 2, 3):
        write(place, number)
    store = checkpoint._Store(place)
    damage(store.fs, store.path("batch-000003", filename))
    manifest, refusals = checkpoint.newest(place)
    assert manifest.name == "batch-000002" and len(refusals) == 1
    return refusals[0].removeprefix("batch-000003: ")


def edit(change: Callable[[bytes], bytes]) -> Callable[[Any, str], None]:
    return lambda fs, path: fs.pipe_file(path, change(fs.cat_file(path)))


def edit_record(change: Callable[[dict[str, Any]], object]) -> Callable[[Any, str], None]:
    """Change a manifest and seal it again, as its writer would."""

    def damage(fs: Any, path: str) -> None:
        record = json.loads(fs.cat_file(path))
        change(record)
        del record["sha256"]
        fs.pipe_file(path, json.dumps(record | {"sha256": checkpoint._seal(record)}).encode())

    return damage


def test_a_truncated_file_is_refused(place: str) -> None:
    assert damaged(place, edit(lambda b: b[:17])) == "data-1.bin: truncated: 17 bytes of 6,000"


def test_a_file_with_something_appended_is_refused(place: str) -> None:
    assert damaged(place, edit(lambda b: b + b"x")) == "data-1.bin: too long: 6,001 bytes of 6,000"


def test_a_flipped_bit_in_a_file_is_refused(place: str) -> None:
    assert damaged(place, edit(lambda b: b[:99] + bytes([b[99] ^ 8]) + b[100:])) == "data-1.bin: checksum differs"


def test_a_missing_file_is_refused(place: str) -> None:
    assert damaged(place, lambda fs, path: fs.rm_file(path)) == "data-1.bin: missing"


def test_a_half_written_one_is_refused(place: str) -> None:
    removed = damaged(place, lambda fs, path: fs.rm_file(path), checkpoint.MANIFEST)
    assert removed == "no manifest.json: half written"


def test_another_format_is_refused_with_the_program_that_wrote_it(place: str) -> None:
    other = edit_record(lambda r: r.update(format=7, program="stepgrpo 9.9"))
    reason = damaged(place, other, checkpoint.MANIFEST)
    assert reason == "manifest.json: has format 7 (written by stepgrpo 9.9); this program reads format 1"


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "..", "a/b", ".hidden", ""])
def test_a_manifest_cannot_name_a_file_outside_of_its_directory(place: str, name: str) -> None:
    reason = damaged(place, edit_record(lambda r: r["files"][0].update(name=name)), checkpoint.MANIFEST)
    assert reason.startswith(f"manifest.json: files.0.name: got {name!r}; String should match pattern")


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", "a/b", ".git", ""])
def test_a_checkpoint_cannot_be_named_out_of_its_place(tmp_path: Path, name: str) -> None:
    for call in (checkpoint.read, checkpoint.discard, checkpoint.verify):
        with pytest.raises(CheckpointError, match="is no name of a checkpoint"):
            call(tmp_path, name)
    with pytest.raises(CheckpointError, match="is no name of a checkpoint"):
        checkpoint.put(tmp_path, name, "file", b"")


def test_no_flipped_bit_of_a_manifest_changes_what_is_read(tmp_path: Path) -> None:
    good = write(tmp_path, 1, accuracy=0.25)
    file = tmp_path / good.name / checkpoint.MANIFEST
    raw = file.read_bytes()
    refused = 0
    for i in range(len(raw)):
        file.write_bytes(raw[:i] + bytes([raw[i] ^ 1 << i % 8]) + raw[i + 1 :])
        try:
            assert checkpoint.read(tmp_path, good.name) == good  # blanks may differ
        except CheckpointError:
            refused += 1
    assert refused > len(raw) / 2


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"null", b"7", b"\xff\xfe", b'{"format": 1}'])
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, raw: bytes) -> None:
    reason = damaged(str(tmp_path), edit(lambda _: raw), checkpoint.MANIFEST)
    assert reason == "manifest.json: damaged, or not a manifest"


def test_without_a_good_one_all_reasons_are_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no usable checkpoint$"):
        checkpoint.newest(tmp_path)
    write(tmp_path, 1)
    (tmp_path / "batch-000001" / "data-0.bin").unlink()
    (tmp_path / "batch-000001" / "data-2.bin").write_bytes(b"")
    checkpoint.put(tmp_path, "batch-000002", "data-0.bin", b"x")
    with pytest.raises(CheckpointError) as e:
        checkpoint.newest(tmp_path)
    assert str(e.value).splitlines() == [
        f"{tmp_path}: no usable checkpoint",
        "  batch-000002: no manifest.json: half written",
        "  batch-000001: data-0.bin: missing; data-2.bin: truncated: 0 bytes of 7,000",
    ]


def test_a_name_that_is_not_there_is_said_to_be_so(place: str) -> None:
    write(place, 1)
    with pytest.raises(CheckpointError, match="batch-000009: not in "):
        checkpoint.read(place, "batch-000009")
    with pytest.raises(CheckpointError, match="batch-000009: not in "):
        checkpoint.discard(place, "batch-000009")


# ---- what is kept


def test_the_last_and_the_best_are_kept(place: str) -> None:
    for number, accuracy in enumerate([0.9, 0.1, 0.9, None, 0.2, float("nan"), 0.3]):
        write(place, number, accuracy)
    assert checkpoint.prune(place, keep_last=2, keep_best=1, accuracy=lambda m: m.meta["accuracy"]) == [
        f"batch-00000{n}" for n in (0, 1, 3, 4)
    ]
    assert checkpoint.names(place) == [f"batch-00000{n}" for n in (2, 5, 6)]  # of equally good ones the newer
    assert checkpoint.half_written(place) == []
    assert checkpoint.prune(place, keep_last=2, keep_best=1, accuracy=lambda m: m.meta["accuracy"]) == []


def test_the_best_may_be_told_by_whoever_measured_later(tmp_path: Path) -> None:
    for number in range(5):
        write(tmp_path, number)
    measured = {0: 0.5, 1: 0.75, 2: float("nan")}
    checkpoint.prune(tmp_path, keep_last=1, keep_best=1, accuracy=lambda m: measured.get(m.meta["batch"]))
    assert checkpoint.names(tmp_path) == ["batch-000001", "batch-000004"]


def test_a_discarded_one_is_gone_committed_or_not(place: str) -> None:
    write(place, 1)
    write(place, 2)
    checkpoint.put(place, "batch-000003", "data-0.bin", b"x")
    checkpoint.discard(place, "batch-000002")
    checkpoint.discard(place, "batch-000003")
    assert checkpoint.half_written(place) == [] and checkpoint.names(place) == ["batch-000001"]
    assert write(place, 2) == checkpoint.newest(place)[0]


def test_the_newest_good_one_is_kept_where_newer_ones_are_damaged(tmp_path: Path) -> None:
    for number in range(4):
        write(tmp_path, number)
    for number in (2, 3):
        (tmp_path / f"batch-00000{number}" / "data-0.bin").write_bytes(bytes(5000))
    assert checkpoint.prune(tmp_path, keep_last=1) == ["batch-000000"]
    assert checkpoint.newest(tmp_path)[0].name == "batch-000001"


def test_where_none_is_good_none_is_removed(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path, number)
        (tmp_path / f"batch-00000{number}" / "data-0.bin").write_bytes(bytes(5000))
    assert checkpoint.prune(tmp_path, keep_last=1) == []


def test_half_written_ones_are_removed_once_a_newer_one_is_committed(place: str) -> None:
    checkpoint.put(place, "batch-000001", "data-0.bin", b"x")
    write(place, 2)
    checkpoint.put(place, "batch-000003", "data-0.bin", b"x")
    assert checkpoint.prune(place, keep_last=1) == ["batch-000001"]
    assert checkpoint.half_written(place) == ["batch-000003"]


def test_what_is_not_ours_or_not_readable_is_never_removed(tmp_path: Path) -> None:
    (tmp_path / "a-directory").mkdir()
    (tmp_path / "a-directory" / "thesis.tex").write_text("years of work")
    for number in range(3):
        write(tmp_path, number)
    manifest = tmp_path / "batch-000000" / checkpoint.MANIFEST
    edit_record(lambda r: r.update(format=2))(checkpoint._Store(tmp_path).fs, str(manifest))
    assert checkpoint.prune(tmp_path, keep_last=1) == ["batch-000001"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-directory", "batch-000000", "batch-000002"]


# ---- a disk that fills, a process that is killed


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """256 KB of memory as a file system, where one may be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("nothing can be mounted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def files_under(directory: Path) -> set[str]:
    return {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()}


def test_a_full_disk_leaves_no_half_file_and_the_last_one_as_it_was(tiny_disk: Path) -> None:
    write(tiny_disk, 1)
    before = files_under(tiny_disk)
    with pytest.raises(OSError, match="No space left") as e:
        checkpoint.put(tiny_disk, "batch-000002", "data-0.bin", (bytes(10_000) for _ in range(100)))
    assert e.value.errno == errno.ENOSPC
    assert files_under(tiny_disk) - before <= {f"batch-000002/{checkpoint.MARKER}"}
    assert checkpoint.newest(tiny_disk)[0].name == "batch-000001"
    write(tiny_disk, 2)  # there is room for a smaller one


def test_a_file_beyond_the_limit_leaves_nothing_of_itself(tmp_path: Path) -> None:
    def child() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
        try:
            checkpoint.put(tmp_path, "batch-000002", "data-0.bin", (bytes(10_000) for _ in range(100)))
        except OSError as e:
            os._exit(e.errno or 1)

    write(tmp_path, 1)
    before = files_under(tmp_path)
    process = FORK.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == errno.EFBIG
    assert files_under(tmp_path) - before == {f"batch-000002/{checkpoint.MARKER}"}
    assert checkpoint.newest(tmp_path)[0].name == "batch-000001"


def test_a_source_that_fails_leaves_nothing_of_itself(place: str) -> None:
    def source() -> Iterator[bytes]:
        yield bytes(100)
        raise RuntimeError("the tensor is gone")

    with pytest.raises(RuntimeError, match="gone"):
        checkpoint.put(place, "batch-000001", "data-0.bin", source())
    store = checkpoint._Store(place)
    assert [Path(p).name for p in store.fs.ls(store.path("batch-000001"), detail=False)] == [checkpoint.MARKER]


def save_forever(place: Path, start: int) -> None:
    number = start
    while True:
        write(place, number, accuracy=number % 7 / 7)
        checkpoint.prune(place, keep_last=2, keep_best=1, accuracy=lambda m: m.meta["accuracy"])
        number += 1


def survivor(place: Path) -> int:
    """The batch of the newest checkpoint, of which every byte is what was written."""
    manifest, refusals = checkpoint.newest(place)
    batch = int(manifest.meta["batch"])
    assert manifest.name == f"batch-{batch:06}"
    for part in range(3):
        assert checkpoint.fetch(place, manifest.name, f"data-{part}.bin").read_bytes() == contents(batch, part)
    assert all("half written" in r for r in refusals), refusals
    return batch


def test_a_process_killed_at_random_moments_never_costs_the_last_checkpoint(tmp_path: Path) -> None:
    write(tmp_path, 0)
    moments, last, seen = random.Random(7), 0, set()
    for _ in range(40):
        process = FORK.Process(target=save_forever, args=(tmp_path, last + 1))
        process.start()
        time.sleep(moments.uniform(0.01, 0.08))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        batch = survivor(tmp_path)
        assert batch >= last
        last = batch
        seen.add(batch)
    assert len(seen) > 5, "it was killed before it wrote anything"


def test_a_process_killed_at_any_change_of_the_disk_never_costs_the_last_checkpoint(tmp_path: Path) -> None:
    """One child for each file that is opened, renamed or removed in a save with its pruning: killed right before."""

    def child(place: Path, survives: int) -> None:
        left = survives

        def on_event(event: str, _: object) -> None:
            nonlocal left
            if event in {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir"}:
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(on_event)
        write(place, 4)
        checkpoint.prune(place, keep_last=1)
        os._exit(0)

    for number in (1, 3):
        write(tmp_path / "start", number)
    checkpoint.put(tmp_path / "start", "batch-000002", "data-0.bin", b"left by another crash")
    outcomes = []
    for survives in range(200):
        place = shutil.copytree(tmp_path / "start", tmp_path / str(survives))
        process = FORK.Process(target=child, args=(place, survives))
        process.start()
        process.join()
        outcomes.append(survivor(place))
        for name in checkpoint.names(place):
            checkpoint.verify(place, name)
        checkpoint.prune(place, keep_last=1)  # finishes what was broken off
        assert len(checkpoint.names(place)) == 1 and survivor(place) == outcomes[-1]
        known = {*checkpoint.names(place), *checkpoint.half_written(place)}
        assert {p.parent.name for p in place.rglob("*") if p.is_file()} == known, "left behind for good"
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
    assert outcomes == sorted(outcomes) and set(outcomes) == {3, 4} and 40 < len(outcomes) < 200


# ---- the command line


def run(*arguments: object, status: int = 0) -> str:
    result = CliRunner().invoke(app, ["checkpoint", *map(str, arguments)])
    assert result.exit_code == status, result.output
    return result.output


def test_inspect_lists_all_with_their_state(tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    write(place, 1)
    write(place, 2)
    # Of the run: a checkpoint is written before its weights are measured.
    (tmp_path / "evaluations.jsonl").write_text('{"version": 1, "accuracy": {"mean": 0.625}}\n')
    (place / "batch-000002" / "data-0.bin").write_bytes(b"")
    checkpoint.put(place, "batch-000003", "data-0.bin", b"x")
    head, _, _, first, second, third, *faults = [line for line in run("inspect", place).splitlines() if line.strip()]
    assert "restart" in head and first.split()[0] == "batch-000001" and first.split()[-2:] == ["62.5", "good"]
    assert second.split()[-1] == third.split()[-1] == "bad"
    assert faults == [
        "batch-000002: data-0.bin: truncated: 0 bytes of 5,000",
        "batch-000003: no manifest.json: half written",
    ]


def test_verify_ends_with_status_1_on_a_fault(tmp_path: Path) -> None:
    write(tmp_path, 1)
    write(tmp_path, 2)
    assert run("verify", tmp_path) == "batch-000001: good (3 files, 18.0 kB)\nbatch-000002: good (3 files, 18.0 kB)\n"
    (tmp_path / "batch-000001" / "data-0.bin").write_bytes(bytes(5000))
    assert "batch-000001: data-0.bin: checksum differs" in run("verify", tmp_path, status=1)
    assert run("verify", tmp_path, "batch-000002").startswith("batch-000002: good")
    assert "holds no checkpoint" in run("verify", tmp_path / "nowhere", status=1)


def learner_file(rank: int, num_ranks: int, parameters: dict[str, Any]) -> bytes:
    """A rank's pieces, cut as ZeRO-3 cuts them."""
    tensors, places = {}, {}
    for name, whole in parameters.items():
        part = -(-whole.size // num_ranks)
        piece = whole.ravel()[rank * part : (rank + 1) * part]
        if piece.size:
            places[name] = {"start": rank * part, "shape": list(whole.shape)}
            tensors |= {f"{kind}/{name}": piece for kind in ("master", "exp_avg", "exp_avg_sq")}
    return save(tensors, {"rank": str(rank), "step": "3", "pieces": json.dumps(places)})


def policy_checkpoint(place: str | Path, dtype: str) -> dict[str, Any]:
    """A checkpoint of the miniature model with other weights, and these weights."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(MINIATURE, dtype=torch.float32)
    parameters = {n: p.detach().numpy() * 1.01 for n, p in model.named_parameters()}
    entries = [
        checkpoint.put(place, "batch-000005", f"learner-{r}-of-3.safetensors", learner_file(r, 3, parameters))
        for r in range(3)
    ]
    checkpoint.commit(place, "batch-000005", {"model": str(MINIATURE), "dtype": dtype}, entries)
    return parameters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_writes_a_model_that_loads_with_the_checkpoints_weights(place: str, tmp_path: Path, dtype: str) -> None:
    import torch
    import transformers

    parameters = policy_checkpoint(place, dtype)
    output = tmp_path / "exported"
    run("export", place, "--output", output)
    model = transformers.AutoModelForCausalLM.from_pretrained(output)
    assert model.dtype == getattr(torch, dtype)
    loaded = dict(model.named_parameters())
    assert loaded.keys() == parameters.keys()
    assert all(torch.equal(loaded[n], torch.from_numpy(p).to(model.dtype)) for n, p in parameters.items())
    before = transformers.AutoTokenizer.from_pretrained(MINIATURE)
    assert transformers.AutoTokenizer.from_pretrained(output).get_vocab() == before.get_vocab()
    assert (
        model.generation_config.eos_token_id
        == json.loads((MINIATURE / "generation_config.json").read_text())["eos_token_id"]
    )
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []
    assert "which exists" in run("export", place, "--output", output, status=2)


def test_export_refuses_what_is_not_the_models(tmp_path: Path) -> None:
    write(tmp_path, 1)
    assert "holds no policy" in run("export", tmp_path, "--output", tmp_path / "out", status=1)
    one = learner_file(0, 1, {"lm.other": np.ones((2, 3), np.float32)})
    entry = checkpoint.put(tmp_path, "batch-000002", "learner-0-of-1.safetensors", one)
    checkpoint.commit(tmp_path, "batch-000002", {"model": str(MINIATURE), "dtype": "float32"}, [entry])
    assert "of another model than" in run("export", tmp_path, "--output", tmp_path / "out", status=1)
    assert not (tmp_path / "out").exists()
