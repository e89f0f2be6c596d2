"""SparsePO: masks that learn which tokens decide, trained beside the policy, and their picture.

    python examples/sparsepo_masks.py

The masks read the reference's hidden states after every block. One weighs log-ratios, one the KL;
an L1 penalty lets go of tokens that do not help. Writes sparsepo.png and sparsepo.html.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tiny
import torch

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.head import at_head
from prefkern.integrations.head_view import shifted
from prefkern.integrations.loss_at_head import loss_at_head, read_other
from prefkern.integrations.token_pictures import write_html, write_png
from prefkern.integrations.token_view import view_pair
from prefkern.losses.weights import SparseMasks


class SparsePO(torch.nn.Module):
    """Policy and masks in one module, so that one wrapper and one optimizer see both."""

    def __init__(self, policy: Any, reference: Any, penalty: float = 0.02) -> None:
        super().__init__()
        self.policy, self._reference = policy, [reference.requires_grad_(False).eval()]
        self.masks = SparseMasks(policy.config.num_hidden_layers, policy.config.hidden_size)
        self.options = {"l1_norm_param_u": penalty, "l1_norm_param_d": penalty, "beta": 0.5}
        with torch.no_grad():  # begin with every token let through
            for mask in (self.masks.reward_mask, self.masks.kl_mask):
                mask.layer_mask_bias.fill_(1.0)
                mask.mixer_mask_weight.fill_(1.0 / len(mask.layer_mask_bias))
        for model in (policy, reference):
            at_head(model)

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [
            {"params": self.policy.parameters()},
            {"params": self.masks.parameters(), "lr": 1e-2},
        ]

    def rows_of(self, layers: torch.Tensor, scored: torch.Tensor) -> dict[str, torch.Tensor]:
        """The masks of scored rows, put back among all rows."""
        found = self.masks(layers.flatten(1, 2)[:, scored])
        rows = torch.zeros(scored.shape)
        return {k: rows.masked_scatter(scored, found[k]) for k in ("reward_mask", "kl_mask")}

    def reference(self, inputs: dict[str, Any], targets: torch.Tensor) -> Any:
        return read_other(self._reference[0], inputs, targets, distribution=True, layers=True)

    def forward(self, labels: torch.Tensor, **inputs: Any) -> Any:
        targets = shifted(labels)
        reference = self.reference(inputs, targets)
        objective = loss_at_head(
            targets, loss="sparsepo", reference=reference, masks=self.rows_of, **self.options
        )
        return self.policy(**inputs, at_head=objective).value

    @torch.no_grad()
    def of_pair(self, pair: dict[str, str]) -> dict[str, torch.Tensor]:
        batch = PairCollator(tiny.tokenizer())([pair])
        targets = shifted(batch.pop("labels"))
        return self.rows_of(self.reference(batch, targets).layers, (targets != -100).flatten())


def main(pairs: int = 640, folder: str = ".") -> dict[str, Any]:
    begin = tiny.start()
    train, held_out = tiny.pairs(pairs), tiny.pairs(100, seed=1)
    policy, reference = copy.deepcopy(begin), copy.deepcopy(begin)
    step = SparsePO(policy, reference)
    outputs = tiny.fit(step, train, rate=5e-4)
    pair = held_out[0]
    view = view_pair(
        policy, reference, tiny.tokenizer(), pair, loss="sparsepo", **step.of_pair(pair),
        title="SparsePO: what the masks let through",
    )  # fmt: skip
    pictures = [write_png(view, Path(folder) / "sparsepo.png")]
    pictures.append(write_html(view, Path(folder) / "sparsepo.html"))
    words = {word: [] for word in ("deciding", "other")}
    for row in held_out[:20]:
        masks = step.of_pair(row)["reward_mask"].reshape(2, -1)
        targets = shifted(PairCollator(tiny.tokenizer())([row])["labels"])
        for token, mask in zip(targets[targets != -100], masks[targets != -100], strict=True):
            word = tiny.tokenizer().convert_ids_to_tokens(int(token))
            words["deciding" if word in tiny.GOOD + tiny.BAD else "other"].append(mask.item())
    found = {
        "before": tiny.accuracy(begin, held_out),
        "after": tiny.accuracy(policy, held_out),
        "first_loss": outputs[0][0].item(),
        "last_loss": outputs[-1][0].item(),
        **{f"mask_{kind}": sum(v) / len(v) for kind, v in words.items()},
        "pictures": [str(path) for path in pictures],
    }
    for name, value in found.items():
        print(f"{name:14s} {value if name == 'pictures' else f'{value:.3f}'}")
    return found


if __name__ == "__main__":
    main()
