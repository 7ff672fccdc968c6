"""Speed and memory on one GPU at several sizes: training beside a Llama of the same shape, and sampling.

    python benchmarks/gpu.py benchmarks/records/gpu.json --only train --sizes 300M --minutes 9

Sizes are the coarse stage of `musiclm_small`, flat, with other transformers; weights and codes are random. A training
step is forward, backward and fused AdamW over bf16 parameters, without recomputation. All take `--steps` steps each in
turn, round after round; those that compile and allocate are not counted. Sampling makes one window, the pass over its
conditions included, and every round records its CUDA graph anew, as for a user.

The record is written after every turn, section by section and size by size, beside what it holds already: what is cut
off, or does not fit into one call, goes on in the next. MFU is the share of the device's peak that goes into the
model's own work: FLOPs of a window's training step × windows a second / peak. Those FLOPs are 3 × the forward pass, and
that is 2 × each matrix × positions and the pairs that a causal mask leaves in attention (`model.counting`).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from gpu_sampling import sample
from gpu_session import SIZES, Session, release
from gpu_training import train
from rich.console import Console
from stages import accelerator

SECTIONS = {"train": train, "decode": sample}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, help="JSON file to write, or to add to")
    parser.add_argument("--only", choices=SECTIONS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["100M", "300M", "1B"])
    parser.add_argument("--small", action="store_true", help="the size `small` alone: to see that this works")
    parser.add_argument("--batch", type=int, help="windows a training step; each size has its own when not given")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="training steps a turn")
    parser.add_argument("--cfg", type=float, default=1.0, help="guidance while sampling")
    parser.add_argument("--minutes", type=float, default=60.0, help="nothing more is started after so many")
    parser.add_argument("--peak", type=float, help="dense bf16 TFLOP/s of the device, where it is not known here")
    parser.add_argument("--commit", help="what is measured, in a copy without git")
    parser.add_argument("--device", default="cuda")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.sizes = ["small"]
    session = Session(arguments, Console(width=120), time.monotonic() + 60 * arguments.minutes)
    if session.on_gpu and not torch.cuda.is_available():
        parser.error("torch sees no GPU here; --device cpu --small shows that the script works.")
    if session.on_gpu and session.peak is None:
        parser.error(f"the peak of {accelerator(arguments.device)} is not known here: give --peak TFLOP/s.")
    torch.manual_seed(0)
    for section, measure in SECTIONS.items():
        for name in arguments.sizes:
            if arguments.only in (None, section) and not session.time_is_up():
                measure(session, name, SIZES[name])
                release()


if __name__ == "__main__":
    main()
