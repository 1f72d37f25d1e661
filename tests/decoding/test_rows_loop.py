"""The main property for batches: with any head, every row is what it is without one, in the batch and alone."""

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support.families import FAMILIES, NO_CHUNKS
from support.heads import HEADS, HOSTILE_HEADS, random_head
from support.node_counts import InTurn
from support.pairwise import pairwise
from support.rows import PAD, assert_same_rows, assert_same_rows_cached, make_batch, make_rows_head
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    MaxLengthCriteria,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteria,
    StopStringCriteria,
    SynthIDTextWatermarkingConfig,
    TextStreamer,
    WatermarkingConfig,
)
from transformers.generation.streamers import BaseStreamer

from jetspec_hf import DraftOptions, decode_with
from jetspec_hf.drafting.node_count import SIZES
from jetspec_hf.drafting.round_costs import Choice
from jetspec_hf.upstream import CACHE

WIDTH = 12  # of the prompts
NUM_NEW = 21
WITH_EVERYTHING = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
# The criterion of transformers needs a tokenizer that knows the word "abcdef".
TOKENIZER = PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(
        WordLevel({f"<{token}>": token for token in range(63)} | {"abcdef": 63}, unk_token="<0>")
    )
)


@pytest.fixture
def target(make_target: Callable) -> PreTrainedModel:
    return make_target()


def generate(target: PreTrainedModel, batch: dict[str, Tensor], **options: Any) -> Any:
    torch.manual_seed(11)
    everything = {"max_new_tokens": NUM_NEW, "do_sample": False, "pad_token_id": PAD}
    return target.generate(**(batch | everything | options))


# --- processors and criteria, some of which know rows by their numbers ---


class Automaton(LogitsProcessor):
    """Each row is in a state of its own, moved by its newest token and number, which forbids a third of all tokens."""

    def __init__(self) -> None:
        self.states: list[int] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not self.states:
            self.states = list(range(len(input_ids)))
        for row, token in enumerate(input_ids[:, -1].tolist()):
            self.states[row] = (3 * self.states[row] + token + row) % 7
            scores[row, self.states[row] % 3 :: 3] = -torch.inf
        return scores


class Counting(LogitsProcessor):
    """Has a state: at its n-th call it forbids token n, in place."""

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.num_calls += 1
        scores[:, self.num_calls % scores.shape[1]] = -torch.inf
        scores[:, ::7] -= 1.5
        return scores


def biased_by_row(input_ids: Tensor, scores: Tensor) -> Tensor:
    """A function serves as a processor too."""
    numbers = torch.arange(scores.shape[1])
    rows = torch.arange(len(scores))[:, None]
    return scores + 2.0 * ((numbers + 3 * rows + input_ids[:, -1:]) % 5 == 0)


class RowsEndAt(StoppingCriteria):
    """Ends each row at a length of its own, and remembers every batch that it was asked about."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = torch.tensor(lengths)
        self.seen: list[list[list[int]]] = []
        self.num_scores: list[int | None] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.seen.append(input_ids.tolist())
        self.num_scores.append(None if scores is None else len(scores))
        return input_ids.shape[1] >= self.lengths


class EosByRow(RowsEndAt):
    """Counts as one that ends rows, so that finished ones are padded."""

    eos_token_id = torch.tensor([1])


class CountsTogether(StoppingCriteria):
    """Ends all rows at once, when some tokens were seen often enough in all of them, with a state."""

    def __init__(self, most: int) -> None:
        self.most, self.num_seen = most, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.num_seen += int((input_ids[:, -1] % 3 == 0).sum())
        return torch.full((len(input_ids),), self.num_seen >= self.most)


class AnswersOnce(StoppingCriteria):
    """Answers for all with one `bool`."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        return input_ids.shape[1] >= WIDTH + 8


def allowed_by_row(row: int, text: Tensor) -> list[int]:
    return [(int(text[-1]) * 5 + 11 * row + i * (row + 1)) % 64 for i in range(9)]


