"""Compare ModelScope's UNet here and in diffusers: same weights, same inputs, one process, runs interleaved.

    python tools/bench/unet.py

Prints forward, and forward with backward, as medians, with the fraction of the machine's measured matrix-multiply peak,
and the peak memory of activations; writes them, dated, into ``tools/bench/results``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from result import RESULTS, write_result
from torch import Tensor, nn

Run = Callable[[], Tensor]
CHANNELS = (64, 128, 256, 256)
CLIP = (2, 4, 8, 16, 16)
TOKENS, CONTEXT, HEAD = 77, 256, 32


def main() -> None:
    """Build both, check that they agree, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="interleaved runs of each (10)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the result")
    arguments = parser.parse_args()
    own, theirs = build()
    generator = torch.Generator().manual_seed(1)
    z_BCTHW = torch.randn(CLIP, generator=generator)
    t_B, text_BLD = torch.tensor([3, 700]), torch.randn(CLIP[0], TOKENS, CONTEXT, generator=generator)
    runs: dict[str, Run] = {
        "lvdm": lambda: own(z_BCTHW, t_B, text_BLD),
        "diffusers": lambda: theirs(z_BCTHW, t_B, text_BLD).sample,
    }
    with torch.no_grad():
        error = (runs["lvdm"]() - runs["diffusers"]()).abs().max().item()
    assert error < 1e-4, error
    seconds = measure(runs, arguments.rounds)
    work = {name: operations(run) for name, run in runs.items()}
    peak = matrix_peak()
    memory = {name: peak_activations(run) for name, run in runs.items()}
    from lvdm.models.remat import checkpoint_blocks

    checkpoint_blocks(own.remat_blocks())
    memory["lvdm, activation checkpointing"] = peak_activations(runs["lvdm"])

    lines = [f"{sum(p.numel() for p in own.parameters()) / 1e6:.2f} M parameters, largest difference {error:.1e}", ""]
    lines += ["| | forward, s | forward + backward, s | GFLOP/s | of the peak |", "| --- | --- | --- | --- | --- |"]
    for name in runs:
        forward, both = (statistics.median(seconds[name, kind]) for kind in ("forward", "both"))
        rate = work[name] / both / 1e9
        lines.append(f"| {name} | {forward:.3f} | {both:.3f} | {rate:.1f} | {rate * 1e9 / peak:.0%} |")
    for kind in ("forward", "both"):
        pairs = zip(seconds["diffusers", kind], seconds["lvdm", kind], strict=True)
        ratio = statistics.median(seconds["diffusers", kind]) / statistics.median(seconds["lvdm", kind])
        middle = statistics.median(a / b for a, b in pairs)
        lines.append(f"\ndiffusers / lvdm, {kind}: {ratio:.3f} (median of the pairs' ratios {middle:.3f})")
    lines += ["", f"matrix-multiply peak, measured: {peak / 1e9:.1f} GFLOP/s", "", "| peak of activations | MB | |"]
    lines += ["| --- | --- | --- |"]
    lines += [f"| {name} | {size / 1e6:.0f} | {size / memory['diffusers']:.0%} |" for name, size in memory.items()]
    model = f"channels {CHANNELS}, heads of {HEAD}, clip {'x'.join(map(str, CLIP))}, {TOKENS} text tokens of {CONTEXT}"
    lines = [f"{model}, fp32, {torch.get_num_threads()} threads.", "", *lines]
    write_result(arguments.results, "unet", "ModelScope's UNet against diffusers'", ["torch", "diffusers"], lines)


def build() -> tuple[nn.Module, nn.Module]:
    """Ours and theirs with the same weights, none of them zero."""
    from diffusers import UNet3DConditionModel

    from lvdm.config import ModelScopeUNetConfig, parse_config
    from lvdm.models.build import build_model
    from lvdm.weights.diffusers import read_unet3d

    torch.manual_seed(0)
    theirs = UNet3DConditionModel(
        block_out_channels=CHANNELS, cross_attention_dim=CONTEXT, attention_head_dim=HEAD, sample_size=CLIP[-1]
    ).eval()
    for parameter in theirs.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        model, tensors = read_unet3d(folder)
        own = build_model(parse_config(ModelScopeUNetConfig, model, "bench"), seed=0)
        own.load_state_dict(dict(tensors))
    return own, theirs


def backward(run: Run) -> None:
    """A forward and a backward pass; gradients are added to those that are there."""
    run().square().mean().backward()


def measure(runs: dict[str, Run], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Seconds by name and kind, after one warm-up, the networks taking turns."""
    seconds: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in runs for kind in ("forward", "both")}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            with torch.no_grad():
                run()
            middle = time.perf_counter()
            backward(run)
            if number:
                seconds[name, "forward"].append(middle - start)
                seconds[name, "both"].append(time.perf_counter() - middle)
    return seconds


def operations(run: Run) -> float:
    """Floating-point operations of products and convolutions in a forward and backward pass.

    Convolutions over frames are products here and are counted by what they multiply, so without padding.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        backward(run)
    return float(counter.get_total_flops())


def matrix_peak(size: int = 2048, tries: int = 7) -> float:
    """Operations a second of the best of a few large fp32 matrix products."""
    a, b = torch.randn(2, size, size).unbind()
    best = float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_activations(run: Run) -> int:
    """Largest sum of bytes allocated at one time by a forward and backward pass, gradients of weights being there."""
    from torch.profiler import ProfilerActivity, profile

    backward(run)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        backward(run)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    total = largest = 0
    for _, size in changes:
        total += size
        largest = max(largest, total)
    return largest


if __name__ == "__main__":
    main()
