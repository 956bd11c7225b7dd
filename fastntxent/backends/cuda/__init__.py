"""The CUDA kernels of csrc/cuda: normalisation, log-sum-exp, loss and every gradient in one launch.

A cooperative launch whose blocks meet at barriers of the grid: nothing is added atomically, so a result has the same
bits each time on one device, nothing waits for the device, and a CUDA graph can hold it. Memory: packed rows, and a
few vectors for each share of the columns.
"""
