"""Generation: equal to full recomputation and to transformers, streaming, in batches and in conversation."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mindspeed_model_core import cli, generation, weights
from mindspeed_model_core.data import load_tokenizer, train_tokenizer
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.generation import Decoder, Sampler, begin, complete, decode
from mindspeed_model_llama2 import MODEL
from mindspeed_model_llama2.generate import Llama2Chat, load_net
from torch import Tensor, nn
from typer.testing import CliRunner

CPU = torch.device("cpu")
TEXT = "The little model reads a text, and says what it has read: naïve café 你好 \U0001f600!"


@pytest.fixture(scope="module", params=[4, 2], ids=["mha", "gqa"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub folder that transformers wrote, with weights wide enough for varied text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    target = tmp_path_factory.mktemp("hub") / "tiny"
    train_tokenizer([TEXT] * 4, 340, target)
    torch.manual_seed(request.param)
    config = LlamaConfig(
        vocab_size=340, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=request.param, max_position_embeddings=128, rms_norm_eps=1e-5, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=False, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(str(target))
    return target


@pytest.fixture(scope="module")
def net(folder: Path) -> Any:
    return load_net(folder, CPU, torch.float32)


@pytest.fixture(scope="module")
def words(folder: Path) -> Any:
    return load_tokenizer(folder)


def ids_of(net: Any, prompt: list[int], count: int, **sampling: Any) -> list[int]:
    return [token for (token,) in decode(net, torch.tensor([prompt]), Sampler(**sampling), count)]


@torch.no_grad()
def whole(net: Any, rows: Tensor) -> Tensor:
    """Return the logits after each row, without a cache."""
    count, length = rows.shape
    batch = {"tokens": rows.flatten(), "positions": torch.arange(length).repeat(count), "lengths": (length,) * count}
    return net(batch).unflatten(0, (count, length))[:, -1]


def test_greedy_equals_transformers(folder: Path, net: Any) -> None:
    from transformers import LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    for seed in range(3):
        prompt = torch.randint(3, 340, (1, 3 + 5 * seed), generator=torch.Generator().manual_seed(seed))
        theirs = reference.generate(prompt, max_new_tokens=40, do_sample=False, pad_token_id=2)[0, prompt.shape[1] :]
        ours = ids_of(net, prompt[0].tolist(), 40)
        assert ours == theirs.tolist()
        assert len(set(ours)) > 5, "the comparison says little about a constant output"


@pytest.mark.parametrize("part", [512, 3])
def test_cached_logits_equal_full_recomputation(net: Any, monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(generation, "_PREFILL", part)
    rows = torch.randint(3, 340, (2, 40), generator=torch.Generator().manual_seed(1))
    decoder = Decoder(net, 2, 40)
    start = 0
    for end in (10, 11, 12, 20, 40):
        torch.testing.assert_close(decoder.feed(rows[:, start:end]), whole(net, rows[:, :end]), rtol=1e-4, atol=1e-4)
        start = end
    assert decoder.cache.length == 40
    decoder.cache.truncate(11)
    torch.testing.assert_close(decoder.feed(rows[:, 11:20]), whole(net, rows[:, :20]), rtol=1e-4, atol=1e-4)


def test_a_batch_equals_its_rows(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = torch.randint(3, 340, (3, 7), generator=torch.Generator().manual_seed(2))
    free = [ids_of(net, prompt, 20) for prompt in prompts.tolist()]
    # A token that the first row alone says becomes the end token: the others go on.
    end = next(token for token in free[0][4:] if not any(token in row for row in free[1:]))
    monkeypatch.setattr(net, "config", net.config.model_copy(update={"eos_token_id": end}))
    stop = free[0].index(end) + 1
    rows = list(zip(*decode(net, prompts, Sampler(), 20), strict=True))
    assert [list(row) for row in rows] == [free[0][:stop] + [end] * (20 - stop), *free[1:]] and stop < 20
    assert len(list(decode(net, prompts[:1].repeat(2, 1), Sampler(), 20))) == stop


def test_generation_stays_within_the_context(net: Any) -> None:
    prompt = list(range(3, 123))
    ours = ids_of(net, prompt, 50)
    assert len(ours) == 8 or ours[-1] == 2
    with pytest.raises(UserError, match="the prompt has 128 tokens; the model's context is 128"):
        ids_of(net, [5] * 128, 1)
    with pytest.raises(UserError, match="max_new_tokens=0"):
        ids_of(net, [5], 0)


# ---------------------------------------------------------------------------------------------- text, not tokens


class Scripted(nn.Module):
    """A network that says what it is told: after each prompt of ``answers``' turn, that answer and the end token."""

    def __init__(self, words: Any, answers: list[str], context: int = 200) -> None:
        super().__init__()
        self.config = SimpleNamespace(
            num_hidden_layers=1, num_key_value_heads=1, head_dim=2, max_position_embeddings=context, bos_token_id=1,
            eos_token_id=2,
        )  # fmt: skip
        self.head = nn.Linear(1, 340)
        self.answers = [[*words.encode(answer, add_special_tokens=False), 2] for answer in answers]
        self.read: list[int] = []
        self.calls: list[int] = []
        self.coming: list[int] = []

    def forward(self, batch: dict[str, Any]) -> Tensor:
        tokens, cache = batch["tokens"].tolist(), batch["cache"]
        assert batch["positions"].tolist() == list(range(cache.length, cache.length + len(tokens)))
        assert batch["lengths"] == (len(tokens),)
        self.read = self.read[: cache.length] + tokens
        self.calls.append(len(tokens))
        if len(tokens) > 1:
            self.coming = list(self.answers.pop(0))
        cache.advance(len(tokens))
        logits = torch.zeros(len(tokens), 340)
        logits[-1, self.coming.pop(0)] = 9
        return logits


