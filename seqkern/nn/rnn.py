"""RNN, LSTM and GRU layers: ``torch.nn``'s parameters and interface on seqkern's ops."""

from typing import Any, NamedTuple, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.rnn import PackedSequence
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from seqkern.ops._checks import autocast_dtype
from seqkern.ops.choice import has_native_kernel
from seqkern.ops.recurrent import prepacked_op, recurrent, unobserved

_PLAIN = (Tensor, torch.nn.Parameter)


def _as_hx(states: tuple[Tensor, ...]) -> Any:
    """The pair (h, c) of an LSTM, the one tensor h of the others."""
    return states if len(states) == 2 else states[0]


def refresh_weights(layer: torch.nn.RNNBase) -> None:
    """Recompute the weights that a layer otherwise recomputes in a pre-hook of every call: pruned
    ones, and those of the norms of ``torch.nn.utils`` that are no parametrizations."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod | WeightNorm | SpectralNorm):
            hook(layer, ())


class _Snapshot(NamedTuple):
    """What ``prepack()`` took. Its own copy is None, for the deep copy of a parametrized layer,
    which ``__getstate__`` of the layer is not asked for.

    layers: the packed weights of every layer.
    direct: of a single layer what `prepacked_op` reads, where it has a kernel.
    """

    layers: list[list[Tensor]]
    direct: Tensor | None

    def __reduce__(self) -> Any:
        return type(None), ()


class _Recurrent(torch.nn.RNNBase):
    """What the three layers share: everything but the constructor.

    ``torch.nn.RNNBase`` gives constructor, initialisation, attributes and ``repr``. The public
    layers are not subclasses of ``torch.nn.LSTM`` and its siblings because ``torch.compile``
    refuses every instance of those three classes.
    """

    # A class attribute, so that a module whose class is changed to this one has it too. It is a
    # _Snapshot or None.
    _packed: Any = None

    # RNNBase caches the weights in this list. A cache is stale under parametrizations and
    # torch.func.functional_call, and holds computed tensors, which deepcopy refuses.
    @property
    def _flat_weights(self) -> list[Tensor | None]:
        return [getattr(self, name, None) for name in self._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        pass

    def flatten_parameters(self) -> None:
        """Do nothing: the ops read the weights wherever they lie."""

    def prepack(self) -> None:
        """Take a snapshot of the weights in the kernels' layout, for calls without gradient.

        From here to ``unpack()`` every call that needs no gradient computes with the snapshot,
        whatever becomes of the weights; a call that needs one reads the weights as they are.
        A snapshot saves the packing of every call, and a single layer most of the call itself.
        It is no part of ``state_dict()``, is left behind by pickle, by copies and by the replicas
        of ``DataParallel``, and ends with ``load_state_dict()`` and with everything that moves or
        converts the module (``to``, ``double``, ``share_memory``). It has the weights' dtype:
        under autocast to another one a call without gradient raises RuntimeError. A graph that
        ``torch.export`` or ``torch.jit.trace`` takes has the weights and no snapshot.
        """
        refresh_weights(self)
        weights = [weight.detach() for weight in self._live_weights()]
        n = len(weights) // self.num_layers
        D = 2 if self.bidirectional else 1
        layers = [
            torch.ops.seqkern.recurrent_pack(weights[i * n : (i + 1) * n], self.mode, D)
            for i in range(self.num_layers)
        ]
        device = weights[0].device.type
        is_direct = self.num_layers == 1 and has_native_kernel("recurrent_prepacked", device)
        self._packed = _Snapshot(layers, layers[0][0] if is_direct else None)

    def unpack(self) -> None:
        """Drop the snapshot of ``prepack()``, if there is one: calls read the weights again."""
        self._packed = None

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in super().__getstate__().items() if k != "_packed"}

    def _replicate_for_data_parallel(self) -> Any:
        replica = super()._replicate_for_data_parallel()
        replica.unpack()  # its weights are on another device
        return replica

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unpack()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.unpack()
        super()._load_from_state_dict(*args, **kwargs)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        """Run the layer; the shapes are in the docstring of the class.

        Raises:
            ValueError: ``input`` has a wrong number of dimensions, or not the weights' dtype.
            RuntimeError: a size of ``input`` or ``hx`` is wrong, a device or the dtype of
                ``hx`` differs, or the sequence is empty.
        """
        if self._is_direct(input) and (result := self._forward_direct(input, hx)):
            return result
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() != 3:
            return self._forward_unbatched(input, hx)
        x = input.transpose(0, 1) if self.batch_first else input
        y, states = self._run(x, None if hx is None else self._as_states(hx))
        return y.transpose(0, 1) if self.batch_first else y, _as_hx(states)

    def _is_direct(self, input: Tensor | PackedSequence) -> TypeGuard[Tensor]:
        """Whether one call of `prepacked_op` computes this input, if its sizes are right."""
        return (
            self._packed is not None
            and self._packed.direct is not None
            and type(input) is Tensor
            and input.dim() == 3
            and unobserved()
        )

    def _forward_direct(self, input: Tensor, hx: Any) -> Any:
        """`forward` on the snapshot; None for arguments that only the checks there can judge."""
        packed = self._packed
        if packed is None:  # another thread has dropped it
            return None
        h_0, c_0 = hx, None
        if hx is not None:
            if self.mode == "LSTM":
                if type(hx) is not tuple or len(hx) != 2 or type(hx[1]) not in _PLAIN:
                    return None
                h_0, c_0 = hx
            if type(h_0) not in _PLAIN:
                return None
        x = input.transpose(0, 1) if self.batch_first else input
        try:
            y, h_n, c_n = prepacked_op(x, h_0, c_0, packed.direct)
        except RuntimeError:  # forward() says it in torch.nn's words
            return None
        y = y.transpose(0, 1) if self.batch_first else y
        return y, ((h_n, c_n) if self.mode == "LSTM" else h_n)

    def _forward_unbatched(self, input: Tensor, hx: Any) -> tuple[Tensor, Any]:
        if input.dim() != 2:
            raise ValueError(
                f"{self._get_name()}: expected input to be 2D or 3D, got {input.dim()}D"
            )
        states = None if hx is None else self._as_states(hx)
        if states is not None:
            if any(state.dim() != 2 for state in states):
                dims = " and ".join(f"{state.dim()}-D" for state in states)
                raise RuntimeError(f"hx must be 2-D for unbatched 2-D input, got {dims}")
            states = tuple(state.unsqueeze(1) for state in states)
        y, states = self._run(input.unsqueeze(1), states)
        return y.squeeze(1), _as_hx(tuple(state.squeeze(1) for state in states))

    def _forward_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        data, batch_sizes, order, inverse = input
        states = None if hx is None else self._as_states(hx)
        if states is not None and order is not None:
            states = tuple(state.index_select(1, order) for state in states)
        y, states = self._run(data, states, batch_sizes)
        if inverse is not None:
            states = tuple(state.index_select(1, inverse) for state in states)
        return PackedSequence(y, batch_sizes, order, inverse), _as_hx(states)

    def _as_states(self, hx: Any) -> tuple[Tensor, ...]:
        if self.mode != "LSTM":
            return (hx,)
        h_0, c_0 = hx[0], hx[1]
        if len(hx) != 2:
            raise RuntimeError(f"hx must be a pair (h_0, c_0), got {len(hx)} tensors")
        return h_0, c_0

    def _run(
        self, x: Tensor, states: tuple[Tensor, ...] | None, batch_sizes: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """All layers over x (T, B, I), or (N, I) with ``batch_sizes``; (h, c) or (h,)."""
        weights = self._live_weights()
        self._check_input(x, weights[0], batch_sizes)
        B = x.shape[1] if batch_sizes is None else int(batch_sizes[0])
        if states is None:
            states = self._zero_states(x, B)
        else:
            self._check_states(states, x, B)
        if self.num_layers > 1:
            return self._run_stack(x, states, weights, batch_sizes)
        y, h_n, c_n = recurrent(
            self.mode,
            x,
            states[0],
            states[1] if len(states) == 2 else None,
            weights,
            batch_sizes=batch_sizes,
            packed=None if (packed := self._packed) is None else packed.layers[0],
        )
        return y, (h_n,) if c_n is None else (h_n, c_n)

    def _run_stack(
        self,
        x: Tensor,
        states: tuple[Tensor, ...],
        weights: list[Tensor],
        batch_sizes: Tensor | None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        D = 2 if self.bidirectional else 1
        n = len(weights) // self.num_layers
        last: list[tuple[Tensor, ...]] = []
        for layer in range(self.num_layers):
            if layer > 0 and self.dropout > 0 and self.training:
                x = F.dropout(x, self.dropout)
            first = [state[layer * D : (layer + 1) * D] for state in states]
            x, h_n, c_n = recurrent(
                self.mode,
                x,
                first[0],
                first[1] if len(first) == 2 else None,
                weights[layer * n : (layer + 1) * n],
                batch_sizes=batch_sizes,
                packed=None if (packed := self._packed) is None else packed.layers[layer],
            )
            last.append((h_n,) if c_n is None else (h_n, c_n))
        return x, tuple(torch.cat(layers) for layers in zip(*last, strict=True))

    def _zero_states(self, x: Tensor, B: int) -> tuple[Tensor, ...]:
        rows = self.num_layers * 2 if self.bidirectional else self.num_layers
        P, H = self.proj_size or self.hidden_size, self.hidden_size
        h_0 = torch.zeros(rows, B, P, dtype=x.dtype, device=x.device)
        if self.mode != "LSTM":
            return (h_0,)
        # One block of zeros serves both: the ops write to none of their inputs.
        return h_0, h_0 if P == H else x.new_zeros(rows, B, H)

    def _check_input(self, x: Tensor, weight: Tensor, batch_sizes: Tensor | None) -> None:
        """Refuse what ``torch.nn`` refuses, with its exception types."""
        shape = x.shape
        if x.dtype != weight.dtype and autocast_dtype(x) is None:
            # torch.nn.LSTM looks at a packed input's dtype only in the product.
            unchecked = batch_sizes is not None and self.mode == "LSTM"
            raise (RuntimeError if unchecked else ValueError)(
                f"input must have the dtype of the weights, {weight.dtype}, got {x.dtype}"
            )
        if len(shape) != (3 if batch_sizes is None else 2) or shape[-1] != self.input_size:
            layout = "(T, B, I)" if batch_sizes is None else "(N, I) in a PackedSequence"
            raise RuntimeError(
                f"input must be {layout} with I = input_size = {self.input_size}, "
                f"got {tuple(shape)}"
            )
        if shape[0] == 0:
            raise RuntimeError(f"input must have at least one time step, got {tuple(shape)}")
        if x.device != weight.device:
            raise RuntimeError(
                f"input must be on the device of the weights, {weight.device}, got {x.device}"
            )

    def _check_states(self, states: tuple[Tensor, ...], x: Tensor, B: int) -> None:
        """Refuse what ``torch.nn`` refuses, with its exception type."""
        rows = self.num_layers * 2 if self.bidirectional else self.num_layers
        features = self.proj_size or self.hidden_size
        for i, state in enumerate(states):
            if state.shape != (rows, B, features):
                name = f"hidden[{i}]" if len(states) == 2 else "hidden"
                raise RuntimeError(
                    f"Expected {name} size {(rows, B, features)}, got {list(state.shape)}"
                )
            if state.dtype != x.dtype and autocast_dtype(x) is None:
                raise RuntimeError(f"hx must be {x.dtype} as input is, got {state.dtype}")
            if state.device != x.device:
                raise RuntimeError(f"hx must be on {x.device} as input is, got {state.device}")
            features = self.hidden_size

    def _live_weights(self) -> list[Tensor]:
        """The weights by name as they are now, in the order of ``_flat_weights_names``."""
        parameters: Any = self._parameters
        try:
            # Thrice as fast as getattr, which reaches a parameter only after two failed lookups.
            return [parameters[name] for name in self._flat_weights_names]
        except KeyError:
            return [getattr(self, name) for name in self._flat_weights_names]


class RNN(_Recurrent):
    """Elman RNN over a sequence, in place of ``torch.nn.RNN``.

    For each layer and direction, with f = tanh, or relu where ``nonlinearity="relu"``
    (Elman, Finding Structure in Time, 1990)::

        h_t = f(W_ih x_t + b_ih + W_hh h_(t-1) + b_hh)

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: layers, each reading the output of the one before. Default 1.
        nonlinearity: ``"tanh"`` (default) or ``"relu"``.
        bias: whether b_ih and b_hh exist. Default True.
        batch_first: input and output are (B, T, .) in place of (T, B, .). Default False.
        dropout: probability of dropping an output between layers, in training. Default 0.
        bidirectional: run a second set of weights backwards in time. Default False.
        device, dtype: of the parameters.

    Shapes, with D = 2 where bidirectional, else 1:
        - input: (T, B, I), (B, T, I) if ``batch_first``, (T, I) without batch, or a
          ``PackedSequence``.
        - hx: (num_layers*D, B, H), without batch (num_layers*D, H); zeros if not given.
        - output: as the input, with D*H features; h_n: as hx.

    Parameters: ``weight_ih_l{k}`` (H, I or D*H), ``weight_hh_l{k}`` (H, H), ``bias_ih_l{k}`` and
    ``bias_hh_l{k}`` (H,), each again with ``_reverse`` where bidirectional.

    Other than ``torch.nn.RNN``: it is a ``torch.nn.RNNBase`` but no subclass of ``torch.nn.RNN``
    (``torch.compile`` refuses those); under autocast it computes and returns the autocast dtype;
    ``torch.compile``, ``torch.export`` and ``torch.jit.trace`` take it, ``torch.jit.script`` does
    not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("RNN: proj_size is an argument of LSTM only")
        if len(args) > 3:
            self.nonlinearity, args = args[3], args[:3] + args[4:]
        else:
            self.nonlinearity = kwargs.pop("nonlinearity", "tanh")
        if self.nonlinearity not in ("tanh", "relu"):
            raise ValueError(
                f"RNN: nonlinearity must be 'tanh' or 'relu', got {self.nonlinearity!r}"
            )
        super().__init__(f"RNN_{self.nonlinearity.upper()}", *args, **kwargs)


