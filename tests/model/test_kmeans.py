"""Residual k-means: what it keeps, what it holds in memory, and that any number of ranks fit the same."""

from __future__ import annotations

import multiprocessing
import re
from pathlib import Path

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file, save_file
from sklearn.cluster import KMeans, MiniBatchKMeans

from data.ranks import Ranks
from data.vector_file import VectorFile
from model import lloyd
from model.kmeans import ResidualKMeans


def clusters(count: int = 400, seed: int = 0) -> torch.Tensor:
    """Vectors around 8 corners, far apart."""
    generator = torch.Generator().manual_seed(seed)
    corners = 10 * torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=torch.float32)
    return corners[torch.arange(count) % 8] + 0.1 * torch.randn(count, 3, generator=generator)


def mixture(count: int, dim: int = 12, components: int = 60, seed: int = 0) -> torch.Tensor:
    """Vectors around many centres that overlap, some of them in small numbers."""
    generator = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(components, dim, generator=generator)
    which = (components * torch.rand(count, generator=generator).square()).long()
    return centres[which] + 0.5 * torch.randn(count, dim, generator=generator)


def inertia(x: torch.Tensor, centroids: torch.Tensor) -> float:
    return float(torch.cdist(x.double(), centroids.double()).min(1).values.square().sum())


def test_one_level_finds_clusters():
    kmeans = ResidualKMeans(1, 8, 3)
    left = kmeans.fit([clusters()])
    codes = kmeans.encode(clusters(80, seed=1))[:, 0]
    assert left[0] < 0.001
    assert len(codes.unique()) == 8
    assert torch.equal(codes[:8].repeat(10), codes)


def test_every_level_comes_nearer():
    x = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0))
    kmeans = ResidualKMeans(4, 16, 6)
    left = kmeans.fit([x])
    assert left == sorted(left, reverse=True)
    codes = kmeans.encode(x.view(20, 100, 6))
    assert codes.shape == (20, 100, 4)
    assert codes.dtype == torch.int64
    errors = [(kmeans.decode(codes[..., :levels]).view(-1, 6) - x).square().mean() for levels in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)
    variance = (x - x.mean(0)).square().mean()
    assert float(errors[-1] / variance) == pytest.approx(left[-1], rel=1e-3)


@pytest.mark.parametrize("sampled", [False, True])
def test_as_near_as_scikit_learn(sampled, monkeypatch):
    """With all vectors from the first pass on, and with a sample first."""
    if sampled:
        monkeypatch.setattr(lloyd, "SAMPLE_VECTORS", 2_000)
    x = mixture(12_000)
    kmeans = ResidualKMeans(1, 32, 12)
    left = kmeans.fit(list(x.split(500)), iterations=30)
    own = inertia(x, kmeans.centroids[0])
    assert left[0] == pytest.approx(own / float((x - x.mean(0)).square().sum()), rel=1e-4)
    assert own < 1.02 * KMeans(32, random_state=0, n_init=1).fit(x.numpy()).inertia_
    batches = MiniBatchKMeans(32, random_state=0, n_init=1)
    for batch in [*x.split(500)] * 3:
        batches.partial_fit(batch.numpy())
    assert own < 1.02 * inertia(x, torch.from_numpy(batches.cluster_centers_))


def test_kmeans_plus_plus_starts_nearer_than_a_sample():
    x = clusters()
    one = {}
    for start in ("kmeans++", "sample"):
        sample = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(1))]
        one[start] = inertia(x, lloyd.begin(sample, 8, start, (0,), lloyd.Alone()))
    assert one["kmeans++"] < 0.1 * one["sample"]  # a corner each; of a sample some share one
    for start in one:
        left = ResidualKMeans(1, 8, 12).fit([mixture(1000)], start=start, iterations=1)
        assert left[0] < 0.7


def test_same_blocks_and_seed_give_the_same_centroids(monkeypatch):
    fits = []
    for _ in range(2):
        kmeans = ResidualKMeans(2, 8, 12)
        kmeans.fit(list(mixture(1000).split(50)), seed=3)
        fits.append(kmeans.centroids)
    assert torch.equal(fits[0], fits[1])
    kmeans.fit(list(mixture(1000).split(50)), seed=4)
    assert not torch.equal(fits[0], kmeans.centroids)


@pytest.mark.parametrize("sample", [65_536, 300])
def test_ranks_fit_the_same_together(tmp_path, sample):
    for count in (1, 2, 3):
        run_ranks(fit_as_rank, count, tmp_path / str(count), tmp_path, sample)
    alone, *others = (load_file(tmp_path / f"{count}.safetensors") for count in (1, 2, 3))
    for other in others:
        assert (other["centroids"] - alone["centroids"]).abs().max() < 1e-5
        assert torch.equal(other["codes"], alone["codes"])
        assert (other["left"] - alone["left"]).abs().max() < 1e-5


