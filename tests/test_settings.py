"""Settings: defaults, strictness, both file formats, command-line values, and the way back to TOML."""

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from zemosaic.settings import (
    KNOWN_UNUSED,
    Settings,
    SettingsError,
    describe_settings,
    dump_settings,
    load_settings,
    parse_overrides,
    settings_from,
)

CHANGED = {
    "output_name": 'Cygnus "loop" \\ #1 é',
    "sds_mode_default": True,
    "memory_gb": 3.5,
    "two_pass_cov_gain_clip": (0.9, 1.1),
    "global_coadd_method": "winsorized",
    "num_processing_workers": 3,
}


def with_overrides(*items: str) -> Settings:
    return load_settings(None, parse_overrides(items))[0]


def test_defaults_keep_the_names_and_values_of_existing_configurations():
    settings, warnings = load_settings()
    assert warnings == []
    assert settings == Settings()
    assert (settings.sds_coverage_threshold, settings.sds_min_batch_size, settings.sds_target_batch_size) == (
        0.92,
        5,
        10,
    )
    assert (settings.global_coadd_method, settings.global_coadd_k) == ("kappa_sigma", 3.0)
    assert settings.two_pass_cov_gain_clip == (0.85, 1.18)
    assert settings.memory_gb is None


def test_defaults_are_valid_and_settings_are_frozen():
    assert Settings(**Settings().model_dump()) == Settings()
    with pytest.raises(ValidationError):
        Settings().global_coadd_k = 4.0


def test_no_name_is_both_used_and_unused():
    assert not KNOWN_UNUSED & Settings.model_fields.keys()


@pytest.mark.parametrize("values", [{}, CHANGED])
def test_dump_loads_back_equal(tmp_path: Path, values: dict):
    settings = Settings(**values)
    dump_settings(settings, tmp_path / "effective.toml")
    assert load_settings(tmp_path / "effective.toml") == (settings, [])


def test_json_of_an_existing_installation(tmp_path: Path):
    path = tmp_path / "zemosaic_config.json"
    values = {
        "sds_target_batch_size": 12,
        "two_pass_cov_gain_clip": [0.9, 1.2],
        "global_wcs_res_override": None,
        "altaz_min_coverage_abs": 2,
        "astap_default_sensitivity": 100,
        "language": "de",
    }
    path.write_text(json.dumps(values), encoding="utf-8-sig")  # a Windows editor adds a byte order mark
    settings, warnings = load_settings(path)
    assert settings.sds_target_batch_size == 12
    assert settings.two_pass_cov_gain_clip == (0.9, 1.2)
    assert settings.language == "en"
    assert len(warnings) == 2
    assert "'de'" in warnings[0]


def test_known_names_without_a_use_give_one_warning_that_lists_them():
    _, warnings = settings_from({"wsc_impl": "pixinsight", "cache_retention": "keep"})
    assert len(warnings) == 1
    assert "cache_retention, wsc_impl" in warnings[0]


def test_unknown_name_is_an_error_that_names_the_nearest():
    with pytest.raises(SettingsError, match=r"'sds_mode_defualt'.*'sds_mode_default'"):
        settings_from({"sds_mode_defualt": True})
    with pytest.raises(SettingsError, match=r"'astap_max_instance'.*'astap_max_instances'"):
        settings_from({"astap_max_instance": 1})


def test_overrides_win_over_the_file(tmp_path: Path):
    path = tmp_path / "settings.toml"
    path.write_text("global_coadd_k = 2.5\nmemory_gb = 4\nsds_mode_default = true\n")
    settings, _ = load_settings(path, {"global_coadd_k": "3", "memory_gb": "none"})
    assert (settings.global_coadd_k, settings.memory_gb, settings.sds_mode_default) == (3.0, None, True)


