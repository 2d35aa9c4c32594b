"""Every setting of a run: typed, bounded, documented, and strict about names it does not know.

Settings are read from TOML, or from the ``zemosaic_config.json`` that existing ZeMosaic installations
write, and keep the names used there. To bring a name of `KNOWN_UNUSED` to life, delete it there and
add a field to `Settings`; everything else (``--set``, the dump, the table of settings) follows.
"""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Names that existing configurations carry and this project does not use (yet): accepted, with a warning.
_UNUSED = """
input_dir input_folder output_dir output_folder global_wcs_output_path

astap_default_sensitivity astap_drizzled_fallback_enabled astrometry_api_key

cluster_target_groups
auto_limit_frames_per_master_tile batch_overlap_pct allow_batch_duplication min_safe_stack target_stack
auto_detect_seestar force_seestar_mode

stacking_winsor_limits wsc_impl winsor_worker_limit winsor_max_frames_per_pass
winsor_auto_fallback_on_memory_error winsor_min_frames_per_pass winsor_memmap_fallback
winsor_split_strategy apply_radial_weight radial_feather_fraction radial_shape_power
poststack_equalize_rgb poststack_rgb_equalize_gain_clip poststack_rgb_equalize_bg_percentile
poststack_rgb_equalize_min_samples poststack_rgb_equalize_min_coverage

center_out_normalization_p3 center_out_anchor_mode anchor_quality_probe_limit anchor_quality_span_range
anchor_quality_median_clip_sigma p3_center_sky_percentile p3_center_robust_clip_sigma
p3_center_preview_size p3_center_min_overlap_fraction enable_poststack_anchor_review
poststack_anchor_probe_limit poststack_anchor_span_range poststack_anchor_median_clip_sigma
poststack_anchor_min_improvement poststack_anchor_use_overlap_affine

intertile_preview_size intertile_overlap_min intertile_sky_percentile
intertile_robust_clip_sigma intertile_prune_k intertile_prune_weight_mode intertile_offset_only_v1
intertile_gain_offset_v2 intertile_gain_prior_lambda intertile_gain_clip intertile_offset_clip
intertile_pair_gain_clip intertile_pair_offset_abs_max intertile_max_irls_iters
intertile_enforce_requested_solver intertile_affine_blend intertile_global_recenter
intertile_recenter_clip use_auto_intertile

enable_tile_weighting tile_weight_mode tile_weight_v4_enabled tile_weight_v4_curve
tile_weight_v4_strength tile_weight_v4_min tile_weight_v4_max tile_weight_v4_residual_penalty_enabled
tile_weight_v4_residual_penalty_strength tile_weight_v4_temporal_penalty_enabled
tile_weight_v4_temporal_penalty_strength tile_weight_v4_temporal_penalty_hours
inter_master_merge_enable inter_master_overlap_threshold inter_master_min_group_size
inter_master_stack_method inter_master_memmap_policy inter_master_local_scale inter_master_max_group
inter_master_photometry_intragroup inter_master_photometry_intersuper inter_master_photometry_clip_sigma
patchwork_suppressor_enabled patchwork_suppressor_strength patchwork_suppressor_sigma
patchwork_suppressor_band patchwork_suppressor_max_delta phase5_alpha_soft_weights
phase5_alpha_soft_weights_floor incremental_feather_parity
existing_master_tiles_rgb_balance_prephase5 existing_master_tiles_rgb_balance_gain_clip
existing_master_tiles_rgb_balance_min_pixels existing_master_tiles_anchor_photometry_enabled
existing_master_tiles_anchor_gain_clip existing_master_tiles_final_rgb_equalize_gain_clip
existing_master_tiles_quality_gate_enabled existing_master_tiles_quality_gate_mode
existing_master_tiles_quality_gate_sigma_threshold existing_master_tiles_quality_gate_ratio_threshold
existing_master_tiles_quality_gate_min_valid_frac

quality_gate_move_rejects altaz_unknown_policy
altaz_alpha_soft_threshold altaz_nanize_threshold altaz_strict_overlap_crop_enabled
altaz_strict_overlap_crop_alpha_threshold altaz_strict_overlap_crop_min_nonzero_frac
altaz_strict_overlap_crop_bbox_pad_px altaz_strict_overlap_crop_min_size_px altaz_export_alpha_fits
altaz_export_alpha_sidecar altaz_alpha_sidecar_format

sds_enable_final_rgb_equalize sds_final_rgb_equalize_gain_clip sds_enable_final_black_point_equalize
final_mosaic_rgb_equalize_enabled final_mosaic_rgb_equalize_clip_enabled
final_mosaic_rgb_equalize_gain_clip final_mosaic_dbe_enabled final_mosaic_dbe_strength
final_mosaic_dbe_obj_k final_mosaic_dbe_obj_dilate_px final_mosaic_dbe_sample_step
final_mosaic_dbe_smoothing final_mosaic_black_point_equalize_enabled
final_mosaic_black_point_percentile export_aesthetic_fits export_science_suffix export_aesthetic_suffix
aesthetic_hole_fill_enabled aesthetic_hole_fill_radius aesthetic_hole_fill_blend
aesthetic_profile_preset visual_seam_heal_enabled visual_seam_heal_strength visual_seam_heal_sigma_small
visual_seam_heal_sigma_large visual_seam_heal_seam_sigma visual_seam_heal_max_rel_delta
visual_seam_heal_multiscale_enabled visual_seam_heal_multiscale_mid_gain
visual_seam_heal_multiscale_mid_sigma_scale visual_seam_heal_multiscale_mid_rel_scale
save_final_as_uint16 legacy_rgb_cube save_display_fits

assembly_process_workers grid_workers coadd_use_memmap coadd_cleanup_memmap cleanup_temp_artifacts
cache_retention chunk_profile_mode parallel_autotune_enabled parallel_target_cpu_load
parallel_target_ram_fraction parallel_gpu_vram_fraction parallel_max_cpu_workers phase3_ram_high_pct
phase3_ram_critical_pct use_gpu_phase5 use_gpu_grid use_gpu_stack stack_use_gpu gpu_id_phase5 gpu_selector
gpu_hybrid_vram_guard phase5_chunk_auto phase5_chunk_mb enable_resource_telemetry
resource_telemetry_interval_sec resource_telemetry_log_to_csv

preferred_gui_backend preferred_gui_backend_explicit qt_theme_mode qt_main_window_geometry
qt_filter_window_geometry qt_main_columns_state qt_main_left_state enable_early_filter
"""
KNOWN_UNUSED = frozenset(_UNUSED.split())

