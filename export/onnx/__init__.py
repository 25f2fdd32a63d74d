"""ONNX files of rewritten programs, and what checks them."""
