"""Pictures through the trainer: log-probabilities against the model's own full logits, a task that
only the picture decides, every bad row and every option that does not go with them."""

from __future__ import annotations

import io
import json
import re
import shutil

import pytest
import torch
from tiny_models import config, save_model
from tiny_vision import FAMILIES, picture, qwen2_vl, save_vision, write_pictures

from prefkern.integrations.head import at_head
from prefkern.train import train
from prefkern.train.data import Loader, collate
from prefkern.train.data.vision import Vision
from prefkern.train.evaluate import evaluate
from prefkern.train.forward import target_logps
from prefkern.train.models import load_processor, load_tokenizer
from prefkern.train.precompute import precompute
from prefkern.train.recipes.kto_baseline import mismatch
from prefkern.train.run import prepare

LEARN = dict(
    image_column="image", learning_rate=3e-3, num_train_epochs=9, per_device_train_batch_size=12,
    loss_args={"beta": 1.0}, per_device_eval_batch_size=12, eval_split="train",
)  # fmt: skip


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    save_vision(folder / "model")
    write_pictures(folder / "data", 36)
    write_pictures(folder / "data", 12, seed=5)
    return folder


def user(*parts):
    found = [{"type": "image"} if p is None else {"type": "text", "text": p} for p in parts]
    return [{"role": "user", "content": found}]


def answer(text):
    return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_log_probabilities_are_those_of_full_logits(family, tmp_path):
    """Each sequence alone through processor and model, against the trainer's padded batch; two
    pictures in one row, one in the other, a picture of its own for the rejected answer."""
    name = save_vision(tmp_path / "m", family)
    for colour in "rgb":
        picture(colour).save(tmp_path / f"{colour}.png")
    rows = [
        {"prompt": user("one ", None, " two ", None), "chosen": answer("red, blue"),
         "rejected": answer("no"), "image": ["r.png", "b.png"]},
        {"prompt": user("colour?"), "chosen": answer("green"), "rejected": answer("green"),
         "image": "g.png", "image_rejected": "b.png"},
    ]  # fmt: skip
    data = tmp_path / "d.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = prepare(config(tmp_path / "o", name, str(data), image_column="image", max_length=128))
    micro = run.micro_batch(run.examples)
    got = target_logps(run.step.policy, micro.batch, backend="eager")
    reference = run.constants(micro)[0].states
    with reference.gathered() as head:
        ref = (reference.hidden @ head.weight.T).log_softmax(-1)
    model, processor = FAMILIES[family]()
    texts = [("[user]one {} two {}", "red, blue", "rb"), ("[user]one {} two {}", "no", "rb"),
             ("[user]{}colour?", "green", "g"), ("[user]{}colour?", "green", "b")]  # fmt: skip
    for i, (prompt, said, colours) in enumerate(texts):
        text = prompt.replace("{}", processor.image_token) + f"</s>[assistant]{said}</s>"
        inputs = processor(
            text=[text], images=[[picture(c) for c in colours]], return_tensors="pt",
            add_special_tokens=False,
        )  # fmt: skip
        with torch.no_grad():
            logp = model(**inputs).logits[0, :-1].log_softmax(-1)
        ids, count = inputs["input_ids"][0], len(said) + 1
        want = logp.gather(1, ids[1:, None])[-count:, 0]
        at = micro.batch.targets[i] != -100
        torch.testing.assert_close(got[i][at], want, atol=2e-5, rtol=0)
        theirs = ref[i].gather(1, micro.batch.targets[i].clamp(min=0)[:, None])[:, 0][at]
        torch.testing.assert_close(theirs, want, atol=2e-5, rtol=0)
    # the two sides of the second row differ by their pictures alone
    assert (got[2] - got[3]).abs().max() > 1e-3


