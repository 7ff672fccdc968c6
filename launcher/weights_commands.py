"""The commands for what a run leaves: weights in other forms, and music from them. Each imports what it needs when it
runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from launcher.arguments import BY_STAGE, RunPath


def export(
    run: RunPath,
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    dtype: Annotated[str, typer.Option(metavar="fp32|bf16|fp16", help="Of the weights in the files.")] = "fp32",
    int8: Annotated[
        bool, typer.Option("--int8", help="The transformers' linear layers in 8 bits, all else in --dtype.")
    ] = False,
    average: Annotated[bool, typer.Option("--average", help="The moving average of the weights (ema_decay).")] = False,
    last: Annotated[
        int | None, typer.Option("--last", metavar="K", help="The mean of the weights in the newest K checkpoints.")
    ] = None,
) -> None:
    """Write the bundle of a run whose three stages are trained: all that is needed to make music.

    It is read back and every stage compared with the trained one before it gets its name.
    """
    from dataclasses import replace
    from functools import partial

    from data.new_folder import making
    from launcher.display import ConsoleProgress
    from launcher.graph import origins
    from launcher.recipe import read_run_recipe
    from launcher.stages.bundle import bundle
    from launcher.worker import build
    from trainer.export import ExportOptions

    origin = origins(read_run_recipe(run))["bundle"]
    options = ExportOptions(dtype, int8, average, last)
    origin = replace(origin, keys={**origin.keys, **options.changes})
    with making(output), ConsoleProgress(Console(stderr=True)) as progress:
        build(run, origin, progress, output, partial(bundle, options=options))
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
        str, typer.Option(metavar="auto|fp32|bf16|fp16", help="To compute in; auto is bf16 on a GPU, fp32 on a CPU.")
    ] = "auto",
    weights: Annotated[
        list[str] | None,
        typer.Option(metavar="codec|joint=PLACE", help="Where a pretrained encoder's weights are on this machine."),
    ] = None,
) -> None:
    """Make music from words, or in the manner of a recording.

    --cfg, --temperature, --top-k and --top-p take one number, or one for each stage: semantic=0.8,coarse=0.5. Stages
    that are not named do as the bundle says.
    """
    from launcher.generate import Request, generate_files, read_options, read_places

    by_stage = {"cfg": cfg, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = read_options(by_stage, seconds=seconds, samples=samples, seed=seed, overlap=overlap)
    request = Request(prompts or [], like, options, device, dtype, read_places(weights or []))
    for path, what in generate_files(bundle, request, output, Console(stderr=True)):
        print(f"{path}: {what}")


def export_transformers(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="A bundle, or a run folder that has one.")],
    stage: Annotated[str, typer.Argument(metavar="STAGE", help="semantic, coarse or fine.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
) -> None:
    """Write one stage of a bundle as a checkpoint that `transformers` loads.

    A stage that a stock Llama or Qwen3 computes becomes one; any other goes with a modelling file of its own, for
    trust_remote_code.
    """
    from data.new_folder import making
    from launcher.generate import find_bundle
    from model.stock.export import export_stage

    found = find_bundle(bundle)
    with making(output):
        made = export_stage(found, stage, output)
    print(f"{output}: a {made.architecture}, whose logits are the bundle's within {made.difference:.1g}.")


def import_transformers(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder that `transformers` saved.")],
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="The bundle, or a run folder, for all the rest.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    stage: Annotated[str, typer.Option("--stage", metavar="STAGE", help="The stage whose weights these are.")],
) -> None:
    """Write a bundle with one stage replaced by a checkpoint of `transformers`.

    The checkpoint is one that `stretto export-transformers` wrote and that was trained further: its ids and shapes must
    be those of the bundle. Only safetensors are read.
    """
    from data.new_folder import making
    from launcher.generate import find_bundle
    from model.stock.importing import import_stage

    found = find_bundle(bundle)
    with making(output):
        import_stage(checkpoint, found, stage, output)
    print(f'{output}: a bundle. Try: stretto generate {output} "a slow flute" -o out.wav')


def import_quantizers(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    semantic: Annotated[
        Path | None, typer.Option(metavar="KMEANS.joblib", help="Its k-means of MERT's features, or their .npy.")
    ] = None,
    conditioning: Annotated[
        Path | None, typer.Option(metavar="RVQ.pt", help="Its residual quantizer of CLAP's embeddings.")
    ] = None,
) -> None:
    """Take over quantizers of open-musiclm, so that its tokens keep their meaning. Nothing in the files is run.

    A recipe uses them with quantizers.semantic.centroids=OUT and quantizers.conditioning.centroids=OUT.
    """
    from data.new_folder import making
    from launcher.importing import import_from_predecessor

    with making(output):
        for line in import_from_predecessor({"conditioning": conditioning, "semantic": semantic}, output):
            print(line)
