"""open-musiclm's quantizers make the same codes here as there, and nothing in their files is run."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.cluster import KMeans, MiniBatchKMeans
from torch import nn

from model.errors import UserError
from model.kmeans import ResidualKMeans
from trainer.joblib_file import NotReadable, array, read_joblib
from trainer.predecessor import import_quantizers, read_kmeans, read_residual_vq

CODES, DIM, LEVELS = 16, 24, 5


def vectors(count: int = 400, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, DIM)).astype(np.float32)


def standardised(x: np.ndarray) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / x.std(-1, ddof=1, keepdims=True)


@pytest.fixture(scope="module")
def kmeans():
    """As open-musiclm fits it, features of float32 and no labels kept."""
    fitted = MiniBatchKMeans(CODES, n_init=1, compute_labels=False, random_state=np.random.RandomState(0))
    return fitted.fit(standardised(vectors()))


class Codebook(nn.Module):
    """What vector_quantize_pytorch keeps of one level."""

    def __init__(self, embed: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("initted", torch.ones(1))
        self.register_buffer("cluster_size", torch.ones(1, len(embed)))
        self.register_buffer("embed_avg", embed[None].clone())
        self.register_buffer("embed", embed[None])


class Layer(nn.Module):
    def __init__(self, embed: torch.Tensor) -> None:
        super().__init__()
        self._codebook = Codebook(embed)


class ResidualVQ(nn.Module):
    """The reference: in evaluation each level takes the nearest centroid of what those before it left over."""

    def __init__(self, levels: int = LEVELS) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        books = (torch.randn(CODES, DIM, generator=generator) * 0.2 * 0.7**level for level in range(levels))
        self.layers = nn.ModuleList(Layer(book) for book in books)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        codes, residual = [], x
        for layer in self.layers:
            distance = -torch.cdist(residual[None], layer._codebook.embed, p=2)
            codes.append(distance.argmax(-1)[0])
            residual = residual - layer._codebook.embed[0, codes[-1]]
        return torch.stack(codes, -1)


def saved(tmp_path: Path, state: object) -> Path:
    torch.save(state, tmp_path / "clap.rvq.0.pt")
    return tmp_path / "clap.rvq.0.pt"


def changed(name: str, value: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """The state of the reference with one tensor in the place of another, or without it."""
    state = {**ResidualVQ().state_dict(), name: value}
    return {key: tensor for key, tensor in state.items() if tensor is not None}


# k-means


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_kmeans_gives_the_codes_of_scikit_learn(tmp_path, kmeans, protocol):
    joblib.dump(kmeans, tmp_path / "kmeans.joblib", protocol=protocol)
    centroids = read_kmeans(tmp_path / "kmeans.joblib")
    assert centroids.shape == (1, CODES, DIM)
    x = standardised(vectors(seed=1))
    codes = ResidualKMeans.from_centroids(centroids).encode(torch.from_numpy(x))
    assert codes[:, 0].tolist() == kmeans.predict(x).tolist()
    assert len(set(codes[:, 0].tolist())) > CODES // 2


def test_a_kmeans_of_float64_and_its_centroids_as_an_array_are_read_too(tmp_path):
    fitted = KMeans(CODES, n_init=1, random_state=0).fit(vectors().astype(np.float64))
    joblib.dump(fitted, tmp_path / "kmeans.joblib")
    np.save(tmp_path / "kmeans.npy", fitted.cluster_centers_)
    for name in ("kmeans.joblib", "kmeans.npy"):
        centroids = read_kmeans(tmp_path / name)
        assert centroids.dtype == torch.float32
        assert np.allclose(centroids[0], fitted.cluster_centers_)


@pytest.mark.parametrize(
    "values", [np.asfortranarray(vectors(7)), vectors(5).astype(">f8"), np.zeros((0, 3), np.int16)]
)
def test_arrays_come_back_whatever_their_order_and_type(tmp_path, values):
    joblib.dump({"array": values}, tmp_path / "array.joblib")
    assert np.array_equal(array(read_joblib(tmp_path / "array.joblib")["array"]), values)


class Harmful:
    """What an unpickler would run."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_what_a_dump_would_run_is_not_run(tmp_path, kmeans):
    fitted = pickle.loads(pickle.dumps(kmeans))  # noqa: S301 (our own)
    fitted.harm = Harmful(tmp_path / "mark")
    joblib.dump(fitted, tmp_path / "kmeans.joblib")
    assert torch.equal(read_kmeans(tmp_path / "kmeans.joblib")[0], torch.from_numpy(kmeans.cluster_centers_))
    joblib.dump(Harmful(tmp_path / "mark"), tmp_path / "kmeans.joblib")
    with pytest.raises(UserError, match=r"was not read as a k-means of scikit-learn: it holds a pathlib\.Path\.touch"):
        read_kmeans(tmp_path / "kmeans.joblib")
    assert not (tmp_path / "mark").exists()
    joblib.load(tmp_path / "kmeans.joblib")
    assert (tmp_path / "mark").exists()  # which is what another reader does