@pytest.mark.parametrize(
    ("item", "value"),
    [
        ("output_name=M 31", "M 31"),
        ("output_name=31", "31"),
        ("output_name='31'", "31"),
        ("output_name=2024-05-01", "2024-05-01"),
        ("output_name=a=b", "a=b"),
        ("output_name=", ""),
        ("sds_mode_default=true", True),
        ("sds_mode_default=True", True),
        ("sds_gain_scope=tile", "tile"),
        ('sds_gain_scope="tile"', "tile"),
        ("stacking_rejection_algorithm=none", "none"),
        ("global_wcs_res_override=2.4", 2.4),
        ("global_wcs_res_override=", None),
        ("two_pass_cov_gain_clip=[0.9, 1.1]", (0.9, 1.1)),
        (" quality_crop_band_px = 16 ", 16),
    ],
)
def test_command_line_values_are_read_by_the_type_of_the_setting(item: str, value: object):
    name = item.partition("=")[0].strip()
    assert getattr(with_overrides(item), name) == value


@pytest.mark.parametrize("item", ["sds_mode_default", "=3", ""])
def test_override_without_key_or_value_is_refused(item: str):
    with pytest.raises(SettingsError, match="key=value"):
        parse_overrides([item])


@pytest.mark.parametrize(("given", "used"), [(0.0, 0.10), (1.0, 0.99), (0.5, 0.5)])
def test_coverage_threshold_is_clamped_with_a_warning(given: float, used: float):
    settings, warnings = settings_from({"sds_coverage_threshold": given})
    assert settings.sds_coverage_threshold == used
    assert len(warnings) == (given != used)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"sds_min_batch_size": 0}, ["sds_min_batch_size = 0", "a whole number, at least 1"]),
        ({"sds_min_batch_size": True}, ["sds_min_batch_size = True"]),
        ({"sds_min_batch_size": 2.5}, ["2.5", "whole number"]),
        ({"global_coadd_k": math.nan}, ["global_coadd_k = nan"]),
        ({"sds_coverage_threshold": math.inf}, ["inf", "at least 0.1 and at most 0.99"]),
        ({"memory_gb": -1}, ["a number, above 0, or none"]),
        ({"final_assembly_method": "nearest"}, ["'nearest'", "reproject_coadd | incremental"]),
        ({"sds_mode_default": "maybe"}, ["true | false"]),
        ({"output_name": 31}, ["output_name = 31", "text"]),
        ({"two_pass_cov_gain_clip": ["a", "b"]}, ["['a', 'b']", "two numbers"]),
        ({"two_pass_cov_gain_clip": [1.1, 1.2]}, ["0 < low <= 1 <= high"]),
        ({"sds_min_batch_size": 20}, ["sds_min_batch_size = 20", "sds_target_batch_size = 10"]),
    ],
)
def test_bad_value_is_one_sentence_with_key_value_and_range(values: dict, words: list[str]):
    with pytest.raises(SettingsError) as caught:
        settings_from(values)
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message


def test_all_problems_are_told_at_once():
    with pytest.raises(SettingsError) as caught:
        settings_from({"nonsense": 1, "final_assembly_method": "x", "global_coadd_k": -1})
    assert len(str(caught.value).splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.toml", None, "cannot be read"),
        ("bad.toml", b"a = = 1", "not valid TOML"),
        ("bad.json", b"{", "not valid JSON"),
        ("bytes.json", b"\xff\xfe\x00", "not valid JSON"),
        ("list.json", b"[1]", "mapping"),
        ("settings.yaml", b"a: 1", "toml or .json"),
    ],
)
def test_file_that_cannot_be_used_is_named(tmp_path: Path, name: str, content: bytes | None, words: str):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=words) as caught:
        load_settings(path)
    assert str(path) in str(caught.value)


def test_every_setting_is_described():
    rows = list(describe_settings())
    assert [row.name for row in rows] == list(Settings.model_fields)
    for row in rows:
        assert row.description.endswith("."), row
        assert row.allowed, row
        assert row.unit or not row.name.endswith(("_px", "_percent", "_gb", "_sigma")), row
