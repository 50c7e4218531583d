"""A BiLSTM tagger, with spellings, a CRF and a sentence head as options.

A sentence of words x_1 .. x_T with tags y_1 .. y_T (Huang, Xu and Yu, 2015):

    e_t = E x_t                                    or, with spellings (Lample et al., 2016,
    e_t = [E x_t ; →c_L ; ←c_1]                    section 4.1): what each direction of a BiLSTM
                                                   over the word's letters ends with
    h_t = [→h_t ; ←h_t]                            a BiLSTM over e_1 .. e_T
    P_t = W h_t + b                                a score for each tag
    p(y | x) = prod_t softmax(P_t)_y_t             or, with a CRF (Lample et al., section 2.2):
    s(x, y)  = sum_t A_y_t,y_t+1 + sum_t P_t,y_t,  p(y | x) = exp s(x, y) / sum_y' exp s(x, y')

and, for an intent z of the whole sentence (Liu and Lane, 2016, who read it off one state):

    p(z | x) = softmax(W_z max_t h_t + b_z),       trained on -log p(y | x) - log p(z | x)

Deliberate differences: the intent is read off the largest value of each unit; a spelling is read
once for all places where its word stands in a batch, which computes the same but for dropout, of
which those places share one draw; and there are no pre-trained vectors.

Both BiLSTMs are the layers', on packed sequences. The CRF is that of the package pytorch-crf, on
either set of layers.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from seqkern.models.common import check_sizes, layers_named
from seqkern.models.sequences import pack_symbols, padding_of


@dataclass(frozen=True)
class TaggerConfig:
    """Sizes of the model.

    Attributes:
        symbols: of the vocabulary of words, the special ones too.
        tags: how many.
        letters: of the vocabulary of letters, the special ones too; 0 for no spellings.
        intents: classes of sentences; 0 for no sentence head.
        embedding: features of a word.
        letter_embedding, spelling: features of a letter, and of c_t, both directions together.
        hidden: features of h_t, half of them from each direction.
        depth: LSTM layers over the words.
        crf: whether the tags depend on one another.
        dropout: probability of dropping a feature of e_t, of a letter and of h_t.
        pad: the symbol of padding, of words and of letters.
    """

    symbols: int
    tags: int
    letters: int = 0
    intents: int = 0
    embedding: int = 128
    letter_embedding: int = 32
    spelling: int = 64
    hidden: int = 200
    depth: int = 1
    crf: bool = False
    dropout: float = 0.5
    pad: int = 0

    def __post_init__(self) -> None:
        check_sizes(self, shares=("dropout",), free=("letters", "intents"))
        for name in ("letters", "intents"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        for name in ("hidden", "spelling"):
            if getattr(self, name) % 2:
                raise ValueError(
                    f"{name} must be even, half for each direction, got {getattr(self, name)}"
                )


class Spellings(NamedTuple):
    """The different words of a batch by letter.

    letters: (W, L) symbols; lengths: (W,) in 1 .. L; word: (B, T) in 0 .. W - 1, which of the W
    stands where; what it holds past the end of a sentence is not read.
    """

    letters: Tensor
    lengths: Tensor
    word: Tensor


class Tagged(NamedTuple):
    """Scores, not normalised: tags (B, T, tags), P_t; intents (B, intents) or None."""

    tags: Tensor
    intents: Tensor | None


def build_crf(tags: int) -> Any:
    """A torchcrf.CRF, batch first.

    Raises:
        ModuleNotFoundError: the package pytorch-crf is not installed.
    """
    try:
        torchcrf = importlib.import_module("torchcrf")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "crf=True needs the package pytorch-crf: pip install pytorch-crf"
        ) from error
    return torchcrf.CRF(tags, batch_first=True)


class BiLSTMTagger(nn.Module):
    """The model of the module docstring.

    Args:
        config: sizes and options.
        layers: "seqkern" or "torch", where the LSTMs come from. Parameters have the same names
            and, under one seed, the same first values in both.

    Raises:
        ModuleNotFoundError: a CRF is asked for, and pytorch-crf is not installed.
    """

    def __init__(self, config: TaggerConfig, layers: str = "seqkern") -> None:
        super().__init__()
        lstm = layers_named(layers).LSTM
        self.config, self.layers = config, layers
        self.embed = nn.Embedding(config.symbols, config.embedding, padding_idx=config.pad)
        features = config.embedding
        if config.letters:
            D, S = config.letter_embedding, config.spelling
            self.embed_letters = nn.Embedding(config.letters, D, padding_idx=config.pad)
            self.speller = lstm(D, S // 2, bidirectional=True)
            features += S
        self.lstm = lstm(
            features,
            config.hidden // 2,
            config.depth,
            bidirectional=True,
            dropout=config.dropout if config.depth > 1 else 0.0,
        )
        self.output = nn.Linear(config.hidden, config.tags)
        if config.intents:
            self.intent = nn.Linear(config.hidden, config.intents)
        self.crf = build_crf(config.tags) if config.crf else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, lengths: Tensor, spellings: Spellings | None = None) -> Tagged:
        """The scores of a batch.

        Args:
            x: (B, T) symbols.
            lengths: (B,) in 1 .. T.
            spellings: where the config has letters.

        Raises:
            ValueError: a sentence or a word is empty or too long, or spellings are given to a
                model without, or are missing.
        """
        if (spellings is not None) != bool(self.config.letters):
            has = "takes" if self.config.letters else "takes no"
            raise ValueError(f"a tagger with letters={self.config.letters} {has} spellings")
        words = pack_symbols(x, lengths)
        e = self.embed(words.data)
        if spellings is not None:
            e = torch.cat([e, self._spell(spellings, lengths)], -1)
        states, _ = self.lstm(words._replace(data=self.dropout(e)))
        return self._scores(states, x.size(1))

    def _spell(self, spellings: Spellings, lengths: Tensor) -> Tensor:
        """[→c_L ; ←c_1] of every word, in the order of the packed sentences."""
        if spellings.word.size(0) != lengths.size(0):
            raise ValueError(
                f"spellings.word must have the {lengths.size(0)} rows of the sentences, "
                f"got {tuple(spellings.word.shape)}"
            )
        letters = pack_symbols(spellings.letters, spellings.lengths, "lengths of words")
        e = self.dropout(self.embed_letters(letters.data))
        _, (c, _) = self.speller(letters._replace(data=e))
        places = pack_padded_sequence(
            spellings.word, lengths.cpu(), batch_first=True, enforce_sorted=False
        )
        return c.transpose(0, 1).flatten(1)[places.data]

    def _scores(self, states: PackedSequence, T: int) -> Tagged:
        tags = states._replace(data=self.output(self.dropout(states.data)))
        padded, _ = pad_packed_sequence(tags, batch_first=True, total_length=T)
        if not self.config.intents:
            return Tagged(padded, None)
        h, _ = pad_packed_sequence(
            states, batch_first=True, padding_value=float("-inf"), total_length=T
        )
        return Tagged(padded, self.intent(self.dropout(h.max(1).values)))

    def losses(
        self, x: Tensor, lengths: Tensor, y: Tensor, spellings: Spellings | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """-log p(y | x) of each sentence (B,), and the intents' scores (B, intents) or None.

        y: (B, T) tags, int64; what it holds past the end of a sentence is not read, but has to
        be the number of a tag.
        """
        scores = self(x, lengths, spellings)
        past = padding_of(lengths.to(x.device), x.size(1))
        if self.crf is not None:
            return -self.crf(scores.tags, y, mask=~past, reduction="none"), scores.intents
        of_words = F.cross_entropy(scores.tags.mT, y, reduction="none")
        return of_words.masked_fill(past, 0).sum(1), scores.intents

    @torch.no_grad()
    def decode(
        self, x: Tensor, lengths: Tensor, spellings: Spellings | None = None
    ) -> tuple[list[list[int]], list[int] | None]:
        """The most probable tags of each sentence, and its intent where there are any."""
        scores = self(x, lengths, spellings)
        intents = None if scores.intents is None else scores.intents.argmax(-1).tolist()
        if self.crf is not None:
            real = ~padding_of(lengths.to(x.device), x.size(1))
            return self.crf.decode(scores.tags, real), intents
        rows = scores.tags.argmax(-1).tolist()
        return [row[:n] for row, n in zip(rows, lengths.tolist(), strict=True)], intents
