"""The configuration as JSON."""

from __future__ import annotations

import dataclasses
import json

import pytest

from skipat_surgery import PhiConfig, SkipatConfig


def test_round_trip_through_json():
    config = SkipatConfig(
        {5: PhiConfig(expansion=0.25), 2: PhiConfig.paper(), 3: PhiConfig(), 6: PhiConfig(kernel_size=(1, 3, 5))}
    )
    assert SkipatConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.skip == (2, 3, 5, 6)
    assert config.runs == ((2, 3), (5, 6))
    assert config.to_dict()["phi"]["6"]["kernel_size"] == [1, 3, 5]


def test_configs_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PhiConfig().expansion = 1.0


def test_the_papers_phi():
    assert PhiConfig.paper() == PhiConfig(
        expansion=2, kernel_size=5, channel_attention=True, prefix="pass", pool=0, reads_x=False
    )


def test_what_an_older_file_does_not_say_is_what_there_was():
    data = {
        "version": 1,
        "phi": {"2": {"expansion": 0.5, "kernel_size": 3, "channel_attention": False, "prefix": "mix"}},
    }
    assert SkipatConfig.from_dict(data).phi[2] == PhiConfig(expansion=0.5, prefix="mix", pool=0, reads_x=False)


def test_the_version_is_the_oldest_that_can_read_it():
    config = SkipatConfig({2: PhiConfig()})
    assert config.to_dict()["version"] == 2
    narrow = SkipatConfig({2: PhiConfig()}, mlp_widths={4: 24, 0: 64})
    assert narrow.to_dict()["version"] == 3
    assert narrow.to_dict()["mlp_widths"] == {"0": 64, "4": 24}
    assert SkipatConfig.from_dict(narrow.to_dict()) == narrow


def test_a_newer_version_is_refused():
    data = {**SkipatConfig({2: PhiConfig()}).to_dict(), "version": 4}
    with pytest.raises(ValueError, match=r"is of version 4, this library reads up to 3: upgrade skipat-surgery"):
        SkipatConfig.from_dict(data)


def test_unknown_entries_are_refused():
    data = SkipatConfig({2: PhiConfig()}).to_dict()
    data["phi"]["2"]["dilation"] = 2
    with pytest.raises(ValueError, match=r"unknown entries in the skipat configuration: \['phi.2.dilation'\]"):
        SkipatConfig.from_dict(data)
    with pytest.raises(ValueError, match="not a skipat configuration: version is None"):
        SkipatConfig.from_dict({})
