"""The CUDA kernels of csrc/cuda: normalisation, log-sum-exp, loss and every gradient in one launch.

It is a cooperative launch with grid-wide barriers. Each block writes its parts of a sum to a place of its own, and the
parts are added in a fixed order, so results are bitwise reproducible on one device. The host never waits for the
device, so a CUDA graph can capture the launch. The workspace holds the packed rows, a few vectors for each side, and
two for each share of the columns.
"""
