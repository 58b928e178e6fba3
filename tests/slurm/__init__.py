"""The scripts in slurm/ on a real SLURM of several nodes on this machine.

sandbox.sh is a copy, unchanged, of the project's shared slurm_sandbox.sh (2026-11-22); its head says what it does.
"""