Options = Callable[[Tensor], dict[str, Any]]
# Options of `generate`, given the texts that the target continues the prompts with.
OPTIONS: dict[str, Options] = {
    "greedy": lambda texts: {},
    "1_token": lambda texts: {"max_new_tokens": 1},
    "2_tokens": lambda texts: {"max_new_tokens": 2},
    "40_tokens": lambda texts: {"max_new_tokens": 40},
    "max_length": lambda texts: {"max_length": WIDTH + 9, "max_new_tokens": None},
    "eos": lambda texts: {"eos_token_id": int(texts[0, WIDTH + 9])},
    "eos_list": lambda texts: {"eos_token_id": [int(texts[0, WIDTH + 4]), int(texts[-1, WIDTH + 11]), 60]},
    "eos_first_in_all_but_one": lambda texts: {"eos_token_id": texts[1:, WIDTH].tolist()},
    "eos_first_in_all": lambda texts: {"eos_token_id": texts[:, WIDTH].tolist()},
    "eos_in_every_row": lambda texts: {
        "eos_token_id": [int(row[WIDTH + 3 + 2 * i]) for i, row in enumerate(texts)],
    },
    "min_new_tokens": lambda texts: {"eos_token_id": texts[:, WIDTH + 4].tolist(), "min_new_tokens": 9},
    "two_max_lengths": lambda texts: {
        "stopping_criteria": [MaxLengthCriteria(WIDTH + 30), MaxLengthCriteria(WIDTH + 7)],
        "eos_token_id": int(texts[0, WIDTH + 3]),
    },
    "max_length_below_the_prompts": lambda texts: {"stopping_criteria": [MaxLengthCriteria(3)]},
    "stop_strings": lambda texts: {
        "stop_strings": [f"{texts[0, -6]}> <{texts[0, -5]}", f"<{texts[-1, WIDTH + 5]}>"],
        "tokenizer": TOKENIZER,
    },
    "stop_strings_and_eos": lambda texts: {
        "stop_strings": [f"{texts[0, -6]}> <{texts[0, -5]}", f"<{texts[-1, WIDTH + 5]}>"],
        "tokenizer": TOKENIZER,
        "eos_token_id": int(texts[0, -3]),
    },
    "prefill_chunk_size": lambda texts: {"prefill_chunk_size": 5},
    "repetition_penalty": lambda texts: {"repetition_penalty": 1.8},
    "no_repeat_ngram_size": lambda texts: {"no_repeat_ngram_size": 2, "repetition_penalty": 0.6},
    "bad_words_ids": lambda texts: {
        "bad_words_ids": [[int(texts[0, WIDTH])], texts[1, WIDTH + 2 : WIDTH + 4].tolist()]
    },
    "suppress_tokens": lambda texts: {
        "suppress_tokens": texts[0, WIDTH : WIDTH + 3].tolist(),
        "begin_suppress_tokens": [int(texts[1, WIDTH])],
    },
    "sequence_bias": lambda texts: {"sequence_bias": [[[int(texts[0, WIDTH])], -4.0], [[int(texts[1, -4]), 5], 6.0]]},
    "forced_eos_token_id": lambda texts: {"forced_eos_token_id": 17, "max_new_tokens": 9},
    "exponential_decay": lambda texts: {"exponential_decay_length_penalty": (4, 1.3), "eos_token_id": 17},
    "trie": lambda texts: {"prefix_allowed_tokens_fn": allowed_by_row},
    "automaton": lambda texts: {"logits_processor": [Automaton()]},
    "automaton_and_eos": lambda texts: {"logits_processor": [Automaton()], "eos_token_id": [7, 22, 41]},
    "stateful_processor": lambda texts: {"logits_processor": [Counting()]},
    "function": lambda texts: {"logits_processor": [biased_by_row], "eos_token_id": [5, 44]},
    "guidance_scale": lambda texts: {"guidance_scale": 1.7},
    "negative_prompt": lambda texts: {
        "guidance_scale": 2.5,
        "negative_prompt_ids": texts[:, 3:7],
        "negative_prompt_attention_mask": (torch.arange(4) >= torch.arange(len(texts))[:, None].clamp(max=2)).long(),
    },
    "criterion": lambda texts: {"stopping_criteria": [RowsEndAt([WIDTH + 15 - 3 * i for i in range(len(texts))])]},
    "criterion_and_eos": lambda texts: {
        "stopping_criteria": [EosByRow([WIDTH + 2 + 3 * i for i in range(len(texts))])],
        "eos_token_id": int(texts[-1, WIDTH + 6]),
    },
    "batch_criterion": lambda texts: {"stopping_criteria": [CountsTogether(6)]},
    "batch_criterion_and_eos": lambda texts: {
        "stopping_criteria": [CountsTogether(9)],
        "eos_token_id": int(texts[0, WIDTH + 4]),
    },
    "one_answer": lambda texts: {"stopping_criteria": [AnswersOnce()], "eos_token_id": int(texts[0, WIDTH + 4])},
    "max_time": lambda texts: {"max_time": 3600.0, "eos_token_id": int(texts[0, WIDTH + 9])},
    "sample": lambda texts: {"do_sample": True},
    "sample_eos": lambda texts: {"do_sample": True, "temperature": 0.8, "eos_token_id": list(range(2, 64, 9))},
    "top_k": lambda texts: {"do_sample": True, "top_k": 5, "repetition_penalty": 1.2},
    "top_p": lambda texts: {"do_sample": True, "top_p": 0.7, "temperature": 1.4},
    "sample_criterion": lambda texts: {
        "do_sample": True,
        "top_p": 0.9,
        "stopping_criteria": [CountsTogether(6)],
    },
    "sample_automaton": lambda texts: {"do_sample": True, "logits_processor": [Automaton()], "eos_token_id": 9},
    "watermark": lambda texts: {"do_sample": True, "watermarking_config": WatermarkingConfig(bias=3.0)},
    "watermark_with_a_state": lambda texts: {
        "do_sample": True,
        "watermarking_config": SynthIDTextWatermarkingConfig(keys=[3, 5, 8, 13], ngram_len=3, context_history_size=64),
        "eos_token_id": list(range(2, 64, 9)),
    },
    "confident_nodes": lambda texts: {"assistant_confidence_threshold": 0.9, "eos_token_id": int(texts[0, WIDTH + 9])},
}
# What a row gives by itself as well.
ROW_BY_ROW = {
    *("greedy", "1_token", "40_tokens", "eos", "eos_list", "eos_in_every_row", "eos_first_in_all", "min_new_tokens"),
    *("stop_strings_and_eos", "prefill_chunk_size", "suppress_tokens", "exponential_decay"),
    *("guidance_scale", "max_time", "confident_nodes"),
}
# Where texts end in ways that need no tensor for each token.
ENDS = ["2_tokens", "max_length", "two_max_lengths", "eos_first_in_all_but_one", "eos_in_every_row"]
NODES = [1, 7, None]


