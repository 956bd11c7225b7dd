"""Checks kernels on the device they will run on, before "auto" takes them.

A child process runs the checks, so a fault, a hang or a crash becomes a verdict instead of ending a training run.
`process` starts the child with a deadline, and `child` is the code that the child runs. `store` keeps verdicts and
times, in one file per device model. `policy` chooses the backend that "auto" takes on an accelerator.

`child`, `checks`, `problems` and `timing` lie above the losses; the other modules lie below the backends.
"""
