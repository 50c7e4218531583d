"""The CUDA kernels on an emulator: built by g++, called through ctypes on CPU tensors."""
