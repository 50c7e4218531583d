"""Tools that prove Triton kernels without a GPU: interpreter, stand-in driver, compile gates."""
