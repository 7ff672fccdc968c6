"""Which hosts and slots each stage takes. docs/clusters.md explains it. Imports no torch."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator

from launcher.hosts import Host
from model.config import STAGES as TRAINED
from model.config import Config
from model.errors import UserError

if TYPE_CHECKING:
    from launcher.recipe import Recipe
    from launcher.stage import Stage

NODES = re.compile(r"([1-9]\d*) nodes?")


def _wanted(value: Any) -> Any:
    good = value is None or value in ("auto", "all") or (isinstance(value, str) and NODES.fullmatch(value))
    if not good and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"{value!r} must be a number of GPUs, one of nodes such as '2 nodes', auto or all")
    return value


Wanted = Annotated[int | str | None, BeforeValidator(_wanted)]


class PlacementConfig(Config):
    """What each stage takes of a cluster: a number of GPUs, `2 nodes`, `all`, or `auto`: the training stages that say
    so divide what the others leave by their FLOPs, so that they end together."""

    semantic: Wanted = None
    """train.ranks GPUs when not given; so for the other two."""
    coarse: Wanted = None
    fine: Wanted = None
    quantizers: Wanted = "all"
    tokens: Wanted = "all"


@dataclass(frozen=True)
class Part:
    """Slots of one host."""

    host: str
    slots: tuple[int, ...]
    of: int
    """How many slots the host has; processes on it share its cores by that."""

    def __str__(self) -> str:
        first, last = self.slots[0], self.slots[-1]
        whole = self.slots == tuple(range(first, last + 1))
        listed = f"{first}-{last}" if whole and last > first else ",".join(map(str, self.slots))
        return f"{self.host}:{listed}"

    @classmethod
    def parse(cls, text: str, hosts: Sequence[Host]) -> Part:
        """What `str` gives."""
        name, _, listed = text.rpartition(":")
        first, _, last = listed.partition("-")
        slots = range(int(first), int(last) + 1) if last else map(int, listed.split(","))
        return cls(name, tuple(slots), next((host.slots for host in hosts if host.name == name), 1))


Share = tuple[Part, ...]


def count(share: Share) -> int:
    """Slots of a share, and so ranks of a stage."""
    return sum(len(part.slots) for part in share)


def in_words(share: Share) -> str:
    return " ".join(map(str, share))


def parse_share(text: str, hosts: Sequence[Host]) -> Share:
    return tuple(Part.parse(part, hosts) for part in text.split())


class Places:
    """The slots of hosts: which are free, and which a stage gets. A share has as many slots on each of its hosts:
    loaders count on it."""

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.hosts = list(hosts)
        self.lost: set[str] = set()
        self._taken: dict[str, set[int]] = {host.name: set() for host in hosts}

    def take(self, counts: Iterable[int]) -> Share | None:
        """A share of the first of `counts` that there is room for, on as few hosts as it can be; None where there is
        none."""
        share = next((found for wanted in counts if (found := self._find(wanted))), None)
        if share is not None:
            self.hold(share)
        return share

    def hold(self, share: Share) -> None:
        for part in share:
            self._taken.setdefault(part.host, set()).update(part.slots)

    def release(self, share: Share) -> None:
        for part in share:
            self._taken[part.host].difference_update(part.slots)

    def room(self) -> int:
        """Slots of all hosts that are not lost."""
        return sum(host.slots for host in self.hosts if host.name not in self.lost)

    def _free(self, host: Host) -> list[int]:
        return [slot for slot in range(host.slots) if slot not in self._taken[host.name]]

    def _find(self, wanted: int) -> Share | None:
        free = {host: self._free(host) for host in self.hosts if host.name not in self.lost}
        for hosts in range(1, wanted + 1):
            if wanted % hosts:
                continue
            each = wanted // hosts
            fitting = [host for host, slots in free.items() if len(slots) >= each]
            if len(fitting) >= hosts:
                # The fullest first, so that whole hosts stay free; those alike in the order of the hostfile.
                chosen = sorted(fitting, key=lambda host: len(free[host]))[:hosts]
                chosen.sort(key=self.hosts.index)
                return tuple(Part(host.name, tuple(free[host][:each]), host.slots) for host in chosen)
        return None


def can_be_placed(hosts: Sequence[Host], wanted: int) -> bool:
    return Places(hosts)._find(wanted) is not None


def divides(recipe: Recipe, name: str, ranks: int) -> bool:
    """Whether the batch of a trained stage can be divided over so many ranks."""
    train = getattr(recipe.stages, name).train
    micro = train.micro_batch if isinstance(train.micro_batch, int) else 1
    return train.global_batch % (micro * ranks) == 0


def counts(recipe: Recipe, stage: Stage, wanted: int) -> list[int]:
    """Numbers of ranks that a stage can run on, `wanted` first and smaller ones after it."""
    if not stage.ranked:
        return [1]
    return [ranks for ranks in range(wanted, 0, -1) if not stage.trained or divides(recipe, stage.name, ranks)]


def shares(recipe: Recipe, hosts: Sequence[Host], stages: Sequence[Stage]) -> dict[str, int]:
    """How many slots each of `stages` is to have on `hosts`.

    Raises UserError with every share that the cluster does not have, or that a batch cannot be divided over.
    """
    found: dict[str, int] = {}
    problems: list[str] = []
    automatic = []
    total = sum(host.slots for host in hosts)
    for stage in stages:
        wanted = getattr(recipe.placement, stage.name, None)
        if not stage.ranked:
            found[stage.name] = 1
        elif wanted == "auto" and stage.trained:
            automatic.append(stage.name)
        else:
            ranks = _ranks(recipe, hosts, stage, wanted)
            problems += _problems(recipe, hosts, stage, ranks, wanted)
            found[stage.name] = ranks
    if automatic:
        fixed = sum(ranks for name, ranks in found.items() if name in TRAINED)
        left = total - fixed if fixed < total - len(automatic) + 1 else total
        found |= _by_flops(recipe, hosts, automatic, left)
    if problems:
        raise UserError("\n".join(problems))
    return found


def _ranks(recipe: Recipe, hosts: Sequence[Host], stage: Stage, wanted: int | str | None) -> int:
    total = sum(host.slots for host in hosts)
    if wanted is None:
        return getattr(recipe.stages, stage.name).train.ranks if stage.trained else 1
    if isinstance(wanted, int):
        return wanted
    match = NODES.fullmatch(wanted)
    if match is not None:
        each = sorted((host.slots for host in hosts), reverse=True)
        nodes = int(match[1])
        return nodes * each[min(nodes, len(each)) - 1]
    # All: the most that are as many on each host.
    fitting = [ranks for ranks in range(total, 0, -1) if can_be_placed(hosts, ranks)]
    return next((ranks for ranks in fitting if not stage.trained or divides(recipe, stage.name, ranks)), 1)


def _problems(
    recipe: Recipe, hosts: Sequence[Host], stage: Stage, ranks: int, wanted: int | str | None
) -> Iterator[str]:
    key = f"stages.{stage.name}.train.ranks" if wanted is None else f"placement.{stage.name}"
    total = sum(host.slots for host in hosts)
    if isinstance(wanted, str) and (match := NODES.fullmatch(wanted)) and int(match[1]) > len(hosts):
        yield f"{key} asks for {wanted}, but the cluster has {len(hosts)}."
    elif ranks > total:
        yield f"{key} asks for {ranks} slots, but the cluster has {total}: lower it, or name more hosts."
    elif not can_be_placed(hosts, ranks):
        yield f"{key}: {ranks} slots, as many on each host, cannot be had of {', '.join(map(_slots, hosts))}."
    elif stage.trained and not divides(recipe, stage.name, ranks):
        train = getattr(recipe.stages, stage.name).train
        yield (
            f"{key}: global_batch {train.global_batch} cannot be divided over {ranks} ranks with "
            f"micro_batch {train.micro_batch}."
        )


def _slots(host: Host) -> str:
    return f"{host.name} ({host.slots})"


def _by_flops(recipe: Recipe, hosts: Sequence[Host], names: Sequence[str], total: int) -> dict[str, int]:
    """Slots of each, at most `total` together, so that the slowest is done as early as can be."""
    from launcher.plan import training_flops

    flops = training_flops(recipe)
    choices = []
    for name in names:
        fitting = [ranks for ranks in range(1, total + 1) if divides(recipe, name, ranks)]
        choices.append([ranks for ranks in fitting if can_be_placed(hosts, ranks)])
    possible = [chosen for chosen in itertools.product(*choices) if sum(chosen) <= total]
    if not possible:  # fewer slots than stages: one after another, each on all it can have
        return {name: max(fitting) for name, fitting in zip(names, choices, strict=True)}

    times = [max(flops[name] / ranks for name, ranks in zip(names, chosen, strict=True)) for chosen in possible]
    _, _, best = min((time, sum(chosen), chosen) for time, chosen in zip(times, possible, strict=True))
    return dict(zip(names, best, strict=True))
