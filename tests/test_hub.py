"""Adapters on the hub, by the real client library against a hub on this machine."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers as hf
from hub_stand_in import TOKEN, Hub, Repository, reach
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.errors import LocalEntryNotFoundError
from test_peft_format import of_peft

from ept import AutoEPTModel, EPTModel, EPTTrainer, EPTTrainingArguments, from_peft, get_ept_model, read_soft_prompt
from ept.cli import main
from tiny_models import all_parts, ids, wrapped
from tiny_text import reviews, save_model, write_csv

AUTO = hf.AutoModelForSequenceClassification
NAME = "me/reviews"
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(scope="module")
def server():
    with Hub() as hub:
        yield hub


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    """The stand-in without repositories, an empty cache, and no token."""
    server.repositories, server.requests, server.is_full = {}, [], False
    reach(monkeypatch, server.url, tmp_path / "cache")
    return server


@pytest.fixture(scope="module")
def backbone_dir(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("hub") / "bert", "bert", AUTO, num_labels=2)


def base(backbone_dir):
    return AUTO.from_pretrained(backbone_dir)


@pytest.fixture(scope="module")
def model(backbone_dir):
    return wrapped(base(backbone_dir))


def logits(model):
    with torch.no_grad():
        return model(input_ids=ids(2, 6)).logits


def refused(capsys, argv) -> str:
    with pytest.raises(SystemExit) as stopped:
        main([str(word) for word in argv])
    said = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert stopped.value.code == 2 and said.startswith("ept ")
    return said


# ---------------------------------------------------------------- push and load


def test_what_is_pushed_loads_by_its_name_and_gives_the_same_logits(hub, model, backbone_dir):
    commit = model.push_to_hub(NAME, token=TOKEN, commit_message="first", private=True, tags=["film"])
    repository = hub.repositories[NAME]
    assert sorted(repository.files()) == FILES and repository.private and repository.messages == ["first"]
    assert commit.oid == repository.branches["main"]
    assert {token for method, _, token in hub.requests if method != "PUT"} == {TOKEN}  # a PUT's address is its right

    hub.requests.clear()
    loaded = EPTModel.from_pretrained(base(backbone_dir), NAME, token=TOKEN).eval()
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    assert {token for method, _, token in hub.requests} == {TOKEN}
    assert sorted(path for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path) == [
        f"/{NAME}/resolve/{commit.oid}/{name}" for name in FILES[1:]
    ]
    torch.testing.assert_close(logits(AutoEPTModel.from_pretrained(NAME, token=TOKEN)), logits(model), rtol=0, atol=0)


def test_a_revision_is_made_and_read_apart_from_the_main_branch(hub, model, backbone_dir):
    other = wrapped(base(backbone_dir), seed=5)
    model.push_to_hub(NAME, token=TOKEN)
    first = hub.repositories[NAME].branches["main"]
    other.push_to_hub(NAME, token=TOKEN, revision="v2")
    loaded = {
        revision: logits(EPTModel.from_pretrained(base(backbone_dir), NAME, revision=revision).eval())
        for revision in (None, "main", "v2", first)
    }
    torch.testing.assert_close(loaded["v2"], logits(other), rtol=0, atol=0)
    for revision in (None, "main", first):
        torch.testing.assert_close(loaded[revision], logits(model), rtol=0, atol=0)
    model.load_adapter(NAME, "second", revision="v2")
    try:
        with torch.no_grad():
            mixed = model(input_ids=ids(2, 6), adapter_ids=["default", "second"]).logits
        torch.testing.assert_close(mixed, torch.stack([logits(model)[0], logits(other)[1]]))
    finally:
        model.delete_adapter("second")


def test_a_cached_adapter_loads_offline_and_another_cache_has_none(hub, model, backbone_dir, tmp_path, monkeypatch):
    model.push_to_hub(NAME, token=TOKEN)
    kept = {"cache_dir": tmp_path / "kept"}
    EPTModel.from_pretrained(base(backbone_dir), NAME, **kept)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    loaded = AutoEPTModel.from_pretrained(NAME, **kept)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=0)
    with pytest.raises(
        ConnectionError, match=r"^me/reviews is no directory here.*HF_HUB_OFFLINE is set, and the cache has no"
    ):
        AutoEPTModel.from_pretrained(NAME)
    assert not hub.requests


def test_a_private_backbone_comes_from_the_hub_with_the_same_token(hub, backbone_dir, tmp_path):
    hub.repositories["me/bert"] = Repository(private=True)
    hub.repositories["me/bert"].commit("main", {path.name: path.read_bytes() for path in Path(backbone_dir).iterdir()})
    model = wrapped(AUTO.from_pretrained("me/bert", token=TOKEN))
    model.push_to_hub(NAME, token=TOKEN)
    shutil.rmtree(tmp_path / "cache")
    settings = {"token": TOKEN, "cache_dir": tmp_path / "kept"}
    torch.testing.assert_close(logits(AutoEPTModel.from_pretrained(NAME, **settings)), logits(model), rtol=0, atol=0)
    assert not (tmp_path / "cache" / "models--me--bert").exists()
    assert {path.name for path in (tmp_path / "kept").glob("models--*")} == {"models--me--bert", "models--me--reviews"}
    with pytest.raises(OSError, match="me/bert"):
        AutoEPTModel.from_pretrained(NAME)


def test_a_directory_wins_over_a_repository_of_its_name(hub, model, backbone_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model.save_pretrained(NAME)
    torch.testing.assert_close(logits(AutoEPTModel.from_pretrained(NAME)), logits(model), rtol=0, atol=0)
    assert not hub.requests
    with pytest.raises(ValueError, match="`revision=v2` is of a repository on the hub, but me/reviews is here"):
        AutoEPTModel.from_pretrained(NAME, revision="v2")


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("me/absent", {}, FileNotFoundError, "no directory here.*no such repository, or it is private; log in with hf auth"),
        ("me/absent", {"token": TOKEN}, FileNotFoundError, "no such repository"),
        ("me/private", {}, FileNotFoundError, "no such repository, or it is private"),
        ("me/private", {"token": "hf_another"}, FileNotFoundError, "no such repository, or it is private"),
        ("me/gated", {}, PermissionError, "it is gated; ask for access"),
        ("me/private", {"token": TOKEN, "revision": "v9"}, FileNotFoundError, "no branch, tag or commit v9"),
        ("me/model", {}, FileNotFoundError, "me/model on the hub holds no adapter: it has no adapter_config.json"),
        ("runs/of/mine", {}, FileNotFoundError, "holds no adapter_config.json: there is no such directory"),
        ("adapter", {}, FileNotFoundError, "holds no adapter_config.json: there is no such directory"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_one_clear_error(hub, name, settings, error, message):
    hub.repositories |= {
        "me/private": Repository(private=True),
        "me/model": Repository(),
        "me/gated": Repository(gated=True),
    }
    for repository in hub.repositories.values():
        repository.commit("main", {"config.json": b"{}"})
    hub.repositories["me/gated"].commit("main", {"adapter_config.json": b"{}"})
    with pytest.raises(error, match=message) as raised:
        AutoEPTModel.from_pretrained(name, **settings)
    assert "\n" not in str(raised.value)


def test_a_hub_that_does_not_answer_or_refuses_is_one_clear_error(hub, model, tmp_path, monkeypatch):
    with pytest.raises(PermissionError, match=r"^me/reviews cannot be written on the hub: Invalid username.*; log in"):
        model.push_to_hub(NAME, token="hf_another")
    hub.is_full = True
    with pytest.raises(
        OSError, match=r"^me/reviews cannot be written on the hub: Error while uploading 'adapter_model"
    ):
        model.push_to_hub(NAME, token=TOKEN)
    assert not hub.repositories[NAME].files()  # nor anything else of it
    reach(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(ConnectionError, match=r"http://127.0.0.1:9 cannot be reached, and the cache has no copy"):
        AutoEPTModel.from_pretrained(NAME)
    with pytest.raises(
        ConnectionError, match=r"^me/reviews cannot be written on the hub: http://127.0.0.1:9 cannot be"
    ):
        model.push_to_hub(NAME, token=TOKEN)


def test_a_model_card_names_the_backbone_and_keeps_what_was_written(hub, model, backbone_dir, caplog):
    with caplog.at_level(logging.WARNING, logger="ept"):
        model.push_to_hub("me/local", token=TOKEN)
        model.push_to_hub("me/local", token=TOKEN)
    (warning,) = caplog.messages
    assert (
        f"names its backbone {backbone_dir}, a directory of this machine: others have to give `name_or_path`" in warning
    )
    assert "base_model" not in ModelCard(hub.repositories["me/local"].files()["README.md"].decode()).data.to_dict()
    caplog.clear()
    named = get_ept_model(base(backbone_dir), all_parts())
    named.config._name_or_path = "someone/bert"
    named.push_to_hub(NAME, token=TOKEN, tags=["film"])
    assert not caplog.records
    card = ModelCard(hub.repositories[NAME].files()["README.md"].decode())
    assert card.data.to_dict() == {
        "base_model": "someone/bert",
        "library_name": "ept",
        "pipeline_tag": "text-classification",
        "tags": ["ept", "prompt-tuning", "film"],
    }
    assert f'AutoEPTModel.from_pretrained("{NAME}"' in card.text
    card.text, card.data["license"] = card.text + "\nMine.\n", "mit"
    hub.repositories[NAME].commit("main", {"README.md": str(card).encode()})
    named.push_to_hub(NAME, token=TOKEN)
    again = ModelCard(hub.repositories[NAME].files()["README.md"].decode())
    assert again.text == card.text and again.data["license"] == "mit" and again.data["tags"][-1] == "film"


def test_a_model_card_that_cannot_be_read_is_not_written_over(hub, model, monkeypatch):
    model.push_to_hub(NAME, token=TOKEN)
    hub.repositories[NAME].commit("main", {"README.md": b"Mine."})

    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("connection error, and nothing in the cache")

    monkeypatch.setattr(HfApi, "hf_hub_download", unreachable)
    with pytest.raises(ConnectionError, match="me/reviews cannot be written on the hub"):
        model.push_to_hub(NAME, token=TOKEN)
    assert hub.repositories[NAME].files()["README.md"] == b"Mine."


def test_adapters_to_start_from_and_those_of_peft_are_read_from_the_hub(hub, model, backbone_dir, tmp_path):
    model.push_to_hub(NAME, token=TOKEN)
    started = get_ept_model(base(backbone_dir), all_parts(init="adapters"), init_adapters=[NAME])
    torch.testing.assert_close(started.ept.prompt, model.ept.prompt)
    of_peft("seq_cls", tmp_path / "peft").base_model.save_pretrained(tmp_path / "backbone")
    peft_files = {path.name: path.read_bytes() for path in (tmp_path / "peft").iterdir()}
    settings = json.loads(peft_files["adapter_config.json"]) | {"base_model_name_or_path": str(tmp_path / "backbone")}
    peft_files["adapter_config.json"] = json.dumps(settings).encode()
    hub.repositories["me/peft"] = Repository()
    hub.repositories["me/peft"].commit("main", peft_files)
    want = read_soft_prompt(tmp_path / "peft")
    assert torch.equal(read_soft_prompt("me/peft"), want)
    backbone = AUTO.from_pretrained(tmp_path / "backbone")
    assert torch.equal(
        from_peft(backbone, "me/peft").ept.prompt * 1, from_peft(backbone, tmp_path / "peft").ept.prompt * 1
    )
    assert main(["import", "--adapter", "me/peft", "--output_dir", str(tmp_path / "as-ept")]) == 0
    assert (tmp_path / "as-ept" / "adapter_config.json").is_file()
    with pytest.raises(ValueError, match="holds a PEFT adapter"):
        AutoEPTModel.from_pretrained("me/peft")


# ---------------------------------------------------------------- the commands and the trainers


def test_a_command_trains_pushes_and_the_others_take_the_name(hub, tmp_path, monkeypatch, capsys):
    reach(monkeypatch, hub.url, tmp_path / "cache", TOKEN)
    place = save_model(tmp_path / "mean", pooling=True)
    data = write_csv(tmp_path / "rows.csv", reviews(12))
    train = [
        "train", "--model_name_or_path", place, "--train_file", data, "--output_dir", str(tmp_path / "out"),
        "--max_steps", "2", "--save_steps", "1", "--disable_tqdm", "true", "--use_cpu", "--token_rank", "4",
        "--push_to_hub", "true", "--hub_model_id", NAME, "--hub_token", TOKEN, "--hub_private_repo", "true",
    ]  # fmt: skip
    assert main(train) == 0
    repository = hub.repositories[NAME]
    own = [*FILES, "run.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(repository.files()) == own and repository.private
    assert repository.messages[-1] == "End of training" and "Training in progress, step 1" in repository.messages
    card = ModelCard(repository.files()["README.md"].decode())
    assert card.data["library_name"] == "ept" and "AutoEPTModel" in card.text and "Training procedure" in card.text
    assert TOKEN.encode() not in b"".join(repository.files().values())
    for name in ("run.json", "training_args.bin"):
        assert TOKEN.encode() not in (tmp_path / "out" / name).read_bytes()
    record = json.loads(repository.files()["run.json"])
    assert record["metrics"] == json.loads((tmp_path / "out" / "run.json").read_text())["metrics"]

    capsys.readouterr()
    results = {}
    for adapter in (str(tmp_path / "out"), NAME):
        assert main(["predict", "--adapter", adapter, "--input_file", data]) == 0
        results[adapter] = capsys.readouterr().out
    assert results[NAME] == results[str(tmp_path / "out")]
    assert main(["eval", "--adapter", NAME, "--test_file", data]) == 0
    assert main(["fold", "--adapter", NAME, "--output_dir", str(tmp_path / "folded")]) == 0
    assert (tmp_path / "folded" / "run.json").is_file()

    with monkeypatch.context() as offline:
        offline.setattr(constants, "HF_HUB_OFFLINE", True)
        assert main(["predict", "--adapter", NAME, "--input_file", data]) == 0
        assert capsys.readouterr().out.endswith(results[NAME])

    repository.commit("v2", {"run.json": b"{}"})
    for command in (["eval", "--test_file", data], ["predict"]):
        said = refused(capsys, [*command, "--adapter", NAME, "--revision", "v9"])
        assert "no branch, tag or commit v9" in said
    assert main(["inspect", NAME, "--revision", "v2", "--nearest", "0"]) == 0
    monkeypatch.delenv("HF_TOKEN")
    shutil.rmtree(tmp_path / "cache")
    new = ["--output_dir", tmp_path / "new"]
    for command in (["eval", "--test_file", data], ["predict"], ["fold", *new], ["inspect"], ["import", *new]):
        assert "no such repository, or it is private" in refused(capsys, [*command, "--adapter", NAME])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("fault", ["unreachable", "refuses"])
def test_a_hub_that_cannot_be_written_is_said_before_the_first_step(
    hub, backbone_dir, tmp_path, monkeypatch, capsys, fault
):
    if fault == "unreachable":
        reach(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    monkeypatch.setattr("ept.training.trainer.EPTTrainer.train", None)  # is not reached
    train = [
        "train", "--model_name_or_path", backbone_dir, "--train_file", write_csv(tmp_path / "rows.csv", reviews(8)),
        "--output_dir", tmp_path / "out", "--use_cpu", "--push_to_hub", "true", "--hub_model_id", NAME,
        "--hub_token", TOKEN if fault == "unreachable" else "hf_another",
    ]  # fmt: skip
    reason = {"unreachable": "http://127.0.0.1:9 cannot be reached", "refuses": "Invalid username or password"}[fault]
    assert f"error: {NAME} cannot be written on the hub: {reason}" in refused(capsys, train)


def test_a_hub_that_fails_later_leaves_the_adapter_and_its_metrics(hub, backbone_dir, tmp_path, monkeypatch, capsys):
    def vanish(self, *args, **kwargs):
        reach(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")

    monkeypatch.setattr("ept.training.trainer.EPTTrainer.train", vanish)
    train = [
        "train", "--model_name_or_path", backbone_dir, "--train_file", write_csv(tmp_path / "rows.csv", reviews(8)),
        "--output_dir", tmp_path / "out", "--use_cpu", "--push_to_hub", "true", "--hub_model_id", NAME, "--hub_token", TOKEN,
    ]  # fmt: skip
    said = refused(capsys, train)
    assert "http://127.0.0.1:9 cannot be reached" in said and f"the adapter is saved in {tmp_path / 'out'}" in said
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and (tmp_path / "out" / "run.json").is_file()


def test_a_trainer_pushes_checkpoints_without_the_token(hub, model, tmp_path):
    rows = [{"input_ids": ids(1, 5, seed=i)[0].tolist(), "labels": i % 2} for i in range(4)]
    args = EPTTrainingArguments(
        str(tmp_path / "out"), max_steps=1, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True, push_to_hub=True,
        hub_model_id=NAME, hub_token=TOKEN, hub_strategy="all_checkpoints", hub_always_push=True,
    )  # fmt: skip
    trainer = EPTTrainer(model, args, train_dataset=rows)
    trainer.train()
    (tmp_path / "out" / "other").mkdir()
    for name in ("notes.txt", "other/spiece.model"):
        (tmp_path / "out" / name).write_text("mine")
    trainer.push_to_hub()
    files = hub.repositories[NAME].files()
    assert {"adapter_config.json", "checkpoint-1/adapter_config.json", "checkpoint-1/optimizer.pt"} <= set(files)
    assert not {"training_args.bin", "notes.txt", "other/spiece.model"} & set(files)
    assert TOKEN.encode() not in b"".join(files.values())
    assert args.hub_token == TOKEN
