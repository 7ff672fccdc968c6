"""Residual k-means: what it keeps, what it holds in memory, and that it is the same each time."""

from __future__ import annotations

import pytest
import torch

from model.kmeans import ResidualKMeans


def clusters(count: int = 400, seed: int = 0) -> torch.Tensor:
    """Vectors around 8 corners, far apart."""
    generator = torch.Generator().manual_seed(seed)
    corners = 10 * torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=torch.float32)
    return corners[torch.arange(count) % 8] + 0.1 * torch.randn(count, 3, generator=generator)


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


def test_same_stream_and_seed_give_the_same_centroids():
    fits = []
    for size in (50, 50, 73):
        kmeans = ResidualKMeans(2, 8, 3)
        kmeans.fit(clusters().split(size), seed=3)
        fits.append(kmeans.centroids)
    assert torch.equal(fits[0], fits[1])
    assert torch.equal(fits[0], fits[2])  # however the stream is cut


def test_stream_is_read_once_and_a_bounded_sample_is_held():
    held = []

    def stream():
        for number in range(200):
            batch = torch.full((100, 1), float(number))
            held.append(number)
            yield batch

    kmeans = ResidualKMeans(1, 4, 1)
    kmeans.fit(stream(), max_vectors=500)
    assert held == list(range(200))
    assert kmeans.centroids.min() < 60 < 140 < kmeans.centroids.max()  # from all over the stream


def test_fewer_vectors_than_centroids():
    kmeans = ResidualKMeans(2, 16, 3)
    kmeans.fit([clusters(5)])
    assert kmeans.centroids.isfinite().all()
    assert (kmeans.decode(kmeans.encode(clusters(5))) - clusters(5)).abs().max() < 1e-4


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