def test_what_the_pickle_registry_names_is_not_called(tmp_path):
    """Its codes stand for classes as names do."""
    for code in (pickle.EXT1 + b"\x01", pickle.EXT2 + b"\x01\x00", pickle.EXT4 + b"\x01\x00\x00\x00"):
        (tmp_path / "kmeans.joblib").write_bytes(pickle.PROTO + b"\x04" + code + pickle.STOP)
        with pytest.raises(NotReadable):
            read_joblib(tmp_path / "kmeans.joblib")


@pytest.mark.parametrize(
    "ends", [b"}(h\x00K\x01u.", b"}h\x00K\x01s.", b"\x8f(h\x00\x90.", b"(h\x00\x91.", b"(h\x00K\x01d."]
)
def test_what_would_take_for_ever_to_hash_is_refused(tmp_path, ends):
    """A tuple of a tuple of a tuple, each twice: as a key it is looked through two to the power of 60 times."""
    deep = b"\x80\x04)q\x00" + b"".join(b"h\x00h\x00\x86q\x00" for _ in range(60))
    (tmp_path / "deep.joblib").write_bytes(deep + ends)
    with pytest.raises(NotReadable):
        read_joblib(tmp_path / "deep.joblib")


def test_a_damaged_dump_is_refused_in_words_or_read(tmp_path, kmeans):
    """Cut anywhere it is refused; a changed byte may be one of a number."""
    joblib.dump(kmeans, tmp_path / "kmeans.joblib")
    content = (tmp_path / "kmeans.joblib").read_bytes()
    drawn = random.Random(0)
    for _ in range(100):
        (tmp_path / "kmeans.joblib").write_bytes(content[: drawn.randrange(len(content))])
        with pytest.raises(UserError, match="was not read as a k-means"):
            read_kmeans(tmp_path / "kmeans.joblib")
    for _ in range(500):
        flipped = bytearray(content)
        flipped[drawn.randrange(len(content))] ^= 1 << drawn.randrange(8)
        (tmp_path / "kmeans.joblib").write_bytes(flipped)
        try:
            read_kmeans(tmp_path / "kmeans.joblib")
        except UserError:
            continue


def test_what_is_no_kmeans_is_refused_in_words(tmp_path, kmeans):
    def refused(name: str, words: str) -> None:
        with pytest.raises(UserError, match=words) as caught:
            read_kmeans(tmp_path / name)
        assert name in str(caught.value)

    refused("kmeans.joblib", "there is no file")
    joblib.dump(kmeans, tmp_path / "kmeans.joblib.gz")
    refused("kmeans.joblib.gz", r"compressed one.\n.*numpy.save\('kmeans.npy', joblib.load")
    joblib.dump(KMeans(3), tmp_path / "new.joblib")
    refused("new.joblib", "it was never fitted")
    joblib.dump({"cluster_centers_": vectors()}, tmp_path / "dict.joblib")
    refused("dict.joblib", "it holds a dict")
    np.save(tmp_path / "objects.npy", np.array([{}], object), allow_pickle=True)
    refused("objects.npy", "was not read as a k-means")
    np.save(tmp_path / "flat.npy", np.zeros(7))
    refused("flat.npy", r"float64 of shape \(7,\)")
    np.savez(tmp_path / "several.npz", vectors())
    (tmp_path / "several.npz").rename(tmp_path / "several.npy")
    refused("several.npy", "was not read as a k-means")
    (tmp_path / "vast.joblib").write_bytes(b"\x80\x05\x96" + (1 << 45).to_bytes(8, "little") + b".")
    refused("vast.joblib", "what joblib does not write")