def test_pictures_of_several_sizes(tmp_path):
    """Qwen2-VL: patches of all pictures in one tensor, token types, the model's own positions."""
    model, processor = qwen2_vl()
    at_head(model)
    for name, size in (("wide", (24, 8)), ("small", (8, 8))):
        picture("r" if name == "wide" else "b", size=size).save(tmp_path / f"{name}.png")
    rows = [
        {"prompt": "<image> and <image>?", "chosen": "red", "rejected": "no",
         "image": ["wide.png", "small.png"]},
        {"prompt": "what is <image>?", "chosen": "blue", "rejected": "r", "image": "small.png"},
    ]  # fmt: skip
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    loader = Loader(tokenizer=processor.tokenizer, vision=Vision(processor, "image"))
    examples = loader.load(tmp_path / "d.jsonl").examples
    batch = collate(examples, packed=False)
    grids = batch.inputs["image_grid_thw"].tolist()
    assert len(grids) == 6 and grids[0] != grids[1] == grids[4]
    assert batch.inputs["mm_token_type_ids"].sum(1).unique().numel() == 2
    got = target_logps(model, batch, backend="eager")
    for i, (row, said) in enumerate((r, r[s]) for r in rows for s in ("chosen", "rejected")):
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        opened = [
            picture("r", size=(24, 8)) if n[0] == "w" else picture("b", size=(8, 8)) for n in names
        ]
        inputs = processor(
            text=[f"{row['prompt']}{said}</s>"], images=[opened], return_tensors="pt"
        )
        with torch.no_grad():
            logp = model(**inputs).logits[0, :-1].log_softmax(-1)
        want = logp.gather(1, inputs["input_ids"][0, 1:, None])[-len(said) - 1 :, 0]
        torch.testing.assert_close(got[i][batch.targets[i] != -100], want, atol=2e-5, rtol=0)


def test_dpo_learns_what_the_picture_shows_and_resumes(given, tmp_path):
    model, data = str(given / "model"), given / "data"
    options = LEARN | dict(max_steps=16, eval_dataset=str(data / "pairs5.jsonl"), save_steps=8)
    train(config(tmp_path / "whole", model, str(data / "pairs0.jsonl"), **options))
    log = [
        json.loads(x)
        for x in (tmp_path / "whole" / "log_history.jsonl").read_text().split("\n")
        if x
    ]
    accuracies = [row["eval_rewards/accuracies"] for row in log if "eval_rewards/accuracies" in row]
    assert accuracies[-1] == 1.0 and log[0]["eval_length_baseline"] == 0.5
    # the same rows with pictures of the rejected colour: the answers change sides
    rows = [json.loads(line) for line in (data / "pairs5.jsonl").read_text().splitlines()]
    table = given / "data" / "swapped.jsonl"
    swapped = [
        row | {"image": f"{row['rejected']}0_{'rgb'.index(row['rejected'])}.png"} for row in rows
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    final = str(tmp_path / "whole")
    run = prepare(
        config(tmp_path / "e", final, str(table), ref_model=model, **LEARN), training=False
    )
    assert evaluate(run, run.examples)["eval_rewards/accuracies"] == 0.0
    start = str(tmp_path / "whole" / "checkpoint-8")
    options["resume_from_checkpoint"] = start
    train(config(tmp_path / "again", model, str(data / "pairs0.jsonl"), **options))
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "again"))
    assert one == two
    (data / "g5_1.png").touch()
    changed = data / "r0_0.png"
    kept = changed.read_bytes()
    try:
        picture("b").save(changed)
        with pytest.raises(ValueError, match="the data"):
            train(config(tmp_path / "third", model, str(data / "pairs0.jsonl"), **options))
    finally:
        changed.write_bytes(kept)


def test_mm_dpo_learns_from_the_other_picture(given, tmp_path):
    """The picture's term alone: the answer becomes likelier under its own picture."""
    others = {"r": "g", "g": "b", "b": "r"}
    cond = {
        "image_cond": lambda i, right, wrong: f"{others[right]}0_{'rgb'.index(others[right])}.png"
    }
    data = write_pictures(tmp_path / "data", 36, **cond)
    model = str(given / "model")
    args = {"beta": 1.0, "w_text": 0.0, "w_anchor": 0.0}
    options = LEARN | dict(loss=("mm_dpo",), loss_args=args, max_steps=16)
    train(config(tmp_path / "o", model, str(data), **options))
    held_out = write_pictures(
        tmp_path / "data", 12, seed=5, image_rejected=cond["image_cond"],
        rejected=lambda i, right, wrong: right,
    )  # fmt: skip
    run = prepare(
        config(tmp_path / "e", str(tmp_path / "o"), str(held_out), ref_model=model, **LEARN),
        training=False,
    )
    found = evaluate(run, run.examples)
    assert found["eval_rewards/accuracies"] == 1.0 and found["eval_rewards/margins"] > 1.0
    bad = write_pictures(tmp_path / "data", 4, seed=9)
    with pytest.raises(ValueError, match="'image_cond': is missing: the loss reads the chosen"):
        prepare(config(tmp_path / "x", model, str(bad), **options))


