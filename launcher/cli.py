"""The `stretto` command. Every command says what it wants, and imports what it needs when it runs."""

from __future__ import annotations

import atexit
import errno
import json
import signal
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from data.processes import fail, plain_errors
from launcher import weights_commands
from launcher.arguments import Overrides, RecipeName, RunOption, RunPath, one_of
from model.errors import UserError

INTERRUPTED = 130
PLACES = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)
"""What is wrong with a path that the user has named."""
app = typer.Typer(
    name="stretto",
    help="Trains text-to-music models: from a folder of audio to a bundle that makes music.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def main() -> None:
    """Runs the command. What a user can put right is a plain line and exit code 2; an interrupt is 130."""
    atexit.register(_ignore_signals)
    try:
        with plain_errors():
            app(prog_name="stretto")
    except OSError as error:
        if error.errno not in PLACES or not error.filename:
            raise
        fail(f"{error.filename}: {error.strerror}.")
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def _ignore_signals() -> None:
    """While Python clears up, a signal that comes late would change the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"stretto {version('stretto')}")
        raise typer.Exit


@app.callback()
def stretto(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeName,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="RUN", help="The run folder; runs/NAME when not given.")
    ] = None,
    hostfile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="On these hosts: lines such as `node1 slots=8`.")
    ] = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="Submit a Slurm job for each stage.")] = False,
    kubernetes: Annotated[bool, typer.Option("--kubernetes", help="Submit to a Kubernetes cluster.")] = False,
    wait: Annotated[bool, typer.Option("--wait", help="With --slurm or --kubernetes: until all has ended.")] = False,
    only: Annotated[list[str] | None, typer.Option("--only", metavar="STAGE", help="Only this stage; repeats.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be built and why, and what would be executed, and stop.")
    ] = False,
) -> None:
    """Make everything a recipe asks for that is not up to date. The same command continues what was stopped."""
    from launcher.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    path = output or Path("runs") / loaded.name
    if sum([hostfile is not None, slurm, kubernetes]) > 1:
        raise UserError("--hostfile, --slurm and --kubernetes are three ways to run: choose one.")
    if wait and not (slurm or kubernetes):
        raise UserError("--wait goes with --slurm or --kubernetes: elsewhere `stretto run` ends when the stages have.")
    if slurm or kubernetes:
        _submit(loaded, path, "slurm" if slurm else "kubernetes", only or [], dry_run, wait)
    else:
        _run(loaded, path, only or [], dry_run, hostfile)


@app.command()
def plan(
    recipe: RecipeName,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of each stage; the recipe's ranks when not given.")] = None,
    gpu: Annotated[str, typer.Option(help="Which: h100, h200, a100, a100-40gb, l40s, rtx-4090, mi300x ...")] = "h100",
    mfu: Annotated[float, typer.Option(help="Share of its peak that training reaches.")] = 0.4,
    as_json: Annotated[bool, typer.Option("--json", help="For programs rather than people.")] = False,
) -> None:
    """Say what a recipe would run where, what it costs, and which ZeRO choice to take."""
    from launcher.plan import Cluster, plan_json
    from launcher.plan_tables import print_plan
    from launcher.recipe import load_recipe

    cluster = Cluster.of(gpu, gpus, mfu)
    loaded = load_recipe(recipe, overrides or [])
    if as_json:
        print(json.dumps(plan_json(loaded, cluster), indent=2))
    else:
        print_plan(loaded, cluster, Console())


@app.command()
def status(
    run: RunPath,
    watch: Annotated[bool, typer.Option("--watch", "-w", help="Keep it up to date while anything runs.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs rather than people.")] = False,
) -> None:
    """Show every stage of a run: state, step, loss, speed, restarts, hosts, where its log is."""
    from launcher.status import print_status, watch_status

    if watch and not as_json:
        watch_status(run, Console())
    else:
        print_status(run, as_json, Console())


@app.command()
def logs(
    run: RunPath,
    stage: Annotated[
        str | None, typer.Argument(metavar="STAGE", help="The one that wrote last when not given.")
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Show what comes, until the stage ends.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", help="The last so many; 0 is all.", min=0)] = 50,
    rank: Annotated[int | None, typer.Option(help="The log of this rank of a training.", min=0)] = None,
) -> None:
    """Show what a stage prints."""
    from launcher.logs import goes_on, log_of, read_log

    name, path = log_of(run, stage, rank)
    for text in read_log(path, lines, lambda: follow and goes_on(run, name)):
        print(text, end="", flush=True)


@app.command()
def stop(
    run: RunPath,
    now: Annotated[bool, typer.Option("--now", help="Do not wait for stages to save.")] = False,
) -> None:
    """Tell what works in a run to save and end, and wait until it has."""
    from launcher.stopping import stop as stop_run

    stop_run(run, now)


@app.command()
def doctor(
    folder: Annotated[
        Path, typer.Option("--output", "-o", metavar="DIR", help="Where runs are to be made: its disk is looked at.")
    ] = Path("runs"),
    hostfile: Annotated[
        Path | None, typer.Option(metavar="F", help="Look at the hosts it names, and the network between them, too.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs rather than people.")] = False,
) -> None:
    """Say what is missing or wrong on this machine, and what to do about it (exit code 1 where no run would work)."""
    from launcher.display import ConsoleProgress
    from launcher.doctor import examine, print_findings
    from launcher.host_checks import examine_hosts
    from launcher.hosts import read_hostfile

    named = read_hostfile(hostfile) if hostfile else None
    with ConsoleProgress(Console(stderr=True)) as progress:
        findings = examine(folder, progress)
        hosts = examine_hosts(named, folder, progress) if named else None
    if not print_findings(findings, as_json, Console(), hosts):
        raise typer.Exit(1)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="An artifact, a checkpoint or a bundle.")],
    record: Annotated[
        str | None, typer.Option(metavar="ID|NUMBER", help="Of token shards: make this record into sound.")
    ] = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="WAV", help="Where the sound of --record goes.")
    ] = Path("record.wav"),
    run: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="The run whose codec --record takes, if not the tokens' own."),
    ] = None,
) -> None:
    """Show what a folder or file of Stretto's holds, and whether it is whole (exit code 1 where it is not)."""
    from launcher.display import ConsoleProgress
    from launcher.inspect import print_inspection
    from launcher.inspect_tokens import decode_record

    if record is not None:
        print(f"{output}: {decode_record(path, record, run, output)}")
        return
    with ConsoleProgress(Console(stderr=True)) as progress:
        whole = print_inspection(path, Console(), progress)
    if not whole:
        raise typer.Exit(1)


@app.command()
def corpus(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    clips: Annotated[int, typer.Option(help="How many.", min=1)] = 2040,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Synthesise the built-in corpus: clips of music with captions and known attributes."""
    from data.builtin import write_corpus
    from data.config import DataConfig
    from data.new_folder import making
    from launcher.display import ConsoleProgress
    from model import artifact

    config = DataConfig(clips=clips)
    fingerprint = artifact.fingerprint("corpus", config.model_dump(mode="json"), seed)
    with (
        making(folder),
        ConsoleProgress(Console(stderr=True)) as progress,
        artifact.create(folder, "corpus", fingerprint) as (partial, info),
    ):
        info.update(write_corpus(partial, config, seed, progress))
    print(f"{folder}: {info['clips']} clips")


@app.command()
def collect(
    manifest: Annotated[
        Path, typer.Argument(metavar="MANIFEST", help="A .jsonl, .csv or .tsv with a column `url`; others are kept.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new folder, or one to go on with.")],
    per_second: Annotated[float, typer.Option(help="Requests a second to one host.", min=0.001)] = 1.0,
    connections: Annotated[int, typer.Option(help="At a time over all hosts; 2 to one host.", min=1, max=64)] = 4,
    largest: Annotated[str, typer.Option(metavar="SIZE", help="Files above it are not fetched.")] = "2GB",
) -> None:
    """Fetch the audio that a manifest of addresses names. The same command goes on where it was stopped.

    Then train on it with data.audio=DIR/manifest.jsonl. Exit code 1 says that some could not be fetched:
    DIR/failed.jsonl lists them, and the same command tries them again.
    """
    from launcher.collecting import collect_files

    if not collect_files(manifest, output, per_second, connections, largest, Console(stderr=True)):
        raise typer.Exit(1)


@app.command()
def fit(
    what: Annotated[str, typer.Argument(metavar="codec|embedding|quantizers")],
    run: RunOption,
) -> None:
    """Fit one of the parts that come before the tokens: codec, embedding or quantizers."""
    one_of(what, ("codec", "embedding", "quantizers"), "to fit")
    _run_stage(run, what)


@app.command()
def tokenize(run: RunOption) -> None:
    """Make the token shards of a run from its corpus, codec, embedding and quantizers."""
    _run_stage(run, "tokens")


@app.command()
def train(stage: Annotated[str, typer.Argument(metavar="semantic|coarse|fine")], run: RunOption) -> None:
    """Train one stage of a run on this machine, or go on with it."""
    from model.config import STAGES

    one_of(stage, STAGES, "to train")
    _run_stage(run, stage)


for _command in (
    weights_commands.export,
    weights_commands.convert,
    weights_commands.export_transformers,
    weights_commands.import_transformers,
    weights_commands.import_quantizers,
    weights_commands.generate,
):
    app.command()(_command)


def _run(recipe: Any, path: Path, only: list[str], dry_run: bool = False, hostfile: Path | None = None) -> None:
    from launcher.runner import run as run_recipe

    with plain_errors(path):
        code = run_recipe(recipe, path, only, dry_run, Console(), hostfile)
    if code:
        raise typer.Exit(code)


def _submit(recipe: Any, path: Path, kind: str, only: list[str], dry_run: bool, wait: bool) -> None:
    from launcher import batch
    from launcher.backends.others import batch_backend

    with plain_errors(path):
        backend = batch_backend(kind, path.absolute(), recipe)
        try:
            code = batch.run(recipe, path, backend, only, dry_run, wait, Console())
        except KeyboardInterrupt:
            print(f"Interrupted. What was submitted goes on: `stretto stop {path}` ends it.", file=sys.stderr)
            code = INTERRUPTED
    if code:
        raise typer.Exit(code)


def _run_stage(run: Path, stage: str) -> None:
    """One stage of a run folder, by the recipe it was made with."""
    from launcher.recipe import read_run_recipe

    _run(read_run_recipe(run), run, [stage])
