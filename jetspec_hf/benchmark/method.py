"""The ways to decode that a benchmark compares."""

from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from ..decoding.loop import decode_with
from ..drafting.options import DraftOptions

KINDS = ("plain", "lookup", "dflash", "chain", "auto", "tree")
_OURS = ("chain", "auto", "tree")  # decoded by our loop
_LOOKUP_TOKENS = 10


@dataclass(frozen=True)
class Method:
    """One way to decode.

    Args:
        kind (`str`):
            `plain`: `generate` alone. `lookup`: prompt lookup of 10 tokens. `dflash`: transformers' own chain with the
            head. `chain`: our loop, the head alone drafting its likeliest tokens, one for each depth. `auto`: trees of
            as many nodes as are fastest, found while decoding. `tree`: trees as the head asks for.
        num_nodes (`int`, *optional*): of `tree` alone, most nodes in place of what the head asks for, the root not
            counted.
    """

    kind: str
    num_nodes: int | None = None

    @classmethod
    def parse(cls, name: str) -> "Method":
        """The method that users call `name`, and files too: its kind, or `tree-63` with a number of nodes.

        Raises:
            ValueError: if there is none; lists those that there are.
        """
        kind, _, number = name.partition("-")
        method = cls(kind, int(number)) if kind == "tree" and number.isdecimal() else cls(name)
        if method.name != name or method.kind not in KINDS or method.num_nodes == 0:
            raise ValueError(
                f"There is no method {name}; "
                f"choose from {', '.join(KINDS)}, and tree-N with a number of nodes, such as tree-63."
            )
        return method

    @property
    def name(self) -> str:
        """What [`parse`] takes."""
        return self.kind if self.num_nodes is None else f"{self.kind}-{self.num_nodes}"

    @property
    def can_be_static(self) -> bool:
        """Whether it decodes with caches of a fixed size, and so can be compiled."""
        return self.kind == "plain" or self.kind in _OURS

    @property
    def takes_batches(self) -> bool:
        """Whether it decodes several prompts at once."""
        return self.can_be_static  # those of transformers with an assistant take one

    def is_comparable(self, temperature: float) -> bool:
        """Whether it emits the tokens of plain decoding: when sampling, only where it draws as that does."""
        return temperature == 0 or self.kind == "plain" or self.kind in _OURS

    def keywords(self, head: PreTrainedModel, streamer: BaseStreamer) -> dict[str, Any]:
        """What makes `generate` decode so.

        Args:
            head (`JetSpecDraftHead`): the head, which stays as it is.
            streamer (`BaseStreamer`): gets the prompt, then the tokens.
        """
        if self.kind in _OURS:
            # By this way alone a call can say everything: that the number of nodes is free, or how many there are.
            return {"custom_generate": decode_with(head, streamer=streamer, options=self._draft_options(head))}
        of_kind: dict[str, dict[str, Any]] = {
            "plain": {},
            "lookup": {"prompt_lookup_num_tokens": _LOOKUP_TOKENS},
            "dflash": {"assistant_model": head, "speculation_type": "dflash"},
        }
        return {"streamer": streamer} | of_kind[self.kind]

    def _draft_options(self, head: PreTrainedModel) -> DraftOptions:
        asked = DraftOptions.of(head.config)
        if self.kind == "chain":  # of the whole block, and by the head alone
            num_nodes = head.config.block_size - 1
            return replace(asked, num_assistant_tokens=num_nodes, prompt_lookup_num_tokens=0, is_chain=True)
        if self.kind == "auto" or self.num_nodes is not None:
            return replace(asked, num_assistant_tokens=self.num_nodes)
        return asked