def test_a_cache_of_the_reference_is_the_reference(given, tmp_path):
    """precompute sees the pictures, the other condition's too, and the key depends on them."""
    cond = {"image_cond": lambda i, right, wrong: f"{right}7_{i}.png"}
    data = write_pictures(tmp_path / "data", 4, seed=7, **cond)
    for i, line in enumerate(data.read_text().splitlines()):
        picture("bgr"[i % 3], 30).save(tmp_path / "data" / f"c{i}.png")
        assert json.loads(line)["image"].startswith("rgb"[i % 3])
    text = data.read_text()
    for i, colour in enumerate("rgbr"):
        text = text.replace(f'"image_cond": "{colour}7_{i}.png"', f'"image_cond": "c{i}.png"')
    data.write_text(text)
    other = save_vision(tmp_path / "other", seed=3)
    options = dict(loss=("mm_dpo",), image_column="image", ref_model=other)
    precompute(config(tmp_path / "cache", str(given / "model"), str(data), **options))
    found = []
    for more in ({}, {"precomputed_ref": str(tmp_path / "cache")}):
        run = prepare(config(tmp_path / "o", str(given / "model"), str(data), **options | more))
        found.append(evaluate(run, run.examples)["eval_loss"])
    assert found[0] == pytest.approx(found[1], rel=1e-5) and abs(found[0] - 3 * 0.6931) > 1e-3
    picture("r", 5).save(tmp_path / "data" / "c1.png")
    with pytest.raises(ValueError, match=r"does not exist|other data"):
        prepare(config(tmp_path / "o", str(given / "model"), str(data), **options | more))


def bad_rows(folder):
    """(row, words of its line) of everything that can be wrong with a picture."""
    picture("r").save(folder / "r.png")
    (folder / "broken.png").write_bytes((folder / "r.png").read_bytes()[:45])
    (folder / "text.png").write_text("no picture")
    good = {"prompt": "<image>?", "chosen": "r", "rejected": "b", "image": "r.png"}
    chat = {"prompt": user("?", None), "chosen": answer("r"), "rejected": answer("b")}
    return good, [
        ({"image": "gone.png"}, "'image': names the file .*gone.png: No such file"),
        ({"image": "broken.png"}, "'image': .*broken.png cannot be read as a picture: "),
        ({"image": "text.png"}, "'image': .*text.png cannot be read as a picture: cannot identify"),
        ({"image": ["r.png", "gone.png"], "prompt": "<image><image>?"}, r"'image\[1\]': names the"),
        ({"image": None}, "'image': is missing: every row needs a picture"),
        ({"image": []}, "'image': is an empty list"),
        ({"image": 3}, "'image': must be a picture"),
        ({"image": "https://a.b/c.png"}, "'image': is the address https"),
        ({"image": ["r.png", "r.png"]}, "has 1 places for the 2 pictures of column 'image'; write"),
        ({"prompt": "?"}, "'prompt': has 0 places for the 1 pictures of column 'image'; write <im"),
        ({"chosen": "r<image>"}, "'chosen': holds a picture or <image>"),
        ({"image_rejected": "r.png", "rejected": "r"}, "'rejected': is the chosen answer with its"),
        ({"prompt": f"<image>{'long' * 40}"}, "has 164 tokens, pictures included, which leaves no"),
        (chat | {"prompt": user(None, "?", None)}, 'has 2 places for the 1 .* one part {"type": "'),
        (chat | {"chosen": [{"role": "assistant", "content": [{"type": "video"}]}]},
         "'chosen': has a part that must be of type text or image, got 'video'"),
        (chat | {"prompt": user("<image>?")}, "'prompt': holds <image>, which stands for a pict"),
        (chat | {"prompt": [{"role": "user", "content": [{"type": "image", "image": "r.png"}]}]},
         "'prompt': has a part of type image with 'image'; the pictures themselves are read from"),
    ]  # fmt: skip


def test_bad_rows_are_told_and_lose_nothing(given, tmp_path):
    good, bad = bad_rows(tmp_path)
    rows = [good, *(good | change for change, _ in bad), good | {"chosen": "g"}]
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    processor = load_processor(str(given / "model"))
    loader = Loader(
        tokenizer=processor.tokenizer, max_length=100, vision=Vision(processor, "image")
    )
    found = loader.load(path)
    assert [example.row for example in found.examples] == [1, len(rows)]
    lines = found.report.examples
    assert len(lines) == len(bad)
    for number, (line, (_, words)) in enumerate(zip(lines, bad, strict=True), 2):
        assert line.startswith(f"d.jsonl:{number} column ")
        assert re.search(words, line), (words, line)


