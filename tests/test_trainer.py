"""The trainer: what it learns, and what it leaves alone."""

import torch
from transformers import DynamicCache

from jetspec_hf.data import collate
from jetspec_hf.trainer import JetSpecTrainer, JetSpecTrainingArguments


def make_rows(target, num_rows: int) -> list[dict]:
    prompts = torch.randint(4, 60, (num_rows, 4), generator=torch.Generator().manual_seed(0))
    texts = target.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=20, min_new_tokens=20, do_sample=False
    )
    return [{"input_ids": text.tolist(), "loss_mask": [0] * 4 + [1] * 20, "length": 24} for text in texts]


def make_trainer(head, target, rows, folder, **options) -> JetSpecTrainer:
    arguments = {
        "per_device_train_batch_size": 8,
        "max_steps": 150,
        "learning_rate": 5e-3,
        "num_anchors": 8,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return JetSpecTrainer(
        head,
        target,
        args=JetSpecTrainingArguments(str(folder), **(arguments | options)),
        train_dataset=rows,
        data_collator=lambda batch: collate(batch, 0)._asdict(),
    )


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
    assert rounds() <= untrained // 2
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_the_loss_is_the_divergence_at_each_slot_of_each_block(tmp_path, make_target, make_head) -> None:
    """All blocks of a text at once against one block after the other, as in decoding."""
    target = make_target(vocab_size=64)
    head = make_head(target).eval()
    rows = make_rows(target, 1)
    trainer = make_trainer(head, target, rows, tmp_path, num_anchors=100)
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
                target.get_input_embeddings()(tokens), taps[:, :anchor], past_key_values=DynamicCache()
            ).last_hidden_state
            for slot in range(1, min(block, 24 - anchor)):
                q = target.lm_head(hidden[0, slot]).log_softmax(-1)
                p = output.logits[0, anchor + slot - 1].log_softmax(-1)
                divergences.append((p.exp() * (p - q)).sum())
    torch.testing.assert_close(loss, torch.stack(divergences).mean(), atol=1e-4, rtol=1e-4)
