"""Stand-ins for what is dear to start: worker groups, a cluster's starts, a learner that saves.

Each stands for one interface or class of the package, checks what it is given as strictly as the
real one would, and is itself held to that interface by tests/unit/test_fakes.py.
"""
