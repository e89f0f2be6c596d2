"""Tiny vision-language models with their processors, and pictures of one colour."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny_tokenizer import byte_tokenizer

COLOURS = {"r": (220, 30, 30), "g": (30, 200, 40), "b": (30, 40, 220)}
CHAT = (
    "{% for m in messages %}{{ '[' + m.role + ']' }}{% for c in m.content %}"
    "{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
    "{% if not (loop.last and continue_final_message) %}{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant]' }}{% endif %}"
)
_TEXT = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128,
)  # fmt: skip
_VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8,
    patch_size=4,
)  # fmt: skip


def _tokenizer(place: str = "<image>", **special: str) -> Any:
    """Of bytes, and marks under the names by which processors ask for them."""
    tokenizer = byte_tokenizer(pad="<pad>")
    marks = {"image_token": "<image>", **special}
    tokenizer.add_special_tokens({"extra_special_tokens": [*marks.values()]})
    for name, mark in marks.items():
        tokenizer.init_kwargs[name] = mark
        setattr(tokenizer, name, mark)
        setattr(tokenizer, f"{name}_id", tokenizer.convert_tokens_to_ids(mark))
    tokenizer.chat_template = CHAT.replace("<image>", place)
    return tokenizer


def llava(seed: int = 0) -> tuple[Any, Any]:
    """(model, processor): four tokens a picture."""
    import transformers as t
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = _tokenizer()
    images = CLIPImageProcessorPil(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = t.LlavaProcessor(
        image_processor=images, tokenizer=tokenizer, patch_size=4, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", chat_template=CHAT,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = t.LlavaForConditionalGeneration(t.LlavaConfig(
        vision_config=t.CLIPVisionConfig(**_VISION, projection_dim=16),
        text_config=t.LlamaConfig(**_TEXT, vocab_size=len(tokenizer)),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"), vision_feature_layer=-1,
    ))  # fmt: skip
    return _settled(model), processor


def gemma3(seed: int = 0) -> tuple[Any, Any]:
    """(model, processor): four tokens a picture that see each other, told by token types."""
    import transformers as t
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    tokenizer = _tokenizer("<boi>", boi_token="<boi>", eoi_token="<eoi>")
    images = Gemma3ImageProcessorPil(size={"height": 8, "width": 8})
    processor = t.Gemma3Processor(
        image_processor=images, tokenizer=tokenizer, image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    torch.manual_seed(seed)
    ids = tokenizer.convert_tokens_to_ids
    model = t.Gemma3ForConditionalGeneration(t.Gemma3Config(
        vision_config=t.SiglipVisionConfig(**_VISION),
        text_config=t.Gemma3TextConfig(
            **_TEXT, vocab_size=len(tokenizer), head_dim=8, sliding_window=64
        ),
        mm_tokens_per_image=4, image_token_index=ids("<image>"), boi_token_index=ids("<boi>"),
        eoi_token_index=ids("<eoi>"),
    ))  # fmt: skip
    with torch.no_grad():  # zeros, as drawn
        model.model.multi_modal_projector.mm_input_projection_weight.normal_(std=0.3)
    return _settled(model), processor


def qwen2_vl(seed: int = 0) -> tuple[Any, Any]:
    """(model, processor): as many tokens as a picture has patches, positions along three axes. The
    processor is without its part for videos, which needs torchvision, and so is not saved."""
    import transformers as t
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    class Processor(t.Qwen2VLProcessor):
        def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
            self.image_token, self.video_token = "<image>", None
            self.image_token_id, self.video_token_id = tokenizer.image_token_id, None
            t.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    tokenizer = _tokenizer()
    images = Qwen2VLImageProcessorPil(
        patch_size=4, merge_size=2, temporal_patch_size=2, min_pixels=64, max_pixels=256
    )
    torch.manual_seed(seed)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    model = t.Qwen2VLForConditionalGeneration(t.Qwen2VLConfig(
        text_config=_TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope},
        vision_config=dict(
            depth=1, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4,
        ),
        image_token_id=tokenizer.image_token_id,
    ))  # fmt: skip
    return _settled(model), Processor(images, tokenizer, CHAT)


FAMILIES = {"llava": llava, "gemma3": gemma3}


def _settled(model: Any) -> Any:
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.3)
    return model.eval()


def save_vision(folder: Path, family: str = "llava", seed: int = 0) -> str:
    """Model and processor in a folder that from_pretrained reads."""
    model, processor = FAMILIES[family](seed)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def picture(colour: str, shade: int = 0, size: tuple[int, int] = (12, 10)) -> Any:
    from PIL import Image

    red, green, blue = (min(255, max(0, x + shade)) for x in COLOURS[colour])
    return Image.new("RGB", size, (red, green, blue))


def write_pictures(folder: Path, count: int, seed: int = 0, **more: Any) -> Path:
    """Pairs that only the picture tells apart: the colour's letter, and another's."""
    folder.mkdir(exist_ok=True)
    names, rows = list(COLOURS), []
    for i in range(count):
        right, wrong = names[i % 3], names[(i + 1 + i // 3 % 2) % 3]
        shade = (7 * i + seed) % 23 - 11
        file = f"{right}{seed}_{i}.png"
        picture(right, shade).save(folder / file)
        row = {"image": file, "prompt": "<image>colour?", "chosen": right, "rejected": wrong}
        rows.append(row | {k: v(i, right, wrong) if callable(v) else v for k, v in more.items()})
    path = folder / f"pairs{seed}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
