"""Kernels proved on the device that they are to run on, before "auto" takes them.

A child process runs `checks` on a backend, so that a fault, a hang or a crash costs a message and no training run:
`process` starts it with a deadline, `child` is what it runs. The verdicts are kept by `store`, in a file for each
device model, and `policy` says which backend "auto" takes on an accelerator.

Everything here but `child`, `checks` and `timing`, which run in the child alone, lies below the backends.
"""
