"""Triton kernels: normalisation, log-sum-exp, loss and every gradient on a GPU, on the matrix units.

One source for NVIDIA and AMD. The forward forms half of the similarity matrix, the backward the whole of it once, by
row blocks: with u = 2 M^2 D flops, 2.5u in all. Nothing is added atomically, so a result has the same bits each time;
nothing waits for the device. Memory: packed rows, a plane of sums for each thousand rows, and beyond 256 features a
panel of G (backward.py).

Under Triton's interpreter (TRITON_INTERPRET=1 before it is imported) the kernels take tensors in host memory.
"""