def compare(
    target: PreTrainedModel, make_options: Options, head_name: str, num_nodes: int | None, num_rows: int
) -> Any:
    """Decode plainly and with a head, and compare all there is; the drafted output."""
    batch = make_batch(num_rows)
    texts = generate(target, batch)

    def options() -> dict[str, Any]:
        return make_options(texts)

    plain = generate(target, batch, **options(), **WITH_EVERYTHING)
    state = torch.get_rng_state()
    head = make_rows_head(head_name, target, plain.sequences, batch["attention_mask"])
    head.config.num_assistant_tokens = num_nodes
    ours = generate(target, batch, **options(), **WITH_EVERYTHING, assistant_model=head)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_rows(ours, plain, WIDTH)
    return ours


@pytest.mark.parametrize(
    ("option", "head_name", "num_nodes", "num_rows"),
    pairwise(itertools.product(OPTIONS, HEADS, NODES, [2, 5])),
)
def test_every_option_gives_what_plain_generate_gives(
    target: PreTrainedModel, option: str, head_name: str, num_nodes: int | None, num_rows: int
) -> None:
    output = compare(target, OPTIONS[option], head_name, num_nodes, num_rows)
    if head_name == "oracle" and num_nodes == 7 and "criterion" not in option:
        for row in output.statistics.rows:
            assert row.num_rounds <= -(-(row.num_new_tokens - 1) // 6)


@pytest.mark.parametrize(
    ("option", "head_name", "num_rows"), pairwise(itertools.product(ENDS, [*HEADS, *HOSTILE_HEADS], [2, 5]))
)
def test_tokens_alone_take_a_shorter_way_to_the_same_end(
    target: PreTrainedModel, option: str, head_name: str, num_rows: int
) -> None:
    batch = make_batch(num_rows)
    options = OPTIONS[option](generate(target, batch))
    plain = generate(target, batch, **options)
    head = make_rows_head(head_name, target, plain, batch["attention_mask"])
    assert generate(target, batch, **options, assistant_model=head).tolist() == plain.tolist()


@pytest.mark.parametrize(
    ("option", "head_name", "num_nodes", "num_rows"),
    pairwise(
        itertools.product(
            ["eos_list", "sample_eos", "repetition_penalty", "automaton"], HOSTILE_HEADS, [7, None], [2, 5]
        )
    ),
)
def test_no_head_can_change_a_row(
    target: PreTrainedModel, option: str, head_name: str, num_nodes: int | None, num_rows: int
) -> None:
    compare(target, OPTIONS[option], head_name, num_nodes, num_rows)


@pytest.mark.parametrize("option", sorted(ROW_BY_ROW))
def test_a_row_is_what_it_is_alone(target: PreTrainedModel, option: str) -> None:
    batch = make_batch(5)
    options = OPTIONS[option](generate(target, batch))
    texts = generate(target, batch, **options, assistant_model=random_head(target))
    for row, num_pads in enumerate((batch["attention_mask"] == 0).sum(dim=1).tolist()):
        alone = generate(target, {name: value[row, None, num_pads:] for name, value in batch.items()}, **options)
        text = torch.nn.functional.pad(alone, (0, texts.shape[1] - num_pads - alone.shape[1]), value=PAD)
        assert texts[row, None, num_pads:].tolist() == text.tolist()


# --- families ---

FAMILY_OPTIONS = [
    "greedy",
    "eos_in_every_row",
    "sample_eos",
    "repetition_penalty",
    "prefill_chunk_size",
    "batch_criterion",
]
PAIRS = [(family, attention) for family in FAMILIES for attention in FAMILIES[family].attentions]
CASES = pairwise(
    (*pair, *rest) for pair in PAIRS for rest in itertools.product(FAMILY_OPTIONS, ["markov", "oracle"], [7, None])
)


@pytest.mark.parametrize(("family", "attention"), PAIRS)
def test_a_batch_gives_what_the_family_gives(family: str, attention: str) -> None:
    target = FAMILIES[family].build(attention)
    for i, (option, head_name, num_nodes) in enumerate(case[2:] for case in CASES if case[:2] == (family, attention)):
        if option != "prefill_chunk_size" or family not in NO_CHUNKS:
            compare(target, OPTIONS[option], head_name, num_nodes, num_rows=2 + 3 * (i % 2))


@pytest.mark.parametrize(
    ("family", "num_cached", "head_name"),
    # Less and more is cached than a window.
    [*zip(FAMILIES, itertools.cycle((4, 10)), itertools.cycle(["markov", "markov", "oracle", "oracle"]), strict=False)],
)
def test_a_cache_of_several_rows_is_continued_and_can_be_continued(
    family: str, num_cached: int, head_name: str
) -> None:
    target = FAMILIES[family].build(FAMILIES[family].attentions[0])
    batch = make_batch(5)
    mask = batch["attention_mask"]
    texts = generate(target, batch)

    def continued(assistant: PreTrainedModel | None, cache: Any, sequences: Tensor, **options: Any) -> Any:
        mask_of_all = torch.nn.functional.pad(mask, (0, sequences.shape[1] - WIDTH), value=1)
        inputs = {"input_ids": sequences, "attention_mask": mask_of_all, CACHE: cache}
        return generate(target, inputs, assistant_model=assistant, return_dict_in_generate=True, **options)

    def cached() -> DynamicCache:
        cache = DynamicCache(config=target.config)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        first = {name: part[:, :num_cached] for name, part in (batch | {"position_ids": positions}).items()}
        with torch.no_grad():
            target(**first, **{CACHE: cache})
        return cache

    head = make_rows_head(head_name, target, texts, mask)
    eos = texts[1:3, WIDTH + 4].tolist()  # two rows end before the others
    for plan in ({}, {"eos_token_id": eos}):
        plain, ours = (continued(one, cached(), batch["input_ids"], max_new_tokens=9, **plan) for one in (None, head))
        # The same where the tokens that are cached are not given again.
        rest, mask_of_all = batch["input_ids"][:, num_cached:], {"attention_mask": mask, CACHE: cached()}
        rest = generate(target, {"input_ids": rest, **mask_of_all}, assistant_model=head, max_new_tokens=9, **plan)
        assert rest.tolist() == plain.sequences[:, num_cached:].tolist()
        assert ours.sequences.tolist() == plain.sequences.tolist()
        num_missing = [9 - row.num_new_tokens for row in ours.statistics.rows]
        assert_same_rows_cached(ours[CACHE], plain[CACHE], num_missing)
        goes_on = torch.tensor(num_missing) == 0
        assert goes_on.any()
        plain, *others = (
            continued(one, copy.deepcopy(output[CACHE]), output.sequences, max_new_tokens=7).sequences[goes_on].tolist()
            for one, output in ((None, plain), (None, ours), (head, ours), (head, plain))
        )
        assert others == [plain] * 3


def test_a_row_that_is_ahead_asks_for_no_position_behind_its_last(target: PreTrainedModel) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "max_position_embeddings": WIDTH + NUM_NEW, "init_std": 0.4}
    learned = OPTForCausalLM(OPTConfig(**sizes, bos_token_id=None, eos_token_id=None, pad_token_id=1)).eval()
    batch = make_batch(5)
    plain = generate(learned, batch)
    known = plain.clone()
    known[1:, WIDTH + 2 :] = 3  # so that the first row alone gets far
    head = make_rows_head("oracle", learned, known, batch["attention_mask"])
    output = generate(learned, batch, assistant_model=head, return_dict_in_generate=True)
    assert output.sequences.tolist() == plain.tolist()
    assert output.statistics.rows[0].num_rounds < output.statistics.rows[1].num_rounds


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_cache_without_windows_serves_a_sliding_target(family: str) -> None:
    target = FAMILIES[family].build("sdpa")
    batch = make_batch(5)
    texts = generate(target, batch)
    head = make_rows_head("markov", target, texts, batch["attention_mask"])
    assert generate(target, batch, **{CACHE: DynamicCache()}, assistant_model=head).tolist() == texts.tolist()


