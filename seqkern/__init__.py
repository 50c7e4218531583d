"""Custom kernels for sequence models, behind drop-in PyTorch layers."""

from seqkern import _extension as _extension
from seqkern.convert import convert as convert
from seqkern.ops import _flops as _flops
from seqkern.ops.additive import additive_attention as additive_attention
from seqkern.ops.attention import attention as attention
from seqkern.ops.attention import attention_varlen as attention_varlen
from seqkern.ops.attention import scaled_dot_product_attention as scaled_dot_product_attention
from seqkern.ops.combine import combine_partials as combine_partials
from seqkern.ops.decode import attention_decode as attention_decode
from seqkern.ops.decoder import attention_decoder as attention_decoder
from seqkern.ops.explain import explain as explain
from seqkern.ops.functional import gru as gru
from seqkern.ops.functional import gru_cell as gru_cell
from seqkern.ops.functional import lstm as lstm
from seqkern.ops.functional import lstm_cell as lstm_cell
from seqkern.ops.functional import rnn as rnn
from seqkern.ops.functional import rnn_cell as rnn_cell
from seqkern.stream import Stream as Stream

__version__ = "0.1.0"

__all__ = [
    "Stream",
    "__version__",
    "additive_attention",
    "attention",
    "attention_decode",
    "attention_decoder",
    "attention_varlen",
    "combine_partials",
    "convert",
    "explain",
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
]

_flops.install()
