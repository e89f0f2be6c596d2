"""A sequence-classification model as a scorer of whole conversations.

B texts of a batch, n outputs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ...integrations import hf
from ...prep.cells import Text
from .. import models
from ..config import TrainConfig
from ..data.marks import begun
from ..data.rows import BadRow, template_args

# Names of the layers that make scores of hidden states, which no causal model has.
SCORES = re.compile(r"(^|\.)(score|classifier|classification_head|pooler)\.")
# In the config of a model that was trained on plain texts with EOS behind them.
ENDS = "prefkern_ends_with_eos"


class RewardScores:
    """Scores of whole conversations: a number each, or n numbers of a model with n outputs.

    Raises:
        ValueError: the model has no scores, or its files cannot be read.
    """

    def __init__(self, name: str, config: TrainConfig, device: torch.device) -> None:
        self.tokenizer = models.load_tokenizer(name)
        self.model = models.freeze(load_reward_model(name, config)).to(device)
        context = models.context_length(self.model)
        self.limit = min(config.max_length, context or config.max_length)

    @torch.no_grad()
    def __call__(
        self, rows: Sequence[Mapping[str, Any]], answers: Sequence[Text]
    ) -> list[float | list[float] | None]:
        """None for a text of more tokens than max_length or the model's context."""
        ids = [
            conversation_ids(self.tokenizer, self.model, row, answer)
            for row, answer in zip(rows, answers, strict=True)
        ]
        # one by one: a batch would need a pad token, and its padding changes the last bits
        return [self._score(x) if 0 < len(x) <= self.limit else None for x in ids]

    def _score(self, ids: list[int]) -> float | list[float]:
        given = torch.tensor([ids], device=self.model.device)
        out = self.model(input_ids=given, attention_mask=torch.ones_like(given))
        found = out.logits[0].float().tolist()
        return found[0] if len(found) == 1 else found


def load_reward_model(name: str, config: TrainConfig) -> hf.Model:
    """A sequence-classification model, every weight of it out of the checkpoint.

    Raises:
        ValueError: it has no scores, or its files cannot be read.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    models.check_name(name)
    if models.is_adapter(name):
        return _with_adapter(name, config)
    with models.told(name, "reward model"):
        settings = AutoConfig.from_pretrained(name, trust_remote_code=False)
    kinds = getattr(settings, "architectures", None) or []
    if kinds and not any("Classification" in kind or "Reward" in kind for kind in kinds):
        raise ValueError(
            f"{name} ({', '.join(kinds)}) has no scores: a reward model is a sequence-"
            "classification model; `prefkern train --head reward` makes one of a causal model."
        )
    return models.load_whole(AutoModelForSequenceClassification, name, config)


def _with_adapter(name: str, config: TrainConfig) -> hf.Model:
    """The base of an adapter folder with the adapter, in which the scores stand."""
    from peft import PeftConfig, PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForSequenceClassification

    with models.told(name, "adapter"):
        stored = load_file(f"{name}/adapter_model.safetensors")
        heads = [v for k, v in stored.items() if SCORES.search(k) and v.dim() == 2]
        settings = PeftConfig.from_pretrained(name)
    if not heads or settings.task_type != "SEQ_CLS":
        raise ValueError(f"{name} is an adapter without scores; a reward model has them.")
    model = models.load_whole(
        AutoModelForSequenceClassification, models.adapter_base(name), config,
        may_lack=lambda key: bool(SCORES.search(key)), num_labels=len(heads[-1]),
    )  # fmt: skip
    with models.told(name, "adapter"):
        found = PeftModel.from_pretrained(model, name)
        models.check_adapter(found, name)
    return found


def conversation_ids(
    tokenizer: Any, model: hf.Model, row: Mapping[str, Any], answer: Text
) -> list[int]:
    """Prompt and answer as one text; plain ones end with EOS where the model was trained so.

    Raises:
        ValueError: the chat template or the embedding does not know a row.
    """
    ids = _conversation_ids(tokenizer, model, row, answer)
    rows = model.get_input_embeddings().weight.shape[0]
    if max(ids, default=0) >= rows:
        raise ValueError(
            f"the reward model's tokenizer gives id {max(ids)} and its embedding has {rows} rows; "
            "pass the tokenizer that belongs to the model."
        )
    return ids


def _conversation_ids(
    tokenizer: Any, model: hf.Model, row: Mapping[str, Any], answer: Text
) -> list[int]:
    prompt = row["prompt"]
    if isinstance(prompt, str):
        ids = list(tokenizer(f"{prompt}{answer}", verbose=False)["input_ids"])
        ids = begun(tokenizer, ids, prompt)
        end = tokenizer.eos_token_id
        ended = getattr(hf.causal_lm(model).config, ENDS, False) and ids[-1:] != [end]
        return [*ids, end] if ended else ids
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "the prompts are conversations and the reward model's tokenizer has no chat template; "
            "set one, or pass plain-text prompts."
        )
    said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    try:
        text = tokenizer.apply_chat_template([*prompt, *said], tokenize=False, **template_args(row))
    except BadRow as why:
        raise ValueError(f"column {why.column!r} {why.detail}.") from None
    except Exception as error:  # whatever a template makes of what it does not know
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"the reward model's chat template refuses a row: {reason}.") from error
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
