"""What the server that ranks are forked from does once, and each rank would do anew."""

import deepspeed

# Which ops can be built here: DeepSpeed asks the compiler, for 0.3 s.
assert deepspeed.ops.__compatible_ops__