def test_generate_streams_until_the_end_token(words: Any) -> None:
    scripted: Any = Scripted(words, [TEXT])
    pieces = list(generation.generate(scripted, words, "Say", max_new_tokens=150))
    assert "".join(pieces) == " " + TEXT and len(pieces) > 5
    assert scripted.calls[1:] == [1] * (len(scripted.calls) - 1), "the prompt was read again"
    scripted = Scripted(words, [TEXT])
    assert " ".join(generation.generate(scripted, words, "Say", max_new_tokens=1)).strip() in TEXT
    assert len(scripted.calls) == 1


def test_complete_equals_one_by_one(net: Any, words: Any) -> None:
    prompts = ["The little", "a text and", "reads", "The model", "says what it has read"]
    assert len({len(begin(words, prompt)) for prompt in prompts}) < len(prompts)
    together = complete(net, words, prompts, max_new_tokens=12)
    assert together == ["".join(generation.generate(net, words, prompt, max_new_tokens=12)) for prompt in prompts]


def turns(words: Any, *parts: str) -> list[int]:
    """Return the tokens of question, answer, question, ... as Meta's format has them."""
    out: list[int] = []
    for i, part in enumerate(parts):
        out += [1, *words.encode(part, add_special_tokens=False)] if i % 2 == 0 else part_ids(words, part)
    return out


def part_ids(words: Any, answer: str) -> list[int]:
    return [*words.encode(answer, add_special_tokens=False), 2]