def fit_as_rank(folder: Path, sample: int) -> None:
    lloyd.SAMPLE_VECTORS = sample
    x = mixture(3000)
    with Ranks.joined() as ranks:
        blocks = x.split([*[170] * 17, 110])
        kmeans = ResidualKMeans(3, 24, 12)
        left = kmeans.fit(list(blocks[ranks.rank :: ranks.world_size]), iterations=6, group=ranks)
        same = ranks.gathered(kmeans.centroids.sum().item())
        assert len(set(same)) == 1
        if ranks.leads:
            found = {"centroids": kmeans.centroids, "codes": kmeans.encode(x), "left": torch.tensor(left)}
            save_file(found, folder / f"{ranks.world_size}.safetensors")


def test_a_rank_without_vectors_fits_along(tmp_path):
    run_ranks(fit_one_block, 2, tmp_path)


def fit_one_block() -> None:
    with Ranks.joined() as ranks:
        kmeans = ResidualKMeans(2, 8, 3)
        left = kmeans.fit([clusters()] if ranks.leads else [], group=ranks)
        assert left[0] < 0.001


def test_unused_codes_are_revived():
    """Far off, few beside many: a start from a sample has no centroid there, and centroids that no vector chooses."""
    x = torch.cat([torch.randn(2000, 2, generator=torch.Generator().manual_seed(0)), torch.full((20, 2), 500.0)])
    far = torch.tensor([[1e4, 1e4]]).repeat(14, 1) + torch.arange(14)[:, None]
    start = torch.cat([x[:2], far])
    moved = lloyd.converge(list(x.split(300)), start, 1, (0,), lloyd.Alone())
    assert moved.abs().max() < 600
    moved = lloyd.converge(list(x.split(300)), start, 10, (0,), lloyd.Alone())
    codes = lloyd.nearest(x, moved)[0]
    assert len(codes.unique()) >= 15
    assert lloyd.nearest(x[-20:], moved)[1].max() < 1  # the far ones have their own


def test_vectors_are_drawn_by_weight_and_none_twice():
    x = torch.arange(1000.0)[:, None]
    draw = lloyd.Draw(100, (0,), lloyd.Alone())
    blocks = list(x.split(64))
    for index, block in enumerate(blocks):
        draw.offer(index, (block[:, 0] >= 500).float() * (1 + 9 * (block[:, 0] >= 900)))
    drawn = draw.vectors(blocks, 1, 100)[:, 0]
    assert len(drawn.unique()) == 100
    assert drawn.min() >= 500
    assert 50 < (drawn >= 900).sum() < 90  # a fifth of them, with 10 / 14 of the weight


def test_memory_does_not_grow_with_the_vectors(tmp_path):
    """Fitted to a file of 205 MB, the process grows by less than a quarter of that."""
    sizes, dim = [4000] * 50, 256
    with (tmp_path / "vectors").open("w+b") as file:
        vectors = VectorFile(file, dim)
        for number, size in enumerate(sizes):
            vectors.append(mixture(size, dim, seed=number))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        grown = pool.apply(growth, (tmp_path / "vectors", sizes, dim))
    assert 4 * grown < (tmp_path / "vectors").stat().st_size


def growth(path: Path, sizes: list[int], dim: int) -> int:
    """Bytes by which the peak memory of this process grows in a fit."""
    torch.set_num_threads(1)
    lloyd.SAMPLE_VECTORS = 8_192
    ResidualKMeans(2, 8, dim).fit([mixture(4000, dim)], iterations=1)  # libraries take their workspaces at first use
    before = peak()
    with path.open("r+b") as file:
        ResidualKMeans(2, 8, dim).fit(VectorFile(file, dim, sizes=sizes), iterations=2)
    return peak() - before


def peak() -> int:
    """Bytes that this process held at most; what getrusage says counts the process that it was forked from."""
    return 1024 * int(re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])


def test_fewer_vectors_than_centroids():
    for start in ("kmeans++", "sample"):
        kmeans = ResidualKMeans(2, 16, 3)
        kmeans.fit([clusters(5)], start=start)
        assert kmeans.centroids.isfinite().all()
        assert (kmeans.decode(kmeans.encode(clusters(5))) - clusters(5)).abs().max() < 1e-4


def test_progress_goes_up_to_the_end():
    shares: list[float] = []
    ResidualKMeans(2, 8, 3).fit(list(clusters().split(50)), report=shares.append)
    assert shares == sorted(shares)
    assert 0 < shares[0] < 0.05
    assert shares[-1] == 1


def test_no_vectors():
    with pytest.raises(ValueError, match="no vectors"):
        ResidualKMeans(1, 4, 3).fit([])


def test_saved_and_loaded(tmp_path):
    kmeans = ResidualKMeans(2, 8, 3)
    kmeans.fit([clusters()])
    kmeans.save(tmp_path / "k.safetensors", "semantic")
    loaded = ResidualKMeans.load(tmp_path / "k.safetensors", "semantic")
    assert torch.equal(loaded.encode(clusters()), kmeans.encode(clusters()))
    assert (loaded.levels, loaded.codebook_size, loaded.dim) == (2, 8, 3)
