"""Drop-in recurrent layers and cells: the classes of ``torch.nn`` on seqkern's ops.

The layers hold parameters, check arguments and reshape; all arithmetic is in ``seqkern.ops``.
"""

from seqkern.nn.cells import GRUCell as GRUCell
from seqkern.nn.cells import LSTMCell as LSTMCell
from seqkern.nn.cells import RNNCell as RNNCell
from seqkern.nn.rnn import GRU as GRU
from seqkern.nn.rnn import LSTM as LSTM
from seqkern.nn.rnn import RNN as RNN

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNCell"]
