"""The forecast: laws of its scaling on invented probes, and a real probe against the real run it speaks of."""

import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest

from zemosaic.demo import make_field
from zemosaic.events import Cancelled, Events
from zemosaic.execute import PROCESS_BYTES, PROCESS_SECONDS
from zemosaic.forecast import Forecast, forecast, match_time, phase_memory, phase_times
from zemosaic.intake import scan
from zemosaic.layout import Layout, Sizes, lay_out, sizes_of
from zemosaic.plan import make_plan, plan_json, plan_lines
from zemosaic.probe import Cost, Probe, Trial, run_probe
from zemosaic.settings import Settings
from zemosaic_worker import resident_bytes, run_hierarchical_mosaic

MB = 1 << 20
TRIAL = Sizes(
    frames=10,
    frame_px=20 * MB,
    samples=20.0 * MB,
    tiles=(2 * MB, 2 * MB),
    tile_frames=5,
    canvas_px=4 * MB,
    preview_px=4 * MB,
    channels=3,
    frame_bytes=8 * MB,
)
RUN = replace(
    TRIAL,
    frames=100,
    frame_px=200 * MB,
    samples=200.0 * MB,
    tiles=(3 * MB,) * 10,
    tile_frames=10,
    canvas_px=12 * MB,
    preview_px=5 * MB,
)
PHASES = ("phase_measure", "phase_levels", "phase_lots", "phase_gains", "phase_stack", "phase_polish", "phase_save")


def invented(tiles_in_memory: bool = True) -> Probe:
    """Two traced frames of one 2 Mpx tile, ten timed frames of two; round numbers throughout."""
    costs = {phase: Cost(1.0 + k, 2.0 + k) for k, phase in enumerate(PHASES)}
    held = dict.fromkeys(PHASES, MB)
    held["phase_gains"] += 2 * 20 * MB if tiles_in_memory else 0  # image, coverage and weight of the tile
    peak = dict.fromkeys(PHASES, 100 * MB)
    small = replace(TRIAL, frames=2, tile_frames=2, tiles=(2 * MB,), canvas_px=2 * MB)
    return Probe(
        base=200 * MB,
        unseen=20 * MB,
        first=Trial(small, costs, held, peak),
        traced=Trial(small, costs, held, peak),
        timed=Trial(TRIAL, costs, dict.fromkeys(PHASES, 0), dict.fromkeys(PHASES, 0)),
        match=((12, Cost(0.12 + 0.00144, 0.12)), (48, Cost(0.48 + 0.02304, 0.48))),
        match_bytes=1.0 * MB,
        picture=Cost(0.5 / MB, 0.5 / MB),
        picture_bytes=1.5,
        workers=2,
    )


def whole(sizes: Sizes, probe: Probe, resident: int = 1 << 40) -> Forecast:
    return forecast("sds", sizes, probe, budget=0, resident=resident, product_px=sizes.canvas_px, known={})


def test_a_run_of_the_size_of_the_trial_costs_what_the_trial_cost():
    probe = invented()
    times = phase_times(TRIAL, probe)
    for phase in set(PHASES) - {"phase_levels"}:  # which has a trial of its own
        assert times[phase].cpu == pytest.approx(probe.timed.costs[phase].cpu)
        assert times[phase].wall == pytest.approx(probe.timed.costs[phase].wall)


def test_every_phase_grows_with_its_own_size():
    probe = invented()
    before = phase_times(TRIAL, probe)
    grown = {
        "samples": {"phase_lots": 2.0},
        "tiles": {"phase_gains": 2.0, "phase_stack": 1.5},
        "canvas_px": {"phase_stack": 1.5, "phase_polish": 2.0},
    }
    for name, factors in grown.items():
        value = getattr(TRIAL, name)
        after = phase_times(replace(TRIAL, **{name: value * 2}), probe)
        for phase in ("phase_lots", "phase_gains", "phase_stack", "phase_polish"):
            assert after[phase].cpu == pytest.approx(before[phase].cpu * factors.get(phase, 1.0)), (name, phase)


def test_the_preview_does_not_grow_with_the_mosaic():
    probe = invented()
    cost = probe.timed.costs["phase_save"].cpu  # 7 s, of which the preview takes 4 Mpx * 0.5 s/Mpx
    larger = phase_times(replace(TRIAL, canvas_px=3 * TRIAL.canvas_px), probe)["phase_save"]
    assert larger.cpu == pytest.approx(3 * (cost - 2) + 2)


