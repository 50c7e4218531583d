"""seqkern in other libraries; each module is imported by who needs it, with its library."""
