"""Small pictures and a small vision-language model: what the examples about pictures run on.

A picture has four cells of one colour each; the model, a LLaVA made from a config, sees one token
for each. Rows hold prompt, images, chosen, and rejected, rejected_images, cond_images where needed.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from prefkern.integrations.preference_model import PreferenceModel

COLOURS = {
    "red": (0.9, -0.7, -0.7), "green": (-0.7, 0.8, -0.6), "blue": (-0.7, -0.6, 0.9),
    "yellow": (0.9, 0.8, -0.7),
}  # fmt: skip
WORDS = "describe picture cell 1 2 3 4 inside around first colours it is the top bottom and : ? ."
CELLS = 4  # tokens of a picture
Row = Mapping[str, Any]


@functools.cache
def tokenizer() -> Any:
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "</s>", "<image>", *WORDS.split(), *COLOURS]
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<pad>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>")


def picture(*cells: str, rng: random.Random) -> Tensor:  # [3, 8, 8]
    """A picture of one colour, of two (top, bottom) or of four cells, with noise."""
    four = [cell for cell in cells for _ in range(CELLS // len(cells))]
    colours = torch.tensor([COLOURS[cell] for cell in four])  # [4, 3]
    image = colours.T.reshape(3, 2, 2).repeat_interleave(4, 1).repeat_interleave(4, 2)
    noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
    return image + 0.2 * noise


def model() -> Any:
    import transformers as t

    torch.manual_seed(0)
    vision = t.CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, projection_dim=32,
    )  # fmt: skip
    text = t.LlamaConfig(
        vocab_size=len(tokenizer()), hidden_size=48, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return t.LlavaForConditionalGeneration(t.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=2, vision_feature_layer=-1,
        attn_implementation="eager",
    ))  # fmt: skip


def ids(text: str, pictures: int = 0) -> list[int]:
    """Pictures, CELLS tokens each, and a text."""
    return tokenizer()("<image> " * CELLS * pictures + text)["input_ids"]


def batch(rows: Sequence[Row], sides: Sequence[str]) -> dict[str, Tensor]:
    """One sequence for each row and side: chosen, rejected, or cond, the chosen answer under other
    pictures; padded on the right."""
    found, labels, pixels = [], [], []
    for row in rows:
        for side in sides:
            begin = ids(row["prompt"], len(row["images"]))
            end = [*ids(row["chosen" if side == "cond" else side]), 1]
            found.append(begin + end)
            labels.append([-100] * len(begin) + end)
            pixels += row.get(f"{side}_images", row["images"])
    return {
        "input_ids": _padded(found, 0), "labels": _padded(labels, -100),
        "attention_mask": _padded([[1] * len(x) for x in found], 0),
        **({"pixel_values": torch.stack(pixels)} if pixels else {}),
    }  # fmt: skip


def _padded(values: list[list[int]], fill: int) -> Tensor:
    width = max(map(len, values))
    return torch.tensor([value + [fill] * (width - len(value)) for value in values])


def fit(
    step: Any, rows: Sequence[Row], *, rate: float, sides: Sequence[str], size: int = 16,
    epochs: int = 1,
) -> None:  # fmt: skip
    """AdamW over the rows in batches of `size`."""
    optimizer = torch.optim.AdamW(step.parameters(), lr=rate)
    for epoch in range(epochs):
        order = list(rows)
        random.Random(epoch).shuffle(order)
        for at in range(0, len(order), size):
            step(**batch(order[at : at + size], sides)).loss.backward()
            torch.nn.utils.clip_grad_norm_(step.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()


def taught(rows: Sequence[Row], *, rate: float = 2e-3) -> Any:
    """A model that has read the chosen answers once."""
    made = model()
    step = PreferenceModel(made, "sft", metrics=False)
    fit(step, rows, rate=rate, sides=("chosen", "chosen"), size=32)
    return made.eval()


@torch.no_grad()
def continued(
    policy: Any, rows: Sequence[Row], begun: Sequence[str], *, temperature: float = 0.0,
    seen: float = 1.0, seed: int = 0,
) -> list[str]:  # fmt: skip
    """Answers to rows with equally many tokens that begin with `begun`, also of one length; of each
    picture the share `seen` of its tokens, drawn anew for each row, is not masked in attention."""
    draw = torch.Generator().manual_seed(seed)
    texts = [f"{r['prompt']} {text}" for r, text in zip(rows, begun, strict=True)]
    at = torch.tensor([ids(x, len(r["images"])) for r, x in zip(rows, texts, strict=True)])
    start = at.shape[1] - len(ids(begun[0]))
    pixels = torch.stack([image for row in rows for image in row["images"]])
    mask = (at != 2) | (torch.rand(at.shape, generator=draw) < seen)
    for _ in range(11):
        logits = policy(input_ids=at, attention_mask=mask.long(), pixel_values=pixels).logits
        scores = logits[:, -1].index_fill(1, torch.tensor(2), -torch.inf)  # no place for a picture
        if temperature:
            noise = torch.rand(scores.shape, generator=draw).clamp(min=1e-9)
            scores = scores / temperature - (-noise.log()).log()
        at = torch.cat([at, scores.argmax(-1, keepdim=True)], 1)
        mask = torch.cat([mask, torch.ones(len(at), 1, dtype=torch.bool)], 1)
        if (at[:, start:] == 1).any(1).all():
            break
    found = tokenizer().batch_decode(at[:, start:])
    return [text.split("</s>")[0].strip() for text in found]


def accuracy(policy: Any, rows: Sequence[Row]) -> float:
    """Share of rows whose likeliest answer, token by token, is the chosen one."""
    found = continued(policy, rows, [""] * len(rows))
    return sum(x == r["chosen"] for x, r in zip(found, rows, strict=True)) / len(rows)