def test_frames_that_choose_the_aperture_are_not_counted_for_all():
    # 7 of 10 frames of the trial are measured twice, 7 of 100 of the run.
    times = phase_times(replace(TRIAL, frames=100, frame_px=10 * TRIAL.frame_px), invented())
    assert times["phase_measure"].cpu == pytest.approx(1.0 / 17 * 107)


def test_many_frames_are_measured_in_processes():
    """They cost their start and their memory, and keep all cores busy."""
    given = {"resident": MB, "product_px": MB, "known": {}}
    many = replace(RUN, frames=1000)
    assert RUN.frames < 200
    probe = replace(invented(), workers=4)
    few, few_apart = (forecast("sds", RUN, probe, budget=budget, **given) for budget in (0, 1 << 40))
    assert few == few_apart
    here, apart = (
        next(p for p in forecast("sds", many, probe, budget=budget, **given).phases if p.phase == "phase_measure")
        for budget in (0, 1 << 40)
    )
    assert apart.cpu == pytest.approx(here.cpu + 3 * PROCESS_SECONDS)
    assert apart.wall == pytest.approx(apart.cpu / 4)
    assert apart.memory == here.memory + 3 * PROCESS_BYTES


def test_what_is_loaded_once_is_counted_once():
    probe = invented()
    slow = {phase: cost + Cost(0.5, 0.7) for phase, cost in probe.traced.costs.items()}
    before = phase_times(RUN, probe)
    after = phase_times(RUN, replace(probe, first=replace(probe.first, costs=slow)))
    for phase in PHASES:
        assert after[phase].cpu - before[phase].cpu == pytest.approx(0.5)
        assert after[phase].wall - before[phase].wall == pytest.approx(0.7)


def test_the_search_on_the_sky_has_a_part_that_does_not_grow():
    probe = invented()
    # 2 frames take 3 s and 10 frames 3.8 s: 2.8 s for all, 0.1 s for each.
    few = replace(probe.traced, costs={**probe.traced.costs, "phase_solve": Cost(3.0, 3.0)})
    many = replace(probe.timed, costs={**probe.timed.costs, "phase_solve": Cost(3.8, 3.8)})
    times = phase_times(RUN, replace(probe, first=few, traced=few, timed=many))
    assert times["phase_solve"].cpu == pytest.approx(2.8 + 0.1 * 100)


def test_the_solution_grows_with_the_pairs_of_frames():
    probe = invented()  # 10 ms a frame and 10 us a pair
    for n in (12, 48, 500, 5000):
        assert match_time(probe, n).cpu == pytest.approx(0.01 * n + 1e-5 * n * n)
    assert match_time(probe, 500).wall == pytest.approx(5.0)
    assert match_time(replace(probe, match=probe.match[:1]), 12) == probe.match[0][1]


def test_memory_counts_tiles_frames_and_canvas():
    probe = invented()
    memory, scratch = phase_memory(RUN, probe, 1 << 40)
    assert scratch == 0
    kept = 100 * 0.5 * MB  # 1 MB of the two traced frames is held when lots begin
    tiles = 30 * 20 * MB  # image, coverage and weight
    own = {
        "phase_lots": 100 - 1 - 2 * 8 - 2 * 20,
        "phase_stack": 100 - 1 - 2 * 20,
        "phase_polish": 100 - 1,
    }
    expected = {
        "phase_lots": kept + tiles + 10 * 8 * MB + own["phase_lots"] * 1.5 * MB,  # the tile is 1.5 times as large
        "phase_stack": kept + tiles + own["phase_stack"] * 6 * MB,  # the canvas 6 times
        "phase_polish": kept + own["phase_polish"] * 6 * MB,
    }
    for phase, value in expected.items():
        assert memory[phase] == pytest.approx(220 * MB + value), phase


def test_tiles_beyond_the_budget_go_to_scratch_files():
    probe = invented()
    free, limited = whole(RUN, probe), whole(RUN, probe, resident=100 * MB)
    assert free.scratch == 0 and limited.scratch == 500 * MB
    assert limited.memory.value < free.memory.value


def test_tiles_that_a_resumable_run_keeps_in_files_are_counted_on_the_disk():
    made = whole(RUN, invented(tiles_in_memory=False))
    assert made.scratch == 600 * MB
    stack = {phase.phase: phase.memory for phase in made.phases}["phase_stack"]
    # Their pages are in memory while they are stacked; nothing of what the trace saw was theirs.
    assert stack == pytest.approx(220 * MB + 50 * MB + 600 * MB + 99 * 6 * MB)


