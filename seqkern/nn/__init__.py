"""Drop-in layers: the recurrent and the Transformer classes of ``torch.nn`` on seqkern's ops, and
the attentions of recurrent decoders.

The layers hold parameters, check arguments and reshape; all arithmetic is in ``seqkern.ops``.
"""

from seqkern.nn.additive import AdditiveAttention as AdditiveAttention
from seqkern.nn.additive import DotAttention as DotAttention
from seqkern.nn.additive import GeneralAttention as GeneralAttention
from seqkern.nn.attention import MultiheadAttention as MultiheadAttention
from seqkern.nn.cells import GRUCell as GRUCell
from seqkern.nn.cells import LSTMCell as LSTMCell
from seqkern.nn.cells import RNNCell as RNNCell
from seqkern.nn.decoder import AttentionDecoder as AttentionDecoder
from seqkern.nn.rnn import GRU as GRU
from seqkern.nn.rnn import LSTM as LSTM
from seqkern.nn.rnn import RNN as RNN
from seqkern.nn.transformer import Transformer as Transformer
from seqkern.nn.transformer import TransformerDecoder as TransformerDecoder
from seqkern.nn.transformer import TransformerDecoderLayer as TransformerDecoderLayer
from seqkern.nn.transformer import TransformerEncoder as TransformerEncoder
from seqkern.nn.transformer import TransformerEncoderLayer as TransformerEncoderLayer

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AdditiveAttention",
    "AttentionDecoder",
    "DotAttention",
    "GRUCell",
    "GeneralAttention",
    "LSTMCell",
    "MultiheadAttention",
    "RNNCell",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