# --- how many nodes ---


@pytest.fixture
def in_turn(monkeypatch: pytest.MonkeyPatch) -> InTurn:
    count = InTurn()
    monkeypatch.setattr("jetspec_hf.decoding.workers.node_count_of", lambda *place: count)
    return count


@pytest.mark.parametrize(
    ("option", "head_name", "num_rows"),
    pairwise(
        itertools.product(
            ["40_tokens", "eos_in_every_row", "sample_eos", "automaton_and_eos", "stop_strings", "confident_nodes"],
            [*HEADS, *HOSTILE_HEADS],
            [2, 5],
        )
    ),
)
def test_sizes_that_change_from_round_to_round_give_the_same_text(
    target: PreTrainedModel, in_turn: InTurn, option: str, head_name: str, num_rows: int
) -> None:
    output = compare(target, OPTIONS[option], head_name, None, num_rows)
    drafted = output.statistics.drafted_nodes
    assert len(set(drafted)) > 1 or option == "confident_nodes"
    assert max(drafted) <= SIZES[-1]


@pytest.mark.parametrize("is_chain", [False, True])
@pytest.mark.parametrize("option", ["greedy", "sample", "eos_in_every_row", "automaton"])
def test_grafts_alone_are_accepted_and_the_head_rests(
    make_target: Callable, in_turn: InTurn, monkeypatch: pytest.MonkeyPatch, option: str, is_chain: bool
) -> None:
    target, batch = make_target(vocab_size=8), make_batch(5, vocab_size=8)
    monkeypatch.setattr(in_turn, "ALL", [Choice(31, runs_head=False)])
    options = {"max_new_tokens": 50} | OPTIONS[option](generate(target, batch))
    plain = generate(target, batch, **(options | OPTIONS[option](generate(target, batch))), **WITH_EVERYTHING)
    head = random_head(target)
    calls: list[int] = []
    head.register_forward_pre_hook(lambda *args: calls.append(1))
    drafting = DraftOptions(None, prompt_lookup_num_tokens=16, is_chain=is_chain)
    output = generate(target, batch, **options, **WITH_EVERYTHING, custom_generate=decode_with(head, options=drafting))
    assert_same_rows(output, plain, WIDTH)
    assert calls == []
    assert max(output.statistics.drafted_nodes) <= (16 if is_chain else 31)
    if option == "greedy":
        assert output.statistics.tokens_per_round > 1.5


