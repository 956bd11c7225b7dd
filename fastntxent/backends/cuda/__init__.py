"""The CUDA kernels of csrc/cuda: normalisation, log-sum-exp, loss and every gradient in one launch.

It is a cooperative launch with grid-wide barriers. There are no atomic additions, so results are bitwise reproducible
on one device. The host never waits for the device, so a CUDA graph can capture the launch. Memory is the packed rows,
plus a few vectors per share of the columns.
"""
