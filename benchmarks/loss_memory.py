"""Measures the memory that the loss takes, from hidden states to their gradient.

    python benchmarks/loss_memory.py benchmarks/records/loss_memory.json

Counted is every byte that forward and backward hold beyond what is there before, the hidden states and the heads. So
the gradient of the hidden states, as large as they are, counts, and that of the heads. Nothing is timed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import origin, write
from memory import measure
from rich.console import Console
from rich.table import Table
from stages import DTYPES, accelerator
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from model.loss import linear_cross_entropy, linear_cross_entropy_reference
from model.patterns import Pattern
from model.stage import predicting_rows

LIBRARIES = ("torch", "transformers")
OURS = "linear_cross_entropy"
AIM = 1.3
"""At most so many times the hidden states."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("record", nargs="?", type=Path, help="JSON file to write")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--positions", type=int, default=1116, help="of a window; every one predicts a code")
    parser.add_argument("--dim", type=int, default=1024, help="width of a hidden state")
    parser.add_argument("--quantizers", type=int, default=3)
    parser.add_argument("--codebook-size", type=int, default=1024)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="one window: to see that this works")
    arguments = parser.parse_args()
    if arguments.small:
        arguments.batch = 1
    torch.manual_seed(0)
    console = Console(width=120)
    record = origin(LIBRARIES)
    record["machine"]["accelerator"] = accelerator(arguments.device)
    record["settings"] = {name: value for name, value in vars(arguments).items() if name != "record"}

    like = {"device": arguments.device, "dtype": DTYPES[arguments.dtype], "requires_grad": True}
    hidden = torch.randn(arguments.batch * arguments.positions, arguments.dim, **like)
    heads = torch.randn(arguments.quantizers, arguments.codebook_size, arguments.dim, **like)
    losses = contestants(arguments, hidden, heads)
    losses[OURS]().backward()  # libraries take their workspaces at first use
    results: dict[str, dict[str, Any]] = {}
    for name, loss_of in losses.items():
        hidden.grad = heads.grad = None
        memory = measure(lambda loss_of=loss_of: loss_of().backward(), arguments.device)
        results[name] = {"peak_bytes": memory.peak, "times_hidden": round(memory.peak / size(hidden), 3)}
        console.print(f"{name}: {memory.peak:,} bytes", highlight=False)
    results[OURS]["aim"] = AIM
    record |= {"hidden_bytes": size(hidden), "heads_bytes": size(heads), "results": results}
    console.print(table(record))
    if arguments.record:
        write(arguments.record, record)


def contestants(arguments: argparse.Namespace, hidden: Tensor, heads: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What gives each loss: ours, ours by way of all logits, and that of a language model in `transformers`."""
    quantizers, codes, device = arguments.quantizers, arguments.codebook_size, arguments.device
    pattern = Pattern.of("flat", arguments.positions // quantizers, quantizers)
    rows = predicting_rows(arguments.batch, arguments.positions, pattern, torch.device(device))
    targets = torch.randint(codes, rows.shape, device=device)
    # One flat vocabulary: every position has logits for the codes of every quantizer.
    labels = torch.randint(quantizers * codes, (arguments.batch, arguments.positions), device=device)

    def language_model() -> Tensor:
        logits = (hidden @ heads.flatten(0, 1).t()).view(arguments.batch, arguments.positions, -1)
        return ForCausalLMLoss(logits, labels, quantizers * codes)

    return {
        OURS: lambda: linear_cross_entropy(hidden, heads, rows, targets).mean(),
        "all logits": lambda: linear_cross_entropy_reference(hidden, heads, rows, targets).mean(),
        "all logits of one vocabulary (transformers)": language_model,
    }


def size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def table(record: dict[str, Any]) -> Table:
    made = Table(title=f"Peak memory of the loss; hidden states {record['hidden_bytes']:,} bytes", title_justify="left")
    made.add_column("")
    for heading in ("bytes", "times the hidden states", "aim"):
        made.add_column(heading, justify="right")
    for name, result in record["results"].items():
        aim = "" if "aim" not in result else "met" if result["times_hidden"] < result["aim"] else "not met"
        made.add_row(name, f"{result['peak_bytes']:,}", f"{result['times_hidden']:.3f}", aim)
    return made


if __name__ == "__main__":
    main()
