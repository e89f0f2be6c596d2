"""A vision-language model of a few thousand parameters, its processor, and rows with images."""

from __future__ import annotations

import random
from typing import Any

import torch
import trl_runs as runs

TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + ']' }}"
    "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
    "{% endif %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)


def processor() -> Any:
    import transformers as t
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = runs.tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": 16, "width": 16}
    return t.LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side),
        tokenizer=tokenizer, patch_size=8, vision_feature_select_strategy="default",
        image_token="<image>", num_additional_image_tokens=1, chat_template=TEMPLATE,
    )  # fmt: skip


def model() -> Any:
    import transformers as t

    vision = t.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, projection_dim=16,
    )  # fmt: skip
    text = runs.model().config
    text.vocab_size = 265
    image = processor().tokenizer.convert_tokens_to_ids("<image>")
    torch.manual_seed(0)
    config = t.LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=image, image_seq_length=4
    )
    return t.LlavaForConditionalGeneration(config)


def pairs(rows: int = 8, **columns: Any) -> Any:
    """Every third row has no image. `columns`: name -> function of the row's number."""
    import numpy as np
    from datasets import Dataset, Features, Image, List, Value
    from PIL import Image as Picture

    rng, pixels = random.Random(0), np.random.default_rng(0)
    said = [{"role": Value("string"), "content": Value("string")}]
    kinds = {"images": List(Image()), "prompt": said, "chosen": said, "rejected": said}
    data = []
    for i in range(rows):
        picture = Picture.fromarray(pixels.integers(0, 255, (16, 16, 3), dtype="uint8"))
        texts = {
            "prompt": ("user", f"{i}:{runs._text(rng)}"),
            "chosen": ("assistant", " " + runs._text(rng)),
            "rejected": ("assistant", " " + runs._text(rng)),
        }
        row = {k: [{"role": role, "content": text}] for k, (role, text) in texts.items()}
        row["images"] = [picture] if i % 3 else []
        data.append(row | {name: value(i) for name, value in columns.items()})
    more = {k: Value("float64") for k in columns if not isinstance(data[0][k], list)}
    more |= {k: List(Value("float64")) for k in columns if k not in more}
    return Dataset.from_list(data, features=Features(kinds | more))
