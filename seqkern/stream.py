"""Streaming: recurrent layers one time step at a time, in microseconds."""

import importlib
from itertools import chain
from numbers import Integral

import torch
from torch import Tensor
from torch.nn import RNNBase

from seqkern import nn
from seqkern.nn.rnn import refresh_weights

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)
_LAYERS = (torch.nn.RNN, torch.nn.LSTM, torch.nn.GRU, nn.RNN, nn.LSTM, nn.GRU)


def _memory(t: Tensor):
    """A NumPy view of a tensor's bytes, whatever its dtype."""
    return t.flatten().view(torch.uint8).numpy()


def _check_layer(layer: RNNBase) -> None:
    if not isinstance(layer, RNNBase):
        raise TypeError(f"Stream: layer must be an LSTM, GRU or RNN, got {type(layer).__name__}")
    own = "forward" in vars(layer)
    if own or type(layer).forward not in [known.forward for known in _LAYERS]:
        raise TypeError(
            f"Stream: layer must compute what an LSTM, GRU or RNN does, got a "
            f"{type(layer).__name__} with a forward of its own"
        )
    if layer.bidirectional:
        raise ValueError("Stream: layer must run in one direction, got a bidirectional one")


def _weights(layer: RNNBase) -> list[list[Tensor]]:
    """Of every layer of the stack, for the engine to read: it looks at the first dtype alone."""
    refresh_weights(layer)
    weights = [[w.detach().contiguous() for w in each] for each in layer.all_weights]
    first = weights[0][0]
    if first.dtype not in _DTYPES:
        raise TypeError(f"Stream: the layer's dtype must be floating-point, got {first.dtype}")
    for name, w in zip(chain(*layer._all_weights), chain(*weights), strict=True):
        if w.device.type != "cpu":
            raise ValueError(f"Stream: layer must be on the CPU, got {name} on {w.device}")
        if w.dtype != first.dtype:
            raise ValueError(
                f"Stream: {name} must be {first.dtype} as the first weight is, got {w.dtype}"
            )
    return weights


