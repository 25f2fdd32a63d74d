"""Which position encodings are found in which architectures of transformers: `python -m benchmarks.coverage`.

Every configuration of the installed transformers is built as a tiny random model. What it rotates and biases is
counted by patching its own functions while it runs (`truth`), never by detection; then it goes through the doors of
grape_compile (`doors`), each model in a process of its own (`processes`). The page and the JSON are written by `page`.
"""
