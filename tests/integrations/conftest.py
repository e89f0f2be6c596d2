"""Before any test module imports transformers, peft or trl."""

from __future__ import annotations

import prefkern.integrations  # noqa: F401  (hides the source folder `kernels` from transformers)