class LSTM(_Recurrent):
    """Long short-term memory over a sequence, in place of ``torch.nn.LSTM``.

    For each layer and direction (Hochreiter and Schmidhuber, Long Short-Term Memory, 1997, with
    the forget gate of Gers, Schmidhuber and Cummins, 2000)::

        i, f, o = sigmoid(W_i* x_t + b_i* + W_h* h_(t-1) + b_h*)    * = i, f, o
        g       = tanh(W_ig x_t + b_ig + W_hg h_(t-1) + b_hg)
        c_t     = f c_(t-1) + i g
        h_t     = o tanh(c_t)

    With ``proj_size`` P > 0 the state that is put out and fed back is W_hr h_t (Sak, Senior and
    Beaufays, 2014, arXiv:1402.1128). The weights hold the gates' rows in the order i, f, g, o.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the cell state.
        num_layers: layers, each reading the output of the one before. Default 1.
        bias: whether b_ih and b_hh exist. Default True.
        batch_first: input and output are (B, T, .) in place of (T, B, .). Default False.
        dropout: probability of dropping an output between layers, in training. Default 0.
        bidirectional: run a second set of weights backwards in time. Default False.
        proj_size: P, features of h where it is projected, less than H; 0 (default): P = H, no
            projection.
        device, dtype: of the parameters.

    Shapes, with D = 2 where bidirectional, else 1:
        - input: (T, B, I), (B, T, I) if ``batch_first``, (T, I) without batch, or a
          ``PackedSequence``.
        - hx: (h_0, c_0) of (num_layers*D, B, P) and (num_layers*D, B, H), without batch
          (num_layers*D, P) and (num_layers*D, H); zeros if not given.
        - output: as the input, with D*P features; (h_n, c_n): as hx.

    Parameters: ``weight_ih_l{k}`` (4H, I or D*P), ``weight_hh_l{k}`` (4H, P), ``bias_ih_l{k}``
    and ``bias_hh_l{k}`` (4H,), ``weight_hr_l{k}`` (P, H) if projected, each again with
    ``_reverse`` where bidirectional.

    Other than ``torch.nn.LSTM``: it is a ``torch.nn.RNNBase`` but no subclass of ``torch.nn.LSTM``
    (``torch.compile`` refuses those); under autocast it computes and returns the autocast dtype;
    ``torch.compile``, ``torch.export`` and ``torch.jit.trace`` take it, ``torch.jit.script`` does
    not.
    """

    # Methods of torch.nn.LSTM that a subclass may call: RNNBase's, with a pair (h, c) for h, which
    # the type checker takes for an error there too.
    check_forward_args = torch.nn.LSTM.check_forward_args  # pyright: ignore[reportAssignmentType]
    permute_hidden = torch.nn.LSTM.permute_hidden  # pyright: ignore[reportAssignmentType]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__("LSTM", *args, **kwargs)

    def get_expected_cell_size(
        self, input: Tensor, batch_sizes: Tensor | None
    ) -> tuple[int, int, int]:
        """The size (num_layers*D, B, H) that c_0 must have for this input."""
        rows, B, _ = self.get_expected_hidden_size(input, batch_sizes)
        return rows, B, self.hidden_size


