"""What `ept plan` predicts beside what a training step really takes with the default preset, on the CPU.

    python -m bench.steps.plan_memory [--only bert-base] [--batch 8] [--length 128]
    python -m bench.steps.plan_memory --recorded bench/results/nvidia-h200/end_to_end.csv

Each case is a process of its own that trains three steps (forward, backward, AdamW) on padded rows, and measures the
third in two ways: `peak`, from every allocation and release that torch's profiler records; `rss`, the process's highest
resident memory in the second step over that before the model was made (rough: it holds what the allocator keeps, too).
Weights and Adam's moments are added up from the real tensors. Appends one JSON line per case to
bench/results/plan.jsonl; exits with 1 if a prediction is off by more than 15 %.

`--recorded` measures nothing: it holds the prediction for the kernels against the peaks of the default preset's steps in
a GPU's table of whole steps. Those leave out what stands before a step (weights, Adam's moments), which is added as
predicted. The lines have the machine and commit of the table, and `predicted_by`, the commit that predicts.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.profiler import ProfilerActivity, profile
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    T5Config,
)

from ept import EPTConfig, get_ept_model
from ept.backbone.embeddings import embedding_width
from ept.inspect.memory import plan_step
from ept.machine import commit, describe
from ept.model.fresh import config_for_budget
from ept.training.rates import parameter_groups

from ..tables import records
from ..text.real_text import minilm
from .methods import BUDGET_ROWS
from .shapes import GPU_SHAPES, Shape, batch_of

__all__ = ["profiled_peak"]

RESULTS = Path(__file__).parents[1] / "results" / "plan.jsonl"
WITHIN = 0.15

# What the configs take without naming it.
STARTS: dict[str, Any] = {"decoder_start_token_id": 0}
ROTARY: dict[str, Any] = {"rope_theta": 100000.0}

# MiniLM has its real weights; the others are seeded weights in the shapes of the published models.
CONFIGS = {
    "minilm-l6": lambda: AutoConfig.from_pretrained(minilm()),
    "t5-small": lambda: T5Config(pad_token_id=0, **STARTS),
    "bert-base": lambda: BertConfig(),
    "smollm2-135m": lambda: LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=8192, tie_word_embeddings=True, pad_token_id=2, **ROTARY,
    ),
}  # fmt: skip
DTYPES = ("float32", "bfloat16")


def build(name: str, dtype: str) -> tuple[PreTrainedModel, bool]:
    """The backbone, and whether its labels are tokens."""
    torch.manual_seed(0)
    config, dtype = CONFIGS[name](), getattr(torch, dtype)
    if name == "minilm-l6":
        return AutoModelForSequenceClassification.from_pretrained(minilm(), dtype=dtype), False
    if isinstance(config, BertConfig):
        return AutoModelForSequenceClassification.from_config(config, dtype=dtype), False
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config, dtype=dtype), True


def profiled_peak(step: Any) -> int:
    """The most bytes that torch holds at once during `step()`, over what it held at its start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "trace.json"
        recorded.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    live = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        live += event["args"]["Bytes"]
        peak = max(peak, live)
    return peak


