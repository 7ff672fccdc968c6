"""Weights in forms that Stretto's trainings do not write, most of them DeepSpeed's, here made by hand."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from model import artifact
from model.errors import UserError
from trainer import outputs, torch_files
from trainer.convert import convert
from trainer.saved_sources import open_saved
from trainer.weights_kinds import tagged

SHAPES = {"first": (2, 3), "second": (2, 3), "bias": (3,)}
OTHER_ORDER = ("second", "first", "bias")
ZERO_OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"


def parameters():
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def model_states(module, **named):
    return {
        "module": module,
        "buffer_names": [],
        "global_steps": 3,
        "dp_world_size": 1,
        "ds_config": {"zero_optimization": {"stage": 1}},
        "ds_version": "0.19.0",
        **named,
    }


def flat(tensors):
    return torch.cat([tensors[name].view(-1) for name in tensors])


def write_zero1(folder, frozen=(), groups=None, **named):
    """A checkpoint of ZeRO-1 on one rank, `frozen` being in the module alone; returns its fp32 weights."""
    from deepspeed.utils.tensor_fragment import fragment_address

    trained, mapping, start = parameters(), {}, 0
    for name, value in trained.items():
        mapping[name] = fragment_address(value.numel(), start)
        start += value.numel()
    state = {"exp_avg": flat(trained) + 1, "exp_avg_sq": flat(trained) + 2, "step": torch.tensor(3.0)}
    optimizer = {
        "zero_stage": 1,
        "partition_count": [1],
        "single_partition_of_fp32_groups": [flat(trained)],
        "param_slice_mappings": [mapping],
        "base_optimizer_state": {"state": {0: state}, "param_groups": groups or [{"lr": 0.1, "params": [0]}]},
    }
    folder.mkdir()
    torch.save({"optimizer_state_dict": optimizer}, folder / ZERO_OPTIMIZER)
    module = {name: value.bfloat16() for name, value in trained.items()} | dict(frozen)
    shapes = [{name: torch.Size(shape) for name, shape in SHAPES.items()}]
    first = model_states(module, param_shapes=shapes, shared_params={}, frozen_param_shapes=None)
    torch.save({**first, **named}, folder / "mp_rank_00_model_states.pt")
    return trained


def write_plain(folder, order=tuple(SHAPES), precision=torch.bfloat16, flattened=True, shapes=None, names=None):
    """A checkpoint without ZeRO, of an optimizer that has the parameters in `order`; returns its fp32 weights."""
    trained = parameters() if shapes is None else {name: torch.randn(shape) for name, shape in shapes.items()}
    ordered = {name: trained[name] for name in order}
    kept = [flat(ordered)] if flattened else list(ordered.values())
    state = {
        number: {"exp_avg": value + 1, "exp_avg_sq": value + 2, "step": torch.tensor(3.0)}
        for number, value in enumerate(kept)
    }
    inner = {"state": state, "param_groups": [{"lr": 0.1, "params": list(state)}]}
    if names:
        inner["param_groups"][0]["param_names"] = names
    optimizer = inner
    if flattened:
        optimizer = {"optimizer_state_dict": inner, "fp32_groups_flat": kept}
    elif precision != torch.float32:
        optimizer = {"optimizer_state_dict": inner, "fp32_groups": [kept]}
    folder.mkdir()
    module = {name: value.to(precision) for name, value in trained.items()}
    torch.save(model_states(module, optimizer=optimizer), folder / "mp_rank_00_model_states.pt")
    return trained


def converted(source, out):
    convert(source, out, "fp32")
    return load_file(out / "model.safetensors")


def same(found, expected):
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


# Frozen weights


def test_frozen_weights_of_zero_1_are_kept(tmp_path):
    """DeepSpeed notes them from ZeRO-2 on."""
    frozen = torch.randn(4).bfloat16()
    trained = write_zero1(tmp_path / "in", {"frozen": frozen, "tied": frozen}.items(), shared_params={"tied": "frozen"})
    expected = {**trained, "frozen": frozen.float(), "tied": frozen.float()}
    assert same(converted(tmp_path / "in", tmp_path / "out"), expected)
    convert(tmp_path / "in", tmp_path / "universal", "universal")
    found = torch.load(tagged(tmp_path / "universal") / "zero" / "frozen" / "fp32.pt", weights_only=True)
    assert torch.equal(found["param"], frozen.float())


def test_tied_weights_that_are_frozen_and_left_out_on_saving_are_left_out(tmp_path):
    """As `exclude_frozen_parameters` does."""
    expected = write_zero1(tmp_path / "in", shared_params={"tied": "frozen", "tied bias": "bias"})
    assert same(converted(tmp_path / "in", tmp_path / "out"), {**expected, "tied bias": expected["bias"]})


# Without ZeRO


def test_frozen_weights_without_zero_are_kept(tmp_path):
    """The optimizer has fp32 weights of the others alone."""
    expected = write_plain(tmp_path / "in", ("bias",), names=["bias"])
    rounded = {name: value.bfloat16().float() for name, value in expected.items()}
    assert same(converted(tmp_path / "in", tmp_path / "out"), {**rounded, "bias": expected["bias"]})
    write_plain(tmp_path / "numbered", ("bias",))
    with pytest.raises(UserError, match="which parameter is which cannot be told"):
        convert(tmp_path / "numbered", tmp_path / "none", "fp32")


@pytest.mark.parametrize("flattened", [True, False])
def test_an_optimizer_in_another_order_than_the_model_is_refused(tmp_path, flattened):
    """Layers of the same size would be swapped."""
    expected = write_plain(tmp_path / "same", flattened=flattened)
    assert same(converted(tmp_path / "same", tmp_path / "out"), expected)
    convert(tmp_path / "same", tmp_path / "universal", "universal")
    write_plain(tmp_path / "other", OTHER_ORDER, flattened=flattened)
    for to in ("fp32", "universal"):
        with pytest.raises(UserError, match=r"in another order than the model: .* 'first' are others"):
            convert(tmp_path / "other", tmp_path / "none", to)


def test_moments_without_fp32_weights_are_refused_where_parameters_could_be_swapped(tmp_path):
    named = {"precision": torch.float32, "flattened": False}
    expected = write_plain(tmp_path / "alike", **named)
    assert same(converted(tmp_path / "alike", tmp_path / "out"), expected)
    with pytest.raises(UserError, match="which parameter is which cannot be told"):
        convert(tmp_path / "alike", tmp_path / "none", "universal")
    shapes = {"a": (2, 3), "b": (3, 2), "c": (3,)}
    write_plain(tmp_path / "distinct", tuple(shapes), shapes=shapes, **named)
    convert(tmp_path / "distinct", tmp_path / "universal", "universal")
    write_plain(tmp_path / "other", ("b", "a", "c"), shapes=shapes, **named)
    with pytest.raises(UserError, match="in an order that is not its weights'"):
        convert(tmp_path / "other", tmp_path / "none", "universal")


# What is written


def test_settings_and_schedules_that_hold_tensors_become_plain_numbers(tmp_path):
    schedule = {"last_lr": [torch.tensor(0.5)], "table": torch.ones(3), "last_epoch": 3}
    groups = [{"lr": torch.tensor(0.25), "betas": (0.9, 0.5), "mask": torch.ones(2), "params": [0]}]
    write_zero1(tmp_path / "in", groups=groups, lr_scheduler=schedule)
    convert(tmp_path / "in", tmp_path / "out", "universal")
    convert(tmp_path / "out", tmp_path / "again", "universal")
    for folder in (tagged(tmp_path / "out"), tagged(tmp_path / "again")):
        first = torch.load(folder / "mp_rank_00_model_states.pt", weights_only=True)
        assert first["lr_scheduler"] == {"last_lr": [0.5], "last_epoch": 3}
        optimizer = torch.load(folder / "zero" / "optimizer_state.pt", weights_only=True)
        assert optimizer["param_groups"][0] == {"lr": 0.25, "betas": [0.9, 0.5], "params": []}


@pytest.mark.parametrize("settings", ["ds_config.json", {"train_batch_size": 1}])
def test_the_stage_is_told_without_the_settings(tmp_path, settings):
    expected = write_zero1(tmp_path / "in", ds_config=settings)
    assert same(converted(tmp_path / "in", tmp_path / "out"), expected)


def test_buffers_are_counted_and_not_read_before_there_is_room(tmp_path, monkeypatch):
    buffer = torch.arange(6.0)
    write_zero1(tmp_path / "in", {"buffer": buffer}.items(), buffer_names=["buffer"])
    asked = []

    def none_free(path, needed):
        asked.append(needed)
        raise UserError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(artifact, "require_room", none_free)
        patch.setattr("trainer.deepspeed_universal._model_states", lambda state: pytest.fail("read too early"))
        with pytest.raises(UserError, match="no room"):
            convert(tmp_path / "in", tmp_path / "out", "universal")
    files = 3 * len(SHAPES) + len(SHAPES) + 4  # three tensors and a step of each parameter, and four more
    tensors = 4 * 3 * sum(value.numel() for value in parameters().values()) + 2 * buffer.nbytes
    spare = files * outputs.SPARE_BYTES_A_FILE + outputs.SPARE_BYTES
    assert asked[0] == tensors + spare + len("global_step3")
    convert(tmp_path / "in", tmp_path / "out", "universal")
    first = torch.load(tagged(tmp_path / "out") / "mp_rank_00_model_states.pt", weights_only=True)
    assert torch.equal(first["module"]["buffer"], buffer)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.uint16])
def test_a_buffer_of_a_type_that_is_not_written_is_named(tmp_path, dtype):
    buffer = torch.ones(2).to(dtype)
    write_zero1(tmp_path / "in", {"buffer": buffer}.items(), buffer_names=["buffer"])
    with pytest.raises(UserError, match=f"holds 'buffer' as {dtype}"):
        convert(tmp_path / "in", tmp_path / "out", "fp32")


def test_weights_of_a_type_that_is_not_read_are_named(tmp_path):
    save_file({"small": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match="holds 'small' as F8_E4M3"):
        convert(tmp_path / "model.safetensors", tmp_path / "out", "fp32")
    write_zero1(tmp_path / "in", {"turned": torch.ones(2, dtype=torch.complex64)}.items())
    with pytest.raises(UserError, match=r"holds 'turned' as torch\.complex64"):
        convert(tmp_path / "in", tmp_path / "out", "fp32")


def test_torchs_error_of_a_full_disk_is_told_as_one(tmp_path, monkeypatch):
    path = tmp_path / "value.pt"
    path.symlink_to("/dev/full")
    with pytest.raises(RuntimeError):
        torch_files.write_torch(path, {"param": torch.ones(100_000)})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="No space left") as caught:
        torch_files.write_torch(path, {"param": torch.ones(100_000)})
    assert caught.value.errno == errno.ENOSPC


# Interruptions


@pytest.fixture
def begun(tmp_path):
    """An artifact of which one file of three is finished and noted, and one half there."""
    files = [outputs.text_output(name, "text") for name in ("a", "b", "c")]
    with contextlib.suppress(KeyboardInterrupt), artifact.resume(tmp_path / "out", "test", "same") as (folder, _, _):
        outputs.make(folder, files[0])
        (folder / "b").write_text("half")
        raise KeyboardInterrupt
    return tmp_path / "out", files


@pytest.mark.parametrize("torn", ['{"name": "b", "fi', '{"name": "b", "fi\n', "\0\0\0\n", "\udcff", "3\n"])
def test_a_line_of_the_journal_that_was_cut_short_harms_no_other(begun, torn):
    path, files = begun
    folder = artifact.unfinished(path)
    journal = folder / artifact.WORK / outputs.JOURNAL
    journal.write_bytes(journal.read_bytes() + torn.encode(errors="surrogateescape"))
    outputs.make(folder, files[1])
    outputs.make(folder, files[2])
    assert outputs.journal(folder).keys() == {"a", "b", "c"}
    assert outputs.left_to_make(path, "same", files) == []


def test_a_file_that_is_half_there_takes_no_room_from_its_remake(begun, monkeypatch):
    path, files = begun
    half = artifact.unfinished(path) / "b"
    half.write_bytes(os.urandom(1 << 20))
    artifact.sync(half)
    left = outputs.left_to_make(path, "same", files)
    assert left == files[1:]
    asked = []
    monkeypatch.setattr(artifact, "require_room", lambda path, needed: asked.append(needed))
    outputs.require_room(path, left)
    outputs.require_room(path.with_name("other"), left)
    assert asked[1] - asked[0] == half.stat().st_blocks * 512 >= 1 << 20
    assert half.exists()


def test_a_damaged_file_ends_the_check_of_the_rest(tmp_path, monkeypatch):
    """No more are read than those that were begun meanwhile."""
    write_zero1(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "fp32", "fp32", largest_file=1)
    state, read = open_saved(tmp_path / "fp32"), []

    def problems(found, share):
        read.append(share)
        time.sleep(0.2 if len(read) > 1 else 0)
        return ["a file"] if len(read) == 1 else []

    monkeypatch.setattr(artifact, "problems", problems)
    monkeypatch.setattr(torch_files, "CHECKERS", 1)
    with pytest.raises(UserError, match="is damaged"):
        state.check(["weights"], lambda count: None)
    assert len(read) <= 2 < len(SHAPES) + 1


def test_a_damaged_record_ends_the_check_of_the_rest(tmp_path, monkeypatch):
    """Also of those that are being read."""
    buffers = {str(number): torch.ones(50) for number in range(4)}
    write_zero1(tmp_path / "in", buffers.items(), buffer_names=list(buffers))
    state, blocks = open_saved(tmp_path / "in"), []

    def check(path, record, report):
        if "optim_states" in path.name:
            raise UserError(f"{path} is damaged")
        for _ in range(100):
            time.sleep(0.01)
            report(1)

    monkeypatch.setattr(torch_files, "check", check)
    with pytest.raises(UserError, match="is damaged"):
        state.check(["weights"], blocks.append)
    assert len(blocks) < 100


def test_weights_of_8_bits_are_refused(tmp_path):
    save_file({"transformer.q.weight": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "coarse.safetensors")
    with pytest.raises(UserError, match="export the bundle without --int8"):
        convert(tmp_path / "coarse.safetensors", tmp_path / "out", "fp32")
