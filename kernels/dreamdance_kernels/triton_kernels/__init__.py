"""The Triton kernels and their launchers: plain tensors in and out, no autograd; they know nothing of dispatch.

Letters as in `dreamdance_kernels.segmented_attention`. Importing this package imports no Triton; its modules do.
"""
