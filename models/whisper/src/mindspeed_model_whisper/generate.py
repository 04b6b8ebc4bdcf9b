"""The ``transcribe`` command: transformers' search around this network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
import typer
from mindspeed_model_core import checkpoint
from mindspeed_model_core import device as devices
from mindspeed_model_core.data import load_tokenizer
from mindspeed_model_core.data.ahead import ahead
from mindspeed_model_core.data.audio import read_audio, seconds
from mindspeed_model_core.data.tokenizer import find_tokenizer
from mindspeed_model_core.errors import UserError
from mindspeed_model_core.frozen import quiet
from mindspeed_model_core.parallel.mesh import Mesh
from mindspeed_model_core.sampling import load_network, pick_dtype
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from .data import HOP, RATE, Prompts, log_mel
from .model import CrossAttention, DecoderBlock, EncoderBlock, SelfAttention, Whisper, positions
from .weights import GENERATION, generation_settings, read_generation

FALLBACK = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Temperatures tried one after the other while a text repeats itself or is unlikely (Radford et al. 2022, 4.5)."""
REPEATS, UNLIKELY, NO_SPEECH = 1.35, -1.0, 0.6


@dataclass(frozen=True)
class Transcript:
    """What was heard, and with timestamps from when to when, in seconds."""

    text: str
    segments: tuple[tuple[float, float, str], ...] = ()


