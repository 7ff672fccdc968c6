import pytest
import torch
from helpers import FIELDS, coarse_config, quantizers, random_batch

from model.cache import GraphLayerCache
from model.decoder import Decoder, GraphDecoder
from model.stage import build_stage


@pytest.mark.parametrize("kv_heads", [2, 1])
@torch.inference_mode()
def test_a_step_of_static_shapes_is_a_step(kv_heads):
    """What a CUDA graph records: whole caches, a mask and a place that is a tensor, in place of slices."""
    torch.manual_seed(0)
    config = coarse_config(transformer={"dim": 64, "layers": 2, "heads": 2, "kv_heads": kv_heads})
    stage = build_stage(config, FIELDS, quantizers())
    embedded, rotary, _ = stage.embed(random_batch(), None)
    plain, static = (
        kind(stage.transformer, rotary, stage.new_cache(3, embedded.shape[1])) for kind in (Decoder, GraphDecoder)
    )
    assert torch.equal(plain.feed(embedded[:, :30]), static.feed(embedded[:, :30]))
    static._place = torch.tensor([0])
    static._static = [GraphLayerCache(layer, static._place) for layer in static.cache]
    for step in range(30, 40):
        expected = plain.feed(embedded[:, step : step + 1])
        static._place.fill_(step)
        static._input = embedded[:, step : step + 1]
        assert torch.allclose(static.step()[:, -1], expected, atol=1e-5)
