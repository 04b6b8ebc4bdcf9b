"""Documents, order, packing, and loading that resumes exactly under any layout."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
import torch
from mindspeed_model_core.data import IGNORE, PackedText, RandomText, SlotLoader, TextData, documents, order, packing
from mindspeed_model_core.data.documents import open_documents
from mindspeed_model_core.data.shuffle import shuffled
from mindspeed_model_core.errors import UserError

BOS, EOS, LENGTH, BATCH = 1, 2, 16, 8


class Letters:
    """A tokenizer of one token a byte."""

    bos_token_id, eos_token_id, name_or_path = BOS, EOS, "letters"

    def encode(self, text: str, **options: Any) -> list[int]:
        assert options == {"add_special_tokens": False, "split_special_tokens": True, "verbose": False}
        return [3 + byte for byte in text.encode()]

    def get_vocab(self) -> dict[str, int]:
        return {chr(byte): 3 + byte for byte in range(256)}


def texts(count: int = 21) -> list[str]:
    """Documents of 0 to 70 letters: shorter than a sequence of 16, exactly its length, and several times longer."""
    lengths = [(i * 13) % 71 for i in range(count)]
    return [f"{i:02d}".join(["", *["abcdefgh"] * 8])[:n] for i, n in enumerate(lengths)]


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()), encoding="utf-8")
    return str(file)


@pytest.fixture
def windows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same documents in files of which not all is held: Parquet in groups of 3, some lines, windows of about 7."""
    monkeypatch.setattr(documents, "_ROW_GROUP_BUDGET", 200)
    monkeypatch.setattr(documents, "_PIECE", 2)
    monkeypatch.setattr(order, "WINDOW", 300)
    folder = tmp_path / "windows"
    folder.mkdir()
    for number, part in enumerate((texts()[:10], texts()[10:16])):
        table = pa.table({"text": part})
        parquet.write_table(table, folder / f"{number}.parquet", row_group_size=3, use_dictionary=False)
    (folder / "2.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts()[16:]))
    return str(folder)


def loader(path: str, *, rank: int = 0, ranks: int = 1, micro: int = 1, seed: int = 5, **data: Any) -> PackedText:
    section = TextData(path=path, sequence_length=LENGTH, **data)
    return PackedText(section, Letters(), global_batch=BATCH, micro_batch=micro, seed=seed, rank=rank, ranks=ranks)


Row = tuple[list[int], list[int], list[int]]


def rows(batch: dict[str, Any], micro: int) -> list[Row]:
    """Cut a micro-batch into its samples' tokens, labels and positions."""
    parts = [batch[key].view(micro, LENGTH).tolist() for key in ("tokens", "labels", "positions")]
    return list(zip(*parts, strict=True))


def steps(loaders: list[Any], micro: int, count: int, states: list[Any] | None = None) -> list[list[Row]]:
    """Run all ranks' loaders and put each step's samples in the order of their slots."""
    iterators = [iter(each) for each in loaders]
    out = []
    for _ in range(count):
        per_rank = [next(iterator) for iterator in iterators]
        micro_batches = zip(*per_rank, strict=True)
        out.append([row for group in micro_batches for batch in group for row in rows(batch, micro)])
        if states is not None:
            states.append(merged(loaders))
    return out


def merged(loaders: list[Any]) -> dict[str, Any]:
    """Merge the ranks' positions, through JSON as a checkpoint does."""
    parts = [json.loads(json.dumps(each.state_dict())) for each in loaders]
    slots = {key: value for part in parts for key, value in part["slots"].items()}
    assert sum(len(part["slots"]) for part in parts) == len(slots) == BATCH
    return {**parts[0], "slots": slots}


LAYOUTS = [(1, 0, 1), (1, 2, 2), (2, 0, 2), (2, 2, 1), (4, 0, 1), (4, 2, 2), (1, 3, 1)]  # ranks, workers, micro


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize(("ranks", "workers", "micro"), LAYOUTS)
@pytest.mark.parametrize("kind", ["corpus", "windows"])
def test_order_and_exact_resume_depend_on_no_layout(
    kind: str, ranks: int, workers: int, micro: int, request: pytest.FixtureRequest
) -> None:
    corpus, total = request.getfixturevalue(kind), 8
    reference_states: list[Any] = []
    reference = steps([loader(corpus)], 1, total, reference_states)
    assert max(place[0] for place in reference_states[-1]["slots"].values()) >= 1, "the run must cross an epoch"
    assert max(place[2] for place in reference_states[0]["slots"].values()) > LENGTH // 2, "and cut documents"

    def group() -> list[PackedText]:
        return [loader(corpus, rank=r, ranks=ranks, micro=micro, workers=workers) for r in range(ranks)]

    states: list[Any] = []
    fresh = group()
    assert merged(fresh) == merged([loader(corpus)])
    assert steps(fresh, micro, total, states) == reference
    # Prefetched samples were never yielded, and leave no trace in the position.
    assert states == reference_states
    for done in range(1, total):
        resumed = group()
        for each in resumed:
            each.load_state_dict(reference_states[done - 1])
        assert steps(resumed, micro, total - done) == reference[done:], f"resumed after step {done}"


def test_a_loader_iterated_again_goes_on_where_it_stopped(corpus: str) -> None:
    reference = steps([loader(corpus)], 1, 4)
    once = loader(corpus, workers=2)
    assert steps([once], 1, 2) + steps([once], 1, 2) == reference


def test_streams_are_the_documents_and_every_one_is_read_once_an_epoch(corpus: str) -> None:
    ours = loader(corpus)
    per_slot: list[list[Row]] = list(zip(*steps([ours], 1, 30), strict=True))  # type: ignore[arg-type]
    documents = [[BOS, *(3 + byte for byte in text.encode()), EOS] for text in texts()]
    for slot, samples in enumerate(per_slot):
        want: list[int] = []
        labels: list[int] = []
        for epoch in range(200):
            numbers = [shuffled(i, len(documents), 5, epoch) for i in range(len(documents))]
            assert sorted(numbers) == list(range(len(documents)))
            for number in numbers[slot::BATCH]:
                want += documents[number]
                labels += [*documents[number][1:], IGNORE]
            if len(want) > 30 * LENGTH:
                break
        assert [t for row in samples for t in row[0]] == want[: 30 * LENGTH]
        assert [t for row in samples for t in row[1]] == labels[: 30 * LENGTH]


def test_groups_are_shuffled_and_documents_inside_windows_of_them(windows: str) -> None:
    found = open_documents(windows)
    groups = found.groups()
    assert groups is not None and [group.documents for group in groups] == [3, 3, 3, 1, 3, 3, 2, 2, 1]
    starts = np.cumsum([0, *(group.documents for group in groups)])
    seen = set()
    for epoch in range(3):
        plan = order.Order(len(found), groups, 5)
        numbers = [plan.document(epoch, place) for place in range(len(found))]
        assert sorted(numbers) == list(range(len(found)))
        place, sizes = 0, []
        while place < len(found):
            end = plan.window_end(epoch, place)
            assert all(plan.window_end(epoch, each) == end for each in range(place, end))
            held = {int(np.searchsorted(starts, number, "right")) - 1 for number in numbers[place:end]}
            assert sum(groups[group].documents for group in held) == end - place, "a window is made of whole groups"
            nbytes = sum(groups[group].nbytes for group in held)
            assert len(held) == 1 or nbytes <= order.WINDOW
            sizes.append(end - place)
            place = end
        assert len(sizes) > 2
        seen.add(tuple(numbers))
        assert numbers != sorted(numbers)
    assert len(seen) == 3
    plain = order.Order(len(found), groups, None)
    assert [plain.document(1, place) for place in range(len(found))] == list(range(len(found)))
    # Saved positions mean these documents: the order may not change between versions.
    small = order.Order(9, [order.Group(3, 120)] * 3, 0)
    assert [small.document(0, place) for place in range(9)] == [
        6,
        0,
        8,
        1,
        2,
        7,
        3,
        5,
        4,
    ]


def test_a_group_is_decoded_once_a_slot_and_epoch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However far slots have drifted apart, a document does not cost a group."""
    lines = [f"{i:03d} " + "x" * (i % 40) for i in range(80)]
    parquet.write_table(pa.table({"text": lines}), tmp_path / "a.parquet", row_group_size=10, use_dictionary=False)
    assert open_documents(str(tmp_path)).groups() is None, "what fits is shuffled as a whole"
    monkeypatch.setattr(documents, "_ROW_GROUP_BUDGET", 300)
    monkeypatch.setattr(order, "WINDOW", 600)
    decoded = []
    whole = documents._Table._decode
    monkeypatch.setattr(documents._Table, "_decode", lambda self, n: decoded.append(n) or whole(self, n))
    section = TextData(path=str(tmp_path), sequence_length=LENGTH)
    ours = PackedText(section, Letters(), global_batch=2, micro_batch=1, seed=5, rank=0, ranks=1)
    streams = [ours.source.stream(0, [0, 0, 0]), ours.source.stream(1, [0, 41, 0])]
    epoch = 0
    while epoch < 2:
        _, (epoch, _, _) = next(streams[0])
        next(streams[1])
    assert len(decoded) <= 1 + 2 * 8 * 3


def test_shuffle_false_keeps_the_files_order(corpus: str) -> None:
    first = steps([loader(corpus, shuffle=False)], 1, 1)[0]
    for slot in range(BATCH):
        text = texts()[slot].encode()[: LENGTH - 1]
        assert first[slot][0][: 1 + len(text)] == [BOS, *(3 + byte for byte in text)]
    assert steps([loader(corpus, shuffle=False)], 1, 2) != steps([loader(corpus)], 1, 2)
    assert steps([loader(corpus, seed=6)], 1, 2) != steps([loader(corpus)], 1, 2)


def test_packing_labels_and_positions() -> None:
    queue = iter([np.array([1, 20, 2], np.int32), np.array([1, 30, 31, 32, 33, 34, 2], np.int32)])
    document = np.array([1, 10, 11, 2], np.int32)
    first, document, offset = packing.fill(document, 2, 8, lambda: next(queue))
    second, _, end = packing.fill(document, offset, 4, lambda: next(queue))
    assert (offset, end) == (3, 7)
    batch = packing.pack([first])
    assert batch["tokens"].tolist() == [11, 2, 1, 20, 2, 1, 30, 31]
    # A document's last token has no label; a document cut by the sequence's end has the token beyond it.
    assert batch["labels"].tolist() == [2, IGNORE, 20, 2, IGNORE, 30, 31, 32]
    assert batch["positions"].tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    assert batch["lengths"] == (2, 3, 3)
    assert second.tokens.tolist() == [32, 33, 34, 2] and second.labels.tolist() == [33, 34, 2, IGNORE]
    both = packing.pack([first, packing.Packed(second.tokens, second.labels, second.lengths)])
    assert both["lengths"] == (2, 3, 3, 4) and both["positions"].tolist()[8:] == [0, 1, 2, 3]
    assert {batch[key].dtype for key in ("tokens", "labels", "positions")} == {torch.int64}


def test_shuffle_is_a_bijection_that_never_changes() -> None:
    for size in (1, 2, 3, 4, 5, 16, 17, 1000):
        assert sorted(shuffled(i, size, 3, 1) for i in range(size)) == list(range(size))
    order = [shuffled(i, 1000, 0, 0) for i in range(1000)]
    assert order != [shuffled(i, 1000, 0, 1) for i in range(1000)] != [shuffled(i, 1000, 1, 0) for i in range(1000)]
    assert abs(np.corrcoef(order, range(1000))[0, 1]) < 0.1
    # Saved positions mean these documents: the order may not change between versions.
    assert [shuffled(i, 12, 0, 0) for i in range(12)] == [9, 2, 3, 11, 1, 6, 0, 7, 10, 8, 5, 4]


def test_documents_of_every_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf\n\nfirst line\nsecond line\n\n \t\n\nnext\r\n\r\nlast, no end")
    (tmp_path / "b.jsonl").write_text(
        '\n{"text": "one\\n\\ntwo"}\n\n  {"text": "\u00e9\u4f60", "id": 3}\r\n{"text": ""}'
    )
    (tmp_path / "deeper").mkdir()
    column = pa.table({"text": [f"row {i}" for i in range(10)], "id": list(range(10))})
    parquet.write_table(column, tmp_path / "deeper" / "c.parquet", row_group_size=4)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "readme.md").write_text("not text to read")
    found = open_documents(str(tmp_path))
    want = ["first line\nsecond line", "next", "last, no end", "one\n\ntwo", "\u00e9\u4f60", ""]
    want += [f"row {i}" for i in range(10)]
    assert [found[i] for i in range(len(found))] == want
    assert [found[i] for i in (15, 0, 12, 5)] == ["row 9", want[0], "row 6", ""]
    with pytest.raises(IndexError):
        found[16]
    globbed = open_documents(str(tmp_path / "**" / "*.parquet"))
    assert len(globbed) == 10
    again = pickle.loads(pickle.dumps(found))
    assert [again[i] for i in range(len(again))] == want


def test_documents_stay_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "word " * 20_000
    (tmp_path / "a.jsonl").write_text((json.dumps({"text": text}) + "\n") * 20)
    (tmp_path / "b.txt").write_text((text + "\n\n") * 20)
    parquet.write_table(
        pa.table({"text": [text + str(i) for i in range(20)]}), tmp_path / "c.parquet", row_group_size=1
    )
    monkeypatch.setattr(documents, "_ROW_GROUP_BUDGET", 3 * len(text))
    found = open_documents(str(tmp_path))
    assert len(found) == 60 and all(found[i].startswith(text.strip()) for i in range(60))
    assert len(pickle.dumps(found)) < 5_000
    table = found.files[-1]
    assert 1 <= len(table.decoded.held) <= 3  # type: ignore[attr-defined]


def bad(tmp_path: Path, name: str, content: str | bytes) -> str:
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(file)


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "key", "message"),
    [
        ("a.jsonl", GOOD + "\n" + "{oops\n" + GOOD, "text", "a.jsonl:3: not a JSON object"),
        ("a.jsonl", GOOD * 2 + "[1]\n", "text", "a.jsonl:3: expected a JSON object, got list"),
        ("a.jsonl", '{"txt": "x"}\n', "text", "a.jsonl:1: no key 'text'; did you mean 'txt'?"),
        ("a.jsonl", GOOD + '{"text": 5}\n', "text", "a.jsonl:2: 'text' must hold text, got int"),
        (
            "a.jsonl",
            GOOD + '{"text": "hello \\ud83d world"}\n',
            "text",
            r"a.jsonl:2: 'text' holds \ud83d, half a character",
        ),
        (
            "a.jsonl",
            GOOD + '{"text": ' + "[" * 100_000 + "\n",
            "text",
            "a.jsonl:2: not a JSON object (maximum recursion",
        ),
        ("a.txt", b"good\n\nbad \xff here\n", "text", "a.txt:3: not UTF-8"),
        ("a.csv", "x", "text", "a.csv: cannot read a .csv file"),
        ("a.txt", " \n\n", "text", "holds no document"),
        ("a.parquet", "nonsense", "text", "a.parquet: not a readable Parquet file"),
    ],
)
def test_a_bad_file_is_named_with_its_line(tmp_path: Path, name: str, content: str, key: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        found = open_documents(bad(tmp_path, name, content), key)
        for i in range(len(found)):
            found[i]
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_wrong_place_is_named(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"content": ["x", None]}), tmp_path / "t.parquet")
    (tmp_path / "empty").mkdir()
    for path, key, message in (
        (tmp_path / "t.parket", "content", "did you mean 't.parquet'?"),
        (tmp_path / "t.parquet", "contents", "no column 'contents'; did you mean 'content'?"),
        (tmp_path / "empty", "text", "no .txt, .jsonl, .parquet file"),
        (tmp_path / "*.jsonl", "text", "no such file or folder"),
    ):
        with pytest.raises(UserError, match="^[^\n]*$") as caught:
            open_documents(str(path), key)
        assert message in str(caught.value)
    with pytest.raises(UserError, match="row 1: 'content' must hold text, got NoneType"):
        open_documents(str(tmp_path / "t.parquet"), "content")[1]
    text = pa.StringArray.from_buffers(2, pa.py_buffer(np.array([0, 2, 4], np.int32)), pa.py_buffer(b"okb\xff"))
    parquet.write_table(pa.table({"content": text}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet: row 1: 'content' is not UTF-8 text"):
        open_documents(str(tmp_path / "b.parquet"), "content")[1]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_mistake_found_while_reading_is_one_line_and_comes_in_order(tmp_path: Path, workers: int) -> None:
    lines = [json.dumps({"text": "x" * LENGTH})] * BATCH * 3
    lines[BATCH * 2 + 3] = "{broken"
    path = bad(tmp_path, "late.jsonl", "\n".join(lines))
    ours = loader(path, shuffle=False, workers=workers)
    batches = iter(ours)
    for _ in range(2):
        next(batches)
    state = ours.state_dict()
    with pytest.raises(UserError) as caught:
        for _ in range(2):
            next(batches)
            state = ours.state_dict()
    assert str(caught.value).startswith(f"{path}:{BATCH * 2 + 4}: not a JSON object")
    assert "\n" not in str(caught.value)
    assert ours.state_dict() == state


def test_refusals(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="data.path: this field is required"):
        PackedText(TextData(), Letters(), global_batch=2, micro_batch=1, seed=0, rank=0, ranks=1)
    with pytest.raises(
        UserError, match=r"21 documents for global_batch=24.*; lower global_batch to 20 or less, or add"
    ):
        PackedText(TextData(path=corpus), Letters(), global_batch=24, micro_batch=2, seed=0, rank=0, ranks=2)
    with pytest.raises(UserError, match=r"21 documents for global_batch=24, each .* reads its own; add"):
        PackedText(TextData(path=corpus), Letters(), global_batch=24, micro_batch=24, seed=0, rank=0, ranks=1)
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "fine"}\n{"text": "cut off\n')
    with pytest.raises(UserError, match=r"broken.jsonl:2: not a JSON object"):
        PackedText(TextData(path=str(broken)), Letters(), global_batch=24, micro_batch=1, seed=0, rank=0, ranks=1)
    with pytest.raises(UserError, match=r"global_batch=8: must be a multiple of micro_batch=1 x 3 data ranks; try 9"):
        loader(corpus, ranks=3)
    other = loader(corpus).state_dict()
    del other["slots"]["7"]
    with pytest.raises(UserError, match=r"saved data position is of 7 slots; resume with global_batch=7"):
        loader(corpus).load_state_dict(other)
    longer = loader(corpus).state_dict()
    longer["slots"]["0"] = [0, 0, 9999]
    ours = loader(corpus)
    ours.load_state_dict(longer)
    with pytest.raises(UserError, match="token 9999 of a document"):
        next(iter(ours))


class Shouting(Letters):
    def get_vocab(self) -> dict[str, int]:
        return {key.upper(): value for key, value in super().get_vocab().items()}


def test_a_position_holds_for_the_same_data_and_tokenizer_only(corpus: str, tmp_path: Path) -> None:
    state = loader(corpus).state_dict()
    moved = tmp_path / "elsewhere" / "corpus.jsonl"
    moved.parent.mkdir()
    moved.write_bytes(Path(corpus).read_bytes())
    loader(str(moved)).load_state_dict(state)
    loader(corpus).load_state_dict({"slots": state["slots"]})  # as saved by an earlier version

    def refused(ours: PackedText, message: str) -> None:
        with pytest.raises(UserError, match=message):
            ours.load_state_dict(state)

    moved.write_text(moved.read_text().replace("abc", "xyz"))
    refused(loader(str(moved)), r"data.path \(content\): is .* when the run was saved; resume with")
    moved.write_text(moved.read_text() + '{"text": "one more"}\n')
    refused(loader(str(moved)), r"data.path \(documents\): is 22 now and was 21")
    refused(loader(corpus, shuffle=False), r"data.shuffle: is False now and was True")
    shouting = PackedText(
        TextData(path=corpus, sequence_length=LENGTH),
        Shouting(),
        global_batch=BATCH,
        micro_batch=1,
        seed=5,
        rank=0,
        ranks=1,
    )
    refused(shouting, r"data.tokenizer \(content\): is ")
    longer = PackedText(
        TextData(path=corpus, sequence_length=2 * LENGTH),
        Letters(),
        global_batch=BATCH,
        micro_batch=1,
        seed=5,
        rank=0,
        ranks=1,
    )
    refused(longer, f"data.sequence_length: is {2 * LENGTH} now and was {LENGTH}")


def test_loading_leaves_the_random_state_alone(corpus: str) -> None:
    for workers in (0, 2):
        before = torch.get_rng_state()
        next(iter(loader(corpus, workers=workers)))
        assert torch.equal(before, torch.get_rng_state())


class Environment:
    def start(self, slot: int) -> list[int]:
        return [0]

    def stream(self, slot: int, position: list[int]) -> Iterator[tuple[Any, list[int]]]:
        while True:
            yield (slot, os.getpid(), os.environ.get("TOKENIZERS_PARALLELISM")), [0]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_own_disjoint_slots_and_keep_tokenizers_single_threaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    ours = SlotLoader(Environment(), lambda s: {"seen": s}, global_batch=12, micro_batch=2, rank=1, ranks=2, workers=4)
    batches = next(iter(ours))
    seen = [each for batch in batches for each in batch["seen"]]
    assert [slot for slot, _, _ in seen] == [2, 3, 6, 7, 10, 11]
    processes = [process for _, process, _ in seen]
    assert len(set(processes)) == 4 and os.getpid() not in processes
    assert processes[4:] == processes[:2]
    assert {setting for _, _, setting in seen} == {"false"}


def random_text(rank: int = 0, ranks: int = 1, mean: int | None = 5, seed: int = 0) -> RandomText:
    return RandomText(
        vocab_size=50,
        sequence_length=LENGTH,
        mean_document=mean,
        global_batch=BATCH,
        micro_batch=2,
        seed=seed,
        rank=rank,
        ranks=ranks,
    )


def test_random_text_is_the_same_under_any_ranks_and_resumes() -> None:
    states: list[Any] = []
    reference = steps([random_text()], 2, 5, states)
    assert reference[0] != reference[1] and reference[0][0] != reference[0][1]
    assert steps([random_text(r, 4) for r in range(4)], 2, 5) == reference
    assert steps([random_text(seed=1)], 2, 5) != reference
    resumed = [random_text(r, 2) for r in range(2)]
    for each in resumed:
        each.load_state_dict(states[2])
    assert steps(resumed, 2, 2) == reference[3:]


def test_random_text_has_the_asked_document_lengths_and_tokens() -> None:
    shape: dict[str, int] = {"vocab_size": 7, "sequence_length": 20_000, "mean_document": 50}
    (batch,) = next(iter(RandomText(**shape, global_batch=1, micro_batch=1, seed=0, rank=0, ranks=1)))
    assert 40 < np.mean(batch["lengths"]) < 60
    assert set(batch["tokens"].tolist()) == set(range(7))
    assert int((batch["labels"] == IGNORE).sum()) in (len(batch["lengths"]), len(batch["lengths"]) - 1)
    whole = next(iter(random_text(mean=None)))[0]
    assert whole["lengths"] == (LENGTH, LENGTH)
    assert int((whole["labels"] == IGNORE).sum()) == 0


def test_paths_are_not_part_of_the_digest() -> None:
    fields = {
        name: (field.json_schema_extra or {}).get("digest", True)  # type: ignore[union-attr]
        for name, field in TextData.model_fields.items()
    }
    assert {name for name, counts in fields.items() if not counts} == {"path", "tokenizer", "workers"}
