"""The wrapper around `generate`, and the other ways in."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.heads import constant_head, oracle_head, random_head
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
    pipeline,
)
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils import check_peft_version

import jetspec_hf
from jetspec_hf import DraftOptions, JetSpecDraftHead, JetSpecGenerateOutput, decode_with, install, uninstall
from jetspec_hf.decoding.integration import is_installed
from jetspec_hf.upstream import CACHE

PROMPT = torch.tensor([[3, 14, 15, 9, 26, 5]])
WRAPPED = ("_assisted_decoding", "_validate_generation_mode")


@pytest.fixture
def target(make_target: Callable) -> PreTrainedModel:
    return make_target()


@pytest.fixture(scope="session")
def text(make_target: Callable) -> Tensor:
    return generate(make_target())


@pytest.fixture(autouse=True)
def _leave_installed() -> Iterator[None]:
    methods = {name: inspect.getattr_static(GenerationMixin, name) for name in WRAPPED}
    yield
    for name, method in methods.items():
        setattr(GenerationMixin, name, method)


def generate(target: PreTrainedModel, **options: Any) -> Any:
    torch.manual_seed(11)
    return target.generate(PROMPT, **({"max_new_tokens": 20, "do_sample": False} | options))


# --- install, uninstall ---


def test_importing_installs() -> None:
    assert all(is_installed(name) for name in WRAPPED)


def test_installing_again_changes_nothing() -> None:
    before = [getattr(GenerationMixin, name) for name in WRAPPED]
    install()
    install()
    assert [getattr(GenerationMixin, name) for name in WRAPPED] == before
    assert not any(hasattr(method.__wrapped__, "is_jetspec_wrapper") for method in before)


def test_uninstalling_restores_the_methods_that_were_there(target: PreTrainedModel, text: Tensor) -> None:
    stock = [getattr(GenerationMixin, name).__wrapped__ for name in WRAPPED]
    uninstall()
    assert [vars(GenerationMixin)[name] for name in WRAPPED] == stock
    assert not any(is_installed(name) for name in WRAPPED)
    uninstall()
    assert [vars(GenerationMixin)[name] for name in WRAPPED] == stock
    with pytest.raises(AttributeError):  # the stock method knows no such assistant
        generate(target, assistant_model=random_head(target))
    install()
    assert all(is_installed(name) for name in WRAPPED)
    assert generate(target, assistant_model=random_head(target)).tolist() == text.tolist()


def test_the_wrappers_keep_name_and_signature() -> None:
    for name in WRAPPED:
        wrapper = getattr(GenerationMixin, name)
        assert wrapper.__name__ == name
        assert inspect.signature(wrapper) == inspect.signature(wrapper.__wrapped__)


def test_a_wrapper_of_another_library_survives(target: PreTrainedModel, text: Tensor) -> None:
    ours = GenerationMixin._assisted_decoding
    num_calls = 0

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return ours(self, *args, **kwargs)

    theirs.__signature__ = inspect.signature(ours)  # type: ignore[attr-defined]
    GenerationMixin._assisted_decoding = theirs
    uninstall()
    assert GenerationMixin._assisted_decoding is theirs
    assert not is_installed("_validate_generation_mode")
    output = generate(target, assistant_model=random_head(target), return_dict_in_generate=True)
    assert output.sequences.tolist() == text.tolist()
    assert isinstance(output, JetSpecGenerateOutput)
    assert num_calls == 1


def test_installing_on_top_of_another_wrapper_calls_it_for_other_assistants(
    make_target: Callable, target: PreTrainedModel, text: Tensor
) -> None:
    uninstall()
    stock = GenerationMixin._assisted_decoding
    num_calls = 0

    def theirs(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal num_calls
        num_calls += 1
        return stock(self, *args, **kwargs)

    theirs.__signature__ = inspect.signature(stock)  # type: ignore[attr-defined]
    GenerationMixin._assisted_decoding = theirs
    install()
    assert generate(target, assistant_model=random_head(target)).tolist() == text.tolist()
    assert num_calls == 0
    assert generate(target, assistant_model=make_target(seed=1)).tolist() == text.tolist()
    assert num_calls == 1
    uninstall()
    assert GenerationMixin._assisted_decoding is theirs


@pytest.mark.parametrize("name", WRAPPED)
def test_a_changed_stock_method_warns_and_installs_nothing(name: str) -> None:
    uninstall()
    before = {wrapped: getattr(GenerationMixin, wrapped) for wrapped in WRAPPED}

    def changed(self: Any, something_else: Any) -> None:
        pass

    setattr(GenerationMixin, name, changed)
    with pytest.warns(UserWarning, match=rf"GenerationMixin.{name}.*custom_generate=jetspec_hf.decode_with"):
        install()
    assert not any(is_installed(wrapped) for wrapped in WRAPPED)
    assert {wrapped: getattr(GenerationMixin, wrapped) for wrapped in WRAPPED} == before | {name: changed}


def test_a_removed_stock_method_warns_and_installs_nothing() -> None:
    uninstall()
    del GenerationMixin._assisted_decoding
    with pytest.warns(UserWarning, match="decode_with"):
        install()
    assert not hasattr(GenerationMixin, "_assisted_decoding")
    assert not is_installed("_validate_generation_mode")


def test_the_stock_methods_of_this_version_install_without_a_warning() -> None:
    uninstall()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        install()
    assert all(is_installed(name) for name in WRAPPED)


# --- what is not ours passes through ---


def forwards_in(target: PreTrainedModel, **options: Any) -> tuple[Any, int]:
    num_forwards = 0

    def count(*args: Any) -> None:
        nonlocal num_forwards
        num_forwards += 1

    with target.register_forward_hook(count):
        output = generate(target, **options, return_dict_in_generate=True)
    return output, num_forwards


@pytest.mark.parametrize("option", ["assistant", "itself", "prompt_lookup", "sampled", "beams"])
def test_other_calls_run_as_they_did_before(make_target: Callable, target: PreTrainedModel, option: str) -> None:
    options = {
        "assistant": {"assistant_model": make_target(seed=1)},
        "itself": {"assistant_model": target},
        "prompt_lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
        "sampled": {"assistant_model": make_target(seed=1), "do_sample": True},
        "beams": {"num_beams": 3},
    }[option]
    output, num_forwards = forwards_in(target, **options)
    assert not isinstance(output, JetSpecGenerateOutput)
    uninstall()
    stock, num_stock_forwards = forwards_in(target, **options)
    assert output.sequences.tolist() == stock.sequences.tolist()
    assert num_forwards == num_stock_forwards
    assert type(output) is type(stock)


def test_the_stock_chain_decodes_with_our_head(target: PreTrainedModel, text: Tensor) -> None:
    for head in (random_head(target), oracle_head(target, text)):
        output, _ = forwards_in(target, assistant_model=head, speculation_type="dflash")
        assert output.sequences.tolist() == text.tolist()
        assert not isinstance(output, JetSpecGenerateOutput)


def test_the_stock_chain_accepts_what_an_oracle_drafts(target: PreTrainedModel, text: Tensor) -> None:
    _, num_forwards = forwards_in(target, assistant_model=oracle_head(target, text), speculation_type="dflash")
    assert num_forwards <= 6
    _, num_forwards = forwards_in(target, assistant_model=constant_head(target, 0), speculation_type="dflash")
    assert num_forwards >= 18


# --- without the wrapper ---


def test_custom_generate_needs_no_wrapper(target: PreTrainedModel, text: Tensor) -> None:
    uninstall()
    assert generate(target, custom_generate=decode_with(random_head(target))).tolist() == text.tolist()
    output = generate(target, custom_generate=decode_with(oracle_head(target, text)), return_dict_in_generate=True)
    assert isinstance(output, JetSpecGenerateOutput)
    assert output.sequences.tolist() == text.tolist()
    assert output.statistics.num_rounds == 4


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True},
        {"eos_token_id": [32, 21]},
        {"repetition_penalty": 1.5},
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])},
    ],
    ids=["sample", "eos", "repetition_penalty", "padding"],
)
def test_custom_generate_takes_the_options_of_generate(target: PreTrainedModel, options: dict[str, Any]) -> None:
    plain = generate(target, **options)
    uninstall()
    assert generate(target, **options, custom_generate=decode_with(random_head(target))).tolist() == plain.tolist()


@pytest.mark.parametrize("knows_the_text", [False, True])
def test_a_chain_with_grafts_gives_the_same_tokens(target: PreTrainedModel, knows_the_text: bool) -> None:
    prompt = torch.tensor([[3, 14, 15, 9, 3, 14, 15, 9, 3, 14]])
    options = {"max_new_tokens": 20, "do_sample": False}
    text = target.generate(prompt, **options)
    head = oracle_head(target, text) if knows_the_text else random_head(target)
    # Few nodes are possible, and the grafts reach deeper than the block.
    assert head.config.num_assistant_tokens > head.config.block_size < head.config.prompt_lookup_num_tokens
    decode = decode_with(head, options=DraftOptions(24, prompt_lookup_num_tokens=10, is_chain=True))
    assert target.generate(prompt, **options, custom_generate=decode).tolist() == text.tolist()


def test_custom_generate_continues_a_cache(target: PreTrainedModel, text: Tensor) -> None:
    uninstall()
    cache = DynamicCache(config=target.config)
    with torch.no_grad():
        target(PROMPT[:, :4], **{CACHE: cache})
    tokens = generate(target, **{CACHE: cache}, custom_generate=decode_with(random_head(target)))
    assert tokens.tolist() == text.tolist()


def test_custom_generate_streams(golden: Path, capsys: pytest.CaptureFixture) -> None:
    target = AutoModelForCausalLM.from_pretrained(golden / "target")
    tokenizer = AutoTokenizer.from_pretrained(golden / "target")
    text = generate(target)
    uninstall()
    capsys.readouterr()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    generate(target, custom_generate=decode_with(oracle_head(target, text), streamer=streamer))
    printed = capsys.readouterr().out.split()
    assert printed == [f"t{token}" for token in text[0, PROMPT.shape[1] :].tolist()]


def test_custom_generate_stops_at_strings(target: PreTrainedModel) -> None:
    text = generate(target)
    vocabulary = {f"<{token}>": token for token in range(63)} | {"abcdef": 63}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="<0>")))
    criteria = StoppingCriteriaList([StopStringCriteria(tokenizer, [f"<{text[0, 12]}>"])])
    stopped = generate(target, stopping_criteria=criteria)
    assert stopped.shape[1] < text.shape[1]
    uninstall()
    decode = decode_with(oracle_head(target, text))
    assert generate(target, stopping_criteria=criteria, custom_generate=decode).tolist() == stopped.tolist()


def test_custom_generate_refuses_what_generate_refuses(make_target: Callable, target: PreTrainedModel) -> None:
    head = random_head(make_target(vocab_size=80))
    uninstall()
    with pytest.raises(ValueError, match="vocab_size 80 and 64"):
        generate(target, custom_generate=decode_with(head))


# --- PEFT ---


def adapted(head: JetSpecDraftHead) -> PeftModel:
    """A head with an adapter that does something."""
    model = get_peft_model(head, LoraConfig(target_modules=["q_proj"], modules_to_save=["fc"], r=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weight.normal_(std=0.5)
    return model.eval()


def test_a_head_in_a_peft_model_drafts(target: PreTrainedModel, text: Tensor) -> None:
    def accepted(head: Any) -> list[int]:
        output = generate(target, assistant_model=head, return_dict_in_generate=True, max_new_tokens=40)
        assert output.sequences[:, :26].tolist() == text.tolist()
        assert isinstance(output, JetSpecGenerateOutput)
        return output.statistics.accepted_lengths

    bare = accepted(random_head(target))
    model = adapted(random_head(target))
    with_adapter = accepted(model)
    assert with_adapter != bare
    with model.disable_adapter():
        assert accepted(model) == bare
    assert accepted(model.merge_and_unload()) == with_adapter


def test_a_head_takes_an_adapter_by_itself(target: PreTrainedModel, text: Tensor) -> None:
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:  # a version that may not be out yet
        pytest.skip(f"transformers refuses this PEFT: {error}")
    head = random_head(target)
    head.add_adapter(LoraConfig(target_modules=["q_proj"], r=2))
    assert generate(target, assistant_model=head).tolist() == text.tolist()


def test_a_saved_adapter_drafts_the_same(target: PreTrainedModel, tmp_path: Path) -> None:
    model = adapted(random_head(target))
    output = generate(target, assistant_model=model, return_dict_in_generate=True)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(random_head(target), tmp_path).eval()
    again = generate(target, assistant_model=loaded, return_dict_in_generate=True)
    assert again.statistics.accepted_lengths == output.statistics.accepted_lengths


def test_a_target_in_a_peft_model_verifies(target: PreTrainedModel, text: Tensor) -> None:
    head = random_head(target)
    model = get_peft_model(target, LoraConfig(target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", r=2))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3)
    model = model.eval()
    plain = model.generate(input_ids=PROMPT, max_new_tokens=20, do_sample=False)
    assert plain.tolist() != text.tolist()
    for one in (head, oracle_head(target, plain), adapted(head)):
        output = model.generate(
            input_ids=PROMPT, max_new_tokens=20, do_sample=False, assistant_model=one, return_dict_in_generate=True
        )
        assert isinstance(output, JetSpecGenerateOutput)
        assert output.sequences.tolist() == plain.tolist()


# --- pipeline ---


@pytest.mark.parametrize("texts", ["t3 t14 t15", ["t3 t14 t15", "t9", "t7 t30"]], ids=["one", "batch"])
def test_a_pipeline_takes_a_head_as_assistant(golden: Path, texts: str | list[str]) -> None:
    target = AutoModelForCausalLM.from_pretrained(golden / "target")
    tokenizer = AutoTokenizer.from_pretrained(golden / "target", padding_side="left")
    tokenizer.pad_token_id = 0
    head = JetSpecDraftHead.from_pretrained(golden / "head_causal")
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False, "batch_size": 2}
    plain = pipeline("text-generation", model=target, tokenizer=tokenizer)(texts, **options)
    num_passes = 0

    def count(*args: Any) -> None:
        nonlocal num_passes
        num_passes += 1

    with head.register_forward_hook(count):
        generator = pipeline("text-generation", model=target, tokenizer=tokenizer, assistant_model=head)
        assert generator(texts, **options) == plain
    assert num_passes > 0


# --- the package as a whole ---


def test_the_package_patches_nothing_else() -> None:
    """Of all that `GenerationMixin` holds, two methods come from here."""
    ours = [
        name
        for name, member in vars(GenerationMixin).items()
        if getattr(member, "__globals__", {}).get("__name__", "").startswith(jetspec_hf.__name__)
    ]
    assert sorted(ours) == sorted(WRAPPED)
