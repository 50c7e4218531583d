"""AttentionDecoder: a recurrent cell that attends to a source before each of its steps."""

from typing import Any

import torch
from torch import Tensor, nn

from seqkern.nn.additive import AdditiveAttention, DotAttention, GeneralAttention
from seqkern.ops._attention_checks import INT, check_vector
from seqkern.ops._checks import check_alike, check_rank, check_shape, check_tensor
from seqkern.ops._decoder_checks import check_sequences
from seqkern.ops.additive import normalized
from seqkern.ops.choice import has_native_kernel
from seqkern.ops.decoder import attention_decoder

State = Any  # (N, H), or for LSTMCell a pair of them


def only_attention(device: str) -> bool:
    """Whether a type of device has a kernel for additive attention and none for the decoder."""
    fused = has_native_kernel("attention_decoder", device)
    return not fused and has_native_kernel("additive_attention", device)


class AttentionDecoder(nn.Module):
    """An attending recurrent decoder over whole sequences, or one step of it::

        c_i = attention(s_{i-1}, key, value)
        s_i = cell([x_i ; c_i], s_{i-1})

    (Bahdanau, Cho and Bengio 2015, appendix A.2.2). With ``AdditiveAttention`` all steps are one
    call of ``seqkern.attention_decoder``; with Luong's scores, and on a device that has a kernel
    for the attention but none for that call, they run one after another.

    Args:
        cell: ``GRUCell``, ``LSTMCell`` or ``RNNCell`` of ``seqkern.nn`` or ``torch.nn``, whose
            input_size is I + C: features of x and of a value.
        attention: ``AdditiveAttention``, ``DotAttention`` or ``GeneralAttention``, whose
            query_size is the cell's hidden_size.

    Parameters: those of ``cell.`` and ``attention.``.

    Raises:
        TypeError: ``cell`` or ``attention`` is none of these.
        ValueError: the attention's query_size is not the cell's hidden_size.
    """

    def __init__(self, cell: nn.RNNCellBase, attention: nn.Module) -> None:
        super().__init__()
        if not isinstance(cell, nn.GRUCell | nn.LSTMCell | nn.RNNCell):
            raise TypeError(
                "AttentionDecoder: cell must be a GRUCell, LSTMCell or RNNCell, got "
                f"{type(cell).__name__}"
            )
        if not isinstance(attention, AdditiveAttention | DotAttention | GeneralAttention):
            raise TypeError(
                "AttentionDecoder: attention must be an AdditiveAttention, DotAttention or "
                f"GeneralAttention, got {type(attention).__name__}"
            )
        if attention.query_size not in (None, cell.hidden_size):
            raise ValueError(
                "AttentionDecoder: attention must have query_size = hidden_size = "
                f"{cell.hidden_size} of cell, got {attention.query_size}"
            )
        self.cell, self.attention = cell, attention

    def forward(
        self,
        x: Tensor,
        state: State,
        key: Tensor,
        value: Tensor | None = None,
        *,
        k_lens: Tensor | None = None,
        u_key: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, State]:
        """All steps.

        Args:
            x: (N, T, I), T >= 1; row n of N = B*K reads source n // K.
            state: before the first step, (N, H); for LSTMCell the pair (h, c) of them.
            key: (B, Tk, key_size).
            value: (B, Tk, C); the keys themselves if None.
            k_lens: (B,) int32 or int64, how many of the Tk are real.
            u_key: ``self.attention.u(key)`` where it was computed before.

        Returns:
            s (N, T, H), contexts (N, T, C), weights (N, T, Tk), and the state after the last step.

        Raises:
            TypeError: an argument is of the wrong type.
            ValueError: a size, dtype or device does not match; the message names it.
        """
        value = key if value is None else value
        attend, cell = self.attention, self.cell
        self._check_key(key, u_key)
        if isinstance(attend, AdditiveAttention) and not only_attention(key.device.type):
            try:
                weights = cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh
                v = attend.v if attend.g is None else normalized(attend.v, attend.g)
                return attention_decoder(
                    x,
                    state,
                    attend.u(key) if u_key is None else u_key,
                    value,
                    (attend.w.weight, attend.w.bias, v),
                    weights,
                    mode=self._mode(),
                    k_lens=k_lens,
                )
            except (AttributeError, RuntimeError, TypeError, ValueError):
                # By the names that they have here, which only an error is worth the time for.
                self._checked_state(x, state, key, value, k_lens, u_key)
                raise
        s, c_0 = self._checked_state(x, state, key, value, k_lens, u_key)
        projected = attend.u(key) if u_key is None else u_key
        state = s if c_0 is None else (s, c_0)
        B, steps = key.size(0), []
        for x_i in x.unbind(1):
            query = s.reshape(B, s.size(0) // max(B, 1), s.size(1))
            c, a = attend(query, key, value, k_lens=k_lens, u_key=projected, need_weights=True)
            c = c.flatten(0, 1)
            state = cell(torch.cat([x_i, c], -1), state)
            s = state[0] if isinstance(state, tuple) else state
            steps.append((s, c, a.flatten(0, 1)))
        s, contexts, weights = (torch.stack(t, 1) for t in zip(*steps, strict=True))
        return s, contexts, weights, state

    def step(
        self,
        x: Tensor,
        state: State,
        key: Tensor,
        value: Tensor | None = None,
        *,
        k_lens: Tensor | None = None,
        u_key: Tensor | None = None,
    ) -> tuple[State, Tensor, Tensor]:
        """One step: x (N, I), the rest as in `forward`. Returns the state, the context (N, C) and
        the weights (N, Tk)."""
        _, contexts, weights, state = self(
            x.unsqueeze(1), state, key, value, k_lens=k_lens, u_key=u_key
        )
        return state, contexts.squeeze(1), weights.squeeze(1)

    def _check_key(self, key: Tensor, u_key: Tensor | None) -> None:
        check_rank("AttentionDecoder", "key", "B, Tk, key_size", key, 3)
        size = self.attention.key_size
        if size not in (None, key.size(2)):
            raise ValueError(
                f"AttentionDecoder: key must be (B, Tk, {size}) by attention, got "
                f"{tuple(key.shape)}"
            )
        if u_key is None:
            return
        check_rank("AttentionDecoder", "u_key", "B, Tk, A", u_key, 3)
        size = self.attention.projected_size or key.size(2)
        check_shape("AttentionDecoder", "u_key", "B, Tk, A", u_key, (*key.shape[:2], size))

    def _checked_state(
        self,
        x: Tensor,
        state: State,
        key: Tensor,
        value: Tensor,
        k_lens: Tensor | None,
        u_key: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """s_0 and c_0, which fit to the other arguments."""
        op, cell = "AttentionDecoder", self.cell
        s_0, c_0 = check_sequences(op, x, state, key, value, self._mode())
        states = {"state": s_0}
        if isinstance(cell, nn.LSTMCell):
            check_tensor(op, "c of state", c_0)
            states = {"h of state": s_0, "c of state": c_0}
        for name, t in states.items():
            check_shape(op, name, "N, H", t, (x.size(0), cell.hidden_size))
        check_shape(op, "value", "B, Tk, C", value, (*key.shape[:2], value.size(2)))
        if x.size(2) + value.size(2) != cell.input_size:
            raise ValueError(
                f"{op}: x and value must have the {cell.input_size} features of the cell's input "
                f"together, got {x.size(2)} and {value.size(2)}"
            )
        if k_lens is not None:
            check_vector(op, "k_lens", k_lens, key, key.size(0), INT, "key")
        tensors = {"x": x, **states, "key": key, "value": value}
        tensors |= {} if u_key is None else {"u_key": u_key}
        check_alike(op, tensors, cell.weight_ih, "the parameters")
        return s_0, c_0

    def _mode(self) -> str:
        if isinstance(self.cell, nn.RNNCell):
            return f"RNN_{self.cell.nonlinearity.upper()}"
        return "LSTM" if isinstance(self.cell, nn.LSTMCell) else "GRU"
