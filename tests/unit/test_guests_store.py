"""Images are kept so that nobody ever sees half of one."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path

import pytest

from labkit.guests.image import Image
from labkit.guests.store import Store, fingerprint


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    return Store("tiny")


def _build(directory: Path) -> Image:
    (directory / "kernel").write_bytes(b"kernel" * 1000)
    return Image(name="tiny", version="1", arch="x86_64", kernel=directory / "kernel", memory=1, disk_size=0)


def _publish(store: Store, recipe: str = "r1") -> Image:
    with store.locked():
        return store.publish(recipe, {"package": "1.0"}, _build)


def _pointer(store: Store) -> Path:
    (pointer,) = store.directory.glob("current-*.json")
    return pointer


def test_nothing_is_current_at_first(store: Store) -> None:
    assert store.current("r1") is None
    assert store.size("r1") == 0


def test_what_was_published_is_current(store: Store) -> None:
    image = _publish(store)

    record = store.current("r1")
    assert record is not None
    assert record.image == image
    assert record.inputs == {"package": "1.0"}
    assert image.kernel is not None
    assert image.kernel.read_bytes() == b"kernel" * 1000
    assert store.size("r1") >= 6000


def test_a_build_that_fails_leaves_the_old_one_and_nothing_else(store: Store) -> None:
    image = _publish(store)
    before = sorted(store.directory.iterdir())

    def fail(directory: Path) -> Image:
        (directory / "half").write_bytes(b"half")
        raise RuntimeError("in the middle")

    with store.locked(), pytest.raises(RuntimeError, match="in the middle"):
        store.publish("r2", {}, fail)

    assert sorted(store.directory.iterdir()) == before
    record = store.current("r1")
    assert record is not None
    assert record.image == image


def test_what_a_killed_builder_left_goes_with_the_next_lock(store: Store) -> None:
    store.directory.mkdir(parents=True)
    left = store.directory / ".building-of-a-dead-process"
    left.mkdir()
    (left / "kernel").write_bytes(b"half")

    with store.locked():
        pass

    assert not left.exists()


def test_an_image_whose_file_is_gone_is_not_current(store: Store) -> None:
    image = _publish(store)
    assert image.kernel is not None
    image.kernel.unlink()

    assert store.current("r1") is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 99}', '{"format": 1, "image": {}}'])
def test_a_damaged_pointer_is_no_image(store: Store, text: str) -> None:
    _publish(store)
    _pointer(store).write_text(text)

    assert store.current("r1") is None


def test_two_recipes_stand_side_by_side(store: Store) -> None:
    old, new = _publish(store), _publish(store, recipe="r2")

    old_record = store.current("r1")
    assert old_record is not None
    assert old_record.image == old

    assert old.kernel is not None
    assert new.kernel is not None
    assert old.kernel != new.kernel
    assert old.kernel.exists()


def test_building_the_same_again_after_the_pointer_is_lost_does_not_touch_the_first(store: Store) -> None:
    old = _publish(store)
    _pointer(store).unlink()

    new = _publish(store)

    assert old.kernel is not None
    assert old.kernel.exists()
    assert new.kernel != old.kernel


def test_the_pointer_holds_when_the_cache_is_moved(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _publish(store)
    text = json.loads(_pointer(store).read_text())

    assert not Path(text["image"]["kernel"]).is_absolute()


def test_pruning_leaves_what_is_current_or_in_use(store: Store) -> None:
    used, unused, current = _publish(store), _publish(store, "r2"), _publish(store, "r3")
    assert used.kernel is not None

    with store.locked():
        freed = store.prune("r3", [used.kernel])

    assert freed >= 6000
    assert used.kernel.exists()
    assert unused.kernel is not None
    assert not unused.kernel.parent.exists()
    record = store.current("r3")
    assert record is not None
    assert record.image == current


def test_only_one_may_build_at_a_time(store: Store) -> None:
    with store.locked(), (store.directory / ".lock").open("w") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_the_fingerprint_changes_with_a_source(tmp_path: Path) -> None:
    source = tmp_path / "agent.c"
    source.write_text("int main(void) { return 0; }")
    before = fingerprint([source], "more")
    source.write_text("int main(void) { return 1; }")

    assert fingerprint([source], "more") != before
    assert fingerprint([source], "less") != fingerprint([source], "more")
