"""One-layer ONNX LSTM and GRU graphs built straight from torch.nn weights, and their sessions.

torch.onnx would export the same two operators after a trace; writing the node by hand keeps the
graph to that one node, so ONNX Runtime is timed on nothing else.
"""

from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

# Row blocks of torch (LSTM: i f g o, GRU: r z n) in the order of the ONNX operator
# (LSTM: i o f c, GRU: z r h).
ONNX_GATES = {"LSTM": (0, 3, 1, 2), "GRU": (1, 0, 2)}


def reorder_gates(mode: str, weight: torch.Tensor) -> np.ndarray:
    """Rows of a torch weight or bias (G*H, ...) in ONNX's gate order, as float32 NumPy."""
    blocks = weight.detach().float().chunk(len(ONNX_GATES[mode]))
    return torch.cat([blocks[gate] for gate in ONNX_GATES[mode]]).numpy()


def recurrent_model(module: torch.nn.RNNBase, with_state: bool) -> onnx.ModelProto:
    """The ONNX model of a one-layer, batch-second `torch.nn.LSTM` or `GRU`.

    Input X (T,B,I); with_state adds initial_h (D,B,H) and, for LSTM, initial_c (D,B,H).
    Outputs Y (T,D,B,H), Y_h and, for LSTM, Y_c (D,B,H). The bias input is [b_ih, b_hh];
    GRU uses linear_before_reset=1, which is torch's reset-after form.
    """
    mode, H, I = module.mode, module.hidden_size, module.input_size
    if mode not in ONNX_GATES:
        raise ValueError(f"module must be an LSTM or a GRU, got mode {mode!r}")
    if module.num_layers != 1 or module.batch_first or module.proj_size or not module.bias:
        raise ValueError("module must have one layer, biases, no projection and batch_first=False")
    D = 2 if module.bidirectional else 1
    suffixes = ("_l0", "_l0_reverse")[:D]
    W, R, B = (
        np.stack([_direction(module, parts, suffix) for suffix in suffixes])
        for parts in (("weight_ih",), ("weight_hh",), ("bias_ih", "bias_hh"))
    )
    states = ["h", "c"] if mode == "LSTM" else ["h"]
    state_inputs = [f"initial_{s}" for s in states] if with_state else []
    outputs = ["Y"] + [f"Y_{s}" for s in states]
    attributes: dict[str, Any] = {
        "hidden_size": H,
        "direction": "bidirectional" if D == 2 else "forward",
    }
    if mode == "GRU":
        attributes["linear_before_reset"] = 1
    node = helper.make_node(
        mode,
        ["X", "W", "R", "B", *(["", *state_inputs] if with_state else [])],
        outputs,
        **attributes,
    )
    float_info = helper.make_tensor_value_info
    shapes = {"Y": ["T", D, "B", H]}
    graph = helper.make_graph(
        [node],
        "recurrent",
        [float_info("X", TensorProto.FLOAT, ["T", "B", I])]
        + [float_info(name, TensorProto.FLOAT, [D, "B", H]) for name in state_inputs],
        [float_info(name, TensorProto.FLOAT, shapes.get(name, [D, "B", H])) for name in outputs],
        [numpy_helper.from_array(a, n) for a, n in ((W, "W"), (R, "R"), (B, "B"))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def _direction(module: torch.nn.RNNBase, parts: tuple[str, ...], suffix: str) -> np.ndarray:
    return np.concatenate([reorder_gates(module.mode, getattr(module, p + suffix)) for p in parts])


def session(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    """A CPU session with `threads` intra-op threads that do not spin between calls."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
