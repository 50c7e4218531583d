"""The ops: registration with torch.library, autograd, argument checks, public functions."""