class Stream:
    """A recurrent layer that holds its state and takes one time step per call.

    For audio, control and reinforcement-learning loops, where a call of a layer costs more than
    its arithmetic. The weights are packed once: a Stream is a snapshot, and a later change of the
    layer's weights is not seen (make a new Stream). Dropout between layers is off, as in
    evaluation. A step allocates nothing, passes no dispatcher and runs no hooks of the layer.

    Args:
        layer: an LSTM, GRU or RNN of seqkern.nn or torch.nn, on the CPU, of any number of layers,
            in one direction.
        batch_size: B rows that step together; None for a single row without a batch dimension.

    Raises:
        TypeError: `layer` is not such a layer or has a forward of its own, its dtype is not a
            floating-point one, or `batch_size` is no int.
        ValueError: it is bidirectional, not on the CPU or of several dtypes, or `batch_size` is
            below 1 or more than memory holds.
        ImportError: the C++ extension was not built.

    Example:
        >>> stream = Stream(seqkern.nn.GRU(64, 128))
        >>> y = stream.step(np.zeros(64, dtype=np.float32))  # (128,)
    """

    def __init__(self, layer: RNNBase, batch_size: int | None = None) -> None:
        _check_layer(layer)
        if batch_size is not None:
            if isinstance(batch_size, bool) or not isinstance(batch_size, Integral):
                raise TypeError(f"Stream: batch_size must be an int or None, got {batch_size!r}")
            if batch_size < 1:
                raise ValueError(f"Stream: batch_size must be at least 1, got {batch_size}")
        weights = _weights(layer)
        first = weights[0][0]
        numpy = importlib.import_module("numpy")  # not needed by `import seqkern`
        engine = _engine()
        rows = 1 if batch_size is None else int(batch_size)
        outputs = layer.proj_size or layer.hidden_size
        cells = layer.hidden_size if layer.mode == "LSTM" else 0
        count = layer.num_layers
        self._batched = batch_size is not None
        self._array_type = numpy.ndarray
        self._dtype, self._itemsize = first.dtype, first.itemsize
        lead = (rows,) if self._batched else ()
        self._shape = (*lead, layer.input_size)
        # Tensors made in inference mode could not be reset outside of it.
        with torch.inference_mode(False):
            try:
                self._h, c, y = (
                    torch.zeros(count, rows, n, dtype=first.dtype, device="cpu")
                    for n in (outputs, cells, outputs)
                )
            except (RuntimeError, TypeError) as error:
                raise ValueError(
                    f"Stream: batch_size must be one that memory has room for, got {batch_size}"
                ) from error
            self._y = y[-1].view(*lead, outputs)
        self._c = c if cells else None
        # NumPy has no bfloat16.
        self._y_numpy = None if first.dtype == torch.bfloat16 else self._y.numpy()
        self._numpy_dtype = None if self._y_numpy is None else self._y_numpy.dtype
        self._engine = engine(
            layer.mode, str(first.dtype).removeprefix("torch."), rows, layer.input_size,
            layer.hidden_size, outputs, layer.bias, layer.proj_size > 0,
            [[_memory(w) for w in each] for each in weights],
            _memory(self._h), _memory(c), _memory(y),
        )  # fmt: skip

    def step(self, x):
        """One time step.

        Args:
            x: (I,), or (B, I) with a batch size; contiguous, of the layer's dtype; a NumPy array
                or a CPU tensor.

        Returns:
            The output of the last layer, (P,) or (B, P), of the kind that x is. It is the
            stream's own memory, overwritten by the next step: copy what has to stay.

        Raises:
            TypeError: x is neither an array nor a tensor, of a subclass of Tensor, or of another
                dtype.
            ValueError: x has another shape, is not contiguous, not on the CPU, a view that
                negates (`Tensor.is_neg`), or without values in memory: functionalized, freed.
        """
        if isinstance(x, self._array_type):
            if x.dtype == self._numpy_dtype and x.shape == self._shape and x.flags.c_contiguous:
                self._engine.step(x)
                return self._y_numpy
        elif type(x) in _PLAIN and (
            x.dtype == self._dtype
            and x.shape == self._shape
            and x.is_contiguous()
            and x.is_cpu
            and not x.is_neg()
            # Without storage of its own a tensor begins at 0, whatever its device says.
            and x.data_ptr() != x.storage_offset() * self._itemsize
        ):
            self._engine.step_address(x.data_ptr())
            return self._y
        raise self._refusal(x)

    def _refusal(self, x) -> Exception:
        is_tensor = type(x) in _PLAIN
        if not is_tensor and not isinstance(x, self._array_type):
            return TypeError(f"Stream.step: x must be an array or tensor, got {type(x).__name__}")
        expected = self._dtype if is_tensor else self._numpy_dtype
        if x.dtype != expected:
            wanted = "a tensor (NumPy has no bfloat16)" if expected is None else expected
            return TypeError(f"Stream.step: x must be {wanted}, got {x.dtype}")
        if tuple(x.shape) != self._shape:
            return ValueError(f"Stream.step: x must be {self._shape}, got {tuple(x.shape)}")
        if is_tensor and not x.is_cpu:
            return ValueError(f"Stream.step: x must be on the CPU, got {x.device}")
        if is_tensor and x.is_neg():
            return ValueError("Stream.step: x must be no negated view, got one; see resolve_neg()")
        if is_tensor and x.is_contiguous():
            return ValueError("Stream.step: x must have values in memory, got a tensor without")
        return ValueError("Stream.step: x must be contiguous")

    @property
    def state(self) -> Tensor | tuple[Tensor, Tensor]:
        """A copy of h (layers, P), or (layers, B, P) with a batch size; for LSTM of (h, c)."""
        h = self._h if self._batched else self._h[:, 0]
        if self._c is None:
            return h.clone()
        c = self._c if self._batched else self._c[:, 0]
        return h.clone(), c.clone()

    def reset(self, state: Tensor | tuple[Tensor, Tensor] | None = None) -> None:
        """Begins a new sequence, from zeros or from a state as `state` returns it.

        Raises:
            TypeError: `state` is a tuple and the layer no LSTM, or the other way round, or what
                should be a tensor is none, or of a subclass or not of a floating-point dtype.
            ValueError: the tuple is no pair, or a tensor has the wrong shape, or no values in
                memory.
        """
        own = [self._h] if self._c is None else [self._h, self._c]
        if state is None:
            for tensor in own:
                tensor.zero_()
            return
        if isinstance(state, tuple) != (self._c is not None):
            expected = "h" if self._c is None else "a tuple (h, c)"
            raise TypeError(f"Stream.reset: state must be {expected}, got {type(state).__name__}")
        given = state if isinstance(state, tuple) else (state,)
        if len(given) != len(own):
            raise ValueError(
                f"Stream.reset: state must be a tuple (h, c), got one of {len(given)} tensors"
            )
        views = [t if self._batched else t[:, 0] for t in own]
        for name, new, old in zip("hc", given, views, strict=False):
            if type(new) not in _PLAIN:
                raise TypeError(f"Stream.reset: {name} must be a Tensor, got {type(new).__name__}")
            if not new.is_floating_point():
                raise TypeError(f"Stream.reset: {name} must be floating-point, got {new.dtype}")
            if new.shape != old.shape:
                expected, came = tuple(old.shape), tuple(new.shape)
                raise ValueError(f"Stream.reset: {name} must be {expected}, got {came}")
            dense = new.layout == torch.strided
            if not dense or new.data_ptr() == new.storage_offset() * new.itemsize:
                raise ValueError(
                    f"Stream.reset: {name} must have values in memory, got a tensor without"
                )
        with torch.no_grad():  # or the stream would hold the graph of whatever made the state
            for new, old in zip(given, views, strict=True):
                old.copy_(new)


def _engine():
    try:
        return importlib.import_module("seqkern._stream").Engine
    except ModuleNotFoundError as error:
        raise ImportError(f"Stream needs seqkern's C++ extension: {error}") from error
