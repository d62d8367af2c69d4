"""Kernels of hgprompt: tensors in, tensors out. Nothing here knows of tasks, pools or networks.

One file per kernel. Beside each kernel stands the same function in plain PyTorch, which is its specification.
"""
