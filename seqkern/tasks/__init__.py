"""Data, training, decoding and measuring for the models; needs the extra `demo`."""
