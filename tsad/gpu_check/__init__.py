"""Checks of the CUDA backend on the machine that has the GPU: `python -m tsad.gpu_check`."""
