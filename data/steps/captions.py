"""Captions rewritten by templates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from string import Formatter
from typing import Any

from data.corpus import Clip
from data.steps.base import Step
from model.errors import UserError, nearest

CAPTION = "caption"


class Captions(Step):
    """Each template with each caption of a clip, or once where it has no {caption}.

    A template that names what a clip does not have is passed over for it; where none is left, its captions stay.
    """

    def __init__(self, templates: Sequence[str]) -> None:
        self.templates = [[(text, name) for text, name, *_ in Formatter().parse(template)] for template in templates]

    def prepare(self, clips: Sequence[Clip]) -> list[Clip]:
        known = {CAPTION}.union(*({name for name, value in _columns(clip).items() if _said(value)} for clip in clips))
        for template in self.templates:
            unknown = [name for _, name in template if name is not None and name not in known]
            if unknown:
                raise UserError(
                    f"tokens.steps: a template for captions has {{{unknown[0]}}}, which no clip has."
                    f"{nearest(unknown[0], known)}\nThere is {', '.join(f'{{{name}}}' for name in sorted(known))}."
                )
        return [replace(clip, captions=self.rewritten(clip)) for clip in clips]

    def rewritten(self, clip: Clip) -> tuple[str, ...]:
        """The new captions of a clip, each once: all templates of its first caption, then those of the next."""
        columns = _columns(clip)
        found = [
            _filled(template, {**columns, CAPTION: caption})
            for caption in clip.captions or (None,)
            for template in self.templates
        ]
        return tuple(dict.fromkeys(caption for caption in found if caption)) or clip.captions


def _columns(clip: Clip) -> dict[str, Any]:
    return {**(clip.attributes or {}), **clip.columns}


def _filled(template: Sequence[tuple[str, str | None]], values: dict[str, Any]) -> str | None:
    names = [name for _, name in template if name is not None]
    if not all(_said(values.get(name)) for name in names):
        return None
    return "".join(text + ("" if name is None else str(values[name])) for text, name in template)


def _said(value: Any) -> bool:
    return value is not None and value != ""
