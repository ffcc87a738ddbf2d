"""The microbenchmarks' promises: nothing is timed unchecked, tables say what they are, noise is not called slower."""

import dataclasses

import pytest
import torch

from bench.__main__ import main
from bench.cpu import timed_entry
from bench.kernels import costs, micro, points, stems
from bench.kernels.checked import WrongResult
from bench.kernels.work import work
from bench.tables import records
from bench.tables.slower import compare
from ept_kernels.prompt_embed import traffic

TINY = dict(batch=2, length=6, d=16, s=3, n=8, r=2, k=2, h=2, q=2)


@pytest.fixture
def tiny(monkeypatch):
    """Sizes that take no time, on the CPU."""
    monkeypatch.setitem(points.BASE, "cpu", traffic.Shapes(**TINY, source_bytes=4))
    monkeypatch.setitem(points.AXES, "cpu", {name: (value, 2 * value) for name, value in TINY.items()})
    stems.stem_case.cache_clear()


def eager(axis: str = "base") -> list[points.Point]:
    return [point for point in points.points("cpu") if point.axis == axis and point.impl != "compile"]


def clock(call, captured):
    """Runs the call, and says that it took a millisecond, or 10 in a graph."""
    call()
    return {"low": 0.9e-3, "median": 1e-3, "high": 1.2e-3, "rounds": 3, "graph": 10e-3}


def test_every_stem_and_every_peer_is_checked_and_has_a_row_for_each_way(tiny):
    rows, wrong, skipped = micro.microbenchmarks(eager(), "cpu", clock)
    assert not wrong and not skipped
    assert len(rows) == 3 * (2 * len(points.STEMS) + len(points.PEERS))
    assert {row["impl"] for row in rows if row["stem"] == "embedding_step"} == set(points.PEERS)
    assert all(row["error_of_allowed"] <= 1 and row["launches"] > 0 and row["bytes_predicted"] > 0 for row in rows)
    assert {row["graph_ms"] for row in rows if row["way"] == "backward"} == {0.0}  # both ways less the forward


def test_no_time_for_a_wrong_result(tiny, monkeypatch):
    good = micro.work

    def one_is_wrong(point, device):
        work = good(point, device)
        if point.impl == "torch" and point.stem == "token_update":
            return dataclasses.replace(work, function=lambda inputs: work.function(inputs) * 1.001)
        return work

    monkeypatch.setattr(micro, "work", one_is_wrong)
    rows, wrong, _ = micro.microbenchmarks(eager(), "cpu", clock)
    assert len(wrong) == 1 and "token_update-torch" in wrong[0] and "no time" in wrong[0]
    assert not [row for row in rows if (row["stem"], row["impl"]) == ("token_update", "torch")]


def test_nan_and_a_wrong_gradient_are_wrong_results(tiny):
    checked = work(next(p for p in eager() if p.stem == "lowrank_update" and p.impl == "torch"), "cpu")
    assert checked.check() <= 1

    def nan(inputs):
        return checked.function(inputs) * float("nan")

    def half_the_gradient(inputs):
        a = inputs["lowrank_a"]
        return checked.function(inputs | {"lowrank_a": a / 2 + a.detach() / 2})

    for function, what in ((nan, "the result"), (half_the_gradient, "gradient of lowrank_a")):
        with pytest.raises(WrongResult, match=what):
            dataclasses.replace(checked, function=function).check()


def test_without_a_compiler_torch_compile_is_skipped_with_the_reason(tiny, monkeypatch):
    monkeypatch.setattr(stems.shutil, "which", lambda name: None)
    compiled = [p for p in points.points("cpu") if p.impl == "compile" and p.axis == "base"]
    rows, wrong, skipped = micro.microbenchmarks(compiled, "cpu", clock)
    assert not rows and not wrong and len(skipped) == len(points.STEMS) and "C++ compiler" in skipped[0]


def test_points_change_one_size_at_a_time_and_have_no_parts_of_other_stems():
    for device in ("cpu", "cuda"):
        found = points.points(device)
        assert len(set(found)) == len(found) and len({str(point) for point in found}) == len(found)
        for point in found:
            base = next(p for p in found if p.axis == "base" and (p.stem, p.impl) == (point.stem, point.impl))
            changed = [f.name for f in dataclasses.fields(point.sizes)
                       if getattr(point.sizes, f.name) != getattr(base.sizes, f.name)]  # fmt: skip
            dept = ["length", "n"] if point.impl == "DePT" else ["length"]  # DePT's pair has as many rows as the text
            assert sorted(changed) == {"base": [], "length": dept}.get(point.axis, [point.axis])
    assert {p.axis for p in points.points("cuda") if p.stem == "prompt_embed"} == {"base", *TINY}
    assert {p.impl for p in points.points("cuda") if p.stem == "prompt_embed"} == {
        "reference", "torch", "compile", "triton",
    }  # fmt: skip


