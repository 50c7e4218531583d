"""RNNCell, LSTMCell and GRUCell: one time step, ``torch.nn``'s cells on seqkern's ops."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.rnn import RNNCellBase

from seqkern.ops._checks import autocast_dtype
from seqkern.ops.recurrent import recurrent

_WEIGHTS = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")


def _step(
    cell: RNNCellBase, mode: str, input: Tensor, h: Tensor | None, c: Tensor | None = None
) -> tuple[Tensor, ...]:
    """The sequence op with T = 1; input (B, I) or (I,); h, and c for LSTM, (B, H) or (H,)."""
    _check_dim(cell, "input", input)
    batched = input.dim() == 2
    x = input.unsqueeze(0) if batched else input.unsqueeze(0).unsqueeze(0)
    weights = _live_weights(cell)
    _check_input(cell, x, weights[0])
    if h is None:
        h0 = torch.zeros(1, x.shape[1], cell.hidden_size, dtype=x.dtype, device=x.device)
        c0 = h0 if mode == "LSTM" else None
    else:
        h0 = _initial_state(cell, "hidden", h, x, batched)
        c0 = None if c is None else _initial_state(cell, "cell", c, x, batched)
    _, h_n, c_n = recurrent(mode, x, h0, c0, weights)
    dims = 0 if batched else (0, 1)
    return (h_n.squeeze(dims),) if c_n is None else (h_n.squeeze(dims), c_n.squeeze(dims))


def _check_dim(cell: RNNCellBase, name: str, tensor: Tensor) -> None:
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{cell._get_name()}: expected {name} to be 1D or 2D, got {tensor.dim()}D")


def _live_weights(cell: RNNCellBase) -> list[Tensor]:
    """The weights by name as they are now; biases are both there or both left out."""
    parameters: Any = cell._parameters
    try:
        # Thrice as fast as getattr, which reaches a parameter only after two failed lookups.
        w_ih, w_hh, b_ih, b_hh = [parameters[name] for name in _WEIGHTS]
    except KeyError:
        w_ih, w_hh, b_ih, b_hh = [getattr(cell, name) for name in _WEIGHTS]
    if b_ih is None and b_hh is None:
        return [w_ih, w_hh]
    # torch.nn's cells take either bias alone, when the other was registered as None.
    b_ih = torch.zeros_like(b_hh) if b_ih is None else b_ih
    return [w_ih, w_hh, b_ih, torch.zeros_like(b_ih) if b_hh is None else b_hh]


def _check_input(cell: RNNCellBase, x: Tensor, weight: Tensor) -> None:
    """Refuse what ``torch.nn``'s cells refuse, with the same exception type."""
    if x.shape[2] != cell.input_size:
        raise RuntimeError(
            f"{cell._get_name()}: input must have input_size = {cell.input_size} features, "
            f"got {x.shape[2]}"
        )
    _check_like(cell, "input", x, "the weights", weight)


def _initial_state(cell: RNNCellBase, name: str, state: Tensor, x: Tensor, batched: bool) -> Tensor:
    _check_dim(cell, name, state)
    expected = (x.shape[1], cell.hidden_size) if batched else (cell.hidden_size,)
    if state.shape != expected:
        raise RuntimeError(
            f"{cell._get_name()}: {name} must have shape {tuple(expected)}, "
            f"got {tuple(state.shape)}"
        )
    _check_like(cell, name, state, "input", x)
    return state.unsqueeze(0) if batched else state.unsqueeze(0).unsqueeze(0)


def _check_like(
    cell: RNNCellBase, name: str, tensor: Tensor, other_name: str, other: Tensor
) -> None:
    if tensor.dtype != other.dtype and autocast_dtype(tensor) is None:
        raise RuntimeError(
            f"{cell._get_name()}: {name} must have the dtype of {other_name}, {other.dtype}, "
            f"got {tensor.dtype}"
        )
    if tensor.device != other.device:
        raise RuntimeError(
            f"{cell._get_name()}: {name} must be on the device of {other_name}, "
            f"{other.device}, got {tensor.device}"
        )


