"""What of a recipe's `slurm` section the cluster cannot do, found by asking it before anything is submitted."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from launcher.backends.slurm_commands import ask
from launcher.placement import Share
from launcher.slurm_config import SlurmConfig, megabytes, minutes
from model.errors import UserError, nearest

GPUS = re.compile(r"gpu(?::[^:,(]+)?:(\d+)")
"""In the generic resources of a node: gpu:8, gpu:h100:8(S:0-1)."""
ANY = ("ALL", "(null)", "N/A", "")


@dataclass(frozen=True)
class Nodes:
    """Nodes that are alike."""

    number: int
    cpus: int
    megabytes: int
    gpus: int


def problems(config: SlurmConfig, shares: Mapping[str, Share]) -> list[str]:
    """In plain lines, all that is wrong with what the jobs of these shares would ask for."""
    try:
        chosen = _partitions(config)
    except UserError as error:
        return [str(error)]
    return [
        *(f"slurm.partition {part['PartitionName']} is {part['State']}." for part in chosen if part["State"] != "UP"),
        *_allowed("account", config.account, chosen, "AllowAccounts"),
        *_allowed("qos", config.qos, chosen, "AllowQos"),
        *_time(config, chosen),
        *_nodes(config, chosen, shares),
    ]


def _partitions(config: SlurmConfig) -> list[dict[str, str]]:
    """What Slurm says of the partitions that jobs may run in. Raises UserError where there is none such."""
    lines = ask("scontrol", "show", "partition", "--oneliner").splitlines()
    found = [dict(word.partition("=")[::2] for word in line.split()) for line in lines if "=" in line]
    by_name = {part["PartitionName"]: part for part in found}
    if config.partition is None:
        chosen = [part for part in found if part.get("Default") == "YES"]
        if not chosen:
            raise UserError(f"this cluster has no default partition: set slurm.partition to {_listed(by_name)}.")
        return chosen
    names = config.partition.split(",")
    unknown = [name for name in names if name not in by_name]
    if unknown:
        hint = nearest(unknown[0], list(by_name))
        raise UserError(
            f"slurm.partition: this cluster has no partition {unknown[0]!r}.{hint} There is {_listed(by_name)}."
        )
    return [by_name[name] for name in names]


def _listed(names: Mapping[str, object]) -> str:
    return " or ".join(sorted(names))


def _allowed(key: str, value: str | None, chosen: list[dict[str, str]], field: str) -> Iterator[str]:
    """`value` must be allowed in one of the partitions, where they say which are."""
    if any(part.get(field, "") in ANY for part in chosen):
        return
    allowed = sorted({name for part in chosen for name in part[field].split(",")})
    if value not in allowed:
        where = " and ".join(part["PartitionName"] for part in chosen)
        now = f"{value!r} is not one of" if value else "is not set, and must be one of"
        yield f"slurm.{key} {now} those that partition {where} is for: {', '.join(allowed)}."


def _time(config: SlurmConfig, chosen: list[dict[str, str]]) -> Iterator[str]:
    limits = [part.get("MaxTime", "UNLIMITED") for part in chosen]
    if config.time is None or "UNLIMITED" in limits:
        return
    longest = max(limits, key=minutes)
    if minutes(config.time) > minutes(longest):
        yield f"slurm.time is {config.time}: partition {_names(chosen)} allows {longest} at most."
    if config.signal_seconds >= 60 * minutes(config.time):
        yield f"slurm.signal_seconds {config.signal_seconds} is not within slurm.time, {config.time}: lower it."


def _nodes(config: SlurmConfig, chosen: list[dict[str, str]], shares: Mapping[str, Share]) -> Iterator[str]:
    """Compares what the largest job needs with what nodes there are, whether they are free now or not."""
    where, fitting = f"partition {_names(chosen)}", list(_listed_nodes(_names(chosen)))
    each = max((len(share[0].slots) for share in shares.values()), default=1)
    needs = (
        ("slurm.gpus_per_node", "gpus", "GPUs", min(each, config.gpus_per_node)),
        ("slurm.cpus_per_task × ranks", "cpus", "CPUs", each * (config.cpus_per_task or 1)),
        ("slurm.mem", "megabytes", "MB of memory", megabytes(config.mem or "0")),
    )
    for key, field, unit, wanted in needs:
        most = max((getattr(nodes, field) for nodes in fitting), default=0)
        if wanted > most:
            yield f"{key}: a job asks for {wanted} {unit} of a node, but nodes of {where} have {most or 'none'}."
            return
        fitting = [nodes for nodes in fitting if getattr(nodes, field) >= wanted]
    wanted, number = max((len(share) for share in shares.values()), default=1), sum(nodes.number for nodes in fitting)
    if number < wanted:
        yield f"slurm.nodes: a job asks for {wanted} nodes, but {where} has {number} that fit."


def _listed_nodes(partitions: str) -> Iterator[Nodes]:
    format = "--format=%D|%c|%m|%G"
    for line in ask("sinfo", "--noheader", "--exact", f"--partition={partitions}", format).splitlines():
        number, cpus, memory, generic = line.split("|")
        gpus = sum(map(int, GPUS.findall(generic)))
        yield Nodes(int(number), int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus)


def _names(chosen: list[dict[str, str]]) -> str:
    return ",".join(part["PartitionName"] for part in chosen)