def test_a_name_that_no_point_has_is_one_line(capsys):
    assert main(["cpu", "--parts", "micro", "--points", "prompt_embedding"]) == 2
    error = capsys.readouterr().err
    assert "no microbenchmark has this in its name" in error and error.count("\n") == 1
    assert main(["cpu", "--parts", "end_to_end", "--shapes", "GPT"]) == 2
    assert "choose among MiniLM, T5-small" in capsys.readouterr().err


def test_a_row_has_the_predicted_bytes_as_a_share_of_the_copy_bandwidth(tiny):
    point = next(p for p in eager() if p.stem == "prompt_embed" and p.impl == "torch")
    info = costs.row(point, "both", 0.5, 7, bandwidth=1e9)
    want = traffic.forward(point.sizes).total + traffic.backward(point.sizes).total
    row = timed_entry({"extra_info": info, "stats": {"q1": 0.001, "median": 0.002, "q3": 0.003, "rounds": 5}})
    assert row["bytes_predicted"] == want and row["of_copy_bandwidth"] == pytest.approx(want / 0.002 / 1e9)
    assert (row["median"], row["low"], row["high"], row["unit"]) == (2.0, 1.0, 3.0, "ms")


def table(path, medians, spread=0.1, **more):
    rows = [
        {"stem": "x", "impl": name, "device": "CPU", "threads": 1, "unit": "ms", "rounds": 5, "median": m,
         "low": m * (1 - spread), "high": m * (1 + spread), "clock": "wall", "torch": "2", "commit": "abc"} | more
        for name, m in medians.items()
    ]  # fmt: skip
    records.write(path, rows)
    return records.read(path)


def test_slower_is_what_lies_beyond_the_noise_of_both(tmp_path, capsys):
    a = table(tmp_path / "a" / "micro.csv", {"same": 1.0, "noisy": 1.0, "slower": 1.0, "faster": 1.0, "gone": 1.0})
    b = table(tmp_path / "b" / "micro.csv", {"same": 1.0, "noisy": 1.15, "slower": 1.3, "faster": 0.5, "new": 1.0})
    found = compare(a, b)
    assert [old["impl"] for old, _ in found["slower"]] == ["slower"]
    assert [old["impl"] for old, _ in found["faster"]] == ["faster"]
    assert found["same"] == 2 and found["only"] == (1, 1)
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert "1.30 ×" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "a" / "micro.csv"), str(tmp_path / "a" / "micro.csv")]) == 0


def test_a_row_measured_once_is_never_called_slower(tmp_path):
    a = table(tmp_path / "a.csv", {"x": 1.0}, spread=0.0, rounds=1)
    b = table(tmp_path / "b.csv", {"x": 9.0}, spread=0.0, rounds=1)
    assert compare(a, b)["single"] == 1 and not compare(a, b)["slower"]


def test_tables_that_cannot_be_compared_are_one_line(tmp_path, capsys):
    table(tmp_path / "a.csv", {"x": 1.0})
    table(tmp_path / "b.csv", {"x": 1.0}, device="another CPU")
    (tmp_path / "c.csv").write_text("x,y\n1,2\n")
    (tmp_path / "d.csv").write_text("unit,median,low,high\nms,1,fast,3\n")
    for other, said in (("b.csv", "no row in common"), ("c.csv", "not a result table"), ("d.csv", "line 2: low is 'fast'"),
                        ("none.csv", "does not exist")):  # fmt: skip
        assert main(["compare", str(tmp_path / "a.csv"), str(tmp_path / other)]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1


def test_figures_are_drawn_from_the_tables_alone(tiny, tmp_path, capsys):
    machine = {"device": "CPU", "threads": 1, "clock": "wall", "torch": "2", "commit": "abc"}
    rows, _, _ = micro.microbenchmarks(
        [p for axis in ("base", "s") for p in eager(axis) if p.stem == "prompt_embed"], "cpu", clock
    )
    records.write(tmp_path / "cpu" / "micro.csv", [row | machine for row in rows])
    step = machine | {"shape": "x", "method": "EPT", "median": 2.0, "low": 1.0, "high": 3.0}
    records.write(tmp_path / "cpu" / "end_to_end.csv", [step | {"unit": "ms", "peak_bytes": 5}])
    records.write(
        tmp_path / "cpu" / "ratios.csv",
        [step | {"unit": "ratio", "over": "floor", "goal": goal} for goal in (1.02, "")],
    )
    (tmp_path / "cpu" / "somebody_elses.csv").write_text("x\n1\n")
    assert main(["plot", str(tmp_path / "cpu"), "--output_dir", str(tmp_path / "figures")]) == 0
    drawn = sorted(path.name for path in (tmp_path / "figures" / "cpu").iterdir())
    assert drawn == ["end_to_end.png", "micro-prompt_embed.png", "ratios.png"]
    assert main(["plot", str(tmp_path / "figures")]) == 2
    assert "no result table" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_gpu_benchmark_refuses_in_one_line_without_a_gpu(capsys):
    assert main(["gpu"]) == 2
    error = capsys.readouterr().err
    assert "no GPU here" in error and error.count("\n") == 1
