"""Preparing encodes every clip once, whatever kills it, and refuses a folder that is not its own."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mindspeed_model_core import launch
from mindspeed_model_core.data import features
from mindspeed_model_core.data import prepare as module
from mindspeed_model_core.data.encoded import read_empty_text
from mindspeed_model_core.data.features import INDEX, SHARDS, FeatureSet
from mindspeed_model_core.data.media import Item, read_frames, read_list
from mindspeed_model_core.data.prepare import SETTINGS
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.testing.clips import PHOTOS, equal, write_clips
from PIL import Image

from .toy_prepare import DATA, encode, run, words

SHAPES = [(5, 32, 48), (7, 48, 32), (5, 64, 96), (1, 32, 48), (9, 32, 48), (5, 48, 32)]
LINES = 40


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A list of 40 lines that name six clips, each time with another caption."""
    listed = write_clips(tmp_path_factory.mktemp("clips"), SHAPES)
    rows = [json.loads(line) for line in listed.read_text().splitlines()]
    rows = [{**rows[i % len(rows)], "text": f"{PHOTOS[i % 4]}, line {i + 1}"} for i in range(LINES)]
    listed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return listed


@pytest.fixture(scope="module")
def whole(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "features"
    line = run(clips, folder)
    assert re.fullmatch(rf"{folder}: 40 samples encoded in \d+ s, [\d.]+ a second; 40 in all", line)
    assert len(list((folder / SHARDS).iterdir())) > 5
    return folder


def contents(folder: Path) -> dict[str, dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]]:
    """Return every sample's tensors, to the byte."""
    found = FeatureSet(folder)
    return {
        key: {
            name: (t.dtype, tuple(t.shape), bytes(t.contiguous().view(torch.uint8).flatten().tolist()))
            for name, t in found.read(number).items()
        }
        for number, key in enumerate(found.keys)
    }


def unplaced(folder: Path) -> bytes:
    """Return the index but for which shard holds which sample, and the order of shards: that is whoever was free."""
    index = json.loads((folder / INDEX).read_text())
    shapes = index.pop("shapes")
    assert {path.name for path in (folder / SHARDS).iterdir()} == {shard["file"] for shard in index.pop("shards")}
    index["samples"] = {key: shapes[kind] for key, (_, kind) in index["samples"].items()}
    return json.dumps(index).encode()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_samples_are_what_the_function_gives(clips: Path, whole: Path) -> None:
    found = FeatureSet(whole)
    assert found.keys == [f"{i + 1:08d}-clip" for i in range(LINES)]
    assert found.meta == {
        "encoders": "toy",
        "sizes": [[32, 48], [48, 32]],
        "frames": [1, 5, 9],
        "fps": 16.0,
        "samples": LINES,
        "skipped": 0,
    }
    for number in range(LINES):
        frames, height, width = SHAPES[number % len(SHAPES)]
        path = clips.parent / f"part-{number % len(SHAPES)}" / ("clip.png" if frames == 1 else "clip.mp4")
        size = (32, 48) if width > height else (48, 32)
        video = read_frames(path, {7: 5}.get(frames, frames), fps=16, size=size)
        assert equal(found.read(number), encode(Item(0, path, f"{PHOTOS[number % 4]}, line {number + 1}"), video))
    assert equal(read_empty_text(whole), {"text": words(" ")})


def dying(clips: Path, folder: Path) -> None:
    flush = features.FeatureWriter.flush

    def last(self: features.FeatureWriter) -> None:
        flush(self)
        if self.number == 2:
            self.add("00009999-lost", {})
            os.kill(os.getpid(), signal.SIGKILL)

    features.FeatureWriter.flush = last  # type: ignore[method-assign]
    run(clips, folder)


