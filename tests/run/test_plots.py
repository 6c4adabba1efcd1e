"""Pictures: axes are named, labels do not collide, nothing is transparent."""

import itertools

import matplotlib.image
import numpy as np
import pytest

from jaxlm.run import plots

TEXT = "ROMEO:␣O,␣she␣doth␣teach␣the␣torches␣to␣burn␣bright!␣It␣seems␣she␣hangs␣upon␣the␣cheek␣of␣night"


def maps(length, heads=2, layers=2):
    """Uniform causal weights."""
    weights = np.tri(length, dtype=np.float32)
    return [np.stack([weights / weights.sum(axis=1, keepdims=True)] * heads)] * layers


def drawn(make, *arguments):
    with plots.style():
        figure = make(*arguments)
        figure.draw_without_rendering()
    return figure


def overlaps(texts):
    """The pairs of texts whose boxes overlap by more than a rounding error of the layout."""
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [
        (a, b)
        for (a, one), (b, other) in itertools.combinations(boxes, 2)
        if min(one.x1, other.x1) - max(one.x0, other.x0) > 0.5 and min(one.y1, other.y1) - max(one.y0, other.y0) > 0.5
    ]


@pytest.mark.parametrize("length", [1, 7, 40, 41, 80])
@pytest.mark.parametrize("words", ["characters", "words"])
def test_labels_of_an_attention_map_do_not_collide(length, words):
    labels = list(TEXT[:length]) if words == "characters" else (["␣torches", "W", "\\n", "␣to"] * 20)[:length]
    figure = drawn(plots.attention_figure, maps(length), labels, "tiny-1, step 30")
    for axes in figure.axes[:4]:
        for axis in (axes.xaxis, axes.yaxis):
            ticks = axis.get_ticklabels()
            assert [tick.get_text() for tick in ticks] == labels[:: 1 if length <= 40 else 2]
            assert overlaps(ticks) == []


def test_a_map_of_many_tokens_is_labelled_by_positions():
    figure = drawn(plots.attention_figure, maps(81), list("a" * 81), "tiny-1, step 30")
    texts = [tick.get_text() for tick in figure.axes[0].xaxis.get_ticklabels()]
    assert "20" in texts
    assert "a" not in texts


def test_an_attention_map_names_its_axes_and_its_run():
    figure = drawn(plots.attention_figure, maps(5, heads=3), list("ROMEO"), "tiny-1, step 30")
    grid = np.array(figure.axes[:6]).reshape(2, 3)
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["query"] * 2
    assert [axes.get_xlabel() for axes in grid[1]] == ["key"] * 3
    assert figure.get_suptitle() == "Attention weights of tiny-1, step 30"
    assert [axes.get_title() for axes in grid[1]] == [f"layer 1, head {head}" for head in range(3)]
    everything = [axes.title for axes in grid.flat] + [tick for axes in grid.flat for tick in axes.get_xticklabels()]
    assert overlaps([*everything, figure._suptitle]) == []


def test_masks_name_their_axes_and_what_they_show():
    rows = {"seen": [("all", np.tri(16, dtype=bool)), ("none", np.zeros((16, 16), bool))]}
    figure = drawn(plots.masks_figure, {**rows, "output": rows["seen"]}, "What is seen")
    grid = np.array(figure.axes).reshape(2, 2)
    assert [axes.get_ylabel() for axes in grid[:, 0]] == ["seen\nquery", "output\nquery"]
    assert [axes.get_xlabel() for axes in grid[1]] == ["key", "key"]
    assert [axes.get_title() for axes in grid[0]] == ["all", "none"]
    assert figure.get_suptitle() == "What is seen"


ROWS = [{"step": step, "loss": 5 - 0.01 * step} for step in range(1, 301, 10)] + [
    {"step": step, "val_loss": 2.01 + 100 / step, "train_loss": 2 + 100 / step} for step in (100, 200, 300)
]


def test_curves_are_named_at_their_ends_and_nothing_covers_them():
    figure = drawn(plots.loss_figure, ROWS, "tiny-1")
    (axes,) = figure.axes
    assert axes.get_legend() is None
    assert axes.get_title() == "Loss of run tiny-1"
    names = {text.get_text(): text for text in axes.texts}
    assert set(names) == {"training batches", "training slice 2.333", "validation 2.343"}
    assert overlaps(names.values()) == []
    right, width = axes.get_window_extent().x1, figure.bbox.width
    for text in names.values():
        assert right <= text.get_window_extent().x0 < text.get_window_extent().x1 <= width
    colors = [line.get_color() for line in axes.lines]
    assert [names[name].get_color() for name in ("training batches", "training slice 2.333")] == colors[:2]
    assert len({*colors, axes.get_facecolor()}) == 4


@pytest.mark.parametrize("rows", [ROWS[:3], ROWS[-2:]])
def test_a_curve_of_some_rows_only(rows):
    figure = drawn(plots.loss_figure, rows, "a $run$ with _signs_")
    assert len(figure.axes[0].lines) == len(figure.axes[0].texts) == (1 if "loss" in rows[0] else 2)


def test_files_are_opaque_and_have_a_background_of_a_middle_tone(tmp_path):
    plots.plot_loss(ROWS, tmp_path / "loss.png", "tiny-1")
    plots.plot_attention_maps(maps(5), list("ROMEO"), tmp_path / "maps.png", "tiny-1")
    plots.plot_masks({"seen": [("all", np.tri(4, dtype=bool))]}, tmp_path / "masks.png", "What is seen")
    for path in tmp_path.iterdir():
        pixels = matplotlib.image.imread(path)
        assert (pixels[..., 3:] == 1).all()
        assert (pixels[0, 0, :3] < 0.92).all()
        assert (pixels[0, 0, :3] > 0.5).all()
