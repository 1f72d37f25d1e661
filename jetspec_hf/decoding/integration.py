"""`generate(assistant_model=head)`: the one place where a class of another library is wrapped."""

import copy
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any

from transformers import GenerationMixin

from ..pair import DecodingPair
from ..upstream import WRAPPED, check_names, install_command, is_chain
from .compatibility import check_target
from .loop import tree_assisted_decoding


def _drafts_trees(assistant: Any, generation_config: Any) -> bool:
    """Whether a call is ours. By attribute, not by class, so that wrapped heads count; `dflash` is the stock chain."""
    if not getattr(assistant, "drafts_trees", False):
        return False
    check_names()
    return not is_chain(generation_config)


def _wrap_decoding(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def assisted_decoding(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        if args or not _drafts_trees(kwargs.get("assistant_model"), kwargs["generation_config"]):
            return stock(self, input_ids, *args, **kwargs)
        for unused in ("inputs_tensor", "tokenizer", "assistant_tokenizer"):
            kwargs.pop(unused, None)
        return tree_assisted_decoding(self, input_ids, **kwargs)

    return assisted_decoding


def _wrap_validation(stock: Callable) -> Callable:
    @functools.wraps(stock)
    def validate_generation_mode(
        self: Any, generation_mode: Any, generation_config: Any, generation_mode_kwargs: Any
    ) -> Any:
        head = generation_mode_kwargs.get("assistant_model")
        if _drafts_trees(head, generation_config):
            check_target(self)  # says more than the stock checks on the same points
            DecodingPair(head, self)
            # Several answers to a prompt are several rows, which the stock check takes for what no assistant can do.
            generation_config = copy.copy(generation_config)
            generation_config.num_return_sequences = 1
        return stock(self, generation_mode, generation_config, generation_mode_kwargs)

    return validate_generation_mode


_WRAPPERS: dict[str, Callable] = dict(zip(WRAPPED, (_wrap_decoding, _wrap_validation), strict=True))


def install() -> None:
    """Let `generate` of every model recognise draft heads. Calling it again changes nothing.

    All other calls pass through to the methods that were there before.
    """
    for name in _WRAPPERS:
        stock = inspect.getattr_static(GenerationMixin, name, None)
        if stock is None or not WRAPPED[name] <= set(inspect.signature(stock).parameters):
            warnings.warn(
                f"This version of transformers has another `GenerationMixin.{name}`, so `assistant_model=head` does "
                f"not work; run `{install_command()}`, or use `custom_generate=jetspec_hf.decode_with(head)`.",
                stacklevel=2,
            )
            return
    for name, wrap in _WRAPPERS.items():
        if not is_installed(name):
            wrapper: Any = wrap(getattr(GenerationMixin, name))
            wrapper.is_jetspec_wrapper = True
            setattr(GenerationMixin, name, wrapper)


def uninstall() -> None:
    """Put back what [`install`] found, unless another library has wrapped it since."""
    for name in _WRAPPERS:
        if is_installed(name):
            setattr(GenerationMixin, name, getattr(GenerationMixin, name).__wrapped__)


def is_installed(name: str) -> bool:
    """Whether the outermost method of that name is our wrapper."""
    return getattr(getattr(GenerationMixin, name), "is_jetspec_wrapper", False)
