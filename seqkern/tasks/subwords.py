"""Subwords by sentencepiece (Kudo and Richardson, 2018): text to numbers and back."""

from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from seqkern.tasks.libraries import library
from seqkern.tasks.vocab import BOS, EOS, PAD, UNKNOWN


class Subwords:
    """A sentencepiece model; its first four numbers are PAD, BOS, EOS and UNKNOWN, as in Vocab.

    Args:
        model: the serialized model, as bytes in a uint8 tensor.

    Raises:
        ModuleNotFoundError: the package sentencepiece is not installed.
    """

    def __init__(self, model: Tensor) -> None:
        self._model = model
        self._processor = _sentencepiece().SentencePieceProcessor(model_proto=bytes(model.tolist()))

    @classmethod
    def build(cls, texts: Iterable[str], symbols: int, coverage: float = 1.0) -> Subwords:
        """Byte pair encoding of `symbols` symbols, the special ones included.

        Args:
            texts: what it is learned from.
            symbols: how many; too many for the texts is an error.
            coverage: share of the characters that get a symbol; the rarest are UNKNOWN.

        Raises:
            ValueError: sentencepiece cannot make that many symbols of the texts.
        """
        written = io.BytesIO()
        try:
            _sentencepiece().SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=written,
                model_type="bpe",
                vocab_size=symbols,
                character_coverage=coverage,
                pad_id=PAD,
                bos_id=BOS,
                eos_id=EOS,
                unk_id=UNKNOWN,
                num_threads=1,
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(f"cannot make {symbols} subwords: {error}") from error
        return cls(torch.frombuffer(bytearray(written.getvalue()), dtype=torch.uint8))

    def __len__(self) -> int:
        return self._processor.get_piece_size()

    def encode_text(self, text: str) -> list[int]:
        """Numbers of a text's subwords."""
        return self._processor.encode(text)

    def pieces(self, numbers: Iterable[int]) -> tuple[str, ...]:
        """The subwords themselves, for display; a word's first begins with a low line."""
        return tuple(self._processor.id_to_piece(int(n)) for n in numbers)

    def decode_text(self, numbers: Iterable[int]) -> str:
        """The text of numbers up to the first EOS."""
        kept = []
        for number in numbers:
            if number == EOS:
                break
            if number not in (PAD, BOS):
                kept.append(int(number))
        return self._processor.decode(kept)

    def state(self) -> dict[str, Any]:
        """Plain data for a checkpoint."""
        return {"kind": "subwords", "model": self._model}


def _sentencepiece() -> Any:
    return library("sentencepiece", "sentencepiece", "a vocabulary of subwords")
