"""The trainer: what it learns, and what it leaves alone."""

import json
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.markov import KINDS, addition
from support.training import losses_of, make_rows, make_trainer
from transformers import (
    DynamicCache,
    EarlyStoppingCallback,
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    Qwen3ForCausalLM,
)

from jetspec_hf.drafting.candidates import JetSpecCandidateGenerator
from jetspec_hf.target.taps import HiddenStateTaps
from jetspec_hf.training.data import collate, pack
from jetspec_hf.training.evaluation import tokens_per_round
from jetspec_hf.training.trainer import JetSpecTrainer


def test_a_trained_head_drafts_what_the_target_says(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    head = make_head(target, initializer_range=0.05)
    rows = make_rows(target, 8)
    prompt = torch.tensor([rows[0]["input_ids"][:4]])
    before = {name: value.clone() for name, value in target.state_dict().items()}

    def rounds() -> int:
        output = target.generate(
            prompt,
            assistant_model=head,
            num_assistant_tokens=8,
            max_new_tokens=20,
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert output.sequences[0].tolist() == rows[0]["input_ids"]
        return output.statistics.num_rounds

    untrained = rounds()
    trainer = make_trainer(head, target, rows, tmp_path)
    trainer.train()
    head.eval()
    assert rounds() <= untrained * 2 // 3
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


SLIDING = {"use_sliding_window": True, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
MARKOV = [{"markov_rank": 5, "markov_head_type": kind} for kind in KINDS]


@pytest.mark.parametrize("options", [{}, SLIDING, *MARKOV], ids=str)
def test_the_loss_is_the_divergence_at_each_slot_of_each_block(options: dict, tmp_path, make_target, make_head) -> None:
    """All blocks of a text at once against one block after the other, as in decoding."""
    target = make_target(vocab_size=64)
    head = make_head(target, **options).eval()
    if options in MARKOV:
        torch.nn.init.normal_(head.markov_head.markov_w2.weight)
    rows = make_rows(target, 1)
    trainer = make_trainer(head, target, rows, tmp_path, num_anchors=100, plain_loss_weight=0.3)
    with torch.no_grad():
        loss = trainer.compute_loss(head, collate(rows, 0)._asdict())

        ids = torch.tensor([rows[0]["input_ids"]])
        output = target(ids, output_hidden_states=True)
        taps = torch.cat([output.hidden_states[i + 1] for i in head.config.target_layer_ids], dim=-1)
        block = head.config.block_size
        divergences = []
        for anchor in range(4, 23):
            tokens = torch.full((1, block), head.config.mask_token_id)
            tokens[0, 0] = ids[0, anchor]
            hidden = head(
                target.get_input_embeddings()(tokens), taps[:, :anchor], cache=DynamicCache()
            ).last_hidden_state
            for slot in range(1, min(block, 24 - anchor)):
                p = output.logits[0, anchor + slot - 1].log_softmax(-1)
                plain = target.lm_head(hidden[0, slot])
                logits = plain
                if options in MARKOV:
                    path = rows[0]["input_ids"][anchor : anchor + slot]
                    logits = plain + addition(head.markov_head, target, path, hidden[0, slot])
                both = [(p.exp() * (p - one.log_softmax(-1))).sum() for one in (logits, plain)]
                divergences.append(both[0] + 0.3 * both[1] if options in MARKOV else both[0])
    torch.testing.assert_close(loss, torch.stack(divergences).mean(), atol=1e-4, rtol=1e-4)


def test_a_markov_head_learns_which_tokens_follow_which(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    rows = make_rows(target, 8)
    counted = []
    for options in ({}, {"markov_rank": 8}):
        head = make_head(target, initializer_range=0.05, **options)
        trainer = make_trainer(head, target, rows, tmp_path, max_steps=60, eval_num_assistant_tokens=[8])
        trainer.train()
        counted.append(trainer.evaluate(rows)["eval_tokens_per_round_8"])
    assert counted[1] > counted[0]


def test_evaluation_reports_what_generate_emits(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    head = make_head(target, initializer_range=0.05)
    rows = make_rows(target, 4)
    trainer = make_trainer(head, target, rows, tmp_path, eval_num_assistant_tokens=[8], max_steps=40)
    before = trainer.evaluate(rows)
    trainer.train()
    after = trainer.evaluate(rows)
    assert after["eval_loss"] < before["eval_loss"] / 2
    assert after["eval_tokens_per_round_8"] > before["eval_tokens_per_round_8"]

    num_tokens, num_rounds = 0, 0
    for row in rows:
        statistics = target.generate(
            torch.tensor([row["input_ids"][:4]]),
            assistant_model=head,
            num_assistant_tokens=8,
            max_new_tokens=20,
            do_sample=False,
            return_dict_in_generate=True,
        ).statistics
        num_tokens += sum(length + 1 for length in statistics.accepted_lengths)
        num_rounds += statistics.num_rounds
    assert after["eval_tokens_per_round_8"] == pytest.approx(num_tokens / num_rounds, rel=0.01)


def test_accuracy_per_depth_is_that_of_one_block_after_the_other(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    head = make_head(target, initializer_range=0.05)
    rows = make_rows(target, 3)
    trainer = make_trainer(head, target, rows, tmp_path, num_anchors=100, eval_num_assistant_tokens=[2], max_steps=30)
    trainer.train()
    reported = trainer.evaluate(rows)

    head.eval()
    right: dict[int, list[bool]] = {}
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with HiddenStateTaps(target, head.config.target_layer_ids) as taps, taps.recording(), torch.no_grad():
            target(ids)
        states = taps.take()
        for anchor in range(4, 23):
            drafter = JetSpecCandidateGenerator(head, target, num_assistant_tokens=100, is_chain=True)
            drafter.extend(states[:, :anchor], torch.arange(anchor)[None])
            with torch.no_grad():
                drafted = drafter.draft(ids[:, anchor], max_depth=100).tokens[0, 1:]
            for depth, (ours, text) in enumerate(zip(drafted, ids[0, anchor + 1 :], strict=False), start=1):
                right.setdefault(depth, []).append(bool(ours == text))
    assert len(right) == head.config.block_size - 1
    for depth, hits in right.items():
        assert reported[f"eval_accuracy_depth_{depth}"] == pytest.approx(sum(hits) / len(hits))
    assert 1 < reported["eval_tokens_per_round_chain"] <= head.config.block_size


LAYERS = {"num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        (Qwen3ForCausalLM, {}),
        (Qwen3ForCausalLM, {"use_sliding_window": True, **LAYERS}),
        (LlamaForCausalLM, {}),
        (MistralForCausalLM, {"sliding_window": 5}),
        (Gemma3ForCausalLM, {"query_pre_attn_scalar": 8, **LAYERS}),
    ],
    ids=["qwen3", "qwen3 sliding", "llama", "mistral", "gemma3"],
)
def test_packed_texts_train_as_if_alone(tmp_path, make_head, family, options, attention) -> None:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    target = family(family.config_class(**(sizes | options))).eval()
    target.set_attn_implementation(attention)
    head = make_head(target, **SLIDING)
    head.set_attn_implementation(attention)
    texts = [torch.randint(60, (length,)).tolist() for length in (13, 9, 17, 3, 21)]
    rows = [{"input_ids": ids, "loss_mask": [i % 7 != 3 for i in range(len(ids))]} for ids in texts]
    packed = pack({name: [row[name] for row in rows] for name in ("input_ids", "loss_mask")}, max_length=32)
    packed = [{name: column[i] for name, column in packed.items()} for i in range(len(packed["length"]))]
    assert [row["document_lengths"] for row in packed] == [[21, 9], [17, 13], [3]]
    trainer = make_trainer(head, target, rows, tmp_path, num_anchors=100)

    def total_of(rows: list[dict]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        head.zero_grad()
        loss = trainer.compute_loss(head, collate(rows, 0)._asdict(), num_items_in_batch=1)
        loss.backward()
        return loss.detach(), [parameter.grad.clone() for parameter in head.parameters()]

    one_by_one = [total_of([row]) for row in rows]
    loss, gradients = total_of(packed)
    torch.testing.assert_close(loss, sum(loss for loss, _ in one_by_one), atol=1e-5, rtol=1e-5)
    for gradient, *others in zip(gradients, *(gradients for _, gradients in one_by_one), strict=True):
        torch.testing.assert_close(gradient, sum(others), atol=1e-4, rtol=1e-4)


def test_a_target_that_mixes_packed_texts_is_refused(tmp_path, make_target, make_head, monkeypatch) -> None:
    target = make_target(vocab_size=64)
    rows = make_rows(target, 4)
    packed = pack({name: [row[name] for row in rows] for name in ("input_ids", "loss_mask")}, max_length=64)
    packed = [{name: column[i] for name, column in packed.items()} for i in range(2)]
    trainer = make_trainer(make_head(target), target, packed, tmp_path, max_steps=1)
    trainer.train()
    read = target.model.forward
    monkeypatch.setattr(target.model, "forward", lambda position_ids=None, **inputs: read(**inputs))
    with pytest.raises(ValueError, match="see each other under `attn_implementation` 'sdpa'"):
        trainer.train()


def test_calibration_finds_the_temperatures_under_which_the_texts_are_likeliest(
    tmp_path, make_target, make_head
) -> None:
    target = make_target(vocab_size=64)
    head = make_head(target, initializer_range=0.05)
    rows = make_rows(target, 4)
    trainer = make_trainer(head, target, rows, tmp_path, num_anchors=100, max_steps=20)
    trainer.train()
    found = trainer.calibrate(rows)
    assert head.config.draft_temperatures == found

    steps = [step / 20 for step in range(6, 41)]
    surprisals = torch.zeros(len(steps), head.config.block_size - 1)
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        with HiddenStateTaps(target, head.config.target_layer_ids) as taps, taps.recording(), torch.no_grad():
            target(ids)
        states = taps.take()
        for anchor in range(4, 23):
            block = torch.full((1, head.config.block_size), head.config.mask_token_id)
            block[0, 0] = ids[0, anchor]
            with torch.no_grad():
                hidden = head(target.get_input_embeddings()(block), states[:, :anchor]).last_hidden_state
                logits = target.lm_head(hidden[0])
            for depth in range(1, min(head.config.block_size, 24 - anchor)):
                for i, step in enumerate(steps):
                    surprisals[i, depth - 1] -= (logits[depth] / step).log_softmax(-1)[ids[0, anchor + depth]]
    for depth, temperature in enumerate(found):
        assert surprisals[steps.index(temperature), depth] == pytest.approx(float(surprisals[:, depth].min()), rel=1e-4)
    assert len(set(found)) > 1
    assert steps[0] < min(found)


def test_callbacks_know_what_evaluation_found(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    rows = make_rows(target, 4)
    options = {
        "max_steps": 30,
        "learning_rate": 0.0,  # nothing gets better
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "first_tokens_per_round_2",
        "eval_num_assistant_tokens": [2],
    }
    parts = {"first": rows[:2], "rest": rows[2:]}
    trainer = make_trainer(make_head(target), target, rows, tmp_path, parts, **options)
    trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=2))
    trainer.train()
    found = [
        entry["eval_first_tokens_per_round_2"] for entry in trainer.state.log_history if "eval_first_loss" in entry
    ]
    assert trainer.state.global_step == len(found) == 3
    assert trainer.state.best_metric == found[0]
    assert sum("eval_rest_tokens_per_round_2" in entry for entry in trainer.state.log_history) == 3


def test_accumulated_batches_are_one_batch(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    rows = make_rows(target, 8)
    for i, row in enumerate(rows):  # batches of unequal weight
        row["loss_mask"] = [0] * (4 + 2 * i) + [1] * (20 - 2 * i)
    seen = []
    for batch_size, steps in ((8, 1), (2, 4)):
        trainer = make_trainer(
            make_head(target, initializer_range=0.05),
            target,
            rows,
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=steps,
            max_steps=5,
            logging_steps=1,
        )
        trainer.train()
        seen.append(losses_of(trainer))
    assert seen[0] == pytest.approx(seen[1], rel=1e-4)


def test_a_resumed_run_repeats_the_uninterrupted_one(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    rows = make_rows(target, 24)
    options = {"max_steps": 8, "logging_steps": 1, "save_strategy": "steps", "save_steps": 4}

    def trainer(folder) -> JetSpecTrainer:
        return make_trainer(make_head(target, initializer_range=0.05), target, rows, folder, **options)

    whole = trainer(tmp_path)
    whole.train()
    resumed = trainer(tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses_of(resumed)[-4:] == pytest.approx(losses_of(whole)[-4:], rel=1e-5)
    for ours, theirs in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


TWO_PROCESSES = """
import json, os, sys
from transformers import Qwen3ForCausalLM
from jetspec_hf import JetSpecDraftHead
from jetspec_hf.training.data import collate
from jetspec_hf.training.trainer import JetSpecTrainer, JetSpecTrainingArguments
folder = sys.argv[1]
trainer = JetSpecTrainer(
    JetSpecDraftHead.from_pretrained(folder + "/head"),
    Qwen3ForCausalLM.from_pretrained(folder + "/target"),
    args=JetSpecTrainingArguments(
        folder + "/run", per_device_train_batch_size=4, max_steps=20, learning_rate=5e-3, num_anchors=8,
        use_cpu=True, ddp_backend="gloo",
        report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        train_sampling_strategy="sequential", lr_scheduler_type="constant", dataloader_pin_memory=False,
    ),
    train_dataset=json.load(open(folder + "/rows.json")),
    data_collator=lambda batch: collate(batch, 0)._asdict(),
)
trainer.train()
if trainer.is_world_process_zero():
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    json.dump(losses, open(folder + "/losses.json", "w"))
trainer.accelerator.wait_for_everyone()  # one that leaves early takes the connection with it
trainer.accelerator.end_training()
os._exit(0)  # torch's threads now and then abort a process that shuts down, after all is done
"""


def test_two_processes_train_like_one(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    shape = {"initializer_range": 0.05, "markov_rank": 4}
    make_head(target, **shape).save_pretrained(tmp_path / "head")
    target.save_pretrained(tmp_path / "target")
    rows = make_rows(target, 16)
    for i, row in enumerate(rows):
        row["loss_mask"] = [0] * (4 + i) + [1] * (20 - i)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    run = subprocess.run([*launch, str(script), str(tmp_path)], capture_output=True, timeout=300, text=True)
    assert run.returncode == 0, run.stderr
    two = json.loads((tmp_path / "losses.json").read_text())

    options = {"max_steps": 20, "train_sampling_strategy": "sequential", "lr_scheduler_type": "constant"}
    one = make_trainer(make_head(target, **shape), target, rows, tmp_path, logging_steps=1, **options)
    one.train()
    assert len(two) == 20
    assert losses_of(one) == pytest.approx(two, rel=1e-5, abs=1e-5)


def test_an_adapter_learns_and_the_head_stays(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    head = make_head(target, initializer_range=0.05)
    rows = make_rows(target, 8)
    frozen = {name: value.clone() for name, value in head.state_dict().items()}
    adapted = get_peft_model(head, LoraConfig(r=4, target_modules=["q_proj", "o_proj", "down_proj"]))
    trainer = make_trainer(adapted, target, rows, tmp_path / "run", max_steps=40, eval_num_assistant_tokens=[8])
    before = trainer.evaluate(rows)
    trainer.train()
    after = trainer.evaluate(rows)
    assert after["eval_loss"] < before["eval_loss"]
    adapted.save_pretrained(tmp_path / "adapter")
    fresh = make_head(target)
    fresh.load_state_dict(frozen)
    merged = PeftModel.from_pretrained(fresh, tmp_path / "adapter").merge_and_unload()
    texts = [(row["input_ids"], 4) for row in rows]
    assert tokens_per_round(merged, target, texts, [8])[8] == pytest.approx(after["eval_tokens_per_round_8"])
    unwrapped = {
        name.replace("base_layer.", ""): value for name, value in adapted.get_base_model().state_dict().items()
    }
    assert all(torch.equal(unwrapped[name], value) for name, value in frozen.items())


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    head = make_head(target)
    head.norm.weight.data[0] = float("nan")
    trainer = make_trainer(head, target, make_rows(target, 8), tmp_path, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match="step 0 is nan"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_rows_without_answers_are_refused(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    rows = [row | {"loss_mask": [0] * 24} for row in make_rows(target, 8)]
    with pytest.raises(ValueError, match="no answer to learn from"):
        make_trainer(make_head(target), target, rows, tmp_path).train()


def test_a_head_for_another_target_is_refused(tmp_path, make_target, make_head) -> None:
    with pytest.raises(ValueError, match="vocab_size 64 and 80"):
        make_trainer(make_head(make_target(vocab_size=64)), make_target(vocab_size=80), [], tmp_path)


def test_flex_attention_trains_on_cuda_only(tmp_path, make_target, make_head) -> None:
    target = make_target(vocab_size=64)
    head = make_head(target)
    head.set_attn_implementation("flex_attention")
    with pytest.raises(ValueError, match="flex attention trains on CUDA only; this run is on 'cpu'"):
        make_trainer(head, target, make_rows(target, 8), tmp_path).train()


def test_foreign_answers_are_noticed(tmp_path, make_target, make_head, caplog) -> None:
    target = make_target(vocab_size=64)
    rows = make_rows(target, 8)
    foreign = [row | {"input_ids": row["input_ids"][:4] + [(7 * i) % 60 for i in range(20)]} for row in rows]
    for data, is_noticed in ((rows, False), (foreign, True)):
        caplog.clear()
        make_trainer(make_head(target), target, data, tmp_path, max_steps=1).train()
        assert ("do not look like the target's own" in caplog.text) == is_noticed
