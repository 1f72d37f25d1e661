"""What a benchmark measures."""

from dataclasses import dataclass, field

from .method import Method


@dataclass(frozen=True)
class BenchmarkOptions:
    """What is measured.

    Args:
        methods (`list[str]`, *optional*):
            Names that [`~jetspec_hf.benchmark.method.Method.parse`] takes, such as `plain`, `lookup` and `tree-63`.
        num_prompts (`int`, *optional*, defaults to 20): most prompts of each set, from its start.
        batch_size (`int`, *optional*, defaults to 1): prompts decoded at once; `lookup` and `dflash` take one.
        max_new_tokens (`int`, *optional*, defaults to 256): longest answer in tokens.
        temperature (`float`, *optional*, defaults to 0.0): 0 decodes greedily; above, no other warper is set.
        seed (`int`, *optional*, defaults to 0): sampling the i-th prompt of a set starts from `seed + i`.
        compile (`bool`, *optional*, defaults to `False`): give plain decoding, chain and trees static caches, and
            compile them, on a CPU too. `lookup` and `dflash` take none.

    Raises:
        ValueError: if a method is unknown or listed twice, or a number is too small.
    """

    methods: list[str] = field(
        default_factory=lambda: ["plain", "lookup", "dflash", "chain", "auto", "tree-15", "tree-31", "tree-63"],
        metadata={
            "help": "plain, lookup, dflash (transformers' chain), chain (ours), auto for trees of as many nodes as are "
            "fastest, tree-N for trees of at most N nodes, tree for the head's own number."
        },
    )
    num_prompts: int = field(default=20, metadata={"help": "Most prompts of each file, from its start."})
    batch_size: int = field(default=1, metadata={"help": "Prompts decoded at once; lookup and dflash take one."})
    max_new_tokens: int = field(default=256, metadata={"help": "Longest answer in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "0 decodes greedily, more samples."})
    seed: int = field(default=0, metadata={"help": "Sampling the i-th prompt of a file starts from seed + i."})
    compile: bool = field(
        default=False,
        metadata={"help": "Compile plain, chain and trees, with static caches; lookup, dflash take none."},
    )

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("There is no method given; choose some, such as plain and auto.")
        for name in self.methods:
            Method.parse(name)
        if len(set(self.methods)) < len(self.methods):
            raise ValueError(f"A method is listed twice in {' '.join(self.methods)}; name each once.")
        alone = [name for name in self.methods if not Method.parse(name).takes_batches]
        if self.batch_size > 1 and alone:
            raise ValueError(
                f"{' and '.join(alone)} decode one prompt at a time; name other `methods`, or leave out `batch_size`."
            )
        if self.batch_size > 1 and self.compile:
            raise ValueError("Static caches take one prompt at a time; leave out `compile`, or `batch_size`.")
        if self.batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1; got {self.batch_size}.")
        if self.num_prompts < 1 or self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(
                "`num_prompts` and `max_new_tokens` must be at least 1 and `temperature` at least 0; "
                f"got {self.num_prompts}, {self.max_new_tokens} and {self.temperature}."
            )