def test_a_kill_loses_and_doubles_nothing(clips: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    killed = multiprocessing.get_context("fork").Process(target=dying, args=(clips, folder))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    kept = {path: path.read_bytes() for path in (folder / SHARDS).glob("*.safetensors")}
    assert len(kept) == 2 and not (folder / INDEX).exists()
    line = run(clips, folder)
    assert re.search(r"(\d+) samples encoded .*; (\d+) were there; 40 in all", line)
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert files(folder) == files(whole)
    again = run(clips, folder)
    assert ": 0 samples encoded" in again and "40 were there; 40 in all" in again
    assert files(folder) == files(whole)


class Job:
    """A launcher of two ranks, forked from this process, where torch is imported already."""

    def __init__(
        self, clips: Path, folder: Path, pause: float = 0.0, on_bad: str = "stop", shard_bytes: int = 12_000
    ) -> None:
        script = Path(__file__).with_name("toy_prepare.py")
        command = [sys.executable, str(script), "prepare", str(clips), str(folder)]
        command += ["--pause", str(pause), "--on-bad", on_bad, "--shard-bytes", str(shard_bytes)]
        self.errors = folder.parent / "errors"
        self.process = multiprocessing.get_context("fork").Process(target=self.launch, args=(command,))
        self.process.start()

    def launch(self, command: list[str]) -> None:
        os.environ["OMP_NUM_THREADS"] = "1"
        with self.errors.open("w") as file:
            os.dup2(file.fileno(), 2)
            sys.stderr = file
            status = launch.spawn(2, command, grace=1.0)
        sys.exit(status)

    def wait(self) -> tuple[int | None, str]:
        """Return the launcher's exit status, negative for a signal, and what was said on stderr."""
        self.process.join(60)
        return self.process.exitcode, self.errors.read_text()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


@pytest.mark.parametrize("victim", ["all", "worker", "launcher"])
def test_a_job_goes_on_after_a_kill_of(victim: str, clips: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    job = Job(clips, folder, pause=0.1)
    wait_for(lambda: all(any((folder / SHARDS).glob(f"rank-{rank}-*")) for rank in range(2)))
    workers = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    launcher = job.process.pid or 0
    # Workers first: a launcher that lived on would have them all end in another way.
    for pid in {"all": [*workers, launcher], "worker": workers[1:], "launcher": [launcher]}[victim]:
        os.kill(pid, signal.SIGKILL)
    why = "rank 1 was killed (SIGKILL: by hand, or the machine ran out of memory); the other ranks were stopped"
    ends = {"worker": (128 + signal.SIGKILL, f"error: {why}\n")}
    status, said = job.wait()
    kept = rf"{folder}: stopped at \d+ of 40 samples; they are kept, the same command goes on from there\n"
    said = re.sub(kept, "", said)
    # Ranks that lose the launcher may hear first from PyTorch that its store is gone.
    assert (status, "" if "TCPStore" in said else said) == ends.get(victim, (-signal.SIGKILL, ""))
    kept = {path: path.read_bytes() for path in (folder / SHARDS).glob("*.safetensors")}
    had = features.done(folder)
    assert len(kept) >= 2 and 2 <= len(had) < LINES and not (folder / INDEX).exists()

    if victim == "launcher":  # its ranks end by themselves; one process goes on at once
        said = run(clips, folder)
    else:
        assert Job(clips, folder).wait() == (0, "")
        said = (tmp_path / "said").read_text()
    counts = re.fullmatch(rf"{folder}: (\d+) samples encoded in .* a second; (\d+) were there; 40 in all", said)
    assert counts and int(counts[1]) + int(counts[2]) == LINES
    # A rank of a launcher that was killed may have been writing its last shard when we looked.
    assert int(counts[2]) == len(had) or (victim == "launcher" and int(counts[2]) > len(had))
    assert all(path.read_bytes() == data for path, data in kept.items())
    assert FeatureSet(folder).keys == [f"{i + 1:08d}-clip" for i in range(LINES)]
    assert contents(folder) == contents(whole) and unplaced(folder) == unplaced(whole)
    assert not [path for path in folder.rglob("*.tmp")]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_job_that_is_stopped_keeps_what_it_encoded(
    number: signal.Signals, clips: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "features"
    job = Job(clips, folder, pause=0.3, shard_bytes=10**9)
    wait_for(lambda: (tmp_path / "encoded0").exists() and (tmp_path / "encoded1").exists())
    os.kill(job.process.pid or 0, number)
    status, said = job.wait()
    told = re.fullmatch(rf"{folder}: stopped at (\d+) of 40 samples; they are kept, .*\n", said)
    kept = len(features.done(folder))
    # The other rank may have ended its clip as the first spoke.
    assert status == 128 + number and told and 2 <= int(told[1]) <= kept <= int(told[1]) + 1
    assert not (folder / INDEX).exists() and f"; {kept} were there; 40 in all" in run(clips, folder)
    assert contents(folder) == contents(whole)


def test_a_bad_file_stops_all_ranks_and_they_keep_what_they_encoded(clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    shutil.copytree(clips.parent, tmp_path / "clips")
    job = Job(tmp_path / "clips" / "clips.jsonl", folder, pause=0.3, shard_bytes=10**9)
    wait_for(lambda: (tmp_path / "encoded0").exists() and (tmp_path / "encoded1").exists())
    (tmp_path / "clips" / "part-4" / "clip.mp4").write_bytes(b"overwritten")
    status, said = job.wait()
    *_, last = said.splitlines()
    assert status == 2 and re.match(r"error: .*/clips.jsonl:\d+: .*part-4/clip.mp4: not a readable video", last)
    assert len(features.done(folder)) >= 2


def test_a_process_alone_keeps_what_it_encoded_and_says_so(
    clips: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen = []

    def interrupted(item: Any, bucket: Any, fps: float) -> Any:
        if item.line == 9:
            seen.append(os.getpid())
            os.kill(os.getpid(), signal.SIGTERM)
        return read(item, bucket, fps)

    read = module.read_clip
    monkeypatch.setattr(module, "read_clip", interrupted)
    with pytest.raises(SystemExit) as ended:
        run(clips, tmp_path / "features")
    assert ended.value.code == 128 + signal.SIGTERM and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    kept = len(features.done(tmp_path / "features"))
    assert 5 < kept < 10
    assert capsys.readouterr().err == (
        f"{tmp_path / 'features'}: stopped at {kept} of 40 samples; they are kept, the same command goes on from there"
        "\n"
    )
    monkeypatch.undo()
    run(clips, tmp_path / "features")
    assert contents(tmp_path / "features") == contents(whole) and seen


def test_a_kill_before_the_first_settings_leaves_a_folder_to_go_on_with(
    clips: Path, whole: Path, tmp_path: Path
) -> None:
    (tmp_path / SHARDS).mkdir()
    (tmp_path / f".{SETTINGS}.tmp").write_text("{")
    run(clips, tmp_path)
    assert files(tmp_path) == files(whole)


def test_two_jobs_do_not_write_to_one_folder(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_DYING", 0.1)
    folder = tmp_path / "features"
    (folder / SHARDS).mkdir(parents=True)
    handle = os.open(folder, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)
    with pytest.raises(UserError, match="features: another prepare command writes to it"):
        run(clips, folder)
    assert [path.name for path in folder.iterdir()] == [SHARDS]
    os.close(handle)
    run(clips, folder)


@pytest.mark.parametrize("left", [0, 1])
def test_every_rank_keeps_other_jobs_out(left: int, clips: Path, tmp_path: Path) -> None:
    folder = tmp_path / "features"
    job = Job(clips, folder, pause=0.1)
    wait_for(lambda: any((folder / SHARDS).glob(f"rank-{left}-*")))
    workers = [int((tmp_path / f"pid{rank}").read_text()) for rank in range(2)]
    os.kill(workers[left], signal.SIGSTOP)
    wait_for(lambda: ") T " in Path(f"/proc/{workers[left]}/stat").read_text())
    for pid in (workers[1 - left], job.process.pid or 0):
        os.kill(pid, signal.SIGKILL)
    job.wait()
    time.sleep(1)  # what the other held is free only when the last of its threads has ended
    handle = os.open(folder, os.O_RDONLY)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(handle)
        os.kill(workers[left], signal.SIGKILL)


def skipping() -> Any:
    return DATA.model_copy(update={"on_bad": "skip"})


def test_bad_files_are_named_and_skipped_or_stop_the_run(clips: Path, tmp_path: Path) -> None:
    listed = tmp_path / "some.jsonl"
    cut = tmp_path / "cut.mp4"
    cut.write_bytes((clips.parent / "part-0" / "clip.mp4").read_bytes()[:900])
    rows = [str(clips.parent / "part-0" / "clip.mp4"), str(cut), str(tmp_path / "missing.png")]
    listed.write_text("".join(json.dumps({"video": row, "caption": "x"}) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"some.jsonl:2: .*cut.mp4: .*\(--on-bad skip leaves such files out\)"):
        run(listed, tmp_path / "stopped")
    line = run(listed, tmp_path / "skipped", skipping())
    assert "1 sample encoded" in line and "2 bad files skipped; 1 in all" in line
    found = FeatureSet(tmp_path / "skipped")
    assert found.keys == ["00000001-clip"] and found.meta["skipped"] == 2


def test_a_file_found_bad_while_decoding_is_skipped_too(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def broken(item: Any, bucket: Any, fps: float) -> Any:
        if item.line == 3:
            raise UserError(f"{item.path}: damaged")
        return torch.zeros(bucket.frames, 3, bucket.height, bucket.width, dtype=torch.uint8)

    monkeypatch.setattr(module, "read_clip", broken)
    with pytest.raises(UserError, match=r"damaged \(--on-bad skip"):
        run(clips, tmp_path / "stopped")
    line = run(clips, tmp_path / "skipped", skipping())
    assert "39 samples encoded" in line and "1 bad files skipped; 39 in all" in line
    assert "part-2/clip.mp4: damaged" in capsys.readouterr().err


def test_other_settings_and_other_folders_are_refused(clips: Path, whole: Path, tmp_path: Path) -> None:
    def refused(message: str, listed: Path = clips, folder: Path = whole, data: Any = DATA, **settings: Any) -> None:
        before = files(folder)
        with pytest.raises(UserError, match=message):
            run(listed, folder, data, **settings)
        assert files(folder) == before

    refused(r"prepared with fps 16.0, now it is 8.0", data=DATA.model_copy(update={"fps": 8.0}))
    refused(r"prepared with frames \[1, 5, 9\], now it is \[5\]", data=DATA.model_copy(update={"frames": (5,)}))
    refused("prepared with encoders toy, now it is other", encoders="other")
    lines = clips.read_text().splitlines(keepends=True)
    moved = clips.with_name("moved.jsonl")
    worded = [line.replace("line 7", "row 7") for line in lines]
    for changed, what in (
        (lines[::-1], "moved.jsonl:1 differs"),
        (worded, "moved.jsonl:7 differs"),
        (lines[:-1], "it had 40 samples, now 39"),
    ):
        moved.write_text("".join(changed))
        refused(rf"prepared from another list \(.*{what}\); add lines at its end only", listed=moved)
    for name in ("thesis.txt", f"{SHARDS}/model.safetensors"):
        mine = tmp_path / name.replace("/", "-") / name
        mine.parent.mkdir(parents=True)
        mine.write_text("")
        refused("exists and is not a prepared folder", folder=tmp_path / name.replace("/", "-"))


def test_lines_may_be_added_to_the_list(clips: Path, whole: Path, tmp_path: Path) -> None:
    lines = clips.read_text().splitlines(keepends=True)
    short = clips.with_name("short.jsonl")
    short.write_text("".join(lines[:2]))
    run(short, tmp_path / "grown")
    short.write_text("".join(lines))
    assert "38 samples encoded" in run(short, tmp_path / "grown")
    assert contents(tmp_path / "grown") == contents(whole) and unplaced(tmp_path / "grown") == unplaced(whole)


def test_the_list_may_be_spelled_otherwise_and_be_moved(
    clips: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(whole)
    monkeypatch.chdir(clips.parent)
    assert "0 samples encoded" in run(Path("clips.jsonl"), whole)
    shutil.copytree(clips.parent, tmp_path / "moved")
    assert "0 samples encoded" in run(tmp_path / "moved" / "clips.jsonl", whole)
    assert files(whole) == before


def test_a_folder_begun_before_lines_had_marks_is_gone_on_with(clips: Path, whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(whole, folder)
    settings = json.loads((folder / SETTINGS).read_text())
    assert len(settings.pop("listed")) == 8 * LINES
    lines = [f"{item.line} {item.path} {item.caption}" for item in read_list(clips)]

    def old(count: int) -> None:
        digest = hashlib.sha256("\n".join(lines[:count]).encode()).hexdigest()[:16]
        (folder / SETTINGS).write_text(json.dumps({**settings, "lines": count, "list": digest}))

    old(LINES - 3)
    assert "0 samples encoded" in run(clips, folder) and files(folder) == files(whole)
    lines[1] += "!"
    old(LINES)
    with pytest.raises(UserError, match="its first 40 lines differ"):
        run(clips, folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_file_that_one_rank_cannot_read_loses_no_other(rank: int, clips: Path, whole: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in clips.read_text().splitlines()]
    for host in range(2):
        shutil.copytree(clips.parent, tmp_path / str(host))
        for number, row in enumerate(rows):
            row["path"] = f"{number}{Path(row['path']).suffix}"
            if (host, number) != (rank, 6 + rank):  # the ranks take turns, so this one looks at it
                source = clips.parent / f"part-{number % len(SHAPES)}"
                shutil.copy(next(source.iterdir()), tmp_path / str(host) / row["path"])
        (tmp_path / str(host) / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "features"
    status, said = Job(tmp_path / "{rank}" / "clips.jsonl", folder, on_bad="skip").wait()
    assert status == 0 and said.count("\n") == 1 and f"{tmp_path}/{rank}/{6 + rank}.mp4: no such file" in said
    assert "39 samples encoded" in (tmp_path / "said").read_text() and "39 in all" in (tmp_path / "said").read_text()
    found = FeatureSet(folder)
    assert [int(key.partition("-")[0]) for key in found.keys] == [i + 1 for i in range(LINES) if i != 6 + rank]
    assert found.meta["samples"] == 39 and found.meta["skipped"] == 1


def test_ranks_with_other_lists_are_refused(clips: Path, tmp_path: Path) -> None:
    for host, word in enumerate(("line", "row")):
        (tmp_path / str(host)).mkdir()
        (tmp_path / str(host) / "clips.jsonl").write_text(clips.read_text().replace("line", word))
    status, said = Job(tmp_path / "{rank}" / "clips.jsonl", tmp_path / "features").wait()
    assert status == 2 and re.fullmatch(r"error: the list: is \w+ on rank 1 and \w+ on rank 0; .*\n", said)


def test_a_destination_that_cannot_be_is_refused(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere/at/all")
    for folder in (tmp_path / "file" / "features", tmp_path / "dangling", Path("/proc/features")):
        with pytest.raises(UserError, match=rf"^{folder}: no folder can be made there \(.*\); name another$"):
            run(clips, folder)


def test_a_list_of_which_nothing_can_be_used_is_an_error(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "clips.jsonl").write_text('{"video": "gone.mp4", "caption": "x"}\n' * 2)
    with pytest.raises(UserError, match="features: none of the 2 samples can be used"):
        run(tmp_path / "clips.jsonl", tmp_path / "features", skipping())
    assert capsys.readouterr().err.count("skipped: ") == 2 and not (tmp_path / "features" / INDEX).exists()


def test_files_have_the_permissions_of_new_files(clips: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        run(clips, tmp_path / "features")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "features").rglob("*") if path.is_file()}
    assert len(modes) > 3 and set(modes.values()) == {0o640}, modes


def test_progress_is_told_where_there_is_no_terminal(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    run(clips, tmp_path / "quick")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(module, "_EVERY", 0.0)
    run(clips, tmp_path / "slow")
    lines = capsys.readouterr().err.splitlines()
    form = rf"{tmp_path / 'slow'}: (\d+) of 40 samples, [\d.]+ a second, \d:\d\d:\d\d left"
    assert [int(match[1]) for line in lines if (match := re.fullmatch(form, line))] == list(range(1, LINES + 1))


def test_damaged_settings_are_told_with_what_to_do(clips: Path, whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "made")
    (tmp_path / "made" / SETTINGS).write_text("")
    with pytest.raises(UserError, match="settings.json: not valid JSON: .*; put it back from a copy, or name a new"):
        run(clips, tmp_path / "made")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"frames": (5, 0)}, "--frames=0: Input should be greater than 0"),
        ({"frames": (80,)}, "--frames: 80 is not 4n + 1; try 81"),
        ({"height": 33}, "--height=33: must be a multiple of 16; try 32"),
        ({"ratios": ("16/9",)}, "--ratio: '16/9' is not width:height; write 16:9"),
        ({"on_bad": "stay"}, "--on-bad='stay': Input should be 'stop' or 'skip'; did you mean 'stop'?"),
    ],
)
def test_impossible_options_are_named_as_options(values: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        module.from_options(type(DATA), values)


def test_a_reference_of_another_folder_is_another_one(tmp_path):
    """Pairs are often named alike, and a list may be moved with its files."""

    def mark(folder, of):
        return module._mark(Item(1, folder / "images" / "1.png", "a", "images/1.png", reference=folder / of / "1.png"))

    assert mark(tmp_path, "edges") == mark(tmp_path / "moved", "edges") != mark(tmp_path, "depths")


def test_a_folder_of_images_grows_anywhere(tmp_path: Path) -> None:
    """What is encoded stays, whatever comes before it; what no longer is as it was encoded is refused by name."""
    photos, folder = tmp_path / "photos", tmp_path / "features"
    photos.mkdir()
    data = DATA.model_copy(update={"prompt": "a dog", "on_bad": "skip"})

    def paint(*names: str) -> None:
        for name in names:
            Image.new("RGB", (48, 32), (len(name), 0, ord(name[0]))).save(photos / name, format="PNG")

    paint("b.png", "d 1.png", "d_1.png")
    (photos / "broken.png").write_bytes(b"")
    (photos / "b.txt").write_text("a cat")
    assert ": 3 samples encoded" in run(photos, folder, data)
    before = files(folder / SHARDS)
    paint("a.png", "c.png", "b.jpg")
    (photos / "broken.png").unlink()
    assert re.search(": 3 samples encoded .*; 3 were there; 6 in all", run(photos, folder, data))
    assert before.items() <= files(folder / SHARDS).items()
    at_once = tmp_path / "at-once"
    run(photos, at_once, data)
    assert contents(folder) == contents(at_once)
    assert [key.rpartition("-")[0] for key in FeatureSet(folder).keys] == ["a", "b", "b", "c", "d_1", "d_1"]

    (photos / "b.txt").write_text("a bird")
    changed = "features: holds b.jpg, which is another now, or has another caption; put that back, or name"
    with pytest.raises(UserError, match=changed):
        run(photos, folder, data)
    (photos / "b.txt").write_text("a cat")
    was = (photos / "b.jpg").read_bytes()
    Image.new("RGB", (96, 80), "red").save(photos / "b.jpg", format="PNG")
    with pytest.raises(UserError, match=changed):
        run(photos, folder, data)
    (photos / "b.jpg").write_bytes(was)
    (photos / "d 1.png").unlink()
    with pytest.raises(UserError, match="features: holds d 1.png, which is no longer there"):
        run(photos, folder, data)
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"image": "photos/a.png", "text": "a dog"}')
    with pytest.raises(UserError, match="was prepared from a folder of images, now it is lines of a list; name"):
        run(listed, folder)
    run(listed, tmp_path / "of-list")
    with pytest.raises(UserError, match="was prepared from lines of a list, now it is a folder of images; name"):
        run(photos, tmp_path / "of-list", data)


def test_a_folder_without_a_sample_takes_other_settings(clips: Path, tmp_path: Path) -> None:
    listed, folder = tmp_path / "list.jsonl", tmp_path / "features"
    listed.write_text('{"video": "gone.mp4", "caption": "x"}\n')
    with pytest.raises(UserError, match="no such file"):
        run(listed, folder)
    other = DATA.model_copy(update={"height": 2 * DATA.height, "width": 2 * DATA.width})
    assert "40 samples encoded" in run(clips, folder, other)
    with pytest.raises(UserError, match="features: was prepared with sizes"):
        run(clips, folder)
