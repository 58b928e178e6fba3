"""Training: the loop, its two tasks, and what a run leaves behind."""
