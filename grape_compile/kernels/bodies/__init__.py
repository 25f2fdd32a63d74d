"""The kernels themselves, in Triton's language: importing a file of this package needs Triton."""
