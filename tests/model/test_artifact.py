import json

import pytest

from model import artifact
from model.errors import UserError


def build(path, fingerprint="f" * 16):
    with artifact.create(path, "corpus", fingerprint, inputs={"a": "1"}) as (folder, info):
        (folder / "sub").mkdir()
        (folder / "sub" / "x.bin").write_bytes(b"12345")
        info["clips"] = 3


def test_an_artifact_says_what_it_is(tmp_path):
    build(tmp_path / "corpus")
    found = artifact.read(tmp_path / "corpus", "corpus")
    assert (found.kind, found.fingerprint, found.info) == ("corpus", "f" * 16, {"clips": 3})
    assert found.manifest["inputs"] == {"a": "1"}
    assert list(found.manifest["files"]) == ["sub/x.bin"]
    assert artifact.problems(found) == []


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path):
    build(tmp_path / "corpus")

    def fail() -> None:
        with artifact.create(tmp_path / "corpus", "corpus", "2") as (folder, _):
            (folder / "half").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert artifact.read(tmp_path / "corpus").fingerprint == "f" * 16
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_new_one_replaces_the_old(tmp_path):
    build(tmp_path / "corpus")
    build(tmp_path / "corpus", "2" * 16)
    assert artifact.read(tmp_path / "corpus").fingerprint == "2" * 16
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.unlink(), "missing"),
        (lambda file: file.write_bytes(b"1234"), "4 bytes, 5 expected"),
        (lambda file: file.write_bytes(b"54321"), "digest"),
    ],
)
def test_damage_is_found(tmp_path, damage, message):
    build(tmp_path / "corpus")
    damage(tmp_path / "corpus" / "sub" / "x.bin")
    (problem,) = artifact.problems(artifact.read(tmp_path / "corpus"))
    assert message in problem


def test_reading_what_is_not_there(tmp_path):
    with pytest.raises(UserError, match="not a finished"):
        artifact.read(tmp_path)
    build(tmp_path / "corpus")
    with pytest.raises(UserError, match="'corpus', not 'bundle'"):
        artifact.read(tmp_path / "corpus", "bundle")
    manifest = tmp_path / "corpus" / artifact.MANIFEST
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "format_version": 99}))
    with pytest.raises(artifact.NewerFormat, match="format version 99"):
        artifact.read(tmp_path / "corpus")
    outside = [b'{"format_version": 1, "kind": "corpus", "files": {"%s": {}}}' % name for name in (b"../x", b"/x")]
    for damage in (b"{", b"[]", b"\xff", b'{"format_version": "1", "kind": "corpus"}', *outside):
        manifest.write_bytes(damage)
        with pytest.raises(UserError, match="damaged"):
            artifact.read(tmp_path / "corpus")


def test_a_fingerprint_is_of_the_values_not_of_their_order():
    assert artifact.fingerprint({"a": 1, "b": 2}) == artifact.fingerprint({"b": 2, "a": 1})
    assert artifact.fingerprint({"a": 1}) != artifact.fingerprint({"a": 2})
