"""Preference losses: pure functions, one short file per paper, and their register LOSSES.

`prefkern.losses.<name>` is the function, `LOSSES["<name>"]` what it says of itself: source, status,
what it reads, what metrics log. A loss of your own is declared by a decorator of `declare`.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .. import traced
from .binding import ALIASES as ALIASES
from .binding import Bound as Bound
from .binding import LossLike as LossLike
from .binding import arguments as arguments
from .binding import bind as bind
from .binding import check_arguments as check_arguments
from .binding import required as required
from .binding import resolve as resolve
from .record import LOSSES as LOSSES
from .record import Loss as Loss
from .record import import_losses

if TYPE_CHECKING:  # for editors and type checkers
    from .catalogue import *  # noqa: F403
else:  # a loss is imported when it is asked for

    def __getattr__(name: str) -> Callable[..., Any]:
        fn = _function(name)
        if fn is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return fn

    def __dir__() -> list[str]:
        return [*globals(), *LOSSES]


@traced.constant_result  # so that a compiled function may be the first to ask
def _function(name: str) -> Callable[..., Any] | None:
    """The loss of that name, an attribute from now on; None where there is none, and for a module
    of this folder, which Python asks for here before it imports it."""
    if name.startswith("_") or find_spec(f"{__name__}.{name}") is not None:
        return None
    import_losses()
    from . import catalogue

    fn: Callable[..., Any] | None = vars(catalogue).get(name)
    if fn is not None:
        globals()[name] = fn
    return fn