def test_pictures_of_every_kind_of_source(given, tmp_path):
    """A path, bytes, a PIL image, datasets' column and Parquet give the same pixels."""
    import datasets

    processor = load_processor(str(given / "model"))
    loader = Loader(tokenizer=processor.tokenizer, vision=Vision(processor, "image"))
    path = tmp_path / "r.png"
    picture("r").save(path)
    text = {"prompt": "<image>?", "chosen": "r", "rejected": "b"}
    buffer = io.BytesIO()
    picture("r").save(buffer, "PNG")
    values = [str(path), buffer.getvalue(), picture("r"), {"bytes": None, "path": str(path)}]
    sources = [[text | {"image": value}] for value in values]
    table = datasets.Dataset.from_list([text | {"image": str(path)}])
    sources.append(table.cast_column("image", datasets.Image()))
    sources[-1].to_parquet(tmp_path / "t.parquet")
    sources.append(tmp_path / "t.parquet")
    pixels = []
    for source in sources:
        (example,) = loader.load(source).examples
        batch = collate([example], packed=False)
        pixels.append(batch.inputs["pixel_values"])
    assert all(torch.equal(pixels[0], other) for other in pixels[1:])
    path.unlink()
    (example,) = loader.load(sources[1]).examples
    assert torch.equal(collate([example], packed=False).inputs["pixel_values"], pixels[0])


def test_a_picture_that_changes_under_the_run(given, tmp_path):
    data = write_pictures(tmp_path / "data", 4)
    run = prepare(config(tmp_path / "o", str(given / "model"), str(data), image_column="image"))
    picture("b").save(tmp_path / "data" / "r0_0.png")
    with pytest.raises(ValueError, match=r"r0_0.png changed since the data were read"):
        run.micro_batch(run.examples[:2])
    (tmp_path / "data" / "r0_0.png").unlink()
    with pytest.raises(ValueError, match=r"r0_0.png was there .* read now: No such file"):
        run.micro_batch(run.examples[:2])


def test_mismatched_prompts_keep_their_pictures(given):
    processor = load_processor(str(given / "model"))
    loader = Loader(tokenizer=processor.tokenizer, vision=Vision(processor, "image"))
    a, b = loader.load(given / "data" / "pairs0.jsonl", limit=2).examples
    (made,) = mismatch([a], [b], 64)
    assert made.sequences[0].pictures == a.sequences[0].pictures != b.sequences[0].pictures
    assert made.sequences[0].input_ids[-2] == b.sequences[0].input_ids[-2]
    assert torch.equal(
        collate([made], packed=False).inputs["pixel_values"][0],
        collate([a], packed=False).inputs["pixel_values"][0],
    )


REFUSED = [
    (dict(packing="on"), "packing does not go with image_column"),
    (dict(token_budget=64), "token_budget does not go with image_column"),
    (dict(score_prompt=True), "score_prompt does not go"),
    (dict(loss=("sft",), likelihood_prompt=True), "likelihood_prompt does not go"),
    (dict(head="reward", loss=("bradley_terry",)), "head does not go with image_column"),
    (dict(image_column=None), r"is a vision-language model, which .* --image-column"),
    (dict(model="text"), "reads no pictures; drop image_column"),
    (dict(model="bare"), "Can't load image processor"),
    (dict(ref_model="other"), "the image processors of .* differ in image_mean"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_refusals(given, tmp_path, options, words):
    options = {"image_column": "image"} | options
    if options.get("model") == "text":
        options["model"] = save_model(tmp_path / "text")
    elif "model" in options or "ref_model" in options:
        name = next(iter({"model", "ref_model"} & options.keys()))
        options[name] = str(shutil.copytree(given / "model", tmp_path / "copy"))
        if name == "model":
            (tmp_path / "copy" / "processor_config.json").unlink()
        else:
            processor = load_processor(options[name])
            processor.image_processor.image_mean = [0.1, 0.1, 0.1]
            processor.save_pretrained(tmp_path / "copy")
    model = options.pop("model", str(given / "model"))
    with pytest.raises(ValueError, match=words):
        prepare(config(tmp_path / "o", model, str(given / "data" / "pairs0.jsonl"), **options))
    assert not (tmp_path / "o").exists()


def test_text_names_what_pictures_need(given, tmp_path):
    """Without the option a column of pictures is refused, and the message says how it is read."""
    with pytest.raises(ValueError, match=r"text has no image processor \(preprocessor_config"):
        load_processor(save_model(tmp_path / "text"))
    loader = Loader(tokenizer=load_tokenizer(str(given / "model")))
    with pytest.raises(ValueError, match=r"train. reads pictures with --image-column"):
        loader.load(given / "data" / "pairs0.jsonl")
