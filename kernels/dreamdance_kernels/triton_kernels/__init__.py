"""The Triton kernels and their launchers: tensors in, tensors out, without autograd and without the dispatch.

Letters as in `dreamdance_kernels.segmented_attention`. This package does not import Triton; its modules do.
"""