def test_disk_and_ranges():
    made = whole(RUN, invented())
    assert made.disk.value == pytest.approx(12 * MB * 17 + 5 * MB * 1.5)
    tiles = forecast("master-tiles", RUN, invented(), budget=0, resident=MB, product_px=MB, known={}).disk.value
    assert tiles == pytest.approx(MB * 17 + 5 * MB * 1.5 + 30 * MB * 16)
    for estimate in (made.memory, made.disk, made.cpu, made.wall):
        assert 0 < estimate.low < estimate.value < estimate.high
    assert made.cpu.value == pytest.approx(sum(phase.cpu for phase in made.phases))


def test_what_was_not_tried_widens_the_range():
    probe = invented()
    near, far = (whole(replace(TRIAL, frames=n), probe).cpu for n in (48, 5000))
    spread = [(e.high - e.value) / e.value for e in (near, far)]
    assert spread[1] > spread[0] + 0.1
    deep = whole(replace(TRIAL, tile_frames=60), probe).cpu
    assert deep.value == whole(TRIAL, probe).cpu.value and deep.high > whole(TRIAL, probe).cpu.high


def test_known_phases_are_taken_as_they_are():
    made = forecast("sds", RUN, invented(), budget=0, resident=MB, product_px=MB, known={"phase_lots": Cost(0.5, 0.7)})
    assert {p.phase: (p.cpu, p.wall) for p in made.phases}["phase_lots"] == (0.5, 0.7)


# --- the real engine ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("subs")
    make_field(folder, panels=(2, 1), frames=10, shape=(200, 280), seed=9)
    return folder


SETTINGS = Settings(route="sds", num_processing_workers=1, solver_method="none")


@pytest.fixture(scope="module")
def probed(subs: Path) -> tuple[Layout, Probe]:
    heard = []
    layout = lay_out(scan([subs], 1, Events()).frames, SETTINGS)
    probe = run_probe(layout, range(4), "sds", SETTINGS, Events(heard.append))
    assert [event.values["current"] for event in heard if event.kind == "progress"] == [0, 1, 2, 3, 4]
    return layout, probe


def test_the_memory_of_a_real_run_is_foreseen(probed: tuple[Layout, Probe], subs: Path, tmp_path: Path):
    """Traced, so that neither other tests nor the heap have a say; the traced frames of the probe are 2 of 10."""
    layout, probe = probed
    resident = resident_bytes(SETTINGS, 1 << 40)
    phases, _ = phase_memory(sizes_of(layout, "sds", SETTINGS), replace(probe, base=0, unseen=0), resident)
    tracemalloc.start()
    run_hierarchical_mosaic(subs, tmp_path, SETTINGS)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert max(phases.values()) == pytest.approx(peak, rel=0.2)


def test_the_forecast_of_a_plan_names_every_phase(
    probed: tuple[Layout, Probe], subs: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []
    monkeypatch.setattr("zemosaic.plan.run_probe", lambda *call: asked.append(call) or probed[1])
    settings = SETTINGS.model_copy(update={"route": "auto"})
    plan = make_plan([subs], settings, sds=True, startup=Cost(2.0, 3.0))
    ((layout, panel, route, *_),) = asked
    assert layout is plan.layout and panel == max(plan.graph.panels, key=len) and route == "sds"
    made = plan.forecast
    assert plan.problems == () and made is not None and made.route == "sds"
    cpu = {phase.phase: phase.cpu for phase in made.phases}
    assert set(cpu) >= {*PHASES, "phase_scan", "start"}
    assert cpu["start"] == 2.0 and cpu["phase_lots"] > 0 and cpu["phase_measure"] > 0
    assert 100 * MB < made.memory.value < 4000 * MB
    told = plan_json(plan)["forecast"]
    assert told["memory_bytes"]["low"] < told["memory_bytes"]["value"] == made.memory.value
    assert [p["phase"] for p in told["phases"]] == list(cpu)
    assert "Memory: " in "\n".join(plan_lines(plan)) and "Mémoire : " in "\n".join(plan_lines(plan, "fr"))


def test_a_probe_can_be_stopped(subs: Path):
    layout = lay_out(scan([subs], 1, Events()).frames, SETTINGS)
    asked = iter([False] * 5 + [True] * 1000)
    with pytest.raises(Cancelled):
        run_probe(layout, range(4), "sds", SETTINGS, Events(stop_requested=lambda: next(asked)))