# Languages of the existing GUI whose messages do not exist here: no reason to refuse the configuration.
_FOREIGN_LANGUAGES = ("de", "es", "is", "nl", "pl")


class SettingsError(ValueError):
    """Settings that cannot be used; the message holds one sentence a line, one line a problem."""


def _clamp(low: float, high: float) -> BeforeValidator:
    def clamp(value: object) -> object:
        if isinstance(value, (int, float)) and math.isfinite(value):
            return min(max(value, low), high)
        return value

    return BeforeValidator(clamp)


def _around_one(pair: tuple[float, float]) -> tuple[float, float]:
    if not 0 < pair[0] <= 1 <= pair[1]:
        raise ValueError(f"{pair} does not hold 1")
    return pair


def _setting(default: Any, description: str, unit: str = "", **bounds: Any) -> Any:
    return Field(default, description=description, json_schema_extra={"unit": unit}, **bounds)


class Settings(BaseModel):
    """All settings of a run, flat and frozen; see each field's description, unit and bounds.

    Build it with `load_settings` or `settings_from` to get problems as plain sentences
    (`SettingsError`); calling the class itself raises pydantic's ``ValidationError``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    language: Literal["en", "fr"] = _setting("en", "Language of the messages.")
    output_name: str = _setting("", "Name of the product; empty = the OBJECT of the frames.")

    # --- plate solving
    solver_method: Literal["auto", "embedded", "astap", "astrometry", "none"] = _setting(
        "auto", "Plate solver that is tried first; auto = the embedded one, none = only the WCS that frames have."
    )
    solver_fallback: bool = _setting(
        True, "Where a solver fails, try the embedded one, then ASTAP, then astrometry.net, as far as installed."
    )
    force_resolve_existing_wcs: bool = _setting(False, "Solve frames that have a WCS already as well.")
    solver_timeout_s: float = _setting(60.0, "Time after which an external solver is stopped.", "s", gt=0)
    astap_executable_path: str = _setting("", "ASTAP's program or its folder; empty = it is searched.")
    astap_data_directory_path: str = _setting("", "Folder of ASTAP's star database; empty = it is searched.")
    astap_default_search_radius: float = _setting(
        3.0, "How far ASTAP searches around the place that a frame's header names, at least.", "deg", gt=0, le=180
    )
    astap_default_downsample: int = _setting(
        2, "Binning of the frames that ASTAP gets, never below 2; 0 = 2, and more if ASTAP thinks so.", "x", ge=0, le=8
    )
    astap_max_instances: int = _setting(1, "ASTAP programs that run at the same time.", ge=1)
    astrometry_local_path: str = _setting(
        "",
        "solve-field or its folder, a configuration file (.cfg) for it, or a folder of index files; empty = searched.",
    )

    # --- calibration of the single frames
    master_dark_path: str = _setting("", "FITS file with the master dark; empty = none.")
    master_flat_path: str = _setting("", "FITS file with the master flat; empty = none.")
    hot_pixel_correction: bool = _setting(True, "Repair hot pixels on the raw plane, before debayering.")
    hot_pixel_sigma: float = _setting(
        6.0, "How far a pixel must stand out of its neighbours to count as hot.", "sigma", ge=1
    )
    blur_filter: bool = _setting(
        True, "Leave out frames that are blurred, trailed or doubled far beyond the others, or whose WCS is wrong."
    )
    blur_filter_factor: float = _setting(
        1.6,
        "Frames whose FWHM exceeds this many times the night's median are left out.",
        "x median FWHM",
        gt=1,
    )
    cloud_filter: bool = _setting(True, "Leave out frames that clouds dim unevenly or hide.")
    cloud_filter_dimmed: bool = _setting(
        False,
        "Leave out evenly dimmed frames as well, where enough others see their sky; if kept they get less weight.",
    )
    cloud_filter_transparency: float = _setting(
        0.72,
        "Share of their light in the clear frames below which a frame's stars are called dimmed.",
        "fraction",
        gt=0,
        lt=1,
    )

    # --- the route, and the classic master tiles
    route: Literal["auto", "sds", "mosaic-first", "master-tiles"] = _setting(
        "auto", "How the mosaic is made; auto = SDS if sds_mode_default is on, else master tiles."
    )
    use_existing_master_tiles: bool = _setting(False, "The inputs are ready master tiles: only assemble them.")
    cluster_panel_threshold: float = _setting(
        0.05, "Frames whose centres lie this near to each other make one master tile.", "deg", gt=0
    )
    cluster_orientation_split_deg: float = _setting(
        0.0, "Frames turned by more than this go to different master tiles; 0 = never.", "deg", ge=0, le=180
    )
    max_raw_per_master_tile: int = _setting(
        0, "Larger groups are split into several master tiles; 0 or 1 = never.", "frames", ge=0
    )
    apply_master_tile_crop: bool = _setting(True, "Cut a border off every master tile.")
    master_tile_crop_percent: float = _setting(3.0, "Width of that border.", "% of each side", ge=0, lt=50)
    intertile_photometric_match: bool = _setting(
        True, "Match gains and sky levels between master tiles before they are assembled."
    )
    final_assembly_method: Literal["reproject_coadd", "incremental"] = _setting(
        "reproject_coadd", "Resample master tiles by the reproject library, or by the project's own warp."
    )

    # --- canvas: the global WCS
    global_wcs_pixelscale_mode: Literal["min", "median", "max"] = _setting(
        "median", "Which of the frames' pixel scales the mosaic takes."
    )
    global_wcs_res_override: float | None = _setting(
        None, "Pixel scale of the mosaic; none = as global_wcs_pixelscale_mode says.", "arcsec/px", gt=0
    )
    global_wcs_padding_percent: float = _setting(
        2.0, "Empty border added around the union of all frames.", "% of the canvas side", ge=0, le=100
    )
    global_wcs_orientation: Literal["north_up", "median_pc"] = _setting(
        "north_up", "Turn the mosaic north up, or as the frames lie on average."
    )
    global_wcs_autocrop_enabled: bool = _setting(True, "Cut the empty border off the finished mosaic.")
    global_wcs_autocrop_margin_px: int = _setting(128, "Border that the autocrop leaves.", "px", ge=0)

    # --- levels and combination of frames
    stacking_normalize_method: Literal["linear_fit", "sky_mean", "none"] = _setting(
        "linear_fit",
        "How frames are brought to one scale: gains from stars and sky from overlaps, sky level only, not at all.",
    )
    stacking_weighting_method: Literal["noise_variance", "noise_fwhm", "none"] = _setting(
        "noise_variance", "Weight of a frame: by its noise, by noise and sharpness, or equal."
    )
    stacking_rejection_algorithm: Literal["winsorized_sigma_clip", "kappa_sigma", "linear_fit_clip", "none"] = _setting(
        "winsorized_sigma_clip", "How satellites, cosmic rays and other outliers are rejected."
    )
    stacking_kappa_low: float = _setting(3.0, "Rejection limit below the centre.", "sigma", gt=0)
    stacking_kappa_high: float = _setting(3.0, "Rejection limit above the centre.", "sigma", gt=0)
    stacking_final_combine_method: Literal["mean", "median"] = _setting(
        "mean", "How the frames that survive the rejection are combined."
    )
    match_background_for_final: bool = _setting(
        True, "Match the sky background of the frames, also inside each mega-tile."
    )

    # --- SDS
    sds_mode_default: bool = _setting(False, "Use the SDS route when neither --sds nor --no-sds is given.")
    sds_coverage_threshold: Annotated[float, _clamp(0.10, 0.99)] = _setting(
        0.92, "Share of the union footprint at which a lot is closed.", "fraction", ge=0.10, le=0.99
    )
    sds_min_batch_size: int = _setting(5, "Fewest frames in a lot.", "frames", ge=1)
    sds_target_batch_size: int = _setting(10, "Number of frames at which a lot is closed.", "frames", ge=1)
    sds_gain_scope: Literal["shared", "tile"] = _setting(
        "shared", "Compare mega-tiles over the sky they share, or each over its own covered pixels."
    )
    sds_min_coverage_keep: float = _setting(
        0.4, "Pixels with less than this share of the typical coverage are cut.", "fraction", ge=0, le=1
    )
    global_coadd_method: Literal["mean", "median", "kappa_sigma", "winsorized"] = _setting(
        "kappa_sigma", "How the mega-tiles are combined."
    )
    # Existing configurations say 2.0, of a scatter that a few samples cannot exceed. Ours are true sigmas of a noise
    # model: 2.0 would take 1 of 20 honest samples and cost 3 % in noise.
    global_coadd_k: float = _setting(3.0, "Rejection limit when mega-tiles are combined.", "sigma", gt=0)

    # --- polish
    two_pass_coverage_renorm: bool = _setting(True, "Even out steps where the coverage changes, in a second pass.")
    two_pass_cov_sigma_px: int = _setting(50, "How far from a coverage step the second pass fades out.", "px", ge=1)
    two_pass_cov_gain_clip: Annotated[tuple[float, float], AfterValidator(_around_one)] = _setting(
        (0.85, 1.18), "Smallest and greatest gain that the second pass may apply."
    )
    quality_crop_enabled: bool = _setting(False, "Crop noisy edges off the mosaic.")
    quality_crop_band_px: int = _setting(32, "Thickness of the bands that are judged.", "px", ge=1)
    quality_crop_k_sigma: float = _setting(2.0, "How far off a band must be to count as bad.", "sigma", gt=0)
    quality_crop_margin_px: int = _setting(8, "Further pixels cut behind a bad run of bands.", "px", ge=0)
    quality_crop_min_run: int = _setting(2, "Fewest bad bands in a row that are cut.", "bands", ge=1)
    crop_follow_signal: bool = _setting(
        True, "Take a band of another brightness for real signal, and cut only what is too noisy."
    )
    quality_gate_enabled: bool = _setting(False, "Leave out tiles whose quality is too poor.")
    quality_gate_threshold: float = _setting(
        0.48, "Score under which a tile is rejected, 0 = useless, 1 = flawless.", ge=0
    )
    quality_gate_edge_band_px: int = _setting(64, "Width of the edge band that the gate looks at.", "px", ge=1)
    quality_gate_k_sigma: float = _setting(2.5, "How far an edge must stand out to count as bad.", "sigma", gt=0)
    quality_gate_erode_px: int = _setting(3, "Pixels taken off the mask before measuring.", "px", ge=0)
    altaz_cleanup_enabled: bool = _setting(False, "Remove the ragged rim that field rotation leaves.")
    altaz_margin_percent: float = _setting(
        5.0, "Width of the soft edge of the mask.", "% of the shorter side", ge=0, le=50
    )
    altaz_decay: float = _setting(0.15, "Scale of the soft edge; small = steep.", "share of its width", gt=0)
    altaz_nanize: bool = _setting(True, 'Turn the rim into "no data", not only transparent.')
    altaz_min_coverage_abs: float = _setting(3.0, "Least coverage of a pixel that is kept.", "frames", ge=0)
    altaz_min_coverage_frac: float = _setting(
        0.5, "Least coverage of a pixel that is kept, as a share of the typical one.", "fraction", ge=0, le=1
    )
    altaz_morph_open_px: int = _setting(3, "Strips of thin coverage up to twice this width are no rim.", "px", ge=0)

    # --- preview picture
    preview_png_p_low: float = _setting(1.0, "Percentile that becomes black.", "percentile", ge=0, lt=50)
    preview_png_p_high: float = _setting(99.9, "Percentile that becomes white.", "percentile", gt=50, le=100)
    preview_png_asinh_a: float = _setting(12.0, "Strength of the asinh stretch; small is nearly linear.", gt=0)
    preview_png_max_dim: int = _setting(3200, "Longest side of the preview.", "px", ge=16)
    preview_png_apply_wb: bool = _setting(False, "White-balance the preview.")

    # --- report
    report: bool = _setting(True, "Judge the finished mosaic, and write the verdict as a page beside it.")

    # --- machine
    num_processing_workers: int = _setting(-1, "Workers that run at the same time; -1 (or 0) = one a core.", ge=-1)
    memory_gb: float | None = _setting(None, "Memory the run may use; none = 60 % of what is free.", "GB", gt=0)
    coadd_memmap_dir: str = _setting("", "Scratch folder for arrays beyond the memory; empty = output folder.")
    resume: Literal["auto", "off", "force"] = _setting(
        "auto",
        "Keep finished results beside the product and use those of earlier runs; force = however much room they take.",
    )
    resume_cache_gb: float = _setting(20.0, "Room that kept results may take; the oldest go first.", "GB", ge=0)
    scheduler: str = _setting(
        "", "Dask cluster that stacks the lots of SDS, as tcp://HOST:8786; empty = this machine does it."
    )
    scheduler_timeout_s: float = _setting(
        60.0, "How long to wait for the cluster to answer, and for its first worker.", "s", gt=0
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: object, info: ValidationInfo) -> object:
        # pydantic would read ``true`` as 1, which hides a slip like sds_min_batch_size = true.
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("true and false are not a value for this setting")
        return value

    @model_validator(mode="after")
    def _batch_sizes_in_order(self) -> Settings:
        if self.sds_min_batch_size > self.sds_target_batch_size:
            raise ValueError(
                f"sds_min_batch_size = {self.sds_min_batch_size} must not exceed "
                f"sds_target_batch_size = {self.sds_target_batch_size}"
            )
        return self


class SettingInfo(NamedTuple):
    """One row of the table of settings."""

    name: str
    default: Any
    unit: str
    description: str
    allowed: str


def describe_settings() -> Iterator[SettingInfo]:
    """All settings in the order of the model, with default, unit, meaning and allowed values."""
    for name, field in Settings.model_fields.items():
        yield SettingInfo(name, field.default, _unit(field), field.description or "", _allowed(field))


def load_settings(path: Path | None = None, overrides: Mapping[str, str] | None = None) -> tuple[Settings, list[str]]:
    """Read settings from a file and put single values over them.

    Parameters
    ----------
    path : Path, optional
        ``.toml``, or ``.json`` as existing installations write it; None = all defaults.
    overrides : mapping of str to str, optional
        Values as typed on a command line: TOML literals where the setting's type takes them, else text.

    Returns
    -------
    Settings
        Checked and complete.
    list of str
        Warnings, one sentence each.

    Raises
    ------
    SettingsError
        If the file cannot be read, a name is unknown or a value is not allowed.
    """
    values = {} if path is None else read_document(path)
    if not isinstance(values, dict):
        raise SettingsError(f"{path} does not hold settings: a mapping of names to values is needed")
    return settings_from(values | {key: _typed(key, text) for key, text in (overrides or {}).items()})


def settings_from(values: Mapping[str, Any]) -> tuple[Settings, list[str]]:
    """Check a mapping of names to values; the same as `load_settings` for values that are typed already."""
    problems = [_unknown(key) for key in values if key not in Settings.model_fields and key not in KNOWN_UNUSED]
    used = {key: value for key, value in values.items() if key in Settings.model_fields}
    warnings = []
    if used.get("language") in _FOREIGN_LANGUAGES:
        warnings.append(f"There are no messages in language {used.pop('language')!r}; English is used.")
    if used.get("solver_method") == "ansvr":  # a local server around solve-field, on Windows
        used["solver_method"] = "astrometry"
        warnings.append("solver_method = ansvr is read as astrometry: solve-field is called itself.")
    try:
        settings = Settings(**used)
    except ValidationError as error:
        problems += _sentences(error, used)
    if problems:
        raise SettingsError("\n".join(problems))
    if unused := sorted(values.keys() & KNOWN_UNUSED):
        warnings.append(f"Settings without a use here are ignored: {', '.join(unused)}.")
    raw = used.get("sds_coverage_threshold", settings.sds_coverage_threshold)
    if float(raw) != settings.sds_coverage_threshold:
        warnings.append(f"sds_coverage_threshold = {raw} is clamped to {settings.sds_coverage_threshold}.")
    return settings, warnings


def parse_overrides(items: Iterable[str]) -> dict[str, str]:
    """Split ``key=value`` strings; the last of several with the same key counts."""
    pairs = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key.strip():
            raise SettingsError(f"{item!r} is not of the form key=value")
        pairs[key.strip()] = text.strip()
    return pairs


def settings_toml(settings: Settings) -> str:
    """The settings as TOML text, every one preceded by its meaning, unit and allowed values."""
    import tomlkit  # here, because reading settings does not need it

    document = tomlkit.document()
    document.add(tomlkit.comment("Settings of ZeMosaic."))
    for row in describe_settings():
        document.add(tomlkit.nl())
        document.add(tomlkit.comment(row.description))
        document.add(tomlkit.comment(f"{row.allowed}; unit: {row.unit}" if row.unit else row.allowed))
        value = getattr(settings, row.name)
        if value is None:  # TOML has no null: a setting that is absent has its default, which is none
            document.add(tomlkit.comment(f"{row.name} ="))
        else:
            document.add(row.name, list(value) if isinstance(value, tuple) else value)
    return tomlkit.dumps(document)


def dump_settings(settings: Settings, path: Path) -> None:
    """Write the settings as commented TOML that `load_settings` reads back equal."""
    path.write_text(settings_toml(settings), encoding="utf-8")


def read_document(path: Path) -> Any:
    """Parse a ``.toml`` or ``.json`` file; whatever is wrong with it becomes a `SettingsError`."""
    parsers = {".toml": tomllib.loads, ".json": json.loads}
    parse = parsers.get(path.suffix.lower())
    if parse is None:
        raise SettingsError(f"{path} must end in .toml or .json")
    try:
        return parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # what both parsers and the decoder raise
        raise SettingsError(f"{path} is not valid {path.suffix[1:].upper()}: {error}") from error


def _typed(key: str, text: str) -> Any:
    field = Settings.model_fields.get(key)
    if field is None:
        return text
    if text.lower() in ("", "none") and type(None) in get_args(field.annotation):
        return None
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    takes_text = field.annotation is str or get_origin(field.annotation) is Literal
    # output_name=31 names a product, it is no number; a quoted "31" loses its quotes.
    return text if takes_text and not isinstance(value, str) else value


def _unknown(key: str) -> str:
    names = Settings.model_fields.keys() | KNOWN_UNUSED
    (nearest,) = difflib.get_close_matches(key, names, n=1, cutoff=0)
    return f"unknown setting {key!r}; the nearest known one is {nearest!r}"


def _sentences(error: ValidationError, values: Mapping[str, Any]) -> Iterator[str]:
    # A pair with two bad halves has two errors, but is one problem.
    for key in dict.fromkeys(item["loc"][0] if item["loc"] else "" for item in error.errors()):
        if key:
            yield f"{key} = {values[str(key)]!r} is not allowed; it takes {_allowed(Settings.model_fields[str(key)])}"
        else:
            yield str(error.errors()[0]["ctx"]["error"])


def _unit(field: FieldInfo) -> str:
    extra = field.json_schema_extra
    return str(extra["unit"]) if isinstance(extra, dict) else ""


def _allowed(field: FieldInfo) -> str:
    kind, args = field.annotation, get_args(field.annotation)
    if get_origin(kind) is Literal:
        return " | ".join(args)
    if kind is bool:
        return "true | false"
    if kind is str:
        return "text"
    if get_origin(kind) is tuple:
        return "two numbers [low, high] with 0 < low <= 1 <= high"
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    bounds = [f"{word} {getattr(m, mark)}" for m in field.metadata for mark, word in words.items() if hasattr(m, mark)]
    text = "a whole number" if kind is int else "a number"
    if bounds:
        text += ", " + " and ".join(bounds)
    return f"{text}, or none" if type(None) in args else text