class Transcriber:
    """Writes down what sounds of any length say; UserError for a language or a tokenizer the network does not have."""

    def __init__(self, net: Whisper, tokenizer: Any, settings: dict[str, Any]) -> None:
        self.net, self.prompts = net, Prompts(tokenizer, net.config)
        self.network = _in_transformers(net, settings)

    def __call__(
        self,
        audio: Tensor,
        *,
        language: str | None = None,
        task: str = "transcribe",
        timestamps: bool = False,
        beams: int = 1,
        advance: Callable[[float], None] = lambda _: None,
    ) -> Transcript:
        """Return the transcript of fp32 ``[samples]`` at 16 kHz; ``language`` None is heard from the sound.

        A sound longer than the network's 30 s is heard from timestamp to timestamp. The same sound has the same
        transcript. ``advance`` is told the seconds that were heard, as they are.
        """
        told: dict[str, Any] = {"timestamps": timestamps, "beams": beams, "advance": advance}
        return self.several([audio], language=language, task=task, **told)[0]

    def several(
        self,
        sounds: Sequence[Tensor],
        *,
        language: str | None,
        task: str,
        timestamps: bool = False,
        beams: int = 1,
        advance: Callable[[float], None] = lambda _: None,
    ) -> list[Transcript]:
        """Return the transcripts of sounds heard at once; one that is longer than the network's 30 s comes alone."""
        config = self.net.config
        self.prompts.before(language or self.anything, task, timestamps)
        told = {"language": language, "task": task} if config.multilingual else {}
        whole = max(-(-len(audio) // HOP) for audio in sounds)
        long = whole > config.frames
        if long and len(sounds) > 1:
            raise ValueError(f"{len(sounds)} sounds at once, one of {whole} frames: the network hears {config.frames}")
        mel = torch.stack([log_mel(audio, config.num_mel_bins, max(whole, config.frames)) for audio in sounds])
        place = next(self.net.parameters())
        thresholds = {
            "temperature": FALLBACK,
            "compression_ratio_threshold": REPEATS,
            "logprob_threshold": UNLIKELY,
            "no_speech_threshold": NO_SPEECH,
        }
        heard = 0.0

        def tell(places: Tensor) -> None:
            nonlocal heard
            now = float(places[0, 0]) * HOP / RATE
            advance(now - heard)
            heard = now

        with _listening(self.net), torch.inference_mode(), quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # above temperature 0 tokens are drawn
            found = self.network.generate(
                mel.to(place.device, place.dtype),
                attention_mask=torch.ones(len(mel), mel.shape[-1], dtype=torch.long, device=place.device),
                return_timestamps=timestamps or long,
                return_segments=True,
                num_beams=beams,
                monitor_progress=tell if long else None,
                **(thresholds if long else {}),
                **told,
            )
        advance(sum(map(len, sounds)) / RATE - heard)
        return [self._transcript(parts, timestamps) for parts in found["segments"]]

    @property
    def anything(self) -> str:
        """A language that the network knows."""
        return next(iter(self.prompts.languages))[2:-2] if self.net.config.multilingual else "en"

    def _transcript(self, parts: Sequence[Any], timestamps: bool) -> Transcript:
        segments = tuple(
            (round(float(part["start"]), 2), round(float(part["end"]), 2), self._decode(part["tokens"]))
            for part in parts
        )
        text = "".join(said for *_, said in segments).strip()
        return Transcript(text, segments if timestamps else ())

    def _decode(self, tokens: Tensor) -> str:
        words = [int(token) for token in tokens if int(token) < self.net.config.eos_token_id]
        return str(self.prompts.tokenizer.decode(words))


def _in_transformers(net: Whisper, settings: dict[str, Any]) -> Any:
    """Return transformers' Whisper whose forward passes are this network's."""
    from transformers import GenerationConfig, WhisperConfig, WhisperForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

    class Encoder(nn.Module):
        # What transformers reads of the convolutions.
        conv1, conv2 = SimpleNamespace(stride=(1,)), SimpleNamespace(stride=(2,))

        def forward(self, input_features: Tensor, **_: Any) -> Any:
            return BaseModelOutput(last_hidden_state=encode(net, input_features))

    class Network(WhisperForConditionalGeneration):
        def get_encoder(self, *_: Any, **__: Any) -> Any:
            return self.model.encoder

        def forward(
            self,
            input_features: Tensor | None = None,
            decoder_input_ids: Tensor | None = None,
            encoder_outputs: Any = None,
            past_key_values: Any = None,
            **_: Any,
        ) -> Any:
            assert decoder_input_ids is not None
            if encoder_outputs is None:
                assert input_features is not None
                encoded = encode(net, input_features)
            else:
                encoded = encoder_outputs[0]
            logits = decode(net, decoder_input_ids, encoded, past_key_values)
            return Seq2SeqLMOutput(logits=logits, past_key_values=past_key_values, encoder_last_hidden_state=encoded)

    config = WhisperConfig(**{**net.config.model_dump(), "encoder_layers": 0, "decoder_layers": 0})
    with torch.device("meta"):
        network = Network(config).eval()
    network.config.encoder_layers, network.config.decoder_layers = net.config.encoder_layers, net.config.decoder_layers
    network.config.num_hidden_layers = net.config.encoder_layers
    network.model = nn.Module()
    network.model.encoder, network.model.net, network.model.config = Encoder(), net, network.config
    del network.proj_out
    network.generation_config = GenerationConfig(**settings)
    return network


@contextmanager
def _listening(net: Whisper) -> Iterator[None]:
    """Have a network that may be training do no more than hear, and then be as it was."""
    training = [module for module in net.modules() if module.training]
    net.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def encode(net: Whisper, mel: Tensor) -> Tensor:
    """Return what the decoder attends to, ``[batch, positions, width]``, of ``mel [batch, mels, frames]``."""
    lengths = (mel.shape[2] // 2,) * len(mel)
    x = net.hear(mel, positions(mel, net.config))
    for block in net.blocks.children():
        if isinstance(block, EncoderBlock):
            x = block(x, lengths)
    return x.unflatten(0, (len(mel), -1))


def decode(net: Whisper, tokens: Tensor, audio: Tensor, cache: Any) -> Tensor:
    """Return logits ``[batch, new, vocab]`` of new ``tokens``, given encoded ``audio`` and transformers' cache, if any.

    The cache's keys and values are ``[batch, heads, positions, width]``, of the text and of the sound.
    """
    batch, new = tokens.shape
    past = 0 if cache is None else int(cache.get_seq_length())
    y = net.embed_tokens(tokens.flatten()) + net.positions.weight[past : past + new].repeat(batch, 1)
    audio = audio.flatten(0, 1)
    blocks = [block for block in net.blocks.children() if isinstance(block, DecoderBlock)]
    for number, block in enumerate(blocks):
        y = y + _attend(block.attention, block.attention_norm(y), batch, cache, number)
        y = y + _listen(block.cross_attention, block.cross_norm(y), audio, batch, cache, number)
        y = y + block.mlp(block.mlp_norm(y))
    return net.embed_tokens.head(net.norm(y)).unflatten(0, (batch, new))


def _attend(layer: SelfAttention, y: Tensor, batch: int, cache: Any, number: int) -> Tensor:
    q, k, v = (_heads(z, batch, layer.head_dim) for z in layer.qkv(y).chunk(3, -1))
    if cache is not None:
        k, v = cache.self_attention_cache.update(k, v, number)
    new, held = q.shape[2], k.shape[2]
    mask = torch.ones(new, held, dtype=torch.bool, device=q.device).tril(held - new) if new > 1 else None
    return layer.out(_rows(F.scaled_dot_product_attention(q, k, v, attn_mask=mask)))


def _listen(layer: CrossAttention, y: Tensor, audio: Tensor, batch: int, cache: Any, number: int) -> Tensor:
    q = _heads(layer.q(y), batch, layer.head_dim)
    if cache is not None and cache.is_updated.get(number):
        held = cache.cross_attention_cache.layers[number]
        k, v = held.keys, held.values
    else:
        k, v = (_heads(z, batch, layer.head_dim) for z in layer.kv(audio).chunk(2, -1))
        if cache is not None:
            k, v = cache.cross_attention_cache.update(k, v, number)
            cache.is_updated[number] = True
    return layer.out(_rows(F.scaled_dot_product_attention(q, k, v)))


def _heads(z: Tensor, batch: int, width: int) -> Tensor:
    return z.unflatten(-1, (-1, width)).unflatten(0, (batch, -1)).transpose(1, 2)


def _rows(z: Tensor) -> Tensor:
    return z.transpose(1, 2).flatten(2).flatten(0, 1)


# ------------------------------------------------------------------------------------------------ commands


def open_transcriber(
    source: Path, tokenizer: Path | None, device: str | None, dtype: str | None, *, ema: bool = False
) -> Transcriber:
    """Return what a hub folder, an original release or a run transcribes with."""
    from . import MODEL

    place = devices.pick(device)
    with Console(stderr=True).status(f"loading {source}"):
        net = load_network(source, MODEL, Mesh(place), pick_dtype(dtype, place), ema=ema)
        words = tokenizer or find_tokenizer(source)
        if words is None:
            raise UserError(f"{source}: no tokenizer there; name a folder with one: --tokenizer DIR")
        opened = load_tokenizer(words, net.config.vocab_size)
        settings = generation_settings(opened, net.config)
        said = find_generation(source)
        if said is not None:
            settings = read_generation(said, settings, net.config)
        try:
            return Transcriber(net, opened, settings)
        except (TypeError, ValueError) as error:
            if said is None or isinstance(error, UserError):
                raise
            raise UserError(f"{said}: not settings that transformers takes ({' '.join(str(error).split())})") from None


def find_generation(source: Path) -> Path | None:
    """Return the generation_config.json beside weights, for a run beside those it began with; None: there is none."""
    source = source.expanduser()
    if (source / GENERATION).is_file():
        return source / GENERATION
    if not checkpoint.is_checkpoint(source):
        return None
    origin = checkpoint.read_info(checkpoint.locate(source))["recipe"].get("init_from")
    return find_generation(Path(origin)) if origin else None


@contextmanager
def hearing(total: float, done: float = 0.0) -> Iterator[Callable[[float], None]]:
    """Show on a terminal how many seconds of sound are heard; gives a function that adds some."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("hearing"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f} s"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
        redirect_stdout=False,  # what is printed meanwhile may go to a file
    ) as shown:
        task = shown.add_task("", total=total, completed=done)  # type: ignore[arg-type]
        yield lambda some: shown.advance(task, some)


Source = Annotated[
    Path, typer.Argument(metavar="SRC", help="A hub folder, an original release or a run's folder or checkpoint.")
]
Language = Annotated[
    str | None,
    typer.Option(metavar="CODE", help="What is spoken, such as en or zh.  \\[default: heard from the sound]"),
]
Task = Annotated[Literal["transcribe", "translate"], typer.Option(help="Write what is said, or that in English.")]
Beams = Annotated[int, typer.Option(metavar="N", min=1, help="Texts followed at a time; 1: the likeliest token.")]
Tokenizer = Annotated[
    Path | None, typer.Option(metavar="DIR", help="The tokenizer's folder.  \\[default: the one of SRC]")
]
Device = Annotated[str | None, typer.Option(metavar="KIND", help="npu, cuda or cpu.  \\[default: the first present]")]
Dtype = Annotated[Literal["bf16", "fp32"] | None, typer.Option(help="Precision.  \\[default: fp32 on cpu, else bf16]")]
Ema = Annotated[bool, typer.Option("--ema", help="Take a run's moving average.")]


def _read(path: Path) -> tuple[Tensor, list[float]]:
    """Return a file's sound, and the seconds at which it is damaged: of a talk, what can be heard is wanted."""
    damage: list[float] = []
    return read_audio(path, RATE, damaged=damage.append), damage


def transcribe_command(
    source: Source,
    sounds: Annotated[list[Path], typer.Argument(metavar="SOUND...", help="Files of any length: wav, flac, mp3, ...")],
    language: Language = None,
    task: Task = "transcribe",
    timestamps: Annotated[bool, typer.Option("--timestamps", help="Say when each part is said.")] = False,
    beams: Beams = 1,
    tokenizer: Tokenizer = None,
    device: Device = None,
    dtype: Dtype = None,
    ema: Ema = False,
) -> None:
    """Write down what sounds say.

    \b
    [green]$ mindspeed-whisper transcribe whisper-large-v3 talk.mp3 --language en --timestamps[/green]
    [green]$ mindspeed-whisper transcribe runs/whisper-tiny one.wav two.wav --beams 5[/green]
    """
    total, done = sum(map(seconds, sounds)), 0.0
    transcriber = open_transcriber(source, tokenizer, device, dtype, ema=ema)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    for path, (audio, damage) in zip(sounds, ahead(sounds, _read, 1), strict=True):
        if damage:
            typer.echo(
                f"{path}: {len(damage)} packets cannot be decoded, the first at {damage[0]:.2f} s; they are heard as "
                "silence",
                err=True,
            )
        with hearing(total, done) as advance:
            options: dict[str, Any] = {"timestamps": timestamps, "beams": beams, "advance": advance}
            found = transcriber(audio, language=language, task=task, **options)
        done += len(audio) / RATE
        if len(sounds) > 1:
            console.print(f"{path}:", style="bold")
        for start, end, text in found.segments:
            console.print(f"{start:8.2f} {end:8.2f} {text.strip()}")
        if not timestamps:
            console.print(found.text)
