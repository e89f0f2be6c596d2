"""From prompt and responses to token ids, the way TRL does it.

The prompt ends where the token ids of the prompt alone and of prompt + response, over all responses
of the row, stop agreeing: tokenizers may join the last prompt character with the first of a
response, and such a token belongs to the response. Plain text gets EOS after each response; in a
conversation the chat template decides.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np

from ...prep.messages import with_text_arguments
from .columns import fit_tokens, fit_weights, is_per_token
from .marks import begun, end_marks, holds_bos
from .records import Encoded, Example
from .rendered import check_documents, check_rendered, check_tools, unread_names
from .rows import BadRow, Messages, ParsedRow
from .vision import Vision, cut

_MESSAGES = re.compile(r'\s*\[\s*\{\s*"(role|content|from|value)"\s*:')  # as JSON text
# The answers of a row that share a prompt, and whether max_length cut one of them.
Part = tuple[list[Encoded], bool]


class Encoder:
    """Turns parsed rows into examples.

    Args:
        tokenizer: A transformers tokenizer. It needs EOS for plain text unless `append_eos` is
            False, and a chat template for conversations; a pad token is never used.
        max_length: Tokens kept of prompt + response, from the start; None keeps all.
        model_context: Tokens the model can read; None where there is no limit.
        vocab_size: Rows of the model's embedding, to catch a tokenizer of another model.
        append_eos: Append EOS to plain-text responses.
        score_prompt: Score the prompt's tokens too, all but the very first.
        vision: Reads the pictures of rows that have some.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        max_length: int | None,
        model_context: int | None,
        vocab_size: int | None,
        append_eos: bool,
        score_prompt: bool = False,
        vision: Vision | None = None,
    ) -> None:
        if max_length is not None and max_length < 2:
            raise ValueError(
                f"max_length must be at least 2 (one prompt token, one response token), got "
                f"{max_length}."
            )
        if max_length is not None and model_context is not None and max_length > model_context:
            raise ValueError(
                f"max_length must not pass the model's context of {model_context} tokens, got "
                f"{max_length}; lower max_length."
            )
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.limit = max_length if max_length is not None else model_context
        self.vocab_size = vocab_size
        self.append_eos, self.score_prompt = append_eos, score_prompt
        self.vision = vision
        self.roles: set[str] = set()  # those that the chat template was seen to write
        self.ends = end_marks(tokenizer)
        self.notes: Counter[str] = Counter()  # what was done to texts that hold marks already

    def encode(self, rows: list[tuple[int, ParsedRow]]) -> list[Example | BadRow]:
        """The example of every (number, row), or the reason why a row cannot be used."""
        parts = [row.parts() for _, row in rows]
        done = self._encode_parts([part for row in parts for part in row])
        ends = [0, *accumulate(len(row) for row in parts)]
        return [
            _example(number, row, done[a:b])
            for (number, row), (a, b) in zip(rows, pairwise(ends), strict=True)
        ]

    def _encode_parts(self, rows: list[ParsedRow]) -> list[Part | BadRow]:
        plain = [i for i, r in enumerate(rows) if isinstance(r.prompt, str) and not r.pictures]
        ids: dict[int, list[list[int]] | BadRow] = dict(
            zip(plain, self._plain_ids([rows[i] for i in plain]), strict=True)
        )
        out: list[Part | BadRow] = []
        for i, row in enumerate(rows):
            try:
                if isinstance(row.prompt, str):
                    self._check_plain(row)
                if row.pictures:
                    out.append(self._pictured(row))
                    continue
                row_ids = ids[i] if i in ids else self._chat_ids(row)
                if isinstance(row_ids, BadRow):
                    raise row_ids
                out.append(self._sequences(row, row_ids))
            except BadRow as bad:
                out.append(bad)
        return out

    def _check_plain(self, row: ParsedRow) -> None:
        """What is meant for a chat template, beside a text or in one that none writes."""
        assert isinstance(row.prompt, str)
        if row.template_args.get("tools"):
            raise BadRow(
                "tools", "not rendered",
                "are given beside a plain text, which no chat template writes; drop the column, or "
                "pass messages",
            )  # fmt: skip
        if row.template_args:
            self.notes["plain texts have chat_template_kwargs, which nothing reads there"] += 1
        answers = row.responses and all(_MESSAGES.match(str(r)) for r in row.responses)
        if _MESSAGES.match(row.prompt) or answers:
            raise BadRow(
                row.places[0] if answers else "prompt", "messages as text",
                "holds messages as JSON text, which would be trained on letter by letter; pass the "
                "list itself (json.loads)",
            )  # fmt: skip

    def _plain_ids(self, rows: list[ParsedRow]) -> list[list[list[int]] | BadRow]:
        """Token ids of [prompt, prompt + response, ...] for every row, in one tokenizer call."""
        if not rows:
            return []
        self._check_eos()
        texts = []
        for row in rows:
            texts.append(row.prompt)
            texts += [f"{row.prompt}{response}" for response in row.responses]
        encoded = self.tokenizer(texts, verbose=False)["input_ids"] if texts else []
        out: list[list[list[int]] | BadRow] = []
        at = 0
        for row in rows:
            ids = [list(x) for x in encoded[at : at + 1 + len(row.responses)]]
            at += len(ids)
            if self.append_eos:
                ids[1:] = [
                    self._ended(x, str(response))
                    for x, response in zip(ids[1:], row.responses, strict=True)
                ]
            out.append(self._begun(ids, row))
        return out

    def prompt_ids(self, row: ParsedRow) -> list[int]:
        """The tokens of a prompt to be answered, those that training has before an answer.

        Raises:
            BadRow: as `encode` gives them.
        """
        if not isinstance(row.prompt, str):
            return self._chat_ids(row)[0]
        self._check_plain(row)
        ids = list(self.tokenizer(row.prompt, verbose=False)["input_ids"])
        eos = self.tokenizer.eos_token
        # some tokenizers end every text with EOS, after which there is nothing to answer
        if ids[-1:] == [self.tokenizer.eos_token_id] and not row.prompt.endswith(eos):
            ids = ids[:-1]
        return self._begun([ids], row)[0]

    def _pictured(self, row: ParsedRow) -> Part:
        """The sequences of a row with pictures, whose processor expands their placeholders."""
        assert self.vision is not None
        pictures, plain = row.pictures[0], isinstance(row.prompt, str)
        if plain:
            self._check_eos()
            texts = [str(row.prompt)]
            for response in row.responses:
                end = "" if self._is_ended(str(response)) else self.tokenizer.eos_token
                texts.append(f"{row.prompt}{response}{end if self.append_eos else ''}")
        else:
            texts = self._chat_texts(row)
        found = self.vision.tokens(texts, pictures, special=plain)
        ids = [x for x, _ in found]
        starts = self._begun(ids, row) if plain else ids
        dropped = len(ids[0]) - len(starts[0])
        sequences, was_cut = self._sequences(row, starts)
        made = []
        for seq, (_, along) in zip(sequences, found[1:], strict=True):
            inputs = cut({k: v[dropped:] for k, v in along.items()}, len(seq.input_ids))
            made.append(replace(seq, pictures=pictures, vision=self.vision, inputs=inputs))
        return made, was_cut

    def _check_eos(self) -> None:
        if self.tokenizer.eos_token_id is None and self.append_eos:
            raise ValueError(
                "a plain-text response ends with EOS, and this tokenizer has no eos_token; set "
                "tokenizer.eos_token, or pass append_eos=False to train without an end."
            )

    def _ended(self, ids: list[int], response: str) -> list[int]:
        """The ids with EOS, unless the answer ends with a mark of its end already."""
        if ids and ids[-1] == self.tokenizer.eos_token_id:
            return ids
        return ids if self._is_ended(response) else [*ids, self.tokenizer.eos_token_id]

    def _is_ended(self, response: str) -> bool:
        found = bool(self.ends) and response.rstrip().endswith(self.ends)
        if found:
            self.notes["answers end with a special token of their own, so no EOS was added"] += 1
        return found

    def _begun(self, ids: list[list[int]], row: ParsedRow) -> list[list[int]]:
        """The ids without the BOS that the tokenizer puts before one that the text holds."""
        if any(holds_bos(self.tokenizer, str(response)) for response in row.responses):
            self.notes["rows have answers that begin with BOS, which so stands inside"] += 1
        found = [begun(self.tokenizer, x, str(row.prompt)) for x in ids]
        if found[0] is not ids[0]:
            self.notes["prompts begin with BOS, so no second one was added"] += 1
        return found

    def _chat_ids(self, row: ParsedRow) -> list[list[int]]:
        # The template writes its own special tokens.
        return [
            list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
            for text in self._chat_texts(row)
        ]

    def _chat_texts(self, row: ParsedRow) -> list[str]:
        """Prompt, and prompt with each response, as the chat template writes them."""
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise ValueError(
                "the data are conversations and this tokenizer has no chat template; set "
                "tokenizer.chat_template, or pass data with plain-text prompts."
            )
        try:
            return self._rendered(row)
        except TypeError:  # a template that joins the arguments of tool calls to strings
            prompt = with_text_arguments(cast(Messages, row.prompt))
            answers = [with_text_arguments(cast(Messages, r)) for r in row.responses]
        try:
            return self._rendered(replace(row, prompt=prompt, responses=[*answers]))
        except TypeError as error:
            raise BadRow("prompt", "refused by the chat template", str(error)) from error

    def _rendered(self, row: ParsedRow) -> list[str]:
        prompt = cast(Messages, row.prompt)
        ends_open = bool(prompt) and prompt[-1]["role"] == "assistant"
        open_end = dict(add_generation_prompt=not ends_open, continue_final_message=ends_open)
        texts = [self._template(prompt, row, **open_end)]
        check_rendered(
            prompt, "prompt", texts[0], lambda m: self._template(m, row, **open_end), self.roles
        )
        for place, response in zip(row.places, row.responses, strict=True):
            answer = cast(Messages, response)
            texts.append(self._template([*prompt, *answer], row))
            check_rendered(
                answer, place, texts[-1], lambda m: self._template([*prompt, *m], row), self.roles
            )
        tools = row.template_args.get("tools", ())
        check_tools(
            tools, texts[0], lambda kept: self._template(prompt, _with(row, kept), **open_end)
        )
        if row.template_args.get("documents"):
            check_documents(
                row.template_args["documents"], texts[0],
                lambda: self._template(prompt, _with(row, (), "documents"), **open_end),
            )  # fmt: skip
        self.notes.update(unread_names(self.tokenizer, row, texts))
        said = [m["content"] for part in (prompt, *row.responses) for m in cast(Messages, part)]
        ended = self.ends and any(text.rstrip().endswith(self.ends) for text in said)
        if ended or any(holds_bos(self.tokenizer, text) for text in said):
            self.notes["rows' messages hold marks (BOS, end of turn) that a template writes"] += 1
        return texts

    def _template(self, messages: Messages, row: ParsedRow, **options: Any) -> str:
        try:
            if self.vision is not None:
                messages = self.vision.parts(messages)
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, **options, **row.template_args
            )
        except TypeError:
            raise
        except Exception as error:
            # Templates refuse what they do not know (roles that do not alternate, and the like),
            # and what a row hands them may divide by 0 or recurse without end.
            reason = " ".join(str(error).split()) or type(error).__name__
            raise BadRow("prompt", "refused by the chat template", reason) from error
        return str(text)

    def _sequences(self, row: ParsedRow, ids: list[list[int]]) -> Part:
        start = common_prefix(ids)
        if start == 0:
            raise BadRow(
                "prompt",
                "no prompt token",
                "has no token of its own before the responses, so their first token has nothing "
                "to be predicted from",
            )
        if self.max_length is not None and start >= self.max_length:
            raise BadRow(
                "prompt",
                "prompt fills max_length",
                f"has {start} tokens{', pictures included' if row.pictures else ''}, which leaves "
                f"no room in max_length {self.max_length}",
            )
        found = [self._sequence(row, k, start, response) for k, response in enumerate(ids[1:])]
        if len(found) > 1 and all(
            np.array_equal(seq.input_ids, found[0].input_ids) for seq in found[1:]
        ):
            raise BadRow(
                row.places[-1],
                "same tokens",
                f"has the same {len(found[0].input_ids)} tokens as {row.places[0]}, after "
                "tokenising and truncation",
            )
        cut = any(len(x) > len(seq.input_ids) for x, seq in zip(ids[1:], found, strict=True))
        return found, cut

    def _sequence(self, row: ParsedRow, answer: int, start: int, tokens: list[int]) -> Encoded:
        """Prompt and response number `answer`, whose own tokens begin at `start`."""
        place, weights = row.places[answer], row.token_weights[answer]
        if self.max_length is None and self.limit is not None and len(tokens) > self.limit:
            raise BadRow(
                place,
                "longer than the model's context",
                f"and prompt have {len(tokens)} tokens, the model reads {self.limit}; set "
                "max_length to truncate",
            )
        count = len(tokens) - start
        plain = self.append_eos and isinstance(row.prompt, str)
        appended = plain and tokens[-1] == self.tokenizer.eos_token_id
        if count < 1 + appended:
            raise BadRow(place, "no tokens", "has no token left in this tokenizer")
        if self.vocab_size is not None and max(tokens) >= self.vocab_size:
            raise ValueError(
                f"the tokenizer gives id {max(tokens)} and the model's embedding has "
                f"{self.vocab_size} rows; pass the tokenizer that belongs to the model."
            )
        kept = np.asarray(tokens[: self.max_length], dtype=np.int32)
        first = 1 if self.score_prompt else start  # first scored position
        token_weights = None
        if weights is not None:
            own = fit_weights(weights, count, appended, place)[: len(kept) - start]
            token_weights = np.concatenate([np.ones(start - first, dtype=np.float32), own])
        numbers = fit_tokens(
            row.columns, row.first_answer + answer, len(tokens) - first, len(kept) - first, place
        )
        return Encoded(kept, first, token_weights, numbers)


