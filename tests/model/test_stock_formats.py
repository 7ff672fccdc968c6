"""Stages as checkpoints of `transformers`, loaded the way that someone without Stretto would."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_bundle import make_bundle, stage_configs
from stock_stages import FRAMES, STAGES, build, ours, theirs
from transformers import AutoModelForCausalLM, dynamic_module_utils

from model import MusicPipeline, artifact
from model.bundle import QUANTIZERS
from model.config import ConditionConfig, SamplingConfig, TransformerConfig
from model.dropping import Dropped
from model.errors import UserError
from model.fields import ACOUSTIC, CONDITIONING, SEMANTIC
from model.stock import StageCodes, bundles, export, weights
from model.stock.export import export_stage, write_stage
from model.stock.importing import import_stage
from model.stock.layout import some_window

SAMPLING = SamplingConfig(temperature={"coarse": 0.5}, top_k={"coarse": 5}, top_p={"coarse": 0.9}, cfg={"coarse": 2.0})


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Two threads take longer over models so small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
    """Where transformers copies the code that comes with a checkpoint."""
    patch, folder = pytest.MonkeyPatch(), str(tmp_path_factory.mktemp("modules"))
    patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", folder)
    patch.setattr(sys, "path", list(sys.path))
    yield
    patch.undo()


@pytest.mark.parametrize("qk_norm", [True, False], ids=["qk_norm", "plain"])
@pytest.mark.parametrize("case", STAGES)
def test_a_checkpoint_computes_what_the_stage_does(case, qk_norm, tmp_path):
    stage, stock = build(case, qk_norm), STAGES[case][-1]
    kind = write_stage(stage, "coarse", tmp_path, SAMPLING)
    assert kind == (("Qwen3ForCausalLM" if qk_norm else "LlamaForCausalLM") if stock else "StrettoStage")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=not stock).eval()
    assert type(model).__name__ == kind

    window = some_window(stage, FRAMES, 2, torch.Generator().manual_seed(1))
    codes, some = stage.own_codes(window), torch.tensor([[False, False], [True, False]])[:, : len(stage.conditions)]
    with torch.no_grad():
        expected = stage.logits(window, Dropped(some))
        if stock:
            processor = StageCodes(model.config)
            logits = model(processor.prompt(window, codes, some)).logits[:, -codes[0].numel() - 1 : -1]
            first = stage.offsets[-1]
            found, expected = logits.unflatten(1, codes.shape[1:])[:, :, -1, first : first + 256], expected[:, :, -1]
        else:
            found = model(codes, window, some).logits
    assert expected.abs().max() > 1
    assert (found - expected).abs().max() < 1e-4

    made = ours(stage, window)
    assert made.unique().numel() > 3
    assert torch.equal(theirs(model, stage, window), made)
    guided = {"known": codes[:, :4], "cfg": 2.5 if stage.conditions else 1.0}
    assert torch.equal(theirs(model, stage, window, **guided), ours(stage, window, **guided))
    if stage.conditions:
        assert torch.equal(theirs(model, stage, window, dropped=some), ours(stage, window, dropped=some))


@pytest.mark.parametrize("case", ["flat-index-prefix", "delay-time-every"])
def test_a_checkpoint_draws_a_whole_window_as_the_bundle_says(case, tmp_path):
    stage = build(case, qk_norm=True)
    write_stage(stage, "coarse", tmp_path, SAMPLING)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=True)
    settings = model.generation_config
    assert (settings.do_sample, settings.temperature, settings.top_k, settings.top_p) == (True, 0.5, 5, 0.9)
    window = some_window(stage, 20, 2)
    if case.startswith("flat"):
        codes = StageCodes(model.config)
        made = [codes.decode(model.generate(codes.prompt(window), logits_processor=[codes])) for _ in range(2)]
    else:
        made = [model.generate(window) for _ in range(2)]
    assert made[0].shape == (2, 20, 2)
    assert 0 <= made[0].min() <= made[0].max() < 256
    assert not torch.equal(*made)


def test_a_checkpoint_that_recomputes_does_not_generate_without_its_cache(tmp_path):
    write_stage(build("delay-time-every", qk_norm=True), "coarse", tmp_path, SAMPLING)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True, trust_remote_code=True).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"call eval\(\) before generate"):
        model.generate({})


def test_codes_outside_their_codebook_are_no_prompt(tmp_path):
    stage = build("flat-index-prefix", qk_norm=True)
    write_stage(stage, "coarse", tmp_path, SAMPLING)
    codes = StageCodes(SimpleNamespace(**json.loads((tmp_path / "config.json").read_text())))
    with pytest.raises(ValueError, match="'semantic' must lie between 0 and 63"):
        codes.prompt({**some_window(stage, FRAMES), SEMANTIC: torch.full((1, 5, 1), 64)})


def configs():
    """A stage that is a Qwen3, one that needs code of its own, and one that is a Llama."""
    stages = stage_configs()
    described, plain = ConditionConfig(field=CONDITIONING), TransformerConfig(dim=32, layers=2, heads=2, qk_norm=False)
    stock = {"positions": "index", "conditions": [described]}
    delayed = {"pattern": "delay", "last": 2, "conditions": stages["coarse"].conditions}
    changes = {"semantic": stock, "coarse": delayed, "fine": {**stock, "first": 2, "transformer": plain}}
    return {name: stages[name].model_copy(update=changes[name]) for name in stages}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return make_bundle(tmp_path_factory.mktemp("bundles") / "bundle", stages=configs())


@pytest.fixture(scope="module")
def checkpoints(bundle, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    kinds = {name: export_stage(bundle, name, folder / name).architecture for name in configs()}
    assert kinds == {"semantic": "Qwen3ForCausalLM", "coarse": "StrettoStage", "fine": "LlamaForCausalLM"}
    return folder


@pytest.fixture
def checkpoint(checkpoints, tmp_path):
    """One that may be damaged."""
    return shutil.copytree(checkpoints / "semantic", tmp_path / "checkpoint")


def stage_of(bundle, name):
    return bundles.stage_of(artifact.read(bundle), name)


@pytest.mark.parametrize("name", ["semantic", "coarse", "fine"])
def test_what_comes_back_is_the_same_to_the_bit(name, bundle, checkpoints, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "SHARD_SIZE", "30KB")
    export_stage(bundle, name, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    for source in (tmp_path / "out", checkpoints / name):
        import_stage(source, bundle, name, tmp_path / source.name / "back")
        back = tmp_path / source.name / "back"
        before, after = artifact.read(bundle), artifact.read(back, "bundle")
        assert artifact.problems(after) == []
        assert before.manifest["files"].items() <= after.manifest["files"].items()
        assert f"stage `{name}` were imported" in (back / "README.md").read_text()
        assert before.info.items() <= after.info.items()
        assert after.fingerprint != before.fingerprint


@pytest.mark.parametrize("name", ["semantic", "coarse"])
def test_a_stage_that_transformers_trained_further_makes_music(name, bundle, checkpoints, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(checkpoints / name, local_files_only=True, trust_remote_code=True)
    window = some_window(stage_of(bundle, name), 10, 4, torch.Generator().manual_seed(2))
    if name == "semantic":
        ids = StageCodes(model.config).prompt(window, window[SEMANTIC])
        batch = {"input_ids": ids, "labels": ids}
    else:
        batch = {"codes": window[ACOUSTIC][..., :2], "conditions": window}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.5
    model.save_pretrained(tmp_path / "trained")

    import_stage(tmp_path / "trained", bundle, name, tmp_path / "bundle")
    trained = stage_of(tmp_path / "bundle", name)
    two = {field: codes[:2] for field, codes in window.items()}
    made = ours(trained, two, 10)
    assert not torch.equal(made, ours(stage_of(bundle, name), two, 10))
    assert torch.equal(made, theirs(model.eval(), trained, two, 10))
    music = MusicPipeline.load(tmp_path / "bundle").generate(["a slow flute"], seconds=1)
    assert music.waveform.shape == (1, 16_000)
    assert music.waveform.isfinite().all()


def test_weights_in_bf16_come_back_in_fp32(checkpoint, bundle, tmp_path):
    tensors = {name: value.bfloat16() for name, value in load_file(checkpoint / weights.SINGLE).items()}
    save_file(tensors, checkpoint / weights.SINGLE)
    import_stage(checkpoint, bundle, "semantic", tmp_path / "out")
    found = load_file(tmp_path / "out" / "semantic.safetensors")["embedding.weight"]
    assert found.dtype == torch.float32
    assert torch.equal(found, tensors["model.embed_tokens.weight"].float())


def test_what_version_5_of_transformers_says_of_positions_is_understood(checkpoint, bundle, tmp_path):
    config = json.loads((checkpoint / "config.json").read_text())
    del config["rope_scaling"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": config.pop("rope_theta")}
    (checkpoint / "config.json").write_text(json.dumps(config))
    import_stage(checkpoint, bundle, "semantic", tmp_path / "out")
    config["rope_parameters"]["rope_theta"] = 1e6
    (checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"rope_theta is 1000000\.0"):
        import_stage(checkpoint, bundle, "semantic", tmp_path / "other")


def edit_config(change):
    def apply(folder):
        config = json.loads((folder / "config.json").read_text())
        change(config)
        (folder / "config.json").write_text(json.dumps(config))

    return apply


def edit_tensors(change):
    def apply(folder):
        tensors = load_file(folder / weights.SINGLE)
        change(tensors)
        save_file(tensors, folder / weights.SINGLE)

    return apply


def pickled(folder):
    torch.save(load_file(folder / weights.SINGLE), folder / "pytorch_model.bin")
    (folder / weights.SINGLE).unlink()


def cut(folder):
    file = folder / weights.SINGLE
    file.write_bytes(file.read_bytes()[:-100])


def foreign_index(folder):
    (folder / weights.INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "../other.safetensors"}}))


REFUSED = {
    "pickle": (pickled, "pytorch_model.bin .* pickle"),
    "cut short": (cut, "damaged or cut short"),
    "no weights": (lambda folder: (folder / weights.SINGLE).unlink(), r"model\.safetensors is missing"),
    "no config": (lambda folder: (folder / "config.json").unlink(), r"no config\.json"),
    "damaged config": (lambda folder: (folder / "config.json").write_text("{"), "does not read as JSON"),
    "another's config": (edit_config(lambda config: config.pop("stretto")), "no block 'stretto'"),
    "version": (edit_config(lambda config: config["stretto"].update(format_version=9)), "format version 9"),
    "another stage": (
        edit_config(lambda config: config["stretto"].update(stage="fine")),
        "of stage 'fine', and --stage names 'semantic'",
    ),
    "id map": (
        edit_config(lambda config: config["stretto"]["predicts"].update(codebook_size=64)),
        r"stretto\.predicts\.codebook_size is 64 and that of the bundle's stage is 32",
    ),
    "architecture": (edit_config(lambda config: config.update(hidden_act="gelu")), "hidden_act is 'gelu'"),
    "index": (foreign_index, r"names \.\./other\.safetensors"),
    "missing tensor": (edit_tensors(lambda tensors: tensors.pop("lm_head.weight")), r"no lm_head\.weight"),
    "adapter": (edit_tensors(lambda tensors: tensors.update(lora_A=torch.zeros(1))), "holds lora_A"),
    "shape": (
        edit_tensors(lambda tensors: tensors.update({"model.norm.weight": torch.ones(31)})),
        r"norm\.weight has shape \[31\]; the bundle's stage has \[32\]",
    ),
    "not finite": (
        edit_tensors(lambda tensors: tensors["lm_head.weight"].fill_(float("nan"))),
        r"lm_head\.weight holds values that are no finite numbers",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_refused(case, checkpoint, bundle, tmp_path):
    damage, words = REFUSED[case]
    damage(checkpoint)
    with pytest.raises(UserError, match=words):
        import_stage(checkpoint, bundle, "semantic", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_stage_made_with_other_quantizers_is_refused(checkpoints, bundle, tmp_path):
    folder = shutil.copytree(checkpoints / "coarse", tmp_path / "checkpoint")
    edit_tensors(lambda tensors: tensors["conditions.0.centroids"].mul_(2))(folder)
    with pytest.raises(UserError, match="not those of the bundle's quantizers"):
        import_stage(folder, bundle, "coarse", tmp_path / "out")


def change_byte(folder):
    with (folder / "semantic.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        byte = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([byte[0] ^ 1]))


def newer(folder):
    manifest = json.loads((folder / artifact.MANIFEST).read_text())
    artifact.write_json(folder / artifact.MANIFEST, {**manifest, "format_version": 99})


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (change_byte, r"semantic\.safetensors has changed"),
        (lambda folder: (folder / QUANTIZERS).unlink(), r"quantizers\.safetensors is missing"),
        (lambda folder: (folder / artifact.MANIFEST).unlink(), "not a finished Stretto artifact"),
        (newer, "format version 99"),
    ],
)
def test_a_bundle_that_is_not_whole_is_refused(damage, words, bundle, checkpoints, tmp_path):
    damaged = shutil.copytree(bundle, tmp_path / "bundle")
    damage(damaged)
    with pytest.raises(UserError, match=words):
        export_stage(damaged, "coarse", tmp_path / "out")
    with pytest.raises(UserError, match=words):
        import_stage(checkpoints / "coarse", damaged, "coarse", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_stage_that_is_not_there_and_a_full_disk_are_named(bundle, checkpoints, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"no stage 'sematic'\. Did you mean semantic\?"):
        export_stage(bundle, "sematic", tmp_path / "out")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=1_000))
    with pytest.raises(UserError, match=r"GB are free at .*: make room"):
        export_stage(bundle, "semantic", tmp_path / "out")
    with pytest.raises(UserError, match=r"GB are free at .*: make room"):
        import_stage(checkpoints / "semantic", bundle, "semantic", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_with_other_logits_gets_no_name(bundle, tmp_path, monkeypatch):
    whole = weights.to_tensors
    monkeypatch.setattr(export, "to_tensors", lambda stage: {k: 1.01 * v for k, v in whole(stage).items()})
    with pytest.raises(RuntimeError, match="differ by"):
        export_stage(bundle, "semantic", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