# Residual quantizer


@pytest.mark.parametrize(
    "form",
    [
        lambda state: state,
        lambda state: {f"rq.{name}": value for name, value in state.items()} | {"clap.weight": torch.ones(3)},
        lambda state: {"state_dict": state, "steps": 7},
        lambda state: {name: value[0] if "embed" in name else value for name, value in state.items()},
    ],
    ids=["its own", "of the module that has it", "beside other things", "of the first versions"],
)
def test_a_residual_quantizer_gives_the_codes_of_the_reference(tmp_path, form):
    reference = ResidualVQ(levels=12)
    quantizer = ResidualKMeans.from_centroids(read_residual_vq(saved(tmp_path, form(reference.state_dict()))))
    assert (quantizer.levels, quantizer.codebook_size, quantizer.dim) == (12, CODES, DIM)
    x = nn.functional.normalize(torch.from_numpy(vectors(seed=2)), dim=-1)
    expected = reference(x)
    assert torch.equal(quantizer.encode(x), expected)
    assert len(expected[:, 0].unique()) > 4


UNIT = nn.functional.normalize(torch.ones(CODES, DIM), dim=-1)[None]


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"weight": torch.ones(3)}, "holds no ResidualVQ"),
        (
            {f"{prefix}.layers.0._codebook.embed": torch.ones(1, 2, 3) for prefix in "ab"},
            "holds more than one ResidualVQ",
        ),
        (changed("layers.3._codebook.embed", None), r"has no tensor layers.3._codebook.embed: it is not whole"),
        (changed("layers.2._codebook.initted", torch.zeros(1)), "was saved before it was fitted"),
        (changed("project_in.weight", torch.ones(8, DIM)), r"does more than quantize by distance \(project_in.weight"),
        (changed("layers.0._codebook.batch_mean", torch.ones(1, 1, DIM)), r"more than .*_codebook.batch_mean"),
        (changed("mlps.0.weight", torch.ones(DIM, DIM)), r"does more than quantize by distance \(mlps.0.weight"),
        (changed("layers.1._codebook.embed", torch.ones(1, 3, DIM)), "codebooks of shapes"),
        (changed("layers.1._codebook.embed", torch.ones(1).expand(1, CODES, DIM)), "fewer numbers than they claim"),
        (changed("layers.1._codebook.embed", torch.full((1, CODES, DIM), torch.nan)), "not finite"),
        ({f"layers.{level}._codebook.embed": UNIT for level in range(3)}, "compares by angle"),
    ],
)
def test_what_is_no_such_quantizer_is_refused_in_words(tmp_path, state, words):
    with pytest.raises(UserError, match=words):
        read_residual_vq(saved(tmp_path, state))


def test_what_a_torch_file_would_run_is_not_run(tmp_path):
    path = saved(tmp_path, {**ResidualVQ().state_dict(), "harm": Harmful(tmp_path / "mark")})
    with pytest.raises(UserError, match="holds more than tensors, so that opening it could run code"):
        read_residual_vq(path)
    assert not (tmp_path / "mark").exists()


# Both


def test_an_import_says_what_it_holds_and_what_its_features_were(tmp_path, kmeans):
    joblib.dump(kmeans, tmp_path / "kmeans.joblib")
    joblib.dump(KMeans(CODES, n_init=1).fit(vectors()), tmp_path / "plain.joblib")
    files = {"conditioning": saved(tmp_path, ResidualVQ().state_dict()), "semantic": tmp_path / "kmeans.joblib"}
    info = import_quantizers(files, tmp_path)
    centroids = load_file(tmp_path / "quantizers.safetensors")
    assert {name: tuple(values.shape) for name, values in centroids.items()} == {
        "conditioning": (LEVELS, CODES, DIM),
        "semantic": (1, CODES, DIM),
    }
    assert info["conditioning"].items() >= {"levels": LEVELS, "codebook_size": CODES, "dim": DIM}.items()
    assert info["semantic"].items() >= {"file": "kmeans.joblib", "standardised": True}.items()
    (tmp_path / "other").mkdir()
    assert not import_quantizers({"semantic": tmp_path / "plain.joblib"}, tmp_path / "other")["semantic"][
        "standardised"
    ]