def test_a_chat_has_metas_format_and_reads_each_turn_once(words: Any) -> None:
    scripted: Any = Scripted(words, ["reads a text", "says"])
    chat = Llama2Chat(scripted, words, Sampler(), system="Be little.")
    assert "".join(chat.say("  The model? ")) == "reads a text"
    first = "[INST] <<SYS>>\nBe little.\n<</SYS>>\n\nThe model? [/INST]"
    assert "".join(chat.say("And?")) == "says"
    want = turns(words, first, "reads a text", "[INST] And? [/INST]", "says")
    assert scripted.read == want[:-1], "the last end token waits for the next turn"
    assert sum(scripted.calls) == len(scripted.read)
    chat.reset()
    scripted.answers = [part_ids(words, "says")]
    assert "".join(chat.say("Again")) == "says" and scripted.read[: len(want) // 2] != want[: len(want) // 2]
    assert scripted.read[: len(turns(words, first)) - 4][-4:] != [] and chat.decoder.cache.length == len(scripted.read)


def test_an_unfinished_answer_is_ended_before_the_next_turn(words: Any) -> None:
    for cut in ("stop reading", "token limit"):
        scripted: Any = Scripted(words, ["reads a text", "says"])
        chat = Llama2Chat(scripted, words, Sampler(), max_new_tokens=3 if cut == "token limit" else 100)
        answer = chat.say("Go")
        said = list(answer) if cut == "token limit" else [next(answer), next(answer)]
        answer.close()
        shown = begin(words, "[INST] Go [/INST]")
        given = scripted.read[len(shown) :] + chat.pending
        assert words.decode(given).strip() == "".join(said).strip() != "reads a text"
        list(chat.say("On"))
        want = [*shown, *given, 2, *begin(words, "[INST] On [/INST]")]
        assert scripted.read[: len(want)] == want


def test_a_chat_that_fills_the_context_says_so_and_can_begin_anew(words: Any) -> None:
    scripted: Any = Scripted(words, ["says"] * 9, context=60)
    chat = Llama2Chat(scripted, words, Sampler())
    with pytest.raises(
        UserError, match=r"would have \d+ tokens and the model's context is 60; begin a new one with /reset"
    ):
        for _ in range(9):
            list(chat.say("And what?"))
    held = chat.decoder.cache.length
    assert 0 < held <= 60
    with pytest.raises(UserError):
        list(chat.say("And what?"))
    assert chat.decoder.cache.length == held
    chat.reset()
    assert "".join(chat.say("And what?")) == "says"


def test_a_failed_read_leaves_the_cache_as_it_was(net: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "_PREFILL", 4)
    decoder = Decoder(net, 1, 10)
    rows = torch.arange(3, 15)[None]
    first = decoder.feed(rows[:, :2])
    with pytest.raises(ValueError, match="the cache holds 10"):
        decoder.feed(rows[:, 2:])
    assert decoder.cache.length == 2
    decoder.cache.truncate(0)
    torch.testing.assert_close(decoder.feed(rows[:, :2]), first)


def test_a_cached_chat_equals_reading_it_all_again(net: Any, words: Any) -> None:
    chat = Llama2Chat(net, words, Sampler(), max_new_tokens=6)
    for text in ("The little", "model"):
        list(chat.say(text))
    held = chat.decoder.cache.length
    tokens: list[int] = []
    again = Llama2Chat(net, words, Sampler(), max_new_tokens=6)
    original = again.decoder.feed

    def record(part: Tensor) -> Tensor:
        tokens.extend(part[0].tolist())
        got = original(part)
        torch.testing.assert_close(got, whole(net, torch.tensor([tokens])), rtol=1e-4, atol=1e-4)
        return got

    again.decoder.feed = record  # type: ignore[method-assign]
    for text in ("The little", "model"):
        list(again.say(text))
    assert len(tokens) == held


# ---------------------------------------------------------------------------------------------- the command


def command(*words: str, text: str | None = None) -> Any:
    return CliRunner().invoke(cli.app(MODEL), ["generate", *words], input=text, env={"COLUMNS": "120"})


def plain(text: str) -> str:
    return " ".join(re.sub(r"\x1b\[[0-9;]*m|[│╭╮╰╯─]", " ", text).split())


def test_the_command_continues_prompts(folder: Path, net: Any, words: Any) -> None:
    common = ("--device", "cpu", "--max-new-tokens", "8")
    ran = command(str(folder), "--prompt", "The [b]little", "--prompt", "model", "--temperature", "0", *common)
    assert ran.exit_code == 0, ran.output
    want = "".join(
        f"{p}{''.join(generation.generate(net, words, p, max_new_tokens=8))}\n" for p in ("The [b]little", "model")
    )
    assert ran.stdout == want
    first, again, other = (command(str(folder), "--prompt", "The", *common, "--seed", s).stdout for s in "001")
    assert first == again != other


def test_the_command_reads_every_source(folder: Path, tmp_path: Path) -> None:
    common = ("--device", "cpu", "--max-new-tokens", "8", "--temperature", "0", "--prompt", "The")
    want = command(str(folder), *common).stdout
    weights.convert(folder, tmp_path / "original", MODEL, "original")
    released = command(str(tmp_path / "original"), "--tokenizer", str(folder), *common)
    assert released.exit_code == 0 and released.stdout == want
    half = command(str(folder), *common, "--dtype", "bf16")
    assert half.exit_code == 0 and half.stdout.startswith("The")


def test_the_command_reads_a_run(folder: Path, tmp_path: Path) -> None:
    from mindspeed_model_core import train

    (tmp_path / "text.txt").write_text("\n\n".join(f"The little model {i}" for i in range(4)))
    config = weights.read_config(folder, MODEL)
    changes = config.model_dump(exclude={"bos_token_id", "eos_token_id"})
    recipe = MODEL.recipe(
        preset="tiny", config=changes, init_from=str(folder), steps=1, global_batch=1, precision="fp32",
        data={"path": str(tmp_path / "text.txt"), "sequence_length": 16}, metrics={"trackers": ()},
        optim={"lr": 1e-30, "weight_decay": 0.0},
    )  # fmt: skip
    train.run(recipe, MODEL, tmp_path / "run")
    common = ("--device", "cpu", "--max-new-tokens", "8", "--temperature", "0", "--prompt", "The")
    ran = command(str(tmp_path / "run"), *common)
    assert ran.exit_code == 0, ran.output
    assert ran.stdout == command(str(folder), *common).stdout


def test_the_command_converses(folder: Path) -> None:
    lines = "The little\n\n/nonsense\n/reset\nThe little\nmodel\n/exit\nnever\n"
    ran = command(str(folder), "--chat", "--device", "cpu", "--max-new-tokens", "4", "--temperature", "0", text=lines)
    assert ran.exit_code == 0, ran.output
    first, again = ran.stdout.split("/nonsense: no such command; /reset or /exit\n")
    assert first.strip() and again.startswith(first)
    assert "never" not in ran.stdout and "> " not in ran.stdout
    ended = command(str(folder), "--chat", "--device", "cpu", text="")
    assert ended.exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give either --prompt TEXT, to be continued, or --chat, to talk"),
        (("--prompt", "x", "--chat"), "give either --prompt"),
        (("--prompt", "x", "--system", "y"), "--system: is for --chat"),
        (("--prompt", "x", "--top-p", "0"), "top_p=0.0: must be above 0"),
        (("--prompt", "x", "--device", "gpu"), "device='gpu': not present on this machine"),
        (("--prompt", "x" * 500), "shorten it"),
    ],
)
def test_the_command_names_mistakes(folder: Path, options: tuple[str, ...], message: str) -> None:
    ran = command(str(folder), *options)
    assert ran.exit_code == 2 and message in plain(ran.stderr), ran.output
    assert "Traceback" not in ran.output


def test_the_command_needs_a_tokenizer_that_fits(folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    ran = command(str(tmp_path), "--prompt", "x", "--device", "cpu")
    assert ran.exit_code == 2 and "name a folder with one: --tokenizer DIR" in plain(ran.stderr)
    ran = command(str(tmp_path / "nowhere"), "--prompt", "x", "--device", "cpu")
    assert ran.exit_code == 2 and "no such folder" in plain(ran.stderr)


def test_help_teaches() -> None:
    ran = command("--help")
    for part in (
        "--prompt",
        "--chat",
        "--top-k",
        "--temperature",
        "Examples",
        "$ mindspeed-llama2 generate",
        "0: always",
    ):
        assert part in plain(ran.stdout), part
