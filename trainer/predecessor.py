"""Quantizers of open-musiclm as Stretto's, so that its tokens keep their meaning.

Both quantize by Euclidean distance, level after level, as ResidualKMeans does: of the same vector they make the same
codes. Nothing in the files is run.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model import artifact
from model.bundle import QUANTIZERS
from model.encoders.checkpoint import read_state_dict
from model.errors import UserError
from model.fields import CONDITIONING, SEMANTIC
from model.saving import save_tensors
from trainer.joblib_file import NotReadable, Record, array, read_joblib

KMEANS = re.compile(r"sklearn\.cluster\..*\b(MiniBatchKMeans|KMeans)")
LAYER = re.compile(r"(.*?)layers\.(\d+)\.(.*)")
EMBED = "_codebook.embed"
PARTS = {EMBED, *(f"_codebook.{name}" for name in ("embed_avg", "cluster_size", "initted"))}
"""Tensors of one level: its centroids, and what its training kept of them."""
BESIDE = ("project_in", "project_out", "mlps")
"""Parts of a ResidualVQ that change what its codebooks mean."""
STANDARDISED = 1e-3
"""Means of standardised features are 0, so those of their centroids are; this share of their spread is rounding."""
BY_ANGLE = 0.8, 1.001
"""Mean lengths of the centroids of a level that are compared by angle. Of unit vectors compared by distance, what the
first level leaves has length sqrt(1 - length²) at most, so the first two cannot both be that long."""


def import_quantizers(files: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Writes `folder`/quantizers.safetensors with the centroids `[levels, codebook_size, dim]` of each field in
    `files`: of "semantic" from a k-means, of "conditioning" from a residual quantizer.

    Returns what the manifest says of each: its shape, the file it was read from, and whether it was fitted to
    standardised features. Raises UserError for a file that is not what it should be.
    """
    readers = {CONDITIONING: read_residual_vq, SEMANTIC: read_kmeans}
    centroids = {name: readers[name](file) for name, file in files.items()}
    save_tensors(centroids, folder / QUANTIZERS)
    info: dict[str, Any] = {}
    for name, values in centroids.items():
        shape = dict(zip(("levels", "codebook_size", "dim"), values.shape, strict=True))
        info[name] = {**shape, "file": files[name].name, "sha256": artifact.file_digest(files[name])}
    if SEMANTIC in centroids:
        info[SEMANTIC]["standardised"] = standardised(centroids[SEMANTIC])
    return info


def read_kmeans(path: Path) -> Tensor:
    """The centroids float32 `[1, codes, dim]` of scikit-learn's KMeans or MiniBatchKMeans as joblib dumps it, or of an
    array that numpy saved. Raises UserError where the file is neither."""
    if not path.is_file():
        raise UserError(f"semantic: there is no file {path}.\nopen-musiclm saves its k-means as kmeans.joblib.")
    try:
        # Mapped, so that a header alone cannot take memory.
        numpys = path.suffix == ".npy"
        found = np.lib.format.open_memmap(path, mode="r") if numpys else array(_fitted(path)["cluster_centers_"])
    except (NotReadable, ValueError, EOFError, OSError) as error:
        raise UserError(
            f"{path} was not read as a k-means of scikit-learn: {error}.\nWhere you trust it, write its centroids with "
            "the libraries that made it, and name that file: "
            f"numpy.save('kmeans.npy', joblib.load('{path.name}').cluster_centers_)"
        ) from None
    if found.ndim != 2 or found.dtype.kind != "f" or not np.isfinite(found).all() or not found.size:
        raise UserError(f"{path} holds {found.dtype} of shape {found.shape}: centroids are finite [codes, dim].")
    return torch.from_numpy(np.array(found, np.float32, order="C"))[None]


def _fitted(path: Path) -> dict[str, Any]:
    """The attributes of the fitted k-means in a dump. Raises NotReadable."""
    found = read_joblib(path)
    if not isinstance(found, Record) or not KMEANS.fullmatch(found.origin):
        what = found.origin if isinstance(found, Record) else type(found).__name__
        raise NotReadable(f"it holds a {what}")
    if not isinstance(found.state, dict) or "cluster_centers_" not in found.state:
        raise NotReadable("it was never fitted")
    return found.state


def read_residual_vq(path: Path) -> Tensor:
    """The centroids float32 `[levels, codes, dim]` in the state dict of a `vector_quantize_pytorch.ResidualVQ`, or of a
    module that has one. Raises UserError where there is none, and where it does not quantize as residual k-means does.
    """
    tensors = read_state_dict(path, "conditioning", "open-musiclm saves its quantizer as clap.rvq.STEP.pt.")
    found = [match for name in tensors if (match := LAYER.fullmatch(name))]
    prefixes = {match[1] for match in found if match[3] == EMBED}
    if len(prefixes) != 1:
        many = "more than one" if prefixes else "no"
        raise UserError(f"{path} holds {many} ResidualVQ: tensors such as layers.0.{EMBED} are looked for.")
    (prefix,) = prefixes
    own = [match for match in found if match[1] == prefix]
    more = [match[0] for match in own if match[3] not in PARTS]
    more += [name for name in tensors if name.startswith(tuple(f"{prefix}{part}." for part in BESIDE))]
    if more:
        raise UserError(f"{path} does more than quantize by distance ({more[0]}): it cannot be taken over.")
    levels = sorted({int(match[2]) for match in own})
    books = [tensors.get(f"{prefix}layers.{level}.{EMBED}") for level in range(len(levels))]
    starts = [tensors.get(f"{prefix}layers.{level}._codebook.initted", torch.ones(1)) for level in levels]
    if any(book is None for book in books):
        raise UserError(f"{path} has no tensor {prefix}layers.{books.index(None)}.{EMBED}: it is not whole.")
    if not all(bool(start.all()) for start in starts):
        raise UserError(f"{path} was saved before it was fitted.")
    return _centroids(path, [book for book in books if book is not None])


def _centroids(path: Path, books: list[Tensor]) -> Tensor:
    """One tensor of the codebooks `[1, codes, dim]`, which the first versions saved as `[codes, dim]`."""
    shapes = {tuple(book.shape) for book in books}
    (shape,) = shapes if len(shapes) == 1 else ((),)
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[0] != 1):
        raise UserError(f"{path} has codebooks of shapes {sorted(shapes)}: one [1, codes, dim] for all is needed.")
    if any(book.nbytes > book.untyped_storage().nbytes() for book in books):
        raise UserError(f"{path} holds tensors with fewer numbers than they claim to have.")
    centroids = torch.stack([book.reshape(shape[-2:]) for book in books]).float()
    if not centroids.isfinite().all():
        raise UserError(f"{path} holds numbers that are not finite.")
    lengths = centroids.norm(dim=-1).mean(-1)
    if len(books) > 1 and bool(((lengths > BY_ANGLE[0]) & (lengths < BY_ANGLE[1])).all()):
        raise UserError(f"{path} compares by angle (use_cosine_sim), not by distance: it cannot be taken over.")
    return centroids


def standardised(centroids: Tensor) -> bool:
    """Whether they are means of vectors that were brought to mean 0 each, which stays so in the mean."""
    return bool(centroids.mean(-1).abs().max() < STANDARDISED * centroids.std())
