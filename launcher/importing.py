"""`stretto import-quantizers`: what open-musiclm fitted, as an artifact that recipes can name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from model import artifact
from model.errors import UserError


def import_from_predecessor(files: Mapping[str, Path | None], output: Path) -> Iterator[str]:
    """Writes the quantizers of the fields in `files` to the folder `output` and yields what to tell the user, with the
    keys that a recipe needs. Raises UserError where a file is not what it should be."""
    from trainer.given_quantizers import KIND
    from trainer.predecessor import import_quantizers

    given = {name: file for name, file in files.items() if file is not None}
    if not given:
        raise UserError("name what to import: --semantic KMEANS.joblib, --conditioning RVQ.pt, or both.")
    digests = {name: artifact.file_digest(file) for name, file in given.items() if file.is_file()}
    with artifact.create(output, KIND, artifact.fingerprint(KIND, digests)) as (folder, info):
        info.update(import_quantizers(given, folder))
    yield f"{output}: quantizers. In a recipe, or behind it on the command line:"
    for name, said in info.items():
        yield f"  quantizers.{name}.centroids={output}"
        yield f"  quantizers.{name}.levels={said['levels']}"
        yield f"  quantizers.{name}.codebook_size={said['codebook_size']}"
        if "standardised" in said:
            yield f"  encoders.semantic.standardise={str(said['standardised']).lower()}"
