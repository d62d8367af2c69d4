"""Kernels of hgprompt: tensors in, tensors out; nothing here knows what a prompt or a file is.

One file per kernel. Beside each kernel stands the same function in plain PyTorch, which is its specification.
"""
