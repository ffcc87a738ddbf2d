"""The picture of scores over trained parameters: what is written can be read."""

from itertools import combinations

import pytest

from bench.accuracy.picture import Point, draw_scores

CROWDED = [
    Point("EPT", "EPT", 21_000, 0.883),
    Point("LoRA r = 2", "LoRA", 20_000, 0.884, (0.880, 0.888)),
    Point("LoRA r = 4", "LoRA", 39_000, 0.889, (0.886, 0.892)),
    Point("DePT", "DePT", 40_000, 0.842, (0.836, 0.848)),
    Point("the paper's EPT", "paper", 40_000, 0.842, (0.836, 0.848)),
    Point("head only", "head only", 2_000, 0.816, (0.808, 0.824)),
    Point("full fine-tuning", "full", 22_700_000, 0.892),
]


def test_labels_lie_inside_the_frame_and_hide_neither_each_other_nor_a_point(tmp_path):
    figure = draw_scores({"many": CROWDED, "few": CROWDED[:4]}, "EPT", "score", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size
    for axis, points in zip(figure.axes, (CROWDED, CROWDED[:4]), strict=True):
        frame, labels = axis.get_window_extent(), axis.texts
        boxes = [text.get_window_extent() for text in labels]
        assert [text.get_text().split(",")[0] for text in labels] == [point.label for point in points]
        assert all(frame.x0 < box.x0 < box.x1 < frame.x1 and frame.y0 < box.y0 < box.y1 < frame.y1 for box in boxes)
        assert not any(first.overlaps(second) for first, second in combinations(boxes, 2))
        marks = [
            axis.transData.transform((point.trained, point.score)) for point in points if point.trained < 1_000_000
        ]
        assert not any(box.contains(*mark) for box in boxes for mark in marks)


def test_a_label_without_a_place_is_an_error_that_says_so():
    stacked = [Point(f"method {number}", "EPT", 20_000, 0.8 + number / 1e6) for number in range(200)]
    with pytest.raises(ValueError, match="no room for the label"):
        draw_scores({"all in one place": stacked}, "method 0", "score")
