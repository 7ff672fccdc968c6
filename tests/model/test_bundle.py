"""What is wrong with a bundle's files is named, and nothing but tensors is loaded from them."""

from __future__ import annotations

import json
import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_bundle import make_bundle
from small_encoders import CODEC, save_encodec

from model import MusicPipeline, artifact
from model.config import CodecConfig
from model.encoders import load_codec
from model.errors import UserError
from model.int8 import is_linear, quantised


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundle") / "bundle")


def copy_of(bundle, folder):
    return shutil.copytree(bundle, folder / "copy")


@pytest.mark.parametrize(
    "name",
    ["fine.safetensors", "quantizers.safetensors", "encoders/joint/tokenizer.json", "encoders/codec/codec.safetensors"],
)
def test_a_file_with_a_changed_byte_is_named(bundle, tmp_path, name):
    file = copy_of(bundle, tmp_path) / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=f"{file} has changed"):
        MusicPipeline.load(tmp_path / "copy", "cpu")


def test_a_changed_byte_of_the_manifest_is_found(bundle, tmp_path):
    """Whatever it says: a rate or a size would change what the codes mean."""
    copy = copy_of(bundle, tmp_path)
    whole = (copy / "manifest.json").read_bytes()
    drawn = random.Random(0)
    for _ in range(100):
        changed = bytearray(whole)
        changed[drawn.randrange(len(whole) - 1)] ^= 1 << drawn.randrange(8)
        (copy / "manifest.json").write_bytes(changed)
        if not same_json(changed, whole):
            with pytest.raises(UserError):
                MusicPipeline.load(copy, "cpu")
    changed = json.loads(whole)
    changed["info"]["sampling"]["temperature"] = {"fine": 0.5}
    (copy / "manifest.json").write_text(json.dumps(changed))
    with pytest.raises(UserError, match=r"manifest\.json has changed"):
        MusicPipeline.load(copy, "cpu")


def same_json(one, other):
    """A byte of what means nothing, such as a space."""
    try:
        return json.loads(one) == json.loads(other)
    except ValueError:
        return False


@pytest.mark.parametrize("verify", [True, False])
def test_a_file_that_is_missing_or_cut_short_is_named(bundle, tmp_path, verify):
    copy = copy_of(bundle, tmp_path)
    file = copy / "coarse.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{file} has .* bytes"):
        MusicPipeline.load(copy, "cpu", verify=verify)
    file.unlink()
    with pytest.raises(UserError, match=f"{file} is missing"):
        MusicPipeline.load(copy, "cpu", verify=verify)


def reseal(bundle):
    """Makes the manifest say that the files are as they should be."""
    found = artifact.read(bundle)
    artifact.write_manifest(bundle, found.kind, found.fingerprint, info=found.info)


@pytest.mark.parametrize("name", ["semantic.safetensors", "quantizers.safetensors", "encoders/codec/codec.safetensors"])
def test_a_pickle_is_never_loaded(bundle, tmp_path, name):
    """Not even where the manifest says that it belongs there."""
    copy = copy_of(bundle, tmp_path)
    torch.save(load_file(bundle / name), copy / name)
    reseal(copy)
    with pytest.raises(UserError, match=r"not read as safetensors.*pickle"):
        MusicPipeline.load(copy, "cpu")


def test_weights_of_another_model_are_refused(bundle, tmp_path):
    copy = copy_of(bundle, tmp_path)
    shutil.copyfile(bundle / "semantic.safetensors", copy / "fine.safetensors")
    reseal(copy)
    with pytest.raises(
        UserError, match=r"fine.safetensors holds another model.*conditions.0.sum_in.weight is .*missing exp"
    ):
        MusicPipeline.load(copy, "cpu")


def test_the_model_card_may_be_edited(bundle, tmp_path):
    """It is a page for people: to add a licence, say."""
    copy = copy_of(bundle, tmp_path)
    (copy / "README.md").write_text("# My model")
    reseal(copy)
    (copy / "README.md").write_text("# My model, under a licence")
    assert artifact.problems(artifact.read(copy)) == []


def test_weights_of_fewer_bits_sound_like_themselves(bundle, tmp_path):
    """Files in fp16, bf16 and 8 bits load as what they are rounded to."""
    copy = copy_of(bundle, tmp_path)
    whole = load_file(bundle / "semantic.safetensors")
    for convert in (
        lambda name, value: {name: value.half()},
        lambda name, value: {name: value.bfloat16()},
        lambda name, value: dict(quantised(name, value)) if is_linear(name, value.shape) else {name: value},
    ):
        stored = {key: part for name, value in whole.items() for key, part in convert(name, value).items()}
        save_file(stored, copy / "semantic.safetensors")
        reseal(copy)
        stage = MusicPipeline.load(copy, "cpu").stages["semantic"]
        for name, value in stage.state_dict().items():
            assert value.dtype == torch.float32
            row = whole[name].flatten(1) if value.ndim > 1 else whole[name][None]
            step = row.abs().amax(dim=1).max() / 127
            assert (value - whole[name]).abs().max() <= step / 2 + 1e-6, name


def test_a_pretrained_codec_may_lie_elsewhere_on_this_machine(bundle, tmp_path):
    """A bundle names it and does not hold it."""
    copy, place = copy_of(bundle, tmp_path), save_encodec(tmp_path / "encodec")
    there = CodecConfig(**CODEC, weights=str(place))
    shutil.rmtree(copy / "encoders" / "codec")
    (copy / "encoders" / "codec").mkdir()
    load_codec(place, there).save(copy / "encoders" / "codec")
    found = artifact.read(copy)
    found.info["encoders"]["codec"] = there.model_copy(update={"weights": "/gone/encodec"}).model_dump(mode="json")
    artifact.write_manifest(copy, found.kind, found.fingerprint, info=found.info)
    with pytest.raises(UserError, match=r"/gone/encodec is neither a folder here nor"):
        MusicPipeline.load(copy, "cpu")
    pipeline = MusicPipeline.load(copy, "cpu", weights={"codec": str(place)})
    assert pipeline.generate(["a slow flute"], seconds=0.2).waveform.shape == (1, 5 * 320)
    save_encodec(tmp_path / "other", stereo=True)
    with pytest.raises(UserError, match="are not those that"):
        MusicPipeline.load(copy, "cpu", weights={"codec": str(tmp_path / "other")})
