"""The CUDA kernels of csrc/cuda: normalisation, log-sum-exp, loss and every gradient in one launch.

The launch is cooperative and has grid-wide barriers. Each block writes its parts of a sum to places where no other
block writes, and the parts are added in a fixed order. So results are bitwise reproducible on one device. The host
never waits for the device, so a CUDA graph can capture the launch. The workspace holds the packed rows and a few
vectors for each side. The forward divides the columns into shares (csrc/cuda/plan.h), and each share has two more
vectors.
"""
