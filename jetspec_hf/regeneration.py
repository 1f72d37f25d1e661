"""The target's own answers, written down to train on."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .data import Prompt, encode_prompt


@torch.no_grad()
def regenerate(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    output: str | Path,
    *,
    max_new_tokens: int = 1024,
    batch_size: int = 16,
    enable_thinking: bool = False,
) -> None:
    """Write the target's own greedy answers, to train a head on: on foreign answers it learns half as much.

    A run that was stopped at any moment goes on where it was when called again with the same prompts; no row is lost or
    doubled. How many answers were cut at `max_new_tokens` is said at the end.

    Args:
        target (`PreTrainedModel`): the target.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        prompts (`Sequence[str | list[dict]]`): user turns, or messages to answer.
        output (`str` or `Path`):
            JSON lines of `index`, `prompt` and `response`, shortest prompts first. Its folder is made if missing.
        max_new_tokens (`int`, *optional*, defaults to 1024): longest answer in tokens.
        batch_size (`int`, *optional*, defaults to 16): prompts at once, padded on the left.
        enable_thinking (`bool`, *optional*, defaults to `False`): what to tell the chat template.

    Raises:
        ValueError: if `output` holds answers to other prompts.
    """
    output = Path(output)
    done = _rows_done(output, prompts)
    todo = [
        (encode_prompt(tokenizer, prompt, enable_thinking=enable_thinking), index)
        for index, prompt in enumerate(prompts)
        if index not in done
    ]
    todo.sort(key=lambda one: len(one[0]))
    num_cut = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file, tqdm(total=len(prompts), initial=len(done), desc="answers", unit="row") as progress:
        for start in range(0, len(todo), batch_size):
            chunk = todo[start : start + batch_size]
            inputs = tokenizer.pad({"input_ids": [ids for ids, _ in chunk]}, padding_side="left", return_tensors="pt")
            outputs = target.generate(**inputs.to(target.device), max_new_tokens=max_new_tokens, do_sample=False)
            outputs = outputs[:, inputs["input_ids"].shape[1] :]
            if outputs.shape[1] == max_new_tokens:
                num_cut += int((~torch.isin(outputs, _ends(target)).any(dim=1)).sum())
            for (_, index), answer in zip(
                chunk, tokenizer.batch_decode(outputs, skip_special_tokens=True), strict=True
            ):
                file.write(json.dumps({"index": index, "prompt": prompts[index], "response": answer}) + "\n")
            file.flush()
            progress.update(len(chunk))
    print(f"{len(todo)} answers written to {output}; {num_cut} of them cut at {max_new_tokens} tokens")


def _ends(target: PreTrainedModel) -> torch.Tensor:
    """The tokens at which `generate` ends an answer."""
    ends = target.generation_config.eos_token_id
    return torch.tensor([] if ends is None else ends, device=target.device).flatten()


def _rows_done(output: Path, prompts: Sequence[Prompt]) -> set[int]:
    """The prompts that `output` answers already; a half-written last row is cut off."""
    if not output.exists():
        return set()
    text = output.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(output, whole)
    rows = [json.loads(line) for line in text[:whole].splitlines()]
    for row in rows:
        if not 0 <= row["index"] < len(prompts) or prompts[row["index"]] != row["prompt"]:
            raise ValueError(
                f"{str(output)!r} answers {row['prompt']!r}, which is not prompt {row['index']} of this run; "
                "write to another file."
            )
    return {row["index"] for row in rows}
