"""The commands for what a run leaves: weights in other forms, and music from them. Each imports what it needs when it
runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launcher.arguments import BY_STAGE, RunPath, require_new


def export(
    run: RunPath,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    average: Annotated[bool, typer.Option("--average", help="The moving average of the weights (ema_decay).")] = False,
) -> None:
    """Write the bundle of a run whose three stages are trained: all that is needed to make music."""
    from dataclasses import replace

    from launcher.display import ConsoleProgress
    from launcher.graph import origins
    from launcher.recipe import read_run_recipe
    from launcher.stages.bundle import average_bundle
    from launcher.worker import build

    require_new(output)
    origin = origins(read_run_recipe(run))["bundle"]
    if average:
        origin = replace(origin, keys={**origin.keys, "average": True})
    with ConsoleProgress(Console(stderr=True)) as progress:
        build(run, origin, progress, output, average_bundle if average else None)
    print(f'{output}: a bundle. Try: stretto generate {output} "a slow flute" -o out.wav')


def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT", help="RUN/STAGE/checkpoints/step-…, or a checkpoint of DeepSpeed's, universal or not."
        ),
    ],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    to: Annotated[
        str,
        typer.Option(
            "--to",
            metavar="fp32|universal",
            help="Whole weights in safetensors, or a universal checkpoint that plain DeepSpeed engines load.",
        ),
    ],
    average: Annotated[bool, typer.Option("--average", help="The moving average of the weights (ema_decay).")] = False,
) -> None:
    """Make of a checkpoint what other tools read. The same command goes on where it was stopped."""
    from launcher.display import ConsoleProgress
    from trainer.convert import convert as convert_checkpoint

    with ConsoleProgress(Console(stderr=True)) as progress:
        info = convert_checkpoint(checkpoint, output, to, average, progress=progress)
    print(f"{output}: {info['parameters']:,} parameters of step {info['source'].get('step', 0):,}, {to}")


def generate(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or a run folder that has one.")],
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to play.")] = None,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="WAV", help="Several get -1, -2 ... .")] = Path(
        "out.wav"
    ),
    seconds: Annotated[float | None, typer.Option(help="Length; one window when not given.")] = None,
    samples: Annotated[int, typer.Option(help="Pieces for each prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same music.")] = 0,
    cfg: Annotated[
        str | None, typer.Option(metavar=BY_STAGE, help="Guidance: how closely to keep to the prompt; 1 is none.")
    ] = None,
    temperature: Annotated[
        str | None, typer.Option(metavar=BY_STAGE, help="0 takes the likeliest, 1 draws freely.")
    ] = None,
    top_k: Annotated[str | None, typer.Option(metavar=BY_STAGE, help="Draw from so many of the likeliest.")] = None,
    top_p: Annotated[
        str | None, typer.Option(metavar=BY_STAGE, help="Draw from the likeliest that together have this probability.")
    ] = None,
    overlap: Annotated[
        float, typer.Option(help="Music longer than a window: the share of each that the next one takes up again.")
    ] = 0.5,
    like: Annotated[
        Path | None, typer.Option(metavar="AUDIO", help="In the manner of a recording, not of words.")
    ] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cpu|cuda", help="A GPU where there is one, when not given.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(metavar="auto|fp32|bf16", help="Of the weights; auto is bf16 on a GPU, fp32 on a CPU.")
    ] = "auto",
) -> None:
    """Make music from words, or in the manner of a recording.

    --cfg, --temperature, --top-k and --top-p take one number, or one for each stage: semantic=0.8,coarse=0.5. Stages
    that are not named do as the bundle says.
    """
    from launcher.generate import Request, generate_files, read_options

    by_stage = {"cfg": cfg, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = read_options(by_stage, seconds=seconds, samples=samples, seed=seed, overlap=overlap)
    request = Request(prompts or [], like, options, device, dtype)
    for path, what in generate_files(bundle, request, output, Console(stderr=True)):
        print(f"{path}: {what}")
