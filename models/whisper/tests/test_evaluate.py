"""Counting errors: what is left out of texts, what is kept of an evaluation that ends early, and bad files."""

from __future__ import annotations

import errno
import fcntl
import functools
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mindspeed_model_core.data.audio import read_audio
from mindspeed_model_core.errors import UserError
from mindspeed_model_whisper import evaluate
from mindspeed_model_whisper.data import RATE, Line
from mindspeed_model_whisper.evaluate import (
    Draft,
    distance,
    error_rate,
    evaluate_command,
    hear,
    normalizing,
    report,
)
from mindspeed_model_whisper.generate import Transcriber, Transcript, open_transcriber

from .speech import sweep, write_wav


def spoken(text: str, language: str = "en") -> Line:
    return Line(Path("a.wav"), "list.jsonl:1", language, text)


def run(folder: Path, listed: Path, **options: Any) -> None:
    given: dict[str, Any] = {"language": "en", "task": "transcribe", "device": "cpu", "dtype": "fp32", "batch": 1}
    evaluate_command(folder, listed, **{**given, **options})


def write_list(folder: Path, count: int = 3, **more: Any) -> Path:
    rows = []
    for number in range(count):
        write_wav(folder / f"{number}.wav", sweep(0.4 + 0.1 * number).numpy())
        rows.append({"audio": f"{number}.wav", "text": f"text {number}"} | more)
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "list.jsonl"


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("want", "got", "errors"),
    [("a b c", "a b c", 0), ("a b c", "a c", 1), ("a b", "a x b", 1), ("a b", "b a", 2), ("", "a b", 2), ("a", "", 1)],
)
def test_distances(want: str, got: str, errors: int) -> None:
    assert distance(want.split(), got.split()) == errors


def test_distances_are_those_of_the_recursion() -> None:
    @functools.cache
    def plain(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(plain(a[1:], b) + 1, plain(a, b[1:]) + 1, plain(a[1:], b[1:]) + (a[0] != b[0]))

    draw = random.Random(0)
    for _ in range(50):
        a, b = ("".join(draw.choices("abc", k=draw.randint(0, 9))) for _ in range(2))
        assert distance(a, b) == plain(a, b)


def test_error_rates_are_over_all_that_is_wanted() -> None:
    assert error_rate([("a b c d".split(), "a b c".split()), (["one"], ["two"])]) == 2 / 5
    with pytest.raises(UserError, match="all texts are empty"):
        error_rate([("", "a")])


def test_english_is_written_in_one_way() -> None:
    """As published: contractions, numbers, fillers and, with the tokenizer's map, spellings."""
    english = normalizing("english", {"colour": "color"})
    assert english("Um, I won't pay twenty-one dollars for this COLOUR!") == "i will not pay $21 for this color"
    assert normalizing("english")("colour") == "colour"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("नमस्ते, दुनिया!", "नमस्ते दुनिया"),
        ("வணக்கம்.", "வணக்கம்"),
        ("ที่นี่", "ที่นี่"),
        ("L'Été [rires] (oui)", "l été"),
        ("Cafe\N{COMBINING ACUTE ACCENT}", "café"),
    ],
)
def test_basic_keeps_marks_that_are_vowels(text: str, want: str) -> None:
    assert normalizing("basic")(text) == want


@pytest.mark.parity
@pytest.mark.parametrize("text", ["Größe, «Straße»", "q\N{COMBINING TILDE}x", "يَوم", "你好，世界。", "¿Qué? [x]"])
def test_basic_is_transformers_where_marks_are_no_vowels(text: str) -> None:
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer

    assert normalizing("basic")(text) == BasicTextNormalizer()(text).strip()


def test_the_language_picks_the_normalizer_and_what_is_counted() -> None:
    said = report([(spoken("I'm 20"), "i am twenty")], None, "transcribe", {"a": "b"})
    assert said == "WER 0.00%, CER 0.00%; normalizer: english"
    said = report([(spoken("I am"), "i am")], None, "transcribe", None)
    assert said.endswith(
        "normalizer: english, whose map of spellings is not there: the tokenizer has no normalizer.json"
    )
    said = report([(spoken("दिन", "hi"), "दिन")], None, "transcribe", None)
    assert said == "WER 0.00%, CER 0.00%; normalizer: basic"
    assert report([(spoken("i'm", "hi"), "i am")], None, "translate", {"a": "b"}).startswith("WER 0.00%")
    assert report([(spoken("Ja!", "de"), "ja")], "none", "transcribe", None) == (
        "WER 100.00%, CER 66.67%; normalizer: none"
    )


def test_words_are_counted_only_where_spaces_are_between_them() -> None:
    pairs = [(spoken("今日は晴れ", "ja"), "今日は雨")]
    assert report(pairs, None, "transcribe", None) == "CER 40.00%; normalizer: basic"
    mixed = [*pairs, (spoken("ein Tag", "de"), "kein Tag")]
    assert report(mixed, None, "transcribe", None) == "WER 50.00%, CER 27.27%; normalizer: basic"