class GRU(_Recurrent):
    """Gated recurrent unit over a sequence, in place of ``torch.nn.GRU``.

    For each layer and direction (Cho et al., 2014, arXiv:1406.1078; the reset gate acts after
    the recurrent product, as in cuDNN)::

        r, z = sigmoid(W_i* x_t + b_i* + W_h* h_(t-1) + b_h*)    * = r, z
        n    = tanh(W_in x_t + b_in + r (W_hn h_(t-1) + b_hn))
        h_t  = (1 - z) n + z h_(t-1)

    The weights hold the gates' rows in the order r, z, n.

    Args:
        input_size: I, features of the input.
        hidden_size: H, features of the state.
        num_layers: layers, each reading the output of the one before. Default 1.
        bias: whether b_ih and b_hh exist. Default True.
        batch_first: input and output are (B, T, .) in place of (T, B, .). Default False.
        dropout: probability of dropping an output between layers, in training. Default 0.
        bidirectional: run a second set of weights backwards in time. Default False.
        device, dtype: of the parameters.

    Shapes, with D = 2 where bidirectional, else 1:
        - input: (T, B, I), (B, T, I) if ``batch_first``, (T, I) without batch, or a
          ``PackedSequence``.
        - hx: (num_layers*D, B, H), without batch (num_layers*D, H); zeros if not given.
        - output: as the input, with D*H features; h_n: as hx.

    Parameters: ``weight_ih_l{k}`` (3H, I or D*H), ``weight_hh_l{k}`` (3H, H), ``bias_ih_l{k}``
    and ``bias_hh_l{k}`` (3H,), each again with ``_reverse`` where bidirectional.

    Other than ``torch.nn.GRU``: it is a ``torch.nn.RNNBase`` but no subclass of ``torch.nn.GRU``
    (``torch.compile`` refuses those); under autocast it computes and returns the autocast dtype;
    ``torch.compile``, ``torch.export`` and ``torch.jit.trace`` take it, ``torch.jit.script`` does
    not.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if "proj_size" in kwargs:
            raise ValueError("GRU: proj_size is an argument of LSTM only")
        super().__init__("GRU", *args, **kwargs)