def _example(number: int, row: ParsedRow, parts: list[Part | BadRow]) -> Example | BadRow:
    """One row again of the parts that were encoded under prompts of their own."""
    sequences: list[Encoded] = []
    truncated = False
    for part in parts:
        if isinstance(part, BadRow):
            return part
        sequences += part[0]
        truncated |= part[1]
    alike = len(parts) > 1 and not row.pictures
    if alike and np.array_equal(sequences[0].input_ids, sequences[1].input_ids):
        return BadRow(row.places[1], "same tokens", "and its prompt have the tokens of the first")
    for k, seq in enumerate(sequences[1:] if len(parts) > 1 and row.pictures else (), 1):
        # a pair whose rejected answer is the chosen one, or another condition that is the same
        same = seq.pictures == sequences[0].pictures
        if same and np.array_equal(seq.input_ids, sequences[0].input_ids):
            return BadRow(row.places[k], "same picture", "is the chosen answer with its picture")
    texts = repr((row.prompt, row.prompts, row.responses)).encode()
    texts += b"".join(picture.digest for own in row.pictures for picture in own)
    return Example(
        row=number,
        sequences=tuple(sequences),
        relevance=row.relevance,
        desirable=row.desirable,
        weight=row.weight,
        ref_seq_logp=row.ref_seq_logp,
        columns={k: v for k, v in row.columns.items() if not is_per_token(k, v)},
        text=int.from_bytes(hashlib.blake2b(texts, digest_size=8).digest(), "big"),
        truncated=truncated,
    )


def _with(row: ParsedRow, given: Sequence[Any], name: str = "tools") -> ParsedRow:
    return replace(row, template_args={**row.template_args, name: list(given)})


def common_prefix(ids: list[list[int]]) -> int:
    """Length of the longest prefix that all the lists share."""
    count = 0
    for column in zip(*ids, strict=False):
        if any(token != column[0] for token in column):
            break
        count += 1
    return count