def test_rows_share_one_number_of_nodes_which_is_learned_by_how_many_there_are(
    target: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def node_count(pair: Any, sizes: tuple[int, ...], num_rows: int) -> InTurn:
        asked.append(num_rows)
        return InTurn()

    monkeypatch.setattr("jetspec_hf.decoding.workers.node_count_of", node_count)
    batch = make_batch(5)
    options = OPTIONS["eos_in_every_row"](generate(target, batch))
    head = random_head(target, num_assistant_tokens=None)
    output = generate(target, batch, **options, assistant_model=head, return_dict_in_generate=True)
    ends = sorted({row.num_rounds for row in output.statistics.rows} - {0})
    assert asked == [sum(row.num_rounds >= end for row in output.statistics.rows) for end in ends]


# --- other ways to ask for several rows ---


@pytest.mark.parametrize("head_name", HEADS)
def test_several_answers_to_a_prompt_are_several_rows(target: PreTrainedModel, head_name: str) -> None:
    batch, options = make_batch(2), {"do_sample": True, "num_return_sequences": 3, "eos_token_id": [7, 30]}
    plain = generate(target, batch, **options)
    assert len(plain) == 6
    head = make_rows_head(head_name, target, plain, batch["attention_mask"].repeat_interleave(3, dim=0))
    assert generate(target, batch, **options, assistant_model=head).tolist() == plain.tolist()
    custom = generate(target, batch, **options, custom_generate=decode_with(head))
    assert custom.tolist() == plain.tolist()


@pytest.mark.parametrize("option", ["eos_list", "sample_eos", "trie"])
def test_nothing_need_be_patched(target: PreTrainedModel, option: str) -> None:
    batch = make_batch(5)
    options = OPTIONS[option](generate(target, batch))
    streamers = Columns(), Columns()
    plain = generate(target, batch, **options, streamer=streamers[0])
    ours = decode_with(random_head(target), streamer=streamers[1], options=DraftOptions(7))
    assert generate(target, batch, **options, custom_generate=ours).tolist() == plain.tolist()
    assert streamers[1].puts == streamers[0].puts


def test_stop_strings_stop_rows_of_a_custom_loop(target: PreTrainedModel) -> None:
    batch = make_batch(5)
    texts = generate(target, batch)
    string = f"<{texts[0, -8]}>"
    plain = generate(target, batch, stop_strings=[string], tokenizer=TOKENIZER, eos_token_id=63)
    criterion = StopStringCriteria(TOKENIZER, [string])
    ours = decode_with(make_rows_head("oracle", target, texts, batch["attention_mask"]))
    options = {"stopping_criteria": [criterion], "eos_token_id": 63, "custom_generate": ours}
    assert generate(target, batch, **options).tolist() == plain.tolist()


def test_an_adapted_target_and_head_serve_a_batch(target: PreTrainedModel) -> None:
    batch, head = make_batch(5), random_head(target)
    model = get_peft_model(target, LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False)).eval()
    adapted = get_peft_model(head, LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    plain = generate(model, batch, eos_token_id=[7, 30])
    for one in (head, adapted):
        assert generate(model, batch, eos_token_id=[7, 30], assistant_model=one).tolist() == plain.tolist()


@pytest.mark.parametrize("num_given", [1, 5])
def test_given_positions_are_kept(target: PreTrainedModel, num_given: int) -> None:
    batch = make_batch(5)
    positions = torch.arange(3, 3 + WIDTH).expand(num_given, -1)
    options = {"position_ids": positions, "eos_token_id": generate(target, batch)[:3, WIDTH].tolist()}
    plain = generate(target, batch, **options)
    assert generate(target, batch, **options, assistant_model=random_head(target)).tolist() == plain.tolist()


def test_a_batch_without_a_mask_is_read_whole(target: PreTrainedModel) -> None:
    ids = make_batch(5)["input_ids"].clamp(min=1)
    plain = target.generate(ids, max_new_tokens=9, do_sample=False)
    assert target.generate(ids, max_new_tokens=9, do_sample=False, assistant_model=random_head(target)).equal(plain)


@pytest.mark.parametrize(
    "overrides",
    [
        {"block_size": 2},
        {"block_size": 17},
        {"is_causal": False},
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention"] * 2},
        {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
        {"target_layer_ids": [3, 0], "num_hidden_layers": 1},
        {"attn_implementation": "eager"},
        {"num_assistant_tokens": 200},
        {"prompt_lookup_num_tokens": 0},
        {"draft_temperatures": [0.5, 0.7, 1.0, 1.5, 2.0]},
    ],
    ids=lambda overrides: "-".join(overrides),
)
@pytest.mark.parametrize("head_name", ["markov", "oracle"])
def test_any_shape_of_head_gives_the_same_tokens(
    target: PreTrainedModel, head_name: str, overrides: dict[str, Any]
) -> None:
    batch = make_batch(5)
    eos = generate(target, batch)[1:3, WIDTH + 4].tolist()
    plain = generate(target, batch, eos_token_id=eos, max_new_tokens=31)
    head = make_rows_head(head_name, target, plain, batch["attention_mask"], **overrides)
    options = {"eos_token_id": eos, "max_new_tokens": 31, "return_dict_in_generate": True}
    output = generate(target, batch, **options, assistant_model=head)
    assert output.sequences.tolist() == plain.tolist()
    if head_name == "oracle":
        for row in output.statistics.rows:
            assert row.num_rounds == -(-(row.num_new_tokens - 1) // head.config.block_size)


def test_a_head_in_training_drafts_as_in_evaluation(target: PreTrainedModel) -> None:
    batch, head = make_batch(2), random_head(target, attention_dropout=0.5).train()
    plain = generate(target, batch, do_sample=True)
    assert generate(target, batch, do_sample=True, assistant_model=head).tolist() == plain.tolist()
    assert head.training


def test_inference_mode_gives_the_same_tokens(target: PreTrainedModel) -> None:
    batch, head = make_batch(5), random_head(target)
    plain = generate(target, batch, eos_token_id=[7, 30])
    with torch.inference_mode():
        assert generate(target, batch, eos_token_id=[7, 30], assistant_model=head).tolist() == plain.tolist()


def test_what_comes_out_can_be_trained_on(target: PreTrainedModel) -> None:
    options = {"eos_token_id": [7, 30], "assistant_model": random_head(target)}
    output = generate(target, make_batch(5), **options, **WITH_EVERYTHING)
    states = [tensor for layer in output[CACHE].layers for tensor in (layer.keys, layer.values)]
    assert not any(tensor.is_inference() for tensor in [output.sequences, *output.scores, *output.logits, *states])
    target.train()(output.sequences, labels=output.sequences).loss.backward()


# --- criteria and streamers ---


class Columns(BaseStreamer):
    """Takes the tokens of all rows."""

    def __init__(self) -> None:
        self.puts: list[Any] = []

    def put(self, value: Tensor) -> None:
        self.puts.append(value.tolist())

    def end(self) -> None:
        self.puts.append("end")


STREAMED = [
    "1_token",
    "eos_list",
    "eos_first_in_all",
    "stop_strings",
    "criterion",
    "batch_criterion_and_eos",
    "sample_eos",
]


@pytest.mark.parametrize(("option", "head_name"), pairwise(itertools.product(STREAMED, HEADS)))
def test_the_streamer_gets_the_prompts_then_every_column_then_the_end(
    target: PreTrainedModel, option: str, head_name: str
) -> None:
    batch = make_batch(5)
    texts = generate(target, batch)
    plain, ours = Columns(), Columns()
    sequences = generate(target, batch, **OPTIONS[option](texts), streamer=plain)
    head = make_rows_head(head_name, target, sequences, batch["attention_mask"])
    generate(target, batch, **OPTIONS[option](texts), streamer=ours, assistant_model=head)
    assert ours.puts == plain.puts


def test_a_text_streamer_refuses_a_batch(target: PreTrainedModel) -> None:
    for head in (None, random_head(target)):
        with pytest.raises(ValueError, match="only supports batch size 1"):
            generate(target, make_batch(2), assistant_model=head, streamer=TextStreamer(TOKENIZER))


@pytest.mark.parametrize("head_name", HEADS)
@pytest.mark.parametrize("criterion", [RowsEndAt, EosByRow])
def test_criteria_are_asked_about_every_column(
    target: PreTrainedModel, criterion: type[RowsEndAt], head_name: str
) -> None:
    batch, lengths = make_batch(5), [WIDTH + n for n in (9, 1, 14, 5, 8)]
    head = make_rows_head(head_name, target, generate(target, batch), batch["attention_mask"])
    asked = []
    for assistant in (None, head):
        asked.append(criterion(lengths))
        options = {"return_dict_in_generate": True, "output_scores": True, "eos_token_id": 3}
        generate(target, batch, stopping_criteria=[asked[-1]], **options, assistant_model=assistant)
    plain, ours = asked
    assert ours.seen == plain.seen
    assert ours.num_scores == plain.num_scores == list(range(1, 15))


class OutOfTime(StoppingCriteria):
    """Like `MaxTimeCriteria`, by the number of questions."""

    def __init__(self, most: int) -> None:
        self.most, self.num_asked = most, 0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.num_asked += 1
        return torch.full((len(input_ids),), self.num_asked >= self.most)


@pytest.mark.parametrize("options", [{}, {"eos_token_id": [7, 30]}])
@pytest.mark.parametrize("head_name", HEADS)
def test_when_time_is_out_all_rows_end_with_one_column(
    target: PreTrainedModel, head_name: str, options: dict[str, Any]
) -> None:
    batch = make_batch(5)
    plain = generate(target, batch, **options)
    head = make_rows_head(head_name, target, plain, batch["attention_mask"])
    short = generate(target, batch, **options, max_time=1e-9, assistant_model=head)
    assert short.tolist() == plain[:, : WIDTH + 1].tolist()
    for most in (2, 8):
        ended = generate(target, batch, **options, stopping_criteria=[OutOfTime(most)], assistant_model=head)
        assert ended.tolist() == plain[:, : WIDTH + most].tolist()


# --- what a call leaves behind ---


def hooks_of(model: PreTrainedModel) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


class Fails(StoppingCriteria):
    """Raises when a text has some length, for a processor too."""

    def __init__(self, error: type[BaseException], length: int) -> None:
        self.error, self.length = error, length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        if input_ids.shape[1] >= self.length:
            raise self.error
        return torch.zeros(len(input_ids), dtype=torch.bool)


class Interrupts(LogitsProcessor):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] >= self.length:
            raise KeyboardInterrupt
        return scores


@pytest.mark.parametrize("family", ["gemma3", "llama"])
@pytest.mark.parametrize("length", [WIDTH, WIDTH + 9])
@pytest.mark.parametrize("where", ["criterion", "criterion interrupts", "processor", "target", "head"])
def test_after_a_call_that_fails_hooks_are_gone_and_the_next_is_right(family: str, length: int, where: str) -> None:
    target = FAMILIES[family].build("sdpa")
    batch, head = make_batch(5), random_head(target)
    eos = generate(target, batch)[1:3, WIDTH + 2].tolist()
    before, cache = hooks_of(target), DynamicCache(config=target.config)
    plain = generate(target, batch, eos_token_id=eos)
    options: dict[str, Any] = {"eos_token_id": eos, CACHE: cache, "assistant_model": head}
    error: type[BaseException] = RuntimeError
    left = 2 if length == WIDTH else 6

    def fail(*args: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError

    handle = {"target": target.model.layers[2], "head": head}.get(where)
    removable = None if handle is None else handle.register_forward_pre_hook(fail)
    if "criterion" in where:
        error = KeyboardInterrupt if "interrupts" in where else RuntimeError
        options["stopping_criteria"] = [Fails(error, length + 1)]
    elif where == "processor":
        error = KeyboardInterrupt
        options["logits_processor"] = [Interrupts(length)]
    with pytest.raises(error):
        generate(target, batch, **options)
    if removable is not None:
        removable.remove()
    assert hooks_of(target) == before
    assert {type(layer).__name__ for layer in cache.layers} <= {"DynamicLayer", "DynamicSlidingWindowLayer"}
    assert generate(target, batch, eos_token_id=eos, assistant_model=head).tolist() == plain.tolist()


@pytest.mark.parametrize("option", ["greedy", "1_token", "eos_list", "sample_eos", "criterion"])
@pytest.mark.parametrize("head_name", HEADS)
def test_statistics_add_up(target: PreTrainedModel, option: str, head_name: str) -> None:
    batch = make_batch(5)
    texts = generate(target, batch)
    head = make_rows_head(head_name, target, texts, batch["attention_mask"])
    num_forwards = 0

    def count(*args: Any) -> None:
        nonlocal num_forwards
        num_forwards += 1

    with target.register_forward_hook(count):
        output = generate(target, batch, **OPTIONS[option](texts), assistant_model=head, return_dict_in_generate=True)
    statistics = output.statistics
    assert statistics.num_prompt_tokens == 5 * WIDTH
    assert [row.num_prompt_tokens for row in statistics.rows] == [WIDTH] * 5
    assert max(row.num_rounds for row in statistics.rows) == num_forwards - 1
    for name in ("drafted_nodes", "accepted_lengths"):
        assert sorted(getattr(statistics, name)) == sorted(
            itertools.chain.from_iterable(getattr(row, name) for row in statistics.rows)
        )
    if option != "criterion":  # which cuts rows that had gone further
        for row in statistics.rows:
            assert row.num_accepted_tokens + row.num_rounds + 1 == row.num_new_tokens
    assert statistics.num_new_tokens == sum(row.num_new_tokens for row in statistics.rows)


# --- any call ---

ANY_CALL = {
    "seed": st.integers(0, 1000),
    "num_pads": st.lists(st.integers(0, 9), min_size=2, max_size=5),
    "kind": st.sampled_from(["full", "sliding", "eager"]),
    "head_name": st.sampled_from(["random", "markov", "oracle", "erring oracle"]),
    "num_assistant_tokens": st.none() | st.integers(1, 40),
    "block_size": st.integers(2, 10),
    "max_new_tokens": st.integers(1, 24),
    "eos": st.none() | st.integers(0, 63) | st.lists(st.integers(0, 63), min_size=2, max_size=10),
    "sampling": st.none() | st.floats(0.3, 1.6),
    "repetition_penalty": st.sampled_from([None, None, None, 1.3]),
}


@pytest.fixture(scope="module")
def targets(make_target: Callable) -> dict[str, PreTrainedModel]:
    mixed = ["sliding_attention", "full_attention"] * 2
    return {
        "full": make_target(),
        "sliding": make_target(use_sliding_window=True, sliding_window=6, layer_types=mixed),
        "eager": make_target(attn_implementation="eager"),
    }


@settings(max_examples=150, deadline=None, derandomize=True)
@given(**ANY_CALL)
def test_any_batch_gives_the_same_tokens(targets: dict[str, PreTrainedModel], **case: Any) -> None:
    assert_any_batch_gives_the_same_tokens(targets, **case)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(**ANY_CALL)
def test_ten_thousand_batches_give_the_same_tokens(targets: dict[str, PreTrainedModel], **case: Any) -> None:
    assert_any_batch_gives_the_same_tokens(targets, **case)


def assert_any_batch_gives_the_same_tokens(
    targets: dict[str, PreTrainedModel],
    seed: int,
    num_pads: list[int],
    kind: str,
    head_name: str,
    num_assistant_tokens: int | None,
    block_size: int,
    max_new_tokens: int,
    eos: int | list[int] | None,
    sampling: float | None,
    repetition_penalty: float | None,
) -> None:
    target, num_rows = targets[kind], len(num_pads)
    ids = torch.randint(64, (num_rows, 10), generator=torch.Generator().manual_seed(seed))
    mask = (torch.arange(10) >= torch.tensor(num_pads)[:, None]).long()
    batch = {"input_ids": ids, "attention_mask": mask}
    options = {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "repetition_penalty": repetition_penalty}
    if sampling is not None:
        options |= {"do_sample": True, "temperature": sampling}
    plain = generate(target, batch, **options, **WITH_EVERYTHING)
    state = torch.get_rng_state()
    if sampling is None:
        best, second = torch.stack(plain.scores).topk(2).values.unbind(dim=-1)
        assume((best - second).min() > 1e-4)  # else rounding decides
    known = plain.sequences
    if "erring" in head_name:
        known = torch.where(torch.rand(known.shape) < 0.2, 9, known)
    overrides = {"block_size": block_size, "num_assistant_tokens": num_assistant_tokens}
    head = make_rows_head(head_name.split()[-1], target, known, mask, **overrides)
    ours = generate(target, batch, **options, assistant_model=head, return_dict_in_generate=True)
    assert ours.sequences.tolist() == plain.sequences.tolist()
    assert torch.equal(torch.get_rng_state(), state)
    num_missing = [known.shape[1] - 10 - row.num_new_tokens for row in ours.statistics.rows]
    assert_same_rows_cached(ours[CACHE], plain[CACHE], num_missing)
