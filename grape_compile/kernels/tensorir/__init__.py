"""Operators of encodings in TensorIR, for any device that TVM compiles for; nothing in here needs torch."""
