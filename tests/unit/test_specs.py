"""Specs: what makes no sense is an error with one sentence and what to do, before anything is made."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit import DiskSpec, Lab, VMSpec, state
from labkit.errors import LabkitError, NotFound, SpecError
from labkit.specs import GiB, MiB, check_name, format_size, parse_size

BAD_NAMES = [
    "../x", "..", ".", "/", "a/b", "<name>", "a&b", "a b", " a", "a\n", "\n", "a\0b", "", "-", "-a", "a-",
    "a_b", "a.b", "é", "名前", "ａ", "١", "a" * 41, "a" * 300, None, 5, b"web", ["web"], {}, True,
]  # fmt: skip
BAD_SIZES = [
    "256 bananas", "bananas", "", " ", "MiB", "-1", "-1 GiB", "1e9", "0x10", "1 GiB 2", "nan", "inf",
    "٣ GiB", "1,5 GiB", "9" * 400, 10**400, -(10**400), True, False, 1.5, math.nan, math.inf, [], {}, (),
]  # fmt: skip
BAD_CPUS = [0, -1, True, False, 1.5, math.nan, math.inf, "two", "2", None, [], 65, 10**400]


def sensible(error: LabkitError) -> None:
    """One sentence, and what to do."""
    assert "\n" not in error.message
    assert error.message.endswith(".")
    assert 10 < len(error.message) < 200
    assert error.mend
    assert "pydantic" not in str(error).lower()


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_a_bad_name_is_a_spec_error(name: Any) -> None:
    with pytest.raises(SpecError) as caught:
        check_name(name)
    sensible(caught.value)


@pytest.mark.parametrize("name", ["a", "A1", "web-1", "0", "x" * 40])
def test_a_good_name_is_taken_as_it_is(name: str) -> None:
    assert check_name(name) == name


@given(st.text(max_size=60))
def test_whatever_passes_as_a_name_is_a_plain_file_name(name: str) -> None:
    try:
        check_name(name)
    except SpecError as exc:
        sensible(exc)
    else:
        assert name.isascii()
        assert Path(name).name == name
        assert len(name) <= 40


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (5, 5),
        ("5", 5),
        ("256 MiB", 256 * MiB),
        ("256MB", 256 * MiB),
        ("1.5G", GiB * 3 // 2),
        (" 1 gib ", GiB),
        ("0 B", 0),
    ],
)
def test_sizes_are_read_in_binary_units(text: str | int, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("size", BAD_SIZES, ids=lambda size: repr(size)[:20] if abs_small(size) else "huge")
def test_a_bad_size_is_a_spec_error(size: Any) -> None:
    with pytest.raises(SpecError) as caught:
        parse_size(size)
    sensible(caught.value)


def abs_small(value: Any) -> bool:
    return not isinstance(value, int) or abs(value) < 1 << 64


@given(st.integers(min_value=0, max_value=1 << 44))
def test_a_size_in_bytes_comes_back_from_its_text(size: int) -> None:
    assert parse_size(str(size)) == size
    assert parse_size(format_size(size)) == pytest.approx(size, rel=1e-3)


@pytest.mark.parametrize("memory", [0, -5, "63 MiB", "10 TiB", *BAD_SIZES], ids=lambda _: "")
def test_bad_memory_is_a_spec_error(memory: Any) -> None:
    with pytest.raises(SpecError) as caught:
        VMSpec(name="web", memory=memory)
    sensible(caught.value)


@pytest.mark.parametrize("cpus", BAD_CPUS, ids=lambda _: "")
def test_bad_cpus_are_a_spec_error(cpus: Any) -> None:
    with pytest.raises(SpecError) as caught:
        VMSpec(name="web", cpus=cpus)
    sensible(caught.value)


@pytest.mark.parametrize("size", [0, "0 bytes", "1 KiB", "17 TiB", None, -1], ids=lambda _: "")
def test_a_bad_disk_is_a_spec_error(size: Any) -> None:
    with pytest.raises(SpecError) as caught:
        DiskSpec(size=size)
    sensible(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"name": "web", "networks": "lan"},
        {"name": "web", "networks": 5},
        {"name": "web", "networks": [None]},
        {"name": "web", "networks": ["lan"] * 9},
        {"name": "web", "disks": "1 GiB"},
        {"name": "web", "disks": [5]},
        {"name": "web", "disks": [DiskSpec(size=GiB)] * 17},
        {"name": "web", "boot": "floppy"},
        {"name": "web", "firmware": "efi"},
        {"name": "web", "machine": "virtualbox"},
        {"name": "web", "accelerator": "hvf"},
        {"name": "web", "cpu": "host<x>"},
        {"name": "web", "cpu": 5},
        {"name": "web", "image": 5},
        {"name": "web", "image": None},
        {"name": "web", "memroy": GiB},
        {"memory": GiB},
        {"name": "web", "memory": GiB, "max_memory": 512 * MiB},
        {"name": "web", "cpus": 3, "max_cpus": 2},
    ],
    ids=",".join,
)
def test_what_cannot_be_is_a_spec_error(fields: dict[str, Any]) -> None:
    with pytest.raises(SpecError) as caught:
        VMSpec(**fields)
    sensible(caught.value)


def test_a_misspelt_field_gets_a_suggestion() -> None:
    with pytest.raises(SpecError, match="Did you mean memory"):
        VMSpec(name="web", memroy=GiB)


def test_specs_are_plain_values() -> None:
    spec = VMSpec(name="web", memory="256 MiB", disks=[DiskSpec(size="1 GiB")])
    assert spec == VMSpec(**spec.model_dump())
    assert spec == VMSpec(**spec.model_dump(mode="json"))
    assert spec.describe() == "web: pocket, 1 CPU, 256 MiB, disks 1 GiB"
    with pytest.raises(Exception, match="frozen"):
        spec.memory = 5  # type: ignore[misc]


def test_differences_name_what_differs() -> None:
    mine, theirs = VMSpec(name="web", cpus=2), VMSpec(name="web", cpus=1, image="debian")
    assert mine.differences(theirs) == {"cpus": (2, 1), "image": ("pocket", "debian")}


# Through the public face: nothing may have been made.


@pytest.fixture
def lab(labkit_home: Path) -> Lab:
    return Lab("spec", keep=True)  # no reaper: it belongs to nobody


def files(home: Path) -> set[str]:
    return {str(path.relative_to(home)) for path in home.rglob("*")}


@pytest.mark.parametrize(
    "ask",
    [
        *(lambda lab, name=name: lab.vm(name) for name in BAD_NAMES),
        *(lambda lab, size=size: lab.vm("web", memory=size) for size in [0, "10 TiB", *BAD_SIZES]),
        *(lambda lab, size=size: lab.vm("web", max_memory=size) for size in [0, "10 TiB", *BAD_SIZES]),
        *(lambda lab, size=size: lab.vm("web", disk=size) for size in [0, "17 TiB", *BAD_SIZES]),
        *(lambda lab, cpus=cpus: lab.vm("web", cpus=cpus) for cpus in BAD_CPUS),
        lambda lab: lab.vm("web", memory="3 TiB"),
        lambda lab: lab.vm("web", max_memory="3 TiB"),
        lambda lab: lab.vm("web", networks="lan"),
        lambda lab: lab.vm("web", networks=5),
        lambda lab: lab.vm("web", networks=["../lan"]),
        lambda lab: lab.vm("web", disks="1 GiB"),
        lambda lab: lab.vm("web", disks=DiskSpec(size=GiB)),
        lambda lab: lab.vm("web", image=5),
        lambda lab: lab.vm("web", image=[]),
        lambda lab: lab.vm("web", image=None),
        lambda lab: lab.vm("web", boot="floppy"),
        lambda lab: lab.vm("web", cpu="<x>"),
    ],
)
def test_a_senseless_machine_leaves_nothing_behind(
    lab: Lab, labkit_home: Path, ask: Callable[[Lab], Any]
) -> None:
    before = files(labkit_home)
    with pytest.raises(SpecError) as caught:
        ask(lab)
    sensible(caught.value)
    assert state.lab("spec").entries() == []
    assert files(labkit_home) == before


def test_an_unknown_image_is_not_found_and_a_close_one_suggested(lab: Lab, labkit_home: Path) -> None:
    before = files(labkit_home)
    with pytest.raises(NotFound, match="Did you mean 'pocket'"):
        lab.vm("web", image="pokcet")
    assert files(labkit_home) == before


def test_a_missing_network_is_not_found_and_those_there_are_named(lab: Lab, labkit_home: Path) -> None:
    before = files(labkit_home)
    with pytest.raises(NotFound, match="no network named lan") as caught:
        lab.vm("web", networks=["lan"])
    assert "networks: none" in str(caught.value)
    assert files(labkit_home) == before


@pytest.mark.parametrize("name", BAD_NAMES, ids=lambda name: repr(name)[:20])
def test_a_lab_of_a_bad_name_leaves_nothing_behind(labkit_home: Path, name: Any) -> None:
    with pytest.raises(SpecError) as caught:
        Lab(name)
    sensible(caught.value)
    assert files(labkit_home) == set()
