"""The card of a trained head: what it says, and that it goes wherever the head goes."""

from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi, ModelCard
from peft import LoraConfig, get_peft_model
from support.training import make_rows, make_trainer

from jetspec_hf.head.loading import is_hub_id
from jetspec_hf.training.model_card import Provenance, own_name


@pytest.fixture
def pushed(monkeypatch) -> list[str | None]:
    """The card of each folder that is uploaded, instead of an upload."""
    cards: list[str | None] = []

    def upload_folder(self, *, folder_path, path_in_repo=None, **kwargs) -> Future:
        card = Path(folder_path) / "README.md"
        if path_in_repo is None:
            cards.append(card.read_text() if card.exists() else None)
        done: Future = Future()
        done.set_result(None)
        return done

    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, *args, **kwargs: SimpleNamespace(repo_id="someone/head"))
    return cards


@pytest.fixture
def train(tmp_path, make_target, make_head):
    """A trained trainer; both target and head were read from folders."""

    def train(provenance: Provenance | None = None, head=None, **options):
        target = make_target(vocab_size=64)
        target.config.name_or_path = str(tmp_path / "models/tiny-target")
        head = make_head(target) if head is None else head(make_head(target))
        rows = make_rows(target, 4)
        arguments = {"max_steps": 2, "eval_num_assistant_tokens": [2], "output_dir": "runs/first"} | options
        folder = tmp_path / arguments.pop("output_dir")
        trainer = make_trainer(head, target, rows, folder, rows, provenance=provenance, **arguments)
        trainer.train()
        return trainer

    return train


EACH_STEP = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("push", "options"),
    [
        (lambda trainer: trainer.save_model(), {"push_to_hub": True}),
        (lambda trainer: trainer.push_to_hub(license="mit"), {}),
        (lambda trainer: None, {"push_to_hub": True, "hub_strategy": "every_save", "hub_always_push": True}),
    ],
    ids=["save_model", "push_to_hub", "hub_strategy"],
)
def test_every_push_takes_the_card_along_and_no_path(train, pushed, tmp_path, push, options) -> None:
    push(train(**EACH_STEP, **options))
    assert pushed
    for text in pushed:
        assert "# JetSpec draft head for tiny-target" in text
        assert "| tokens_per_round_2 |" in text
        assert str(tmp_path) not in text
        assert ModelCard(text).data.base_model is None
    assert 'JetSpecDraftHead.from_pretrained("someone/head")' in text
    assert ModelCard(text).data.license == ("mit" if not options else None)


def test_the_metadata_name_what_is_on_the_hub(train, tmp_path) -> None:
    local = tmp_path / "answers.jsonl"
    local.touch()
    trainer = train(Provenance("Qwen/Qwen3-0.6B", ["openai/gsm8k:main", str(local)], reading="packed"), **EACH_STEP)
    trainer.create_model_card(tags="test")
    card = ModelCard.load(tmp_path / "runs/first/README.md")
    assert (card.data.base_model, card.data.datasets) == ("Qwen/Qwen3-0.6B", ["openai/gsm8k"])
    assert card.data.library_name == "transformers"
    assert {"jetspec", "test"} <= set(card.data.tags)
    assert "Data: openai/gsm8k:main, answers.jsonl; packed." in card.text
    assert "After step 2, on texts held out" in card.text
    reported = trainer.state.log_history[-2]  # before that of the whole run
    found = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert found["tokens_per_round_2"] == pytest.approx(reported["eval_tokens_per_round_2"], abs=1e-3)


def test_a_target_without_a_name_is_none_of_the_hub(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    make_trainer(make_head(target), target, [], tmp_path).create_model_card()
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.base_model is None
    assert "# JetSpec draft head for a Qwen3ForCausalLM" in card.text


def test_the_readme_of_someone_else_stays(train, tmp_path, caplog) -> None:
    trainer = train()
    readme = tmp_path / "runs/first/README.md"
    readme.write_text("# My notes")
    trainer.create_model_card()
    assert readme.read_text() == "# My notes"
    assert f"{readme} is not the card of a head" in caplog.text
    readme.unlink()
    for _ in range(2):  # our own is written over
        readme.write_text(readme.read_text() + "old" if readme.exists() else "# Model Card for Model ID")
        trainer.create_model_card()
        assert readme.read_text().endswith("Not evaluated.\n")


# PEFT still reads an attribute that transformers has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_card_of_an_adapter_says_so(train, pushed, tmp_path) -> None:
    def adapt(head):
        head.config.name_or_path = str(tmp_path / "models/tiny-head")
        return get_peft_model(head, LoraConfig(r=2, target_modules=["q_proj"]))

    trainer = train(head=adapt, **EACH_STEP, push_to_hub=True, hub_strategy="every_save", hub_always_push=True)
    trainer.save_model()
    for text in pushed:
        assert ModelCard(text).data.library_name == "peft"
        assert 'JetSpecDraftHead.from_pretrained("tiny-head")' in text
        assert 'PeftModel.from_pretrained(head, "someone/head")' in text
        assert str(tmp_path) not in text


def test_a_hub_id_is_told_from_a_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org/model").mkdir(parents=True)
    assert [is_hub_id(name) for name in ("Qwen/Qwen3-8B", "openai/gsm8k:main:test", "gpt2")] == [True] * 3
    assert not any(is_hub_id(name) for name in ("org/model", str(tmp_path), "./org/model", "a/b/c"))
    assert [own_name(name) for name in ("org/model", "./org/model/", "other/model")] == [
        "model",
        "model",
        "other/model",
    ]
