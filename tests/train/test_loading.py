"""Models as they are given: every weight out of the checkpoint, no code out of a folder, the same
tokens and the same content on both sides of a comparison or a resumption."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import config, save_model, tiny_model, write_data
from tiny_tokenizer import byte_tokenizer

from prefkern.integrations.head import at_head
from prefkern.train import models, train
from prefkern.train.pairing import check_own_logits
from prefkern.train.precompute import precompute
from prefkern.train.recipes.merge import merge_adapters
from prefkern.train.run import prepare
from prefkern.train.sources import contents


@pytest.fixture(scope="module")
def materials(tmp_path_factory):
    folder = tmp_path_factory.mktemp("materials")
    return save_model(folder / "model"), write_data(folder / "pairs.jsonl")


def changed(model: str, folder: Path, edit) -> str:
    """A copy of a model whose weights `edit` changes in place."""
    shutil.copytree(model, folder)
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def settings_of(folder: str, **changes) -> None:
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def plain(name="m"):
    return config("o", name, "d")


def test_missing_weights_are_refused(tmp_path, materials):
    def drop(weights):
        del weights["lm_head.weight"], weights["model.layers.1.mlp.up_proj.weight"]

    with pytest.raises(ValueError, match=r"2 weights of LlamaForCausalLM.*lm_head\.weight"):
        models.load_causal_lm(changed(materials[0], tmp_path / "a", drop), plain())
    deeper = changed(materials[0], tmp_path / "b", lambda w: None)
    settings_of(deeper, num_hidden_layers=3)
    with pytest.raises(ValueError, match=r"weights of LlamaForCausalLM.*layers\.2\."):
        models.load_causal_lm(deeper, plain())
    wider = changed(materials[0], tmp_path / "c", lambda w: None)
    settings_of(wider, intermediate_size=64)
    with pytest.raises(ValueError, match=r"mlp.*where config\.json says"):
        models.load_causal_lm(wider, plain())


def test_layers_beyond_the_settings_are_refused(tmp_path, materials):
    """A model of one layer out of a checkpoint of two would be another one."""
    short = changed(materials[0], tmp_path / "a", lambda w: None)
    settings_of(short, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"weights of layers that config\.json.*layers\.1\."):
        models.load_causal_lm(short, plain())
    more = changed(materials[0], tmp_path / "b", lambda w: w.update(extra=torch.ones(2)))
    assert models.load_causal_lm(more, plain()) is not None


def test_a_model_that_sees_the_tokens_behind_is_refused():
    from transformers import BertConfig, BertLMHeadModel

    sizes = dict(
        vocab_size=260, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, initializer_range=0.5,
    )  # fmt: skip
    for is_decoder in (True, False):
        torch.manual_seed(0)
        model = BertLMHeadModel(BertConfig(**sizes, is_decoder=is_decoder)).eval()
        at_head(model)
        if is_decoder:
            assert check_own_logits(model, plain()) < 1e-4
            continue
        with pytest.raises(ValueError, match=r"BertLMHeadModel.*depends on the tokens behind it"):
            check_own_logits(model, plain())


def test_a_forward_that_fails_is_one_line(monkeypatch):
    """A compiler that is not there, a kernel that the device has not."""
    model = tiny_model()
    at_head(model)

    def broken(*args, **kwargs):
        raise RuntimeError("\nno kernel for this device\nin line 3\nin line 4")

    monkeypatch.setattr(model.model.layers[0], "forward", broken)
    with pytest.raises(ValueError) as told:
        check_own_logits(model, plain("m"), name="some/model")
    assert str(told.value).startswith(
        "some/model (LlamaForCausalLM) cannot read eight tokens here: RuntimeError: no kernel for "
        "this device; another --attn-implementation"
    )


def test_a_reward_model_without_its_head_is_refused(materials, tmp_path):
    from prefkern.train.recipes.online.judges import RewardModel

    with pytest.raises(ValueError, match="has no scores"):
        RewardModel(materials[0], plain(), torch.device("cpu"))


def test_an_encoder_decoder_is_refused(tmp_path):
    import transformers as t

    small = dict(
        vocab_size=260, d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=16,
        decoder_ffn_dim=16, encoder_attention_heads=2, decoder_attention_heads=2,
    )  # fmt: skip
    t.BartForConditionalGeneration(t.BartConfig(**small)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="encoder-decoder model; prefkern needs a decoder"):
        models.load_causal_lm(str(tmp_path), plain())


def test_code_of_a_folder_never_runs(tmp_path, materials):
    """Neither unasked nor under an answer "y" on standard input."""
    hostile = tmp_path / "hostile"
    shutil.copytree(materials[0], hostile)
    code = f"open({str(tmp_path / 'ran')!r}, 'w').write('x')\nclass C: pass\nclass E: pass\n"
    (hostile / "evil.py").write_text(code)
    auto = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.E"}
    settings_of(str(hostile), model_type="evil", auto_map=auto, architectures=["E"])
    path = hostile / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text()) | {
        "tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.E", "evil.E"]},
    }  # fmt: skip
    path.write_text(json.dumps(tokenizer))
    command = [
        sys.executable, "-m", "prefkern", "train", "--model", str(hostile), "--dataset",
        materials[1], "--output-dir", str(tmp_path / "out"), "--device", "cpu",
    ]  # fmt: skip
    done = subprocess.run(command, input="y\n" * 20, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "ran").exists() and not (tmp_path / "out").exists()
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"base_model_name_or_path": str(hostile), "peft_type": "LORA", "r": 2}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="cannot be loaded"):
        models.load_model(str(adapter), plain())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "name", ["/no/such/folder", "./none", "../none", "~/none", "a/b/c", "prefkern-here/none", ""]
)
def test_a_path_that_is_not_there_is_told_at_once(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prefkern-here").mkdir()
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: asked.append(a))
    monkeypatch.setattr(socket.socket, "connect", lambda *a: asked.append(a))
    for load in (models.load_tokenizer, lambda n: models.load_model(n, plain())):
        with pytest.raises(ValueError, match="there is no model folder"):
            load(name)
    assert not asked
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file; pass the model folder"):
        models.load_tokenizer("file")


def test_what_a_library_raises_is_one_line(materials):
    wanted = config("o", "m", "d", attn_implementation="no_such_attention")
    with pytest.raises(ValueError, match=r"model of .* cannot be loaded.*no_such_attention"):
        models.load_causal_lm(materials[0], wanted)


def test_a_model_of_another_kind_is_called_by_its_kind(tmp_path, materials):
    import transformers as t

    small = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    scores = t.LlamaForSequenceClassification(
        t.LlamaConfig(**small, vocab_size=260, num_labels=1, pad_token_id=0)
    )
    scores.save_pretrained(tmp_path / "scores")
    with pytest.raises(ValueError, match="was saved as LlamaForSequenceClassification, which lack"):
        models.load_model(str(tmp_path / "scores"), plain())
    t.ViTModel(t.ViTConfig(**small)).save_pretrained(tmp_path / "vit")
    with pytest.raises(ValueError, match=r"\(vit\) is no causal language model"):
        models.load_model(str(tmp_path / "vit"), plain())


def adapter(materials, folder: Path, seed: int = 0) -> str:
    options = dict(lora_r=2, learning_rate=1e-2, max_steps=2, seed=seed)
    train(config(folder, *materials, **options))
    return str(folder)


def test_the_reference_of_an_adapter_is_the_model_as_given(tmp_path, materials, capfd):
    first = adapter(materials, tmp_path / "sft")
    found = train(config(tmp_path / "dpo", first, materials[1], max_steps=1))
    assert found["log_history"][0]["loss"] == pytest.approx(0.693147, abs=1e-5)
    run = prepare(config(tmp_path / "x", first, materials[1]))
    assert run.facts["reference"] == "model"
    capfd.readouterr()
    asked = config(tmp_path / "y", first, materials[1], max_steps=1, reference="adapter")
    loss = train(asked)["log_history"][0]["loss"]
    assert abs(loss - 0.693147) > 1e-4  # compared with the base
    assert f"the reference is {materials[0]}, without adapter" in capfd.readouterr().err
    # evaluation compares a trained adapter with what it was trained from, and says so
    run = prepare(config(tmp_path / "z", first, materials[1]), training=False)
    assert run.facts["reference"] == "adapter"
    assert "without adapter" in capfd.readouterr().err


def test_an_adapter_that_lacks_matrices_is_refused(tmp_path, materials):
    first = adapter(materials, tmp_path / "one")
    weights = load_file(tmp_path / "one" / "adapter_model.safetensors")
    del weights[sorted(weights)[0]]
    save_file(weights, tmp_path / "one" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="1 weights are not in"):
        models.load_model(first, plain())
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    with pytest.raises(ValueError, match="1 weights are not in"):
        merge_adapters([tmp_path / "one", tmp_path / "two"], tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    (tmp_path / "one" / "adapter_model.safetensors").unlink()
    torch.save(weights, tmp_path / "one" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"1 weights are not in .*adapter_model\.bin"):
        models.load_model(first, plain())


def test_an_adapter_that_is_trained_on_keeps_its_rank(tmp_path, materials):
    first = adapter(materials, tmp_path / "one")
    with pytest.raises(ValueError, match=r"is an adapter of rank 2.* lora_r is 8"):
        models.load_policy(config("o", first, materials[1], lora_r=8), None)
    settings = tmp_path / "one" / "adapter_config.json"
    named = json.loads(settings.read_text()) | {"base_model_name_or_path": "/none/base"}
    settings.write_text(json.dumps(named))
    with pytest.raises(ValueError, match=r"one/adapter_config\.json names its base: there is no"):
        models.load_model(first, plain())


def test_two_tokenizers_that_differ(tmp_path, materials):
    other = tmp_path / "other"
    tiny_model(seed=1).save_pretrained(other)
    byte_tokenizer().save_pretrained(other)
    path = other / "tokenizer.json"
    inner = json.loads(path.read_text())
    vocab = inner["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(inner))
    common = dict(max_steps=1, ref_model=str(other))
    with pytest.raises(ValueError, match=r"tokenizers of .* differ: id \d+ is '[ab]' in the one"):
        prepare(config(tmp_path / "out", *materials, **common))
    # another token at an id that no row holds is no difference to its log-probabilities
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    vocab["Q"], vocab["Z"] = vocab["Z"], vocab["Q"]
    path.write_text(json.dumps(inner))
    prepare(config(tmp_path / "out", *materials, **common))
    with pytest.raises(ValueError, match=r"tokenizers of .* differ: id \d+ is '[QZ]' in the one"):
        prepare(config(tmp_path / "out", *materials, **common, loss=("gkd",)))
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(inner))
    with pytest.raises(ValueError, match=r"tokenizers of .* differ: id \d+ is '[ab]' in the one"):
        precompute(config(tmp_path / "out", *materials, **common))
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.parametrize("option", ["model", "ref_model", "judge", "precomputed_ref", "adapter"])
def test_the_content_behind_an_option(tmp_path, materials, option):
    shutil.copytree(materials[0], tmp_path / "m")
    (tmp_path / "judge.py").write_text("def f(row, answers): return [0.0]")
    (tmp_path / "c.safetensors").write_bytes(b"1")
    base = dict(model=str(tmp_path / "m"), dataset="d")
    extra = {
        "ref_model": dict(ref_model=str(tmp_path / "m"), model="gpt2"),
        "judge": dict(judge=f"{tmp_path}/judge.py:f", round_data="online", model="gpt2"),
        "precomputed_ref": dict(precomputed_ref=str(tmp_path / "c.safetensors"), model="gpt2"),
        "adapter": dict(model=str(tmp_path / "a")),
    }.get(option, {})
    if option == "adapter":
        (tmp_path / "a").mkdir()
        settings = {"base_model_name_or_path": str(tmp_path / "m")}
        (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings))
    given = base | extra
    made = config("o", given.pop("model"), given.pop("dataset"), **given)
    before = contents(made)
    (tmp_path / "m" / "README.md").write_text("said of the model")
    assert contents(made) == before
    touched = {"judge": "judge.py", "precomputed_ref": "c.safetensors"}.get(
        option, "m/model.safetensors"
    )
    with (tmp_path / touched).open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    after = contents(made)
    name = "model" if option == "adapter" else option
    assert before[name] != after[name]


def test_a_model_of_the_hub_is_known_by_its_files(tmp_path, monkeypatch):
    """Not by the commit: a branch may move without them, and files may change in the cache."""
    import huggingface_hub.constants as hub

    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path))
    repo = tmp_path / "models--ann--model"

    def store(commit, files):
        folder = repo / "snapshots" / commit
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
        return contents(config("o", "ann/model", "d")).get("model")

    shards = json.dumps({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}})
    whole = {"config.json": "{}", "model.safetensors": "w"}
    split = {"config.json": "{}", "model.safetensors.index.json": shards, "m-1.safetensors": "w",
             "m-2.safetensors": "x"}  # fmt: skip
    assert contents(config("o", "ann/model", "d")) == {}
    first = store("c1", whole)
    assert first == store("c2", whole)
    assert store("c2", {"README.md": "new", "consolidated.safetensors": "w"}) == first
    assert store("c2", {"model.safetensors": "v"}) != first
    assert store("c3", split) != first
    before = store("c3", {})
    assert store("c3", {"m-2.safetensors": "y"}) != before
    assert store("c4", {"config.json": "{}"}) != store("c5", {"config.json": "{}"})  # no weights
    base = {"adapter_config.json": json.dumps({"base_model_name_or_path": str(tmp_path / "base")}),
            "adapter_model.safetensors": "a"}  # fmt: skip
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_text("w")
    adapter = store("c6", base)
    (tmp_path / "base" / "model.safetensors").write_text("v")
    assert store("c6", {}) != adapter


def test_the_content_of_a_judge_in_a_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    made = config("o", "gpt2", "d", judge="judge_of_tests:f", round_data="online")
    assert contents(made).keys() <= {"model"}  # no such module yet
    (tmp_path / "judge_of_tests.py").write_text("def f(row, answers): return [0.0]")
    before = contents(made)["judge"]
    (tmp_path / "judge_of_tests.py").write_text("def f(row, answers): return [1.0]")
    assert contents(made)["judge"] != before


def test_a_reference_that_changed_is_not_continued_with(tmp_path, materials):
    reference = changed(materials[0], tmp_path / "ref", lambda w: None)
    out = tmp_path / "out"
    common = dict(max_steps=2, save_steps=1, reference="model", ref_model=reference)
    train(config(out, *materials, **common))
    shutil.rmtree(out / "checkpoint-2")
    again = config(out, *materials, **common | {"resume_from_checkpoint": "auto"})

    def move(weights):
        weights["lm_head.weight"] += 0.01

    changed(reference, tmp_path / "moved", move)
    shutil.rmtree(reference)
    shutil.move(tmp_path / "moved", reference)
    with pytest.raises(
        ValueError, match=r"content of ref_model .*ref changed since the checkpoint"
    ):
        train(again)
