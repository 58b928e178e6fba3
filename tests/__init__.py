"""The tests; what they need in the environment before torch is loaded is set here, for them and all they start."""

import os

# Their tensors are too small for threads to pay: a run of one rank on two cores takes a third of the time without.
os.environ.setdefault("OMP_NUM_THREADS", "1")
