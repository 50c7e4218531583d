"""Language models: a text in windows, a state that is carried on, nats per symbol, samples."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqkern.models.rnnlm import RNNLM, gradient_norms
from seqkern.tasks.batches import processes
from seqkern.tasks.corpora import corpus_folder, multi30k_files, needed_file, part_file
from seqkern.tasks.job import Job, Parts
from seqkern.tasks.lines import read_lines
from seqkern.tasks.metrics import perplexity
from seqkern.tasks.registry import build_model
from seqkern.tasks.vocab import BOS, EOS, PAD, SPECIALS, UNKNOWN, Vocab

TOKENS = ("chars", "words")
PIECE = 1000  # symbols that an evaluation reads at once; no score depends on it
State = tuple[Tensor, ...]


class TextBatch(NamedTuple):
    """x (B, T) and y (B, T), the symbol after each of x, int64; `at` is its place in the epoch."""

    x: Tensor
    y: Tensor
    units: int
    rows: int
    at: int


class Windows:
    """Windows of one text as training batches.

    Args:
        text: (N + 1,) int64, the symbol that stands before the text and its N symbols.
        batch_size: rows of a batch.
        window: T, symbols of a row; the last window of an epoch may be shorter.
        seed: of the places of windows that do not follow each other.
        follow: True cuts the text into `batch_size * shares` streams, and the window of a step
            begins where that of the step before ended; what does not fill all streams is left
            out. False draws every window's place at random.
        shares: with `follow`, batches in which all streams have their next window; the n-th of
            each such group is of the same streams.

    Raises:
        ValueError: a size is below 1, or the text is too short.
    """

    def __init__(
        self,
        text: Tensor,
        batch_size: int,
        window: int,
        seed: int,
        follow: bool,
        shares: int = 1,
    ) -> None:
        N = text.numel() - 1
        needed = batch_size * shares if follow else window
        if batch_size < 1 or window < 1 or needed > N:
            raise ValueError(
                "windows need batch_size >= 1, window >= 1 and a text of at least "
                f"{needed} symbols, got {batch_size}, {window} and {N} symbols"
            )
        self._text, self._window, self._seed, self._follow = text, window, seed, follow
        self._batch_size, self._shares = batch_size, shares
        self._stream = N // (batch_size * shares)  # symbols

    @property
    def per_epoch(self) -> int:
        """Batches in which as many symbols are read as the text has."""
        if self._follow:
            return -(-self._stream // self._window) * self._shares
        return max(1, (self._text.numel() - 1) // (self._batch_size * self._window))

    def __getitem__(self, step: int) -> TextBatch:
        """The batch of a step, 0 being the first of the first epoch."""
        B, T, at = self._batch_size, self._window, step % self.per_epoch
        if self._follow:
            at, share = divmod(at, self._shares)
            T = min(T, self._stream - at * T)
            rows = range(share * B, (share + 1) * B)
            starts = [row * self._stream + at * self._window for row in rows]
        else:
            draw = random.Random(f"{self._seed} {step}")
            starts = [draw.randrange(self._text.numel() - T) for _ in range(B)]
        xy = torch.stack([self._text[start : start + T + 1] for start in starts])
        return TextBatch(xy[:, :-1], xy[:, 1:], B * T, B, at)


def read_text(path: str | Path, tokens: str) -> list[str]:
    """The symbols of a text file.

    Args:
        path: UTF-8, or .gz of it.
        tokens: "chars": its characters, with a line feed at each line's end; "words": what white
            space separates, with "</s>" at the end of each line that has any.

    Raises:
        ValueError: the file is not UTF-8, holds no symbol, or has a word that means something
            here, as "<unk>"; or tokens is unknown.
        OSError: the file cannot be read.
    """
    if tokens not in TOKENS:
        raise ValueError(f"tokens must be one of {TOKENS}, got {tokens!r}")
    symbols: list[str] = []
    for number, line in read_lines(path):
        if tokens == "chars":
            symbols += [*line, "\n"]
            continue
        words = line.split()
        if reserved := set(words) & set(SPECIALS) - {"<unk>"}:
            raise ValueError(f"{path}:{number}: the words {sorted(reserved)} are reserved")
        symbols += [*words, "</s>"] if words else []
    if not symbols:
        raise ValueError(f"{path}: holds no text")
    return symbols


def split_text(symbols: list[str]) -> Parts:
    """The first nine tenths of a text to train on, the rest as the dev part; no test part.

    Raises:
        ValueError: a part would be empty.
    """
    n = int(0.9 * len(symbols))
    if not 0 < n < len(symbols):
        raise ValueError(f"a split needs at least 2 symbols, got {len(symbols)}")
    return Parts(symbols[:n], symbols[n:], [])


def read_user_text(data: str, tokens: str) -> Parts:
    """A file, split 90 to 10, or a folder of train, valid (or dev) and perhaps test .txt[.gz].

    Raises:
        ValueError: there is no such file or folder, or a part of a folder is absent.
    """
    path = Path(data)
    if path.is_file():
        return split_text(read_text(path, tokens))
    if not data or not path.is_dir():
        raise ValueError(f"data must be a text file or a folder of them, got {data!r}")
    train, dev = needed_file(path, "train.txt"), needed_file(path, "valid.txt", "dev.txt")
    test = part_file(path, "test.txt")
    return Parts(*(read_text(part, tokens) if part else [] for part in (train, dev, test)))


def _tinyshakespeare(root: str, tokens: str) -> Parts:
    path = corpus_folder(root, "tinyshakespeare") / "input.txt.gz"
    return split_text(read_text(path, tokens))


def _multi30k(root: str, tokens: str) -> Parts:
    return Parts(*(read_text(path, tokens) for path in multi30k_files(root, "en")))


READERS: dict[str, Callable[[str, str], Parts]] = {
    "text": read_user_text,
    "tinyshakespeare": _tinyshakespeare,
    "multi30k-en": _multi30k,
}
# What the corpora known by name are read as, other than READING says.
DEFAULTS: dict[str, dict[str, Any]] = {"multi30k-en": {"tokens": "words", "min_count": 2}}


class LanguageModelJob(Job):
    """A model called as `scores, state = model(x, state)` (see models/rnnlm.py) on one text.

    Each symbol of a text is scored once, the first after BOS. Options of reading: tokens, "chars"
    or "words"; min_count, occurrences of a symbol below which it is unknown; most, symbols of the
    vocabulary (0: all); window, symbols of a window: the reach of the gradient of a model that
    carries its state on, the whole text of one that does not.
    """

    TASKS: ClassVar[dict[str, str]] = {
        "text": "your text file, split 90 to 10, or folder of train, valid and test .txt",
        "tinyshakespeare": "1.1 million characters of Shakespeare, split 90 to 10",
        "multi30k-en": "English captions of Multi30k, tokenised in lower case, words",
    }
    READING: ClassVar[dict[str, Any]] = {
        "tokens": "chars",
        "min_count": 1,
        "most": 0,
        "window": 64,
    }
    unit = "symbol"
    score = "nats"
    higher = False

    def __init__(self, spec, vocabularies=None) -> None:
        super().__init__(spec, vocabularies)
        self._state: State | None = None
        self._next = 0  # the window whose start the state belongs to

    def task_reading(self) -> dict[str, Any]:
        return DEFAULTS.get(self.spec.task, {})

    def read(self) -> Parts:
        return READERS[self.spec.task](self.spec.data, self.reading["tokens"])

    def build_vocabs(self) -> dict[str, Any]:
        most = self.reading["most"] or None
        return {"symbols": Vocab.build([self.data.train], self.reading["min_count"], most)}

    def build_model(self) -> nn.Module:
        return build_model(self.spec, symbols=len(self.vocab))

    @property
    def vocab(self) -> Vocab:
        """The symbols of the text."""
        return self.vocabs["symbols"]

    @cached_property
    def context(self) -> int:
        """The longest text that the model reads at once; 0 for one without limit."""
        return getattr(self.model, "context", 0)

    def _numbers(self, symbols: Sequence[str]) -> Tensor:
        return torch.tensor([BOS, *self._encode(symbols)])

    def _encode(self, symbols: Sequence[str]) -> list[int]:
        """Numbers of the symbols, of which `</s>` is the end of a line."""
        numbers = zip(symbols, self.vocab.encode(symbols), strict=True)
        return [EOS if symbol == SPECIALS[EOS] else number for symbol, number in numbers]

    def batches(self, batch_size: int, seed: int) -> Windows:
        window = self.reading["window"]
        if self.context and window > self.context:
            raise ValueError(
                f"window must be at most the model's context, {self.context}, got {window}"
            )
        text = self._numbers(self.part("train"))
        shares = processes()[1]  # each keeps the states of streams of its own
        return Windows(text, batch_size, window, seed, bool(self.model.carries), shares)

    def collate(self, examples: list[Sequence[str]]) -> TextBatch:
        """Texts of one length, each from its beginning, as one batch."""
        rows = torch.stack([self._numbers(symbols) for symbols in examples])
        return TextBatch(rows[:, :-1], rows[:, 1:], rows[:, 1:].numel(), len(rows), 0)

    def length(self, example: Sequence[str]) -> tuple[int, ...]:
        return (len(example),)

    def loss(self, batch: TextBatch) -> Tensor:
        # An epoch's first window follows none.
        state = self._state if batch.at == self._next else None
        scores, state = self.model(batch.x, state)
        if self.model.carries:
            self._state, self._next = tuple(part.detach() for part in state), batch.at + 1
        return F.cross_entropy(scores.flatten(0, 1).float(), batch.y.flatten())

    def carried(self) -> dict[str, Tensor]:
        state = {f"state.{i}": part for i, part in enumerate(self._state or ())}
        return state | {"next": torch.tensor(self._next)}

    def carry(self, state: dict[str, Tensor]) -> None:
        parts = [state[name] for name in sorted(state) if name.startswith("state.")]
        self._state, self._next = tuple(parts) or None, int(state["next"])

    @torch.inference_mode()
    def evaluate(self, part: str, *, ngram: int = 0, **_: Any) -> dict[str, float]:
        """Nats and bits per symbol and perplexity of the whole "dev" or "test" text.

        A model that carries its state reads the text as one; one that does not reads it in
        windows of its context, none overlapping another.

        Args:
            ngram: the order of a counted model, interpolated Kneser-Ney over the training text
                with the same unknown symbols, to judge on the same text: its perplexity
                ("kneser_ney") and the share of it that the model's is ("ratio"). 0 for none.
        """
        symbols = self.part(part)
        text = self._numbers(symbols).to(self.device)
        self.model.eval()
        state, total = None, 0.0
        piece = PIECE if self.model.carries else self.context
        for start in range(0, len(symbols), piece):
            y = text[start + 1 : start + 1 + piece]
            x = text[start : start + y.numel()]
            scores, state = self.model(x.unsqueeze(0), state if self.model.carries else None)
            total += F.cross_entropy(scores[0].double(), y, reduction="sum").item()
        nats = total / len(symbols)
        found = {"nats": nats, "bits": nats / math.log(2), "perplexity": perplexity(nats)}
        if ngram:
            counted = self.counted_nats(part, ngram)
            found |= {"kneser_ney": perplexity(counted), "ratio": perplexity(nats - counted)}
        return found

    def counted_nats(self, part: str, order: int) -> float:
        """Nats per symbol of interpolated Kneser-Ney on a part, with this job's vocabulary."""
        from seqkern.tasks.ngram import CountedModel  # needs nltk, which the rest does not

        train, other = (self._known(self.part(name)) for name in ("train", part))
        return CountedModel(train, order, SPECIALS[BOS]).nats(other)

    def _known(self, symbols: Sequence[str]) -> list[str]:
        return [self.vocab.symbols[number] for number in self._encode(symbols)]

    def scorer(self) -> str:
        state = "carried on" if self.model.carries else f"windows of {self.context}"
        return f"-log p of each symbol of the whole text, {state}, {len(self.vocab)} symbols known"

    def predict(self, texts: Sequence[str], **options: Any) -> list[str]:
        """`sample`, its line feeds written as \\n: one line for each text."""
        return [answer.replace("\n", "\\n") for answer in self.sample(texts, **options)]

    def sample(
        self,
        texts: Sequence[str],
        *,
        length: int = 200,
        temperature: float = 0.8,
        seed: int = 1,
        **_: Any,
    ) -> list[str]:
        """Continues each text.

        Args:
            texts: prompts; "" for the beginning of a text.
            length: symbols to add, at least 1.
            temperature: the scores are divided by it; 0 takes the best symbol each time.
            seed: of the draws; an answer does not depend on the other texts.

        Raises:
            ValueError: length or temperature is out of range.
        """
        if length < 1 or temperature < 0:
            raise ValueError(
                f"length must be at least 1 and temperature at least 0, got {length} "
                f"and {temperature}"
            )
        self.model.eval()
        answers = []
        for text in texts:
            draw = torch.Generator().manual_seed(seed)
            symbols = list(text) if self.reading["tokens"] == "chars" else text.split()
            numbers = self._continue(self._numbers(symbols).tolist(), length, temperature, draw)
            found = [self.vocab.symbols[n].replace("</s>", "\n") for n in numbers]
            answers.append(("" if self.reading["tokens"] == "chars" else " ").join(found))
        return answers

    @torch.inference_mode()
    def _continue(
        self, numbers: list[int], length: int, temperature: float, draw: torch.Generator
    ) -> list[int]:
        """The symbols that follow `numbers`, each read once, but where the context is full."""
        asked, unread, read, state = len(numbers), numbers, 0, None
        while len(numbers) < asked + length:
            if self.context and read + len(unread) > self.context:
                unread, read, state = numbers[-max(1, self.context // 2) :], 0, None
            x = torch.tensor([unread], device=self.device)
            scores, state = self.model(x, state)
            read += len(unread)
            last = scores[0, -1].double().cpu()
            last[[PAD, BOS, UNKNOWN]] = -math.inf  # what no text can hold
            if self.reading["tokens"] == "chars":
                last[EOS] = -math.inf
            if temperature:
                p = (last / temperature).softmax(-1)
                unread = [int(torch.multinomial(p, 1, generator=draw))]
            else:
                unread = [int(last.argmax())]
            numbers = [*numbers, *unread]
        return numbers[asked:]

    def gradient_norms(self, length: int = 100, rows: int = 32) -> list[float]:
        """Norms of dL/dx_t over the first windows of the dev text; see models.rnnlm.

        Raises:
            ValueError: the model is none of RNN, LSTM and GRU, or the text is too short.
        """
        if not isinstance(self.model, RNNLM):
            raise ValueError(f"model {self.spec.model!r} has no recurrent layer of its own")
        text = self._numbers(self.part("dev"))[1:]
        rows = min(rows, text.numel() // length)
        if not rows:
            raise ValueError(f"gradients need {length} symbols, got {text.numel()}")
        x = text[: rows * length].view(rows, length).to(self.device)
        self.model.eval()
        return gradient_norms(self.model, x).tolist()
