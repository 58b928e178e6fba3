"""The only place that talks to DeepSpeed and torch.distributed: ranks, ZeRO, optimiser with EMA, checkpoints."""
