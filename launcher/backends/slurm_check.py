"""What of a recipe's `slurm` section the cluster cannot do, found by asking it before anything is submitted."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from launcher.backends.slurm_commands import ask
from launcher.placement import Share
from launcher.slurm_config import SlurmConfig, SlurmJobConfig, megabytes, minutes
from model.errors import UserError, nearest

GPUS = re.compile(r"gpu(?::[^:,(]+)?:(\d+)")
"""In the generic resources of a node: gpu:8, gpu:h100:8(S:0-1)."""
ANY = ("ALL", "(null)", "N/A", "")
Key = Callable[[str], str]
"""The name that a key of the `slurm` section has in the recipe, for the jobs in question."""


@dataclass(frozen=True)
class Nodes:
    """Nodes that are alike."""

    number: int
    cpus: int
    megabytes: int
    gpus: int


def problems(config: SlurmConfig, shares: Mapping[str, Share]) -> list[str]:
    """In plain lines, all that is wrong with what the jobs of these shares, by their stages, would ask for."""
    lines = ask("scontrol", "show", "partition", "--oneliner").splitlines()
    partitions = [dict(word.partition("=")[::2] for word in line.split()) for line in lines if "=" in line]
    alike: dict[str, list[str]] = {}
    for stage in shares:
        alike.setdefault(stage if stage in config.stages else "", []).append(stage)
    found: list[str] = []
    for stages in alike.values():
        key = partial(config.key, stages[0])
        found += _problems(config.of(stages[0]), key, partitions, [shares[stage] for stage in stages])
    return list(dict.fromkeys(found))


def _problems(
    config: SlurmJobConfig, key: Key, partitions: list[dict[str, str]], shares: Sequence[Share]
) -> Iterator[str]:
    """Of jobs that ask for the same, but for their shares."""
    try:
        chosen = _chosen(config, key, partitions)
    except UserError as error:
        yield str(error)
        return
    down = (part for part in chosen if part["State"] != "UP")
    yield from (f"{key('partition')} {part['PartitionName']} is {part['State']}." for part in down)
    yield from _allowed(key("account"), config.account, chosen, "AllowAccounts")
    yield from _allowed(key("qos"), config.qos, chosen, "AllowQos")
    yield from _time(config, key, chosen)
    yield from _nodes(config, key, chosen, shares)


def _chosen(config: SlurmJobConfig, key: Key, partitions: list[dict[str, str]]) -> list[dict[str, str]]:
    """The partitions that jobs may run in. Raises UserError where there is none such."""
    by_name = {part["PartitionName"]: part for part in partitions}
    if config.partition is None:
        chosen = [part for part in partitions if part.get("Default") == "YES"]
        if not chosen:
            raise UserError(f"this cluster has no default partition: set slurm.partition to {_listed(by_name)}.")
        return chosen
    names = config.partition.split(",")
    unknown = [name for name in names if name not in by_name]
    if unknown:
        hint = nearest(unknown[0], list(by_name))
        raise UserError(
            f"{key('partition')}: this cluster has no partition {unknown[0]!r}.{hint} There is {_listed(by_name)}."
        )
    return [by_name[name] for name in names]


def _listed(names: Mapping[str, object]) -> str:
    return " or ".join(sorted(names))


def _allowed(key: str, value: str | None, chosen: list[dict[str, str]], field: str) -> Iterator[str]:
    """`value` must be allowed in one of the partitions, where they say which are. What is the user's default must be
    written too: sbatch takes a job without it where the cluster has no defaults, and it then waits for ever."""
    if any(part.get(field, "") in ANY for part in chosen):
        return
    allowed = sorted({name for part in chosen for name in part[field].split(",")})
    if value not in allowed:
        where = " and ".join(part["PartitionName"] for part in chosen)
        now = f"{value!r} is not" if value else "is not set: also where it is your default, name"
        yield f"{key} {now} one of those that partition {where} is for: {', '.join(allowed)}."


def _time(config: SlurmJobConfig, key: Key, chosen: list[dict[str, str]]) -> Iterator[str]:
    if config.time is None:
        return
    limits = [part.get("MaxTime", "UNLIMITED") for part in chosen]
    if "UNLIMITED" not in limits:
        longest = max(limits, key=minutes)
        if minutes(config.time) > minutes(longest):
            yield f"{key('time')} is {config.time}: partition {_names(chosen)} allows {longest} at most."
    if config.signal_seconds >= 60 * minutes(config.time):
        seconds = f"{key('signal_seconds')} {config.signal_seconds}"
        yield f"{seconds} is not within {key('time')}, {config.time}: lower it."


def _nodes(config: SlurmJobConfig, key: Key, chosen: list[dict[str, str]], shares: Sequence[Share]) -> Iterator[str]:
    """Compares what the largest job needs with what nodes there are, whether they are free now or not."""
    where, fitting = f"partition {_names(chosen)}", list(_listed_nodes(_names(chosen)))
    each = max(len(share[0].slots) for share in shares)
    needs = (
        (key("gpus_per_node"), "gpus", "GPUs", min(each, config.gpus_per_node)),
        (f"{key('cpus_per_task')} × ranks", "cpus", "CPUs", each * (config.cpus_per_task or 1)),
        (key("mem"), "megabytes", "MB of memory", megabytes(config.mem or "0")),
    )
    for name, field, unit, wanted in needs:
        most = max((getattr(nodes, field) for nodes in fitting), default=0)
        if wanted > most:
            yield f"{name}: a job asks for {wanted} {unit} of a node, but nodes of {where} have {most or 'none'}."
            return
        fitting = [nodes for nodes in fitting if getattr(nodes, field) >= wanted]
    wanted, number = max(len(share) for share in shares), sum(nodes.number for nodes in fitting)
    if number < wanted:
        yield f"{key('nodes')}: a job asks for {wanted} nodes, but {where} has {number} that fit."


def _listed_nodes(partitions: str) -> Iterator[Nodes]:
    format = "--format=%D|%c|%m|%G"
    for line in ask("sinfo", "--noheader", "--exact", f"--partition={partitions}", format).splitlines():
        number, cpus, memory, generic = line.split("|")
        gpus = sum(map(int, GPUS.findall(generic)))
        yield Nodes(int(number), int(cpus.rstrip("+")), int(memory.rstrip("+")), gpus)


def _names(chosen: list[dict[str, str]]) -> str:
    return ",".join(part["PartitionName"] for part in chosen)
