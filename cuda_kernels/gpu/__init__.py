"""The seam between kernels and CUDA."""
