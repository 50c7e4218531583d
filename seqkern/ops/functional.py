"""The recurrent layers and cells as functions of their tensors."""

from typing import Any

from torch import Tensor

from seqkern.ops._checks import autocast, check_like, check_rank, check_shape, check_tensor
from seqkern.ops.recurrent import recurrent
from seqkern.reference.cells import GATES


def lstm(
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    weights: list[Tensor],
    *,
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """One LSTM layer over whole sequences, in one or two directions.

    For each step (Hochreiter and Schmidhuber, Long Short-Term Memory, 1997, with the forget
    gate of Gers, Schmidhuber and Cummins, 2000)::

        i, f, o = sigmoid(W_i* x_t + b_i* + W_h* h_(t-1) + b_h*)    * = i, f, o
        g       = tanh(W_ig x_t + b_ig + W_hg h_(t-1) + b_hg)
        c_t     = f c_(t-1) + i g
        h_t     = o tanh(c_t), or W_hr (o tanh(c_t)) with a projection (Sak et al., 2014)

    Args:
        x: (T, B, I), T >= 1, of a floating-point dtype; or (N, I) with `batch_sizes`.
        h0: (D, B, P), D = 1 direction or 2, the second backwards in time.
        c0: (D, B, H).
        weights: for each direction w_ih (4H, I), w_hh (4H, P), then b_ih (4H,) and b_hh (4H,)
            if there are biases, then w_hr (P, H) if there is a projection; else P = H. The rows
            hold the gates in the order i, f, g, o.
        batch_sizes: (T,) int64 on the CPU: how many rows are alive at each step of a ragged
            batch, as in torch.nn.utils.rnn.PackedSequence.

    Returns:
        y (T, B, D*P) or (N, D*P), every h_t; h_n (D, B, P) and c_n (D, B, H), each row's last.
        All are in x's dtype, or in autocast's where torch.autocast is on.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, a dtype, a device or batch_sizes does not fit; the message names it.
    """
    return recurrent("LSTM", x, h0, c0, weights, batch_sizes=batch_sizes)


def gru(
    x: Tensor, h0: Tensor, weights: list[Tensor], *, batch_sizes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One GRU layer over whole sequences, in one or two directions.

    For each step (Cho et al., 2014, arXiv:1406.1078, with the reset gate after the product, as
    in cuDNN)::

        r, z = sigmoid(W_i* x_t + b_i* + W_h* h_(t-1) + b_h*)    * = r, z
        n    = tanh(W_in x_t + b_in + r (W_hn h_(t-1) + b_hn))
        h_t  = (1 - z) n + z h_(t-1)

    Args:
        x: (T, B, I), T >= 1, of a floating-point dtype; or (N, I) with `batch_sizes`.
        h0: (D, B, H), D = 1 direction or 2, the second backwards in time.
        weights: for each direction w_ih (3H, I), w_hh (3H, H), then b_ih (3H,) and b_hh (3H,)
            if there are biases. The rows hold the gates in the order r, z, n.
        batch_sizes: (T,) int64 on the CPU, as in torch.nn.utils.rnn.PackedSequence.

    Returns:
        y (T, B, D*H) or (N, D*H), every h_t; h_n (D, B, H), each row's last. Both are in x's
        dtype, or in autocast's where torch.autocast is on.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, a dtype, a device or batch_sizes does not fit; the message names it.
    """
    y, h_n, _ = recurrent("GRU", x, h0, None, weights, batch_sizes=batch_sizes)
    return y, h_n


def rnn(
    x: Tensor,
    h0: Tensor,
    weights: list[Tensor],
    *,
    nonlinearity: str = "tanh",
    batch_sizes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One Elman layer over whole sequences, in one or two directions.

    For each step (Elman, Finding Structure in Time, 1990), with f = tanh or relu::

        h_t = f(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)

    Args:
        x: (T, B, I), T >= 1, of a floating-point dtype; or (N, I) with `batch_sizes`.
        h0: (D, B, H), D = 1 direction or 2, the second backwards in time.
        weights: for each direction w_ih (H, I), w_hh (H, H), then b_ih (H,) and b_hh (H,) if
            there are biases.
        nonlinearity: "tanh" or "relu".
        batch_sizes: (T,) int64 on the CPU, as in torch.nn.utils.rnn.PackedSequence.

    Returns:
        y (T, B, D*H) or (N, D*H), every h_t; h_n (D, B, H), each row's last. Both are in x's
        dtype, or in autocast's where torch.autocast is on.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, a dtype, a device, batch_sizes or nonlinearity does not fit.
    """
    mode = _rnn_mode("rnn", nonlinearity)
    y, h_n, _ = recurrent(mode, x, h0, None, weights, batch_sizes=batch_sizes)
    return y, h_n


def lstm_cell(
    x: Tensor,
    h: Tensor,
    c: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of an LSTM; the equations are those of `lstm`.

    Args:
        x: (B, I).
        h, c: (B, H).
        w_ih, w_hh: (4H, I) and (4H, H), gates in the order i, f, g, o.
        b_ih, b_hh: (4H,), both or neither.

    Returns:
        h' and c', (B, H).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, a dtype or a device does not fit; the message names it.
    """
    check_rank("lstm_cell", "c", "B, H", c, 2)
    return _step("lstm_cell", "LSTM", x, h, c, w_ih, w_hh, b_ih, b_hh)


def gru_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    """One step of a GRU; the equations are those of `gru`.

    Args:
        x: (B, I).
        h: (B, H).
        w_ih, w_hh: (3H, I) and (3H, H), gates in the order r, z, n.
        b_ih, b_hh: (3H,), both or neither.

    Returns:
        h', (B, H).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, a dtype or a device does not fit; the message names it.
    """
    return _step("gru_cell", "GRU", x, h, None, w_ih, w_hh, b_ih, b_hh)[0]


def rnn_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
    *,
    nonlinearity: str = "tanh",
) -> Tensor:
    """One step of an Elman RNN; the equation is that of `rnn`.

    Args:
        x: (B, I).
        h: (B, H).
        w_ih, w_hh: (H, I) and (H, H).
        b_ih, b_hh: (H,), both or neither.
        nonlinearity: "tanh" or "relu".

    Returns:
        h', (B, H).

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: a size, a dtype, a device or nonlinearity does not fit; the message names it.
    """
    mode = _rnn_mode("rnn_cell", nonlinearity)
    return _step("rnn_cell", mode, x, h, None, w_ih, w_hh, b_ih, b_hh)[0]


def _rnn_mode(op: str, nonlinearity: str) -> str:
    if nonlinearity not in ("tanh", "relu"):
        raise ValueError(f"{op}: nonlinearity must be 'tanh' or 'relu', got {nonlinearity!r}")
    return f"RNN_{nonlinearity.upper()}"


def _step(op: str, mode: str, x, h, c, w_ih, w_hh, b_ih, b_hh) -> tuple[Tensor, Any]:
    """h' and c' (B, H), None without c, by the sequence op with T = 1."""
    check_rank(op, "x", "B, I", x, 2)
    check_rank(op, "h", "B, H", h, 2)
    if (b_ih is None) != (b_hh is None):
        raise ValueError(f"{op}: b_ih and b_hh must be given together, got only one of them")
    weights = [w_ih, w_hh] if b_ih is None else [w_ih, w_hh, b_ih, b_hh]
    c0 = None if c is None else c.unsqueeze(0)
    try:
        _, h_n, c_n = recurrent(mode, x.unsqueeze(0), h.unsqueeze(0), c0, weights)
    except (RuntimeError, TypeError, ValueError):
        # By the names that they have here, which only an error is worth the time for.
        _check_step(op, GATES[mode], x, h, c, weights)
        raise
    return h_n.squeeze(0), None if c_n is None else c_n.squeeze(0)


def _check_step(op: str, G: int, x: Tensor, h: Tensor, c: Tensor | None, weights: list) -> None:
    """Sizes, dtypes and devices of a cell's arguments; the ranks of x, h and c are right."""
    x, h, c, weights = autocast((x, h, c, weights), x)
    if not x.dtype.is_floating_point:
        raise ValueError(f"{op}: x must be of a floating-point dtype, got {x.dtype}")
    (B, I), H = x.shape, h.size(1)

    def check(name: str, t: Tensor, symbols: str, *shape: int) -> None:
        check_tensor(op, name, t)
        check_like(op, name, t, x)
        check_shape(op, name, symbols, t, shape)

    check("h", h, "B, H", B, H)
    if c is not None:
        check("c", c, "B, H", B, H)
    check("w_ih", weights[0], f"{G}H, I", G * H, I)
    check("w_hh", weights[1], f"{G}H, H", G * H, H)
    for name, b in zip(("b_ih", "b_hh"), weights[2:], strict=False):  # or none
        check(name, b, f"{G}H", G * H)
