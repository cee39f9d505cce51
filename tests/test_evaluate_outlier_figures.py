"""Figures and maps of outliers against findings made by hand: what is drawn where, in which colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_findings import ATTENTION, BLOCKS, GRID, made_findings, two_targets
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from dsr_scale.evaluate import outlier_figures as figures
from dsr_scale.evaluate import outlier_maps as maps
from dsr_scale.evaluate.outlier_sections import Picture, report_sections
from dsr_scale.evaluate.outlier_wording import largest


def pixels(figure: Figure) -> np.ndarray:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(float)


def pixel_at(image: np.ndarray, axes: Any, x: float, y: float) -> np.ndarray:
    """The colour at data coordinates."""
    across, up = axes.transData.transform((x, y))
    return image[len(image) - 1 - int(up), int(across)]


def test_heat_map_is_brightest_where_the_largest_value_is() -> None:
    first, second = two_targets()
    for found in (first, second):
        found.measures["outlier_ratio"][:] = 0.02
    first.measures["outlier_ratio"][3, 1] = 0.4
    second.measures["outlier_ratio"][1, 0] = 0.2
    values = [found.measures["outlier_ratio"] for found in (first, second)]
    scale = figures.colour_scale(values, log=False)
    figure = figures.heat_map([first, second], "outlier_ratio", scale=scale, label="share")
    image = pixels(figure)
    light = np.array(
        [
            # Beside the cell's number.
            [[pixel_at(image, axes, s - 0.4, b - 0.4).sum() for s in range(2)] for b in range(5)]
            for axes in figure.axes[:2]
        ]
    )
    assert np.unravel_index(light.argmax(), light.shape) == (0, 3, 1)
    # Equal values have equal colours in both targets, and half the value is in between.
    background = np.delete(light[0].ravel(), 7)
    np.testing.assert_array_equal(background, background[0])
    assert background[0] == light[1, 0, 0] < light[1, 1, 0] < light[0, 3, 1]


def test_heat_maps_of_a_clean_network_are_dark() -> None:
    """Whatever the contrast of small numbers, a bright cell is an outlier."""
    found = made_findings("clean", seed=1)
    for name in ("max_over_median", "max_over_median_without_channels"):
        found.measures[name][:] = np.linspace(1.1, 1.9, 10).reshape(5, 2)
    pictures = [part for section in report_sections([found]) for part in section.parts]
    (drawn,) = [
        p.draw() for p in pictures if isinstance(p, Picture) and p.file == "max_over_median"
    ]
    image, axes = pixels(drawn), drawn.axes[0]
    light = [pixel_at(image, axes, s - 0.4, b - 0.4).mean() for s in range(2) for b in range(5)]
    assert max(light) < 110 and len(set(light)) > 5


def test_heat_map_labels_both_times_and_marks_missing_cells() -> None:
    found = two_targets()[1]
    scale = figures.colour_scale([found.measures["register_over_median"]], log=True)
    figure = figures.heat_map([found], "register_over_median", scale=scale, label="ratio")
    axes = figure.axes[0]
    figure.draw_without_rendering()
    (above,) = axes.child_axes
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.1", "0.5"]
    assert [label.get_text() for label in above.get_xticklabels()] == ["0.014", "0.071"]
    assert axes.get_xlabel().startswith("model time") and above.get_xlabel() == "pre-shift time"
    texts = {text.get_position(): text.get_text() for text in axes.texts}
    assert texts[0, 0] == texts[1, 1] == "–"
    assert texts[1, 3] == f"{found.measures['register_over_median'][3, 1]:.2g}"
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["0", "1", "2", "h0", "out"]


def test_norm_maps_share_one_scale_and_show_each_token_in_its_place() -> None:
    first, second = two_targets()
    for found in (first, second):
        found.norm_maps[:] = 2.0
    first.norm_maps[2, 1, 0, 2, 3] = 40.0
    second.norm_maps[0, 1, 1, 0, 1] = 20.0
    grids = [maps.norm_maps(found, 1) for found in (first, second)]
    assert grids[0].maps[0, 1, 2, 3] == 20.0 and grids[1].maps[1, 0, 0, 1] == 10.0
    for log in (False, True):
        scale = figures.colour_scale([grid.maps for grid in grids], log=log)
        assert isinstance(scale, LogNorm) == log
        figure = maps.map_figure(grids, scale=scale, label="norm / median")
        image = pixels(figure)
        light = np.array(
            [
                [
                    # Column 0 is the picture; a token is a quarter of a map across, a third down.
                    pixel_at(image, axes, 1 + column + (w + 0.5) / 4, row + (h + 0.5) / 3).sum()
                    for row in range(2)
                    for column in range(3)
                    for h in range(3)
                    for w in range(4)
                ]
                for axes in figure.axes[:2]
            ]
        ).reshape(2, 2, 3, 3, 4)
        assert np.unravel_index(light.argmax(), light.shape) == (0, 0, 1, 2, 3)
        assert light[0].min() == light[1].min() < light[1, 1, 0, 0, 1] < light[0, 0, 1, 2, 3]
        assert (light > light.min()).sum() == 2


@pytest.mark.parametrize("ending", ["", "_log"])
def test_norm_maps_with_and_without_channels_have_the_same_colour_for_the_same_value(
    ending: str,
) -> None:
    found = made_findings("target", seed=1, steps=0)
    found.norm_maps[:] = 2.0
    found.norm_maps[2, 0, 0, 1, 1] = 40.0
    found.norm_maps[0, 0, 1, 0, 0] = 20.0
    found.norm_maps_without_channels[:] = 0.3
    found.norm_maps_without_channels[4, 0, 1, 2, 3] = 3.0  # the output
    pictures = {
        part.file: part
        for section in report_sections([found])
        for part in section.parts
        if isinstance(part, Picture)
    }
    everything, without = (
        token_colours(pictures[f"norm_maps{name}{ending}"].draw(), rows=2, columns=3)
        for name in ("", "_without_channels")
    )
    ten_medians = everything[1, 0, 0, 0]
    np.testing.assert_array_equal(without[1, 2, 2, 3], ten_medians)
    np.testing.assert_array_equal(without[0, 0, 0, 0], everything[0, 0, 0, 0])
    assert (without != without[0, 0, 0, 0]).any(-1).sum() == 1
    assert everything[0, 1, 1, 1].sum() > ten_medians.sum() > without[0, 0, 0, 0].sum()


def token_colours(figure: Figure, *, rows: int, columns: int) -> np.ndarray:
    """Colours [rows,columns,h,w,3] of the tokens of a figure of maps of one target."""
    image, axes = pixels(figure), figure.axes[0]
    height, width = GRID
    colours = [
        # Column 0 is the picture.
        pixel_at(image, axes, 1 + column + (w + 0.5) / width, row + (h + 0.5) / height)
        for row, column, h, w in np.ndindex(rows, columns, height, width)
    ]
    return np.array(colours).reshape(rows, columns, height, width, 3)


def test_largest_token_is_circled_where_it_is() -> None:
    found = two_targets()[0]
    found.top_positions[1, 0, 1] = (2, 0)
    grid = maps.top_maps(found, 0)
    figure = maps.map_figure([grid], scale=figures.colour_scale([grid.maps], log=True))
    assert grid.column_names == ("0", "2")  # the output has no attention
    circles = [patch.get_center() for patch in figure.axes[0].patches]  # type: ignore[attr-defined]
    assert len(circles) == 4
    # Second row, third column after the picture and block 0; first of four across, last of three down.
    x, y = circles[3]
    assert 2 <= x < 2.25 and 1 + 2 / 3 < y <= 2


def test_register_maps_have_a_row_per_register_and_only_blocks_with_registers() -> None:
    found = two_targets()[1]
    grid = maps.register_maps(found, 1)
    assert grid.row_names == ("register 1", "register 2") * 2
    assert grid.column_names == ("2",)
    np.testing.assert_allclose(grid.maps[3, 0], found.register_maps[1, 1, 1, 1] * 12)
    assert grid.pictures is not None
    np.testing.assert_array_equal(grid.pictures[2], found.pictures[1].transpose(1, 2, 0))


def test_component_colours_keep_the_order_of_the_first_component_as_lightness() -> None:
    found = two_targets()[0]
    found.component_maps[..., 1:] = 0
    grid = maps.component_maps(found, 0)
    scores = found.component_maps[1, 0, 0, ..., 0].ravel()
    light = grid.maps[0, 1].sum(-1).ravel()
    np.testing.assert_array_equal(np.argsort(light), np.argsort(scores))
    assert grid.maps.min() >= 0 and grid.maps.max() <= 1


def test_attention_bars_stack_to_one_in_order() -> None:
    found = two_targets()[1]
    parts = {f"attention_{part}": part for part in ATTENTION}
    axes = figures.attention_bars([found], parts).axes[1]
    bars = np.array([[bar.get_height() for bar in group] for group in axes.containers])  # type: ignore[attr-defined]
    assert bars.shape == (len(ATTENTION), len(BLOCKS))
    for number, measure in enumerate(parts):
        np.testing.assert_allclose(bars[number], np.nan_to_num(found.measures[measure][:, 1]))
    np.testing.assert_allclose(bars[:, :-1].sum(0), 1)
    tops = [bar.get_y() + bar.get_height() for bar in axes.containers[-1]]  # type: ignore[attr-defined]
    np.testing.assert_allclose(tops[:-1], 1)


def test_of_equal_values_none_is_at_a_place() -> None:
    found = made_findings("clean", seed=1)
    found.measures["outlier_ratio"][:] = 0
    assert largest([found], "outlier_ratio") == "clean at most 0."
    found.measures["outlier_ratio"][2, 1] = 0.25
    place = "blocks.2, model time 0.5 (pre-shift 0.0714)"
    assert largest([found], "outlier_ratio") == f"clean at most 0.25 at {place}."


def test_a_group_has_its_colour_in_every_report() -> None:
    """Registers are absent from a report of a baseline alone; the other groups look as beside them."""
    parts = {f"attention_{part}": part for part in ATTENTION}
    alone, beside = (
        {
            group.get_label(): group[0].get_facecolor()
            for group in figures.attention_bars(targets, parts).axes[0].containers
        }
        for targets in ([two_targets()[0]], two_targets())
    )
    assert beside.keys() - alone.keys() == {"registers"}
    assert all(beside[name] == colour for name, colour in alone.items())


def test_histograms_are_shares_of_tokens() -> None:
    found = two_targets()[1]
    axes = figures.histograms([found]).axes[0]
    drawn = [(patch.get_label(), patch.get_data()) for patch in axes.patches]  # type: ignore[attr-defined]
    registers = "registers, dotted"
    expected = [name for block in ("0", "2", "out") for name in (f"block {block}", registers)]
    assert [name for name, _ in drawn] == expected
    for place, counts in ((2, found.image_histograms), (3, found.register_histograms)):
        np.testing.assert_allclose(drawn[place][1].values, counts[2, 0] / counts[2, 0].sum())
        np.testing.assert_allclose(drawn[place][1].edges, found.histogram_edges)


def test_targets_of_other_depth_and_fewer_timesteps_stand_side_by_side(tmp_path: Path) -> None:
    first = made_findings("diffusion", seed=5)
    second = made_findings("an encoder", seed=6, steps=0)
    grids = [maps.norm_maps(found, 0) for found in (first, second)]
    assert [grid.title.splitlines()[-1] for grid in grids] == [
        "model time 0.1 (pre-shift 0.0143)",
        "an encoder",
    ]
    figure = figures.curves([first, second], {"outlier_ratio": "ratio"}, label="share")
    assert [axes.get_visible() for axes in figure.axes] == [True, True, True, False]