def measure(name: str, dtype: str, checkpointing: bool, batch: int, length: int) -> dict[str, int]:
    """Bytes of the third training step, in this process."""
    before = _resident("VmRSS")
    backbone, per_token = build(name, dtype)
    backbone.config.use_cache = False
    model = get_ept_model(backbone, EPTConfig()).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(parameter_groups(model), fused=True)
    ids = torch.randint(5, model.config.vocab_size, (batch, length))
    mask = torch.ones_like(ids)
    mask[-1, length // 2 :] = 0
    labels = ids.clone() if per_token else torch.zeros(batch, dtype=torch.int64)

    def step() -> None:
        model(input_ids=ids, attention_mask=mask, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident memory counts from here
    step()
    resident = _resident("VmHWM") - before
    tensor_bytes = {id(t): t.nbytes for t in (*model.parameters(), *model.buffers())}
    tensor_bytes |= {id(v): v.nbytes for state in optimizer.state.values() for v in state.values()}
    return {"peak": sum(tensor_bytes.values()) + profiled_peak(step), "rss": resident}


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(which))


def of_table(path: Path) -> list[dict[str, Any]]:
    """Lines of plan.jsonl for the default preset's steps in a GPU's table. ValueError: it is of another transformers,
    whose models may keep other tensors."""
    shapes = {shape.name: shape for shape in GPU_SHAPES}
    lines = []
    for row in records.read(path):
        if row["method"] != "EPT deep" or not row["peak_bytes"]:
            continue
        if row["transformers"] != transformers.__version__:
            raise ValueError(f"{path} is of transformers {row['transformers']}, here is {transformers.__version__}")
        planned = _plan_of_shape(shapes[row["shape"]])
        assert planned["trained"] == int(row["trained_parameters"])
        measured = planned["weights"] + planned["adapter"] + int(row["peak_bytes"])
        line = {"model": row["shape"], "dtype": row["dtype"], "checkpointing": False, "preset": "default"}
        line |= {"batch": int(row["batch"]), "length": int(row["length"]), "predicted": planned}
        line |= {"measured": {"peak": measured}, "off": planned["peak"] / measured - 1}
        line |= {name: row[name] for name in describe()}
        lines.append(line | {"threads": int(row["threads"]), "predicted_by": commit(Path(__file__).parent)})
    return lines


def _plan_of_shape(shape: Shape) -> dict[str, int]:
    """What is planned for the default preset, by the budget that its benchmark has, as kernels."""
    assert shape.config is not None
    config, labels = shape.config(), batch_of(shape, "cpu")["labels"]
    with torch.device("meta"):
        model = AutoModel.from_config(config)
    return plan_step(
        config,
        config_for_budget(model, BUDGET_ROWS * embedding_width(model.get_input_embeddings()), preset="deep"),
        batch=shape.batch, length=shape.length, target_length=labels.shape[1] if shape.task == "SEQ_2_SEQ_LM" else None,
        task="classification" if shape.task == "SEQ_CLS" else None, dtype=str(shape.dtype).removeprefix("torch."), kernels=True,
    )  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CONFIGS, help="one model alone")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--recorded", type=Path, help="a GPU's end_to_end.csv, in place of measuring")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)  # what the process of a case is told
    args = parser.parse_args()
    if args.measure:
        name, dtype, checkpointing = args.measure
        print(json.dumps(measure(name, dtype, checkpointing == "True", args.batch, args.length)))
        return 0
    if args.recorded:
        lines = of_table(args.recorded)
        for line in lines:
            _keep(line)
        return int(max(abs(line["off"]) for line in lines) > WITHIN)
    worst, machine = 0.0, describe()
    for name in CONFIGS if args.only is None else [args.only]:
        config: PreTrainedConfig = CONFIGS[name]()
        for dtype in DTYPES:
            for checkpointing in (False, True):
                sizes = ["--batch", str(args.batch), "--length", str(args.length)]
                process = subprocess.run(
                    [sys.executable, "-m", "bench.steps.plan_memory", *sizes, "--measure", name, dtype, str(checkpointing)],
                    stdout=subprocess.PIPE, text=True, check=True,
                )  # fmt: skip
                measured = json.loads(process.stdout.splitlines()[-1])
                planned = plan_step(
                    config,
                    EPTConfig(),
                    batch=args.batch,
                    length=args.length,
                    dtype=dtype,
                    checkpointing=checkpointing,
                )
                off = planned["peak"] / measured["peak"] - 1
                worst = max(worst, abs(off))
                line = {"model": name, "dtype": dtype, "checkpointing": checkpointing, "batch": args.batch}
                line |= {
                    "length": args.length,
                    "preset": "default",
                    "predicted": planned,
                    "measured": measured,
                    "off": off,
                }
                _keep(line | machine)
    return int(worst > WITHIN)


def _keep(line: dict[str, Any]) -> None:
    """Adds a line to plan.jsonl, and prints it."""
    with open(RESULTS, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    planned, measured = line["predicted"]["peak"], line["measured"]
    resident = f"  rss {measured['rss'] / 1e6:7.1f} MB" if "rss" in measured else ""
    print(
        f"{line['model']:13} {line['dtype']:9} checkpointing {line['checkpointing']!s:5}  predicted {planned / 1e6:7.1f} MB  "
        f"measured {measured['peak'] / 1e6:7.1f} MB ({line['off']:+.1%}){resident}"
    )


if __name__ == "__main__":
    sys.exit(main())
