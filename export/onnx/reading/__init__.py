"""An ONNX graph as a graph of ATen operators, so that what finds position encodings in models finds them in files."""
