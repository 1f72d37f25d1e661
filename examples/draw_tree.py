# /// script
# dependencies = ["jetspec_hf"]
# ///
r"""Draw the tree of one round as text, with and without what the Markov head knows of paths.

    python examples/draw_tree.py --prompt "A pen costs 3 dollars. How much do 12 pens cost?" --after 12

`--after` says how many tokens of the answer stand before the round. `*` marks what the target accepts. A number is the
probability of the token under the head, given the path above it.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from jetspec_hf import DraftTree, JetSpecDraftHead
from jetspec_hf.drafting.candidates import JetSpecCandidateGenerator
from jetspec_hf.target.reading import read_target

EXAMPLES = Path(__file__).parent


@torch.no_grad()
def main() -> None:
    """Answer plainly, then draft from the middle of the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=EXAMPLES / "demo_pair/target")
    parser.add_argument("--head", default=EXAMPLES / "demo_pair/head")
    parser.add_argument("--prompt", default="A pen costs 3 dollars. How much do 12 pens cost?")
    parser.add_argument("--after", type=int, default=12)
    parser.add_argument("--num_nodes", type=int, default=15)
    args = parser.parse_args()
    target = AutoModelForCausalLM.from_pretrained(args.target)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    head = JetSpecDraftHead.from_pretrained(args.head).eval()
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt", return_token_type_ids=False)
    num_committed = inputs["input_ids"].shape[1] + args.after
    answer = target.generate(**inputs, max_new_tokens=args.after + head.config.block_size, do_sample=False)
    committed, rest = answer[:, :num_committed], answer[0, num_committed:].tolist()
    states = read_target(target, committed[:, :-1], head.config.target_layer_ids).taps
    positions = torch.arange(num_committed - 1)[None]

    def draft(title: str) -> None:
        generator = JetSpecCandidateGenerator(head, target, num_assistant_tokens=args.num_nodes)
        generator.extend(states, positions)
        tree = generator.draft(committed[:, -1], max_depth=head.config.block_size)
        lines = draw(tree, tokenizer, rest)
        print(f"\n{title}: {sum(line.endswith('*') for line in lines)} accepted\n", *lines, sep="\n")

    print(tokenizer.decode(committed[0]))
    if head.markov_head is not None:
        draft("Each branch follows from its own path")
        head.markov_head = None
    draft("One distribution for each depth")


def draw(tree: DraftTree, tokenizer: PreTrainedTokenizerBase, rest: list[int]) -> list[str]:
    """A line for each node, children below their parent, accepted ones marked."""
    tokens, parents, scores = (part[0].tolist() for part in (tree.tokens, tree.parents, tree.log_probs.exp()))
    lines = []

    def add(node: int, depth: int, is_accepted: bool) -> None:
        share = scores[node] / scores[parents[node]] if node else 1.0
        label = repr(tokenizer.decode([tokens[node]]))
        lines.append(f"{'  ' * depth}{label:<{16 - min(2 * depth, 8)}} {share:.2f}" + " *" * (is_accepted and node > 0))
        for child in (child for child, parent in enumerate(parents) if parent == node):
            add(child, depth + 1, is_accepted and tokens[child] == rest[depth])

    add(0, 0, True)
    return lines


if __name__ == "__main__":
    main()
