"""Where there is room for a stage: on this machine, or on the hosts of a hostfile, some of which may be lost for a
while."""

from __future__ import annotations

import contextlib
import logging
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from launcher.host_report import report
from launcher.hosts import LOCALHOST, Host, module_on
from launcher.placement import Part, Places, Share, counts, in_words, parse_share
from launcher.placement import count as count_of
from launcher.preflight import returned
from launcher.processes import Machine, ranks
from launcher.recipe import RECIPE, Recipe
from launcher.stage import Stage

log = logging.getLogger(__name__)
LOOK_SECONDS = 15.0
"""Until the first look whether a lost host is back, and between two; twice as long each time it is lost again."""
LONGEST_WAIT = 600.0
ANSWER_SECONDS = 60.0
"""How long a look may take: the disk of a host that answers may hang."""


@dataclass
class Look:
    """At a host that is lost, or was."""

    due: float = 0.0
    """When the next begins, or the one under way is given up."""
    process: subprocess.Popen[bytes] | None = None
    losses: int = 0


class Room(Protocol):
    """Who may use what."""

    def take(self, stage: Stage, begun: bool = False) -> Share | None:
        """A share for a stage that is ready, or has `begun` and is to go on; None while there is no room."""

    def again(self, hosts: str) -> Share:
        """Takes the share, in words, of a stage that runs already."""

    def release(self, share: Share) -> None:
        """Gives a share back."""

    def where(self, share: Share) -> str:
        """What to say of it; nothing where it goes without saying."""

    def lose(self, host: str) -> None:
        """Leaves out a host that cannot be reached."""

    def returned(self) -> Iterator[str]:
        """Hosts that can be reached again since the last call."""

    def could_grow(self, stage: Stage, share: Share) -> bool:
        """Whether a stage that runs on less than it asked for could now have more."""

    def close(self) -> None:
        """Ends what was started to look."""


class LocalRoom:
    """This machine, for as many stages at once as the recipe says."""

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._machine = Machine.here()
        self._taken: dict[int, Share] = {}

    def take(self, stage: Stage, begun: bool = False) -> Share | None:
        parallel = self._recipe.parallel
        free = set(range(parallel)) - set(self._taken)
        if not free:
            return None
        slot = min(free)
        share = local_share(self._recipe, stage, self._machine.share(slot, parallel), parallel)
        self._taken[slot] = share
        return share

    def again(self, hosts: str) -> Share:
        share = parse_share(hosts, [])
        parallel = self._recipe.parallel
        free = [slot for slot in range(parallel + len(self._taken)) if slot not in self._taken]
        # That whose GPUs it has, or else another stage would get them too.
        slots = {str(slot) for part in share for slot in part.slots}
        its_own = (slot for slot in free if slots & set(self._machine.share(slot, parallel).gpus))
        self._taken[next(its_own, free[0])] = share
        return share

    def release(self, share: Share) -> None:
        slot = next(slot for slot, taken in self._taken.items() if taken is share)
        del self._taken[slot]

    def where(self, share: Share) -> str:
        return ""

    def lose(self, host: str) -> None:
        raise AssertionError("this machine cannot be lost")

    def returned(self) -> Iterator[str]:
        return iter(())

    def could_grow(self, stage: Stage, share: Share) -> bool:
        return False

    def close(self) -> None:
        pass


def local_share(recipe: Recipe, stage: Stage, machine: Machine, parallel: int) -> Share:
    """What a stage takes of its part of this machine."""
    if stage.trained:
        wanted = ranks(getattr(recipe.stages, stage.name).train, len(machine.gpus))
    else:
        asked = stage.ranks(recipe) if stage.ranks else 1
        wanted = min(asked, len(machine.gpus) or asked)
    slots = tuple(int(gpu) for gpu in machine.gpus[:wanted]) if machine.gpus else tuple(range(wanted))
    return (Part(LOCALHOST, slots, parallel * wanted),)


class HostRoom:
    """The hosts of a hostfile, which share the folder `run`. `wanted` is how many slots each stage is to have."""

    def __init__(
        self,
        recipe: Recipe,
        hosts: Sequence[Host],
        wanted: Mapping[str, int],
        run: Path,
    ) -> None:
        self._recipe = recipe
        self._hosts = list(hosts)
        self._wanted = dict(wanted)
        self._run = run
        self._places = Places(hosts)
        self._looks: dict[str, Look] = {}
        self._refused: set[str] = set()

    def take(self, stage: Stage, begun: bool = False) -> Share | None:
        """While a host is lost a stage takes what there is: waiting for the rest could take days. So does one that has
        begun, also later: what others took meanwhile may lie where its full share would."""
        possible = counts(self._recipe, stage, self._wanted[stage.name])
        return self._places.take(possible if begun or self._places.lost else possible[:1])

    def again(self, hosts: str) -> Share:
        share = parse_share(hosts, self._hosts)
        self._places.hold(share)
        return share

    def release(self, share: Share) -> None:
        self._places.release(share)

    def where(self, share: Share) -> str:
        return f"on {in_words(share)}"

    def lose(self, host: str) -> None:
        if host in self._places.lost:
            return  # by two stages one after the other
        self._places.lost.add(host)
        look = self._looks.setdefault(host, Look())
        look.due = time.monotonic() + min(LONGEST_WAIT, LOOK_SECONDS * 2**look.losses)
        look.losses += 1

    def returned(self) -> Iterator[str]:
        for host in sorted(self._places.lost):
            look, now = self._looks[host], time.monotonic()
            if look.process is None:
                if now >= look.due:
                    look.process, look.due = self._look(host), now + ANSWER_SECONDS
            elif look.process.poll() is not None:
                fit = look.process.returncode == 0 and self._fit(host, look.process)
                look.process, look.due = None, now + LOOK_SECONDS
                if fit:
                    self._places.lost.discard(host)
                    yield host
            elif now >= look.due:
                look.process.kill()

    def _look(self, host: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            module_on(host, "launcher.host_report", "--run", str(self._run), "--marker", RECIPE),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,  # a line: less than a pipe holds
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _fit(self, host: str, look: subprocess.Popen[bytes]) -> bool:
        """Whether a host that answers again is what it was: somebody may have set it up anew."""
        assert look.stdout is not None
        said = look.stdout.read().decode(errors="replace")
        look.stdout.close()
        known = next(one for one in self._hosts if one.name == host)
        problems = returned(known, said, report(self._run, RECIPE))
        if problems and host not in self._refused:
            self._refused.add(host)
            log.warning("%s is back but cannot take part: %s", host, "; ".join(problems))
        return not problems

    def could_grow(self, stage: Stage, share: Share) -> bool:
        if count_of(share) >= self._wanted[stage.name]:
            return False
        self._places.release(share)
        with contextlib.ExitStack() as stack:
            stack.callback(self._places.hold, share)
            larger = [one for one in counts(self._recipe, stage, self._wanted[stage.name]) if one > count_of(share)]
            found = self._places.take(larger)
            if found is not None:
                self._places.release(found)
            return found is not None

    def close(self) -> None:
        for look in self._looks.values():
            if look.process is not None:
                look.process.kill()
                look.process.wait()
