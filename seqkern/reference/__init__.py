"""Every op in plain PyTorch: its documentation, its fallback and the oracle of its tests."""
