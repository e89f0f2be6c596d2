"""TGDPO: a DPO-trained model says how much each token shall count.

    python examples/tgdpo_guided.py

First a guiding model by DPO, then TGDPO from the start again, with the guiding model as the third,
frozen one. Writes tgdpo.png: the weights over a pair.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import tiny

from prefkern.integrations.collate import PairCollator
from prefkern.integrations.head_view import shifted
from prefkern.integrations.loss_at_head import read_other
from prefkern.integrations.preference_model import PreferenceModel
from prefkern.integrations.token_pictures import write_png
from prefkern.integrations.token_view import view_pair

ALPHA, BETA = 0.5, 0.5


def main(pairs: int = 320, folder: str = ".") -> dict[str, Any]:
    begin = tiny.start()
    train, held_out = tiny.pairs(pairs), tiny.pairs(100, seed=1)
    guide, policy, reference = (copy.deepcopy(begin) for _ in range(3))
    tiny.fit(PreferenceModel(guide, "dpo", ref=reference, beta=BETA), train[:96], rate=1e-3)
    step = PreferenceModel(policy, "tgdpo", ref=reference, aux=guide, alpha=ALPHA, beta=BETA)
    outputs = tiny.fit(step, train, rate=1e-3)

    pair = held_out[0]
    batch = PairCollator(tiny.tokenizer())([pair])
    aux_logp = read_other(guide, {k: v for k, v in batch.items() if k != "labels"},
                          shifted(batch["labels"]), distribution=False)  # fmt: skip
    view = view_pair(
        policy, reference, tiny.tokenizer(), pair, loss="tgdpo", aux_logp=aux_logp,
        alpha=ALPHA, beta=BETA, title="TGDPO: weights from the guiding model",
    )  # fmt: skip
    weights = [m.values for a in view.answers for m in a.measures if m.name == "weight"]
    decides = [[t in tiny.GOOD + tiny.BAD for t in a.tokens] for a in view.answers]
    rows = [
        (abs(w - 1), d)
        for ws, ds in zip(weights, decides, strict=True)
        for w, d in zip(ws, ds, strict=True)
    ]
    found: dict[str, Any] = {
        "before": tiny.accuracy(begin, held_out),
        "guide": tiny.accuracy(guide, held_out),
        "after": tiny.accuracy(policy, held_out),
        "first_loss": outputs[0].loss.item(),
        "last_loss": outputs[-1].loss.item(),
        "weight_off_1_deciding": sum(w for w, d in rows if d) / sum(d for _, d in rows),
        "weight_off_1_other": sum(w for w, d in rows if not d) / sum(not d for _, d in rows),
        "picture": str(write_png(view, Path(folder) / "tgdpo.png")),
    }
    for name, value in found.items():
        print(f"{name:22s} {value if name == 'picture' else f'{value:.3f}'}")
    return found


if __name__ == "__main__":
    main()