class RNNCell(torch.nn.RNNCell):
    """One step of an Elman RNN, in place of ``torch.nn.RNNCell``.

    With f = tanh, or relu where ``nonlinearity="relu"`` (Elman, Finding Structure in Time,
    1990)::

        h' = f(W_ih x + b_ih + W_hh h + b_hh)

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether b_ih and b_hh exist. Default True.
        nonlinearity: ``"tanh"`` (default) or ``"relu"``.
        device, dtype: of the parameters.

    Shapes: input (B, I) or (I,); hx (B, H) or (H,), zeros if not given; result as hx.

    Parameters: ``weight_ih`` (H, I), ``weight_hh`` (H, H), ``bias_ih``, ``bias_hh`` (H,).

    Other than ``torch.nn.RNNCell``: ``torch.compile``, ``torch.export`` and
    ``torch.jit.trace`` take it, ``torch.jit.script`` does not.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Raises:
            ValueError: ``input`` or ``hx`` is neither 1D nor 2D.
            RuntimeError: a size, dtype or device does not match, or ``nonlinearity`` is neither
                of the two.
        """
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(
                f"RNNCell: nonlinearity must be 'tanh' or 'relu', got {self.nonlinearity!r}"
            )
        return _step(self, f"RNN_{self.nonlinearity.upper()}", input, hx)[0]


class LSTMCell(torch.nn.LSTMCell):
    """One step of a long short-term memory, in place of ``torch.nn.LSTMCell``.

    The equations are those of ``seqkern.nn.LSTM`` without projection; the weights hold the
    gates' rows in the order i, f, g, o (Hochreiter and Schmidhuber, 1997; Gers, Schmidhuber and
    Cummins, 2000)::

        i, f, o = sigmoid(W_i* x + b_i* + W_h* h + b_h*)    * = i, f, o
        g       = tanh(W_ig x + b_ig + W_hg h + b_hg)
        c'      = f c + i g
        h'      = o tanh(c')

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether b_ih and b_hh exist. Default True.
        device, dtype: of the parameters.

    Shapes: input (B, I) or (I,); hx = (h, c), each (B, H) or (H,), zeros if not given; result
    (h', c') as hx.

    Parameters: ``weight_ih`` (4H, I), ``weight_hh`` (4H, H), ``bias_ih``, ``bias_hh`` (4H,).

    Other than ``torch.nn.LSTMCell``: under autocast it computes and returns the autocast dtype;
    ``torch.compile``, ``torch.export`` and ``torch.jit.trace`` take it, ``torch.jit.script`` does
    not.
    """

    def forward(
        self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """One step.

        Raises:
            TypeError: ``hx`` is one tensor, or h or c is no tensor.
            ValueError: ``input``, h or c is neither 1D nor 2D.
            RuntimeError: a size, dtype or device does not match, or ``hx`` is no pair.
        """
        h = c = None
        if hx is not None:
            if isinstance(hx, Tensor):
                raise TypeError("LSTMCell: hx must be a pair (h, c), got one Tensor")
            if len(hx) != 2:
                raise RuntimeError(f"LSTMCell: hx must be a pair (h, c), got {len(hx)} tensors")
            h, c = hx
            if not (isinstance(h, Tensor) and isinstance(c, Tensor)):
                kinds = f"{type(h).__name__} and {type(c).__name__}"
                raise TypeError(f"LSTMCell: h and c of hx must be Tensors, got {kinds}")
        h, c = _step(self, "LSTM", input, h, c)
        return h, c


class GRUCell(torch.nn.GRUCell):
    """One step of a gated recurrent unit, in place of ``torch.nn.GRUCell``.

    The equations are those of ``seqkern.nn.GRU``; the weights hold the gates' rows in the order
    r, z, n (Cho et al., 2014, arXiv:1406.1078; the reset gate acts after the product)::

        r, z = sigmoid(W_i* x + b_i* + W_h* h + b_h*)    * = r, z
        n    = tanh(W_in x + b_in + r (W_hn h + b_hn))
        h'   = (1 - z) n + z h

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        bias: whether b_ih and b_hh exist. Default True.
        device, dtype: of the parameters.

    Shapes: input (B, I) or (I,); hx (B, H) or (H,), zeros if not given; result as hx.

    Parameters: ``weight_ih`` (3H, I), ``weight_hh`` (3H, H), ``bias_ih``, ``bias_hh`` (3H,).

    Other than ``torch.nn.GRUCell``: under autocast it computes and returns the autocast dtype;
    ``torch.compile``, ``torch.export`` and ``torch.jit.trace`` take it, ``torch.jit.script`` does
    not.
    """

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """One step.

        Raises:
            ValueError: ``input`` or ``hx`` is neither 1D nor 2D.
            RuntimeError: a size, dtype or device does not match.
        """
        return _step(self, "GRU", input, hx)[0]