# ------------------------------------------------------------------------------------------------ hearing


@pytest.mark.parametrize("beams", [1, 3])
def test_sounds_heard_at_once_are_those_heard_alone(folder: Path, tmp_path: Path, beams: int) -> None:
    """In two languages, and one longer than the network hears, which comes alone; each text is its own line's."""
    transcriber, lines = open_transcriber(folder, None, "cpu", "fp32"), []
    for number, (length, code) in enumerate([(0.5, "en"), (0.7, "de"), (0.9, "en"), (1.6, "en"), (0.4, "en")]):
        path = write_wav(tmp_path / f"{number}.wav", sweep(length).numpy()[::-1] * (1 - number / 9))
        lines.append(Line(path, f"list.jsonl:{number + 1}", code, ""))
    found = dict(each for group in hear(transcriber, lines, [1.6] * 5, beams=beams, batch=2) for each in group)
    short = [0, 1, 2, 4]
    alone = [transcriber(read_audio(lines[n].path, RATE), language=lines[n].language, beams=beams).text for n in short]
    assert [found[n] for n in short] == alone and len(set(alone)) > 1 and found[3]


def test_a_list_is_evaluated(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_wav(tmp_path / "a.wav", sweep(0.6).numpy())
    heard = open_transcriber(folder, None, "cpu", "fp32")(read_audio(tmp_path / "a.wav", RATE), language="en").text
    (tmp_path / "list.jsonl").write_text(json.dumps({"audio": "a.wav", "text": heard}) + "\n")
    out = tmp_path / "new" / "out.jsonl"
    run(folder, tmp_path / "list.jsonl", normalizer="none", out=out)
    assert "1 sounds: WER 0.00%, CER 0.00%; normalizer: none" in capsys.readouterr().out
    assert json.loads(out.read_text())["heard"] == heard and [p.name for p in out.parent.iterdir()] == ["out.jsonl"]


def test_an_output_that_exists_is_kept(folder: Path, tmp_path: Path) -> None:
    listed, out = write_list(tmp_path, 1), tmp_path / "out.jsonl"
    out.write_text("mine")
    with pytest.raises(UserError, match=r"--out=.*out\.jsonl: exists; .* --overwrite"):
        run(folder, listed, out=out)
    assert out.read_text() == "mine"
    run(folder, listed, out=out, overwrite=True)
    assert json.loads(out.read_text())["text"] == "text 0"


def test_an_output_never_replaces_the_list(folder: Path, tmp_path: Path) -> None:
    listed = write_list(tmp_path, 1)
    before, other = listed.read_text(), tmp_path / "other.jsonl"
    other.symlink_to(listed)
    for out in (listed, other):
        with pytest.raises(UserError, match=r"--out=.*\.jsonl: is the list itself; choose another name"):
            run(folder, listed, out=out, overwrite=True)
    assert listed.read_text() == before


def test_an_evaluation_that_is_stopped_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    listed, whole, out = write_list(tmp_path), tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    run(folder, listed, out=whole)

    asked: list[str] = []

    def counted(path: Path, rate: int) -> Any:
        asked.append(path.name)
        if path.name == "2.wav" and len(asked) == 3:
            raise KeyboardInterrupt
        return read_audio(path, rate)

    monkeypatch.setattr(evaluate, "read_audio", counted)
    with pytest.raises(KeyboardInterrupt):
        run(folder, listed, out=out)
    said = capsys.readouterr().err
    assert not out.exists()
    assert "stopped at 1 of 3 sounds; they are kept in" in said or "stopped at 2 of 3 sounds; they are kept in" in said
    kept = (tmp_path / "out.jsonl.part").read_bytes()
    with pytest.raises(UserError, match=r"out\.jsonl\.part: was begun with --beams 1, now it is 2"):
        run(folder, listed, out=out, beams=2)
    (tmp_path / "out.jsonl.part").write_bytes(kept + b'{"audio": "torn')
    asked[:] = ["x"] * 9
    run(folder, listed, out=out)
    assert "0.wav" not in asked and "2.wav" in asked
    assert out.read_bytes() == whole.read_bytes() and not (tmp_path / "out.jsonl.part").exists()
    assert "3 sounds: WER" in capsys.readouterr().out


def stop(folder: Path, listed: Path, out: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> None:
    """Evaluate until the last of three sounds is read."""

    def until(path: Path, rate: int) -> Any:
        if path.name == "2.wav":
            raise KeyboardInterrupt
        return read_audio(path, rate)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(evaluate, "read_audio", until)
        run(folder, listed, out=out, **options)


def heard_of(out: Path) -> list[str]:
    return [json.loads(line)["heard"] for line in out.read_text().splitlines()]


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json"])
def test_texts_of_two_networks_are_not_mixed(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the second has the first one's path."""
    listed, out, source = write_list(tmp_path), tmp_path / "out.jsonl", tmp_path / "source"
    shutil.copytree(folder, source)
    stop(source, listed, out, monkeypatch)
    before = (tmp_path / "out.jsonl.part").read_bytes()
    at = (source / name).stat().st_mtime_ns
    os.utime(source / name, ns=(at, at + 1))
    with pytest.raises(UserError, match=r"out\.jsonl\.part: was begun with files of SRC [0-9a-f]{12}, now it is "):
        run(source, listed, out=out)
    assert (tmp_path / "out.jsonl.part").read_bytes() == before
    os.utime(source / name, ns=(at, at))
    run(source, listed, out=out)
    assert len(heard_of(out)) == 3


def test_a_sound_that_was_replaced_is_heard_anew(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed, out, whole = write_list(tmp_path), tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    stop(folder, listed, out, monkeypatch)
    before = [json.loads(line) for line in (tmp_path / "out.jsonl.part").read_text().splitlines()[1:]]
    write_wav(tmp_path / "0.wav", sweep(0.9).numpy()[::-1] / 2)
    run(folder, listed, out=out)
    run(folder, listed, out=whole)
    assert heard_of(out) == heard_of(whole) and heard_of(out)[0] != before[0]["heard"]


def test_one_evaluation_at_a_time_writes_an_output(tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    first = Draft(out, {"a": 1}, 1)
    with pytest.raises(
        UserError, match=r"out\.jsonl\.part: another evaluate writes to it; wait, or choose another --out"
    ):
        Draft(out, {"a": 1}, 1)
    first.__exit__(None)
    Draft(out, {"a": 1}, 1).__exit__(None)


def test_an_evaluation_that_ended_meanwhile_takes_its_file_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that opened the file before that would write to nothing."""
    out = tmp_path / "out.jsonl"
    monkeypatch.setattr(fcntl, "flock", lambda *_: out.with_name("out.jsonl.part").unlink())
    with pytest.raises(UserError, match="another evaluate writes to it"):
        Draft(out, {}, 1)


def test_a_place_without_locks_is_no_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Draft(tmp_path / "out.jsonl", {}, 1) as draft:
        draft.finish([])
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[1]\n", 1),
        ("7\n", 1),
        ("{\n", 1),
        ("{}\n[1]\n", 2),
        ('{}\n{"audio": "a"}\n', 2),
        ('{}\n{"audio": "a", "text": "b", "language": "en", "size": 1, "heard": null}\n', 2),
    ],
)
def test_a_file_of_something_else_is_damaged(tmp_path: Path, text: str, where: int) -> None:
    (tmp_path / "out.jsonl.part").write_text(text)
    with pytest.raises(UserError, match=rf"out\.jsonl\.part:{where}: is damaged; remove the file to begin anew"):
        Draft(tmp_path / "out.jsonl", {}, 1)
    assert (tmp_path / "out.jsonl.part").read_text() == text


@pytest.mark.parametrize(("longest", "most"), [(0.4, 8), (1.2, 2)])
def test_few_sounds_are_read_ahead_if_some_are_long(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, longest: float, most: int
) -> None:
    """Whole talks take gigabytes."""
    transcriber, taken, held = open_transcriber(folder, None, "cpu", "fp32"), [], []

    class Taken(list[Line]):
        def __iter__(self) -> Iterator[Line]:
            for line in super().__iter__():
                taken.append(line)
                yield line

    def several(self: Any, sounds: Any, **_: Any) -> list[Transcript]:
        held.append(len(taken) - len(held) - 1)
        return [Transcript("")]

    monkeypatch.setattr(Transcriber, "several", several)
    path = write_wav(tmp_path / "a.wav", sweep(1.2).numpy())
    lines = Taken(Line(path, f"list.jsonl:{number}", "en", "") for number in range(20))
    assert sum(map(len, hear(transcriber, lines, [0.4] * 19 + [longest]))) == 20
    assert max(held) == most


@pytest.mark.parametrize("late", [False, True])
def test_bad_files_stop_an_evaluation_or_are_left_out(
    folder: Path, tmp_path: Path, late: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those whose header shows it before anything is heard, others when they are read."""
    listed = write_list(tmp_path)
    bad = tmp_path / "1.wav"
    if late:
        bad.write_bytes(bad.read_bytes()[:44])
    else:
        bad.write_text("no sound at all" * 20)
    with pytest.raises(UserError, match=r"list\.jsonl:2: .*1\.wav.* \(--on-bad skip leaves such files out\)"):
        run(folder, listed)
    run(folder, listed, on_bad="skip", out=tmp_path / "out.jsonl")
    said = capsys.readouterr()
    assert "2 sounds (1 skipped): WER" in said.out and "1.wav" in said.err
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == ["text 0", "text 2"]


def test_a_list_without_texts_is_refused_before_anything_is_heard(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"list\.jsonl: all texts are empty, there is no rate of errors"):
        run(folder, write_list(tmp_path, 1, text=" "), out=tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))


def test_a_language_that_is_none_is_refused_before_anything_is_heard(folder: Path, tmp_path: Path) -> None:
    listed = write_list(tmp_path, 1, language="xx")
    with pytest.raises(UserError, match=r"list\.jsonl:1: language 'xx': the tokenizer knows no such language"):
        run(folder, listed, out=tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))
