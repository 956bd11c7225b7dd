"""Checks kernels on the device that they will run on, before `backend="auto"` may choose them.

A child process runs the checks, so a fault, a hang or a crash becomes a verdict instead of ending a training run.
`process` starts the child with a deadline, and `child` is the code that the child runs. `store` keeps verdicts and
times, in one file per device model. `policy` chooses the backend that "auto" takes on an accelerator.

In the order of imports, `child`, `checks`, `problems` and `timing` are above the losses. The other modules are below
the backends.
"""
