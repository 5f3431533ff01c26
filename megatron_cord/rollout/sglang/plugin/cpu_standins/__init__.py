"""What SGLang imports and a machine without CUDA lacks. For tests: on CUDA the server runs with its own kernels.

This directory itself goes on the import path of the server's processes, so that `sgl_kernel` is found in it; the
trainer imports nothing of it.
"""
